"""All that has to be known about a GPU, in eight minutes; docs/gpu.md says what the numbers mean.

    python -m extras.bench gpu [--out=gpu.json]
    python -m extras.bench gpu --small --device=cpu     # shrunken: does every part run to its end?

Each part has its own process and time limit.
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample
import train
from data import Batch
from extras import bench, plan
from tokenizer import require, write_json

ROOT = Path(__file__).parent.parent


def note(o, name, **values):
    """Print a result and write it at once: what comes later may fail."""
    values = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in values.items()}
    results = json.loads(Path(o.out).read_text())
    results.setdefault(o.part, {})[name] = values
    write_json(o.out, results)
    print(o.part, name, json.dumps(values), flush=True)


def agree(o):
    """A training step and greedy codes beside the CPU's, which tests/test_cuda.py bounds."""
    sys.path.append(str(ROOT / "tests"))
    if not importlib.util.find_spec("pytest"):
        sys.modules["pytest"] = MagicMock()
    import test_cuda
    for dtype in (torch.float32, torch.bfloat16):
        loss, gradient = test_cuda.step_difference(o.device, dtype)
        note(o, f"step, {dtype}", loss=loss, gradient=gradient)
        note(o, f"greedy, {dtype}", same_codes=test_cuda.same_codes(o.device, dtype))


# --- Drawing --------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, cache):
    """decode_step recorded once as a CUDA graph, then replayed with one launch."""
    if not cache.mask.is_cuda:
        return model.decode_step
    codes, state = cache.slot.new_zeros(len(cache.mask)), (cache.mask, cache.slot, cache.position)
    before, stream, graph = [tensor.clone() for tensor in state], torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.decode_step(codes, cache)  # libraries allocate at their first call
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        logits = model.decode_step(codes, cache)
    for tensor, old in zip(state, before):
        tensor.copy_(old)
    return lambda new, _: (codes.copy_(new), graph.replay(), logits)[2]


def two_products(q, k, v, attn_mask=None, **_):
    """Attention of one query, spelt out."""
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~attn_mask, -torch.inf).softmax(-1) @ v


def draw(o):
    """Drawing at full: a guided step, choosing included, and its share of the memory limit."""
    preset, prefix, count, sizes = ("tiny", 20, 2, (1, 2)) if o.small else ("full", 280, 24, (1, 4, 16, 64))
    run = train.parse([preset])
    model = bench.new_model(run, o.device)
    limits = bench.measure_limits(o.device, model.decoder.norm.weight.dtype)
    note(o, "limits", GB_per_s=limits[0] / 1e9, TFLOPS=limits[1] / 1e12)
    filled = prefix + run.model.decoder.n_code // 2  # of the cache, the mean over a picture

    def measure(prompts, name, step, started, **more):
        seconds = bench.median_seconds({0: bench.again(step, started, count)}, o.device)[0] / count
        limit = bench.step_limit(model, prompts, filled, limits)
        note(o, f"{prompts} {name}", ms=1e3 * seconds, of_limit=limit / seconds, **more)

    for prompts in sizes:
        started, _ = bench.start(model, prompts, prefix)
        measure(prompts, "eager", model.decode_step, started)
        measure(prompts, "graph", by_hand(model, started[1]), started)
        cache = copy(started[1])
        cache.k, cache.v = ([tensor[:, :, :filled] for tensor in tensors] for tensors in (cache.k, cache.v))
        cache.mask, started = cache.mask[..., :filled], (started[0], cache, started[2])
        measure(prompts, "graph, filled part", by_hand(model, cache), started)
        with patch.object(F, "scaled_dot_product_attention", two_products):
            measure(prompts, "graph, filled part, two products", by_hand(model, cache), started)
    options = {"mode": "reduce-overhead"} if o.device.type == "cuda" else {"backend": "eager"}
    for prompts in (1, *sizes[:0:-1]):
        torch._dynamo.reset()
        counters.clear()
        begun, (started, _) = time.perf_counter(), bench.start(model, prompts, prefix)
        step = torch.compile(model.decode_step, fullgraph=True, **options)
        bench.draw(step, *started, 3)  # compiles, warms up, records
        bench.synchronize(o.device)
        measure(prompts, "compiled", step, started, compile_s=time.perf_counter() - begun,
                programs=counters["stats"]["unique_graphs"], skipped=counters["inductor"]["cudagraph_skips"])


# --- Training -------------------------------------------------------------------------------------------


def made_up(run, count, tokens, device):
    """A batch of prompts of that many tokens with an image each."""
    ids, n = torch.randint(5, run.model.text.vocab_size, (count, tokens)), run.model.image_tokens
    slots = (torch.arange(count)[:, None] * tokens + torch.arange(n)).flatten()
    sizes, no = (run.model.vision.image_size, run.vqgan.image_size), ids < 0
    pixels, targets = (torch.randn(count, 3, size, size) for size in sizes)
    return Batch(ids, no[:, 0] + tokens, pixels, slots, targets, no[:, 0], no, ["made up"] * count).to(device)


