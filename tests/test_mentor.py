"""The model: masks, padding, positions, cache, guidance, splice and frozen parts are right."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import CPU, only, randomize
from mentor import (DecoderConfig, Mentor, MentorConfig, SamplingConfig, TextConfig,
                    VisionConfig, rotary_table, rotate, sequence_order, splice, start_from_codebook)
from sample import generate, guide
from tokenizer import VQGAN, TokenizerConfig

close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
CLIPS_END = "encoder.vision.blocks.1.", "encoder.vision.post_norm."  # in released weights alone

def some_codes(count):
    return torch.randint(64, (count, 64), generator=torch.Generator().manual_seed(1))

def nobody(count):
    return torch.zeros(count, dtype=torch.bool)

def greedy(model, batch, scale):
    generators = [torch.Generator() for _ in batch.lengths]
    return generate(model, batch, SamplingConfig(scale, temperature=0.0), generators)

# --- Padding and masks
def test_logits_of_a_batch_equal_each_sample_alone(model, make_batch):
    """Padding changes nothing, neither in the text encoder nor in the decoder, and samples do not mix."""
    batch, codes = make_batch(model.config, 6), some_codes(6)
    assert batch.lengths.unique().numel() > 2
    for drop in (nobody(6), ~nobody(6)):
        together = model(batch, codes, drop)
        for i in range(6):
            close(together[i : i + 1], model(only(batch, i), codes[i : i + 1], drop[i : i + 1]))

def test_appended_padding_changes_no_logit(model, make_batch):
    batch, codes = make_batch(model.config, 3, text_to_image=1.0), some_codes(3)
    longer = replace(batch, text_ids=F.pad(batch.text_ids, (0, 7)))
    close(model(longer, codes, nobody(3)), model(batch, codes, nobody(3)))
    assert torch.equal(greedy(model, longer, 3.0), greedy(model, batch, 3.0))  # nor any code from the cache

def test_a_code_is_predicted_from_earlier_codes_only(model, make_batch):
    batch, codes = make_batch(model.config, 3), some_codes(3)
    changed = codes.clone()
    changed[:2, 20] = (changed[:2, 20] + 1) % 64
    before, after = model(batch, codes, nobody(3)), model(batch, changed, nobody(3))
    assert torch.equal(before[:, :21], after[:, :21]) and torch.equal(before[2], after[2])
    assert (before[:2, 21] != after[:2, 21]).any(-1).all()

def test_sequence_order_by_hand():
    order = sequence_order(torch.tensor([3, 1]), n_prefix=3, n_code=2)
    assert order.tolist() == [[0, 1, 2, 3, 4], [0, 3, 4, 1, 2]]  # prefix, codes, padding

# --- Cache and guidance
@torch.no_grad()
@pytest.mark.parametrize("alone", [False, True])
def test_cached_decoding_equals_the_full_forward_everywhere(alone, model, make_batch):
    """Ragged prefixes, or one of a single token; conditional rows before unconditional ones, for guidance."""
    batch, n = make_batch(model.config, 5, **{"text_to_image": 1.0} if alone else {}), 5
    if alone:
        batch, n = replace(batch, text_ids=torch.tensor([[1]]), lengths=torch.tensor([1])), 1
    codes, hidden, drops = some_codes(n), model.encoder(batch), (nobody(n), ~nobody(n))
    full = torch.cat([model(batch, codes, drop) for drop in drops])
    prefix = torch.cat([model.projector(hidden, batch.lengths, drop) for drop in drops])
    logits, cache = model.prefill(prefix, batch.lengths.repeat(2))
    for k in range(codes.shape[1]):
        close(logits, full[:, k], atol=5e-5)
        if k + 1 < codes.shape[1]:
            logits = model.decode_step(codes[:, k].repeat(2), cache)

def test_the_guidance_formula():
    conditional, unconditional = both = torch.randn(2, 4, 10)
    both = both.flatten(0, 1)
    close(guide(both, 1.0), conditional)
    assert torch.equal(guide(both, 0.0), unconditional)
    close(guide(both, 7.5), 7.5 * conditional - 6.5 * unconditional)

@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_drawn_codes_follow_the_guided_logits_of_the_full_forward(scale, model, make_batch):
    batch = make_batch(model.config, 4)
    codes = greedy(model, batch, scale)
    conditional, unconditional = model(batch, codes, nobody(4)), model(batch, codes, ~nobody(4))
    assert torch.equal(codes, (unconditional + scale * (conditional - unconditional)).argmax(-1))
    assert len(codes.unique(dim=0)) == 4

def test_the_unconditional_prefix_is_the_last_rows_of_a_learned_table(model):
    projector, hidden, lengths = model.projector, torch.randn(2, 9, 32), torch.tensor([9, 4])
    project = lambda x: projector.fc2(F.gelu(projector.fc1(x), approximate="tanh"))  # noqa: E731
    table = projector.unconditional
    assert isinstance(table, torch.nn.Parameter) and len(table) == model.config.context
    for drop, first in (([True, True], table[-9:]), ([False, True], hidden[0])):
        prefix = projector(hidden, lengths, torch.tensor(drop))
        close(prefix[0], project(first)), close(prefix[1, :4], project(table[-4:]))

# --- Positions
def test_the_prefix_is_not_rotated_and_codes_differ_along_both_axes():
    table, x = rotary_table(DecoderConfig(grid_size=8, width=16, n_head=1)), torch.randn(1, 1, 1, 16)
    assert len(table) == 1 + 64
    turned = [rotate(x, rotations) for rotations in table]
    assert torch.equal(turned[0], x) and torch.equal(turned[1], x)  # nor is cell (0, 0)
    assert not torch.allclose(turned[2], x) and not torch.allclose(turned[1 + 8], x)
    assert torch.equal(turned[2][..., :8], x[..., :8])              # one column on: the row's half stays
    assert torch.equal(turned[1 + 8][..., 8:], x[..., 8:])          # one row on: the column's half stays
    close(turned[30].norm(), x.norm())

def test_rotation_by_hand():
    """Pair (2i, 2i + 1) turns by cell * scale * base^(-2i / (head / 2)), interleaved."""
    config = DecoderConfig(grid_size=4, width=8, n_head=1)
    for change, fast, slow in (({}, 1, 1 / 100), ({"rope_scale": 3.0, "rope_base": 16.0}, 3, 3 / 4)):
        rotations = rotary_table(replace(config, **change))[1 + 11]
        turned = rotate(torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]), rotations)
        angles = torch.tensor([2.0 * fast, 2 * slow, 3 * fast, 3 * slow])  # row 2, column 3
        close(turned, torch.stack([angles.cos(), angles.sin()], -1).flatten())

def test_the_prefix_has_no_order_but_that_of_its_contents(model):
    """All its tokens have position 0; positions of words are in T5's attention bias."""
    prefix, codes, length = torch.randn(1, 6, 64), some_codes(1), torch.tensor([6])
    model.decoder.blocks = model.decoder.blocks[:1]  # deeper ones see that attention is causal
    swapped = prefix[:, [1, 0, 2, 3, 4, 5]]
    close(*(model.next_code_logits(p, length, codes)[:, 1:] for p in (prefix, swapped)))
    x, mask = torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)
    assert (model.encoder.text(x.flip(1), mask).flip(1) - model.encoder.text(x, mask)).abs().max() > 0.1

