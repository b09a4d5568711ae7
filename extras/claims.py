"""The paper's ablations, small: one thing changed at a time, and its effect on the scores.

    python -m extras.claims tiny --align.steps=300 --instruct.steps=600 --seeds=3
    python -m extras.claims tiny --rows="without recovery,query connector" --copy=0.9 --into=out/claims_2

All rows share tokenizer and pretraining of the run in --out (default out/tiny), trained if missing. The rest
goes to --into, with the table, claims.md, and drawings, claims.png. After a stop the same command goes on;
earlier rows are read. Once all seeds of `full` are there, two commands with different --rows may run at once.

Photographs of one subject are often near-duplicates, and captions leave things out, so copying is a good
guess that must be unlearned. Among the shapes it never is. So in training, and only there, a subject-driven
sample's scene keeps its reference's background, place and size with probability --copy, and its caption
leaves out the place and the background with probability --omit each.

All rows see as many samples: a removed task's share goes to the others, a removed stage 1's steps to stage 2;
only multi-image training goes on from `full`, as in the paper. `captions alone` starts as the paper: text
encoder and decoder know captions alone (LlamaGen), the vision encoder captions and pictures (CLIP).
"""

import argparse
import json
import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np
import torch

import sample
import train
from data import PLACES, Shapes, ShapesDataset
import extras.multi  # the query connector and the task multi_image
from tokenizer import TextTokenizer, file_hash, flatten, rebuild, require, write_atomically, write_json

COPY, OMIT = 1.0, 0.5  # by the full run alone: CP 0.67, PF 0.98 at --copy=0.9 and 1; 0.71, 0.99 at 0
PROMPTS = 512  # for CP and PF; a quarter for segmentation

# --- A training world with a shortcut -----------------------------------------


class ShortcutWorld(Shapes):
    """Shapes, in training with near-duplicate pairs and incomplete captions."""

    def __init__(self, image_size, copy, omit):
        super().__init__(image_size)
        self.copy, self.omit, self.digest = copy, omit, f"shapes, copy {copy:g}, omit {omit:g}"

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        """As Shapes has it, but for training samples."""
        return (ShapesDataset if held_out else ShortcutDataset)(self, mix, seed, prefix_drop, held_out)


class ShortcutDataset(ShapesDataset):
    """Its training samples; only subject-driven ones differ."""

    def __getitem__(self, index):
        made, rng = super().__getitem__(index), random.Random(f"shortcut {self.seed} {index}")
        chances = [rng.random() for _ in range(3)]
        if made.task == "subject_driven":
            if chances[0] < self.world.copy:
                made.images = [made.target]  # reference and new scene come from one distribution
            made.prompt = leave_out(made.prompt, *(chance < self.world.omit for chance in chances[1:]))
        return made


def leave_out(prompt, place, background):
    """The prompt without the words on place or background or both (bool each)."""
    if place:
        prompt = re.sub(f" at the ({'|'.join(sorted(PLACES, key=len, reverse=True))})", "", prompt)
    return re.sub(" on an? [a-z ]+ background", "", prompt) if background else prompt


class CaptionsStage(train.MentorStage):
    """No hidden words, and the contrastive loss trains the vision encoder alone."""

    def code_losses(self, batch):
        losses, states = super().code_losses(batch)
        return losses, states.detach()  # for the contrastive loss

    def forward(self, batch, step):
        return super().forward(replace(batch, masked=torch.zeros_like(batch.masked)), step)


# --- The rows -----------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run that shares the first stages of another row."""

    start: str                       # the other row's stage that it starts from
    stages: tuple = ("instruct",)    # the stages that it trains itself
    keys: Callable = lambda run: {}  # the keys that it changes
    paper: tuple = ()                # the paper's CP, PF and CP*PF
    of: str = "full"                 # the other row, with which it is compared
    pretraining: type = train.MentorStage


def without(stage, task):
    """Leave a task out of a stage; the others keep their proportions."""
    return lambda run: {f"{stage}.mix": f"{getattr(run, stage).mix},{task}:0"}


def with_multi_image(run):
    """After stage 2 as many steps with the new task at half the learning rates (the paper's 5e-5)."""
    return {"instruct.mix": f"{run.instruct.mix},multi_image:1500", "instruct.lr": run.instruct.lr / 2,
            "instruct.muon_lr": run.instruct.muon_lr / 2}


def longer(run):
    """Stage 1's samples go to stage 2."""
    more = run.align.steps * run.align.global_batch // run.instruct.global_batch
    return {"instruct.steps": run.instruct.steps + more}


