"""The paper's ablations, small: one thing changed at a time, and its effect on the scores.

    python -m extras.claims tiny --align.steps=400 --instruct.steps=400 --instruct.lr=0.0008 \
        --instruct.muon_lr=0.002 --align.trains=connector,text,projector,decoder \
        --instruct.trains=connector,text,projector,decoder --seeds=3 \
        --instruct.mix=text_to_image:600,segmentation:150,recovery:150,subject_driven:400

All rows share the tokenizer, encoder and pretraining of the run in --out, trained if missing, but each starts
with a new connector: before the paper's two stages no image was ever read. OUT/claims then holds claims.md,
the table, and claims.png, drawings. The same command goes on after a stop.

Pairs of photographs of one subject are few and often near-duplicates, and captions leave things out. So in
training stage 2's tasks with images show SUBJECTS subjects alone; a subject-driven reference is the target
with probability COPY, and the caption lacks place and background with probability OMIT each.
"""

import argparse
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import extras.multi  # noqa: F401  (query connector, multi_image)
import sample
import train
from data import PLACES, Shapes
from mentor import Mentor
from tokenizer import file_hash, flatten, load_model, rebuild, require, save_model, write_json

SUBJECTS, COPY, OMIT = 100, 1.0, 0.2  # why: docs/claims.md
PROMPTS = 512

# --- The world of stage 2 ---


class ShortcutWorld(Shapes):
    """Shapes, with few subjects, copies and incomplete captions."""

    digest = f"shapes, {SUBJECTS} subjects, copy {COPY:g}, omit {OMIT:g}"

    def __init__(self, image_size):
        super().__init__(image_size)
        self.few = Shapes(image_size)
        self.few.train_subjects = random.Random(0).sample(self.train_subjects, SUBJECTS)

    def sample(self, task, rng, held_out=False):
        made = (super() if task == "text_to_image" else self.few).sample(task, rng, held_out)
        if task == "subject_driven" and not held_out:
            if rng.random() < COPY:
                made.images = [made.target]
            if rng.random() < OMIT:
                made.prompt = made.prompt.replace(f" at the {PLACES[made.scene.subjects[0].place]}", "")
            if rng.random() < OMIT:
                made.prompt = re.sub(" on an? .*", "", made.prompt)
        return made


# --- The rows ---


@dataclass(frozen=True)
class Row:
    """A run that differs from `full` in one thing."""

    start: str                       # pretrain or a stage of `full`
    stages: tuple = ("instruct",)    # what it trains
    keys: Callable = lambda run: {}  # what it changes
    paper: tuple = ()                # the paper's CP, PF and CP*PF


def without(stage, task):
    """Leave a task out; the others keep their proportions."""
    return lambda run: {f"{stage}.mix": f"{getattr(run, stage).mix},{task}:0"}


def with_multi_image(run):
    """As many steps again with the new task, at half the learning rates, as the paper."""
    return {"instruct.mix": f"{run.instruct.mix},multi_image:1500", "instruct.lr": run.instruct.lr / 2,
            "instruct.muon_lr": run.instruct.muon_lr / 2}


def longer(run):
    """Stage 1's samples go to stage 2."""
    more = run.align.steps * run.align.global_batch // run.instruct.global_batch
    return {"instruct.steps": run.instruct.steps + more}


BOTH = ("align", "instruct")
ROWS = {
    "full": Row("pretrain", BOTH, paper=(0.555, 0.839, 0.466)),
    "without stage 1": Row("pretrain", paper=(0.179, 0.673, 0.120)),
    "stage 2 in place of stage 1": Row("pretrain", keys=longer, paper=(0.179, 0.673, 0.120)),
    "without segmentation in stage 1":
        Row("pretrain", BOTH, without("align", "segmentation"), (0.252, 0.479, 0.121)),
    "without recovery": Row("align", keys=without("instruct", "recovery"), paper=(0.661, 0.284, 0.188)),
    "without segmentation in stage 2":
        Row("align", keys=without("instruct", "segmentation"), paper=(0.412, 0.918, 0.378)),
    "without subject-driven":
        Row("align", keys=without("instruct", "subject_driven"), paper=(0.407, 0.910, 0.370)),
    "query connector":
        Row("pretrain", BOTH, lambda run: {"model.connector": "query", "model.n_query": 8},
            (0.421, 0.882, 0.371)),
    "with multi-image": Row("instruct", keys=with_multi_image, paper=(0.586, 0.829, 0.486)),
}


def folder_of(name, seed, run):
    """The folder of a row and seed."""
    return Path(run.out, "claims", name.replace(" ", "_"), f"seed_{seed}")


def renew_connector(source, folder, run):
    """Save source's weights in folder, with a new connector, run's."""
    torch.manual_seed(run.seed)
    model = load_model(Mentor, run.model, source)
    model.config = run.model
    model.encoder.connector = Mentor(run.model).encoder.connector
    save_model(model, folder)
    shutil.copy(source / "stage.json", folder)


