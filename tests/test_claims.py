"""The paper's claims as one command: what the rows change and share, that a stop costs little, and that the table says what was scored."""

import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import sample
import train
from data import COLORS, Placed, Rule, Sample, Scene, ShapeSubject
from mentor import SamplingConfig
from test_train import CPU, SHORT, equal, link_stages, run_stage, small_run, weights

FEW = ("--model.vision.patch_size=16", "--model.connector.n_query=2", "--vqgan.ch_mult=1,1,1,1", "--model.decoder.grid_size=4")  # short sequences: quick


@pytest.fixture(autouse=True, scope="module")
def few_prompts():
    scores = sample.claim_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "PROMPTS", 3)
        patch.setattr(sample, "FEWER_PROMPTS", 2)
        patch.setattr(sample, "SCALES", (2.0,))
        patch.setattr(sample, "claim_scores", lambda pipeline: {**scores(pipeline), "fingerprint": fingerprint(pipeline)})
        yield


def fingerprint(pipeline):
    """A number that tells weights apart, as pictures after six steps do not."""
    return sum(t.double().abs().sum().item() for t in pipeline.model.state_dict().values())


def claims(out):
    train.main(["tiny", *SHORT, *FEW, f"--out={out}", "--stage=claims"])
    return json.loads((out / "claims.json").read_text())


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The whole command, a few steps a stage, stopped once while a row trains and once while it is scored."""
    out, step, scores = tmp_path_factory.mktemp("claims") / "run", train.Log.step, sample.claim_scores

    def stop_training(self, done, *arguments):
        if "without_recovery" in str(self.folder) and done == 4:
            raise KeyboardInterrupt
        step(self, done, *arguments)

    def stop_scoring(pipeline):
        if "multi_image:1500" in str(pipeline.run):
            raise KeyboardInterrupt
        return scores(pipeline)

    for target, name, stop in ((train.Log, "step", stop_training), (sample, "claim_scores", stop_scoring)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, name, stop)
            claims(out)
    claims(out)
    return out


def test_nothing_is_trained_or_scored_twice_and_the_same_table_comes_again(out, monkeypatch):
    first = (out / "claims.json").read_text(), (out / "claims.md").read_text()
    for target, name in ((train, "build_stage"), (sample, "claim_scores"), (sample, "balance_scores")):
        monkeypatch.setattr(target, name, lambda *arguments: pytest.fail("done already"))
    claims(out)
    assert first == ((out / "claims.json").read_text(), (out / "claims.md").read_text())


def test_a_row_is_scored_again_when_its_sampling_has_changed(trained, tmp_path):
    out, scored = shutil.copytree(trained, tmp_path / "out"), []

    def compute(pipeline):
        scored.append(pipeline.model.config.sampling.cfg_scale)
        return {"cp": scored[-1]}

    for scale in (2.0, 2.0, 5.0):
        train.set_sampling(out / "instruct", SamplingConfig(cfg_scale=scale), CPU)
        assert train.remembered(tmp_path / "row.json", out / "instruct", compute, CPU) == {"cp": scale}
    assert scored == [2.0, 5.0]


def test_a_row_trains_only_what_differs_from_the_full_run(out):
    """Everything else is the full run's own folder, and what a row trains starts from the stage that the table names."""
    for name, row in train.ROWS.items():
        folder = out / "claims" / name.replace(" ", "_")
        assert folder.is_dir() == bool(row.stages)
        if not row.stages:
            continue
        before = train.STAGES[train.STAGES.index(row.stages[0]) - 1]
        assert {f.name for f in folder.iterdir() if not f.is_symlink()} - {".lock", "run.json", "spiece.model", *row.stages} == set()
        assert (folder / "tokenizer").resolve() == (out / "tokenizer").resolve()
        assert (folder / before).resolve() == (out / row.start).resolve()
    assert "encoder.connector.queries" in weights(out / "claims" / "query_connector", "pretrain")


@pytest.mark.parametrize("name, stage, task", [("without segmentation in stage 1", "align", "segmentation"), ("without recovery", "instruct", "recovery"),
                                               ("without segmentation in stage 2", "instruct", "segmentation"), ("without subject-driven", "instruct", "subject_driven")])
