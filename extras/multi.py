"""Several images in one prompt, and a connector that needs few tokens for each.

    python -m extras.multi train tiny --model.connector=query --model.n_query=8 --out=out/query
    python -m extras.multi train tiny --instruct.mix=subject_driven:1,multi_image:1 --out=out/multi
    python -m extras.multi sample out/query "The star in <image>.\\nA big star at the top" --images=star.png
    python -m extras.multi rules out/in_context

`train` and `sample` take the arguments of train.py and sample.py and know in addition

    --model.connector=query   a small Q-Former (MENTOR section 3.1): --model.n_query learned queries per image
    multi_image               a task: images of two subjects and a caption -> the scene with both
    in_context                a task: two pictures before and after a change that no word names, and a third
                              picture -> the third after it; `rules` scores this

A model with the query connector is always called this way. A prompt must fit into --model.context: with one
token per patch, in_context takes 86 at `tiny`.
"""

import functools
import itertools
import random
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import mentor
import sample
import train
from data import COLORS, PATTERNS, PLACES, Sample, Subject
from tokenizer import require

# --- The query connector ------------------------------------------------------


class CrossAttention(mentor.Attention):
    """Attention from x (M, Q, D) to a source (M, K, D'), of which mask (M, K) bool tells what is real."""

    def __init__(self, width, n_head, source_width):
        super().__init__(width, n_head)
        self.k = nn.Linear(source_width, width)
        self.v = nn.Linear(source_width, width)

    def forward(self, x, source, mask=None):
        q, k, v = (linear(y).unflatten(-1, (self.n_head, -1)).transpose(1, 2)             # (M, H, L, D/H)
                   for linear, y in ((self.q, x), (self.k, source), (self.v, source)))
        mask = None if mask is None else mask[:, None, None]                              # (M, 1, 1, K)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class QueryBlock(nn.Module):
    """Queries and words attend to each other; then the queries alone attend to the patches (BLIP-2)."""

    def __init__(self, width, n_head, vision_width):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = CrossAttention(width, n_head, width)
        self.cross_attention = CrossAttention(width, n_head, vision_width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, patches, mask, n_query):
        h = self.norm1(x)
        x = x + self.attention(h, h, mask)
        queries, words = x[:, :n_query], x[:, n_query:]
        x = torch.cat([queries + self.cross_attention(self.norm2(queries), patches), words], dim=1)
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))


class QueryConnector(nn.Module):
    """A small Q-Former: learned queries gather from the patches what the words of the prompt ask for.
    (M, n_patch, Dv) -> (M, image_tokens, Dt)."""

    def __init__(self, config, n_layer=2):
        super().__init__()
        width, n_head, vision_width = config.text.width, config.text.n_head, config.vision.width
        require(width % n_head == 0, f"model.text.width={width}: for queries a multiple of n_head={n_head}")
        self.queries = nn.Parameter(torch.randn(config.image_tokens, width) * 0.02)
        self.word_in = nn.Linear(width, width)
        self.patch_norm = nn.LayerNorm(vision_width)
        self.blocks = nn.ModuleList(QueryBlock(width, n_head, vision_width) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, patches, words, mask):
        """words (M, L, Dt), mask (M, L) bool: each image's prompt, and which of its positions are real."""
        n = len(self.queries)
        queries = self.queries.expand(len(patches), -1, -1)                               # (M, n, D)
        x = torch.cat([queries, self.word_in(words)], dim=1)                              # (M, n + L, D)
        mask, patches = F.pad(mask, (n, 0), value=True), self.patch_norm(patches)         # (M, n + L)
        for block in self.blocks:
            x = block(x, patches, mask, n)
        return self.out(self.norm(x[:, :n]))


mentor.CONNECTORS["query"] = QueryConnector

# --- Two tasks ----------------------------------------------------------------


