"""All about a GPU in eight minutes; docs/gpu.md says what the numbers mean.

    python -m extras.bench gpu [--out=gpu.json]
    python -m extras.bench gpu --small --device=cpu     # shrunken: does every part run to its end?
"""

import argparse
import gc
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

import train
from extras import bench, plan
from tokenizer import require, write_json

ROOT = Path(__file__).parent.parent


def note(o, name, **values):
    """Print a result and write it at once."""
    values = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in values.items()}
    results = json.loads(Path(o.out).read_text())
    results.setdefault(o.part, {})[name] = values
    write_json(o.out, results)
    print(o.part, name, json.dumps(values), flush=True)


def agree(o):
    """A training step and greedy codes beside the CPU's."""
    sys.path.append(str(ROOT / "tests"))
    if not importlib.util.find_spec("pytest"):
        sys.modules["pytest"] = MagicMock()
    test_cuda = importlib.import_module("test_cuda")
    for dtype in (torch.float32, torch.bfloat16):
        loss, gradient = test_cuda.step_difference(o.device, dtype)
        note(o, str(dtype), loss=loss, gradient=gradient, same_codes=test_cuda.same_codes(o.device, dtype))


# --- Drawing ---


@torch.no_grad()
def by_hand(model, cache):
    """decode_step recorded as a CUDA graph, replayed with one launch."""
    codes, graph = cache.slot.new_zeros(len(cache.mask)), torch.cuda.CUDAGraph()
    model.decode_step(codes, cache)  # libraries load their kernels
    with torch.cuda.graph(graph):
        logits = model.decode_step(codes, cache)

    def decode_step(new_codes, _):
        codes.copy_(new_codes)
        graph.replay()
        return logits

    return decode_step


def draw(o):
    """Drawing at full: a guided step, and its share of the memory limit."""
    counters = torch._dynamo.utils.counters
    preset, prefix, count, sizes = ("tiny", 20, 2, (1, 2)) if o.small else ("full", 280, 24, (1, 4, 16, 64))
    run, cuda = train.parse([preset]), o.device.type == "cuda"
    model = bench.new_model(run, o.device).eval()
    model = model.bfloat16() if cuda else model
    a, b = torch.randn(2, 2**28 if cuda else 2**24, device=o.device)
    rate = 2 * a.nbytes / bench.median_seconds(lambda: b.copy_(a), o.device)  # read and written
    note(o, "copy", GB_per_s=rate / 1e9)
    filled = prefix + run.model.decoder.n_code // 2  # slots of the cache, the mean over a picture
    for prompts in sizes:
        (logits, cache, generators), _ = bench.start(model, prompts, prefix)
        part = copy(cache)
        part.k, part.v = ([tensor[:, :, :filled] for tensor in tensors] for tensors in (cache.k, cache.v))
        part.mask = cache.mask[..., :filled]
        read = plan.weights(model.decoder) * cache.k[0].itemsize + sum(t.nbytes for t in (*part.k, *part.v))

        def measure(name, step, cache, **more):
            drawing = bench.drawing(step, logits, cache, generators, count)
            seconds = bench.median_seconds(drawing, o.device) / count
            note(o, f"{prompts} {name}", ms=1e3 * seconds, of_limit=read / rate / seconds, **more)

        measure("eager", model.decode_step, cache)
        torch._dynamo.reset()
        counters.clear()
        begun, options = time.perf_counter(), {"mode": "reduce-overhead"} if cuda else {"backend": "eager"}
        step = torch.compile(model.decode_step, fullgraph=True, **options)
        bench.drawing(step, logits, cache, generators, 3)()  # compiles, records
        measure("compiled", step, cache, compile_s=time.perf_counter() - begun,
                programs=counters["stats"]["unique_graphs"], skipped=counters["inductor"]["cudagraph_skips"])
        measure("graph", by_hand(model, part) if cuda else model.decode_step, part)


# --- Training ---


def train_one(o, run, machine, tokens):
    """A stage as it is and compiled, with prompts of three lengths."""
    counters = torch._dynamo.utils.counters
    (flops, memory), micro = plan.costs(o.part, run, machine, tokens, 1), run.micro_batch
    planned, cuda = sum(memory.values()) - memory["codes"], o.device.type == "cuda"
    stage, optimizers = bench.new_stage(o.part, run, machine)
    batches = [bench.made_up(run, micro, tokens + more, o.device) for more in (-8, 0, 8)]

    def steps():
        for batch in batches:
            bench.take_step(stage, optimizers, lambda: stage.code_losses(batch))

    def measure(way):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = bench.median_seconds(steps, o.device) / 3
        note(o, way, micro_batch=micro, samples_s=micro / seconds, MFU=micro * flops / seconds / o.peak,
             planned_GiB=planned / 2**30, peak_GiB=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0,
             programs=counters["stats"]["unique_graphs"])

    measure("as it is")
    with torch.profiler.profile() as profile:
        steps()
    column = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, column) for event in profile.key_averages()
             if o.device.type.upper() in str(event.device_type)}
    kernels = sorted((k for k in times if re.search("flash|fmha|sdpa|conv", k)), key=times.get)[-8:]
    note(o, "kernels, shares", **{k[:70]: times[k] / sum(times.values()) for k in kernels})
    parts = replace(run, compile=cuda), machine, stage.model, stage.vqgan[0]
    stage = train.MentorStage(o.part, *parts).train()
    measure("compiled blocks")