def test_a_removed_task_is_gone_and_the_others_keep_their_proportions(out, name, stage, task):
    mix = train.parse_mix(stage, json.loads((out / "claims" / name.replace(" ", "_") / stage / "stage.json").read_text())[f"{stage}.mix"])
    full = train.parse_mix(stage, getattr(small_run(), stage).mix)
    assert mix == {**full, task: 0} and full[task]
    dataset = data.WorldDataset(data.Shapes(32), mix, 0)
    assert {dataset[i].task for i in range(200)} == full.keys() - {task}
    log = train.read_log(out / "claims" / name.replace(" ", "_") / stage / "log.jsonl")
    assert log and not any(task in line for line in log)


def test_tuning_is_one_task_at_half_the_learning_rates():
    run = small_run("--instruct.lr=0.004", "--instruct.muon_lr=0.01")
    assert train.ROWS["in-context tuning"].keys(run) == {"instruct.mix": "in_context:1", "instruct.steps": 3, "instruct.lr": 0.002, "instruct.muon_lr": 0.005}


def test_rows_see_as_many_samples_as_the_full_run(out):
    run = small_run("--align.steps=6", "--align.global_batch=8", "--instruct.steps=5", "--instruct.global_batch=4")
    assert train.ROWS["without stage 1"].keys(run) == {"instruct.steps": 12 + 5}
    rows = json.loads((out / "claims.json").read_text())["rows"]
    for name, row in rows.items():
        assert row["samples"] == {"stage 1 alone": 24, "reconstruction tuning": 48 + 8, "in-context tuning": 48 + 12}.get(name, 48)
    log = train.read_log(out / "claims" / "without_stage_1" / "instruct" / "log.jsonl")
    assert log[-1]["step"] == 12 and (out / "claims" / "without_stage_1" / "align").resolve() == (out / "pretrain").resolve()


def test_the_table_holds_the_scores_of_its_rows(out):
    result, lines = json.loads((out / "claims.json").read_text()), (out / "claims.md").read_text().splitlines()
    for name, row in train.ROWS.items():
        folder = out / row.start if not row.stages else out / "claims" / name.replace(" ", "_") / row.stages[-1]
        pipeline = sample.Pipeline.open(folder, "cpu")
        assert result["rows"][name]["fingerprint"] == fingerprint(pipeline)
        line, = (line for line in lines if line.startswith(f"| {name} |"))
        assert all(f"{number:.3f}" in line for number in row.paper)
    prompts = sample.held_out_samples(pipeline.world(), "subject_driven", 3)
    scores = sample.judge_pictures(sample.ShapesJudge(pipeline.world()), pipeline.draw(prompts)[0], prompts)
    assert {k: result["rows"][name][k] for k in scores} == scores
    assert result["rows"]["query connector"]["image_tokens"] == 2 and result["rows"]["full"]["image_tokens"] == 4
    assert [line[0] for line in result["efficiency"]] == [4 * s for s in range(1, 13)] and all(len(line) == 4 for line in result["efficiency"])
    assert Image.open(out / "claims.png").height > (len(train.ROWS) + 2) * 32 * 3
    assert set(result["balance"]) == {"image and text", "image dropped", "text dropped", "both dropped", "guidance 2"}


