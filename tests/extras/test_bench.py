"""The benchmarks compute what they time, and the GPU check runs to its end on a CPU, part by part."""

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import sample
import train
from conftest import CPU, randomize, small_config
from extras import bench, gpu
from mentor import Mentor, SamplingConfig
from tokenizer import VQGAN

TINY = train.PRESETS["tiny"]

@pytest.fixture
def once(monkeypatch):
    """Everything that is timed runs once and takes a millisecond."""
    monkeypatch.setattr(bench, "median_seconds", lambda function, device: (function(), 1e-3)[1])

@torch.no_grad()
def test_drawing_without_a_cache_gives_the_same_logits(model):
    (logits, cache, _), read = bench.start(model, 2, 9)
    without, unread = bench.cache_free(model, *read), deepcopy(cache)
    for _ in range(5):
        codes = logits.argmax(-1)
        logits = model.decode_step(codes, cache)
        torch.testing.assert_close(without(codes, unread), logits, atol=1e-4, rtol=1e-4)

@torch.no_grad()
def test_the_drawing_that_is_timed_is_the_samplers(model, make_batch):
    """The same codes as sample.generate's."""
    batch = make_batch(model.config, 2)
    chances = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    codes = sample.generate(model, batch, SamplingConfig(cfg_scale=3.0), chances[0])
    hidden, no, read = model.encoder(batch), torch.zeros(2, dtype=torch.bool), []
    prefix = torch.cat([model.projector(hidden, batch.lengths, drop) for drop in (no, ~no)])
    step = lambda codes, cache: read.append(codes) or model.decode_step(codes, cache)
    bench.drawing(step, *model.prefill(prefix, batch.lengths.repeat(2)), chances[1], 63)()
    assert torch.equal(torch.stack(read, 1), codes[:, :63].repeat(2, 1)) and codes.unique().numel() > 9

def test_the_released_codes_way_gives_the_same_losses_and_gradients(text_tokenizer, make_batch):
    """Left padding, a dense mask and the head everywhere: the same function."""
    config = small_config(text_tokenizer)
    stage = train.MentorStage("instruct", replace(TINY, model=config), CPU, randomize(Mentor(config), 0.1),
                              VQGAN(replace(TINY.vqgan, codebook_size=64))).train()
    batch = replace(make_batch(config, 6), drop=torch.arange(6) % 3 == 0)
    assert batch.lengths.unique().numel() > 1
    codes, results = stage.vqgan[0].encode(batch.targets), []
    for losses in (stage.code_losses(batch), bench.released_losses(stage.model, batch, codes)):
        stage.zero_grad()
        losses.sum().backward()
        results.append([losses.detach(), *(p.grad.clone() for p in stage.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)

def test_both_benchmarks_print_their_lines(once, capsys):
    bench.main(["tiny", "--device=cpu", "--instruct.global_batch=2"])
    out = capsys.readouterr().out
    assert " 1 prompts, cache-free: 3.2e+04 codes/s" in out
    assert "64 prompts, KV cache: 2.048e+06 codes/s" in out
    assert out.count("instruct, 2 samples") == 2

def options(tmp_path, part):
    """What gpu.main hands to a part, and the file that it writes."""
    file = tmp_path / "gpu.json"
    file.write_text("{}")
    return argparse.Namespace(out=file, part=part, small=True, device=torch.device("cpu"), peak=1e12), file

@pytest.mark.parametrize("part, lines", [
    ("draw", ["copy", "1 eager", "2 graph", "2 compiled"]),
    ("instruct", ["as it is", "kernels, shares", "compiled blocks"])])
def test_parts_of_the_gpu_check_run_on_a_cpu(part, lines, once, tmp_path):
    torch._dynamo.reset()
    given, file = options(tmp_path, part)
    getattr(gpu, part, gpu.training)(given)
    written = json.loads(file.read_text())[part]
    assert set(lines) <= written.keys() and all(written.values())
    if part == "draw":
        assert written["1 compiled"]["programs"] == 1 and written["1 compiled"]["skipped"] == 0

def test_each_part_has_a_process_and_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"presets": 1, "memory": 200})
    gpu.main(["--small", "--device=cpu", f"--out={tmp_path / 'gpu.json'}"])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["card"] == "CPU" and written["presets"]["whole part"]["exit_code"] == -9
    assert [result["exit_code"] for result in written["memory"].values()] == [0, 0, 0]

def test_out_of_memory_is_one_line():
    program = "def main(keys):\n    raise torch.OutOfMemoryError('full')\nsample.cli(main, 'train.py')"
    done = subprocess.run([sys.executable, "-c", "import sample, torch\n" + program], cwd=gpu.ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: out of memory (full): lower --n")
    assert done.stderr.count("\n") == 1
