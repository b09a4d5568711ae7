"""Sampling filters, the judge, the scores, and the command line's messages."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import few_steps
from data import PATTERNS, Placed, Sample, Scene
from mentor import SamplingConfig
from sample import ShapesJudge, choose, concept_preservation, filter_logits, judge_pictures, pixel_l2, prompt_following, segmentation_iou


def test_top_k_keeps_ties_and_top_p_keeps_the_best():
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    assert filter_logits(logits, 1.0, 2, 1.0).isfinite().tolist() == [[True, True, True, False]]
    assert filter_logits(logits, 1.0, 0, 0.0001).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, 1.0, 0, 1.0).isfinite().all()
    torch.testing.assert_close(filter_logits(logits, 0.5, 0, 1.0), logits * 2)


def test_choose_draws_from_the_distribution():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    drawn = choose(probabilities.log().expand(20000, 3), SamplingConfig(), generator)
    torch.testing.assert_close(torch.bincount(drawn) / 20000, probabilities, atol=0.015, rtol=0)
    assert choose(torch.tensor([[0.0, 1.0]]), SamplingConfig(temperature=0.0), generator).item() == 1


@pytest.fixture(scope="module")
def judge(world):
    return ShapesJudge(world)


def test_the_judge_reads_true_renders_perfectly(world, judge):
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(100):
            scene = world.random_scene(rng, world.random_subjects(rng, 1, held_out))
            assert judge.read(world.draw(scene)) == scene


def test_the_judge_finds_the_nearest_render_of_a_noisy_picture(world, judge):
    """On noise there is no right answer, but no scene a random search finds may be nearer than the judge's."""
    rng = random.Random(1)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    distance = lambda scene: np.square(world.draw(scene).astype(float) - picture).sum()  # noqa: E731
    found = distance(judge.read(picture))
    assert all(found <= distance(world.random_scene(rng, world.random_subjects(rng, 1))) for _ in range(300))


def test_the_judges_shortlist_is_long_enough(judge, monkeypatch):
    pictures = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in (7, 9, 17, 19)]
    found = [judge.read(picture) for picture in pictures]
    monkeypatch.setattr(judge, "SHORTLIST", 400)
    assert [judge.read(picture) for picture in pictures] == found


def test_scores_count_attributes(world):
    rng = random.Random(2)
    a = world.random_scene(rng, world.random_subjects(rng, 1))
    placed = a.subjects[0]
    assert concept_preservation(a, a) == prompt_following(a, a) == 1
    other = placed.subject._replace(shape=(placed.subject.shape + 1) % 8)
    assert concept_preservation(a._replace(subjects=(placed._replace(subject=other),)), a) == 0.75
    moved = Scene((a.color + 1) % 8, (a.pattern + 1) % len(PATTERNS), (Placed(placed.subject, (placed.place + 1) % 9, placed.size),))
    assert prompt_following(moved, a) == 0.25 and concept_preservation(moved, a) == 1


def test_bounds_are_what_they_claim(world, judge):
    samples = sample.held_out_samples(world, "subject_driven", 40)
    assert all(world.held_out(s.scene.subjects[0].subject) for s in samples)
    true = judge_pictures(judge, [s.target for s in samples], samples)
    copied = judge_pictures(judge, [s.images[0] for s in samples], samples)
    assert true["cp"] == true["pf"] == 1
    assert copied["cp"] == 1 and copied["pf"] < 0.5 and copied["cp_over_pf"] == pytest.approx(1 / copied["pf"])


def test_cp_is_told_by_the_subjects_pattern(world, judge):
    """Drawings of striped subjects are right, all others have another shape."""
    samples, pictures = sample.held_out_samples(world, "subject_driven", 12), []
    for s in samples:
        placed, = s.scene.subjects
        other = placed.subject._replace(shape=(placed.subject.shape + (PATTERNS[placed.subject.pattern] != "striped")) % 8)
        pictures.append(world.draw(s.scene._replace(subjects=(placed._replace(subject=other),))))
    scores = sample.cp_by_pattern(judge, pictures, samples)
    assert len(scores) > 2 and scores == {pattern: 1 if pattern == "striped" else 0.75 for pattern in scores}


