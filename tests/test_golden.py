"""Vectors that the released MENTOR and LlamaGen code produced, each met within its stated tolerance.

The small ones are in tests/golden; the large ones (decoder, vq16) are looked for beside the checkout, and their tests
skip where they are not.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from conftest import load_released
from data import Batch, TextTokenizer, center_crop, vision_pixels
from mentor import DecoderConfig, Mentor, MentorConfig, SamplingConfig, TextConfig, VisionConfig, relative_position_bucket, released_parameters, released_tensors, splice
from sample import continue_prefix, filter_logits, generate, guide
from tokenizer import VQGAN, TokenizerConfig

FOLDERS = Path(__file__).parent / "golden", Path(__file__).parent.parent.parent / "shared" / "golden"

NOT_ENCODER = ("tok_embeddings", "layers", "norm", "output", "cls_embedding")  # the generator's names


def find(name):
    """The path of a file or folder of vectors; skips the test if there is none."""
    for folder in FOLDERS:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in {FOLDERS[0].name}")


class Golden:
    def __init__(self, case):
        self.file = safe_open(find(f"{case}.safetensors"), "pt")
        self.names = list(self.file.keys())

    def __getitem__(self, name):
        return self.file.get_tensor(name)

    def weights(self):
        return {n[2:]: self[n].float() for n in self.names if n.startswith("w.")}


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("case, ch_mult, z_channels", [("vq16_small", (1, 1, 1, 1, 2), 32), ("vq16", (1, 1, 2, 2, 4), 64)])
def test_vq(case, ch_mult, z_channels):
    golden = Golden(case)
    model = VQGAN(TokenizerConfig(image_size=64, ch=32, ch_mult=ch_mult, z_channels=z_channels, codebook_size=64))
    model.load_state_dict({n: w for n, w in golden.weights().items() if "codebook_used" not in n})
    with torch.no_grad():
        hidden = model.encoder(golden["in.image"])
        close(hidden, golden["out.encoder_out"], 5e-5)
        z_q, loss, codes = model.quantize(model.quant_conv(hidden))
        close(z_q, golden["out.encode.quant"], 5e-5)
        assert torch.equal(codes.flatten(), golden["out.encode.indices"])
        assert torch.equal(model.encode(golden["in.image"]).flatten(), golden["out.encode.indices"])
        close(loss, golden["out.train.vq_loss"] + golden["out.train.commit_loss"], 1e-6)
        for indices, name in ((codes, "decode_code"), (golden["in.decode_code_random.indices"].view_as(codes), "decode_code_random")):
            close(model.decoder(model.post_quant_conv(model.quantize.lookup(indices))), golden[f"out.{name}.image"], 3e-4)
        cosines = F.normalize(golden["out.pre_quant"].permute(0, 2, 3, 1), dim=-1) @ model.quantize.codebook().T
        close(2 - 2 * cosines.flatten(0, 2), golden["out.distance"], 5e-5)  # of unit vectors
    z = golden["out.pre_quant"].requires_grad_()
    z_q, loss, _ = model.quantize(z)
    (loss + (z_q * golden["in.train.probe"]).sum()).backward()
    close(z.grad, golden["out.train.grad_pre_quant"], 1e-4)
    close(model.quantize.embedding.weight.grad, golden["out.train.grad_embedding"], 1e-4)


def end_to_end():
    golden = Golden("end_to_end")
    config = MentorConfig(
        vision=VisionConfig(image_size=28, patch_size=7, width=32, n_layer=3, n_head=4, mlp_width=64),
        text=TextConfig(vocab_size=100, width=32, n_layer=2, n_head=4, head_width=8, mlp_width=64, dropout=0.0),
        decoder=DecoderConfig(codebook_size=64, grid_size=8, width=64, n_layer=3, n_head=4, dropout=0.0), context=48)
    model = Mentor(config)
    load_released(model, {n: w for n, w in golden.weights().items() if "embed_tokens" not in n})
    ids, mask, images = golden["in.input_ids"], golden["in.attention_mask"], golden["in.img_mask"].bool()
    return golden, model, prompts(ids, mask, golden["in.pixel_values"][images])


def prompts(ids, mask, pixels):
    """A Batch of the released code's inputs; 98 is their image placeholder."""
    return Batch(masked=torch.zeros_like(ids, dtype=torch.bool), text_ids=ids, lengths=mask.sum(1), pixels=pixels, image_slots=(ids == 98).flatten().nonzero().flatten(),
                 name_ids=torch.zeros(len(pixels), 1, dtype=torch.long), name_mask=torch.ones(len(pixels), 1, dtype=torch.bool),
                 targets=torch.zeros(0), drop=torch.zeros(len(ids), dtype=torch.bool), tasks=["golden"] * len(ids))