def train_row(name, seed, run, machine, text_tokenizer):
    """Train what a row and seed lack. run: `full`'s."""
    row, out, folder = ROWS[name], Path(run.out), folder_of(name, seed, run)
    own = rebuild(run, flatten(run) | row.keys(run) | {"seed": seed, "out": str(folder)})
    folder.mkdir(parents=True, exist_ok=True)
    before = train.STAGES[row.stages[0]][-1]  # where its first stage looks for weights
    links = {shared: out / shared for shared in ("spiece.model", "tokenizer")}
    if row.start == "pretrain":
        renew_connector(out / "pretrain", folder / before, own)
    else:
        links[before] = folder_of("full", seed, run) / row.start
    for link, target in links.items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(os.path.relpath(target, folder))
    for stage in row.stages:
        world = ShortcutWorld if stage == "instruct" else Shapes
        train.train_stage(stage, own, machine, world(run.vqgan.image_size), text_tokenizer)


# --- Scores ---


def held_out(world):
    """The prompts of all scores, of unseen subjects."""
    dataset = world.dataset({"subject_driven": 1.0}, "scores", held_out=True)
    return [dataset[i] for i in range(PROMPTS)]


def marks_of(folder, world, sampling, device):
    """CP and PF of each of a model's drawings, as in sample.marks: (PROMPTS, 2). Read from
    scores.json if nothing has changed."""
    file, weights = folder / "scores.json", folder / "instruct" / "model.safetensors"
    made_with = {"weights": file_hash(weights), "prompts": PROMPTS, "sampling": flatten(sampling)}
    scores = json.loads(file.read_text()) if file.is_file() else {}
    if scores.get("made with") == made_with:
        return scores["marks"]
    samples = held_out(world)
    drawn = sample.Pipeline(folder, device).draw(samples, sampling)
    marks = sample.marks(sample.Judge(world), drawn, samples).tolist()
    write_json(file, {"made with": made_with, "marks": marks})
    return marks


def parts_of(marks):
    """marks (seeds, prompts, 2) -> (seeds, prompts, 3), whose means are CP, PF and CP*PF (linearised)."""
    cp, pf = marks.mean((0, 1))
    return marks @ np.array([[1, 0, pf], [0, 1, cp]]) - [0, 0, cp * pf]


def standard_error(parts):
    """Of the mean of parts (seeds, prompts, 3), by the variances of prompts and, if several, seeds: (3,)."""
    return np.sqrt(parts.mean(0).var(0) / parts.shape[1] + parts.mean(1).var(0) / max(1, len(parts) - 1))


def claims_text(marks):
    """claims.md, of {row: its marks (seeds, prompts, 2)}."""
    parts = {name: parts_of(np.array(m)) for name, m in marks.items()}
    lines = ["row seeds CP PF CP*PF paper direction".split(), ["---"] * 7]
    for name, part in parts.items():
        row, right = ROWS[name], ()
        if name != "full":
            more = part - parts["full"]  # all rows draw the same prompts with the same seeds
            errors = more.mean((0, 1)) / np.maximum(standard_error(more), 1e-9)
            right = errors * np.sign(np.subtract(row.paper, ROWS["full"].paper))
        scores = map("{:.3f} ± {:.3f}".format, part.mean((0, 1)), standard_error(part))
        lines.append([name, len(part), *scores, " / ".join(map(str, row.paper)),
                      " / ".join(map("{:+.1f}".format, right))])
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + f"""
±: a standard error, of {PROMPTS} prompts and the seeds. Direction: by how many of them CP / PF / CP*PF
differ as in the paper from `full`.
"""


def main(arguments):
    """Train and score the rows, write claims.md and claims.png."""
    parser = argparse.ArgumentParser("extras.claims", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="beside full (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row (%(default)s)")
    options, keys = parser.parse_known_args(arguments)
    require(keys, "the first argument must be a preset, such as tiny")
    run, wanted = train.parse(keys), options.rows.split(",")
    for name in wanted:
        require(name in ROWS, f"--rows: no row {name!r}, but {', '.join(ROWS)}")
    rows = [name for name in ROWS if name in ("full", *wanted)]
    require(options.seeds > 0, f"--seeds={options.seeds}: must be 1 or more")
    require(not run.data, f"--data={run.data}: claims are about the world of shapes alone")

    machine, world, out = train.start_machine(run), Shapes(run.vqgan.image_size), Path(run.out)
    require(machine.world_size == 1, "claims run without torchrun")
    if not (out / "spiece.model").is_file():
        train.start_run(run, machine, world)
    text_tokenizer = train.find_words(run, world)
    for stage in list(train.STAGES)[:3]:
        train.train_stage(stage, run, machine, world, text_tokenizer)

    marks, drawn, sampling = {name: [] for name in rows}, {}, run.model.sampling
    for seed in range(run.seed, run.seed + options.seeds):
        for name in rows:
            machine.say(f"{name}, seed {seed}")
            train_row(name, seed, run, machine, text_tokenizer)
            marks[name].append(marks_of(folder_of(name, seed, run), world, sampling, machine.device))

    samples, text = held_out(world)[:3], claims_text(marks)
    for name in rows:
        pipeline = sample.Pipeline(folder_of(name, run.seed, run), machine.device)
        drawn[name] = samples, pipeline.draw(samples, sampling)
    sample.save_sheet(drawn, out / "claims" / "claims.png")
    (out / "claims" / "claims.md").write_text(text, encoding="utf-8")
    machine.say(text)


if __name__ == "__main__":
    sample.cli(main, "extras.claims")
