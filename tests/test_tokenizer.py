"""The VQGAN and the parts of its training."""

import pytest
import torch
import torch.nn.functional as F

import tokenizer
from tokenizer import PRESETS, VQGAN, CodebookUsage, PatchDiscriminator, TokenizerConfig, VectorQuantizer, adaptive_weight, hinge_d_loss

SMALL = TokenizerConfig(image_size=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, z_channels=16, codebook_size=32)


def test_shapes_and_a_stable_round_trip():
    torch.manual_seed(0)
    model = VQGAN(SMALL).eval()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    reconstruction, _, codes = model(images)
    assert reconstruction.shape == images.shape and codes.shape == (3, 8, 8)
    assert torch.equal(model.encode(images), codes.flatten(1))
    torch.testing.assert_close(model.decode(codes.flatten(1)), reconstruction, atol=1e-5, rtol=1e-5)


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
    assert torch.equal(codes, again) and z_q.dtype == loss.dtype == torch.float32


def test_dead_codes_restart_on_encoder_outputs():
    quantizer, usage = VectorQuantizer(SMALL), CodebookUsage(32, "cpu")
    usage.add(torch.arange(30).repeat(2))
    assert usage.usage() == 30 / 32 and abs(usage.perplexity() - 30) < 1e-3
    before, z = quantizer.embedding.weight.detach().clone(), F.normalize(torch.randn(5, 8), dim=-1)
    assert usage.restart_dead(quantizer, z, torch.Generator().manual_seed(0)) == 2
    after = quantizer.embedding.weight.detach()
    assert torch.equal(before[:30], after[:30])
    assert all(any(torch.allclose(row, candidate) for candidate in z) for row in after[30:])
    usage.reset()
    assert usage.usage() == 0


def test_adversarial_parts():
    torch.manual_seed(0)
    logits = PatchDiscriminator(16)(torch.randn(2, 3, 64, 64))
    assert logits.shape[:2] == (2, 1) and logits.shape[2] > 1
    assert hinge_d_loss(torch.tensor([2.0]), torch.tensor([-2.0])) == 0
    assert hinge_d_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    weight = torch.nn.Parameter(torch.ones(3))
    torch.testing.assert_close(adaptive_weight((3 * weight).sum(), weight.sum(), weight), torch.tensor(3.0), atol=1e-3, rtol=1e-3)
    assert adaptive_weight(weight.sum(), (1e-9 * weight).sum(), weight, limit=100.0) == 100.0


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
    assert TokenizerConfig(**PRESETS["full"]).grid_size == 32 and TokenizerConfig(**PRESETS["tiny"]).grid_size == 8
    with pytest.raises(ValueError, match="image_size=500 is no multiple .* 16"):
        TokenizerConfig(image_size=500)
    with pytest.raises(ValueError, match="norm_groups=32 does not divide 16"):
        TokenizerConfig(ch=16)
    with pytest.raises(ValueError, match="no square grid"):
        VQGAN(SMALL).decode(torch.zeros(1, 63, dtype=torch.long))
