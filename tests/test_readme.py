"""The README's promises: every command in it runs, at a reduced size, and what the code fixes among its numbers is the code's."""

import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mentor
import sample
import train
from conftest import few_steps
from test_manifest import coco_files, picture, save
from test_train import ROOT, SHORT
from tokenizer import VQGAN

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
INLINE = [" ".join(command.split()) for command in re.findall(r"`(python [^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))]
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if re.match("(python|torchrun|pip) ", line)] + INLINE
PLAN = "python train.py full --stage=align --dry_run=true"  # at its true size, in a test of its own
NOT_RUN = ["pip install -r requirements.txt", "pip install -r requirements.txt pytest", "python -m pytest"]  # they are how the tests came to run
DOWNLOADED = re.compile("released|out/full|Mentor|multi_image.jsonl|dreambooth|out/finetuned")  # on files that are not here: such commands are only read
REDUCED = [*SHORT, "--vqgan.image_size=32", "--model.vision.image_size=32", "--model.vision.patch_size=8", "--model.decoder.grid_size=8", "--model.context=96", "--model.decoder.n_head=4", "--workers=0",
           *few_steps(steps=2, global_batch=4)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with everything that the README's commands take for granted, and small numbers of prompts."""
    for name in ("assets", "trained"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pets").mkdir()
    save(tmp_path / "pets" / "dog.png", picture())
    save(tmp_path / "pets" / "dog.mask.png", picture((0, 0, 0), color=(255, 255, 255)))
    (tmp_path / "pets" / "dog.txt").write_text("a dog on the grass\ndog\n")
    save(tmp_path / "pets" / "cat.jpg", picture((0, 0, 220)))
    instances, captions, images, _ = coco_files(tmp_path)
    for path, name in ((instances, "instances_train2017.json"), (captions, "captions_train2017.json"), (images, "train2017")):
        path.rename(tmp_path / name)
    for kind in ("images", "captions"):
        (tmp_path / "dreambench_plus" / "data" / kind / "object").mkdir(parents=True)
    Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / "dreambench_plus/data/images/object/00.jpg")
    (tmp_path / "dreambench_plus/data/captions/object/00.txt").write_text("star\nA big star at the top on a red background\n")
    (tmp_path / "train.py").write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport train\ntrain.sample.score = lambda *arguments: None\ntrain.cli()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "PROMPTS", 4)
    monkeypatch.setattr(train, "compile_blocks", lambda model, machine: False)  # most of a minute
    monkeypatch.setattr(sample, "median_seconds", lambda variants, device, rounds=0: {name: (function(), 1e-3)[1] for name, function in variants.items()})  # once each
    monkeypatch.setattr(train, "claims", lambda run, *arguments: Path(run.out, "claims.md").touch())  # test_claims.py has it run
    monkeypatch.setattr(sample, "FEWER_PROMPTS", 2)
    return tmp_path


def run_command(command):
    """Run one of the README's commands in this process, its training reduced; torchrun's with two processes."""
    program, script, *arguments = shlex.split(command, comments=True)  # torchrun's first argument is the number of processes
    with pytest.MonkeyPatch.context() as patch:
        if program == "torchrun":
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments, *REDUCED], check=True, capture_output=True, timeout=240,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
        elif script == "data.py":
            patch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        elif script == "sample.py":
            sample.main(arguments)
        else:
            if command != "python train.py tiny":  # the others end with the same scores
                patch.setattr(sample, "score", lambda *arguments: None)
            train.main(arguments if arguments == ["--help"] else [*arguments, *REDUCED])


def test_every_command_runs(workplace):
    assert len(COMMANDS) > 20 and PLAN in COMMANDS
    for command in COMMANDS:
        if command in NOT_RUN or command == PLAN:
            continue
        if DOWNLOADED.search(command):
            (sample if "sample.py" in command else train).parse(shlex.split(command)[2 + command.startswith("torchrun") :])
            continue
        try:
            run_command(command)
        except ValueError as error:
            if "no colour emoji font" not in str(error):
                pytest.fail(f"{command}: {error}")
    assert {path.name for path in Path("out").iterdir()} >= {"tiny", "mine", "longer", "base", "pets", "coco", "photos"} and Path("sample.gif").is_file() and Path("out/tiny/claims.md").is_file()


@pytest.mark.skipif(not os.environ.get("MENTOR_FULL_SIZE"), reason="MENTOR_FULL_SIZE=1 plans the full size: a minute each")
@pytest.mark.parametrize("stage", ["align"])
def test_plans_are_as_printed(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.WORLDS, "shapes", lambda image_size: data.Shapes(32))  # the same prompts, drawn faster
    with pytest.raises(ValueError, match=f"could not start: {stage} needs "):  # its exit code is 0 only when all is there
        train.main(PLAN.replace("align", stage).split()[2:])
    assert next(block for block in BLOCKS if block.startswith(f"{stage}: vision")) in capsys.readouterr().out


def number(text):
    return float(text.replace(",", ""))


