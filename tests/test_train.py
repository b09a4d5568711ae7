"""Training: exact resume, kills and signals, several processes, the losses, the optimizers, and what is
refused.

KILLS=20 python -m pytest tests/test_train.py -k killed    # more kills than the suite has time for
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import sample
import train
from conftest import CPU, ROOT, SMALL, contents, few_steps, randomize, same_weights
from data import Collate, ShapesDataset
from mentor import Mentor
from test_folder import make_pets
from tokenizer import VQGAN, TextTokenizer
from train import Machine, MentorStage, micro_batches

close = torch.testing.assert_close
SHORT = ["tiny", *SMALL, "--tokenizer.restart_every=3", "--model.decoder.dropout=0.1",
         *few_steps(steps=6, global_batch=4, lr=0.003, final_lr=0.5)]
children = multiprocessing.get_context("forkserver")  # imports the packages once: its children start at once
children.set_forkserver_preload(["torch", "torch.distributed.nn.functional", "torch.utils.data", "pytest",
                                 "safetensors.torch", "sentencepiece", "PIL.Image", "PIL.ImageDraw", "tqdm"])


def run(out, *arguments):
    train.main([*SHORT, f"--out={out}", *arguments])


@contextmanager
def quickly():
    """With few samples for validation, and nothing drawn at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "held_out_loss", partial(train.held_out_loss, most=8))
        patch.setattr(train, "show_result", lambda *arguments: None)
        yield patch


@pytest.fixture(autouse=True, scope="module")
def quick():
    with quickly():
        yield


@pytest.fixture(autouse=True)
def signals():
    """Handlers as they were, also after a run that a signal or an error has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all four stages."""
    out = tmp_path_factory.mktemp("trained")
    run(out)
    return out


def link(trained, out, *stages):
    """Let `out` begin with finished stages of another run, of the same keys."""
    out.mkdir(exist_ok=True)
    for name in (*stages, "spiece.model"):
        (out / name).symlink_to(trained / name)


def before(stage):
    return train.STAGES if stage == "all" else list(train.STAGES)[: list(train.STAGES).index(stage)]


def weights(out, stage):
    return load_file(Path(out) / stage / "model.safetensors")


def log_of(out, stage):
    lines = [json.loads(line) for line in (Path(out) / stage / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]


def at_step(patch, number, act):
    """Call act() once step `number` has been logged."""
    write = train.Log.write

    def acting(self, step):
        write(self, step)
        if step == number:
            act()

    patch.setattr(train.Log, "write", acting)


def die():
    raise ZeroDivisionError("as if the process had died")


def small_run(*arguments):
    return train.parse([*SHORT, *arguments])


def stage_and_batch(name, world, text_tokenizer, *keys, count=8, drop=0.0):
    run = small_run(*keys)
    torch.manual_seed(0)
    stage = MentorStage(name, run, CPU, Mentor(run.model), VQGAN(run.vqgan))
    dataset = ShapesDataset(world, train.parse_mix(getattr(run, name).mix), 0, prefix_drop=drop)
    return run, stage, Collate(text_tokenizer, run.model, 32)([dataset[i] for i in range(count)])


# --- Going on
@pytest.mark.parametrize("stage, keys", [
    *((stage, ()) for stage in train.STAGES), ("tokenizer", ("--tokenizer.disc_start=0.3",)),
    ("align", ("--micro_batch=2", "--workers=1", "--checkpoint"))])
def test_a_stage_that_was_stopped_goes_on_bit_for_bit(stage, keys, trained, tmp_path, monkeypatch):
    """Dead after 5 of 6 steps with a checkpoint at 3; then the same command again. The run in one go was
    another time, in another folder: a command gives the same bits whenever it is given."""
    straight = trained
    if keys:
        straight = tmp_path / "straight"
        link(trained, straight, *before(stage))
        run(straight, f"--stage={stage}", *keys)
    link(trained, tmp_path / "stopped", *before(stage))
    command = tmp_path / "stopped", f"--stage={stage}", "--save_every=3", *keys
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 5, die)
        run(*command)
    folder = tmp_path / "stopped" / stage
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["step"] == 3 and not (folder / "model.safetensors").is_file()
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the line at which it died
    run(*command)
    assert same_weights(weights(straight, stage), weights(tmp_path / "stopped", stage))
    assert log_of(straight, stage) == log_of(tmp_path / "stopped", stage) and len(log_of(straight, stage)) == 6
    assert {file.name for file in folder.iterdir()} == {"config.json", "log.jsonl", "model.safetensors", "stage.json"}
    if "disc" in str(keys):
        assert any(name.startswith("disc.") for name in state["stage"]) and len(state["optimizers"]) > 1
        assert state["stage"]["counts"].any() and "d_weight" in log_of(straight, stage)[-1]


def all_of_it(out):
    return {stage: weights(out, stage) for stage in train.STAGES}, [log_of(out, stage) for stage in train.STAGES]


