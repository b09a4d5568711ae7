"""The VQGAN and its training, the text tokenizer, and how models are written to folders and read."""

import hashlib
import json
import os
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tokenizer
import train
from conftest import CPU, same_weights
from mentor import Mentor, MentorConfig
from tokenizer import (VQGAN, PatchDiscriminator, TextTokenizer, TokenizerConfig, TokenizerStage,
                       VectorQuantizer, adaptive_weight, collages, consistency_loss, file_hash, flatten,
                       hinge_d_loss, load_model, nearest, rebuild, save_model, spread_codes,
                       write_atomically, write_json)

close = torch.testing.assert_close
SMALL = TokenizerConfig(image_size=32, ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, norm_groups=4,
                        z_channels=16, codebook_size=32)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee\nsize 12345\n"

@pytest.fixture
def vqgan():
    return VQGAN(SMALL).eval()

def some_images(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

def make_stage(pictures=(), **keys):
    """A TokenizerStage of the small VQGAN that trains 100 steps."""
    keys = dict(steps=100, codebook_start=0.0, restart_every=100, consistency=0.0, disc_start=1.0) | keys
    preset = train.PRESETS["tiny"]
    torch.manual_seed(0)
    return TokenizerStage(replace(preset, vqgan=SMALL, tokenizer=replace(preset.tokenizer, **keys)), CPU,
                          pictures.__getitem__)

# --- The model
def test_encode_and_decode_are_the_training_pass_in_two_halves(vqgan):
    """However few pictures go through the network at once."""
    images, counts = some_images(5), []
    z_q, _, codes = vqgan.quantize(vqgan.quant_conv(vqgan.encoder(images)))
    made = vqgan.decoder(vqgan.post_quant_conv(z_q))
    assert codes.shape == (5, 8, 8) and made.shape == images.shape
    vqgan.encoder.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    for vqgan.at_once in (5, 2):
        assert torch.equal(vqgan.encode(images), codes.flatten(1))  # in raster order
        close(vqgan.decode(codes.flatten(1)), made, atol=1e-5, rtol=1e-5)
    assert counts == [5, 2, 2, 1] and not vqgan.decode(codes.flatten(1)).requires_grad

def test_a_new_tokenizers_residual_branches_are_silent():
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(tokenizer.ResnetBlock(8, 8, 4)(x), x) and torch.equal(tokenizer.AttnBlock(8, 4)(x), x)

def test_sizes_that_cannot_be_are_refused():
    assert TokenizerConfig().grid_size == 32 and train.PRESETS["tiny"].vqgan.grid_size == 8
    for sizes, message in (({"image_size": 500}, "image_size=500: .*16"), ({"ch": 16}, "groups=32: .*16")):
        with pytest.raises(ValueError, match=message):
            TokenizerConfig(**sizes)

# --- The codebook
def test_the_nearest_code_is_chosen():
    quantizer, z = VectorQuantizer(SMALL), torch.randn(2, 8, 4, 4)
    quantizer.embedding.weight.data *= torch.linspace(0.1, 9, 32)[:, None]  # a code's length is no advantage
    distance = torch.cdist(F.normalize(z.permute(0, 2, 3, 1).flatten(0, 2), dim=-1), quantizer.codebook())
    z_q, _, codes = quantizer(z)
    assert torch.equal(codes.flatten(), distance.argmin(1))
    close(quantizer.lookup(codes), z_q), close(z_q.norm(dim=1), torch.ones(2, 4, 4))
    many = F.normalize(torch.randn(70_000, 8), dim=-1)  # more rows than one product takes
    assert torch.equal(nearest(many, quantizer.codebook())[-9:], nearest(many[-9:], quantizer.codebook()))

def test_the_gradient_passes_straight_through():
    quantizer, probe = VectorQuantizer(SMALL), torch.randn(1, 8, 2, 2)
    z = torch.randn(1, 8, 2, 2, requires_grad=True)
    (quantizer(z)[0] * probe).sum().backward()
    direct, = torch.autograd.grad((F.normalize(z, dim=1) * probe).sum(), z)  # as if nothing had been rounded
    close(z.grad, direct)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()

def test_the_codebook_loss_moves_codes_and_the_commitment_loss_the_encoder():
    quantizer, z = VectorQuantizer(replace(SMALL, beta=0.3)), torch.randn(1, 8, 2, 2, requires_grad=True)
    _, loss, codes = quantizer(z)
    code_side, encoder_side = torch.autograd.grad(loss, [quantizer.embedding.weight, z])
    unit, vectors = F.normalize(z, dim=1), F.embedding(codes, quantizer.codebook()).permute(0, 3, 1, 2)
    close(loss, 1.3 * F.mse_loss(vectors, unit))
    codebook_loss, commitment_loss = F.mse_loss(vectors, unit.detach()), F.mse_loss(unit, vectors.detach())
    expected = torch.autograd.grad(codebook_loss + 0.3 * commitment_loss, [quantizer.embedding.weight, z])
    close((code_side, encoder_side), expected)

def test_codes_are_the_same_inside_autocast():
    quantizer, z = VectorQuantizer(TokenizerConfig(codebook_size=4096)), torch.randn(1, 8, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, codes = quantizer(z)
    assert torch.equal(codes, quantizer(z)[2]) and z_q.dtype == loss.dtype == torch.float32

def test_every_rare_sight_gets_a_code_before_a_common_one_gets_a_second():
    """20 sights, one of them 5,000 times as common as the others, each seen with a little noise."""
    sights = F.normalize(torch.randn(20, 8), dim=-1)
    which = torch.cat([torch.zeros(5000, dtype=torch.long), torch.arange(1, 20)])
    z = F.normalize(sights[which] + 0.02 * torch.randn(len(which), 8), dim=-1)
    codes, again = (spread_codes(3 * z, 20, torch.Generator().manual_seed(0)) for _ in range(2))
    close(codes.norm(dim=1), torch.ones(20))
    assert sorted((codes @ sights.T).argmax(1).tolist()) == list(range(20)) and torch.equal(codes, again)
    common = codes[nearest(z[:1], codes)[0]]  # the mean of all that it stands for
    close(common, F.normalize(z[:5000].mean(0), dim=0), atol=1e-5, rtol=0)
    few = spread_codes(z[:3].repeat(9, 1), 8, torch.Generator().manual_seed(0))  # fewer sights than codes
    close(few.norm(dim=1), torch.ones(8))

# --- Its training
def test_codes_are_placed_at_the_end_of_every_window_but_the_last():
    images, batch, placed = some_images(64), SimpleNamespace(targets=some_images(8)), []
    stage = make_stage(images, steps=10, codebook_start=0.4, restart_every=2)
    weight = stage.model.quantize.embedding.weight
    for step in range(10):
        before = weight.clone()
        with torch.no_grad():
            stage(batch, step)
        stage.after_step(step)
        placed += [step] * (not torch.equal(before, weight))
    assert placed == [3, 5, 7]  # the last at 0.8 of the steps
    assert len(stage.model.encode(images).unique()) == 32  # all are in use
    late = make_stage(images, steps=10, codebook_start=0.9, restart_every=2)
    before = late.model.quantize.embedding.weight.clone()
    late.counts[0] = 1
    late.after_step(8)  # once, however late
    assert not torch.equal(before, late.model.quantize.embedding.weight)

def test_the_codes_in_use_are_counted_over_a_window(capsys):
    stage, images = make_stage(some_images(64), restart_every=3), some_images(4)
    stage(SimpleNamespace(targets=images), 0), stage(SimpleNamespace(targets=images), 1)
    uses, others = torch.bincount(stage.model.encode(images).flatten(), minlength=32), torch.arange(32)
    assert torch.equal(stage.counts, 2 * uses)
    stage.machine = SimpleNamespace(world_size=3, average=lambda tensor: (tensor + others) / 3)
    stage(SimpleNamespace(targets=images), 1)
    assert torch.equal(stage.counts, 3 * uses + others)  # of all processes
    stage.machine = CPU
    stage.counts.zero_()[:8] = 2**24 + 1  # what float32 can no longer count
    stage.after_step(2)
    assert capsys.readouterr().out == "tokenizer: 25% of the codes in use, perplexity 8\n"
    assert not stage.counts.any()  # the next window is counted anew

def test_before_codebook_start_nothing_is_rounded():
    stage, images = make_stage(codebook_start=0.4), some_images(2)
    made, _, quantizer_loss, z, _ = stage.reconstruct(images, 39)
    close(made, stage.model.decoder(stage.model.post_quant_conv(F.normalize(z, dim=1))))
    rounded, _, later_loss, _, codes = stage.reconstruct(images, 40)
    close(rounded, stage.model.decode(codes.flatten(1)), atol=1e-5, rtol=1e-5)
    assert quantizer_loss == 0 < later_loss

def test_collages_move_and_keep_whole_cells():
    pictures = torch.arange(6 * 64.0).view(6, 1, 8, 8).expand(6, 3, 8, 8).repeat_interleave(4, 2)
    pictures, seen = pictures.repeat_interleave(4, 3), set()  # all cells differ
    before, own = pictures[::2, 0, ::4, ::4], pictures[1::2, 0, ::4, ::4]
    for step in range(80):
        images, same, (down, right) = collages(pictures, 8, step)
        cells = images.unflatten(2, (8, 4)).unflatten(4, (8, 4))                     # (B, 3, 8, 4, 8, 4)
        shown = cells.amax((1, 3, 5))
        assert torch.equal(shown, cells.amin((1, 3, 5))) and torch.equal(shown[::2], before)
        for y, x in product(range(8), range(8)):
            expected = before[:, y - down, x - right] if same[y, x] else own[:, y, x]  # -1 is the last row
            assert torch.equal(shown[1::2, y, x], expected)
        seen.add((bool(same[0, 0]), int(same.sum()), down, right))
    assert torch.equal(collages(pictures, 8, 79)[1], same)                           # the step's alone
    outside, _, down, right = map(set, zip(*seen))
    assert outside == {True, False} and down == right == set(range(8)) and len(seen) > 30
    assert torch.equal(collages(pictures[:5], 8, 0)[0][4], pictures[4])              # an odd last one stays

def test_consistency_is_the_change_of_kept_cells():
    z, same = torch.randn(5, 8, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    same[2:4, 3:6] = True
    z[1:4:2, :, 2:4, 3:6] = 2 * z[:4:2, :, 1:3, :3]
    assert consistency_loss(z, same, (1, 3)) < 1e-12  # length says nothing
    z[1, :, 2, 3] = -z[0, :, 1, 0]  # as far as can be: 4 over 8 channels, in one of 6 cells of one pair
    spread = F.normalize(z[:2], dim=1).transpose(0, 1).flatten(1).var(1, correction=0).mean()
    close(consistency_loss(z, same, (1, 3)), 4 / 8 / 6 / spread / 2)
    assert consistency_loss(z[:1], same, (1, 3)) == 0  # one image has no collage

def test_the_discriminator_and_its_losses():
    logits = PatchDiscriminator()(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 1, 6, 6)  # as pix2pix's: halved three times, then two convolutions of 4 x 4
    for real, fake, loss in (([2.0, 0], [-2.0, 0], 0.5), ([-1.0], [-5.0], 1), ([5.0], [1.0], 1)):
        assert hinge_d_loss(torch.tensor(real), torch.tensor(fake)) == loss

def test_the_adaptive_weight_makes_both_gradients_equally_long():
    weight = torch.nn.Parameter(torch.ones(3))
    average = lambda gradient: gradient * torch.tensor([1.0, 0, 0])  # noqa: E731
    ratio = adaptive_weight((weight * torch.tensor([3.0, 9, 9])).sum(), weight.sum(), weight, average)
    assert ratio.item() == pytest.approx(3, rel=1e-3) and not ratio.requires_grad  # averaged, then measured
    assert adaptive_weight(2 * weight.sum(), (1e-9 * weight).sum(), weight, average) == 1e4

def test_every_part_of_the_loss_has_its_weight_and_its_time():
    """The discriminator learns from step 20 on, and the VQGAN from it from 21 on."""
    stage = make_stage(disc_start=0.2, consistency=0.3, codebook_weight=0.2, disc_weight=0.7)
    batch = SimpleNamespace(targets=some_images(4))
    for step, seen, weighed in ((19, 0, False), (20, 1, False), (21, 2, True)):
        loss, logs = stage(batch, step)
        images, same, shift = collages(batch.targets, 8, step)
        made, reconstruction, quantizer_loss, z, _ = stage.reconstruct(images, step)
        close(reconstruction, F.mse_loss(made, images))
        expected = reconstruction + 0.2 * quantizer_loss + 0.3 * consistency_loss(z, same, shift)
        if weighed:
            expected = expected - 0.7 * logs["d_weight"] * stage.disc(made).mean()
        assert len(stage.seen) == seen and ("d_weight" in logs) == weighed
        close(loss, expected)
    counts = stage.counts.clone()  # validation: no collages, no discriminator, and no trace
    _, reconstruction, quantizer_loss, _, _ = stage.reconstruct(batch.targets, 100)
    close(stage.validation_loss(batch), reconstruction + 0.2 * quantizer_loss)
    assert torch.equal(stage.counts, counts) and len(stage.seen) == 2 and not make_stage().own_optimizers

def test_the_vqgans_step_does_not_train_the_discriminator_nor_its_own_the_vqgan():
    stage = make_stage(disc_start=0.0)
    stage(SimpleNamespace(targets=some_images(4)), 1)[0].backward()
    assert all(p.grad is None for p in stage.disc.parameters())
    weights = {name: p.clone() for name, p in stage.state_dict().items()}
    gradients = [p.grad.clone() for p in stage.model.parameters()]
    stage.after_step(1)
    for name, tensor in stage.state_dict().items():
        assert torch.equal(tensor, weights[name]) != name.startswith("disc."), name
    assert all(torch.equal(p.grad, g) for p, g in zip(stage.model.parameters(), gradients, strict=True))
    assert not any(p.requires_grad for p in stage.disc.parameters()) and not stage.seen

def test_the_discriminator_learns_to_tell_pictures_apart_from_every_micro_batch():
    """Its step after two halves of a batch is its step after the whole."""
    images, learnt = some_images(4), []
    for parts in ((images,), images.split(2)):
        stage = make_stage(disc_start=0.0)
        stage.own_optimizers = [torch.optim.SGD(stage.disc.parameters(), 1e-3)]
        stage.seen = [(part / 2, part) for part in parts]  # made, real
        before = hinge_d_loss(stage.disc(images), stage.disc(images / 2))
        stage.discriminator_step()
        assert hinge_d_loss(stage.disc(images), stage.disc(images / 2)) < before
        learnt.append(torch.cat([p.flatten() for p in stage.disc.parameters()]))
    close(*learnt, atol=1e-6, rtol=1e-4)

# --- The text tokenizer
def test_texts_become_ids(text_tokenizer):
    ids = text_tokenizer.encode("The star in <image>.\nA star", image_tokens=3)
    assert ids.count(text_tokenizer.image_id) == 3 and ids[-1] == text_tokenizer.EOS == 1
    assert text_tokenizer.encode("the STAR\n in<image> .  a  star", 3) == ids  # neither case nor space counts
    assert text_tokenizer.encode("") == [text_tokenizer.EOS] and text_tokenizer.UNKNOWN not in ids
    assert text_tokenizer.vocab_size == max(text_tokenizer.added.values()) + 1 == text_tokenizer.image_id + 1
    assert TextTokenizer(text_tokenizer.proto).digest == text_tokenizer.digest

def test_unknown_words_are_told():
    words = " ".join(f"w{i}" for i in range(9000))  # in one sentence, longer than SentencePiece's own limit
    ours = TextTokenizer.train(["A dog on the beach.", "(two cats, one T-shirt)", words])
    assert ours.unknown_words(f"{words} a DOG, one shirt (two <image>).") == []
    assert ours.unknown_words("a zebra on a Zeppelin, a zebra!") == ["zebra", "Zeppelin", "!"]
    assert ours.encode("beach.") == ours.encode("beach .") and {"dog", "w8999"} <= set(ours.known_words())

# --- Configurations, files and folders
def test_a_configuration_becomes_flat_keys_and_comes_back():
    run = train.PRESETS["tiny"]
    flat = flatten(run)
    assert flat["vqgan.ch_mult"] == (1, 2, 2) and flat["model.decoder.width"] == 96 and "model" not in flat
    wider = flat | {"model.decoder.width": 128}
    assert rebuild(train.PRESETS["full"], json.loads(json.dumps(wider))) == rebuild(run, wider) != run
    assert rebuild(train.PRESETS["full"], flat) == run  # nothing of the other preset is left
    with pytest.raises(ValueError, match="decoder.width=90: .*multiple of 4"):  # checked as a whole
        rebuild(run, flat | {"model.decoder.width": 90})

def test_a_saved_model_is_the_same_bit_for_bit(vqgan, model, tmp_path):
    for saved, config in ((vqgan, TokenizerConfig()), (model, MentorConfig())):
        folder, state = tmp_path / "deep" / type(saved).__name__, torch.get_rng_state()
        save_model(saved, folder)
        again = load_model(type(saved), config, folder)
        assert again.config == saved.config and same_weights(again, saved) and not again.training
        assert torch.equal(torch.get_rng_state(), state)  # nothing was initialised only to be replaced
        assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(again.decoder.rotary, model.decoder.rotary)  # no file holds it
    save_model(model.bfloat16(), folder)
    assert {p.dtype for p in load_model(Mentor, MentorConfig(), folder).parameters()} == {torch.float32}

@pytest.mark.parametrize("name, old, new, message", [
    ("model.safetensors", None, None, "model.safetensors is missing: train the stage tokenizer"),
    ("config.json", None, None, "VQGAN.*No such file.*config.json"),
    *(("model.safetensors", None, new, "no .*VQGAN") for new in (b"", b"PK\3\4 a zip", b"\xff" * 99)),
    ("model.safetensors", b"\0" * 64, b"", "no .*VQGAN"),  # 64 bytes too short
    ("model.safetensors", None, POINTER, "Git LFS pointer.*run `git lfs pull`"),
    *(("config.json", None, new, "no .*VQGAN") for new in (POINTER, b"{", b"[]", b"5", b"[" * 99999)),
    ("config.json", b'"ch"', b'"chh"', "ch"), ("config.json", b'"ch": 8', b'"ch": 16', "conv_in.weight"),
    ("config.json", b'"ch": 8', b'"ch": "8"', "no .*VQGAN"),
    ("config.json", b'groups": 4', b'groups": 3', "norm_groups=3"),
    ("config.json", b'_size": 32', b'_size": 34', "image_size=34"),
    ("config.json", b'"beta"', b'"older key": 1, "beta"', "older key")])
def test_a_folder_that_does_not_fit_is_one_clear_line(vqgan, tmp_path, name, old, new, message):
    """None: the whole file, or its absence."""
    save_model(vqgan, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / name
    file.unlink() if new is None else file.write_bytes(file.read_bytes().replace(old, new, 1) if old else new)
    with pytest.raises(ValueError, match=message) as error:
        load_model(VQGAN, TokenizerConfig(), tmp_path / "tokenizer")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

def test_weights_that_do_not_fit_are_one_clear_line(vqgan, tmp_path):
    save_model(vqgan, tmp_path)
    name, nan, inf = "quant_conv.bias", torch.full((8,), torch.nan), torch.tensor([0.0, -torch.inf] * 4)
    for key, tensor, message in ((name, nan, f"{name} .*not finite"), (name, inf, f"{name} .*not finite"),
                                 (name, torch.zeros(9), name), (name, None, name), ("more", inf, "more")):
        tensors = {n: t for n, t in (vqgan.state_dict() | {key: tensor}).items() if t is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            load_model(VQGAN, TokenizerConfig(), tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_may_be_read_as_the_users_umask_says(vqgan, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_model(vqgan, tmp_path)
    finally:
        os.umask(before)
    assert [f.stat().st_mode & 0o777 for f in tmp_path.iterdir()] == [mode, mode]

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 5")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    def fail_half_way(path):
        path.write_text("half")
        assert json.loads(file.read_text()) == {"a": 1}  # the old one has its name until the new one is whole
        raise error
    with pytest.raises(OSError, match="a.json could not be written .*(No space left|unexpected pos)"):
        write_atomically(file, fail_half_way)
    assert json.loads(file.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [file]
    write_json(file, "abc")
    assert file.read_text() == '"abc"\n' and list(tmp_path.iterdir()) == [file]
    assert file_hash(file) == hashlib.sha256(b'"abc"\n').hexdigest()[:16]
