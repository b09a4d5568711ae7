"""Less memory, the same numbers: recomputed activations, the loss in pieces, attention without a mask."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from conftest import randomize, small_config
from mentor import Mentor, SamplingConfig
from sample import generate
from tokenizer import VQGAN, TokenizerConfig

CPU = train.Machine(0, 1, torch.device("cpu"), torch.float32)


def saved_bytes(function, module):
    """(what function() returns, bytes that autograd holds for its backward pass), each storage once, the module's own left out."""
    own, storages = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}, {}

    def note(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    return result, sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def dropping(text_tokenizer):
    """A small config with dropout everywhere."""
    config = small_config(text_tokenizer)
    return replace(config, text=replace(config.text, dropout=0.1), decoder=replace(config.decoder, dropout=0.1))


def step(text_tokenizer, make_batch, checkpoint):
    """One training forward and backward: (gradients, bytes saved for it, logs)."""
    run = replace(train.PRESETS["tiny"], model=dropping(text_tokenizer), checkpoint=checkpoint)
    torch.manual_seed(0)
    vqgan = VQGAN(TokenizerConfig(image_size=32, ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4, z_channels=8, codebook_size=64))
    stage = train.MentorStage("instruct", run, CPU, randomize(Mentor(run.model)), vqgan).train()
    batch = make_batch(run.model, 6)
    torch.manual_seed(1)
    (loss, logs), saved = saved_bytes(lambda: stage(batch, 0), stage)
    loss.backward()
    return {n: p.grad for n, p in stage.trained()}, saved, logs


def test_recomputed_activations_give_the_same_gradients_from_fewer_bytes(text_tokenizer, make_batch):
    plain, plain_bytes, logs = step(text_tokenizer, make_batch, False)
    recomputed, fewer_bytes, again = step(text_tokenizer, make_batch, True)
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain) and {k: float(v) for k, v in logs.items()} == {k: float(v) for k, v in again.items()}
    assert fewer_bytes < 0.45 * plain_bytes
    assert any(g.abs().max() > 0 for g in plain.values())


def test_recomputing_leaves_drawing_and_names_alone(model, make_batch):
    batch = make_batch(model.config, 3)
    sampling = SamplingConfig(cfg_scale=2.0, temperature=1.0)
    before, names = generate(model, batch, sampling, torch.Generator().manual_seed(0)), list(model.state_dict())
    train.recompute_activations(model)
    assert torch.equal(generate(model, batch, sampling, torch.Generator().manual_seed(0)), before) and list(model.state_dict()) == names


def losses_and_gradients(limit, monkeypatch):
    """next_code_losses with a limit on the logits: (losses, gradients, bytes saved, largest tensor of logits)."""
    monkeypatch.setattr(train, "LOSS_VALUES", limit)
    torch.manual_seed(0)
    head, hidden, codes = torch.nn.Linear(16, 96, bias=False), torch.randn(3, 50, 16, requires_grad=True), torch.randint(96, (3, 50))
    largest = []
    head.register_forward_hook(lambda module, inputs, output: largest.append(output.numel()))
    losses, saved = saved_bytes(lambda: train.next_code_losses(head, hidden, codes), head)
    (losses * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    return losses.detach(), (hidden.grad, head.weight.grad), saved, max(largest)


def test_the_loss_in_pieces_is_the_plain_loss(monkeypatch):
    plain, plain_gradients, plain_bytes, whole = losses_and_gradients(2**26, monkeypatch)
    torch.manual_seed(0)
    head, hidden, codes = torch.nn.Linear(16, 96, bias=False), torch.randn(3, 50, 16), torch.randint(96, (3, 50))
    assert torch.equal(plain, F.cross_entropy(head(hidden).transpose(1, 2), codes, reduction="none").mean(1))  # nothing changes when few
    for limit, largest in ((3 * 96 * 7, 3 * 96 * 7), (1, 3 * 96)):
        pieces, gradients, fewer_bytes, most = losses_and_gradients(limit, monkeypatch)
        assert most == largest < whole == 3 * 50 * 96 and fewer_bytes < 0.3 * plain_bytes
        torch.testing.assert_close(pieces, plain, atol=1e-6, rtol=1e-6)
        for a, b in zip(gradients, plain_gradients):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_tiny_has_few_logits_and_full_many():
    values = {name: (run.micro_batch or 16) * run.model.decoder.n_code * run.model.decoder.codebook_size for name, run in train.PRESETS.items()}
    assert values["tiny"] < train.LOSS_VALUES < values["full"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))])
def test_training_the_decoder_needs_only_flash_attention(device, text_tokenizer, monkeypatch):
    """Ragged prefixes, forward and backward, with every other kernel forbidden, and no mask tensor given."""
    model, masks = randomize(Mentor(small_config(text_tokenizer))).to(device).train(), []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None, **more: (masks.append(attn_mask), plain(q, k, v, attn_mask=attn_mask, **more))[1])
    lengths = torch.tensor([9, 4, 1], device=device)
    prefix = torch.randn(3, 9, model.config.decoder.width, device=device, requires_grad=True)
    codes = torch.randint(model.config.decoder.codebook_size, (3, model.config.decoder.n_code), device=device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(device, torch.bfloat16):
        model.decoder.output(model.next_code_hidden(prefix, lengths, codes)).square().mean().backward()
    assert masks == [None] * model.config.decoder.n_layer
    real = torch.arange(9, device=device) < lengths[:, None]
    assert (prefix.grad[real].abs().amax(-1) > 0).all() and not prefix.grad[~real].any()