def child(arguments, kill_at=0):
    """The body of a child process: a run whose best weights are those of step 4, whatever their loss. At the
    kill_at-th time that something is to be written it dies; a checkpoint is then half-written."""
    torch.set_num_threads(1)
    written = itertools.count(1)

    def watched(write):
        def writing(*arguments, **options):
            if next(written) == kill_at:
                if write is save:
                    write(*arguments)
                    os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*arguments, **options)
        return writing

    with quickly() as patch:
        save, note_best = torch.save, train.note_best
        patch.setattr(train, "note_best", lambda best, held_out, step, *rest: note_best(
            best, abs(step - 4) + 1.0, step, *rest))
        for owner, name in ((torch, "save"), (os, "replace"), (train.Log, "write"), (Path, "unlink")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        train.main(arguments)


def ended(*arguments, **options):
    process = children.Process(target=child, args=arguments, kwargs=options)
    process.start()
    process.join(100)
    return process.exitcode


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    """All stages on a few own pictures, saving at every step, so that best weights are kept as well."""
    make_pets(tmp_path / "pets")
    command = [*SHORT, f"--data={tmp_path}/pets", "--save_every=1"]
    assert ended([*command, f"--out={tmp_path}/straight"]) == 0
    moments = [random.randint(1, 90 // (1 + k)) for k in range(int(os.environ.get("KILLS", 4)))]
    for moment in moments:
        assert ended([*command, f"--out={tmp_path}/killed"], kill_at=moment) in (0, -signal.SIGKILL), moments
    assert ended([*command, f"--out={tmp_path}/killed"]) == 0, moments
    (a, logs), (b, others) = (all_of_it(tmp_path / name) for name in ("straight", "killed"))
    assert all(same_weights(a[stage], b[stage]) for stage in a) and logs == others, moments
    for stage in train.STAGES:  # the weights are the best, not the last
        assert not list((tmp_path / "straight" / stage).glob("state.*")) and len(logs[0]) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_before_they_end_the_run(number, trained, tmp_path, monkeypatch, capsys):
    """Also when Ctrl-C reaches the data processes too, as a terminal's does."""
    def told():
        for process in multiprocessing.active_children() if number == signal.SIGINT else ():
            os.kill(process.pid, number)
        os.kill(os.getpid(), number)

    link(trained, tmp_path / "out", *before("pretrain"))
    command = tmp_path / "out", "--stage=pretrain", "--workers=1"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 2, told)
        run(*command)
    assert stopped.value.code == 128 + number and "Traceback" not in capsys.readouterr().err
    assert torch.load(tmp_path / "out" / "pretrain" / "state.pt", weights_only=True)["step"] in (2, 3)
    run(*command)
    assert same_weights(weights(tmp_path / "out", "pretrain"), weights(trained, "pretrain"))
    assert log_of(tmp_path / "out", "pretrain") == log_of(trained, "pretrain")


def test_a_signal_during_the_last_step_is_not_forgotten(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(tmp_path)
    assert stopped.value.code == 143 and (tmp_path / "tokenizer").is_dir() and not (tmp_path / "pretrain").exists()


def test_only_a_second_ctrl_c_stops_at_once():
    got = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with train.stop_signals() as received:
        for number in (signal.SIGTERM, signal.SIGTERM):  # a cluster may send it twice
            os.kill(os.getpid(), number)
    assert received == [signal.SIGTERM] * 2 and not got
    os.kill(os.getpid(), signal.SIGTERM)
    assert got == [signal.SIGTERM]  # as before
    with train.stop_signals() as received, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "other"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(damage, trained, tmp_path, monkeypatch):
    link(trained, tmp_path, *before("align"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 2, die)
        run(tmp_path, "--stage=align", "--save_every=1")
    file = tmp_path / "align" / "state.pt"
    state = torch.load(file, weights_only=True)
    file.write_bytes({"cut": file.read_bytes()[:2000], "empty": b"", "text": b"hello"}.get(damage, b""))
    if damage == "foreign":
        torch.save([1, 2], file)
    elif damage == "other":  # of another model
        state["stage"].popitem()
        torch.save(state, file)
    before_it = contents(tmp_path / "align")
    with pytest.raises(ValueError, match=f"{file}.*delete") as error:
        run(tmp_path, "--stage=align", "--save_every=1")
    assert "\n" not in str(error.value) and contents(tmp_path / "align") == before_it
    file.unlink()  # as it says
    run(tmp_path, "--stage=align")
    assert same_weights(weights(tmp_path, "align"), weights(trained, "align"))


def test_a_full_disk_costs_no_more_than_what_did_not_fit(trained, tmp_path, monkeypatch, capsys):
    """A checkpoint that fails half-way, and a log that cannot be written: the run goes on."""
    link(trained, tmp_path, *before("pretrain"))
    save, log_is_full = torch.save, []

    def full(state, path):
        if state["step"] == 1:
            return save(state, path)
        Path(path).write_bytes(b"half")
        log_is_full.append(True)
        raise OSError(28, "No space left on device")

    def open_log(path, mode="r"):
        if mode == "a" and log_is_full:
            raise OSError(28, "No space left on device", str(path))
        return open(path, mode)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch, "save", full)
        patch.setattr(train, "open", open_log, raising=False)
        at_step(patch, 5, die)
        run(tmp_path, "--stage=pretrain", "--save_every=1")
    said, folder = capsys.readouterr().out, tmp_path / "pretrain"
    assert said.count("state.pt could not be written") == 3 and said.count("log.jsonl") == 3
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 1 and not list(folder.glob("*.tmp"))
    run(tmp_path, "--stage=pretrain")
    assert same_weights(weights(tmp_path, "pretrain"), weights(trained, "pretrain"))


def test_lines_that_a_full_disk_has_cut_or_lost_end_nothing(trained, tmp_path, monkeypatch):
    """The disk has room again, and the next line follows what is there of the last one."""
    link(trained, tmp_path, *before("pretrain"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 3, lambda: open(tmp_path / "pretrain" / "log.jsonl", "a").write('{"step": 9, "lo'))
        at_step(patch, 5, die)
        run(tmp_path, "--stage=pretrain", "--save_every=4")
    run(tmp_path, "--stage=pretrain", "--save_every=4")
    assert same_weights(weights(tmp_path, "pretrain"), weights(trained, "pretrain"))
    train.draw_curves(tmp_path)
    (tmp_path / "pretrain" / "log.jsonl").write_text("")
    train.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(trained, tmp_path, monkeypatch):
    forward = MentorStage.forward

    def not_finite(self, batch, step):
        loss, logs = forward(self, batch, step)
        return loss * (math.nan if step == 3 else 1), logs

    link(trained, tmp_path, *before("align"))
    with monkeypatch.context() as patch:
        patch.setattr(MentorStage, "forward", not_finite)
        with pytest.raises(ValueError, match=r"align: .*nan.* 4.*lower --align.lr"):
            run(tmp_path, "--stage=align", "--save_every=1")
    state = torch.load(tmp_path / "align" / "state.pt", weights_only=True)
    assert state["step"] == 3 and all(t.isfinite().all() for t in state["stage"].values())
    with pytest.raises(ValueError, match="instruct: .*lower --instruct.lr"):  # broken by the last step itself
        link(trained, tmp_path / "last", *before("instruct"))
        run(tmp_path / "last", "--stage=instruct", "--instruct.steps=1", "--instruct.lr=1e39", "--instruct.muon_lr=0")
    assert not list(tmp_path.rglob("instruct/model.safetensors"))


# --- The same samples, however they are shared out
def test_batches_cover_every_sample_once():
    run = small_run("--align.global_batch=8", "--align.steps=3", "--micro_batch=2")

    def indices(rank, start):
        machine, collate = Machine(rank, 2, torch.device("cpu"), torch.float32), list
        return list(train.make_batches(range(24), collate, run.align, run, machine, start))

    assert sorted(i for rank in (0, 1) for batch in indices(rank, 0) for i in batch) == list(range(24))
    assert indices(1, 2) == [[20, 21], [22, 23]] == indices(1, 0)[-2:]  # going on is the same order
    assert micro_batches(run.align, run, CPU) == (2, 4)
    for keys, processes, message in (([], 16, "global_batch=4.* 16 "), (["--micro_batch=3"], 1, "micro_batch=3")):
        with pytest.raises(ValueError, match=message):
            run = small_run(*keys)
            micro_batches(run.align, run, Machine(0, processes, torch.device("cpu"), torch.float32))


def test_steps_are_those_of_a_plain_loop(trained, tmp_path, world, text_tokenizer):
    """Of one with the whole batch at once: micro-batches are averaged, gradients clipped, rates scheduled."""
    keys = (f"--out={tmp_path}", "--stage=align", "--model.decoder.dropout=0", "--align.muon_lr=0", "--warmup=0.4",
            "--prefix_drop=0.5", "--grad_clip=0.3", "--align.steps=4", "--align.lr=0.001", "--align.final_lr=0.2")
    link(trained, tmp_path, *before("align"))
    config = small_run(*keys)
    stage = train.build_stage("align", config, CPU, world).train()
    dataset, collate = train.make_dataset("align", config, world), Collate(text_tokenizer, config.model, 32)
    trains = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in trains if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trains if p.ndim < 2], "weight_decay": 0.0}], 1.0, betas=(0.9, 0.95))
    losses, norms = [], []
    for step, rate in enumerate((0.5, 1, 1, 0.6)):
        loss = stage(collate([dataset[i] for i in range(4 * step, 4 * step + 4)]), step)[0]
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trains, 0.3).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * rate
        optimizer.step()
    assert min(norms) > 0.3
    for micro in ("1", "2"):
        run(tmp_path, *keys, f"--micro_batch={micro}")
        ours, plain = weights(tmp_path, "align"), stage.model.state_dict()
        # softmax does not see a bias of the keys: its gradient is rounding, and AdamW makes steps of that
        assert max((ours[k] - plain[k]).abs().max() for k in ours if not k.endswith(".k.bias")) < 1e-4
        assert [line["loss"] for line in log_of(tmp_path, "align")] == pytest.approx(losses, rel=1e-4)
        assert [line["grad_norm"] for line in log_of(tmp_path, "align")] == pytest.approx(norms, rel=1e-3)
        for file in (tmp_path / "align").iterdir():
            file.unlink()