def test_every_number_of_the_text_is_the_one_it_names(out):
    """The same text from scores that are all different."""
    result, numbers = json.loads((out / "claims.json").read_text()), iter(range(101, 10**6))

    def distinct(value):
        return {k: distinct(v) for k, v in value.items()} if isinstance(value, dict) else next(numbers) / 1000

    rows = result["rows"] = distinct(result["rows"])
    result["balance"] = distinct(result["balance"])
    sections = train.claims_text(result).split("**")
    text = {sections[i].split(".")[0]: sections[i + 1] for i in range(1, len(sections), 2)}
    show = lambda row, *keys: [f"{row[key]:.3f}" for key in keys]  # noqa: E731
    for name, row in rows.items():
        line, = (line for line in sections[0].splitlines() if line.startswith(f"| {name} |"))
        assert line.split(" | ")[3:6] == [" ± ".join(show(row, key, f"{key}_se")) for key in sample.MEASURES]
    full, one, multi, rebuilt, tuned = (rows[name] for name in ("full", "stage 1 alone", "with multi-image", "reconstruction tuning", "in-context tuning"))
    compared = {"1": [name for name in train.ROWS if name.startswith("without")], "2": ["query connector"], "3": ["with multi-image"]}
    for section, names in compared.items():
        assert [name for name in train.ROWS if f"- {name}: CP {rows[name]['cp'] - full['cp']:+.3f}" in text[section]] == names
    with_it, without_it = show(multi["two subjects"], "cp", "pf"), show(full["two subjects"], "cp", "pf")
    assert "CP {}, PF {} with it, {} and {} without".format(*with_it, *without_it) in text["3"]
    errors = [row[key] for row, key in ((one, "reconstruction_l2"), (full, "reconstruction_l2"), (rebuilt, "reconstruction_l2"), (full, "tokenizer_l2"))]
    assert " | ".join(f"{error:.3f}" for error in errors) in text["4"]
    for name, row in result["balance"].items():
        measured = [" ± ".join(show(row, key, f"{key}_se")) for key in sample.MEASURES]
        assert " | ".join([f"| {name}", *show(row, "loss"), *measured]) in text["5"]
    ious = show(one, "segmentation_iou", "named_iou", "other_iou")
    assert "IoU {}; of two subjects, {} with the one that is named and {} with the other".format(*ious) in text["6"]
    for when, row in (("before", full), ("after", tuned)):
        assert " | ".join([f"| {when}", *show(row["known_rules"], "whole", "parts"), *show(row["new_rules"], "whole", "parts")]) in text["6"]


def test_scores_in_the_log_leave_the_training_as_it_was(trained, tmp_path, monkeypatch):
    """Also where drawing changes the model: on a GPU it turns the weights into bfloat16, on a CPU it packs large ones."""
    ready = sample.make_ready
    monkeypatch.setattr(sample, "make_ready", lambda model, device: (sample.pack(model), ready(model, device))[1])
    begin = train.Log.__init__
    monkeypatch.setattr(train.Log, "__init__", lambda log, *arguments: (begin(log, *arguments), setattr(log, "every", 4))[0])  # lines are rarer than scores
    link_stages(trained, tmp_path, "tokenizer", "pretrain")
    run_stage(tmp_path, "align", "--score_every=2")
    assert equal(weights(tmp_path, "align"), weights(trained, "align"))
    scored = {line["step"]: line["cp"] for line in train.read_log(tmp_path / "align" / "log.jsonl") if "cp" in line}
    assert list(scored) == [2, 4, 6]
    world, pipeline = data.Shapes(32), sample.Pipeline.open(trained / "align", "cpu")
    prompts = sample.held_out_samples(world, "subject_driven", 2)
    assert scored[6] == round(sample.judge_pictures(sample.ShapesJudge(world), pipeline.draw(prompts)[0], prompts)["cp"], 6)


def test_directions_are_said_only_when_they_are_clear():
    row = lambda cp, pf, cp_pf, se: {"cp": cp, "pf": pf, "cp_pf": cp_pf, "cp_se": se, "pf_se": se, "cp_pf_se": se}  # noqa: E731
    said = train.against_full("without recovery", {"full": row(0.6, 0.9, 0.54, 0.01), "without recovery": row(0.7, 0.95, 0.55, 0.01)})
    assert "CP +0.100 ± 0.014, in the paper +0.106 (the same direction)" in said
    assert "PF +0.050 ± 0.014, in the paper -0.555 (the other direction)" in said
    assert "CP*PF +0.010 ± 0.014, in the paper -0.278 (no clear difference)" in said


def test_seeds_are_averaged_and_their_spread_counts():
    scores = [{"a": {"cp": cp, "cp_se": 0.03, "other": 2 * cp}} for cp in (0.5, 0.7)]
    mean = train.averaged(scores)["a"]
    assert mean["cp"] == pytest.approx(0.6) and mean["other"] == pytest.approx(1.2) and mean["cp_se"] == pytest.approx((0.03**2 + 0.1**2) ** 0.5)
    assert train.averaged(scores[:1]) == scores[0]