def train_one(o, run, machine, tokens):
    """A stage as it is, without cuDNN's attention, and compiled, for prompts of three lengths."""
    (flops, memory), micro = plan.costs(o.part, run, machine, tokens, 1), run.micro_batch
    planned, cuda = sum(memory.values()) - memory["codes"], o.device.type == "cuda"
    if cuda and planned > torch.cuda.mem_get_info()[1]:
        raise torch.OutOfMemoryError("by the plan")
    stage, optimizers = bench.new_stage(o.part, run, machine)
    batches = [made_up(run, micro, tokens + more, o.device) for more in (-8, 0, 8)]

    def measure(way, stage):
        def steps():
            for batch in batches:
                bench.take_step(stage, optimizers, lambda: stage.code_losses(batch)[0])

        torch.cuda.reset_peak_memory_stats() if cuda else None
        begun = time.perf_counter()
        steps()  # compiles; libraries choose kernels
        first, seconds = time.perf_counter() - begun, bench.median_seconds({0: steps}, o.device, 2)[0]
        note(o, way, micro_batch=micro, samples_s=3 * micro / seconds, first_s=first,
             MFU=3 * micro * flops / seconds / o.peak, programs=counters["stats"]["unique_graphs"],
             planned_GiB=planned / 2**30, peak_GiB=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0)
        return steps

    steps = measure("as it is", stage)
    with torch.profiler.profile() as profile:
        steps()
    column = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in profile.key_averages() if o.device.type.upper() in str(e.device_type)]  # kernels
    times = {event.key: getattr(event, column) for event in events}
    kernels = sorted((k for k in times if re.search("flash|fmha|sdpa|conv", k)), key=times.get)[-8:]
    note(o, "kernels, shares", **{k[:70]: times[k] / sum(times.values()) for k in kernels})
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        measure("without cuDNN's attention", stage)
    with patch.object(torch, "compile", torch.compile if cuda else lambda function, **_: function):
        parts = replace(run, compile=True), machine, stage.model, stage.vqgan[0]
        measure("compiled blocks", train.MentorStage(o.part, *parts).train())


def training(o):
    """Training of full in the part's stage, with the largest micro-batch that fits."""
    for micro in (2,) if o.small else (32, 24, 16, 12, 8, 4):
        keys = [f"--device={o.device}", f"--micro_batch={micro}", f"--{o.part}.global_batch={micro}"]
        run = train.parse(["tiny" if o.small else "full", *keys])
        try:
            return train_one(o, run, train.start_machine(run), run.model.image_tokens + 20)
        except torch.OutOfMemoryError:
            note(o, f"micro-batch {micro}", fits=False)
        gc.collect()


# --- The rest -------------------------------------------------------------------------------------------


def run_and_note(o, name, *arguments):
    """Run Python; note its exit code and last line."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    note(o, name, exit_code=done.returncode, says=(done.stdout + done.stderr).splitlines()[-1][-300:])


def presets(o):
    """tiny and small, as they are and compiled: samples/s, and seconds of a whole stage."""
    ways = [("tiny", 400), ("small", 100), ("tiny", 400, "--compile"), ("small", 100, "--compile")]
    for preset, steps, *keys in [("tiny", 2)] if o.small else ways:
        with tempfile.TemporaryDirectory() as out:
            keys += [f"--{name}.steps={steps}" for name in train.STAGES]
            run = train.parse([preset, f"--out={out}", f"--device={o.device}", *keys])
            machine, source = train.start_machine(run), train.open_source(run)
            text_tokenizer = train.start_run(run, machine, source)
            for name in train.STAGES:
                train.train_stage(name, run, machine, source, text_tokenizer)
                lines = (Path(out) / name / "log.jsonl").read_text().splitlines()
                rate = float(np.median([json.loads(line)["samples_per_s"] for line in lines]))
                whole = getattr(train.PRESETS[preset], name)
                note(o, f"{preset} {name}{' compiled' * run.compile}", samples_s=rate,
                     whole_s=whole.steps * whole.global_batch / rate)


SMALL_CARD = """import torch, sample, train
def main(keys):
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(2**32 / torch.cuda.mem_get_info()[1])
    elif "--micro_batch=8" not in keys:
        raise torch.OutOfMemoryError("pretended")
    train.main(keys)
sample.cli(main, "train.py")"""


def memory(o):
    """Out of memory, as on a card of 4 GiB: the message, and whether the next run works."""
    count, preset = (8, "tiny") if o.small else (128, "small")
    with tempfile.TemporaryDirectory() as out:
        for name, *more in (("too large",), ("the next run", "--micro_batch=8")):
            run_and_note(o, name, "-c", SMALL_CARD, preset, "--stage=tokenizer", "--tokenizer.steps=2", *more,
                         f"--tokenizer.global_batch={count}", f"--out={out}", f"--device={o.device}")


def tests(o):
    """The tests that need a GPU; without pytest `agree` must do."""
    run_and_note(o, "pytest", "-m", "pytest", "-q", "tests/test_cuda.py")


# seconds
PARTS = {"agree": 50, "draw": 150, "align": 90, "instruct": 90, "memory": 40, "tests": 60, "presets": 110}


def main(arguments):
    """Run all parts, or with --part one of them in this process."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part")
    o, end = parser.parse_args(arguments), time.monotonic() + 470
    require(o.device.type != "cuda" or torch.cuda.is_available(), "no CUDA here; try --small --device=cpu")
    name = torch.cuda.get_device_name(o.device) if o.device.type == "cuda" else "CPU"
    o.peak = 989e12 if re.search("H[12]00", name) else 312e12  # FLOPs/s, an A100's
    if o.part:
        return globals().get(o.part, training)(o)
    write_json(o.out, {"card": name, "torch": torch.__version__, "python": sys.version.split()[0]})
    for o.part, limit in PARTS.items():
        started = time.monotonic()
        command = [sys.executable, "-m", "extras.bench", "gpu", *arguments, f"--part={o.part}"]
        command.append(f"--out={Path(o.out).resolve()}")
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(max(1, min(limit, end - started)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait() and "time is up"
        note(o, "whole part", seconds=time.monotonic() - started, exit_code=code)
