"""Speed of drawing and training, each beside a plain way to do the same, with new weights of a preset's sizes.

    python -m extras.bench tiny                     # both; other keys as for train.py
    python -m extras.bench full --stage=align --micro_batch=8
    python -m extras.bench gpu                      # all that has to be known about a new GPU: docs/gpu.md

Drawing is guided: two rows for each prompt. Its limit is the time to read weights and cache, or to multiply.
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
    """{name: function} -> {name: median seconds}: once to warm up, then in turns, so that noise affects all."""
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
    """A device's limits: bytes per second of a copy (read plus written), FLOPs per second of a matrix product."""
    size, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b, x = *torch.randn(2, count, device=device), torch.randn(size, size, device=device, dtype=dtype)
    seconds = median_seconds({"copy": lambda: b.copy_(a), "product": lambda: x @ x}, device, 5)
    return 2 * a.nbytes / seconds["copy"], 2 * size**3 / seconds["product"]


def print_table(*rows):
    """Print rows as a Markdown table, the first as its head; numbers get three digits."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("|", " | ".join(f"{x:.{max(0, 2 - int(np.log10(x)))}f}" if isinstance(x, float) else str(x) for x in row), "|")


# --- Drawing --------------------------------------------------------------------------------------------


def new_model(run, device):
    """A Mentor to draw with. Its encoder is tiny's: it runs but once for each prompt."""
    tiny = train.PRESETS["tiny"].model
    torch.manual_seed(0)
    with torch.device(device):
        model = Mentor(replace(run.model, vision=tiny.vision, text=tiny.text)).eval().to(device)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.02)
    return model.bfloat16() if device.type == "cuda" else model


class CacheFree:
    """Mentor's prefill and decode_step without keys and values: all is read again for every code."""

    def __init__(self, model):
        self.model, self.decoder = model, model.decoder

    def prefill(self, prefix, lengths):
        """As Mentor.prefill; in the cache's place all that has to be read again."""
        seen = [prefix, lengths, lengths.new_empty(len(lengths), 0)]
        return self.logits(*seen), seen

    def decode_step(self, codes, seen):
        """As Mentor.decode_step."""
        seen[2] = torch.cat([seen[2], codes[:, None]], dim=1)
        return self.logits(*seen)

    def logits(self, prefix, lengths, codes):
        """Logits of the code after `codes` (B, k): (B, V)."""
        hidden = self.model.next_code_hidden(prefix, lengths, F.pad(codes, (0, 1)))  # the last is not read
        return self.decoder.output(hidden[:, -1]).float()


@torch.no_grad()
def start(model, prompts, n_prefix):
    """(logits, cache, random generators) of that many guided prompts, after reading random prefixes."""
    weight, rows = model.decoder.norm.weight, 2 * prompts
    prefix = torch.randn(rows, n_prefix, len(weight), device=weight.device, dtype=weight.dtype)
    logits, cache = model.prefill(prefix, torch.full((rows,), n_prefix, device=weight.device))
    return logits, cache, [torch.Generator(weight.device).manual_seed(i) for i in range(prompts)]


@torch.no_grad()
def draw(decode_step, logits, cache, generators, count):
    """Choose and read `count` codes, as sample.generate does."""
    sampling = SamplingConfig(cfg_scale=3.0)
    for _ in range(count):
        codes = sample.choose(sample.guide(logits, sampling.cfg_scale), sampling, generators)
        logits = decode_step(codes.repeat(2), cache)


def again(decode_step, started, count):
    """A function that draws `count` codes, the same at every call."""
    logits, cache, generators = started
    slot, position = cache.slot.clone(), cache.position.clone()

    def run():
        cache.slot.copy_(slot)
        cache.position.copy_(position)
        draw(decode_step, logits, cache, generators, count)

    return run


def step_limit(model, prompts, filled, limits):
    """Least seconds of a step: to read the decoder's weights and `filled` positions of the cache, or to multiply."""
    d, weights = model.config.decoder, plan.weights(model.decoder)
    values = weights + 2 * prompts * filled * 2 * d.n_layer * d.width
    return max(values * model.decoder.norm.weight.itemsize / limits[0], 4 * prompts * weights / limits[1])


