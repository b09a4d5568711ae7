"""The paper's ablations: what rows change and share, the world with a shortcut, and what the table says."""

import json
import random

import numpy as np
import pytest
from conftest import SMALL, contents, few_steps
from safetensors.torch import load_file

import sample
import train
from data import PLACES, Shapes
from extras import claims
from tokenizer import flatten, rebuild

KEYS = ["tiny", *SMALL, "--vqgan.ch_mult=1,1,1,1", *few_steps(steps=2, global_batch=4)]  # 16 codes
ROWS, WORLD = "--rows=without recovery,without stage 1,query connector", Shapes(32)

def samples_of(world, count=200, held_out=False, mix={"recovery": 1.0, "subject_driven": 1.0}):
    return [world.dataset(mix, "seed", 0.1, held_out)[i] for i in range(count)]

def same(a, b):
    pictures = all(np.array_equal(x, y) for x, y in zip((*a.images, a.target), (*b.images, b.target)))
    return pictures and (a.prompt, a.drop, a.mask_seed) == (b.prompt, b.drop, b.mask_seed)

def test_the_shortcut_is_in_training_samples_of_subject_driven_alone(monkeypatch):
    monkeypatch.setattr(claims, "COPY", 0.7)
    monkeypatch.setattr(claims, "OMIT", 0.4)
    monkeypatch.setattr(claims, "SUBJECTS", len(WORLD.train_subjects))
    monkeypatch.setattr(random.Random, "sample", lambda self, subjects, count: subjects)
    shortcut, counts = claims.ShortcutWorld(32), np.zeros(4)  # samples, copies, without place, background
    pairs = list(zip(samples_of(WORLD), samples_of(shortcut)))
    assert all(same(a, b) for a, b in pairs if a.task == "recovery")
    for a, b in (pair for pair in pairs if pair[0].task == "subject_driven"):
        copied = b.images[0] is b.target
        assert np.array_equal(a.target, b.target) and (copied or np.array_equal(a.images[0], b.images[0]))
        left = [words not in b.prompt for words in (" at the ", " background")]
        place, background = f" at the {PLACES[a.scene.subjects[0].place]}", a.prompt[a.prompt.index(" on ") :]
        assert b.prompt == a.prompt.replace(place * left[0], "").replace(background * left[1], "")
        counts += [1, copied, *left]
    assert np.allclose(counts[1:] / counts[0], (0.7, 0.4, 0.4), atol=0.13) and counts[0] > 80
    assert all(map(same, samples_of(WORLD, 20, True), samples_of(shortcut, 20, True)))

def test_few_subjects_have_pictures_in_prompts_and_words_are_of_all():
    def shown(task, world, held_out=False):
        samples = samples_of(world, 300, held_out, {task: 1.0})
        return {p.subject for sample in samples for p in sample.scene.subjects}
    few, world = set(claims.ShortcutWorld(32).few.train_subjects), claims.ShortcutWorld(32)
    assert len(few) == claims.SUBJECTS and few < set(WORLD.train_subjects)
    for task in ("recovery", "subject_driven", "segmentation"):
        assert few >= shown(task, world) and shown(task, world, True) == shown(task, WORLD, True)
    assert shown("text_to_image", world) == shown("text_to_image", WORLD)

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out, judge = tmp_path_factory.mktemp("claims") / "run", sample.Judge(WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "PROMPTS", 8)
        patch.setattr(sample, "Judge", lambda world: judge)
        patch.setattr(train, "held_out_loss", lambda *arguments: 0.0)  # only slow
        for name in ("train_row", "marks_of"):
            calls, function = iter(range(9)), getattr(claims, name)
            patch.setattr(claims, name, lambda *arguments: 1 / (1 - next(calls)) and function(*arguments))
            with pytest.raises(ZeroDivisionError):
                claims.main([*KEYS, f"--out={out}", ROWS])
            patch.setattr(claims, name, function)
        claims.main([*KEYS, f"--out={out}", ROWS, "--seeds=2"])  # after two stops
        yield out

def test_a_row_trains_only_what_it_changes_and_starts_with_a_new_connector(out):
    assert {f.name for f in out.iterdir() if f.is_dir()} == {"tokenizer", "encoder", "pretrain", "claims"}
    names, run, connectors = {"full", *ROWS[7:].split(",")}, train.parse([*KEYS, f"--out={out}"]), {}
    assert {f.name.replace("_", " ") for f in (out / "claims").iterdir() if f.is_dir()} == names
    def parts(weights):  # sums: of the connector's tensors, of all others
        sums = {key: tensor.sum().item() for key, tensor in load_file(weights / "model.safetensors").items()}
        return ({k: x for k, x in sums.items() if (".connector." in k) == part} for part in (True, False))
    trained, others = parts(out / "pretrain")
    for name, seed in [(name, seed) for name in names for seed in (0, 1)]:
        row, folder = claims.ROWS[name], claims.folder_of(name, seed, run)
        own = {f.name for f in folder.iterdir() if f.is_dir() and not f.is_symlink()}
        before = folder / train.STAGES[row.stages[0]][-1]
        if row.start == "pretrain":
            connectors[name, seed], rest = parts(before)
            assert own == {before.name, *row.stages} and rest == others and connectors[name, seed] != trained
        else:
            assert own == set(row.stages) and before.samefile(claims.folder_of("full", seed, run) / row.start)
        for stage in row.stages:
            record = json.loads((folder / stage / "stage.json").read_text())
            world = {"instruct": claims.ShortcutWorld.digest}.get(stage, "shapes")
            assert (record["data"], record["seed"]) == (world, seed)
    assert connectors["full", 1] == connectors["without stage 1", 1] != connectors["full", 0]
    assert not connectors["query connector", 0].keys() & trained.keys()

