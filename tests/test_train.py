"""Training: exact resume, kills, signals, several processes, losses, optimizers, and what is refused.

KILLS=20 python -m pytest tests/test_train.py -k killed    # more kills than the suite has time for
"""

import itertools
import math
import multiprocessing
import os
import random
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

import train
from conftest import CPU, ROOT, SMALL, contents, few_steps, randomize, same_weights
from data import Collate, Samples, to_picture, vision_pixels
from mentor import Mentor
from test_folder import make_pets
from tokenizer import VQGAN, TextTokenizer

close, STAGES, NO_DROPOUT = torch.testing.assert_close, list(train.STAGES), "--model.decoder.dropout=0"
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

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all five stages."""
    out = tmp_path_factory.mktemp("trained")
    run(out)
    return out

@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """A run of four stages, without dropout."""
    out = link(trained, tmp_path_factory.mktemp("undisturbed"), "encoder")
    for stage in ("encoder", "pretrain", "align"):
        run(out, NO_DROPOUT, f"--stage={stage}", *few_steps(steps=2))
    return out

def link(trained, out, stage):
    """Let `out` begin with another run's finished stages before this one."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("spiece.model", *STAGES[: STAGES.index(stage)]):
        (out / name).symlink_to(trained / name)
    return out

def weights(out, stage):
    return load_file(out / stage / "model.safetensors")

def log_of(out, stage):
    lines = train.read_log(out / stage / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]

def same(a, b, stage):
    """Whether two runs ended a stage with the same weights and the same log, bit for bit."""
    return same_weights(weights(a, stage), weights(b, stage)) and log_of(a, stage) == log_of(b, stage)

def state_of(out, stage):
    return torch.load(out / stage / "state.pt", weights_only=True)

def at_step(patch, number, act):
    """Call act() once step `number` has been logged, before anything is saved."""
    write = train.Log.write
    patch.setattr(train.Log, "write", lambda log, step: (write(log, step), step == number and act()))