def bench_drawing(run, device, limits):
    """Print codes/s with and without the KV cache, and of more and more prompts at once."""
    model, n_prefix, count = new_model(run, device), min(64, run.model.context), min(64, run.model.decoder.n_code - 1)
    ways = {way: lambda reader=reader: draw(reader.decode_step, *start(reader, 1, n_prefix), count)
            for way, reader in (("KV cache", model), ("cache-free loop", CacheFree(model)))}
    seconds = median_seconds(ways, device)
    print_table([f"one prompt, {count} codes", "codes/s"], *([way, count / s] for way, s in seconds.items()))
    rows, few = [], min(8, count)
    for prompts in (1, 2, 4, 8, 16, 32, 64):
        some = again(model.decode_step, start(model, prompts, n_prefix), few)
        step, limit = median_seconds({0: some}, device)[0] / few, step_limit(model, prompts, n_prefix, limits)
        rows.append([prompts, prompts / step, 1e3 * step, 1e3 * limit, f"{limit / step:.0%}"])
    print_table(["prompts at once", "codes/s", "ms a step", "limit, ms", "of the limit"], *rows)


# --- Training -------------------------------------------------------------------------------------------


def widened(batch, width):
    """The batch with its prompts padded to `width` tokens."""
    slots, more = batch.image_slots, width - batch.text_ids.shape[1]
    return replace(batch, text_ids=F.pad(batch.text_ids, (0, more)), masked=F.pad(batch.masked, (0, more)),
                   image_slots=slots + slots // batch.text_ids.shape[1] * more)


def straightforward_losses(model, batch, codes, everywhere=True):
    """The losses (B,) of MentorStage as the released code computes them: prefixes at the right end of their
    window, a dense mask over the padding before them, and with `everywhere` the head at all positions."""
    (B, T), N, device, attend = batch.text_ids.shape, codes.shape[1], codes.device, F.scaled_dot_product_attention
    padding = T - batch.lengths[:, None]                                                 # (B, 1)
    prefix = model.projector(model.encoder(batch), batch.lengths, batch.drop)
    prefix = prefix.gather(1, ((torch.arange(T, device=device) - padding) % T)[..., None].expand_as(prefix))
    x, at = torch.cat([prefix, model.decoder.code_embedding(codes[:, :-1])], dim=1), torch.arange(T + N - 1, device=device)
    mask = (at <= at[:, None]) & (at >= padding)[:, None] | (at == at[:, None])          # padding sees itself
    with patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: attend(q, k, v, mask[:, None])):
        hidden = model.decoder(x, (at - T + 1).clamp(min=0).expand(B, -1))
    logits = model.decoder.output(hidden if everywhere else hidden[:, -N:])[:, -N:].float()
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes).mean(1)


def new_stage(name, run, machine):
    """A stage with new weights, and its optimizers."""
    torch.manual_seed(run.seed)
    with torch.device(machine.device):
        stage = train.MentorStage(name, run, machine, Mentor(run.model), VQGAN(run.vqgan))
    stage.vqgan[0].to(machine.device)
    return stage.to(machine.device).train(), train.make_optimizers(stage, getattr(run, name), run)


def take_step(stage, optimizers, losses):
    """One step of training on the mean of losses(). Returns it."""
    with stage.machine.autocast():
        loss = losses().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in stage.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def bench_training(name, run, machine, limits):
    """Print samples/s of a step as it is, and as the released code computes it."""
    source, micro = train.open_source(run), train.micro_batches(getattr(run, name), run, machine)[0]
    dataset = train.make_dataset(name, run, source)
    collate = Collate(source.text_tokenizer(), run.model, run.vqgan.image_size)
    batch = collate([dataset[i] for i in range(micro)]).to(machine.device)
    stage, optimizers = new_stage(name, run, machine)
    flops, _ = plan.costs(name, run, machine, batch.lengths.float().mean().item(), len(batch.pixels) / micro)
    codes, wide = stage.vqgan[0].encode(batch.targets), widened(batch, run.model.context)
    ways = {"no mask": lambda: stage.code_losses(batch)[0],
            "dense mask, left padding": lambda: straightforward_losses(stage.model, batch, codes, False),
            "and the whole window, head everywhere": lambda: straightforward_losses(stage.model, wide, codes)}
    rows = []
    for way, losses in ways.items():
        try:
            step = median_seconds({0: lambda: take_step(stage, optimizers, losses)}, machine.device)[0]
            rows.append([way, micro / step, f"{micro * flops / step / limits[1]:.0%}"])
        except torch.OutOfMemoryError:
            rows.append([way, "out of memory", ""])
    print_table([f"{name}, {micro} samples of {flops / 1e9:.3g} GFLOPs", "samples/s", "of the matrix rate"], *rows)


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
