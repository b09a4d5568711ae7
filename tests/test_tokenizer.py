"""The VQGAN and the parts of its training."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tokenizer
import train
from data import tokenizer_pixels
from tokenizer import (PRESETS, VQGAN, CodebookUsage, PatchDiscriminator, TokenizerConfig, VectorQuantizer, adaptive_weight, collages,
                       consistency_loss, hinge_d_loss, spread_codes)

SMALL = TokenizerConfig(image_size=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, z_channels=16, codebook_size=32)


def test_shapes_and_a_stable_round_trip():
    torch.manual_seed(0)
    model = VQGAN(SMALL).eval()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    reconstruction, _, codes = model(images)
    assert reconstruction.shape == images.shape and codes.shape == (3, 8, 8)
    assert torch.equal(model.encode(images), codes.flatten(1))
    torch.testing.assert_close(model.decode(codes.flatten(1)), reconstruction, atol=1e-5, rtol=1e-5)


def test_a_new_tokenizers_residual_branches_are_silent():
    x, parts = torch.randn(1, 8, 4, 4), (tokenizer.ResnetBlock(8, 8, 4), tokenizer.AttnBlock(8, 4))
    for part in parts:
        assert torch.equal(part(x), x)


def test_many_pictures_are_encoded_a_few_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model, images, counts = VQGAN(SMALL).eval(), torch.rand(5, 3, 16, 16) * 2 - 1, []
    whole = model.encode(images)
    model.encoder.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    monkeypatch.setattr(tokenizer, "PIXELS_AT_ONCE", 2 * 16 * 16 + 1)
    assert torch.equal(model.encode(images), whole) and counts == [2, 2, 1]


def test_the_nearest_code_is_chosen():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(SMALL), torch.randn(2, 8, 4, 4)
    _, _, codes = quantizer(z)
    distance = torch.cdist(F.normalize(z.permute(0, 2, 3, 1).flatten(0, 2), dim=-1), quantizer.codebook())
    assert torch.equal(codes.flatten(), distance.argmin(1))


def test_gradient_passes_straight_through_and_codes_get_their_loss():
    torch.manual_seed(0)
    quantizer, probe = VectorQuantizer(SMALL), torch.randn(1, 8, 2, 2)
    z = F.normalize(torch.randn(1, 8, 2, 2), dim=1).requires_grad_()
    z_q, _, _ = quantizer(z)
    (z_q * probe).sum().backward()
    direct = torch.autograd.grad((F.normalize(z, dim=1) * probe).sum(), z)[0]  # as if nothing had been quantized
    torch.testing.assert_close(z.grad, direct)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()
    quantizer(z.detach())[1].backward()
    assert quantizer.embedding.weight.grad.any()


def test_beta_weighs_the_encoders_side_of_the_loss():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(SMALL), torch.randn(1, 8, 2, 2)
    z_q, loss, _ = quantizer(z)
    distance = F.mse_loss(z_q, F.normalize(z, dim=1))
    torch.testing.assert_close(loss, 1.25 * distance)


def test_codes_are_the_same_inside_autocast():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(TokenizerConfig(codebook_size=4096)), torch.randn(1, 8, 32, 32)
    _, _, codes = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, again = quantizer(z)
    nearest = (F.normalize(z, dim=1).permute(0, 2, 3, 1) @ quantizer.codebook().T).argmax(-1)
    assert torch.equal(codes, nearest) and torch.equal(codes, again) and z_q.dtype == loss.dtype == torch.float32


def test_usage_is_counted_over_a_window():
    usage = CodebookUsage(32, "cpu")
    usage.add(torch.arange(30).repeat(2))
    assert usage.usage() == 30 / 32 and abs(usage.perplexity() - 30) < 1e-3
    usage.reset()
    assert usage.usage() == 0
    usage.add(torch.tensor([[7]]))
    assert usage.usage() == 1 / 32  # once is enough


def test_every_rare_sight_gets_a_code_before_a_common_one_gets_a_second():
    """20 sights, one of them 5,000 times as common as the others, each seen with a little noise."""
    torch.manual_seed(0)
    sights = F.normalize(torch.randn(20, 8), dim=-1)
    which = torch.cat([torch.zeros(5000, dtype=torch.long), torch.arange(1, 20)])
    z = F.normalize(sights[which] + 0.02 * torch.randn(len(which), 8), dim=-1)
    codes = spread_codes(3 * z, 20, torch.Generator().manual_seed(0))
    assert (codes.norm(dim=1) - 1).abs().max() < 1e-5 and sorted((codes @ sights.T).argmax(1).tolist()) == list(range(20))
    assert torch.equal(spread_codes(3 * z, 20, torch.Generator().manual_seed(0)), codes)  # nothing else is random
    own = VectorQuantizer.nearest(z, codes)
    torch.testing.assert_close(codes[own[0]], F.normalize(z[:5000].mean(0), dim=0), atol=1e-5, rtol=0)  # the mean of all that it stands for
    assert spread_codes(z[:3], 8, torch.Generator().manual_seed(0)).isfinite().all()                     # fewer outputs than codes


def test_places_are_new_codes_for_what_the_encoder_says():
    run = replace(train.PRESETS["tiny"], vqgan=SMALL, tokenizer=replace(train.PRESETS["tiny"].tokenizer, steps=10, codebook_start=0.4, restart_every=2, consistency=0.0))
    pictures = [SimpleNamespace(target=np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)) for i in range(64)]
    torch.manual_seed(0)
    stage = train.TokenizerStage(run, train.Machine(0, 1, torch.device("cpu"), torch.float32), pictures)
    before, logs = stage.model.quantize.codebook().clone(), []
    images = torch.stack([tokenizer_pixels(p.target, 16) for p in pictures])
    for step in range(10):
        with torch.no_grad():
            loss, _ = stage(SimpleNamespace(targets=images[:8]), step)
        logs.append(stage.after_step(step))
        if step == 2:
            assert torch.equal(stage.model.quantize.codebook(), before)
    assert [step for step, log in enumerate(logs) if "usage" in log] == [3, 5, 7, 9] and [step for step, log in enumerate(logs) if "restarted" in log] == [3, 5, 7]
    assert not stage.usage.counts.any()  # each window is counted anew
    codes = stage.model.encode(images)
    assert len(codes.unique()) == 32 and not torch.allclose(stage.model.quantize.codebook(), before)  # all are in use
    smooth, rounded = stage.reconstruct(images, 3), stage.reconstruct(images, 4)
    with torch.no_grad():
        expected = stage.model.decoder(stage.model.post_quant_conv(F.normalize(smooth.z, dim=1)))
    torch.testing.assert_close(smooth.images, expected)                    # before codebook_start nothing is rounded
    torch.testing.assert_close(rounded.images, stage.model(images)[0])     # from then on everything is
    assert smooth.quantizer == 0 and rounded.quantizer > 0
    stage.codebook_start = 7
    assert "restarted" not in stage.after_step(8) and "restarted" not in stage.after_step(5)
    stage.codebook_start = 9
    assert "restarted" in stage.after_step(8)  # codes are placed once, however late


def test_collages_keep_whole_cells_and_consistency_sees_what_moved():
    pictures = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 16)
    flips = set()
    for step in range(20):
        targets, kept = collages(pictures, 8, step)
        assert torch.equal(targets[::2], pictures[::2]) and torch.equal(kept, collages(pictures[:2], 8, step)[1])
        cells = targets.unflatten(2, (8, 2)).unflatten(4, (8, 2))                        # (B, 3, 8, 2, 8, 2)
        assert torch.equal(cells.amax((1, 3, 5)), cells.amin((1, 3, 5)))
        assert torch.equal(cells.amax((1, 3, 5))[1::2], torch.where(kept, pictures[:6:2, 0, :8, :8], pictures[1:6:2, 0, :8, :8]))
        flips.add(bool(kept[0, 0]))
    assert flips == {True, False}
    assert torch.equal(collages(pictures[:5], 8, 0)[0][4], pictures[4])                   # the last of an odd number stays
    z, kept = torch.randn(5, 8, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    kept[2:4, 3:6] = True
    z[1:4:2, :, kept] = 2 * z[:4:2, :, kept]
    assert consistency_loss(z, kept) < 1e-12
    z[1, :, 2, 3] = -z[0, :, 2, 3]                                                        # the farthest there is: 4 over 8 channels, 12 pairs of cells
    assert abs(consistency_loss(z, kept) - 4 / 8 / 12) < 1e-6


def test_adversarial_parts():
    torch.manual_seed(0)
    logits = PatchDiscriminator(16)(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 1, 6, 6)  # as pix2pix's: halved three times, then two convolutions of 4 x 4
    assert hinge_d_loss(torch.tensor([2.0]), torch.tensor([-2.0])) == 0
    assert hinge_d_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    weight = torch.nn.Parameter(torch.ones(3))
    torch.testing.assert_close(adaptive_weight((3 * weight).sum(), weight.sum(), weight), torch.tensor(3.0), atol=1e-3, rtol=1e-3)
    assert adaptive_weight(weight.sum(), (1e-9 * weight).sum(), weight) == tokenizer.WEIGHT_LIMIT


def test_perceptual_distance_is_that_of_vgg16s_features(tmp_path):
    """Random weights under the published names, against the layers spelt out as torchvision lists them."""
    torch.manual_seed(0)
    vgg, layers, before = {}, [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512], 3
    numbers = [sum(1 if width == "M" else 2 for width in layers[:i]) for i in range(len(layers))]  # a ReLU follows each convolution
    for number, width in zip(numbers, layers):
        if width != "M":
            vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"] = torch.randn(width, before, 3, 3) * (2 / 9 / before) ** 0.5, torch.randn(width) / 10
            before = width
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    lpips, a, b = tokenizer.LPIPS(tmp_path), torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    b.requires_grad_()

    def features(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for i, (number, width) in enumerate(zip(numbers, layers)):
            x = F.max_pool2d(x, 2) if width == "M" else F.relu(F.conv2d(x, vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"], padding=1))
            if layers[i + 1 : i + 2] in (["M"], []):
                yield x / x.norm(dim=1, keepdim=True)

    expected = sum((head * (p - q) ** 2).sum(1).mean() for head, p, q in zip(heads.values(), features(a), features(b)))
    distance = lpips(a, b)
    torch.testing.assert_close(distance, expected)
    assert lpips(a, a) == 0 < distance
    distance.backward()
    assert b.grad.any() and all(p.grad is None and not p.requires_grad for p in lpips.parameters())
    runs = [train.parse(["tiny", *keys])[1] for keys in ([], [f"--tokenizer.lpips={tmp_path}"])]
    without, planned = (train.Rehearsal("tokenizer", run, torch.float32).flops([(1, 0)]) for run in runs)  # --dry_run counts it, too
    assert planned > 5 * without
    alex = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 192, 384, 256, 256))}
    for name, wrong, problem in (("vgg.pth", {}, "5 missing: lin0.model.1.weight"), ("vgg.pth", torch.zeros(3), "only supports Tensor"), ("vgg.pth", 5, "not iterable"),
                                 ("vgg.pth", alex, "4 of another shape: lin1.model.1.weight"), ("vgg16-397923af.pth", heads, "26 missing")):
        torch.save(wrong, tmp_path / name)  # whole, but something else
        with pytest.raises(ValueError, match=rf"lpips=.*{name} is broken, or of another network \(.*{problem}.*\): download it again"):
            tokenizer.LPIPS(tmp_path)


def test_a_windows_usage_is_said_and_what_is_wrong_with_it(capsys):
    run = train.parse(["tiny", "--tokenizer.disc_start=0", "--tokenizer.codebook_start=0", "--tokenizer.restart_every=1"])[1]
    stage = train.TokenizerStage(run, train.Machine(0, 1, torch.device("cpu"), torch.float32))
    capsys.readouterr()
    for step, used, weight in ((0, 128, 1.0), (1, 8, 1e4), (2, 128, 1e4)):
        stage.usage.counts.zero_()[:used] = 3
        stage.d_weight = torch.tensor(weight)
        stage.describe_window(step, stage.usage.usage(), stage.usage.perplexity())
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "warning" not in line] == [
        f"tokenizer: up to step {step} {share} of 256 codes in use, perplexity {perplexity}" for step, share, perplexity in ((1, "50%", 128), (2, "3%", 8), (3, "50%", 128))]
    assert len(said) == 5 and "--vqgan.codebook_size" in said[2] and "--tokenizer.restart_every=1" in said[2] and "d_weight is at its limit 10000" in said[3]


def test_every_part_of_the_loss_has_its_weight_and_its_time():
    """The discriminator learns from step 20 on, and from 21 on the generator from it."""
    run = train.parse(["tiny", "--tokenizer.steps=100", "--tokenizer.disc_start=0.2", "--tokenizer.codebook_start=0", "--tokenizer.consistency=0.3"])[1]
    torch.manual_seed(0)
    stage, images = train.TokenizerStage(run, train.Machine(0, 1, torch.device("cpu"), torch.float32)), torch.rand(4, 3, 32, 32) * 2 - 1
    for step, seen, weighed in ((19, 0, False), (20, 1, False), (21, 2, True)):
        loss, logs = stage(SimpleNamespace(targets=images), step)
        expected = logs["reconstruction"] + 0.2 * logs["quantizer"] + 0.3 * logs["consistency"]
        if weighed:
            expected = expected - 0.5 * logs["d_weight"] * stage.disc(stage.seen[-1][0]).mean()
        assert len(stage.seen) == seen and ("d_weight" in logs) == weighed
        torch.testing.assert_close(loss, expected)


def test_the_discriminator_sees_every_micro_batch():
    """Its step after two halves of a batch is its step after the whole."""
    keys = ["--tokenizer.disc_start=0", "--tokenizer.consistency=0", "--tokenizer.codebook_start=0"]
    run, images = train.parse(["tiny", *keys])[1], torch.rand(4, 3, 32, 32) * 2 - 1
    learnt = []
    for batches in ((images,), images.split(2)):
        torch.manual_seed(0)
        stage = train.TokenizerStage(run, train.Machine(0, 1, torch.device("cpu"), torch.float32))
        stage.own_optimizers = [torch.optim.SGD(stage.disc.parameters(), 0.1)]
        for batch in batches:
            stage(SimpleNamespace(targets=batch), 0)
        loss = stage.after_step(0)["disc"]
        learnt.append(torch.cat([loss[None], *(p.flatten() for p in stage.disc.parameters())]))
    torch.testing.assert_close(*learnt, atol=1e-6, rtol=1e-4)
    assert not stage.seen


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    model, images = VQGAN(SMALL), torch.rand(2, 3, 16, 16).round() * 2 - 1
    images = F.interpolate(images[..., ::4, ::4], scale_factor=4.0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        reconstruction, loss, _ = model(images)
        error = F.mse_loss(reconstruction, images)
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
    assert error < 0.05


def test_saved_tokenizer_is_the_same(tmp_path):
    model = VQGAN(SMALL)
    model.save_pretrained(tmp_path)
    again = VQGAN.from_pretrained(tmp_path)
    assert again.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_presets_and_illegal_sizes():
    assert PRESETS["full"].grid_size == 32 and PRESETS["tiny"].grid_size == 8
    with pytest.raises(ValueError, match="image_size=500 is no multiple .* 16"):
        TokenizerConfig(image_size=500)
    with pytest.raises(ValueError, match="norm_groups=32 does not divide 16"):
        TokenizerConfig(ch=16)
    with pytest.raises(ValueError, match="no square grid"):
        VQGAN(SMALL).decode(torch.zeros(1, 63, dtype=torch.long))


def test_usage_counts_beyond_what_float32_can():
    usage = CodebookUsage(2, "cpu")
    usage.counts[0] = 2**24  # + 1 would be lost there
    usage.add(torch.zeros(10, dtype=torch.long))
    assert usage.counts.tolist() == [2**24 + 10, 0]


def test_a_few_pictures_at_a_time_are_all_pictures(monkeypatch):
    model, images = VQGAN(SMALL), torch.rand(5, 3, SMALL.image_size, SMALL.image_size) * 2 - 1
    codes = model.encode(images)
    whole = model.decode(codes)
    monkeypatch.setattr(tokenizer, "PIXELS_AT_ONCE", 2 * SMALL.image_size**2)
    assert model.at_once() == 2 and torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), whole)
    assert model.encode(images[:0]).shape == (0, SMALL.grid_size**2)


def test_more_codes_than_different_outputs_are_vectors_all_the_same():
    codes = spread_codes(torch.randn(20, 8).repeat(10, 1), 64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(64))