def training(o):
    """Training of full, with the largest micro-batch that fits."""
    for micro in (2,) if o.small else (32, 24, 16, 12, 8, 4):
        keys = [f"--device={o.device}", f"--micro_batch={micro}", f"--{o.part}.global_batch={micro}"]
        run = train.parse(["tiny" if o.small else "full", *keys])
        try:
            return train_one(o, run, train.start_machine(run), run.model.image_tokens + 20)
        except torch.OutOfMemoryError:
            note(o, f"micro-batch {micro}", fits=False)
        gc.collect()


# --- The rest ---


def run_and_note(o, name, *arguments):
    """Run Python; note its exit code and last words."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    note(o, name, exit_code=done.returncode, says=(done.stdout + done.stderr).splitlines()[-1][-300:])


def presets(o):
    """Samples/s of tiny and small, and seconds of a whole stage."""
    ways = [("tiny", 400), ("small", 100), ("tiny", 400, "--compile"), ("small", 100, "--compile")]
    for preset, steps, *keys in [("tiny", 2)] if o.small else ways:
        with tempfile.TemporaryDirectory() as out:
            keys += [f"--{name}.steps={steps}" for name in train.STAGES]
            run = train.parse([preset, f"--out={out}", f"--device={o.device}", *keys])
            machine, source = train.start_machine(run), train.open_source(run)
            text_tokenizer = train.start_run(run, machine, source)
            for name in train.STAGES:
                train.train_stage(name, run, machine, source, text_tokenizer)
                lines = train.read_log(Path(out) / name / "log.jsonl")
                rate = float(np.median([line["samples_per_s"] for line in lines]))
                whole = getattr(train.PRESETS[preset], name)
                note(o, f"{preset} {name}{' compiled' * run.compile}", samples_s=rate,
                     whole_s=whole.steps * whole.global_batch / rate)


SMALL_CARD = """import torch, sample, train
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(2**32 / torch.cuda.mem_get_info()[1])
sample.cli(train.main, "train.py")"""


def memory(o):
    """Out of memory, as on a card of 4 GiB, and whether the next run works."""
    preset = "tiny" if o.small else "small"
    with tempfile.TemporaryDirectory() as out:
        for name, *more in (("too large",), ("the next run", "--micro_batch=8")):
            run_and_note(o, name, "-c", SMALL_CARD, preset, "--stage=tokenizer", "--tokenizer.steps=2", *more,
                         "--tokenizer.global_batch=128", f"--out={out}", f"--device={o.device}")


def tests(o):
    """The tests; without pytest `agree` must do."""
    run_and_note(o, "pytest", "-m", "pytest", "-q", "tests/test_cuda.py")


# seconds
PARTS = {"agree": 50, "draw": 150, "align": 90, "instruct": 90, "memory": 40, "tests": 60, "presets": 110}


def main(arguments):
    """Run all parts, each in a process, or --part in this one."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part")
    o, end = parser.parse_args(arguments), time.monotonic() + 470
    require(o.device.type != "cuda" or torch.cuda.is_available(), "no CUDA here; try --small --device=cpu")
    name = torch.cuda.get_device_name() if o.device.type == "cuda" else "CPU"
    o.peak = 989e12 if re.search("H[12]00", name) else 312e12  # FLOPs/s, an A100's
    if not o.part or not Path(o.out).is_file():
        write_json(o.out, {"card": name, "torch": torch.__version__, "python": sys.version})
    if o.part:
        return globals().get(o.part, training)(o)
    for o.part, limit in PARTS.items():
        started = time.monotonic()
        command = ["timeout", "-s", "KILL", str(max(1, min(limit, end - started))), sys.executable, "-m",
                   "extras.bench", "gpu", *arguments, f"--part={o.part}", f"--out={Path(o.out).resolve()}"]
        code = subprocess.run(command, cwd=ROOT).returncode  # -9: time was up
        note(o, "whole part", seconds=time.monotonic() - started, exit_code=code)