BOTH, ALL = ("align", "instruct"), ("pretrain", "align", "instruct")
PAPER, NO_STAGE_1 = (0.555, 0.839, 0.466), (0.179, 0.673, 0.120)
ROWS = {
    "full": Row("pretrain", BOTH, paper=PAPER, of=""),
    "without stage 1": Row("pretrain", keys=longer, paper=NO_STAGE_1),
    "without segmentation in stage 1":
        Row("pretrain", BOTH, without("align", "segmentation"), (0.252, 0.479, 0.121)),
    "without recovery": Row("align", keys=without("instruct", "recovery"), paper=(0.661, 0.284, 0.188)),
    "without segmentation in stage 2":
        Row("align", keys=without("instruct", "segmentation"), paper=(0.412, 0.918, 0.378)),
    "without subject-driven":
        Row("align", keys=without("instruct", "subject_driven"), paper=(0.407, 0.910, 0.370)),
    "query connector": Row("tokenizer", ALL, lambda run: {"model.connector": "query", "model.n_query": 8},
                           (0.421, 0.882, 0.371)),
    "with multi-image": Row("instruct", keys=with_multi_image, paper=(0.586, 0.829, 0.486)),
    "captions alone": Row("tokenizer", ALL, lambda run: {"pretrain.trains": "vision,text,projector,decoder"},
                          pretraining=CaptionsStage),
    "captions alone without stage 1": Row("pretrain", keys=longer, paper=NO_STAGE_1, of="captions alone"),
}


def folder_of(name, seed, into):
    """The folder of a row and seed: a whole run's, with links to what it shares."""
    return into / name.replace(" ", "_") / f"seed_{seed}"


def train_row(name, seed, run, into, sources, machine, text_tokenizer):
    """Train what a row and seed lack. run: `full`'s; sources: {stage: source}."""
    row, folder, base = ROWS[name], folder_of(name, seed, into), Path(run.out)
    links = {"spiece.model": base / "spiece.model", "tokenizer": base / "tokenizer",
             train.STAGES[row.stages[0]][-1]: (folder_of(row.of, seed, into) if row.of else base) / row.start}
    if "pretrain" in row.stages and seed != run.seed:  # all seeds share the first one's
        links["pretrain"] = folder_of(name, run.seed, into) / "pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    for link, target in links.items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(os.path.relpath(target, folder))
    train.STAGE_MODULES["pretrain"] = row.pretraining
    run = rebuild(run, flatten(run) | row.keys(run) | {"seed": seed, "out": str(folder)})
    for stage in row.stages:
        if stage not in links:
            train.train_stage(stage, run, machine, sources[stage], text_tokenizer)


# --- Scores -------------------------------------------------------------------


def scores_of(folder, sampling, device):
    """A run's scores, from its scores.json if that has these weights and sampling."""
    file, weights = folder / "scores.json", folder / "instruct" / "model.safetensors"
    made_with = {"weights": file_hash(weights), "prompts": PROMPTS, "sampling": flatten(sampling)}
    old = json.loads(file.read_text()) if file.is_file() else {}
    if old.get("made with") != made_with:
        old = {"made with": made_with, "scores": claim_scores(sample.Pipeline(folder, device), sampling)}
        write_json(file, old)
    return old["scores"]


def held_out(world, task, count):
    """The samples of all scores, of subjects that no training has seen."""
    dataset = world.dataset({task: 1.0}, "scores", held_out=True)
    return [dataset[i] for i in range(count)]


