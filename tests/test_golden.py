"""Vectors that the released MENTOR and LlamaGen code produced, each met within its stated tolerance.

The folder with the vectors lies beside the checkout (../shared/golden); without it these tests skip and say so.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from data import Batch, TextTokenizer, center_crop, vision_pixels
from mentor import DecoderConfig, Mentor, MentorConfig, SamplingConfig, TextConfig, VisionConfig, relative_position_bucket
from sample import filter_logits, generate, guide
from tokenizer import VQGAN, TokenizerConfig

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not there")

RENAMES = [  # released names -> ours
    (r"^tok_embeddings", "decoder.code_embedding"), (r"^output", "decoder.output"), (r"^norm", "decoder.norm"),
    (r"^layers\.(\d+)\.attention_norm", r"decoder.blocks.\1.norm1"), (r"^layers\.(\d+)\.ffn_norm", r"decoder.blocks.\1.norm2"),
    (r"^layers\.(\d+)\.attention", r"decoder.blocks.\1.attention"), (r"^layers\.(\d+)\.feed_forward", r"decoder.blocks.\1.mlp"),
    (r"^cls_embedding\.cap_proj", "projector"), (r"^cls_embedding\.uncond_embedding", "projector.unconditional"),
    (r"^multimodal_encoder\.language_projection\.0", "encoder.connector.fc1"), (r"^multimodal_encoder\.language_projection\.2", "encoder.connector.fc2"),
    (r"^multimodal_encoder\.vision_model\.vision_tower\.vision_model\.", "encoder.vision."),
    (r"embeddings\.class_embedding", "class_embedding"), (r"embeddings\.patch_embedding", "patch_embedding"),
    (r"embeddings\.position_embedding\.weight", "position_embedding"), (r"pre_layrnorm", "pre_norm"), (r"post_layernorm", "post_norm"),
    (r"vision\.encoder\.layers", "vision.blocks"), (r"layer_norm([12])", r"norm\1"), (r"mlp\.(fc[12])", r"\1"),
    (r"self_attn\.([qkv])_proj", r"attention.\1"), (r"self_attn\.out_proj", "attention.out"),
    (r"^multimodal_encoder\.language_model\.shared", "encoder.text.embedding"),
    (r"^multimodal_encoder\.language_model\.encoder\.block", "encoder.text.blocks"), (r"^multimodal_encoder\.language_model\.encoder\.final_layer_norm", "encoder.text.norm"),
    (r"encoder\.text\.blocks\.0\.layer\.0\.SelfAttention\.relative_attention_bias", "encoder.text.relative_bias"),
    (r"layer\.0\.layer_norm", "norm1"), (r"layer\.1\.layer_norm", "norm2"), (r"layer\.0\.SelfAttention\.", ""), (r"layer\.1\.DenseReluDense\.", ""),
]


def ours(name):
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


class Golden:
    def __init__(self, case):
        self.file = safe_open(GOLDEN / f"{case}.safetensors", "pt")
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
    weights = golden.weights()
    weights.pop("quantize.codebook_used")
    model.load_state_dict(weights)
    with torch.no_grad():
        hidden = model.encoder(golden["in.image"])
        close(hidden, golden["out.encoder_out"], 5e-5)
        z_q, loss, codes = model.quantize(model.quant_conv(hidden))
        close(z_q, golden["out.encode.quant"], 5e-5)
        assert torch.equal(codes.flatten(), golden["out.encode.indices"])
        assert torch.equal(model.encode(golden["in.image"]).flatten(), golden["out.encode.indices"])
        close(loss, golden["out.train.vq_loss"] + golden["out.train.commit_loss"], 1e-6)
        close(model.decoder(model.post_quant_conv(model.quantize.lookup(codes))), golden["out.decode_code.image"], 3e-4)
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
    weights = {ours(n): w for n, w in golden.weights().items() if "embed_tokens" not in n}
    model.load_state_dict(weights)
    ids, mask, images = golden["in.input_ids"], golden["in.attention_mask"], golden["in.img_mask"].bool()
    return golden, model, prompts(ids, mask, golden["in.pixel_values"][images])


def prompts(ids, mask, pixels):
    """A Batch of the released code's inputs; 98 is their image placeholder."""
    return Batch(text_ids=ids, lengths=mask.sum(1), pixels=pixels, image_slots=(ids == 98).flatten().nonzero().flatten(),
                 name_ids=torch.zeros(len(pixels), 1, dtype=torch.long), name_mask=torch.ones(len(pixels), 1, dtype=torch.bool),
                 targets=torch.zeros(0), unconditional=torch.zeros(len(ids), dtype=torch.bool), tasks=["golden"] * len(ids))


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
    parameters = dict(model.named_parameters())
    for name in (n for n in golden.names if n.startswith("out.grad.")):
        close(parameters[ours(name[9:])].grad, golden[name], 1e-4)
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


def test_encoder_without_images():
    golden, model, batch = end_to_end()
    golden = Golden("encoder")
    prefix = "multimodal_encoder."
    model.encoder.load_state_dict({ours(prefix + n).removeprefix("encoder."): w for n, w in golden.weights().items() if "embed_tokens" not in n})
    ids, mask = golden["in.text_only.input_ids"], golden["in.text_only.attention_mask"]
    hidden = model.encoder(prompts(ids, mask, batch.pixels[:0]))
    close(hidden[mask.bool()], golden["out.text_only.last_hidden_state"][mask.bool()], 5e-5)
    pixels = golden["in.pixel_values"][golden["in.img_mask"].bool()]
    close(model.encoder.vision(pixels), golden["out.vision_features"], 5e-5)


def test_relative_position_buckets():
    expected = Golden("encoder")["out.t5_relative_position_bucket"]
    assert torch.equal(relative_position_bucket(torch.arange(-300, 301), 32, 128), expected)


def test_t5_at_distances_beyond_the_buckets():
    golden = Golden("hf_t5_io")
    model = Mentor(MentorConfig(text=TextConfig(vocab_size=100, width=32, n_layer=2, n_head=4, head_width=8, mlp_width=64), vision=VisionConfig(width=32, n_layer=2, n_head=2, mlp_width=64),
                                decoder=DecoderConfig(codebook_size=8, grid_size=2, width=32, n_layer=1, n_head=2))).encoder.text.eval()
    with safe_open(GOLDEN / "hf_t5" / "model.safetensors", "pt") as file:
        weights = {ours("multimodal_encoder.language_model." + n).removeprefix("encoder.text."): file.get_tensor(n) for n in file.keys()}
    model.load_state_dict(weights)
    mask = golden["in.attention_mask"].bool()
    hidden = model(model.embedding(golden["in.input_ids"]), mask)
    close(hidden[mask], golden["out.last_hidden_state"][mask], 5e-5)


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
    cases = json.loads((GOLDEN / "tokenizer_golden.json").read_text())
    tokenizer = TextTokenizer.from_file(GOLDEN / "tokenizer" / "spiece.model")
    texts = json.loads((GOLDEN / "tokenizer" / "texts.json").read_text())
    expected = cases["ids"] if "ids" in cases else [case["ids"] for case in cases["cases"]]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, text
