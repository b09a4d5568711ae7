"""The plan of a run: counts, FLOPs and activations against a real small run; what keeps a run from starting."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from conftest import SMALL, few_steps
from mentor import ConnectorConfig, DecoderConfig, Mentor, MentorConfig, TextConfig, VisionConfig
from tokenizer import VQGAN

SHORT = [*SMALL, *few_steps(steps=2, global_batch=4)]
CASES = [("pretrain", "scratch", "mlp"), ("align", "paper", "mlp"), ("align", "released", "mlp"), ("instruct", "paper", "mlp"), ("instruct", "paper", "query")]


def real_stage(name, recipe, kind, text_tokenizer, make_batch, count=4, dtype=torch.float32, checkpoint=False):
    """A run with a model of unequal widths, a real stage of it, and prompts without padding."""
    config = MentorConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=64, n_layer=2, n_head=2, mlp_width=256),
        connector=ConnectorConfig(kind=kind, n_query=8, width=64, n_layer=2, n_head=2),
        text=TextConfig(vocab_size=text_tokenizer.vocab_size, width=128, n_layer=2, n_head=4, head_width=32, mlp_width=320, dropout=0.1),
        decoder=DecoderConfig(codebook_size=256, grid_size=8, width=160, n_layer=3, n_head=4, multiple_of=32, dropout=0.1), context=64)
    run = replace(train.PRESETS["tiny"], model=config, recipe=recipe, checkpoint=checkpoint)
    stage = train.MentorStage(name, run, train.Machine(0, 1, torch.device("cpu"), dtype), Mentor(config), VQGAN(run.vqgan)).train()
    batch = make_batch(config, count, **({"text_to_image": 1.0} if name == "pretrain" else {"subject_driven": 1.0}))
    return run, stage, replace(batch, lengths=torch.full_like(batch.lengths, batch.text_ids.shape[1]))


def step(stage, batch):
    with stage.machine.autocast():
        loss, _ = stage(batch, 0)
    loss.backward()


@pytest.mark.parametrize("name, recipe, kind", CASES)
def test_flops_are_those_torch_counts(name, recipe, kind, text_tokenizer, make_batch):
    run, stage, batch = real_stage(name, recipe, kind, text_tokenizer, make_batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # spelt out, attention is counted too
        step(stage, batch)
    tokens, decoder = batch.text_ids.shape[1], run.model.decoder
    flops = train.Rehearsal(name, run, torch.float32).flops([(tokens, len(batch.pixels) / 4)] * 4)
    unneeded = 3 * 2 * decoder.n_layer * (tokens + 63) ** 2 * decoder.width  # the half of causal attention that flash leaves out
    assert abs(4 * (flops + unneeded) / counter.get_total_flops() - 1) < 0.005
    if name == "align":  # kept codes need no encoder
        cached = train.Rehearsal(name, replace(run, cache_codes=True), torch.float32).flops([(tokens, len(batch.pixels) / 4)] * 4)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            stage.vqgan[0].encode(batch.targets)
        assert abs((flops - cached) / (counter.get_total_flops() / 4) - 1) < 1e-6


def most_bytes(function):
    """The most memory that torch's allocator for the CPU had given out at once while function() ran, as its profiler saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(np.cumsum([size for _, size in events]))