@contextmanager
def dies_at(monkeypatch, number):
    """What is run within stops at that step, as if the process had died."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, number, lambda: 1 / 0)
        yield patch

def stage_and_batch(name, world, text_tokenizer, *keys, drop=0.0):
    config = train.parse([*SHORT, *keys])
    torch.manual_seed(0)
    stage = train.STAGE_MODULES[name](name, config, CPU, Mentor(config.model), VQGAN(config.vqgan))
    dataset = Samples(world, train.parse_mix(getattr(config, name).mix), 0, prefix_drop=drop)
    return config, stage, Collate(text_tokenizer, config.model, 32)([dataset[i] for i in range(8)])

# --- Going on
@pytest.mark.parametrize("stage, keys", [
    *((stage, ()) for stage in STAGES), ("align", ("--workers=1", "--checkpoint")),
    ("tokenizer", ("--tokenizer.disc_start=0.3",))])
def test_a_stage_that_was_stopped_goes_on_bit_for_bit(stage, keys, trained, tmp_path, monkeypatch):
    """Dead after 5 of 6 steps with a checkpoint at 3; then the same command again. `trained` was another time
    and in another folder: a command gives the same bits whenever it is given. Processes that make the samples
    and activations that are computed again change none."""
    straight, command = trained, (link(trained, tmp_path, stage), f"--stage={stage}", *keys)
    if "disc" in str(keys):
        straight = tmp_path / "straight"
        run(straight, *command[1:])
    with dies_at(monkeypatch, 5):
        run(*command, "--save_every=3")
    assert state_of(tmp_path, stage)["step"] == 3 and not (tmp_path / stage / "model.safetensors").is_file()
    with open(tmp_path / stage / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the line at which it died
    run(*command, "--save_every=4")
    assert same(tmp_path, straight, stage) and len(log_of(straight, stage)) == 6
    assert ("d_weight" in log_of(straight, stage)[-1]) == ("disc" in str(keys))
    names = {"config.json", "log.jsonl", "model.safetensors", "stage.json"}
    assert {file.name for file in (tmp_path / stage).iterdir()} == names

def child(arguments, kill_at=0):
    """The body of a child process: a run whose held-out loss is best at step 4. It dies when something is to
    be written for the kill_at-th time."""
    torch.set_num_threads(1)
    written, note_best = itertools.count(1), train.note_best
    def watched(write):
        def writing(*arguments, **options):
            os.kill(os.getpid(), signal.SIGKILL if next(written) == kill_at else 0)
            return write(*arguments, **options)
        return writing
    with quickly() as patch:
        patch.setattr(train, "note_best", lambda best, held_out, step, *rest: note_best(
            best, abs(step - 4), step, *rest))
        for owner, name in ((os, "fsync"), (os, "replace"), (train.Log, "write"), (Path, "unlink")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        train.main(arguments)

def ended(*arguments, body=child):
    """The exit code of a child process; None if it does not end."""
    process = children.Process(target=body, args=arguments)
    process.start()
    process.join(100)
    process.kill()
    return process.exitcode

def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    """All stages on a few own pictures, saving at every step; of these the best weights are kept."""
    make_pets(tmp_path / "pets")
    straight, killed = ([*SHORT, f"--data={tmp_path}/pets", "--save_every=1", f"--out={tmp_path}/{name}"]
                        for name in ("straight", "killed"))
    moments = [random.randint(1, 90 // (1 + k)) for k in range(int(os.environ.get("KILLS", 3)))]
    assert ended(straight) == 0
    assert {ended(killed, moment) for moment in moments} <= {0, -signal.SIGKILL}, moments
    assert ended(killed) == 0, moments
    assert all(same(tmp_path / "straight", tmp_path / "killed", stage) for stage in STAGES), moments

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_before_they_end_the_run(number, trained, tmp_path, monkeypatch, capsys):
    """Also when Ctrl-C reaches the data processes too, as a terminal's does."""
    def told():
        for process in multiprocessing.active_children() if number == signal.SIGINT else ():
            os.kill(process.pid, number)
        os.kill(os.getpid(), number)
    command = link(trained, tmp_path, "pretrain"), "--stage=pretrain", "--workers=1"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 2, told)
        run(*command)
    assert stopped.value.code == 128 + number and "Traceback" not in capsys.readouterr().err
    assert state_of(tmp_path, "pretrain")["step"] in (2, 3)
    run(*command)
    assert same(tmp_path, trained, "pretrain")
    with pytest.raises(SystemExit):  # during the last step: it is not forgotten
        at_step(monkeypatch, 6, told)
        run(tmp_path / "last")
    assert not (tmp_path / "last" / "pretrain").exists()

def test_a_damaged_or_foreign_checkpoint_is_one_line(trained, tmp_path, monkeypatch):
    link(trained, tmp_path, "align")
    with dies_at(monkeypatch, 2):
        run(tmp_path, "--stage=align", "--save_every=1")
    file, state = tmp_path / "align" / "state.pt", state_of(tmp_path, "align")
    torch.save({**state, "stage": dict(list(state["stage"].items())[1:])}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "foreign.pt")
    others = [other.read_bytes() for other in tmp_path.glob("*.pt")]
    for damaged in (file.read_bytes()[:2000], b"", b"hello", *others):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file}.*delete") as error:
            run(tmp_path, "--stage=align")
        assert "\n" not in str(error.value) and file.read_bytes() == damaged
    file.unlink()  # as it says
    run(tmp_path, "--stage=align")
    assert same(tmp_path, trained, "align")

