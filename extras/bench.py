"""Speed of drawing and training beside a plain way to do the same, with new weights of a preset's sizes.

    python -m extras.bench tiny                     # both; other keys as for train.py
    python -m extras.bench full --stage=align --micro_batch=8
    python -m extras.bench gpu                      # all about a GPU: docs/gpu.md
"""

import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import sample
import train
from data import Collate
from extras import plan
from mentor import Mentor, SamplingConfig
from tokenizer import VQGAN


def synchronize(device):
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(functions, device, rounds=3):
    """{name: function} -> {name: seconds}: once to warm up, then in turns, as noise comes and goes."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            seconds[name] += [time.perf_counter() - started] if turn else []
    return {name: float(np.median(times)) for name, times in seconds.items()}


def measure_limits(device, dtype):
    """A device's limits: bytes/s of a copy (read plus written), FLOPs/s of a matrix product."""
    size, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b, x = *torch.randn(2, count, device=device), torch.randn(size, size, device=device, dtype=dtype)
    seconds = median_seconds({"copy": lambda: b.copy_(a), "product": lambda: x @ x}, device, 5)
    return 2 * a.nbytes / seconds["copy"], 2 * size**3 / seconds["product"]


# --- Drawing --------------------------------------------------------------------------------------------


def new_model(run, device):
    """A Mentor to draw with. Its encoder, which runs once for a prompt, is tiny's."""
    tiny = train.PRESETS["tiny"].model
    torch.manual_seed(0)
    with torch.device(device):
        model = Mentor(replace(run.model, vision=tiny.vision, text=tiny.text)).eval().to(device)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.02)
    return model.bfloat16() if device.type == "cuda" else model


@torch.no_grad()
def start(model, prompts, n_prefix):
    """Read random prefixes, two rows for a prompt: (logits, cache, generators), (prefix, lengths)."""
    weight, rows = model.decoder.norm.weight, 2 * prompts
    prefix = torch.randn(rows, n_prefix, len(weight), device=weight.device, dtype=weight.dtype)
    lengths = torch.full((rows,), n_prefix, device=weight.device)
    generators = [torch.Generator(weight.device).manual_seed(i) for i in range(prompts)]
    return (*model.prefill(prefix, lengths), generators), (prefix, lengths)


@torch.no_grad()
def draw(decode_step, logits, cache, generators, count):
    """Choose and read codes as sample.generate does."""
    sampling = SamplingConfig(cfg_scale=3.0)
    for _ in range(count):
        codes = sample.choose(sample.guide(logits, sampling.cfg_scale), sampling, generators)
        logits = decode_step(codes.repeat(2), cache)


def again(decode_step, started, count):
    """A function that draws `count` codes, the same ones at every call."""
    logits, cache, generators = started
    slot, position = cache.slot.clone(), cache.position.clone()

    def run():
        cache.slot.copy_(slot)
        cache.position.copy_(position)
        draw(decode_step, logits, cache, generators, count)

    return run


def cache_free(model, prefix, lengths):
    """A decode step that reads all codes again: its cache is a list of them."""
    def decode_step(codes, read):
        read.append(codes)
        hidden = model.next_code_hidden(prefix, lengths, torch.stack([*read, codes], 1))  # not the last
        return model.decoder.output(hidden[:, -1]).float()

    return decode_step


def step_limit(model, prompts, filled, limits):
    """Least seconds of a step: to read the decoder's weights and `filled` slots of the cache; to multiply."""
    d, weights = model.config.decoder, plan.weights(model.decoder)
    values = weights + 2 * prompts * filled * 2 * d.n_layer * d.width
    return max(values * model.decoder.norm.weight.itemsize / limits[0], 4 * prompts * weights / limits[1])