def test_the_same_command_only_reads_and_the_table_holds_the_scores(out, monkeypatch):
    before = contents(out)  # logs hold times
    with monkeypatch.context() as patch:
        patch.setattr(sample, "Judge", lambda world: pytest.fail("scored already"))
        claims.main([*KEYS, f"--out={out}", ROWS, "--seeds=2"])
    assert contents(out) == before and (out / "claims" / "claims.png").is_file()
    folder, prompts = out / "claims/without_recovery/seed_1", claims.held_out(WORLD)
    want = sample.judge_pictures(sample.Judge(WORLD), sample.Pipeline(folder, "cpu").draw(prompts), prompts)
    marks = json.loads((folder / "scores.json").read_text())["marks"]
    assert np.allclose(np.mean(marks, 0), (want["cp"], want["pf"])) and len(prompts) == len(marks) == 8
    assert "| without recovery | 2 | " in (out / "claims" / "claims.md").read_text()
    claims.main([*KEYS, f"--out={out}", "--rows=full", "--model.sampling.cfg_scale=1"])  # scored again
    assert '"cfg_scale": 1.0' in (out / "claims/full/seed_0/scores.json").read_text()
    monkeypatch.setattr(claims.ShortcutWorld, "digest", "shapes, copy 0.3")
    with pytest.raises(ValueError, match="data=shapes, 100 subjects, copy 1, omit 0.2, .* copy 0.3"):
        claims.main([*KEYS, f"--out={out}", "--rows=full"])

def test_rows_see_as_many_samples_and_the_other_tasks_keep_their_proportions():
    run = train.parse(["tiny", "--align.steps=6", "--align.global_batch=8", "--instruct.steps=5"])
    assert claims.ROWS["stage 2 in place of stage 1"].keys(run) == {"instruct.steps": 5 + 2}
    assert claims.ROWS["without stage 1"].keys(run) == {}
    other = {"without recovery": {"recovery": 0}, "without segmentation in stage 2": {"segmentation": 0},
             "without subject-driven": {"subject_driven": 0}, "with multi-image": {"multi_image": 1500}}
    for name, row in claims.ROWS.items():
        mix = train.parse_mix(run.instruct.mix) | other.get(name, {})
        new = train.parse_mix(rebuild(run, flatten(run) | row.keys(run)).instruct.mix)
        assert new == {task: share for task, share in mix.items() if share}
    changed = claims.ROWS["without segmentation in stage 1"].keys(run)["align.mix"]
    assert train.parse_mix(changed) == {"text_to_image": 700, "reconstruction": 180}
    assert claims.ROWS["with multi-image"].keys(run)["instruct.lr"] == run.instruct.lr / 2

def test_standard_errors_and_directions():
    generator = np.random.default_rng(0)
    marks = np.stack([generator.integers(0, 5, (1, 300)) / 4, generator.integers(2, 5, (1, 300)) / 4], -1)
    parts, (cp, pf) = claims.parts_of(marks), marks.mean((0, 1))
    draws = marks[0, generator.integers(0, 300, (4000, 300))].mean(1)
    want = np.array([*draws.std(0), draws.prod(1).std()])  # a bootstrap
    assert np.allclose(claims.standard_error(parts), want, 0.06) and np.isclose(parts[..., 2].mean(), cp * pf)
    seeds = claims.standard_error(claims.parts_of(np.concatenate([marks, marks + [0.2, 0.0]])))
    assert seeds[0] == pytest.approx((want[0] ** 2 + 0.1**2) ** 0.5, rel=0.06)
    worse = marks - [0.1, 0.0] * (generator.random((1, 300, 1)) < 0.5)  # by 0.05, prompt by prompt: clear
    rows = {"full": marks, "without recovery": worse, "without subject-driven": marks + [-0.1, 0.1]}
    lines = claims.claims_text({name: m.tolist() for name, m in rows.items()}).splitlines()
    right = [line.strip("| ").split(" | ")[-1].split(" / ") for line in lines if line.startswith("| without")]
    assert float(right[0][0]) == pytest.approx(-0.05 / (0.05 / 300**0.5), rel=0.1)  # the paper's rises
    assert [mark[0] for mark in (right[0][2], *right[1])] == ["+"] * 4  # CP*PF falls, as the paper's
    assert lines[2].startswith(f"| full | 1 | {cp:.3f} ± {want[0]:.2f}") and f"{cp * pf:.3f} ± " in lines[2]
    assert "| 0.661 / 0.284 / 0.188 |" in lines[3]

@pytest.mark.parametrize("arguments, message", [
    (["tiny", "--rows=without pain"], "no row 'without pain', but full, without stage 1, "),
    (["tiny", "--seeds=0"], "--seeds=0: must be 1 or more"), ([], "must be a preset"),
    (["tiny", "--data=pets"], "--data=pets: claims are"), (["tiny", "--align.stepz=3"], "is --align.steps")])
def test_mistakes_get_a_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        claims.main(arguments)