def test_a_full_disk_costs_no_more_than_what_did_not_fit(trained, tmp_path, monkeypatch, capsys):
    """A checkpoint fails half-way, a line of the log too, and another as a whole."""
    save, log = torch.save, tmp_path / "pretrain" / "log.jsonl"
    def full_at_2(state, path):
        save(state, path)
        if state["step"] == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
    def full_log(path, mode="r"):
        if mode == "a" and log.read_text().endswith("lo"):
            raise OSError(28, "No space left on device", str(path))
        return open(path, mode)
    link(trained, tmp_path, "pretrain")
    with dies_at(monkeypatch, 3) as patch:
        patch.setattr(torch, "save", full_at_2)
        patch.setattr(train, "open", full_log, raising=False)
        at_step(patch, 1, lambda: log.write_text(log.read_text() + '{"step": 2, "lo'))
        run(tmp_path, "--stage=pretrain", "--save_every=1")
    said = capsys.readouterr().out
    assert said.count("state.pt could not be written") == 1 and said.count(str(log)) > 1
    assert state_of(tmp_path, "pretrain")["step"] == 1 and not list(log.parent.glob("*.tmp"))
    log.write_text(log.read_text() + "3}\n")  # there is room again: a line goes on where the last one was cut
    run(tmp_path, "--stage=pretrain")
    assert same(tmp_path, trained, "pretrain")
    log.write_text("")  # or there was none from the start
    train.draw_curves(tmp_path)

def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(trained, tmp_path, monkeypatch):
    forward = train.MentorStage.forward
    def not_finite(self, batch, step):
        loss, logs = forward(self, batch, step)
        return loss * (math.nan if step == 3 else 1), logs
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="nan.* 4.*--align.lr"):
        patch.setattr(train.MentorStage, "forward", not_finite)
        run(link(trained, tmp_path, "align"), "--stage=align", "--save_every=1")
    state = state_of(tmp_path, "align")
    assert state["step"] == 3 and all(t.isfinite().all() for t in state["stage"].values())
    with pytest.raises(ValueError, match="--instruct.lr"):  # what the last step itself breaks
        run(link(trained, tmp_path / "last", "instruct"), "--stage=instruct", "--instruct.steps=1",
            "--instruct.lr=1e39", "--instruct.muon_lr=0")
    assert not (tmp_path / "last" / "instruct" / "model.safetensors").exists()

# --- The same samples, however they are shared out
def difference(a, b):
    """The largest of two models' weights. Softmax does not see a bias of the keys: its gradient is rounding
    noise, and AdamW makes steps of that."""
    return max((a[name] - b[name]).abs().max().item() for name in a if not name.endswith(".k.bias"))

def test_steps_are_those_of_a_plain_loop(undisturbed, tmp_path, world, text_tokenizer):
    """Of one with whole batches: micro-batches are averaged, gradients clipped, rates scheduled."""
    out = link(undisturbed, tmp_path, "align")
    keys = (NO_DROPOUT, f"--out={out}", "--stage=align", "--align.steps=4", "--warmup=0.4",
            "--prefix_drop=0.5", "--grad_clip=0.3", "--align.muon_lr=0", "--align.lr=0.001",
            "--align.final_lr=0.2")
    config, losses, norms = train.parse([*SHORT, *keys]), [], []
    stage = train.build_stage("align", config, CPU, world).train()
    dataset, collate = train.make_dataset("align", config, world), Collate(text_tokenizer, config.model, 32)
    trains = [p for p in stage.parameters() if p.requires_grad]
    matrices, rest = ([p for p in trains if (p.ndim > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}], 1.0, betas=(0.9, 0.95))
    for step, rate in enumerate((0.5, 1, 1, 0.6)):
        loss = stage(collate([dataset[i] for i in range(4 * step, 4 * step + 4)]), step)[0]
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trains, 0.3).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * rate
        optimizer.step()
    for micro in (1, 2, 4):
        run(out, *keys, f"--micro_batch={micro}")
        assert difference(weights(out, "align"), stage.model.state_dict()) < 1e-4 and min(norms) > 0.3
        for key, values in (("loss", losses), ("grad_norm", norms)):
            assert [line[key] for line in log_of(out, "align")] == pytest.approx(values, rel=1e-3)
        [file.unlink() for file in (out / "align").iterdir()]

