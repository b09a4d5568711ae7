"""What goes wrong on real machines: kills, signals, torn files, full disks, numbers that are not finite, a process that dies.

KILLS=20 python -m pytest tests/test_trust.py -k killed    # more kills than the suite has time for
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import train
from data import Shapes, TextTokenizer
from test_train import CPU, ROOT, SHORT, equal, link_stages, run_stage, stage_and_batch, weights

KILLS = int(os.environ.get("KILLS", 2))
children = multiprocessing.get_context("forkserver")  # imports the slow packages once, then each child starts in little time
children.set_forkserver_preload(["torch", "torch.distributed.nn.functional", "torch.utils.data", "safetensors.torch", "sentencepiece", "PIL.Image", "tqdm", "pytest"])


def train_in_child(arguments, errors=None):
    """The body of a child process: train.py, without the scoring. With a file for its errors it leads a process group of its own."""
    if errors:
        os.setsid()
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    train.VALIDATION = 8
    train.sample.score = lambda *arguments: None
    train.main(arguments)


def start(*arguments, **options):
    child = children.Process(target=train_in_child, args=(["tiny", *SHORT, *arguments],), kwargs=options)
    child.start()
    return child


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def all_weights(out):
    return {f"{stage} {k}": v for stage in train.STAGES for k, v in weights(out, stage).items()}


def stop_after(monkeypatch, step):
    """Make the run stop after some steps, as if the process had died there. Returns what undoes it."""
    original = train.Log.step

    def stopping(self, done, *arguments):
        original(self, done, *arguments)
        if done + 1 == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Log, "step", stopping)
    return lambda: monkeypatch.setattr(train.Log, "step", original)


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path):
    """SIGKILL anywhere in the four stages, saving at every step; then the same command again, until it is through."""
    def child(name):
        return start(f"--out={tmp_path / name}", "--save_every=1")

    seconds = []
    for _ in range(2):  # the second time everything is done already: how long it takes to start
        began, straight = time.time(), child("straight")
        straight.join()
        seconds.append(time.time() - began)
        assert straight.exitcode == 0
    rng, killed = random.Random(time.time()), 0
    while killed < KILLS:
        victim = child("killed")
        victim.join(rng.uniform(0.3 * seconds[1], seconds[1] + (seconds[0] - seconds[1]) / KILLS))
        if victim.exitcode == 0:  # it got through before its time: check, and begin again
            assert equal(all_weights(tmp_path / "straight"), all_weights(tmp_path / "killed"))
            shutil.rmtree(tmp_path / "killed")
            continue
        assert victim.exitcode is None, "it failed on its own"
        victim.kill()
        victim.join()
        killed += 1
    last = child("killed")
    last.join()
    assert last.exitcode == 0
    assert equal(all_weights(tmp_path / "straight"), all_weights(tmp_path / "killed"))
    best = [{f.parent.name: f.read_bytes() for f in (tmp_path / name).rglob("best.safetensors")} for name in ("straight", "killed")]
    assert best[0] == best[1] and not [*(tmp_path / "killed").rglob("state-*"), *(tmp_path / "killed").rglob("*.tmp")]


@pytest.mark.parametrize("stage", ["tokenizer", "align"])
def test_going_on_is_exact_with_accumulation_and_data_processes(stage, trained, tmp_path, monkeypatch):
    keys = ("--micro_batch=2", "--workers=2", "--save_every=3")
    for name in ("straight", "stopped"):
        link_stages(trained, tmp_path / name, *train.STAGES[: train.STAGES.index(stage)])
    run_stage(tmp_path / "straight", stage, *keys)
    undo = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "stopped", stage, *keys)
    undo()
    assert train.checkpoints(tmp_path / "stopped" / stage)
    run_stage(tmp_path / "stopped", stage, *keys)
    assert equal(weights(tmp_path / "straight", stage), weights(tmp_path / "stopped", stage))
    logs = [[(line["step"], line["loss"]) for line in train.read_log(tmp_path / name / stage / "log.jsonl")] for name in ("straight", "stopped")]
    assert logs[0] == logs[1] and len(logs[0]) == 6


@pytest.mark.parametrize("killed_in", ["step", "save_state"])
def test_the_best_weights_are_kept_apart_and_survive_a_kill(killed_in, trained, tmp_path, monkeypatch):
    """With the loss upside down the first weights stay the best. Killed at step 4, or between best.safetensors and the first checkpoint."""
    seen, measured = [], train.held_out_loss
    monkeypatch.setattr(train, "held_out_loss", lambda *arguments: seen.append(-measured(*arguments)) or seen[-1])
    for name in ("straight", "killed"):
        link_stages(trained, tmp_path / name, "tokenizer")
    run_stage(tmp_path / "straight", "pretrain", "--save_every=1")
    assert len(seen) == 6 and seen == sorted(seen)

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4) if killed_in == "step" else patch.setattr(train, "save_state", kill)
        run_stage(tmp_path / "killed", "pretrain", "--save_every=1")
    assert train.best_so_far(tmp_path / "killed" / "pretrain", 1) == (seen[0], 1) and train.best_so_far(tmp_path / "killed" / "pretrain", 0)[1] == 0
    run_stage(tmp_path / "killed", "pretrain", "--save_every=1")
    files = [(tmp_path / name / "pretrain" / file).read_bytes() for name in ("straight", "killed") for file in ("best.safetensors", "model.safetensors")]
    assert files[0] == files[2] and files[1] == files[3] and files[0] != files[1]
    (tmp_path / "killed" / "pretrain" / "best.safetensors").write_bytes(files[0][:100])
    assert train.best_so_far(tmp_path / "killed" / "pretrain", 6) == (float("inf"), 0)


def test_the_best_weights_of_a_run_that_left_no_checkpoint_are_removed(trained, tmp_path):
    link_stages(trained, tmp_path, "tokenizer")
    best = tmp_path / "pretrain" / "best.safetensors"
    best.parent.mkdir()
    train.save_file({"x": torch.zeros(1)}, best, {"validation": "[-1.0, 1]"})
    run_stage(tmp_path, "pretrain", "--save_every=3")
    assert train.best_so_far(best.parent, 6)[0] != -1


def test_checkpoints_that_a_kill_left_at_the_end_are_removed(trained, tmp_path, monkeypatch):
    link_stages(trained, tmp_path, "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(train, "remove_checkpoints", lambda *arguments: None)
        run_stage(tmp_path, "pretrain", "--save_every=2")
    assert len(train.checkpoints(tmp_path / "pretrain")) == 2
    run_stage(tmp_path, "pretrain", "--save_every=2")
    assert not train.checkpoints(tmp_path / "pretrain") and (tmp_path / "pretrain" / "model.safetensors").is_file()


def test_validation_is_on_held_out_subjects_and_leaves_no_trace(world, text_tokenizer, trained, tmp_path):
    for name in train.STAGES:
        run, stage, batch = stage_and_batch(name, "scratch", world, text_tokenizer)
        first, again = (train.make_dataset(name, train.replace(run, seed=seed), world, held_out=True) for seed in (0, 1))
        samples = [first[i] for i in range(20)]
        assert all(world.held_out(placed.subject) for s in samples for placed in s.scene.subjects) and not any(s.drop for s in samples)
        assert all((s.target == again[i].target).all() and s.prompt == again[i].prompt for i, s in enumerate(samples))
        collate = train.Collate(text_tokenizer, 32, run.model.image_tokens, run.model.context, 32)
        state, before = torch.get_rng_state(), {k: v.clone() for k, v in stage.state_dict().items()}
        losses = [train.held_out_loss(stage.train(), first, collate, micro, CPU) for micro in (1, 3, 8)]
        assert stage.training and max(losses) - min(losses) < 1e-5 and torch.equal(state, torch.get_rng_state()) and equal(before, stage.state_dict())
        assert name != "tokenizer" or not stage.usage.counts.any()
    line = train.read_log(trained / "align" / "log.jsonl")[-1]
    assert abs(line["validation"] - line["loss"]) < 1 and not list(trained.rglob("best.safetensors"))  # the last were the best


@pytest.mark.parametrize("number, whole_group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signals_save_before_they_end_the_run(number, whole_group, tmp_path):
    """Also when the signal goes to the data processes too, as a terminal's Ctrl-C does."""
    keys = ("--stage=tokenizer", "--tokenizer.steps=20", "--workers=1")
    run = start(f"--out={tmp_path}/stopped", *keys, errors=tmp_path / "errors")
    wait_for(lambda: train.read_log(tmp_path / "stopped" / "tokenizer" / "log.jsonl"))
    (os.killpg if whole_group else os.kill)(run.pid, number)
    run.join(30)
    assert run.exitcode == 128 + number and "Traceback" not in (tmp_path / "errors").read_text()
    saved, = train.checkpoints(tmp_path / "stopped" / "tokenizer")
    assert 0 < int(saved.stem[6:]) < 20
    for name in ("stopped", "straight"):
        train.main(["tiny", *SHORT, f"--out={tmp_path / name}", *keys])
    assert equal(weights(tmp_path / "stopped", "tokenizer"), weights(tmp_path / "straight", "tokenizer"))


