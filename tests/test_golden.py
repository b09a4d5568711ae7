"""Vectors that the released MENTOR and LlamaGen code produced, each met within its stated tolerance. The
small ones are in tests/golden; the large ones lie beside the checkout, and are skipped where they do not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from data import Batch, TextTokenizer, center_crop, vision_pixels
from extras.released import released_name, released_tensors
from mentor import (DecoderConfig, Mentor, MentorConfig, SamplingConfig, TextConfig, VisionConfig,
                    relative_position_bucket, splice)
from sample import filter_logits, generate, guide
from tokenizer import VQGAN, TokenizerConfig

FOLDERS = Path(__file__).parent / "golden", Path(__file__).parent.parent.parent / "shared" / "golden"
DECODER = ("decoder", "projector")

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

    def weights(self, prefix=""):
        return {prefix + n[2:]: self[n].float() for n in self.names
                if n.startswith("w.") and "codebook_used" not in n and "embed_tokens" not in n}

def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)

def load(model, tensors, without=()):
    """Give a Mentor all of some released tensors; only the parts in `without` may lack theirs."""
    names = {released_name(n): n for n in model.state_dict()}
    model.load_state_dict({names[n]: t for n, t in tensors.items()}, strict=False)
    assert all(n in tensors or names[n].startswith(without) for n in names)

@pytest.mark.parametrize("case, ch_mult, z_channels", [
    ("vq16_small", (1, 1, 1, 1, 2), 32), ("vq16", (1, 1, 2, 2, 4), 64)])
def test_vq(case, ch_mult, z_channels):
    golden = Golden(case)
    model = VQGAN(TokenizerConfig(64, 32, ch_mult, z_channels=z_channels, codebook_size=64))
    model.load_state_dict(golden.weights())
    with torch.no_grad():
        hidden = model.encoder(golden["in.image"])
        close(hidden, golden["out.encoder_out"], 5e-5)
        z_q, loss, codes = model.quantize(model.quant_conv(hidden))
        close(z_q, golden["out.encode.quant"], 5e-5)
        assert torch.equal(codes.flatten(), golden["out.encode.indices"])
        assert torch.equal(model.encode(golden["in.image"]).flatten(), golden["out.encode.indices"])
        close(loss, golden["out.train.vq_loss"] + golden["out.train.commit_loss"], 1e-6)
        random = golden["in.decode_code_random.indices"].view_as(codes)
        for some, name in ((codes, "decode_code"), (random, "decode_code_random")):
            made = model.decoder(model.post_quant_conv(model.quantize.lookup(some)))
            close(made, golden[f"out.{name}.image"], 3e-4)
        unit = F.normalize(golden["out.pre_quant"].permute(0, 2, 3, 1), dim=-1)
        close(2 - 2 * (unit @ model.quantize.codebook().T).flatten(0, 2), golden["out.distance"], 5e-5)
    z = golden["out.pre_quant"].requires_grad_()
    z_q, loss, _ = model.quantize(z)
    (loss + (z_q * golden["in.train.probe"]).sum()).backward()
    close(z.grad, golden["out.train.grad_pre_quant"], 1e-4)
    close(model.quantize.embedding.weight.grad, golden["out.train.grad_embedding"], 1e-4)

def small_mentor():
    """A model of the vectors' sizes, without dropout."""
    text = TextConfig(100, 32, n_layer=2, n_head=4, head_width=8, mlp_width=64, dropout=0.0)
    decoder = DecoderConfig(64, grid_size=8, width=64, n_layer=3, n_head=4, dropout=0.0)
    return Mentor(MentorConfig(VisionConfig(28, 7, 32, 3, 4, 64), text, decoder, context=48))

def prompts(ids, mask, pixels):
    """A Batch of the released code's inputs; 98 is their image placeholder."""
    slots, no = (ids == 98).flatten().nonzero().flatten(), torch.zeros_like(ids).bool()
    return Batch(text_ids=ids, lengths=mask.sum(1), pixels=pixels, image_slots=slots, targets=torch.zeros(0),
                 drop=no[:, 0], masked=no, tasks=["golden"] * len(ids))

def end_to_end():
    golden, model = Golden("end_to_end"), small_mentor()
    load(model, golden.weights())
    pixels = golden["in.pixel_values"][golden["in.img_mask"].bool()]
    return golden, model, prompts(golden["in.input_ids"], golden["in.attention_mask"], pixels)

