"""Choosing codes, drawing, the judge and the scores, and the command line."""

import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode

import sample
from conftest import ROOT, contents
from data import Placed, Sample, Scene, Samples
from mentor import SamplingConfig
from sample import Judge, Pipeline, choose, filter_logits, judge_pictures, through_codes
from tokenizer import TextTokenizer

TRAINED = ROOT / "trained" / "tiny"
PROMPT = "A big red star at the top left on a green background"

def held_out(world, task, count):
    dataset = Samples(world, {task: 1.0}, "scores", held_out=True)
    return [dataset[i] for i in range(count)]

def near(a, b):
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1  # rounding

# --- Choosing a code
def test_top_k_keeps_ties_and_top_p_the_best():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 9.0]])
    kept = lambda *arguments: filter_logits(logits, *arguments).isfinite().int().tolist()  # noqa: E731
    assert kept(1.0, 2, 1.0) == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert kept(1.0, 1, 1.0) == kept(1.0, 0, 1e-9) == kept(1.0, 0, 0.0) == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert kept(1.0, 0, 1.0) == kept(1.0, 4, 1.0) == kept(1.0, 99, 1.0) == [[1] * 4] * 2
    torch.testing.assert_close(filter_logits(logits, 0.5, 0, 1.0), logits * 2)
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for *arguments, count in ((1, 0, 0.49, 1), (1, 0, 0.51, 2), (1, 0, 0.79, 2), (1, 0, 0.81, 3),
                              (0.1, 0, 0.9, 1), (1, 2, 0.6, 1)):  # of what temperature and top-k left
        assert filter_logits(shares, *arguments).isfinite().sum() == count

def test_codes_are_drawn_from_the_distribution():
    shares, generator = torch.tensor([0.6, 0.3, 0.1]), torch.Generator().manual_seed(0)
    for temperature, top_k, expected in ((1.0, 0, shares), (0.5, 0, shares**2 / (shares**2).sum()),
                                         (1.0, 2, torch.tensor([2 / 3, 1 / 3, 0]))):
        sampling = SamplingConfig(temperature=temperature, top_k=top_k)
        drawn = choose(shares.log().expand(20000, 3), sampling, [generator] * 20000)
        assert drawn.shape == (20000,) and drawn.dtype == torch.int64
        torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 20000, expected, atol=0.015, rtol=0)
    best = choose(torch.tensor([[0.0, 1.0], [5.0, 1.0]]), SamplingConfig(temperature=0.0), [generator] * 2)
    assert best.tolist() == [1, 0]

# --- Drawing
def test_each_picture_has_its_own_seed(pipeline, world):
    """The fifth of eight can be drawn alone, and beside other prompts, in any batches."""
    prompts = [Sample("", PROMPT, [])] * 4 + held_out(world, "subject_driven", 4)
    sampling = SamplingConfig(cfg_scale=2.0)
    eight, in_threes = (pipeline.draw(prompts, sampling, 3, size) for size in (8, 3))
    alone = [pipeline.draw([prompts[i]], sampling, 3 + i)[0] for i in (0, 4, 7)]
    assert all(map(near, alone, [eight[i] for i in (0, 4, 7)])) and all(map(near, in_threes, eight))
    assert len({picture.tobytes() for picture in eight[:4]}) == 4  # one prompt, four pictures