def two(rank, runs):
    """The body of one of two processes: runs one after the other, each with a port to meet on. Process 1 is
    told to stop during step 2 of the last one."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    with quickly() as patch:
        for port, arguments in runs:
            os.environ["MASTER_PORT"] = str(port)
            if rank == 1 and arguments is runs[-1][1]:
                at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train.main(arguments)

def test_two_processes_equal_one(undisturbed, tmp_path, monkeypatch):
    """A tokenizer with discriminator, restarts of its codes and validation; the encoder; a stage that one
    process began and two go on with. A signal to either ends both, with a checkpoint."""
    commands, one, both = {}, tmp_path / "one", tmp_path / "both"
    for stage, key in {"tokenizer": "--tokenizer.disc_start=0", "encoder": NO_DROPOUT,
                       "instruct": "--micro_batch=1"}.items():
        commands[stage] = [*SHORT, NO_DROPOUT, f"--stage={stage}", "--save_every=3", key]
        for out in (one, both):
            link(undisturbed, out / stage, stage)
        train.main([*commands[stage], f"--out={one / stage}"])
    with dies_at(monkeypatch, 5):
        train.main([*commands["instruct"], f"--out={both}/instruct"])
    runs = [[*command, f"--out={both / stage}"] for stage, command in commands.items()]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [(s.getsockname()[1], s.close())[0] for s in sockets]
    pairs = list(zip(ports, [*runs, [*SHORT, "--stage=tokenizer", f"--out={tmp_path}/told"]]))
    processes = [children.Process(target=two, args=(rank, pairs)) for rank in (0, 1)]
    [process.start() for process in processes]
    [process.join(100) for process in processes]
    assert [process.exitcode for process in processes] == [143, 143]
    assert state_of(tmp_path / "told", "tokenizer")["step"] in (2, 3)
    for stage in commands:
        assert difference(weights(one / stage, stage), weights(both / stage, stage)) < 1e-4, stage
        for key in ("loss", "held_out"):  # process 0 alone writes
            seen, again = ([line[key] for line in log_of(out / stage, stage)] for out in (one, both))
            assert len(seen) == 6 and again == pytest.approx(seen, rel=1e-3), (stage, key)

class Broken:
    """A dataset whose sixth sample fails, in its own process."""

    def __getitem__(self, i):
        return self.fail() if i == 5 else i

    def torn(self):
        raise ValueError("dog.png: torn")

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

def read_all(way):
    config, dataset = train.parse([*SHORT, "--workers=1"]), Broken()
    dataset.fail = getattr(dataset, way)
    list(train.make_batches(dataset, list, config.align, config, CPU, 0))

def test_what_fails_in_a_data_process_is_one_line(tmp_path, monkeypatch):
    for way, message in ("torn", "^dog.png: torn$"), ("killed", "worker|process"):
        with pytest.raises(ValueError, match=message) as error:
            read_all(way)
        assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    # unless a process shares its batch itself, this fails unseen, and the run waits for a batch forever
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory: No space left on device")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # there too: it is a fork
    with pytest.raises(ValueError, match="No space left"):
        run(tmp_path, "--stage=tokenizer", "--workers=1")

def test_a_run_that_fails_does_not_wait_for_its_data_processes(tmp_path):
    """Which leave the signals, with which Python would end them, to the training process."""
    diverges = [*SHORT, f"--out={tmp_path}", "--stage=tokenizer", "--workers=1", "--tokenizer.lr=1e30"]
    assert (ended(diverges), ended("torn", body=read_all)) == (1, 1)

def test_every_stage_and_seed_has_its_own_samples_but_one_validation(world):
    runs = [(stage, train.parse(["tiny", f"--seed={seed}", f"--{stage}.mix=text_to_image:1"]))
            for seed in (0, 1) for stage in ("align", "instruct")]
    first = [train.make_dataset(stage, config, world)[0].target.tobytes() for stage, config in runs]
    held = [train.make_dataset(stage, config, world, held_out=True)[0] for stage, config in runs]
    assert len(set(first)) == 4 and len({s.target.tobytes() for s in held}) == 1
    assert held[0].scene.subjects[0].subject in world.held_out_subjects and not held[0].drop

# --- What trains, and the losses
@pytest.mark.parametrize("wrong", ["projector,decodr", "", "all"])
def test_a_part_that_is_not_there_is_refused(wrong, world, text_tokenizer):
    with pytest.raises(ValueError, match=f"--align.trains.*{wrong[-6:]}"):
        stage_and_batch("align", world, text_tokenizer, f"--align.trains={wrong}")

@pytest.mark.parametrize("name, trains", [
    ("encoder", "encoder"), *((name, "encoder,projector,decoder") for name in STAGES[2:])])
def test_all_that_trains_gets_a_gradient(name, trains, world, text_tokenizer):
    """Also with all parts chosen: the vision encoder's last block is never used."""
    _, stage, batch = stage_and_batch(name, world, text_tokenizer, f"--{name}.trains={trains}")
    stage(batch, 0)[0].backward()
    assert not [path for path, p in stage.named_parameters() if p.requires_grad == (p.grad is None)]