def multi_image(world, rng, held_out=False):
    """Images of two objects, each centred on black, and the caption of a scene with both -> that scene."""
    scene = world.random_scene(rng, world.random_subjects(rng, 2, held_out))
    images = [world.cut_out(p._replace(place=PLACES.index("center"), size=1)) for p in scene.subjects]
    return Sample("multi_image", data.subject_prompt(world, scene), images, world.draw(scene), scene)


Rule = namedtuple("Rule", "color place cut")  # paint the subject, move it (index or None), cut it out (bool)
CORNERS = (0, 2, 6, 8)                        # places that rules move it to


@functools.cache
def rules(new=False):
    """The rules of training, or with new=True the held-out ones: an eighth of the combinations, of known
    parts."""
    found, colors = [], (None, *range(len(COLORS)))
    for rule in map(Rule._make, itertools.product(colors, (None, *CORNERS), (False, True))):
        parts = (rule.color is not None) + (rule.place is not None) + rule.cut
        if parts and (parts > 1 and zlib.crc32(repr(tuple(rule)).encode()) % 8 == 0) == new:
            found.append(rule)
    return found


def follow(rule, scene):
    """The scene with its one subject painted and moved."""
    placed, = scene.subjects
    if rule.color is not None:
        subject = Subject(placed.subject.shape, rule.color, rule.color, PATTERNS.index("solid"))
        placed = placed._replace(subject=subject)
    if rule.place is not None:
        placed = placed._replace(place=rule.place)
    return scene._replace(subjects=(placed,))


def draw_rule(world, rule, scene):
    """The picture of a scene after a rule."""
    after = follow(rule, scene)
    return world.cut_out(*after.subjects) if rule.cut else world.draw(after)


def in_context(world, rng, held_out=False, new=False):
    """Two scenes, each before and after a rule that no word names, and a third -> the third after it."""
    rule, scenes = rng.choice(rules(new)), []
    while len(scenes) < 3:
        scene = world.random_scene(rng, world.random_subjects(rng, 1, held_out))
        painted = follow(rule, scene).subjects[0].subject  # not into a held-out one while training
        if held_out or painted in world.train_subjects:
            scenes.append(scene)
    *images, target = (f(s) for s in scenes for f in (world.draw, functools.partial(draw_rule, world, rule)))
    return Sample("in_context", "<image> is <image>.\n" * 2 + "<image> is", images, target, scenes[2])


data.TASKS |= {"multi_image": multi_image, "in_context": in_context}


def rule_following(world, pictures, samples):
    """The share of in-context drawings to which the right outcome is nearest."""
    every, right = [Rule(None, None, False), *rules(), *rules(new=True)], []
    for picture, s in zip(pictures, samples, strict=True):
        outcomes = np.stack([draw_rule(world, rule, s.scene) for rule in every]).astype(np.float32)
        seen, meant = (np.square(outcomes - p).sum((1, 2, 3)).argmin() for p in (picture, s.target))
        right.append(seen == meant)
    return float(np.mean(right))


def score_rules(arguments, count=128):
    """Print how well rules are followed on held-out subjects."""
    require(len(arguments) == 1, "rules takes a run's folder")
    pipeline = sample.Pipeline(*arguments, sample.best_device())
    world = data.Shapes(pipeline.size)
    for name, new in (("rules of training", False), ("new combinations", True)):
        samples = [in_context(world, random.Random(f"scores {i}"), True, new) for i in range(count)]
        print(f"{name}: {rule_following(world, pipeline.draw(samples), samples):.3f} right")


# --- Command line -------------------------------------------------------------


def main(arguments):
    """Run train.py or sample.py with this connector and these tasks, or score rules."""
    programs = {"train": train.main, "sample": sample.main, "rules": score_rules}
    if not arguments or arguments[0] in ("-h", "--help"):
        return print(__doc__)
    program, *arguments = arguments
    require(program in programs, f"{program}: the first argument must be one of {', '.join(programs)}")
    programs[program](arguments)


if __name__ == "__main__":
    sample.cli(main, "extras.multi")