def two(rank, runs):
    """The body of one of two processes: runs one after the other, each with a port to meet on. Process 1 is
    told to stop during step 2 of the last one."""
    torch.set_num_threads(1)
    with quickly() as patch:
        for number, (port, arguments) in enumerate(runs):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if rank == 1 and number + 1 == len(runs):
                at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train.main(arguments)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_two_processes_equal_one(trained, tmp_path, monkeypatch):
    """A tokenizer with discriminator, restarts of its codes and validation; pretraining; a stage that one
    process began and two go on with. A signal to either ends both, with a checkpoint."""
    cases = {"tokenizer": ["--tokenizer.disc_start=0"], "pretrain": [], "instruct": ["--micro_batch=1"]}
    commands = {}
    for stage, keys in cases.items():
        commands[stage] = [*SHORT, "--model.decoder.dropout=0", f"--stage={stage}", "--save_every=3", *keys]
        for name in ("one", "two"):
            (tmp_path / name).mkdir(exist_ok=True)
            link(trained, tmp_path / name / stage, *before(stage))
        train.main([*commands[stage], f"--out={tmp_path}/one/{stage}"])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 5, die)
        train.main([*commands["instruct"], f"--out={tmp_path}/two/instruct"])
    runs = [[*command, f"--out={tmp_path}/two/{stage}"] for stage, command in commands.items()]
    runs.append([*SHORT, "--stage=tokenizer", f"--out={tmp_path}/told"])
    pairs = list(zip(free_ports(len(runs)), runs))
    processes = [children.Process(target=two, args=(rank, pairs)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 143
    assert torch.load(tmp_path / "told" / "tokenizer" / "state.pt", weights_only=True)["step"] in (2, 3)
    for stage in cases:
        a, b = (weights(tmp_path / name / stage, stage) for name in ("one", "two"))
        differences = {k: (a[k] - b[k]).abs().max().item() for k in a if not k.endswith(".k.bias")}
        assert max(differences.values()) < 1e-4, (stage, max(differences, key=differences.get))
        logs = [log_of(tmp_path / name / stage, stage) for name in ("one", "two")]  # process 0 alone writes
        for key in ("loss", "held_out"):
            seen, again = ([line[key] for line in log if key in line] for log in logs)
            assert len(seen) == 6 and again == pytest.approx(seen, rel=1e-3), (stage, key)


@pytest.mark.parametrize("name", ["tokenizer", "pretrain"])
def test_two_threads_give_the_same_bits_every_time(name, world, text_tokenizer, monkeypatch):
    """At the sizes of `tiny`, where threads share the work: in which order do they add?"""
    config = train.parse(["tiny", "--prefix_drop=0.5", "--device=cpu"])
    monkeypatch.setattr(train, "load_as", lambda cls, config, *rest: cls(config).eval())
    stage = train.build_stage(name, config, CPU, world)
    dataset = train.make_dataset(name, config, world)
    batch = Collate(text_tokenizer, config.model, 32)([dataset[i] for i in range(24)])
    trains = [p for p in stage.parameters() if p.requires_grad]
    for p in trains:
        torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else None  # no part starts silent
    torch.set_num_threads(2)
    try:
        first, *others = [torch.autograd.grad(stage(batch, config.tokenizer.steps)[0], trains, allow_unused=True)
                          for _ in range(5)]
    finally:
        torch.set_num_threads(1)
    assert sum(g is not None for g in first) > 50
    assert all(a is b or torch.equal(a, b) for other in others for a, b in zip(first, other))


class Broken:
    """A dataset of which one sample fails, in whatever way."""

    def __init__(self, fail):
        self.fail = fail

    def __getitem__(self, i):
        return self.fail() if i == 5 else i


def no_picture():
    raise ValueError("dog.png: not a readable image\nof two lines") if False else ValueError("dog.png: torn")


@pytest.mark.parametrize("fail, message", [
    (no_picture, "^dog.png: torn$"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "worker|process"),
    (lambda: torch.zeros(2)[3], "index 3")])
def test_what_fails_in_a_data_process_is_one_line(fail, message):
    config = small_run("--workers=1")
    batches = train.make_batches(Broken(fail), list, config.align, config, CPU, 0)
    with pytest.raises(ValueError, match=message) as error:
        list(batches)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_too_little_shared_memory_for_data_processes_ends_the_run(tmp_path, monkeypatch):
    """In their queue's own thread it would fail unseen, and the run would wait for a batch forever."""
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the data processes too, which are forks
    with pytest.raises(ValueError, match="shared memory.*No space left"):
        run(tmp_path, "--stage=tokenizer", "--workers=1")


def test_every_stage_and_seed_has_its_own_samples_and_dropout(world, trained, tmp_path, monkeypatch):
    runs = [(stage, small_run(f"--seed={seed}", f"--{stage}.mix=text_to_image:1")) for seed in (0, 1)
            for stage in ("align", "instruct")]
    first = [train.make_dataset(stage, config, world)[0].target.tobytes() for stage, config in runs]
    held = [train.make_dataset(stage, config, world, held_out=True)[0] for stage, config in runs]
    assert len(set(first)) == 4 and len({s.target.tobytes() for s in held}) == 1
    assert held[0].scene.subjects[0].subject in world.held_out_subjects and not held[0].drop
    seeds, forward = [], MentorStage.forward
    monkeypatch.setattr(MentorStage, "forward", lambda *given: seeds.append(torch.initial_seed()) or forward(*given))
    link(trained, tmp_path, *before("align"))
    run(tmp_path, "--stage=align")
    assert len(seeds) == len(set(seeds)) == 6


def test_validation_leaves_no_trace(world, text_tokenizer):
    config, stage, _ = stage_and_batch("pretrain", world, text_tokenizer)
    dataset, collate = train.make_dataset("pretrain", config, world, True), Collate(text_tokenizer, config.model, 32)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in stage.state_dict().items()}
    losses = [train.held_out_loss(stage.train(), dataset, collate, micro, CPU) for micro in (1, 3, 8)]
    assert max(losses) - min(losses) < 1e-5 and stage.training
    assert torch.equal(state, torch.get_rng_state()) and same_weights(before, stage.state_dict())


# --- What trains, and the losses
@pytest.mark.parametrize("name, keys, parts", [
    ("pretrain", [], ("encoder.", "projector", "decoder")),
    ("align", [], ("encoder.connector", "encoder.text", "projector", "decoder")),
    ("align", ["--align.trains=projector,decoder"], ("projector", "decoder")),
    ("instruct", ["--instruct.trains=encoder.connector,decoder.output"], ("encoder.connector", "decoder.output"))])
def test_frozen_parts_stay_bit_equal_and_trained_parts_move(name, keys, parts, world, text_tokenizer):
    config, stage, batch = stage_and_batch(name, world, text_tokenizer, *keys, drop=0.5)
    with torch.no_grad():
        stage.model.decoder.output.weight.normal_()  # a zero head would keep all before it from learning
    before, vqgan = ({k: v.clone() for k, v in m.state_dict().items()} for m in (stage.model, stage.vqgan[0]))
    stage.train()(batch, 0)[0].backward()
    for optimizer in train.make_optimizers(stage, getattr(config, name), config):
        optimizer.step()
    for key, after in stage.model.state_dict().items():
        assert torch.equal(before[key], after) != key.startswith(parts), key
    assert same_weights(vqgan, stage.vqgan[0].state_dict())


@pytest.mark.parametrize("trains", ["projector,decodr", "", "all"])
def test_a_part_that_is_not_there_is_refused(trains, world, text_tokenizer):
    with pytest.raises(ValueError, match=f"--align.trains={trains}: "):
        stage_and_batch("align", world, text_tokenizer, f"--align.trains={trains}")


def test_a_new_model_guesses(world, text_tokenizer):
    """Each of 32 codes is as likely: the next-code loss is ln(32)."""
    _, stage, batch = stage_and_batch("instruct", world, text_tokenizer)
    loss, logs = stage(batch, 0)
    assert loss.item() == pytest.approx(math.log(32), abs=1e-4) and logs.keys() == set(batch.tasks)


def test_one_batch_can_be_learnt_by_heart(world, text_tokenizer):
    _, stage, batch = stage_and_batch("instruct", world, text_tokenizer)
    codes = torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(0))
    stage.vqgan[0].encode = lambda targets: codes  # an untrained tokenizer gives all images one code
    optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 3e-3)
    for _ in range(200):
        loss, logs = stage.eval()(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    for task in logs:
        mine = [i for i, t in enumerate(batch.tasks) if t == task]
        close(logs[task], stage.code_losses(batch)[0][mine].mean(), atol=0.05, rtol=0)


def test_a_dropped_prompt_is_not_seen(world, text_tokenizer):
    _, stage, batch = stage_and_batch("instruct", world, text_tokenizer, drop=1.0)
    torch.nn.init.normal_(stage.model.decoder.output.weight)
    words = torch.where(batch.text_ids == text_tokenizer.image_id, batch.text_ids, 5)
    other = replace(batch, text_ids=words, pixels=batch.pixels + 1)
    stage.eval()
    assert batch.drop.all() and torch.equal(stage(batch, 0)[0], stage(other, 0)[0])
    seen = replace(batch, drop=~batch.drop)
    assert not torch.equal(stage(seen, 0)[0], stage(replace(seen, text_ids=words), 0)[0])


def test_activations_computed_again_give_the_same_gradients(world, text_tokenizer):
    gradients = []
    for keys in ([], ["--checkpoint=true"]):
        _, stage, batch = stage_and_batch("pretrain", world, text_tokenizer, *keys)
        torch.manual_seed(1)
        stage.train()(batch, 0)[0].backward()
        gradients.append({name: p.grad for name, p in stage.named_parameters()})
    assert all(a is b or torch.equal(a, b) for a, b in zip(*(g.values() for g in gradients), strict=True))


def test_hidden_words_are_predicted_from_the_picture_and_the_other_words(world, text_tokenizer):
    """Against each sample alone, without padding: the mean loss of its hidden words, which are not seen."""
    _, stage, batch = stage_and_batch("pretrain", world, text_tokenizer)
    model = randomize(stage.model).eval()
    text, patches = model.encoder.text, model.encoder.vision(train.as_vision_pixels(batch.targets, 32))
    assert len(set(batch.lengths.tolist())) > 1 and batch.masked.any(1).all() and not batch.masked.all(1).any()
    losses = []
    for i, length in enumerate(batch.lengths):
        words, hidden = batch.text_ids[i, :length], batch.masked[i, :length]
        seen = text.embedding(torch.where(hidden, TextTokenizer.UNKNOWN, words))
        tokens = model.encoder.connector(patches[i : i + 1], None, None)[0]
        states = text(torch.cat([tokens, seen])[None], torch.ones(1, len(tokens) + length, dtype=torch.bool))
        logits = states[0, len(tokens) :] @ text.embedding.weight.T / text.config.width**0.5
        losses.append(F.cross_entropy(logits[hidden], words[hidden]))
    close(train.hidden_words_loss(model, batch, patches), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    padded = replace(batch, text_ids=F.pad(batch.text_ids, (0, 9)), masked=F.pad(batch.masked, (0, 9)))
    close(train.hidden_words_loss(model, padded, patches), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


def test_contrastive_loss_is_clips():
    """The mean cross entropy of both directions, of cosines times a scale of at most 100."""
    head, image, text = train.ContrastiveHead(small_run().model, CPU), torch.randn(5, 16), torch.randn(5, 16)
    for log_scale, scale in ((1.0, math.e), (9.0, 100.0)):
        torch.nn.init.constant_(head.log_scale, log_scale)
        scores = scale * F.cosine_similarity(head.image(image)[:, None], head.text(text)[None], dim=-1)
        expected = -(scores.log_softmax(0).diag() + scores.log_softmax(1).diag()).mean() / 2
        close(head(image, text), expected, atol=1e-4, rtol=1e-4)


def test_pretraining_adds_its_losses_of_real_words_and_pictures(world, text_tokenizer):
    _, stage, batch = stage_and_batch("pretrain", world, text_tokenizer)
    pixels = torch.stack([data.vision_pixels(data.to_picture(target), 32) for target in batch.targets])
    close(train.as_vision_pixels(batch.targets, 32), pixels, atol=1e-4, rtol=0)
    large = torch.rand(2, 3, 48, 48) * 2 - 1
    small = torch.stack([data.vision_pixels(data.to_picture(image), 32) for image in large])
    close(train.as_vision_pixels(large, 32), small, atol=0.05, rtol=0)  # pictures are rounded to bytes
    seen, contrastive = [], stage.contrastive.forward
    stage.contrastive.forward = lambda image, text: seen.extend([image, text]) or contrastive(image, text)
    loss, logs = stage(batch, 0)
    vision, states = stage.model.encoder.vision, stage.model.encoder(batch)
    close(seen[0], vision.pool(vision.before_last(pixels)), atol=1e-3, rtol=1e-3)
    close(seen[1], torch.stack([own[:n].mean(0) for own, n in zip(states, batch.lengths)]), atol=1e-5, rtol=1e-4)
    close(loss, stage.code_losses(batch)[0].mean() + logs["contrastive"] + logs["hidden_words"])
    close(logs["hidden_words"], train.hidden_words_loss(stage.model, batch, vision(pixels)), atol=1e-3, rtol=1e-3)


# --- The optimizers
def test_rates_warm_up_and_end_at_their_fraction():
    config = train.PRESETS["full"]
    factors = [train.schedule(step, replace(config.align, steps=1000), config) for step in range(1000)]
    assert factors[0] == 1 / 50 and factors[49] == max(factors) == 1
    assert factors[525] == pytest.approx(0.55, abs=0.01) and factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert train.schedule(0, replace(config.align, steps=1), config) == 1


def test_muon_is_its_formula_and_torchs():
    shapes = ((12, 20), (12, 20), (20, 5))
    ours, theirs, plain = ([torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(3)))
                            for s in shapes] for _ in range(3))
    muon, momentum = train.Muon(ours, 0.02, 0.1), [torch.zeros(s) for s in shapes]
    reference = torch.optim.Muon(theirs, 0.02, 0.1) if hasattr(torch.optim, "Muon") else None
    for _ in range(5):
        for i, size in enumerate((1, 100, 1)):
            gradient = torch.randn(shapes[i]) * size
            ours[i].grad, theirs[i].grad = gradient.clone(), gradient.clone()
            momentum[i] = 0.95 * momentum[i] + 0.05 * gradient
            u, s, v = torch.linalg.svd(0.05 * gradient + 0.95 * momentum[i], full_matrices=False)
            s = s / s.norm()  # Newton-Schulz's polynomial acts on the singular values alone
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            step = 0.02 * max(1, shapes[i][0] / shapes[i][1]) ** 0.5
            plain[i].data = plain[i].data * (1 - 0.02 * 0.1) - step * u @ s.diag() @ v
        muon.step()
        reference.step() if reference else None
    close(ours, plain, atol=2e-5, rtol=1e-4)
    if reference:
        close(ours, theirs, atol=2e-3, rtol=0)  # theirs iterates in bfloat16


def test_every_parameter_has_its_optimizer_and_its_decay(world, text_tokenizer):
    config, stage, _ = stage_and_batch("pretrain", world, text_tokenizer)
    adamw, muon = train.make_optimizers(stage, config.pretrain, config)
    (matrices, rest), (hidden,) = adamw.param_groups, muon.param_groups
    assert adamw.defaults["betas"] == (0.9, 0.95) and rest["weight_decay"] == 0 < config.weight_decay
    assert matrices["weight_decay"] == hidden["weight_decay"] == config.weight_decay
    assert all(p.ndim < 2 for p in rest["params"]) and all(p.ndim == 2 for p in hidden["params"])
    names = {p: name.removeprefix("model.") for name, p in stage.named_parameters() if p.requires_grad}
    assert {names[p] for p in matrices["params"]} == {
        "encoder.vision.position_embedding", "encoder.vision.patch_embedding.weight", "encoder.text.embedding.weight",
        "encoder.text.relative_bias.weight", "projector.unconditional", "decoder.code_embedding.weight",
        "decoder.output.weight", "contrastive.image.weight", "contrastive.text.weight"}
    assert len(names) == sum(len(group["params"]) for group in (matrices, rest, hidden))
    alone, = train.make_optimizers(stage, replace(config.pretrain, muon_lr=0.0), config)
    assert sum(len(group["params"]) for group in alone.param_groups) == len(names)


def test_a_new_decoder_starts_along_the_codebook(trained, tmp_path, world):
    stage = train.build_stage("pretrain", small_run(f"--out={trained}"), CPU, world)
    codebook = stage.vqgan[0].quantize.codebook()
    for weight, std in ((stage.model.decoder.code_embedding.weight, 0.1), (stage.model.decoder.output.weight, 0.05)):
        directions = torch.linalg.lstsq(codebook, weight).solution
        close(codebook @ directions, weight, rtol=1e-3, atol=1e-4)
        assert directions.std().item() == pytest.approx(std, rel=0.2)


# --- Keys, folders and messages
def test_the_published_recipe_is_the_default_of_full():
    run = train.PRESETS["full"]
    assert (run.align.lr, run.align.global_batch, run.align.steps) == (5e-4, 128, 2_480_000 // 128)
    assert (run.instruct.lr, run.instruct.global_batch, run.instruct.steps) == (1e-4, 128, 2 * 1_300_000 // 128)
    assert (run.grad_clip, run.warmup, run.weight_decay, run.prefix_drop) == (1.0, 0.05, 0.05, 0.1)
    assert run.align.final_lr == 0.1 and run.align.muon_lr == 0 and run.align.trains == "projector,decoder"


def test_command_lines_become_runs(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for preset in train.PRESETS:
        run = train.parse([preset])
        assert run.out == f"out/{preset}" and run.model.decoder.n_code == run.vqgan.grid_size**2
        assert run.model.decoder.codebook_size == run.vqgan.codebook_size
    run = train.parse(["tiny", "--out=~/x", "--data=~/pets", "--start_from=~/y", "--train_scale=1.5", "--compile",
                       "--vqgan.ch_mult=1,2,4", "--vqgan.image_size=64", "--model.vision.image_size=64"])
    assert (run.out, run.data, run.start_from) == ("/home/me/x", "/home/me/pets", "/home/me/y") and run.compile
    assert run.vqgan.ch_mult == (1, 2, 4) and run.model.decoder.grid_size == 16
    assert [getattr(run, stage).steps for stage in train.STAGES] == [3000, 1275, 1275, 1800]
    keys = ["--model.vision.width=30", "--model.vision.n_head=3"]  # legal together, in any order
    assert train.parse(["tiny", *keys]) == train.parse(["tiny", *keys[::-1]])


@pytest.mark.parametrize("arguments, message", [
    (["tinny"], "tinny.*tiny, small, base, full"), (["tiny", "--sede=1"], "--sede=1: .*--seed=0"),
    (["tiny", "seed=1"], "seed=1: .*--seed"), (["tiny", "--align.stepz=1"], "--align.stepz=1: .*--align.steps"),
    (["tiny", "--resume"], "--resume: "), (["tiny", "--dtype=float16"], "--dtype=float16: .*bfloat16"),
    (["tiny", "--seed"], "--seed=true: .*int"), (["tiny", "--seed=abc"], "--seed=abc: .*int"),
    (["tiny", "--align.lr=-1"], "--align.lr=-1: "), (["tiny", "--align.lr=nan"], "--align.lr=nan: "),
    (["tiny", "--vqgan.ch_mult=1,x"], "--vqgan.ch_mult=1,x: "), (["tiny", "--compile=maybe"], "--compile=maybe: "),
    (["tiny", "--align.mix=drawing:1"], "mix=drawing:1: .*text_to_image"),
    (["tiny", "--align.mix=segmentation"], "mix=segmentation: "), (["tiny", "--align.mix=recovery:0"], "recovery:0"),
    (["tiny", "--align.mix=segmentation:nan"], "segmentation:nan"), (["tiny", "--stage=aline"], "--stage=aline: .*align"),
    (["tiny", "--model.decoder.n_head=5"], "decoder.width=96: .*5"), (["tiny", "--micro_batch=3"], "micro_batch=3"),
    (["tiny", "--model.text.n_bucket=3"], "n_bucket=3"), (["tiny", "--data=nowhere"], "--data=nowhere: ")])
def test_mistakes_on_the_command_line_get_a_message(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        train.main([*arguments, f"--out={tmp_path}/out", "--device=cpu"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_help_shows_every_key_and_its_meaning(capsys):
    train.main(["--help"])
    text = capsys.readouterr().out
    for key in train.flatten(train.RunConfig()):
        assert re.search(rf"^    {key.rpartition('.')[2]}: .*#.*\w", text, re.M), key


def test_another_run_in_a_used_folder_is_refused_by_its_first_key(trained, tmp_path, monkeypatch):
    before_it = {name: value for name, value in contents(trained).items() if name.suffix == ".safetensors"}
    for keys, message in ((["--stage=align", "--align.lr=0.5"], "align .*align.lr=0.003.*0.5"), (["--seed=1"], "seed=0.*1"),
                          (["--stage=pretrain", "--model.text.width=32"], "model.text.width=16.*32"),
                          (["--stage=instruct", "--prefix_drop=0.5"], "prefix_drop=0.1.*0.5"),
                          (["--stage=tokenizer", "--train_scale=2"], "tokenizer.steps=6.*12")):
        with pytest.raises(ValueError, match=message + ".*--out"):
            run(trained, *keys)
    # what does not act on a stage, or on no result, is free
    monkeypatch.chdir(trained)
    run("../" + trained.name, "--stage=tokenizer", "--prefix_drop=0.5", "--model.text.width=32", "--align.lr=0.5")
    run(trained, "--stage=pretrain", "--align.lr=0.5", "--tokenizer.lr=1", "--instruct.mix=recovery:1")
    run(trained, "--save_every=7", "--workers=1", "--micro_batch=2", "--checkpoint", "--dtype=float32",
        "--model.sampling.cfg_scale=5")
    assert {name: contents(trained)[name] for name in before_it} == before_it
    link(trained, tmp_path, *before("align"))  # also while it is not finished
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 2, die)
        run(tmp_path, "--stage=align", "--save_every=1")
    with pytest.raises(ValueError, match="align.lr=0.003.*0.5"):
        run(tmp_path, "--stage=align", "--align.lr=0.5")


def test_stages_have_an_order(trained, tmp_path):
    for done, stage, missing in (((), "pretrain", "tokenizer"), (("tokenizer",), "align", "pretrain"),
                                 (("tokenizer", "pretrain"), "instruct", "align")):
        link(trained, tmp_path / stage, *done)
        with pytest.raises(ValueError, match=f"{missing}.* is missing.*train the stage {missing}|{missing} .*train"):
            run(tmp_path / stage, f"--stage={stage}")
        assert not (tmp_path / stage / stage).exists()
    link(trained, tmp_path / "other", "pretrain")  # trained with another tokenizer, whose place one has taken
    run(tmp_path / "other", "--stage=tokenizer", "--seed=1")
    with pytest.raises(ValueError, match="pretrain.*weights of tokenizer|weights of tokenizer.*pretrain"):
        run(tmp_path / "other")
    link(trained, tmp_path / "wide", "tokenizer", "pretrain")
    with pytest.raises(ValueError, match="decoder.width=32.*64.*--model.decoder.width=32"):
        run(tmp_path / "wide", "--stage=align", "--model.decoder.width=64")


def test_a_closed_pipe_and_a_file_for_progress(tmp_path):
    """`python train.py ... 2> file | head -1`: the run goes on to its end, and the file has no bar."""
    command = [sys.executable, ROOT / "train.py", *SHORT, *few_steps(steps=2), f"--out={tmp_path}", "--stage=tokenizer"]
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stdout.readline().startswith(b"device cpu")
        process.stdout.close()
        assert process.wait(60) == 0
    assert (tmp_path / "errors").read_bytes() == b"" and (tmp_path / "tokenizer" / "model.safetensors").is_file()


def test_progress_without_a_terminal_has_whole_lines(trained, tmp_path, capfd):
    link(trained, tmp_path, *before("align"))
    run(tmp_path, "--stage=align")
    out, errors = capfd.readouterr()
    assert "\r" not in out + errors and out.count("held-out loss") == 6 and "from step 0" in out
    assert "align: decoder" in out and sample.newest_stage(tmp_path) == tmp_path / "align"