def test_more_seeds_train_stages_1_and_2_again(out, monkeypatch):
    """... in folders of their own, from the first seed's tokenizer and pretraining; only the rows that one seed does not tell from the
    full run, and those that were trained with more seeds before."""
    monkeypatch.setattr(train, "ROWS", {k: train.ROWS[k] for k in ("full", "without recovery", "without segmentation in stage 2")})
    monkeypatch.setattr(train, "claims_text", lambda result: train.table_of_rows(result["rows"]))
    monkeypatch.setattr(train, "difference", lambda rows, name, key: (0, 0, name != "without segmentation in stage 2"))
    run = small_run(*FEW, f"--out={out}", "--claims_seeds=2")
    world = data.Shapes(32)
    before = json.loads((out / "claims.json").read_text())["rows"]
    train.claims(run, train.start_machine(run), world, train.TextTokenizer.from_file(out / "spiece.model"))
    second = out / "claims" / "seed_1"
    assert (second / "pretrain").resolve() == (out / "pretrain").resolve() and not equal(weights(second, "align"), weights(out, "align"))
    assert (second / "claims" / "without_recovery" / "align").resolve() == (second / "align").resolve()
    other = json.loads((second / "claims" / "without_recovery.json").read_text())["scores"]
    assert json.loads((out / "claims.json").read_text())["rows"]["without recovery"]["cp"] == (before["without recovery"]["cp"] + other["cp"]) / 2
    assert sorted(file.name for file in (second / "claims").iterdir()) == ["full.json", "without_recovery", "without_recovery.json"]
    seeds = {"full": 2, "without recovery": 2, "without segmentation in stage 2": 1}
    assert all(re.search(rf"\| {name} \| \d+ \| {count} \|", (out / "claims.md").read_text()) for name, count in seeds.items())
    monkeypatch.setattr(train, "difference", lambda rows, name, key: (0, 0, name == "full"))
    train.claims(run, train.start_machine(run), world, train.TextTokenizer.from_file(out / "spiece.model"))
    assert {name: row["seeds"] for name, row in json.loads((out / "claims.json").read_text())["rows"].items()} == seeds