def test_a_new_model_guesses_and_a_dropped_prompt_is_not_seen(world, text_tokenizer):
    _, stage, batch = stage_and_batch("instruct", world, text_tokenizer)
    loss, logs = stage(batch, 0)
    assert loss.item() == pytest.approx(math.log(32), abs=1e-4)  # each of 32 codes is as likely
    randomize(stage.model).eval()
    loss, logs = stage(batch, 0)
    close(loss, sum(batch.tasks.count(task) * logs[task] for task in set(batch.tasks)) / 8)
    words = torch.where(batch.text_ids == text_tokenizer.image_id, batch.text_ids, 5)
    for drop, losses in ((False, 3), (True, 1)):
        given = replace(batch, drop=torch.full((8,), drop))
        assert losses == len({stage(replace(given, **change), 0)[0].item() for change in (
            {}, {"text_ids": words}, {"pixels": batch.pixels + 1})})

def test_half_of_the_codes_are_read_as_guessed(world, text_tokenizer, monkeypatch):
    """After half of the steps; targets stay the true codes, and validation reads these alone."""
    _, stage, batch = stage_and_batch("pretrain", world, text_tokenizer, "--pretrain.guess_start=0.5")
    next_logits, read = randomize(stage.model).eval().next_code_logits, []
    monkeypatch.setattr(stage.model, "next_code_logits", lambda prefix, lengths, codes: (
        read.append(codes), next_logits(prefix, lengths, codes) if torch.is_grad_enabled()
        else 1e3 * F.one_hot((codes + 1) % 32, 32))[1])  # it guesses the code after the right one
    before, after, held_out = stage(batch, 2)[0], stage(batch, 3)[0], stage.validation_loss(batch)
    codes, true, seen, last = read
    assert torch.equal(codes, true) and torch.equal(codes, last) and before == held_out != after
    share = torch.bincount(((seen - codes) % 32).flatten(), minlength=32) / codes.numel()
    assert share[:2].sum() == 1 and 0.4 < share[1] < 0.6
    prefix = stage.model.projector(stage.model.encoder(batch), batch.lengths, batch.drop)
    close(after, F.cross_entropy(next_logits(prefix, batch.lengths, seen).flatten(0, 1), codes.flatten()))

@pytest.mark.parametrize("length", [6, 30])  # less and more than an image's 16 tokens
def test_hidden_words_are_predicted_from_the_picture_and_the_other_words(length, world, text_tokenizer):
    """Against each sample alone, without padding: the mean loss of its hidden words, which are not seen, and
    that of the image tokens where all are hidden."""
    _, stage, batch = stage_and_batch("encoder", world, text_tokenizer)
    size = min(length, batch.text_ids.shape[1])
    batch = replace(batch, text_ids=batch.text_ids[:, :size], masked=batch.masked[:, :size],
                    lengths=batch.lengths.clamp(max=size))
    model, losses = randomize(stage.model).eval(), {True: [], False: []}
    text, patches = model.encoder.text, model.encoder.vision(train.as_vision_pixels(batch.targets, 32))
    for i, length in enumerate(batch.lengths):
        words, hidden = batch.text_ids[i, :length], batch.masked[i, :length]
        seen = text.embedding(torch.where(hidden, TextTokenizer.UNKNOWN, words))
        tokens = model.encoder.connector(patches[i : i + 1], None, None)[0]
        sequence = tokens if hidden.all() else torch.cat([tokens, seen])
        states = text(sequence[None], torch.ones(1, len(sequence), dtype=torch.bool))[0]
        logits = states @ text.embedding.weight.T / text.config.width**0.5
        answers = words[:16] if hidden.all() else words[hidden]
        asked = logits[: len(answers)] if hidden.all() else logits[len(tokens) :][hidden]
        losses[bool(hidden.all())].append(F.cross_entropy(asked, answers))
    assert all(losses.values())
    padded = replace(batch, text_ids=F.pad(batch.text_ids, (0, 9)), masked=F.pad(batch.masked, (0, 9)))
    for given in (batch, padded):
        close(stage(given, 0)[0], torch.stack(sum(losses.values(), [])).mean(), rtol=1e-4, atol=1e-4)