def test_drawing_reads_no_number_back(model, make_batch):
    """A GPU would have to be waited for; with FakeTensorMode, whose tensors hold nothing, it fails."""
    batch, sampling = make_batch(model.config, 3), SamplingConfig(cfg_scale=3.0, top_k=9, top_p=0.9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        codes = sample.generate(model, batch, sampling, [None] * 3)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            codes.max().item()

def test_the_trained_model_draws_what_it_is_told(pipeline, world):
    asked = [s for s in held_out(world, "text_to_image", 30) if len(s.scene.subjects) == 1][:16]
    scores = judge_pictures(Judge(world), pipeline.draw(asked), asked)
    assert scores["cp"] > 0.6 and scores["pf"] > 0.9
    targets = [s.target for s in held_out(world, "text_to_image", 8)]
    rebuilt = through_codes(pipeline.vqgan, [t.repeat(2, 0).repeat(2, 1) for t in targets])  # of any size
    errors = [np.square((a.astype(float) - b) / 255).mean() ** 0.5 for a, b in zip(rebuilt, targets)]
    assert np.mean(errors) < 0.08

def test_a_folder_is_opened_at_its_last_finished_stage(pipeline, tmp_path, monkeypatch):
    out = shutil.copytree(TRAINED, tmp_path / "out")
    shutil.copytree(out / "instruct", out / "align")
    config = json.loads((out / "align" / "config.json").read_text())
    (out / "align" / "config.json").write_text(json.dumps(config | {"sampling.cfg_scale": 5.0}))
    scale = lambda folder: Pipeline(folder, "cpu").model.config.sampling.cfg_scale  # noqa: E731
    assert scale(out) == pipeline.model.config.sampling.cfg_scale != 5 and scale(out / "align") == 5
    (out / "instruct" / "model.safetensors").unlink()  # still in training
    assert scale(out) == 5 and not pipeline.model.training and not pipeline.vqgan.training
    monkeypatch.chdir(out / "align")
    assert scale(".") == 5

@pytest.mark.parametrize("name, change, message", [
    ("spiece.model", lambda whole: TextTokenizer.train(["another text"]).proto, "was trained with another"),
    ("tokenizer/model.safetensors", lambda whole: whole[:-4] + b"\1\2\3\4", "was trained with another"),
    ("spiece.model", lambda whole: whole[:999], "spiece.model"),
    ("tokenizer/model.safetensors", lambda whole: None, "model.safetensors is missing"),
    ("instruct/stage.json", lambda whole: None, "holds no trained model.*python train.py tiny")])
def test_a_folder_whose_parts_do_not_belong_together_is_refused(tmp_path, name, change, message):
    out = shutil.copytree(TRAINED, tmp_path / "out")
    changed = change((out / name).read_bytes())
    (out / name).unlink() if changed is None else (out / name).write_bytes(changed)
    with pytest.raises(ValueError, match=message) as error:
        Pipeline(out, "cpu")
    assert (name == "spiece.model" or str(out) in str(error.value)) and "\n" not in str(error.value)

# --- The judge and the scores
@pytest.fixture(scope="module")
def judge(world):
    return Judge(world)

def test_the_judge_reads_true_renders_perfectly(world, judge):
    rng = random.Random(0)
    scenes = [world.random_scene(rng, world.random_subjects(rng, 1, i % 2 == 0)) for i in range(200)]
    assert judge.read([world.draw(scene) for scene in scenes]) == scenes

def test_the_judge_finds_the_nearest_render(world, judge):
    """No scene that a random search finds is nearer to noise than the judge's, on the same background."""
    rng, noise = random.Random(1), np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    distance = lambda scene: np.square(world.draw(scene).astype(float) - noise).sum()  # noqa: E731
    found, = judge.read([noise])
    for _ in range(300):
        other = world.random_scene(rng, world.random_subjects(rng, 1))
        assert distance(found) <= distance(found._replace(subjects=other.subjects))

def test_scores_count_attributes(world, judge):
    asked = held_out(world, "subject_driven", 40)
    assert not {s.scene.subjects[0].subject for s in asked} & set(world.train_subjects)
    drawn = []
    for color, pattern, ((subject, place, size),) in (s.scene for s in asked):
        wrong = Placed(subject._replace(shape=(subject.shape + 1) % 8), (place + 1) % 9, size)
        drawn.append(world.draw(Scene((color + 1) % 8, (pattern + 1) % 4, (wrong,))))
    scores = judge_pictures(judge, drawn, asked)
    assert (scores["cp"], scores["pf"], scores["cp_pf"]) == (0.75, 0.25, 0.1875)

def test_copying_the_reference_follows_the_prompt_by_chance_only(world, judge):
    asked = held_out(world, "subject_driven", 512)
    copied = judge_pictures(judge, [s.images[0] for s in asked], asked)
    assert copied["cp"] == 1 and copied["pf"] == pytest.approx(0.2446, abs=5e-5)

def test_a_perfect_model_has_perfect_scores(pipeline, tmp_path, capsys):
    perfect = SimpleNamespace(size=32, record={"data": "shapes"}, vqgan=pipeline.vqgan)
    perfect.draw = lambda samples: [s.target for s in samples]
    sample.score(perfect, tmp_path, prompts=12)
    scores = json.loads((tmp_path / "scores.json").read_text())
    for row in (scores, scores["bounds"]["true renders"]):
        assert row["cp"] == row["pf"] == 1
    assert scores["bounds"]["copying"]["cp"] == 1 > 0.7 > scores["bounds"]["copying"]["pf"]
    assert 1 > scores["bounds"]["tokenizer"]["cp"] > 0.8 and scores["prompts"] == 12
    assert len(capsys.readouterr().out.splitlines()) == 4 and (tmp_path / "sheet.png").is_file()

def test_a_sheet_shows_reference_prompt_drawing_and_ideal(tmp_path):
    red, green, blue = (np.full((32, 32, 3), np.eye(3)[i] * 255, np.uint8) for i in range(3))
    samples = [Sample("", PROMPT, [red], blue), Sample("", PROMPT, [], blue)]
    sample.save_sheet({"two": (samples, [green] * 2)}, tmp_path / "a.png")
    sheet = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    left = [np.flatnonzero((sheet == 255 * np.eye(3)[i]).all(-1).any(0))[0] for i in range(3)]
    assert left == sorted(left) and left[1] > left[0] + 300

# --- The command line
@pytest.fixture
def reference(world, tmp_path):
    picture = Image.fromarray(held_out(world, "subject_driven", 1)[0].images[0])
    picture.resize((70, 50)).save(tmp_path / "ref.png")
    return str(tmp_path / "ref.png")

@pytest.mark.parametrize("arguments, prompt, images, count, shown", [
    ([PROMPT, "--n=3"], PROMPT, 0, 3, 3), ([""], "", 0, 1, 1),
    ([r"The star in <image>.\nA star on a red background", "--images=REF"],
     "The star in <image>.\nA star on a red background", 1, 1, 1),
    (["The star in <image>.", "--images=REF", "--n=2"], "The star in <image>.", 1, 2, 2),
    (["The image is <image>", "--images=REF"], "The image is <image>", 1, 1, 1)])
def test_the_command_line_draws(arguments, prompt, images, count, shown, reference, tmp_path, monkeypatch):
    drawn, draw, out = [], Pipeline.draw, tmp_path / "drawn.png"
    monkeypatch.setattr(Pipeline, "draw", lambda *given: drawn.append(given) or draw(*given))
    sample.main([str(TRAINED), *(a.replace("REF", reference) for a in arguments), f"--out={out}", "--seed=7",
                 "--cfg_scale=1", "--temperature=0.5", "--top_k=9", "--top_p=0.9", "--device=cpu"])
    (_, samples, *how), = drawn
    assert [(s.prompt, len(s.images)) for s in samples] == [(prompt, images)] * count
    picture, expected = Image.open(out), SamplingConfig(1.0, 0.5, 9, 0.9)
    assert how == [expected, 7] and picture.width == shown * picture.height >= 256
    assert [picture.text[key] for key in ("prompt", "seed", "top_k")] == [prompt, "7", "9"]

@pytest.mark.parametrize("arguments, message", [
    (["A big red staar on a green ocean"], "staar, ocean"), (["A red_star"], "not know red_star"),
    (["The star < <image>.", "--images=REF"], "not know <"), ([PROMPT, "--out=REF.psd"], "must end as"),
    (["The star in <image>."], "1 <image>, but 0 images"), (["", "--images=REF"], "0 <image>, but 1"),
    (["The star in <image>.\n" * 6, *["--images=REF"] * 6], "96"),
    (["The star in <image>.", "--images=REF", "--images=REF"], "1 <image>, but 2 images"),
    (["The zebra in <image>.", "--images=REF"], "zebra"), ([PROMPT, "--n=0"], "--n=0"),
    (["The star in <image>.", "--images=no.png"], "no.png"),
    (["The image is <image>", "--images=TORN"], "torn.png: not a readable image"),
    ([PROMPT, "--sed=3"], "--sed=3: no such option"), ([PROMPT, "--out=REF/x"], "must end as a picture does"),
    (["--prompt=a star"], "no such option.*the prompt is the second argument"),
    ([PROMPT, "--temperature=-1"], "temperature=-1"), ([PROMPT, "--top_p=1.5"], "top_p=1.5"),
    ([PROMPT, "--top_k=-3"], "top_k=-3"), ([PROMPT, "--cfg_scale=nan"], "cfg_scale=nan")])
def test_mistakes_get_a_message_and_no_picture(arguments, message, reference, tmp_path):
    (tmp_path / "torn.png").write_bytes(open(reference, "rb").read()[:60])
    given = [a.replace("REF", reference).replace("TORN", str(tmp_path / "torn.png")) for a in arguments]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        sample.main([str(TRAINED), f"--out={tmp_path}/x.png", *given, "--device=cpu"])
    assert "\n" not in str(error.value).strip() and contents(tmp_path) == before

def test_what_a_model_has_never_met_is_said(reference, tmp_path, capsys):
    out = shutil.copytree(TRAINED, tmp_path / "out")
    record = json.loads((out / "instruct" / "stage.json").read_text()) | {"instruct.mix": "segmentation:1"}
    (out / "instruct" / "stage.json").write_text(json.dumps(record))
    segment = ["The star in <image>.", f"--images={reference}"]
    for prompt, count in ((["A big star, (red)!"], 5), (segment, 0)):
        sample.main([str(out), *prompt, f"--out={tmp_path}/x.png", "--device=cpu"])
        assert capsys.readouterr().out.count("note: ") == count  # , ( ) ! and the task
        assert not set(",()!") & set(Image.open(tmp_path / "x.png").text["prompt"])

def test_a_users_error_is_one_line_and_exit_code_2(tmp_path):
    with pytest.raises(ValueError, match="--device=nowhere: "):
        sample.usable("nowhere")
    command = [sys.executable, ROOT / "sample.py", tmp_path, "A star"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sample.py: ") and "holds no trained model" in done.stderr