def test_joint_model_training():
    golden, model, batch = end_to_end()
    hidden, codes = model.encoder(batch), golden["in.idx"]
    for b, n in enumerate(batch.lengths):  # theirs stand at the right end of the window, ours at the left
        close(hidden[b, :n], golden["out.left_padded_cond"][b, 48 - n :], 5e-5)
    logits = model(batch, codes, torch.zeros(2, dtype=torch.bool))
    close(logits, golden["out.train_logits"], 1e-4)
    loss = F.cross_entropy(logits.transpose(1, 2), codes)
    close(loss, golden["out.train_loss"], 1e-5)
    loss.backward()
    parameters = {released_name(n): p for n, p in model.named_parameters()}
    for name in (n for n in golden.names if n.startswith("out.grad.")):
        close(parameters[name[9:]].grad, golden[name], 1e-4)
    dropped = model(batch, codes, torch.tensor([False, True]))
    close(dropped, golden["out.train_logits_uncond_sample1"], 1e-4)
    close(F.cross_entropy(dropped.transpose(1, 2), codes), golden["out.train_loss_uncond_sample1"], 1e-5)

@pytest.mark.parametrize("scale, name, atol", [
    (1.0, "gen_cfg1", 1e-4), (4.0, "gen_cfg4", 5e-4), (7.5, "gen_cfg7.5", 1e-3)])
def test_joint_model_generation(scale, name, atol):
    golden, model, batch = end_to_end()
    greedy = SamplingConfig(cfg_scale=scale, temperature=0.0)
    codes = generate(model.eval(), batch, greedy, [torch.Generator(), torch.Generator()])
    assert torch.equal(codes, golden[f"out.{name}.tokens"].long())
    with torch.no_grad():
        logits = torch.cat([model(batch, codes, torch.tensor([drop, drop])) for drop in (False, True)])
    close(guide(logits, scale).transpose(0, 1), golden[f"out.{name}.logits"], atol)

def test_encoder():
    """With images and without."""
    golden, model = Golden("encoder"), small_mentor()
    load(model, golden.weights("multimodal_encoder."), DECODER)
    pixels, encoder = golden["in.pixel_values"][golden["in.img_mask"].bool()], model.encoder
    for case, images in (("", pixels), ("text_only.", pixels[:0])):
        ids, mask = golden[f"in.{case}input_ids"], golden[f"in.{case}attention_mask"]
        states, mask = encoder(prompts(ids, mask, images)), mask.bool()
        close(states[mask], golden[f"out.{case}last_hidden_state"][mask], 5e-5)
    batch = prompts(golden["in.input_ids"], golden["in.attention_mask"], pixels)
    features = encoder.vision(pixels)
    tokens = encoder.connector(features, None, None)
    close(features, golden["out.vision_features"], 5e-5)
    close(tokens, golden["out.projected_features"].view_as(tokens), 5e-5)
    words = encoder.text.embedding(batch.text_ids)
    close(splice(words, batch.image_slots, tokens), golden["out.inputs_embeds"], 5e-5)
    close(encoder.text.attention_bias(torch.ones(1, 48).bool()), golden["out.t5_position_bias_48"], 5e-5)
    buckets = relative_position_bucket(torch.arange(-300, 301), 32, 128)
    assert torch.equal(buckets, golden["out.t5_relative_position_bucket"])

@pytest.mark.parametrize("folder", ["hf_clip", "hf_clip_v4", "hf_clip_full"])
def test_clip_from_hub_folders(folder):
    golden, model = Golden("hf_clip_io"), small_mentor()
    load(model, released_tensors("clip", find(folder)), (*DECODER, "encoder.text", "encoder.connector"))
    vision, pixels, last = model.encoder.vision, golden["in.pixel_values"], []
    close(vision(pixels), golden["out.hidden_states.2"][:, 1:], 3e-5)
    vision.blocks[-2].register_forward_hook(lambda block, x, y: last.append(vision.blocks[-1](y)))
    vision(pixels)
    close(vision.post_norm(last[0][:, 0]), golden["out.pooler_output"], 3e-5)