def bench_drawing(run, device, limits):
    """Print codes/s with and without the KV cache, and of many prompts at once."""
    model, n_prefix = new_model(run, device), min(64, run.model.context)
    count, (started, read) = min(64, run.model.decoder.n_code - 1), start(model, 1, n_prefix)
    seconds = median_seconds({
        "KV cache": again(model.decode_step, started, count),
        "cache-free": lambda: draw(cache_free(model, *read), started[0], [], started[2], count)}, device)
    print(f"one prompt, {count} codes:", *(f"{way} {count / s:.3g} codes/s;" for way, s in seconds.items()))
    few = min(8, count)
    for prompts in (1, 2, 4, 8, 16, 32, 64):
        some = again(model.decode_step, start(model, prompts, n_prefix)[0], few)
        step, limit = median_seconds({0: some}, device)[0] / few, step_limit(model, prompts, n_prefix, limits)
        print(f"{prompts:2} prompts: {prompts / step:.4g} codes/s, {1e3 * step:.3g} ms a step, "
              f"{limit / step:.0%} of the limit")


# --- Training -------------------------------------------------------------------------------------------


def released_losses(model, batch, codes):
    """MentorStage's losses (B,) in the released code's way: prefixes at the right end of a window, a mask
    over the padding before them, the head at all positions."""
    (B, T), N, device = batch.text_ids.shape, codes.shape[1], codes.device
    padding, attend = T - batch.lengths[:, None], F.scaled_dot_product_attention
    prefix = model.projector(model.encoder(batch), batch.lengths, batch.drop)
    order = (torch.arange(T, device=device) - padding) % T
    prefix, at = prefix.gather(1, order[..., None].expand_as(prefix)), torch.arange(T + N - 1, device=device)
    x = torch.cat([prefix, model.decoder.code_embedding(codes[:, :-1])], dim=1)
    mask = (at <= at[:, None]) & (at >= padding)[:, None] | (at == at[:, None])          # padding sees itself
    with patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: attend(q, k, v, mask[:, None])):
        hidden = model.decoder(x, (at - T + 1).clamp(min=0).expand(B, -1))
    return train.losses_of(model.decoder.output(hidden)[:, -N:], codes).mean(1)


def new_stage(name, run, machine):
    """A stage with new weights, and its optimizers."""
    torch.manual_seed(run.seed)
    with torch.device(machine.device):
        stage = train.MentorStage(name, run, machine, Mentor(run.model), VQGAN(run.vqgan)).train()
    return stage.to(machine.device), train.make_optimizers(stage, getattr(run, name), run)


def take_step(stage, optimizers, losses):
    """One step of training on the mean of losses()."""
    with stage.machine.autocast():
        loss = losses().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in stage.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def bench_training(name, run, machine, limits):
    """Print samples/s of a step as it is and as in the released code."""
    source, micro = train.open_source(run), train.micro_batches(getattr(run, name), run, machine)[0]
    dataset, text_tokenizer = train.make_dataset(name, run, source), source.text_tokenizer()
    collate = Collate(text_tokenizer, run.model, run.vqgan.image_size)
    batch = collate([dataset[i] for i in range(micro)]).to(machine.device)
    stage, optimizers = new_stage(name, run, machine)
    flops, _ = plan.costs(name, run, machine, batch.lengths.float().mean().item(), len(batch.pixels) / micro)
    encode = stage.vqgan[0].encode
    for way, losses in {"no mask": lambda: stage.code_losses(batch)[0], "released code's dense mask":
                        lambda: released_losses(stage.model, batch, encode(batch.targets))}.items():
        step = median_seconds({0: lambda: take_step(stage, optimizers, losses)}, machine.device)[0]
        print(f"{name}, {micro} samples, {way}: {micro / step:.3g} samples/s, "
              f"{micro * flops / step / limits[1]:.0%} of the matrix rate")


def main(arguments):
    """Run the command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return print(__doc__)
    if arguments[0] == "gpu":
        from extras import gpu
        return gpu.main(arguments[1:])
    run = train.parse(arguments)
    machine = train.start_machine(run)
    limits = measure_limits(machine.device, machine.dtype)
    print(f"{torch.get_num_threads()} threads, {limits[0] / 1e9:.3g} GB/s, {limits[1] / 1e12:.3g} TFLOPS")
    bench_drawing(run, machine.device, limits)
    bench_training("instruct" if run.stage == "all" else run.stage, run, machine, limits)


if __name__ == "__main__":
    sample.cli(main, "bench.py")