def test_only_a_second_ctrl_c_stops_at_once():
    """A cluster may send SIGTERM to all training processes, and torchrun then another."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        with train.StopSignals() as signals:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM and not got
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]  # as before
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ctrl_c)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_trains(tmp_path):
    first = start("--stage=tokenizer", "--tokenizer.steps=100000", f"--out={tmp_path}")
    wait_for((tmp_path / "tokenizer" / "log.jsonl").is_file)
    before = (tmp_path / "tokenizer" / "stage.json").read_bytes(), (tmp_path / "run.json").read_bytes()
    try:
        with pytest.raises(ValueError, match=f"--out={tmp_path}: another run is training there; choose another --out"):
            run_stage(tmp_path, "tokenizer", "--seed=5")
    finally:
        first.kill()
        first.join()
    assert before == ((tmp_path / "tokenizer" / "stage.json").read_bytes(), (tmp_path / "run.json").read_bytes())
    run_stage(tmp_path, "tokenizer", "--seed=5")  # it left no checkpoint, and its lock has gone with it


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "foreign"])
def test_a_torn_checkpoint_is_put_aside_and_the_one_before_used(damage, trained, tmp_path, monkeypatch, capsys):
    undo = stop_after(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "tokenizer", "--save_every=1", "--keep=3")
    undo()
    folder = tmp_path / "tokenizer"
    assert [f.name for f in train.checkpoints(folder)] == ["state-3.pt", "state-4.pt", "state-5.pt"]
    whole = (folder / "state-5.pt").read_bytes()
    middle = len(whole) // 2
    torch.save({"model": torch.zeros(2)}, tmp_path / "foreign.pt")
    broken = {"cut": whole[:middle], "empty": b"", "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "text": b"hello",
              "foreign": (tmp_path / "foreign.pt").read_bytes()}[damage]
    (folder / "state-5.pt").write_bytes(broken)
    assert train.newest_state(folder, CPU)["step"] == 4
    assert (folder / "state-5.torn").read_bytes() == broken and not (folder / "state-5.pt").exists()
    run_stage(tmp_path, "tokenizer")
    said = capsys.readouterr().out
    assert ("state-5.pt: not a checkpoint of a stage" if damage == "foreign" else "state-5.pt: not a readable file") in said and "renamed to state-5.torn, going on from the one before" in said and "from step 4" in said
    assert equal(weights(tmp_path, "tokenizer"), weights(trained, "tokenizer"))


def test_too_little_shared_memory_for_data_processes_ends_the_run(tmp_path, monkeypatch):
    """In their own queue's thread it would fail unseen, and the training process would wait for a batch forever."""
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the data processes, too, which are forks
    with pytest.raises(ValueError, match=r"too little shared memory \(/dev/shm\) .* No space left .* set --workers=0"):
        run_stage(tmp_path, "tokenizer", "--workers=1")