@pytest.mark.parametrize("folder", ["hf_t5", "hf_t5_sharded", "hf_t5_full_sharded"])
def test_t5_from_hub_folders_at_distances_beyond_the_buckets(folder):
    golden, model = Golden("hf_t5_io"), small_mentor()
    load(model, released_tensors("t5", find(folder)), (*DECODER, "encoder.vision", "encoder.connector"))
    text, mask, words = model.encoder.text.eval(), golden["in.attention_mask"].bool(), golden["in.input_ids"]
    close(text(text.embedding(words), mask)[mask], golden["out.last_hidden_state"][mask], 5e-5)
    states, unmasked = text(golden["in.inputs_embeds"], mask), torch.ones_like(mask)
    close(states[mask], golden["out.inputs_embeds.last_hidden_state"][mask], 5e-5)
    close(text(text.embedding(words), unmasked), golden["out.last_hidden_state_nomask"], 3e-4)

def test_decoder_with_a_left_padded_prefix():
    """The generator alone, conditions of 12, 9 and 4 rows."""
    golden = Golden("decoder")
    decoder = DecoderConfig(64, grid_size=8, width=64, n_layer=3, n_head=4, dropout=0.0)
    text = TextConfig(8, 32, n_layer=1, n_head=1)
    model = Mentor(MentorConfig(VisionConfig(8, 4, 32, 2, 2, 32), text, decoder, context=12))
    load(model, golden.weights(), "encoder")
    lengths, codes, nobody = golden["in.emb_masks"].sum(1), golden["in.idx"], torch.zeros(3).bool()
    hidden = torch.stack([F.pad(c[12 - n :], (0, 0, 0, 12 - n)) for c, n in zip(golden["in.cond"], lengths)])
    def logits_of(codes, drop):
        prefix = model.projector(hidden, lengths, drop)
        return model.next_code_logits(prefix, lengths, codes)
    mixed = torch.tensor([False, True, False])
    for drop, name in ((nobody, ""), (~nobody, "_uncond"), (mixed, "_uncond_mixed")):
        close(logits_of(codes, drop), golden[f"out.empty_fix.tf_logits{name}"], 1e-4)
    for samples, name in ((slice(None), "tf_loss"), (golden["in.valid"].bool(), "tf_loss_valid")):
        loss = F.cross_entropy(logits_of(codes, nobody)[samples].transpose(1, 2), codes[samples])
        close(loss, golden[f"out.empty_fix.{name}"], 1e-5)
    loss.backward()
    parameters = {released_name(n): p for n, p in model.named_parameters()}
    for name in (n for n in golden.names if n.startswith("out.empty_fix.grad_valid_loss.")):
        close(parameters[name.split(".grad_valid_loss.")[1]].grad, golden[name], 5e-6)
    with torch.no_grad():
        for scale, name, atol in ((1, "gen_cfg1", 1e-4), (4, "gen_cfg4", 5e-4)):
            halves = [model.projector(hidden, lengths, drop) for drop in (nobody, ~nobody)]
            logits, cache = model.prefill(torch.cat(halves), lengths.repeat(2))
            for k, chosen in enumerate(golden[f"out.empty_fix.{name}.tokens"].long().T):
                guided = guide(logits, scale)
                close(guided, golden[f"out.empty_fix.{name}.logits"][k], atol)
                assert torch.equal(guided.argmax(-1), chosen)
                logits = model.decode_step(chosen.repeat(2), cache) if k < 63 else logits

def test_sampling_filters():
    golden = Golden("sampling")
    combos = json.loads(golden.file.metadata()["combos_temperature_topk_topp"])
    for i, (temperature, top_k, top_p) in enumerate(combos):
        logits = filter_logits(golden["in.logits"][:, -1], temperature or 1e-5, top_k, top_p)
        close(logits.softmax(-1), golden[f"out.probs.{i}"], 1e-6)

def test_image_preprocessing():
    golden = Golden("preprocess")
    for name in "abcd":
        picture, square = (golden[f"{key}.{name}"].numpy() for key in ("in.image", "out.center_crop_arr_32"))
        assert np.array_equal(center_crop(picture, 32), square)
        close(vision_pixels(picture, 28), golden[f"out.clip_pixel_values.{name}"], 1e-5)

def test_text_tokenizer():
    tokenizer = TextTokenizer(find("tokenizer/spiece.model").read_bytes())
    golden = json.loads(find("tokenizer_golden.json").read_text())
    assert [tokenizer.encode(text) for text in golden["texts"]] == golden["ids"]