class Perfect(SimpleNamespace):
    """A pipeline that draws every target and notes what it was asked for."""

    def __init__(self, world):
        super().__init__(model=SimpleNamespace(config=SimpleNamespace(sampling=SamplingConfig(cfg_scale=3.0))), world=lambda: world, asked=[])

    def draw(self, samples, sampling=None, seed=0):
        self.asked.append((samples, (sampling or self.model.config.sampling).cfg_scale))
        return [s.target for s in samples], torch.zeros(len(samples), 64)

    def rebuild(self, pictures):
        return [p // 2 for p in pictures]


def test_every_score_of_a_perfect_model(world, tmp_path, capsys):
    pipeline = Perfect(world)
    scores = sample.score(pipeline, tmp_path)
    assert [scale for _, scale in pipeline.asked] == [3, 3, 3, 1, 2, 4, 7.5]
    assert scores["cp"] == scores["pf"] == scores["segmentation_iou"] == 1 and scores["reconstruction_l2"] == 0
    rebuilt, copied = (scores["bounds"][name] for name in ("tokenizer", "copying the reference"))
    assert rebuilt["reconstruction_l2"] > 0 and copied["cp"] == 1 and copied["pf"] < 0.7
    scores = sample.claim_scores(pipeline)
    assert scores["named_iou"] == scores["known_rules"]["whole"] == scores["new_rules"]["whole"] == scores["two subjects"]["cp"] == scores["repeats"] == 1
    assert scores["other_iou"] == scores["reconstruction_l2"] == 0 < scores["tokenizer_l2"]


def test_balance_takes_away_one_part_at_a_time(world, monkeypatch):
    monkeypatch.setattr(sample, "next_code_loss", lambda pipeline, samples: 0.0)
    pipeline = Perfect(world)
    asked = dict(zip(sample.balance_scores(pipeline), pipeline.asked))
    assert {name: scale for name, (_, scale) in asked.items()} == {
        "image and text": 3, "image dropped": 3, "text dropped": 3, "both dropped": 0, "guidance 1": 1, "guidance 2": 2, "guidance 4": 4, "guidance 7.5": 7.5}
    parts = {name: [("<image>" in s.prompt, len(s.images), "background" in s.prompt, s.drop) for s in samples] for name, (samples, _) in asked.items()}
    for name, expected in (("image and text", (True, 1, True, False)), ("image dropped", (False, 0, True, False)), ("text dropped", (True, 1, False, False)),
                           ("both dropped", (True, 1, True, True)), ("guidance 4", (True, 1, True, False))):
        assert parts[name] == [expected] * 3


def test_pixel_scores():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    half = white.copy()
    half[:2] = 0
    target = [Sample("", "", [], [], half, None)]
    assert pixel_l2([half], target) == 0 and abs(pixel_l2([white], target) - 0.5**0.5) < 1e-6
    assert pixel_l2([half, white], target * 2) == pytest.approx(0.5**1.5)  # the mean of each picture's
    dark = half.copy()
    dark[:2] = 64
    assert segmentation_iou([dark], target) == 1  # still black
    assert segmentation_iou([half], target) == 1 and segmentation_iou([white], target) == 0.5 and segmentation_iou([black], target) == 0


def test_a_sheet_shows_reference_drawing_and_ideal_in_this_order(tmp_path):
    red, green, blue = (np.full((32, 32, 3), np.eye(3, dtype=np.uint8)[i] * 255) for i in range(3))
    sample.save_sheet([Sample("", "A star", [red], [""], blue, None)], [green], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    left = [np.flatnonzero((sheet == 255 * np.eye(3, dtype=int)[i]).all(-1).any(0))[0] for i in range(3)]
    assert left == sorted(left) and left[1] > left[0] + 300  # the prompt stands between reference and drawing


def test_an_animation_shows_the_codes_drawn_so_far(tmp_path):
    shades = lambda codes: [np.repeat(row.reshape(2, 2).numpy().astype(np.uint8), 16, 0).repeat(16, 1)[..., None].repeat(3, 2) for row in codes]  # noqa: E731
    pipeline = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(decoder=SimpleNamespace(grid_size=2))), decode=shades)
    sample.save_gif(pipeline, torch.tensor([0, 60, 120, 250]), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        for i in range(4):
            gif.seek(i)
            cells = np.asarray(gif.convert("L"))[64::128, 64::128].flatten().astype(int)
            assert np.abs(cells - [*[0, 60, 120, 250][: i + 1], *[200] * (3 - i)]).max() < 8


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder as `python train.py tiny` leaves it, after two steps a stage."""
    import train

    folder = tmp_path_factory.mktemp("run") / "tiny"
    train.main(["tiny", f"--out={folder}", *few_steps(steps=2, global_batch=4)])
    return folder


@pytest.fixture(autouse=True, scope="module")
def few_prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "PROMPTS", 6)
        patch.setattr(sample, "FEWER_PROMPTS", 3)
        yield


def test_training_leaves_scores_pictures_and_a_folder_that_opens(out):
    scores = json.loads((out / "scores.json").read_text())
    assert {"cp", "pf", "cp_pf", "cp_over_pf", "reconstruction_l2", "segmentation_iou", "bounds", "guidance"} <= scores.keys()
    assert set(scores["guidance"]) == {"1", "2", "4", "7.5"} and scores["bounds"]["true renders"]["cp"] == 1
    for name in ("sheet.png", "curves.png", "guidance.png"):
        assert Image.open(out / name).width > 100
    assert sample.newest_stage(out)[1] == out / "instruct"
    for stage in ("pretrain", "align", "instruct"):
        assert sample.Pipeline.open(out / stage, "cpu").model.config == sample.Pipeline.open(out, "cpu").model.config


def test_command_line_draws_reconstructs_and_segments(out, tmp_path, world, capsys):
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(tmp_path / "ref.png")
    picture = tmp_path / "drawn.png"
    sample.main([str(out), r"The star in <image>.\nA big star at the top left on a green striped background", f"--images={tmp_path}/ref.png", f"--out={picture}", "--gif", "--n=5"])
    assert Image.open(picture).size == (4 * 256 + 5 * 8, 2 * 256 + 3 * 8)
    assert Image.open(tmp_path / "drawn.gif").n_frames > 20
    assert "codes/s" in capsys.readouterr().out
    sample.main([str(out), "A big red star at the top on a green background", f"--out={picture}", "--temperature=0", "--cfg_scale=1"])
    assert "temperature 0 takes the likeliest code each time: such pictures are flat" in capsys.readouterr().out
    sample.main([str(out), "", f"--out={picture}"])  # an empty prompt is one
    sample.main([str(out), f"--reconstruct={tmp_path}/ref.png", f"--out={picture}"])
    pipeline, target = sample.Pipeline.open(out, "cpu"), Sample("", "", [], [], np.zeros((32, 32, 3), np.uint8), None)
    said = f"pixel L2: tokenizer {pixel_l2(pipeline.rebuild([target.target]), [target]):.4f}, model "
    assert Image.open(picture).width == 3 * 256 + 4 * 8 and said in capsys.readouterr().out
    sample.main([str(out), "--segment=star", f"--images={tmp_path}/ref.png", f"--out={picture}"])


def test_dreambench_is_written_as_its_scorer_reads_it(out, tmp_path):
    for group, number, words in (("live_subject/animal", "00", "Star\nA big star on a green background\nA small star at the top\n"), ("object", "07", "ring\na ring at the left\n")):
        for kind in ("images", "captions"):
            (tmp_path / "bench" / kind / group).mkdir(parents=True)
        Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / "bench" / "images" / group / f"{number}.jpg")
        (tmp_path / "bench" / "captions" / group / f"{number}.txt").write_text(words)
    sample.main([str(out), f"--dreambench={tmp_path}/bench", f"--out={tmp_path}/drawn", "--n=2"])
    names = {p.relative_to(tmp_path / "drawn").as_posix() for p in (tmp_path / "drawn").rglob("*.*")}
    stems = [f"live_subject_animal_00_star/{i}_{j}" for i in (0, 1) for j in (0, 1)] + ["object_07_ring/0_0", "object_07_ring/0_1"]
    assert names == {f"{kind}/{stem}.{end}" for stem in stems for kind, end in (("src_image", "jpg"), ("text", "txt"), ("tgt_image", "jpg"))}
    assert (tmp_path / "drawn/text/live_subject_animal_00_star/1_0.txt").read_text() == "A small star at the top"
    assert Image.open(tmp_path / "drawn/src_image/object_07_ring/0_1.jpg").size == (70, 50) and Image.open(tmp_path / "drawn/tgt_image/object_07_ring/0_1.jpg").size == (32, 32)
    for name, content, message in (("captions/object/07.txt", b"ring\n" + b"a ring at the left " * 40, "reads at most 96"), ("captions/object/07.txt", b"ring\na \xff ring", "07.txt: not UTF-8 text"),
                                   ("images/object/07.jpg", b"no picture", "07.jpg: not a readable image")):
        before = (tmp_path / "bench" / name).read_bytes()
        (tmp_path / "bench" / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            sample.main([str(out), f"--dreambench={tmp_path}/bench", f"--out={tmp_path}/none"])
        assert not (tmp_path / "none").exists()  # though the first subject is fine
        (tmp_path / "bench" / name).write_bytes(before)
    for kind, end in (("captions", "txt"), ("images", "jpg")):
        (tmp_path / "bench" / kind / "more/object").mkdir(parents=True)
        shutil.copy(tmp_path / "bench" / kind / f"object/07.{end}", tmp_path / "bench" / kind / "more/object")
    with pytest.raises(ValueError, match="two subjects would share the folder object_07_ring"):
        sample.main([str(out), f"--dreambench={tmp_path}/bench"])
    shutil.rmtree(tmp_path / "bench/captions/more")
    (tmp_path / "bench/images/object/07.jpg").unlink()
    with pytest.raises(ValueError, match="07.txt: there is no picture .*07.jpg"):
        sample.main([str(out), f"--dreambench={tmp_path}/bench"])
    with pytest.raises(ValueError, match="no captions/.*give DreamBench"):
        sample.main([str(out), f"--dreambench={tmp_path}/drawn"])


def test_the_first_dreambench_is_drawn_in_the_same_layout(out, tmp_path):
    prompts = "'a {0} {1} at the %s'.format(unique_token, class_token)"
    (tmp_path / "prompts_and_classes.txt").write_text("\n".join([
        "Classes\n\nsubject_name,class\nstar_toy,big-star\ncat2, cat \n\nPrompts\n\nObject Prompts\n\nprompt_list = [", prompts % "left" + ",", prompts % "right", "]\n",
        "Live Subject Prompts\n\nprompt_list = [", prompts % "top", "]\n"]))
    for name in ("star_toy/02", "star_toy/00", "cat2/03"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((50, 70 + int(name[-1]), 3), 90, np.uint8)).save(tmp_path / f"{name}.jpg")
    assert [(s[0], s[1].name, *s[2:]) for s in sample.dreambench_subjects(tmp_path)] == [
        ("star_toy", "00.jpg", "big-star", ["a big-star at the left", "a big-star at the right"]), ("cat2", "03.jpg", "cat", ["a cat at the top"])]
    with pytest.raises(ValueError, match="'big-star'"):
        sample.main([str(out), f"--dreambench={tmp_path}"])
    (tmp_path / "prompts_and_classes.txt").write_text((tmp_path / "prompts_and_classes.txt").read_text().replace("cat2, cat \n", "").replace("big-star", "big star"))
    sample.main([str(out), f"--dreambench={tmp_path}", f"--out={tmp_path}/drawn"])
    assert {p.relative_to(tmp_path / "drawn").as_posix() for p in (tmp_path / "drawn").rglob("*.*")} == {
        f"{kind}/star_toy/{i}_0.{end}" for i in (0, 1) for kind, end in (("src_image", "jpg"), ("text", "txt"), ("tgt_image", "jpg"))}
    (tmp_path / "star_toy" / "00.jpg").unlink()
    (tmp_path / "star_toy" / "02.jpg").unlink()
    with pytest.raises(ValueError, match="prompts_and_classes.txt: there is no picture in .*star_toy"):
        sample.main([str(out), f"--dreambench={tmp_path}"])


def test_the_same_seed_draws_the_same_picture(out):
    pipeline = sample.Pipeline.open(out, "cpu")
    prompt = Sample("", "A big red star at the top on a green background", [], [], None, None)
    first, again, other = (pipeline.draw([prompt] * 2, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_command_line_passes_its_seed_on(out, tmp_path, monkeypatch):
    seeds, draw = [], sample.Pipeline.draw
    monkeypatch.setattr(sample.Pipeline, "draw", lambda self, samples, sampling=None, seed=0: seeds.append(seed) or draw(self, samples, sampling, seed))
    sample.main([str(out), "A big red star", f"--out={tmp_path}/a.png", "--seed=7"])
    assert seeds == [7]


@pytest.mark.parametrize("arguments, message", [
    (["A big red staar on a green background"], "'staar'.*star"),
    (["The star in <image>."], "1 <image> placeholders, but 0 images"),
    (["A star", "--images=REF"], "0 <image> placeholders, but 1 images"),
    (["The star in <image>.\n" * 6, "--images", *["REF"] * 6], "reads at most 96.*fewer images"),
    (["A star", "--top_p=1.5"], "--top_p=1.5: must be at least 0 and at most 1"),
    (["A star", "--cfg_scale=inf"], "--cfg_scale=inf: must be at least 0 and at most 1000000"),
    (["A star", "--cfg_scale=1e38"], "--cfg_scale=1e\\+38: must be at least 0 and at most 1000000"),  # logits beyond float32
    (["A star", "--temperature=nan"], "--temperature=nan: must be at least 0"),
    (["A star", "--n=0"], "--n=0: must be at least 1"),
    (["A star", "--n=100000000000000000000"], "--n=100000000000000000000: must be at least 1 and at most 1000000"),
    (["A star", "--segment=star", "--images=REF"], "--segment and a prompt: give one of them"),
    (["--reconstruct=REF", "--score"], "--reconstruct and --score: give one of them"),
    ([], "give a prompt"),
    (["red A q"], "'q'; similar known words: ([^,]+, ){20}\\.\\.\\.$"),
    (["--segment=star"], "--segment=star: give one image to cut it out of, --images=FILE; got 0"),
    (["--segment=star", "--images", "REF", "REF"], "--images=FILE; got 2"),
    (["--score", "--temperature=0", "--seed=3"], "--score draws as the model's config.json says, with seed 0: leave out --temperature, --seed"),
    (["--score", "--n=3", "--gif", "--images=REF"], "--score draws .*: leave out --n, --images, --gif"),
    (["--reconstruct=REF", "--n=4", "--images=REF"], "--reconstruct draws .*: leave out --n, --images"),
    (["--dreambench=REF", "--gif"], "--dreambench draws .*: leave out --gif"),
    (["--bench=tiny", "--n=4", "--out=x.png"], "--bench measures .*: leave out --n, --out"),
    (["--score", "--out=REF/scores"], "ref.png/scores: must be a folder, an existing or a new one, but .*ref.png is a file"),
    *((["A star", f"--out=x.{end}"], f"--out=x.{end}: must end in .png") for end in ("psd", "msp", "gif")),
    (["The star in <image>.", "--images=nothing.png"], "nothing.png: there is no such image"),
])
def test_mistakes_get_a_message(out, tmp_path, arguments, message):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "ref.png")
    with pytest.raises(ValueError, match=message):
        sample.main([str(out), *(a.replace("REF", str(tmp_path / "ref.png")) for a in arguments), *[f"--out={tmp_path}/x.png"] * ("--out" not in " ".join(arguments))])
    assert not (tmp_path / "x.png").exists()


def test_folders_that_hold_no_model_or_another_tokenizer_are_refused(out, tmp_path):
    with pytest.raises(ValueError, match="holds no trained model"):
        sample.Pipeline.open(tmp_path, "cpu")
    import shutil

    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "tokenizer" / "model.safetensors").write_bytes((copy / "tokenizer" / "model.safetensors").read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        sample.Pipeline.open(copy, "cpu")


def test_the_model_that_comes_along_draws_what_it_is_told(world, judge):
    pipeline = sample.Pipeline.open(Path(__file__).parent.parent / "trained" / "tiny", "cpu")
    samples = [s for s in sample.held_out_samples(world, "text_to_image", 40) if len(s.scene.subjects) == 1][:24]
    scores = judge_pictures(judge, pipeline.draw(samples)[0], samples)
    assert scores["cp"] > 0.6 and scores["pf"] > 0.9


@pytest.mark.parametrize("name", ["meta", "nonsense", "cuda:99"])
def test_devices_that_cannot_draw_are_refused(name):
    with pytest.raises(ValueError, match=f"--device={name}: torch cannot use it here .*; leave out --device"):
        sample.usable_device(name)
