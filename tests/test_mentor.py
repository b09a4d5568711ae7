"""The model: masks, padding, rotary positions, cache, guidance, splice, frozen parts are right, not only plausible."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import only, randomize, small_config
from mentor import PRESETS, Mentor, MentorConfig, SamplingConfig, apply_rotary, from_dict, relative_position_bucket, rotary_table, sequence_order, splice
from sample import generate, guide


def some_codes(model, count, seed=1):
    shape = (count, model.config.decoder.n_code)
    return torch.randint(model.config.decoder.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def nobody(count):
    return torch.zeros(count, dtype=torch.bool)


def test_logits_of_a_batch_equal_each_sample_alone(model, make_batch):
    """Padding changes nothing: neither the text encoder nor the decoder sees it."""
    batch, codes = make_batch(model.config, 6), some_codes(model, 6)
    assert batch.lengths.unique().numel() > 2
    together = model(batch, codes, nobody(6))
    for i in range(6):
        torch.testing.assert_close(together[i : i + 1], model(only(batch, i), codes[i : i + 1], nobody(1)), atol=2e-5, rtol=1e-4)


def test_appending_padding_changes_no_logit(model, make_batch):
    batch, codes = make_batch(model.config, 3, text_to_image=1.0), some_codes(model, 3)
    longer = replace(batch, text_ids=F.pad(batch.text_ids, (0, 7)))
    torch.testing.assert_close(model(longer, codes, nobody(3)), model(batch, codes, nobody(3)), atol=2e-5, rtol=1e-4)


def test_a_code_is_predicted_from_earlier_codes_only(model, make_batch):
    batch, codes = make_batch(model.config, 2), some_codes(model, 2)
    changed = codes.clone()
    changed[:, 20] = (changed[:, 20] + 1) % model.config.decoder.codebook_size
    before, after = model(batch, codes, nobody(2)), model(batch, changed, nobody(2))
    torch.testing.assert_close(before[:, :21], after[:, :21], atol=0, rtol=0)
    assert (before[:, 21] != after[:, 21]).any(-1).all()


def test_samples_do_not_see_each_other(model, make_batch):
    batch, codes = make_batch(model.config, 3, text_to_image=1.0), some_codes(model, 3)
    changed, ids = codes.clone(), batch.text_ids.clone()
    changed[1], ids[1, 0] = 0, ids[1, 0] + 1
    before, after = model(batch, codes, nobody(3)), model(replace(batch, text_ids=ids), changed, nobody(3))
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], atol=0, rtol=0)
    assert (before[1] != after[1]).any()


@pytest.mark.parametrize("uncond", [False, True])
def test_cached_decoding_equals_the_full_forward_everywhere(model, make_batch, uncond):
    batch, codes = make_batch(model.config, 5), some_codes(model, 5)
    drop = torch.full((5,), uncond)
    full = model(batch, codes, drop)
    logits, cache = model.prefill(model.prefix(batch, drop), batch.lengths)
    for k in range(codes.shape[1]):
        torch.testing.assert_close(logits, full[:, k], atol=5e-5, rtol=1e-4)
        if k + 1 < codes.shape[1]:
            logits = model.decode_step(codes[:, k], cache)


def test_sequence_order_by_hand():
    order = sequence_order(torch.tensor([3, 1]), n_prefix=3, n_code=2)
    assert order.tolist() == [[0, 1, 2, 3, 4], [0, 3, 4, 1, 2]]  # prefix, codes, padding


def test_rotation_is_the_identity_on_the_prefix_and_differs_along_both_axes():
    table, x = rotary_table(8, 16), torch.randn(1, 1, 1, 16)
    assert len(table) == 1 + 64
    turned = [apply_rotary(x, rotations) for rotations in table]
    assert torch.equal(turned[0], x)
    assert torch.equal(turned[1], x)  # cell (0, 0) is turned by nothing
    assert not torch.allclose(turned[2], x) and not torch.allclose(turned[1 + 8], x)
    assert torch.equal(turned[2][..., :8], x[..., :8])       # one column on: the row's half stays
    assert torch.equal(turned[1 + 8][..., 8:], x[..., 8:])   # one row on: the column's half stays
    torch.testing.assert_close(turned[30].norm(), x.norm())


def test_rotation_by_hand():
    """Pair (2i, 2i + 1) turns by cell * 10000^(-2i / (head / 2)), interleaved."""
    turned = apply_rotary(torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]), rotary_table(4, 8)[1 + 2 * 4 + 3])
    angles = torch.tensor([2.0, 2.0 / 100, 3.0, 3.0 / 100])
    torch.testing.assert_close(turned, torch.stack([angles.cos(), angles.sin()], -1).flatten())


def test_guidance_one_is_conditional_and_zero_unconditional(model, make_batch):
    conditional, unconditional = torch.randn(2, 4, 10)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    batch = make_batch(model.config, 3)
    for scale, drop in ((1.0, False), (0.0, True)):
        codes = generate(model, batch, SamplingConfig(cfg_scale=scale, temperature=0.0), torch.Generator())
        greedy = model(batch, codes, torch.full((3,), drop)).argmax(-1)
        assert torch.equal(codes, greedy)


def test_guided_generation_follows_the_guided_logits(model, make_batch):
    """Greedy codes at guidance 3 are the argmax of the guided full-forward logits at every position."""
    batch = make_batch(model.config, 4)
    codes = generate(model, batch, SamplingConfig(cfg_scale=3.0, temperature=0.0), torch.Generator())
    full = guide(model(batch, codes, nobody(4)), model(batch, codes, ~nobody(4)), 3.0)
    assert torch.equal(codes, full.argmax(-1))


def test_unconditional_prefix_uses_the_last_rows_of_its_table(model, make_batch):
    batch = make_batch(model.config, 2, text_to_image=1.0)
    n, table = int(batch.lengths[0]), model.projector.unconditional
    prefix = model.prefix(batch, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(prefix[0, :n], model.projector.fc2(F.gelu(model.projector.fc1(table[-n:]), approximate="tanh")))
    assert isinstance(table, torch.nn.Parameter)


def test_images_reach_their_own_samples(model, make_batch):
    """Changing the images of one sample changes that sample and no other."""
    batch, codes = make_batch(model.config, 4, multi_image=1.0), some_codes(model, 4)
    pixels = batch.pixels.clone()
    pixels[3] += 1.0  # the second image of sample 1
    before, after = model(batch, codes, nobody(4)), model(replace(batch, pixels=pixels), codes, nobody(4))
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]


def test_query_connector_reads_the_name(text_tokenizer, make_batch):
    model = randomize(Mentor(small_config(text_tokenizer, "query")))
    batch = make_batch(model.config, 2, segmentation=1.0)
    names = batch.name_ids.clone()
    names[0, 0] = names[0, 0] % 20 + 3
    tokens, other = model.encoder.encode_images(batch), model.encoder.encode_images(replace(batch, name_ids=names))
    assert tokens.shape == (2, 4, 32) and (tokens[0] != other[0]).any() and torch.equal(tokens[1], other[1])


def test_query_connector_by_hand(text_tokenizer, make_batch):
    """Queries and words attend to each other, then the queries alone to the patches; padding of the words changes nothing."""
    model = randomize(Mentor(small_config(text_tokenizer, "query"))).eval()
    batch, connector = make_batch(model.config, 2, segmentation=1.0), model.encoder.connector
    patches, words = model.encoder.vision(batch.pixels), model.encoder.text.embedding(batch.name_ids)
    assert batch.name_mask.all()
    x = torch.cat([connector.queries.expand(2, -1, -1), connector.word_in(words)], 1)
    for block in connector.blocks:
        x = x + block.attention(block.norm1(x))
        x = torch.cat([x[:, :4] + block.cross_attention(block.norm2(x[:, :4]), connector.patch_norm(patches)), x[:, 4:]], 1)
        x = x + block.fc2(F.gelu(block.fc1(block.norm3(x))))
    padded, mask = F.pad(words, (0, 0, 0, 5), value=1.0), F.pad(batch.name_mask, (0, 5))
    torch.testing.assert_close(connector(patches, padded, mask), connector.out(connector.norm(x[:, :4])), atol=2e-5, rtol=1e-4)


def test_splice_refuses_a_wrong_number_of_placeholders():
    embeddings, tokens = torch.zeros(1, 5, 3), torch.ones(2, 2, 3)
    assert splice(embeddings, torch.tensor([0, 1, 3, 4]), tokens)[0, :, 0].tolist() == [1, 1, 0, 1, 1]
    with pytest.raises(ValueError, match="3 image placeholders .* 2 images of 2 tokens"):
        splice(embeddings, torch.tensor([0, 1, 3]), tokens)


def test_relative_buckets_are_signed_and_saturate():
    bucket = relative_position_bucket(torch.tensor([0, -1, 1, -7, -8, -200, 200, 128]), 32, 128)
    assert bucket.tolist() == [0, 1, 17, 7, 8, 15, 31, 31]


def test_first_loss_is_that_of_guessing(text_tokenizer, make_batch):
    model = Mentor(small_config(text_tokenizer))
    logits = model(make_batch(model.config, 2), some_codes(model, 2), nobody(2))
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), some_codes(model, 2).flatten()), torch.tensor(64.0).log())


def test_behaviour_does_not_depend_on_training_mode(model, make_batch):
    """Dropout is 0 here, so train() and eval() are the same function."""
    batch, codes = make_batch(model.config, 2), some_codes(model, 2)
    before = model(batch, codes, nobody(2))
    assert torch.equal(model.train()(batch, codes, nobody(2)), before)


def test_dropout_is_where_t5_and_llamagen_have_it(model, make_batch):
    """After the embeddings, each attention and each MLP, and in T5 also inside the MLP and at the end."""
    calls = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output, name=name: calls.update([name]))
    model(make_batch(model.config, 2), some_codes(model, 2), nobody(2))
    assert calls == {"encoder.text.dropout": 2, **{f"encoder.text.blocks.{i}.dropout": 3 for i in range(2)},
                     "decoder.dropout": 1, **{f"decoder.blocks.{i}.dropout": 2 for i in range(2)}}


def test_norms_have_the_published_eps(model):
    for part, eps in ((model.encoder.text, 1e-6), (model.decoder, 1e-5)):
        assert {module.eps for module in part.modules() if isinstance(module, torch.nn.RMSNorm)} == {eps}


def test_new_weights_have_the_stated_spread():
    model = Mentor(PRESETS["tiny"])
    text, decoder = model.encoder.text, model.decoder
    block = text.blocks[0]
    for weight, std in ((model.projector.fc1.weight, 0.02), (decoder.code_embedding.weight, 0.02), (decoder.blocks[0].attention.wqkv.weight, 0.02),
                        (text.embedding.weight, 1.0), (block.q.weight, (128 * 32) ** -0.5), (block.k.weight, 128**-0.5), (block.wo.weight, 256**-0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert (model.encoder.vision.pre_norm.weight == 4).all() and not decoder.output.weight.any()


def test_saved_model_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = Mentor.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_is_loaded_in_float32_and_ready_to_draw(model, tmp_path):
    model.bfloat16().save_pretrained(tmp_path)
    again = Mentor.from_pretrained(tmp_path)
    assert not again.training and {p.dtype for p in again.parameters()} == {torch.float32}


def test_illegal_configs_name_the_key():
    with pytest.raises(ValueError, match="connector.kind=resampler .* mlp or query"):
        from_dict(MentorConfig, {"connector": {"kind": "resampler"}})
    with pytest.raises(ValueError, match="context=256 is not legal: it must be more than the 256 tokens of one image"):
        from_dict(MentorConfig, {"context": 256})
    with pytest.raises(ValueError, match="no key 'heads'"):
        from_dict(MentorConfig, {"decoder": {"heads": 4}})


def test_prompts_without_images_attend_to_nothing_and_still_reach_every_weight(model, make_batch, monkeypatch):
    """CUDA's kernels of torch 2.9 refuse an empty batch, and several processes wait for the gradient of every weight."""
    attend = F.scaled_dot_product_attention

    def refuse_nothing(q, *arguments, **options):
        assert len(q), "batch size must be positive"
        return attend(q, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse_nothing)
    batch = make_batch(model.config, 2, text_to_image=1.0)
    model(batch, some_codes(model, 2), nobody(2)).sum().backward()
    used = [n for n, _ in model.named_parameters() if not n.startswith(("encoder.vision", "projector.unconditional"))]
    assert len(batch.pixels) == 0 and [n for n, p in model.named_parameters() if p.grad is None and n in used] == []
