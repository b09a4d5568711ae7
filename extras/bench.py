"""Speed of drawing and training beside a plain way to do the same, with new weights.

    python -m extras.bench tiny     # other keys as for train.py
    python -m extras.bench gpu      # all about a GPU: docs/gpu.md
"""

import time
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import sample
import train
from data import Batch
from mentor import Mentor, SamplingConfig
from tokenizer import VQGAN


def median_seconds(function, device):
    """Seconds of a call, after one to warm up."""
    seconds, wait = [], torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(4):
        wait()
        started = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def new_model(run, device):
    """A Mentor with new weights, its head's not zero."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Mentor(run.model)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.02)
    return model.to(device)


# --- Drawing ---


@torch.no_grad()
def start(model, prompts, n_prefix):
    """Read random prefixes, two rows for a prompt: (logits, cache, generators), (prefix, lengths)."""
    weight, rows = model.decoder.norm.weight, 2 * prompts
    prefix = torch.randn(rows, n_prefix, len(weight), device=weight.device, dtype=weight.dtype)
    lengths = torch.full((rows,), n_prefix, device=weight.device)
    generators = [torch.Generator(weight.device).manual_seed(i) for i in range(prompts)]
    return (*model.prefill(prefix, lengths), generators), (prefix, lengths)


def drawing(decode_step, logits, cache, generators, count):
    """A function that chooses and reads the first `count` codes as sample.generate does."""
    sampling, slot, position = SamplingConfig(cfg_scale=3.0), cache.slot.clone(), cache.position.clone()

    @torch.no_grad()
    def draw():
        cache.slot.copy_(slot)
        cache.position.copy_(position)
        seen = logits
        for _ in range(count):
            codes = sample.choose(sample.guide(seen, sampling.cfg_scale), sampling, generators)
            seen = decode_step(codes.repeat(2), cache)

    return draw


def cache_free(model, prefix, lengths):
    """A decode step that reads all again; of the cache it uses the position alone."""
    read = lengths.new_zeros(len(lengths), model.config.decoder.n_code)

    def decode_step(codes, cache):
        k = cache.advance().item()
        read[:, k - 1] = codes
        return model.next_code_logits(prefix, lengths, read[:, : k + 1])[:, -1]  # the last code is not read

    return decode_step


def bench_drawing(run, device):
    """Print codes/s without and with the KV cache."""
    model, n_prefix, count = new_model(run, device).eval(), run.model.image_tokens + 20, 32
    for prompts, cached in ((1, False), (1, True), (4, True), (16, True), (64, True)):
        started, read = start(model, prompts, n_prefix)
        step = model.decode_step if cached else cache_free(model, *read)
        rate = prompts * count / median_seconds(drawing(step, *started, count), device)
        print(f"{prompts:2} prompts, {'KV cache' if cached else 'cache-free'}: {rate:.4g} codes/s")


# --- Training ---


def made_up(run, count, tokens, device):
    """A batch of prompts of that many tokens with an image each."""
    ids, n = torch.randint(5, run.model.text.vocab_size, (count, tokens)), run.model.image_tokens
    slots = (torch.arange(count)[:, None] * tokens + torch.arange(n)).flatten()
    sizes, no = (run.model.vision.image_size, run.vqgan.image_size), ids < 0
    pixels, targets = (torch.randn(count, 3, size, size) for size in sizes)
    return Batch(ids, no[:, 0] + tokens, pixels, slots, targets, no[:, 0], no, ["made up"] * count).to(device)


def released_losses(model, batch, codes):
    """MentorStage's losses (B,) in the released code's way: prefixes at the right end of a window, a mask
    over the padding before them, the head at all positions."""
    (B, T), N, device = batch.text_ids.shape, codes.shape[1], codes.device
    padding, attend = T - batch.lengths[:, None], F.scaled_dot_product_attention
    prefix = model.projector(model.encoder(batch), batch.lengths, batch.drop)
    order = (torch.arange(T, device=device) - padding) % T
    prefix, at = prefix.gather(1, order[..., None].expand_as(prefix)), torch.arange(T + N - 1, device=device)
    x = torch.cat([prefix, model.decoder.code_embedding(codes[:, :-1])], dim=1)
    mask = (at <= at[:, None]) & (at >= padding)[:, None] | (at == at[:, None])  # padding sees itself
    with patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: attend(q, k, v, mask[:, None])):
        hidden = model.decoder(x, (at - T + 1).clamp(min=0).expand(B, -1))
    logits = model.decoder.output(hidden)[:, -N:].float().flatten(0, 1)
    return F.cross_entropy(logits, codes.flatten(), reduction="none").view(B, N).mean(1)


def new_stage(name, run, machine):
    """A stage with new weights, and its optimizers."""
    model = new_model(run, machine.device)
    stage = train.MentorStage(name, run, machine, model, VQGAN(run.vqgan).to(machine.device))
    return stage.train(), train.make_optimizers(stage, getattr(run, name), run)


def take_step(stage, optimizers, losses):
    """One step of training on the mean of losses()."""
    with stage.machine.autocast():
        loss = losses().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in stage.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def bench_training(run, machine):
    """Print samples/s of instruct's step."""
    micro, _ = train.micro_batches(run.instruct, run, machine)
    batch = made_up(run, micro, run.model.image_tokens + 20, machine.device)
    stage, optimizers = new_stage("instruct", run, machine)
    ways = {"no mask": lambda: stage.code_losses(batch), "released code's dense mask":
            lambda: released_losses(stage.model, batch, stage.vqgan[0].encode(batch.targets))}
    for way, losses in ways.items():
        seconds = median_seconds(lambda: take_step(stage, optimizers, losses), machine.device)
        print(f"instruct, {micro} samples, {way}: {micro / seconds:.3g} samples/s")


def main(arguments):
    """Run the command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return print(__doc__)
    if arguments[0] == "gpu":
        from extras import gpu
        return gpu.main(arguments[1:])
    run = train.parse(arguments)
    machine = train.start_machine(run)
    bench_drawing(run, machine.device)
    bench_training(run, machine)


if __name__ == "__main__":
    sample.cli(main, "bench.py")