@pytest.mark.parametrize("case, dtype, checkpoint", [(0, torch.bfloat16, False), (1, torch.bfloat16, True), (2, torch.float32, False), (4, torch.bfloat16, False)])
def test_memory_is_what_a_real_step_takes(case, dtype, checkpoint, text_tokenizer, make_batch):
    name, recipe, kind = CASES[case]
    run, stage, batch = real_stage(name, recipe, kind, text_tokenizer, make_batch, 16, dtype, checkpoint)
    for _, parameter in stage.trained():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    rehearsal = train.Rehearsal(name, run, dtype)
    if checkpoint:
        train.recompute_activations(rehearsal.stage.model)
    planned = rehearsal.memory(16, batch.text_ids.shape[1], len(batch.pixels) // 16)
    assert abs(planned / most_bytes(lambda: step(stage, batch)) - 1) < 0.03


def test_parameters_are_those_of_the_model():
    run = train.parse(["tiny"])[1]
    for name in train.STAGES[1:]:
        stage = train.MentorStage(name, run, train.Machine(0, 1, torch.device("cpu"), torch.float32), Mentor(run.model), VQGAN(run.vqgan))
        planned = train.Rehearsal(name, run, torch.float32).stage
        assert [(n, p.shape, p.requires_grad) for n, p in planned.named_parameters()] == [(n, p.shape, p.requires_grad) for n, p in stage.named_parameters()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_memory_is_what_a_gpu_takes(make_batch):
    """A real step of `base` with its optimizer, against the plan's sum."""
    run, machine = replace(train.PRESETS["base"], micro_batch=8), train.Machine(0, 1, torch.device("cuda"), torch.bfloat16)
    stage = train.MentorStage("instruct", run, machine, Mentor(run.model), VQGAN(run.vqgan)).to("cuda").train()
    optimizers = train.make_optimizers(stage, run.instruct, run)
    stage.vqgan[0].to("cuda")
    batch = make_batch(run.model, 8, subject_driven=1.0)
    batch = replace(batch, lengths=torch.full_like(batch.lengths, batch.text_ids.shape[1]), targets=torch.zeros(8, 3, 256, 256)).to("cuda")
    for _ in range(2):
        step(stage, batch)
        optimizers[0].step()
    fixed, activations = train.memory_plan(train.Rehearsal("instruct", run, torch.bfloat16), machine, (batch.text_ids.shape[1], 1))
    assert abs((sum(fixed.values()) + activations(8)) / torch.cuda.max_memory_allocated() - 1) < 0.15


def test_cards_are_found_by_what_the_driver_calls_them():
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 PCIe": 989, "NVIDIA H200": 989, "NVIDIA GeForce RTX 4090": 165, "NVIDIA L4": 121, "NVIDIA L40S": None}
    assert {name: train.peak_tflops(name) for name in names} == names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer and a pretrained model, two steps each."""
    out = tmp_path_factory.mktemp("plan") / "run"
    for stage in ("tokenizer", "pretrain"):
        train.main(["tiny", *SHORT, f"--stage={stage}", f"--out={out}"])
    return out


def dry_run(out, *arguments):
    train.main(["tiny", *SHORT, f"--out={out}", "--dry_run=true", *arguments])


def test_a_run_that_could_start_is_planned_and_nothing_is_written(trained, tmp_path, capsys, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    dry_run(trained, "--stage=align")
    text = capsys.readouterr().out
    assert "align: 2 steps of 4" in text and "largest micro_batch with --checkpoint=true: 4 in 24 GiB" in text and "everything needed is there" in text
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == files
    planned = []
    monkeypatch.setattr(train, "plan_stage", lambda name, run, machine, dtype, prompts: planned.append((name, len(prompts))))
    dry_run(tmp_path / "new")
    assert planned == [("tokenizer", 1), ("pretrain", 64), ("align", 64), ("instruct", 64)] and not (tmp_path / "new").exists()


def test_hours_are_said_for_the_run_too(monkeypatch, capsys):
    monkeypatch.setattr(train.Rehearsal, "flops", lambda self, prompts: 1e15)
    monkeypatch.setattr(train, "memory_plan", lambda *arguments: ({}, lambda micro: 0))
    run = train.parse(["tiny", *SHORT])[1]
    for count, said in ((1, r"TFLOPS: (\S+) h on one, (\S+) h on 8\n"), (4, r"TFLOPS: (\S+) h on one, (\S+) h on 4, (\S+) h on 8\n")):
        train.plan_stage("align", run, train.Machine(0, count, torch.device("cpu"), torch.float32), torch.float32, [(20, 1)])
        one, *others = map(float, re.search(said, capsys.readouterr().out).groups())
        assert others == pytest.approx([one / n for n in ((8,) if count == 1 else (4, 8))], rel=1e-2)


def test_what_is_missing_is_named(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "plan_stage", lambda *arguments: print("the plan"))  # seconds, and tested above
    with pytest.raises(ValueError, match=r"could not start: align needs .*tokenizer.*pretrain/model.safetensors: --stage=tokenizer and --stage=pretrain make them"):
        dry_run(tmp_path, "--stage=align")
    with pytest.raises(ValueError, match="global_batch=4 .* 1 x 3 x"):
        dry_run(trained, "--stage=align", "--micro_batch=3")
    with pytest.raises(ValueError, match="--model.text.n_layer=3, but .*pretrain was trained with 2"):
        dry_run(trained, "--stage=align", "--model.text.n_layer=3")
    with pytest.raises(ValueError, match="nothing for --stage=export"):
        dry_run(trained, "--stage=export")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny", "--stage=align", "--dry_run=true", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as left:
        train.cli()
    out, err = capsys.readouterr()
    assert left.value.code == 2 and err.count("\n") == 1 and "the plan" in out


def test_weights_of_another_model_are_noticed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "plan_stage", lambda *arguments: None)
    for stage in ("tokenizer", "pretrain"):
        (tmp_path / stage).mkdir()
        for file in (trained / stage).iterdir():
            (tmp_path / stage / file.name).write_bytes(file.read_bytes())
    (tmp_path / "spiece.model").write_bytes((trained / "spiece.model").read_bytes())
    tensors = load_file(tmp_path / "pretrain" / "model.safetensors")
    save_file({**tensors, "decoder.output.weight": torch.zeros(3, 3)}, tmp_path / "pretrain" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of another shape: decoder.output.weight \(3, 3\) where the model has \(32, 32\); make the stage pretrain again"):
        dry_run(tmp_path, "--stage=align")


def test_training_prints_its_speed(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Rehearsal, "flops", lambda self, prompts: 3e12)
    log = train.Log(tmp_path, "align", train.parse(["tiny", *SHORT])[1], 0, train.Machine(0, 1, torch.device("cpu"), torch.float32))
    assert log.speed({}, 10.0) == ", 640 codes/s"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    log.machine = train.Machine(0, 2, torch.device("cuda:0"), torch.bfloat16)
    assert log.speed({}, 104.0) == ", 6656 codes/s, 50% of the peak, 3.0 GiB"
    log.bar.close()