def test_targets_become_the_vision_encoders_pixels():
    for size, atol in ((32, 1e-4), (48, 0.1)):  # 48: rounded to bytes once more
        images = torch.randint(256, (2, 3, size, size)) / 127.5 - 1
        expected = torch.stack([vision_pixels(to_picture(image), 32) for image in images])
        close(train.as_vision_pixels(images, 32), expected, atol=atol, rtol=0)

def test_gradients_do_not_depend_on_threads(world, text_tokenizer):
    """As index_put's do, the gradient of table[rows]: several threads add it up in any order."""
    _, stage, batch = stage_and_batch("align", world, text_tokenizer, drop=0.5)
    with torch.autograd.profiler.profile() as seen:
        stage(batch, 0)[0].backward()
    names = {event.key for event in seen.key_averages()}
    assert "aten::embedding_dense_backward" in names and "index_put" not in str(names)

# --- The optimizers
def test_muon_is_its_formula_and_torchs():
    shapes, chance = ((12, 20), (12, 20), (20, 5)), torch.Generator().manual_seed(3)
    plain = [torch.randn(s, generator=chance) for s in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in plain] for _ in range(2))
    kernel = torch.nn.Parameter(plain[0].clone().view(12, 5, 2, 2))  # the first one as a convolution's
    muon, momentum = train.Muon([*ours, kernel], 0.02, 0.1), [torch.zeros(s) for s in shapes]
    reference = torch.optim.Muon(theirs, 0.02, 0.1) if hasattr(torch.optim, "Muon") else None
    for _ in range(5):
        for i, (rows, columns) in enumerate(shapes):
            gradient = torch.randn(rows, columns) * (1, 100, 1)[i]
            ours[i].grad, theirs[i].grad = gradient.clone(), gradient.clone()
            momentum[i] = 0.95 * momentum[i] + 0.05 * gradient
            u, s, v = torch.linalg.svd(0.05 * gradient + 0.95 * momentum[i], full_matrices=False)
            s = s / s.norm()
            for _ in range(5):  # Newton-Schulz acts on the singular values alone
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            plain[i] = plain[i] * 0.998 - 0.02 * max(1, rows / columns) ** 0.5 * u @ s.diag() @ v
        kernel.grad = ours[0].grad.view(kernel.shape)
        muon.step()
        reference.step() if reference else None
    close([p.data for p in ours], plain, atol=2e-5, rtol=1e-4)
    assert torch.equal(kernel.flatten(1), ours[0])
    close(ours, theirs, atol=2e-3, rtol=0) if reference else None  # theirs iterates in bfloat16