def claim_scores(pipeline, sampling):
    """A model's scores; "marks" are CP and PF of every drawing, (PROMPTS, 2)."""
    world, marks = Shapes(pipeline.size), []
    subject, cut = held_out(world, "subject_driven", PROMPTS), held_out(world, "segmentation", PROMPTS // 4)
    for seen, s in zip(sample.Judge(world).read(pipeline.draw(subject, sampling)), subject, strict=True):
        (a,), (b,) = seen.subjects, s.scene.subjects
        follows = np.equal((*seen[:2], a.place, a.size), (*s.scene[:2], b.place, b.size))
        marks.append([float(np.mean(np.equal(a.subject, b.subject))), float(np.mean(follows))])
    return {"marks": marks, "iou": sample.segmentation_iou(pipeline.draw(cut, sampling), cut)}


def summary(marks):
    """marks (seeds, prompts, 2) -> CP, PF and CP*PF (3,), and each drawing's parts: (seeds, prompts, 3)."""
    cp, pf = marks.mean((0, 1))
    return np.array([cp, pf, cp * pf]), marks @ np.array([[1, 0, pf], [0, 1, cp]])  # the product linearised


def standard_error(parts):
    """Of the mean of parts (seeds, prompts, 3), by the variances of prompts and, if several, seeds: (3,)."""
    return np.sqrt(parts.mean(0).var(0) / parts.shape[1] + parts.mean(1).var(0) / max(1, len(parts) - 1))


def compare(marks, other):
    """How much larger CP, PF and CP*PF are than another row's, in standard errors (3,) of the differences
    prompt by prompt: both rows draw the same prompts with the same seeds."""
    seeds = min(len(marks), len(other))
    (here, parts), (there, others) = summary(marks[:seeds]), summary(other[:seeds])
    return (here - there) / np.maximum(standard_error(parts - others), 1e-9)


# --- The table ----------------------------------------------------------------


def claims_text(rows):
    """claims.md, of {row: its scores for each seed}."""
    marks, right = {name: np.array([s["marks"] for s in scores]) for name, scores in rows.items()}, {}
    lines = ["row seeds CP PF CP*PF paper direction segmentation".split(), ["---"] * 8]
    for name, scores in rows.items():
        row, (means, parts) = ROWS[name], summary(marks[name])
        other = f" ({row.of})" if row.of not in ("full", "") else ""
        if row.paper and row.of in rows:
            right[name] = compare(marks[name], marks[row.of]) * np.sign(np.subtract(row.paper, PAPER))
        lines.append([name, len(scores),
                      *(f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, standard_error(parts))),
                      " / ".join(f"{p:.3f}" for p in row.paper),
                      " / ".join(f"{errors:+.1f}" for errors in right.get(name, ())) + other,
                      f"{np.mean([s['iou'] for s in scores]):.3f}"])
    clear = sum(errors[2] >= 2 for errors in right.values())
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + f"""
±: a standard error, of {PROMPTS} prompts and the seeds. Direction: by how many standard errors CP / PF /
CP*PF differ as in the paper from `full` or the row named; CP*PF by two in {clear} of {len(right)} rows.
"""


# --- Command line -------------------------------------------------------------


def parse(arguments):
    """(own options, RunConfig of `full`)."""
    parser = argparse.ArgumentParser("extras.claims", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, default, meaning in (("rows", ",".join(ROWS), "to train"), ("seeds", 1, "trainings of each row"),
                                  ("copy", COPY, "see above"), ("omit", OMIT, "see above"),
                                  ("into", "", "empty: OUT/claims")):
        parser.add_argument(f"--{key}", type=type(default), default=default, help=f"{meaning} (%(default)s)")
    options, keys = parser.parse_known_args(arguments)
    require(keys, "the first argument must be a preset, such as tiny; see --help")
    run, options.rows = train.parse(keys), options.rows.split(",")
    for name in options.rows:
        require(name in ROWS, f"--rows: there is no row {name!r}, but {', '.join(ROWS)}")
    require(0 <= min(options.copy, options.omit) and max(options.copy, options.omit) <= 1,
            "--copy and --omit must be from 0 to 1")
    require(options.seeds > 0, f"--seeds={options.seeds}: must be 1 or more")
    require(not run.data + run.start_from, "claims take neither --data nor --start_from")
    return options, run


def main(arguments):
    """Train and score the rows, write claims.md and claims.png."""
    options, run = parse(arguments)
    machine, base, world = train.start_machine(run), Path(run.out), Shapes(run.vqgan.image_size)
    require(machine.world_size == 1, "claims are one process; start a second one with other --rows")
    spiece, into = base / "spiece.model", Path(options.into or base / "claims")
    if not spiece.is_file():
        base.mkdir(parents=True, exist_ok=True)
        write_atomically(spiece, lambda file: file.write_bytes(world.text_tokenizer().proto))
    text_tokenizer = TextTokenizer(spiece.read_bytes())
    for stage in ("tokenizer", "pretrain"):
        train.train_stage(stage, run, machine, world, text_tokenizer)

    shortcut = ShortcutWorld(world.image_size, options.copy, options.omit)
    sources = {"pretrain": world, "align": world, "instruct": shortcut}
    wanted, rows = {"full", *options.rows, *(ROWS[name].of for name in options.rows)}, {}
    for seed in range(run.seed, run.seed + options.seeds):
        for name in ROWS:
            folder = folder_of(name, seed, into)
            if name in wanted or (folder / "scores.json").is_file():
                machine.say(f"{name}, seed {seed}: {folder}")
                train_row(name, seed, run, into, sources, machine, text_tokenizer)
                rows.setdefault(name, []).append(scores_of(folder, run.model.sampling, machine.device))

    text, samples = claims_text(rows), held_out(world, "subject_driven", 3)
    write_atomically(into / "claims.md", lambda file: file.write_text(text, encoding="utf-8"))
    pipelines = {name: sample.Pipeline(folder_of(name, run.seed, into), machine.device) for name in rows}
    parts = {name: (samples, p.draw(samples, run.model.sampling)) for name, p in pipelines.items()}
    sample.save_sheet(parts, into / "claims.png")
    machine.say(f"{text}\nsee {into}/claims.md and claims.png")


if __name__ == "__main__":
    sample.cli(main, "extras.claims")