@pytest.mark.parametrize("arguments, message", [
    (["--stage=claims", "--world=emoji"], "--world=shapes and no --data"),
    (["--stage=claims", "--instruct.mix=subject_driven:2"], "its row 'without subject-driven' could not be trained .*all shares are 0.: change that key"),
    (["--stage=claims", "--dry_run=true"], "it has nothing for --stage=claims"),
    (["--stage=claims", "--model.context=80"], "--instruct.mix: prompts of in_context take 86 tokens, but --model.context=80: leave that task out"),
    (["--score_every=5", "--data=pets"], "--score_every=5: only a built-in world can be scored"),
])
def test_mistakes_get_a_message(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(["tiny", f"--out={tmp_path}", *arguments])


# What the claims are scored with


def placed(shape, color, place, size=0, color2=None, pattern=0):
    return Placed(ShapeSubject(shape, color, color if color2 is None else color2, pattern), place, size)


def test_the_judge_reads_two_subjects_in_either_order(world):
    judge, samples = sample.ShapesJudge(world), sample.held_out_samples(world, "multi_image", 12)
    for s in samples:
        seen = judge.read_two(s.target)
        assert seen[:2] == s.scene[:2] and set(seen.subjects) == set(s.scene.subjects)
    scores = sample.judge_pictures(judge, [s.target for s in samples], samples)
    assert scores["cp"] == scores["pf"] == 1 and scores["cp_se"] == 0


def test_two_subjects_are_scored_each(world):
    a, b = placed(0, 1, 0), placed(1, 2, 8)
    meant = Scene(0, 0, (a, b))
    seen = Scene(0, 1, (placed(0, 1, 2), b))  # one subject elsewhere, another pattern behind
    assert sample.concept_preservation(seen, meant) == 1 and sample.prompt_following(seen, meant) == 0.5
    assert sample.concept_preservation(Scene(0, 0, (placed(0, 3, 0), b)), meant) == 6 / 8


def test_standard_errors_are_those_of_a_bootstrap():
    generator = np.random.default_rng(0)
    marks = np.stack([generator.integers(0, 5, 200) / 4, generator.integers(2, 5, 200) / 4], 1)
    meant = [Sample("", "", [], [], None, Scene(*(0, 0), (placed(0, 0, 0),))) for _ in marks]
    judge = SimpleNamespace(attributes=tuple, read=iter([Scene(*(i, i), (s,)) for i, s in enumerate([placed(0, 0, 0)] * 200)]).__next__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "concept_preservation", lambda seen, meant, attributes: marks[seen.color, 0])
        patch.setattr(sample, "prompt_following", lambda seen, meant: marks[seen.color, 1])
        judge.read = lambda picture: Scene(picture, 0, (placed(0, 0, 0),))
        scores = sample.judge_pictures(judge, range(200), meant)
    draws = marks[generator.integers(0, 200, (4000, 200))].mean(1)
    assert scores["cp_se"] == pytest.approx(draws[:, 0].std(), rel=0.05) and scores["pf_se"] == pytest.approx(draws[:, 1].std(), rel=0.05)
    assert scores["cp_pf_se"] == pytest.approx(draws.prod(1).std(), rel=0.05) and scores["cp_pf"] == pytest.approx(scores["cp"] * scores["pf"])


def test_a_rules_pictures_pixel_by_pixel(world):
    """A big star, red with blue stripes, at the right on plain green: painted cyan, moved to the top left, cut out."""
    scene = Scene(3, 0, (placed(4, 0, 5, 1, 5, 1),))
    painted, moved = (data.draw_rule(world, rule, scene) for rule in (Rule(4, None, False), Rule(None, 0, False)))
    assert (painted[16, 20] == COLORS["cyan"]).all() and (painted == world.draw(Scene(3, 0, (placed(4, 4, 5, 1),)))).all()
    assert (moved == world.draw(Scene(3, 0, (placed(4, 0, 0, 1, 5, 1),)))).all()
    cut = data.draw_rule(world, Rule(4, 0, True), scene)
    assert (cut == world.cut_out(placed(4, 4, 0, 1))).all() and (cut[31] == 0).all() and (cut[12, 12] == COLORS["cyan"]).all()


def test_in_context_pairs_follow_one_rule_that_no_word_tells(world):
    seen, new = data.rules("shapes"), data.rules("shapes", new=True)
    assert len(seen) + len(new) == 9 * 5 * 2 - 1 and new and not set(seen) & set(new)
    for part in range(3):  # every part of a rule is known from training, only combinations are new
        assert {r[part] for r in seen} == {r[part] for r in seen + new}
    prompts = set()
    for i in range(30):
        for held_out, new_rule in ((False, False), (True, False), (True, True)):
            s = data.in_context(world, random.Random(i), held_out, new_rule)
            rule = random.Random(i).choice(new if new_rule else seen)
            a, after_a, b, after_b, query = s.images
            assert (s.target == data.draw_rule(world, rule, s.scene)).all() and (query == world.draw(s.scene)).all()
            judge = sample.ShapesJudge(world)
            if i < 3:
                assert all((data.draw_rule(world, rule, judge.read(x)) == y).all() for x, y in ((a, after_a), (b, after_b)))
            assert held_out == world.held_out(s.scene.subjects[0].subject) and (held_out or not world.held_out(data.follow(rule, s.scene).subjects[0].subject))
            prompts.add(s.prompt)
    assert len(prompts) == 1


def test_rule_following_takes_the_nearest_outcome(world):
    samples = [data.in_context(world, random.Random(i), True, True) for i in range(4)]
    noisy = [np.clip(s.target.astype(int) + np.random.default_rng(0).integers(-9, 10, s.target.shape), 0, 255).astype(np.uint8) for s in samples]
    assert sample.rule_following(world, noisy, samples) == {"whole": 1, "parts": 1}
    assert sample.rule_following(world, [s.images[-1] for s in samples], samples)["whole"] == 0  # drawing the query again follows no rule
    rule = random.Random(0).choice(data.rules("shapes", new=True))
    partly = data.draw_rule(world, rule._replace(cut=not rule.cut), samples[0].scene)
    assert sample.rule_following(world, [partly], samples[:1]) == {"whole": 0, "parts": pytest.approx(2 / 3)}


def test_naming_asks_for_each_of_two_subjects(world):
    samples = sample.naming_samples(world, 8)
    for one, other in zip(samples[::2], samples[1::2]):
        assert (one.images[0] == other.images[0]).all() and one.prompt != other.prompt
        assert not ((one.target > 0) & (other.target > 0)).any() and (one.target > 0).any() and (other.target > 0).any()
        assert f"The {one.names[0]} in <image>." == one.prompt