def test_every_parameter_has_its_optimizer_its_decay_and_its_rate(world, text_tokenizer):
    keys = "--encoder.trains=encoder,projector,decoder"
    config, stage, _ = stage_and_batch("encoder", world, text_tokenizer, keys)
    adamw, muon = train.make_optimizers(stage, config.encoder, config)
    (matrices, rest), (hidden,) = adamw.param_groups, muon.param_groups
    assert adamw.defaults["betas"] == (0.9, 0.95) and rest["weight_decay"] == 0 < config.weight_decay
    assert matrices["weight_decay"] == hidden["weight_decay"] == config.weight_decay
    assert all(p.ndim < 2 for p in rest["params"]) and all(p.ndim == 2 for p in hidden["params"])
    names = {p: name.removeprefix("model.") for name, p in stage.named_parameters() if p.requires_grad}
    assert len(names) == sum(len(group["params"]) for group in (matrices, rest, hidden))
    assert {names[p] for p in matrices["params"]} == {
        "encoder.vision.position_embedding", "encoder.vision.patch_embedding.weight",
        "encoder.text.embedding.weight", "encoder.text.relative_bias.weight", "projector.unconditional",
        "decoder.code_embedding.weight", "decoder.output.weight"}
    stage = train.TokenizerStage(config, CPU, None)
    names = {p: name.removeprefix("model.") for name, p in stage.named_parameters()}
    adamw, muon = train.make_optimizers(stage, config.tokenizer, config)
    assert {names[p] for p in adamw.param_groups[0]["params"]} == {
        "encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight", "quantize.embedding.weight",
        "post_quant_conv.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"}
    assert {p.ndim for p in muon.param_groups[0]["params"]} == {4}
    full = train.PRESETS["full"]
    factors = [train.schedule(step, replace(full.align, steps=1000), full) for step in range(1000)]
    assert factors[0] == 1 / 50 and factors[49] == max(factors) == 1
    assert factors[525] == pytest.approx(0.55, abs=0.01) and factors[-1] == pytest.approx(0.1, abs=1e-3)