def test_joint_model_training():
    golden, model, batch = end_to_end()
    hidden, codes = model.encoder(batch), golden["in.idx"]
    for b, n in enumerate(batch.lengths):  # theirs is moved to the right end of the window, ours stays at the left
        close(hidden[b, :n], golden["out.left_padded_cond"][b, 48 - n :], 5e-5)
    logits = model(batch, codes, torch.zeros(2, dtype=torch.bool))
    close(logits, golden["out.train_logits"], 1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    close(loss, golden["out.train_loss"], 1e-5)
    loss.backward()
    parameters = released_parameters(model)
    for name in (n for n in golden.names if n.startswith("out.grad.")):
        close(parameters[name[9:]].grad, golden[name], 1e-4)
    dropped = model(batch, codes, torch.tensor([False, True]))
    close(dropped, golden["out.train_logits_uncond_sample1"], 1e-4)
    close(F.cross_entropy(dropped.flatten(0, 1), codes.flatten()), golden["out.train_loss_uncond_sample1"], 1e-5)


@pytest.mark.parametrize("scale, name, atol", [(1.0, "gen_cfg1", 1e-4), (4.0, "gen_cfg4", 5e-4), (7.5, "gen_cfg7.5", 1e-3)])
def test_joint_model_generation(scale, name, atol):
    golden, model, batch = end_to_end()
    codes = generate(model.eval(), batch, SamplingConfig(cfg_scale=scale, temperature=0.0), torch.Generator())
    assert torch.equal(codes, golden[f"out.{name}.tokens"].long())
    nobody = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        logits = guide(model(batch, codes, nobody), model(batch, codes, ~nobody), scale)
    close(logits.transpose(0, 1), golden[f"out.{name}.logits"], atol)


def test_encoder():
    """With images and without."""
    golden, (_, model, _) = Golden("encoder"), end_to_end()
    own = {n: w for n, w in golden.weights().items() if "embed_tokens" not in n}
    load_released(model, {"multimodal_encoder." + n: w for n, w in own.items()}, fresh=NOT_ENCODER)
    pixels, encoder = golden["in.pixel_values"][golden["in.img_mask"].bool()], model.encoder
    for case, images in (("", pixels), ("text_only.", pixels[:0])):
        ids, mask = golden[f"in.{case}input_ids"], golden[f"in.{case}attention_mask"]
        close(encoder(prompts(ids, mask, images))[mask.bool()], golden[f"out.{case}last_hidden_state"][mask.bool()], 5e-5)
    batch = prompts(golden["in.input_ids"], golden["in.attention_mask"], pixels)
    tokens = encoder.encode_images(batch)
    close(encoder.vision(pixels), golden["out.vision_features"], 5e-5)
    close(tokens.view(len(pixels), -1, 32), golden["out.projected_features"], 5e-5)
    close(splice(encoder.text.embedding(batch.text_ids), batch.image_slots, tokens), golden["out.inputs_embeds"], 5e-5)
    close(encoder.text.attention_bias(torch.ones(1, 48, dtype=torch.bool)), golden["out.t5_position_bias_48"], 5e-5)


def test_relative_position_buckets():
    expected = Golden("encoder")["out.t5_relative_position_bucket"]
    assert torch.equal(relative_position_bucket(torch.arange(-300, 301), 32, 128), expected)


@pytest.mark.parametrize("folder", ["hf_clip", "hf_clip_v4", "hf_clip_full"])
def test_clip_from_hub_folders(folder):
    golden, (_, model, _) = Golden("hf_clip_io"), end_to_end()
    load_released(model, released_tensors("clip", find(folder)), fresh=(*NOT_ENCODER, "multimodal_encoder.language"))
    close(model.encoder.vision(golden["in.pixel_values"]), golden["out.hidden_states.2"][:, 1:], 3e-5)
    close(model.encoder.vision.pool(model.encoder.vision.before_last(golden["in.pixel_values"])), golden["out.pooler_output"], 3e-5)


@pytest.mark.parametrize("folder", ["hf_t5", "hf_t5_sharded", "hf_t5_full_sharded"])
def test_t5_from_hub_folders_at_distances_beyond_the_buckets(folder):
    golden, (_, model, _) = Golden("hf_t5_io"), end_to_end()
    load_released(model, released_tensors("t5", find(folder)), fresh=(*NOT_ENCODER, "multimodal_encoder.vision", "multimodal_encoder.language_projection"))
    text, mask = model.encoder.text.eval(), golden["in.attention_mask"].bool()
    close(text(text.embedding(golden["in.input_ids"]), mask)[mask], golden["out.last_hidden_state"][mask], 5e-5)
    close(text(golden["in.inputs_embeds"], mask)[mask], golden["out.inputs_embeds.last_hidden_state"][mask], 5e-5)
    close(text(text.embedding(golden["in.input_ids"]), torch.ones_like(mask)), golden["out.last_hidden_state_nomask"], 3e-4)


def test_sampling_filters():
    golden = Golden("sampling")
    logits = golden["in.logits"][:, -1]
    combos = json.loads(golden.file.metadata()["combos_temperature_topk_topp"])
    for i, (temperature, top_k, top_p) in enumerate(combos):
        probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
        close(probabilities, golden[f"out.probs.{i}"], 1e-6)


def test_image_preprocessing():
    golden = Golden("preprocess")
    for name in "abcd":
        picture = golden[f"in.image.{name}"].numpy()
        np.testing.assert_array_equal(center_crop(picture, 32), golden[f"out.center_crop_arr_32.{name}"].numpy())
        close(vision_pixels(picture, 28), golden[f"out.clip_pixel_values.{name}"], 1e-5)


def test_text_tokenizer():
    cases = json.loads(find("tokenizer_golden.json").read_text())
    tokenizer = TextTokenizer.from_file(find("tokenizer/spiece.model"))
    texts = json.loads(find("tokenizer/texts.json").read_text())
    expected = cases["ids"] if "ids" in cases else [case["ids"] for case in cases["cases"]]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize("variant, prefix_rotation", [("empty_fix", "identity"), ("ori", "zero")])
def test_decoder_with_a_left_padded_prefix(variant, prefix_rotation):
    """LlamaGen's generator alone, conditions of 12, 9 and 4 rows; "ori" is its own code, which erases prefix queries and keys."""
    golden = Golden("decoder")
    config = MentorConfig(vision=VisionConfig(image_size=8, patch_size=4, width=32, n_layer=2, n_head=2, mlp_width=32),
                          text=TextConfig(vocab_size=8, width=32, n_layer=1, n_head=1, mlp_width=32),
                          decoder=DecoderConfig(codebook_size=64, grid_size=8, width=64, n_layer=3, n_head=4, dropout=0.0, prefix_rotation=prefix_rotation), context=12)
    model = Mentor(config)
    load_released(model, golden.weights(), fresh=("multimodal_encoder",))
    lengths, codes = golden["in.emb_masks"].sum(1), golden["in.idx"]
    hidden = torch.stack([F.pad(c[12 - n :], (0, 0, 0, 12 - n)) for c, n in zip(golden["in.cond"], lengths.tolist())])

    def prefix(*drop):
        return model.projector(hidden, lengths, torch.tensor(drop))

    def logits_of(codes, *drop):
        return model.decoder.output(model.next_code_hidden(prefix(*drop), lengths, codes))

    for drop, name in (((False,) * 3, "tf_logits"), ((True,) * 3, "tf_logits_uncond"), ((False, True, False), "tf_logits_uncond_mixed")):
        close(logits_of(codes, *drop), golden[f"out.{variant}.{name}"], 1e-4)
    for samples, name in ((slice(None), "tf_loss"), (golden["in.valid"].bool(), "tf_loss_valid")):  # the mean over all samples, or some
        loss = F.cross_entropy(logits_of(codes, False, False, False)[samples].flatten(0, 1), codes[samples].flatten())
        close(loss, golden[f"out.{variant}.{name}"], 1e-5)
    loss.backward()
    for name in (n for n in golden.names if n.startswith(f"out.{variant}.grad_valid_loss.")):
        close(released_parameters(model)[name.split(".grad_valid_loss.")[1]].grad, golden[name], 5e-6)
    both, greedy = torch.cat([prefix(False, False, False), prefix(True, True, True)]), SamplingConfig(cfg_scale=4.0, temperature=0.0)
    drawn = continue_prefix(model, both, lengths.repeat(2), True, 64, greedy, torch.Generator())
    assert torch.equal(drawn, golden[f"out.{variant}.gen_cfg4.tokens"].long())
    guided = guide(logits_of(drawn, False, False, False), logits_of(drawn, True, True, True), 4.0)
    close(guided.transpose(0, 1), golden[f"out.{variant}.gen_cfg4.logits"], 5e-4)
    logits, cache = model.prefill(prefix(False, False, False), lengths)
    for k, expected in enumerate(golden[f"out.{variant}.gen_cfg1.tokens"].long().T):
        close(logits, golden[f"out.{variant}.gen_cfg1.logits"][k], 1e-4)
        assert torch.equal(logits.argmax(-1), expected)
        logits = model.decode_step(expected, cache) if k + 1 < 64 else logits