def rows(*header):
    """The rows of the README's table whose header begins so, as lists of cells without backticks."""
    table = README.split("| " + " | ".join(header) + " |", 1)[1].split("\n\n")[0]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_steps_and_presets_are_as_in_the_tables():
    for stage, steps, *_ in rows("stage", "steps"):
        assert number(steps) == getattr(train.PRESETS["tiny"], stage).steps, stage
    assert [row[0] for row in rows("stage", "what it stands for")] == list(train.STAGES)
    assert [row[0] for row in rows("task", "`objects`")] == [task for task in data.TASKS if task != "in_context"]
    for name, pixels, codes, codebook, decoder, parameters, vqgan, _ in rows("preset", "pixels"):
        run = train.PRESETS[name]
        with torch.device("meta"):
            model, vq = mentor.Mentor(run.model), VQGAN(run.vqgan)
        counts = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (model, model.encoder.vision, model.encoder.text, model.decoder, vq)]
        shown = re.findall(r"[\d,.]*\d", parameters + vqgan)
        assert (number(pixels), codes, number(codebook)) == (run.vqgan.image_size, f"{run.vqgan.grid_size} x {run.vqgan.grid_size}", run.vqgan.codebook_size), name
        assert decoder == f"{run.model.decoder.width} wide, {run.model.decoder.n_layer} layers"
        for count, text in zip(counts, shown, strict=True):
            assert abs(number(text) - count) <= 0.5 * 10 ** -len(text.partition(".")[2]) + 1e-9, (name, text, count)
    assert [row[0] for row in rows("preset", "pixels")] == list(train.PRESETS)


VALIDATION = int(re.search(r"^VALIDATION = (\d+)", inspect.getsource(train), re.M)[1])  # the tests take fewer
TINY, DEFAULT = train.PRESETS["tiny"], train.RunConfig()


def shares(mix):
    return " : ".join(part.partition(":")[2] for part in mix.split(","))


@pytest.mark.parametrize("said, value", [
    (r"the last `--keep=(\d+)` are kept", DEFAULT.keep),
    (r"at most `--save_every=(\d+)`", DEFAULT.save_every),
    (r"(\d+) is the default of `tiny` \(`--cfg_scale`", TINY.model.sampling.cfg_scale),
    (r"temperature ([\d.]+) \| 1 \|", TINY.model.sampling.temperature),
    (r"\*\*model\*\*, guidance (\d+),", TINY.model.sampling.cfg_scale),
    (r"\*\*model\*\*, guidance \d+, (\d+) prompts", sample.PROMPTS),
    (r"model, guidance 1, (\d+) prompts", sample.FEWER_PROMPTS),
    (r"the same prompts at guidance ([\d., and]+)\]", ", ".join(f"{s:g}" for s in sample.SCALES[:-1]) + f" and {sample.SCALES[-1]:g}"),
    (r"text-to-image, reconstruction, segmentation \(([\d :]+)\)", shares(train.ALIGN_MIX)),
    (r"text-to-image, segmentation, recovery, subject-driven \(([\d :]+)\)", shares(train.INSTRUCT_MIX)),
    (r"codebook_weight=([\d.]+)", TINY.tokenizer.codebook_weight),
    (r"`, batch of (\d+) \|", TINY.tokenizer.global_batch),
    (r"is one of (\d+), and many pictures", TINY.vqgan.codebook_size),
    (r"takes more of the last \(([\d :]+)\)", shares(TINY.instruct.mix)),
    (r"weight decay ([\d.]+) \|", TINY.weight_decay),
    (r"([\d,]+) subjects is held out", sum(map(len, data.Shapes(32).subjects.values()))),
    (r"with ([\d,]+) emoji as subjects", data.Emoji.COUNT),
    (r"one of (\d) shapes in one of", len(data.SHAPES)),
    (r"in one of (\d) colours", len(data.COLORS)),
    (r"cover (\d+) to", 100 * data.OBJECT_SHARE[0]),
    (r"to (\d+)% of it; crowd", 100 * data.OBJECT_SHARE[1]),
    (r"on (\d+) held-out samples", VALIDATION),
    (r"lines of every (\d+)th \(at most", data.HELD_OUT_EVERY),
    (r"at most (\d+) pictures", data.HELD_OUT_MOST),
    (r"vocabulary of ([\d,]+) the logits", train.PRESETS["full"].vqgan.codebook_size),
    (r"`(\w+)` uses `paper`", next(name for name, run in train.PRESETS.items() if run.recipe == "paper")),
])
def test_numbers_in_the_text_are_the_codes(said, value):
    found = re.findall(said, README)
    assert found and all(text == value if isinstance(value, str) else number(text) == value for text in found), (found, value)


def test_keys_tests_and_files_that_are_named_exist(capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--help"])
    keys = {*train.flatten(DEFAULT), *re.findall(r"--(\w+)", capsys.readouterr().out), "nproc_per_node", "help"}
    assert set(re.findall(r"--([a-z_][\w.]*\w)", README)) <= keys
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {name}" in tests for name in re.findall(r"`(test_\w*?)_?\.*`", README))
    for name in re.findall(r"\]\((\w+/\S+)\)|`(\w+\.py)`", README):
        assert (ROOT / "".join(name)).is_file(), name
    torch_version = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"`torch=={torch_version}`" in README and f"torch {torch_version})" in README