# --- Keys, folders and messages
def test_command_lines_become_runs(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    config = train.parse(["tiny", "--out=~/x", "--data=~/pets", "--train_scale=1.5", "--vqgan.ch_mult=1,2"])
    assert (config.out, config.data, config.vqgan.ch_mult) == ("/home/me/x", "/home/me/pets", (1, 2))
    assert [getattr(config, stage).steps for stage in STAGES] == [1950, 1800, 1725, 300, 975]
    keys = ["--model.vision.width=30", "--model.vision.n_head=3"]  # legal together, in any order
    assert train.parse(["tiny", *keys]) == train.parse(["tiny", *keys[::-1]])
    config = train.PRESETS["full"]  # as published
    assert (config.align.lr, config.align.global_batch, config.align.steps) == (5e-4, 128, 2_480_000 // 128)
    assert (config.instruct.lr, config.instruct.steps) == (1e-4, 2 * 1_300_000 // 128)
    train.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {key.rpartition('.')[2]}: " in text for key in train.flatten(config))

@pytest.mark.parametrize("arguments, message", [
    ("tinny", "tinny.*tiny, small, base, full"), ("tiny --sede=1", "--sede=1: .*--seed=0"),
    ("tiny seed=1", "seed=1: .*--seed"), ("tiny --align.stepz=1", "--align.stepz=1: .*--align.steps"),
    ("tiny --resume", "--resume: "), ("tiny --dtype=float16", "--dtype=float16: .*bfloat16"),
    ("tiny --seed", "--seed=true: .*int"), ("tiny --seed=abc", "--seed=abc: .*int"),
    ("tiny --align.lr=-1", "--align.lr=-1: "), ("tiny --align.lr=nan", "--align.lr=nan: "),
    ("tiny --vqgan.ch_mult=1,x", "--vqgan.ch_mult=1,x: "), ("tiny --compile=maybe", "--compile=maybe: "),
    ("tiny --align.mix=drawing:1", "mix=drawing:1: .*text_to_image"),
    ("tiny --align.mix=segmentation", "mix=segmentation: "), ("tiny --align.mix=recovery:0", "recovery:0"),
    ("tiny --align.mix=recovery:nan", "recovery:nan"), ("tiny --stage=aline", "--stage=aline: .*align"),
    ("tiny --micro_batch=3", "micro_batch=3"), ("tiny --model.decoder.n_head=5", "decoder.width=96: .*20"),
    ("tiny --model.text.n_bucket=3", "n_bucket=3"), ("tiny --data=nowhere", "--data=nowhere: ")])
def test_mistakes_on_the_command_line_get_a_message(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        train.main([*arguments.split(), f"--out={tmp_path}/out", "--device=cpu"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

def test_another_run_in_a_used_folder_is_refused_by_its_first_key(trained, tmp_path, monkeypatch):
    there = {name: value for name, value in contents(trained).items() if name.suffix == ".safetensors"}
    for keys, message in (("--stage=align --align.lr=0.5", "align .*align.lr=0.003.*0.5"),
                          ("--seed=1", "tokenizer .*seed=0.*1"),
                          ("--stage=pretrain --model.text.width=32", "model.text.width=16.*32"),
                          ("--stage=instruct --prefix_drop=0.5", "prefix_drop=0.1.*0.5"),
                          ("--stage=tokenizer --train_scale=2", "tokenizer.steps=6.*12")):
        with pytest.raises(ValueError, match=message + ".*--out"):
            run(trained, *keys.split())
    for keys in ("--stage=tokenizer --prefix_drop=0.5 --model.text.width=32 --align.lr=0.5",  # act elsewhere
                 "--stage=pretrain --align.lr=0.5 --tokenizer.lr=1 --instruct.mix=recovery:1",
                 "--save_every=7 --workers=1 --micro_batch=2 --checkpoint --model.sampling.cfg_scale=5"):
        run(trained, *keys.split())
    assert {name: contents(trained)[name] for name in there} == there
    keys = "--tokenizer.global_batch=3 --micro_batch=2 --model.sampling.cfg_scale=5 --save_every=0"
    run(link(trained, tmp_path / "own", "instruct"), "--stage=instruct", *keys.split())  # no tokenizer's step
    assert '"sampling.cfg_scale": 5' in (tmp_path / "own" / "instruct" / "config.json").read_text()
    with dies_at(monkeypatch, 2):  # also while it is not finished
        run(link(trained, tmp_path, "align"), "--stage=align", "--save_every=1")
    with pytest.raises(ValueError, match="align.lr=0.003.*0.5"):
        run(tmp_path, "--stage=align", "--align.lr=0.5")

def test_stages_have_an_order(trained, tmp_path):
    for stage, missing in (("pretrain", "tokenizer"), ("pretrain", "encoder"), ("align", "pretrain"),
                           ("instruct", "align")):
        with pytest.raises(ValueError, match=f"{missing}.*train the stage {missing}"):
            run(link(trained, tmp_path / missing, missing), f"--stage={stage}")
        assert not (tmp_path / missing / stage).exists()
    link(trained, tmp_path / "other", "tokenizer")
    for stage in ("encoder", "pretrain"):
        (tmp_path / "other" / stage).symlink_to(trained / stage)
    run(tmp_path / "other", "--stage=tokenizer", "--tokenizer.lr=0.1")  # not the one of that pretraining
    for stage in ("pretrain", "align"):
        with pytest.raises(ValueError, match="pretrain.*weights of tokenizer"):
            run(tmp_path / "other", f"--stage={stage}")
    with pytest.raises(ValueError, match="decoder.width=32.*64"):
        run(link(trained, tmp_path / "wide", "align"), "--stage=align", "--model.decoder.width=64")

def test_a_closed_pipe_and_a_file_for_progress(trained, tmp_path, capfd):
    """`python train.py ... 2> file | head -1`: the run goes on to its end, and the file has no bar."""
    command = [sys.executable, ROOT / "train.py", *SHORT, *few_steps(steps=2), "--stage=tokenizer"]
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen([*command, f"--out={tmp_path}"], stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout.readline().startswith(b"device cpu")
        process.stdout.close()
        assert process.wait(100) == 0 and (tmp_path / "tokenizer" / "model.safetensors").is_file()
    run(link(trained, tmp_path / "out", "align"), "--stage=align")
    out, errors = capfd.readouterr()
    assert (tmp_path / "errors").read_bytes() == b"" and "\r" not in out + errors
    assert out.count("held-out loss") == 6