# --- Images in the prompt
def test_images_reach_their_own_samples(model, make_batch):
    batch, codes = make_batch(model.config, 4, text_to_image=1.0, segmentation=1.0), some_codes(4)
    before = model(batch, codes, nobody(4))
    for m, slot in enumerate(batch.image_slots[::4].tolist()):
        pixels = batch.pixels.clone()
        pixels[m] += 1.0
        changed = model(replace(batch, pixels=pixels), codes, nobody(4)) != before
        assert changed.flatten(1).any(1).nonzero().tolist() == [[slot // batch.text_ids.shape[1]]]
    assert 0 < len(batch.pixels) < 4

def test_splice_puts_tokens_in_order_and_refuses_a_wrong_number():
    words, tokens = torch.zeros(2, 3, 2), torch.arange(1.0, 5)[:, None].expand(4, 2).view(2, 2, 2)
    assert splice(words, torch.tensor([0, 1, 3, 4]), tokens)[..., 0].tolist() == [[1, 2, 0], [3, 4, 0]]
    for slots in ([0, 1, 3], [0, 1, 2, 3, 4], []):
        with pytest.raises(ValueError, match=f"{len(slots)} .*2 images of 2 tokens"):
            splice(words, torch.tensor(slots, dtype=torch.long), tokens)

def test_a_connector_gets_its_own_samples_words(model, make_batch):
    batch, given = make_batch(model.config, 5, text_to_image=1.0, recovery=1.0), []
    model.encoder.connector.register_forward_pre_hook(lambda module, inputs: given.extend(inputs))
    model.encoder(batch)
    (patches, words, mask), owners = given, batch.image_slots[::4] // batch.text_ids.shape[1]
    assert 0 < len(patches) < 5 and torch.equal(words, model.encoder.text.embedding(batch.text_ids[owners]))
    assert torch.equal(mask.sum(1), batch.lengths[owners])

def test_a_batch_without_images_still_reaches_every_weight(model, make_batch):
    """Several processes wait for the gradient of every weight."""
    batch = make_batch(model.config, 2, text_to_image=1.0)
    model(batch, some_codes(2), torch.tensor([False, True])).sum().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert len(batch.pixels) == 0 and all(n.startswith(CLIPS_END) for n in unused)

# --- Weights and training
def test_a_new_model_guesses_and_its_weights_have_the_stated_spread():
    model, codebook = Mentor(train.parse(["tiny"]).model), F.normalize(torch.randn(512, 8), dim=-1)
    text, decoder, codebook[1] = model.encoder.text, model.decoder, codebook[0]
    for weight, std in ((model.projector.fc1.weight, 0.02), (decoder.blocks[0].attention.wqkv.weight, 0.02),
                        (decoder.code_embedding.weight, 0.02), (text.embedding.weight, 1.0),
                        (text.blocks[0].q.weight, 128**-0.5 / 32**0.5), (text.blocks[0].k.weight, 128**-0.5),
                        (text.blocks[0].wo.weight, 256**-0.5), (model.projector.unconditional, 128**-0.5),
                        (model.encoder.vision.position_embedding, 128**-0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert not decoder.output.weight.any()
    start_from_codebook(decoder, codebook)
    for weight, std in ((decoder.code_embedding.weight, 0.1), (decoder.output.weight, 0.05)):
        assert torch.equal(weight[0], weight[1]) and weight.std().item() == pytest.approx(std, rel=0.2)

def test_dropout_and_norms_are_where_t5_and_llamagen_have_them(model, make_batch):
    """After embeddings, attention and MLP, and in T5 also inside the MLP and at the end."""
    calls = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output, name=name: calls.update([name]))
    model(make_batch(model.config, 2), some_codes(2), nobody(2))
    parts = ("encoder.text", 3), ("decoder", 2)
    blocks = {f"{name}.blocks.{i}.dropout": count for i in (0, 1) for name, count in parts}
    assert calls == {"encoder.text.dropout": 2, "decoder.dropout": 1, **blocks}
    for part, eps in ((model.encoder.text, 1e-6), (model.decoder, 1e-5)):
        assert {module.eps for module in part.modules() if isinstance(module, torch.nn.RMSNorm)} == {eps}

@pytest.mark.parametrize("name, trains, frozen", [
    ("align", "projector,decoder", ("encoder",)),
    ("encoder", "encoder", (*CLIPS_END, "projector", "decoder")),
    ("instruct", "connector,text,projector,decoder", ("encoder.vision",))])
def test_frozen_parts_do_not_move(name, trains, frozen, model, make_batch):
    run = replace(train.PRESETS["tiny"], model=model.config, weight_decay=0.5)
    run = replace(run, **{name: replace(getattr(run, name), trains=trains, muon_lr=0.01)})
    vqgan = randomize(VQGAN(TokenizerConfig(32, 8, (1, 1, 1), 1, 4, 8, 64)))
    stage = train.STAGE_MODULES[name](name, run, CPU, model, vqgan).train()
    parameters = dict(model.named_parameters()) | {f"vqgan.{n}": p for n, p in vqgan.named_parameters()}
    before = {n: p.clone() for n, p in parameters.items()}
    stage(replace(make_batch(model.config, 6), drop=torch.arange(6) < 2), 0)[0].backward()
    for optimizer in train.make_optimizers(stage, getattr(run, name), run):
        optimizer.step()
    still = {n for n, p in parameters.items() if torch.equal(p, before[n])}
    assert still == {n for n in parameters if n.startswith(("vqgan", *frozen))}
    assert not any("vqgan" in n for n in stage.state_dict())  # nor is it saved with the stage

@torch.no_grad()
def test_in_bfloat16_the_logits_stay_near_float32(model, make_batch):
    batch, logits = make_batch(model.config, 3), []
    for _ in range(2):
        prefix = model.projector(model.encoder(batch), batch.lengths, nobody(3))
        logits.append(model.prefill(prefix, batch.lengths)[0])
        model.bfloat16()
    assert prefix.dtype == torch.bfloat16 and logits[1].dtype == torch.float32
    assert model.decoder.rotary.dtype == torch.complex64 and greedy(model, batch, 3.0).shape == (3, 64)
    assert (logits[1] - logits[0]).abs().mean() < 0.1 * logits[0].std()

@pytest.mark.parametrize("changes, message", [
    (dict(context=256), "context=256: .*256"), (dict(connector="resampler"), "connector=resampler.*mlp"),
    (dict(n_query=8), "connector=mlp, n_query=8: must be mlp.*mlp with 0"),
    (dict(vision=VisionConfig(image_size=225)), "vision.image_size=225: .*vision.patch_size=14"),
    (dict(vision=VisionConfig(n_head=15)), "vision.width=1024: .*n_head"),
    (dict(text=TextConfig(n_bucket=3)), "n_bucket=3"), (dict(text=TextConfig(max_distance=8)), "distance")])
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MentorConfig(), **changes)