def test_a_line_that_a_full_disk_cuts_leaves_the_log_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "tqdm", lambda **options: SimpleNamespace(set_postfix_str=lambda text: None))
    monkeypatch.setattr(train.Machine, "say", lambda self, text: None)  # what is captured has no room either
    limits, log = resource.getrlimit(resource.RLIMIT_FSIZE), train.Log(tmp_path, "align", train.parse(["tiny", *SHORT])[1], 0, CPU)
    for step in range(3):
        log.add({"loss": 1.0})
        try:
            if step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 20, limits[1]))
            log.write(step, 1.0, 0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [line["step"] for line in train.read_log(tmp_path / "log.jsonl")] == [1, 3] and log.lost


def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(trained, tmp_path, monkeypatch, capsys):
    """A limit on the size of files stands in for a full disk: the same system call fails."""
    original, limits = train.Log.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_after_three_steps(self, step, *arguments):
        original(self, step, *arguments)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    monkeypatch.setattr(train.Log, "step", full_after_three_steps)
    folder = tmp_path / "tokenizer"
    try:
        with pytest.raises(ValueError, match=r"tokenizer: .*model.safetensors could not be written .* make room on the disk.*state-3.pt"):
            run_stage(tmp_path, "tokenizer", "--save_every=1", "--keep=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.setattr(train.Log, "step", original)
    said = capsys.readouterr().out
    assert said.count("could not be written") == 4 and said.count("best.safetensors could not") == 2 and "going on without it, the last good checkpoint is " in said
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "log.jsonl", "stage.json", "state-3.pt"]
    run_stage(tmp_path, "tokenizer")
    assert "from step 3" in capsys.readouterr().out and equal(weights(tmp_path, "tokenizer"), weights(trained, "tokenizer"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    train.mentor.write_json(file, {"a": 1})

    def fail_half_way(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="a.json could not be written .*No space left"):
        train.mentor.write_atomically(file, fail_half_way)
    assert train.mentor.read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_the_first_number_that_is_not_finite_stops_the_run_and_is_never_saved(trained, tmp_path, monkeypatch):
    forward = train.MentorStage.forward

    def not_finite_at_step_4(self, batch, step):
        loss, logs = forward(self, batch, step)
        return loss * float("nan" if step == 3 else 1), logs

    monkeypatch.setattr(train.MentorStage, "forward", not_finite_at_step_4)
    link_stages(trained, tmp_path, "tokenizer", "pretrain")
    with pytest.raises(ValueError, match=r"align: loss nan, gradient norm nan at step 4, learning rate 2.48e-03, tasks .*(segmentation|text_to_image).*lower --align.lr.*the last good checkpoint is .*state-3.pt"):
        run_stage(tmp_path, "align", "--save_every=1")
    for file in train.checkpoints(tmp_path / "align"):
        assert all(t.isfinite().all() for t in train.tree_leaves(train.mentor.read_pickle(file)) if torch.is_tensor(t))
    monkeypatch.setattr(train.MentorStage, "forward", forward)
    run_stage(tmp_path, "align", "--save_every=1")
    assert equal(weights(tmp_path, "align"), weights(trained, "align"))


def test_where_looking_costs_time_the_first_bad_step_is_still_the_one_named(tmp_path):
    log = train.Log(tmp_path, "align", train.replace(train.PRESETS["tiny"], align=train.StageConfig(steps=100_000)), 0, CPU)
    log.machine = SimpleNamespace(main=False, device=torch.device("cuda"))  # looked at when a line is due
    for step, (loss, norm) in enumerate([(1.0, 1.0), (2.0, float("inf")), (float("nan"), 1.0), (1.0, 1.0)]):
        log.step(step, torch.tensor(loss), torch.tensor(norm), 0.1 * (step + 1), {f"task{step}"})
    with pytest.raises(ValueError, match="loss 2, gradient norm inf at step 2, learning rate 2.00e-01, tasks task1: "):
        log.check()


def test_weights_that_are_not_finite_are_not_saved(world, text_tokenizer, tmp_path):
    run, stage, _ = stage_and_batch("align", "scratch", world, text_tokenizer)
    optimizers, folder = train.make_optimizers(stage, run.align, run), tmp_path / "align"
    folder.mkdir()
    train.save_state(folder, stage, optimizers, 1, 2, CPU)
    with torch.no_grad():
        stage.model.projector.unconditional[0, 0] = float("inf")
    for save in (lambda: train.save_state(folder, stage, optimizers, 2, 2, CPU), lambda: train.save_weights(folder, stage, CPU)):
        with pytest.raises(ValueError, match="projector.unconditional is not finite, so nothing was saved: lower --align.lr; .*state-1.pt"):
            save()
    assert [f.name for f in folder.iterdir()] == ["state-1.pt"]


ZEBRA = TextTokenizer.train(["zebra", *Shapes(32).sentences()]).proto  # knows all words, by other numbers


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_stage_takes_the_default_sampling_of_the_same_run(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "out")
    before = weights(out, "instruct")
    run_stage(out, "instruct", "--model.sampling.cfg_scale=5")
    assert "instruct: draws from now on with cfg_scale=5.0, temperature=0.6, top_k=0, top_p=1.0" in capsys.readouterr().out
    assert train.sample.Pipeline.open(out, "cpu").model.config.sampling.cfg_scale == 5 and equal(weights(out, "instruct"), before)
    run_stage(out, "instruct", "--model.sampling.cfg_scale=5")
    assert "from now on" not in capsys.readouterr().out


@pytest.mark.parametrize("damage, arguments, message", [
    (None, ["--stage=instruct", "--micro_batch=3"], "global_batch=4 is not processes x micro_batch"),
    (None, ["--micro_batch=3"], "global_batch=4 is not processes x micro_batch"),
    (None, ["--stage=align", "--align.lr=0.5"], "align was trained with align.lr="),
    (None, ["--align.lr=0.5"], "align was trained with align.lr="),
    (None, ["--stage=align", "--vqgan.ch=16"], "--vqgan.ch=16, but .*tokenizer was trained with 8"),
    (None, ["--stage=tokenizer", "--tokenizer.lpips=nowhere"], "lpips=nowhere: .* is missing"),
    (("instruct/stage.json", b"{"), ["--stage=instruct"], "instruct/stage.json: not a readable JSON file"),
    (("align/config.json", b"[]"), ["--stage=instruct"], "align/config.json: holds .*not a JSON object"),
    (("align/model.safetensors", b"\0" * 99), ["--stage=instruct"], "align/model.safetensors: not a readable weights file"),
    (("align/model.safetensors", None), ["--stage=instruct"], "instruct needs .*align/model.safetensors: --stage=tokenizer and --stage=align make"),
    (("spiece.model", b"torn"), ["--stage=instruct"], "spiece.model: not a SentencePiece model"),
    (("spiece.model", TextTokenizer.train(["a red star"]).proto), [], "does not know '.*' and other words of the world shapes"),
    (("spiece.model", ZEBRA), ["--stage=pretrain"], r"pretrain was trained with text model=\w+, this run has \w+ \(spiece.model is another\)"),
    (("spiece.model", ZEBRA), ["--stage=instruct"], "align was trained with another text model .*spiece.model"),
])
def test_a_run_that_is_refused_has_written_nothing(damage, arguments, message, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    if damage:
        (out / damage[0]).unlink()
        if damage[1] is not None:
            (out / damage[0]).write_bytes(damage[1])
    before = contents(out)
    with pytest.raises(ValueError, match=message):
        train.main(["tiny", *SHORT, f"--out={out}", *arguments])
    assert contents(out) == before


def test_a_refused_run_makes_no_folder_and_another_text_model_does_not_open(trained, tmp_path):
    for arguments, message in ((["--micro_batch=3"], "global_batch=4 is not"), (["--stage=align"], "align needs ")):
        with pytest.raises(ValueError, match=message):
            train.main(["tiny", *SHORT, f"--out={tmp_path / 'new'}", *arguments])
    assert not (tmp_path / "new").exists()
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "spiece.model").write_bytes(ZEBRA)
    for folder in (out, out / "pretrain"):
        with pytest.raises(ValueError, match="was trained with another text model .* its words would mean nothing"):
            train.sample.Pipeline.open(folder, "cpu")


def test_a_stage_goes_on_only_with_the_tokenizer_of_the_one_before(trained, tmp_path):
    """Pretrained with one tokenizer, whose place another of the same shape has taken."""
    link_stages(trained, tmp_path, "pretrain")
    run_stage(tmp_path, "tokenizer", "--seed=1")
    hashes = [train.sample.weights_hash(out / "tokenizer") for out in (trained, tmp_path)]
    with pytest.raises(ValueError, match=rf"pretrain was trained with another tokenizer \(weights {hashes[0]}\) than .*tokenizer holds \({hashes[1]}\)"):
        run_stage(tmp_path, "align")


CUDA_FULL, CPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("owner, where, error", [
    (train.tokenizer.Encoder, "forward", CUDA_FULL), (train.tokenizer.Encoder, "forward", CPU_FULL), (torch.optim.AdamW, "step", CUDA_FULL), (train, "held_out_loss", CPU_FULL),
    (train.TokenizerStage, "place_codes", CPU_FULL), (train.TokenizerStage, "discriminator_step", CUDA_FULL)])
def test_out_of_memory_says_what_to_set(owner, where, error, trained, tmp_path, monkeypatch):
    """Wherever in a step it happens."""
    def fail(*arguments, **options):
        raise error

    keys, original = ("--tokenizer.global_batch=12", "--tokenizer.disc_start=0", "--tokenizer.restart_every=1", "--tokenizer.codebook_start=0"), getattr(owner, where)
    monkeypatch.setattr(owner, where, fail)
    for consistency, less in ((0, 3), (0.2, 2)):  # with the second only pairs are legal
        with pytest.raises(ValueError, match=f"tokenizer: out of memory on cpu with micro_batch=6 .*set --micro_batch={less}: global_batch stays 12, a step takes {12 // less} micro-batches instead of 2"):
            run_stage(tmp_path, "tokenizer", *keys, "--micro_batch=6", f"--tokenizer.consistency={consistency}", f"--out={tmp_path}/{less}")
    with pytest.raises(ValueError, match="micro_batch=2 .*the smallest there is: choose a smaller preset"):
        run_stage(tmp_path, "tokenizer", *keys, "--micro_batch=2")
    if owner is not train.tokenizer.Encoder:
        return
    monkeypatch.setattr(owner, where, original)
    monkeypatch.setattr(train.mentor.ImageDecoder, "forward", fail)
    link_stages(trained, tmp_path / "align", "tokenizer", "pretrain")
    for checkpoint, said in ("false", "there is: set --checkpoint=true, or choose"), ("true", "there is: choose a smaller preset"):
        with pytest.raises(ValueError, match=f"align: out of memory .*micro_batch=1 .*{said}"):
            run_stage(tmp_path / "align", "align", "--micro_batch=1", f"--checkpoint={checkpoint}")
    monkeypatch.setattr(train.tokenizer.Encoder, "forward", lambda self, images: images.view(1))
    with pytest.raises(RuntimeError, match="shape"):  # other errors keep their traceback
        run_stage(tmp_path, "tokenizer")


def rank_in_child(rank, runs):
    """The body of one of two processes: those runs one after the other, each with a port to meet on."""
    for port, arguments in runs:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        train_in_child(arguments)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_two_processes_equal_one(trained, tmp_path, monkeypatch):
    """Every stage, restarts of codes and validation included; a tokenizer with discriminator; a stage that one process began and two
    go on with."""
    monkeypatch.setattr(train.sample, "score", lambda *arguments: None)
    runs = {}
    stage_of = {**dict(zip(train.STAGES, train.STAGES)), "resumed": "instruct", "gan": "tokenizer"}
    for case, stage in stage_of.items():
        for name in ("one", "two"):
            link_stages(trained, tmp_path / name / case, *train.STAGES[: train.STAGES.index(stage)])
        runs[case] = ["tiny", *SHORT, "--model.decoder.dropout=0", f"--stage={stage}", "--save_every=3", *["--tokenizer.disc_start=0"] * (case == "gan")]
        train.main([*runs[case], f"--out={tmp_path / 'one' / case}"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # dies with a checkpoint at step 3
        stop_after(patch, 5)
        train.main([*runs["resumed"], f"--out={tmp_path / 'two' / 'resumed'}"])
    two = [(port, [*run, f"--out={tmp_path / 'two' / case}"]) for port, (case, run) in zip(free_ports(len(runs)), runs.items())]
    processes = [children.Process(target=rank_in_child, args=(rank, two)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for case, stage in stage_of.items():
        one, two = (weights(tmp_path / name / case, stage) for name in ("one", "two"))
        # Softmax does not see a bias of the keys: its gradient is rounding noise, and AdamW makes steps of that.
        differences = {k: (one[k] - two[k]).abs().max().item() for k in one if not k.endswith(".k.bias")}
        assert max(differences.values()) < 1e-4, (case, sorted(differences.items(), key=lambda item: -item[1])[:4])
        logs = [train.read_log(tmp_path / name / case / stage / "log.jsonl") for name in ("one", "two")]  # rank 0 alone writes
        for key, count in (("loss", 6), ("validation", 2), ("restarted", int(stage == "tokenizer"))):
            seen, again = ([line[key] for line in log if key in line] for log in logs)
            assert len(seen) == count and all(seen) and again == pytest.approx(seen, rel=1e-3), (case, key)


DIES = """
import sys, train
step = train.Log.step
def dies(self, done, *arguments):
    if self.machine.rank == 1 and done == 4:
        raise ZeroDivisionError("the bug of process 1")
    step(self, done, *arguments)
train.Log.step = dies
train.cli()
"""


def test_a_process_that_dies_takes_the_others_down_and_one_process_goes_on(tmp_path, capsys):
    (tmp_path / "dies.py").write_text(DIES)
    arguments = ["tiny", *SHORT, "--stage=tokenizer", "--save_every=4"]
    began = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "dies.py"), *arguments, f"--out={tmp_path}/two"],
                          capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode and time.time() - began < 60 and "ZeroDivisionError: the bug of process 1" in done.stderr
    assert [f.name for f in train.checkpoints(tmp_path / "two" / "tokenizer")] == ["state-4.pt"]
    for name in ("two", "one"):
        train.main([*arguments, f"--out={tmp_path / name}"])
    assert "the checkpoint is from 2 processes, going on with 1: the same samples" in capsys.readouterr().out
    one, two = weights(tmp_path / "one", "tokenizer"), weights(tmp_path / "two", "tokenizer")
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-3
