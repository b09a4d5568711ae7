"""Several images in one prompt, and a connector that needs few tokens for each.

    python -m extras.multi train tiny --model.connector=query --model.n_query=8 --out=out/query
    python -m extras.multi train tiny --instruct.mix=subject_driven:1,multi_image:1 --out=out/multi
    python -m extras.multi sample out/query "The star in <image>.\\nA big star at the top" --images=star.png

These are train.py and sample.py, with

    --model.connector=query   a small Q-Former (MENTOR section 3.1): --model.n_query learned queries per image
    multi_image               a task: images of two subjects and a caption -> the scene with both
    in_context                a task: two scenes, each before and after a change that no word names, and a
                              third -> the third after it
"""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import sample
import train
from data import COLORS, PATTERNS, PLACES, Placed, Sample, Subject
from mentor import CONNECTORS, Attention, split_heads
from tokenizer import require

# --- The query connector ---


class CrossAttention(Attention):
    """Attention from x (M, Q, D) to source (M, K, D'); mask (M, 1, 1, K) bool: what of it is real."""

    def __init__(self, width, n_head, source_width):
        super().__init__(width, n_head)
        self.k, self.v = (nn.Linear(source_width, width) for _ in range(2))

    def forward(self, x, source, mask=None):
        q, k, v = (split_heads(y, self.n_head) for y in (self.q(x), self.k(source), self.v(source)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (M, H, Q, D / H)
        return self.out(y.transpose(1, 2).flatten(2))


class QueryBlock(nn.Module):
    """Queries and words attend to each other; then the queries alone attend to the patches (BLIP-2)."""

    def __init__(self, width, n_head, vision_width):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = CrossAttention(width, n_head, width)
        self.cross_attention = CrossAttention(width, n_head, vision_width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, patches, mask, n_query):
        h = self.norm1(x)
        x = x + self.attention(h, h, mask)
        queries, words = x[:, :n_query], x[:, n_query:]
        x = torch.cat([queries + self.cross_attention(self.norm2(queries), patches), words], dim=1)
        return x + self.mlp(self.norm3(x))


class QueryConnector(nn.Module):
    """Learned queries gather from the patches what the words of the prompt ask for:
    (M, n_patch, Dv) -> (M, image_tokens, Dt)."""

    def __init__(self, config):
        super().__init__()
        width, n_head, vision_width = config.text.width, config.text.n_head, config.vision.width
        require(width % n_head == 0, f"model.text.width={width}: for queries a multiple of n_head={n_head}")
        self.queries = nn.Parameter(torch.randn(config.image_tokens, width) * 0.02)
        self.word_in = nn.Linear(width, width)
        self.patch_norm = nn.LayerNorm(vision_width)
        self.blocks = nn.ModuleList(QueryBlock(width, n_head, vision_width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, patches, words, mask):
        """words (M, L, Dt), mask (M, L) bool: each image's prompt, and which of its positions are real."""
        n = len(self.queries)
        x = torch.cat([self.queries.expand(len(patches), -1, -1), self.word_in(words)], dim=1)
        mask, patches = F.pad(mask, (n, 0), value=True)[:, None, None], self.patch_norm(patches)
        for block in self.blocks:
            x = block(x, patches, mask, n)  # (M, n + L, Dt)
        return self.out(self.norm(x[:, :n]))


CONNECTORS["query"] = QueryConnector

# --- Two tasks ---


def multi_image(world, rng, held_out=False):
    """Images of two objects, each centred on black, and the caption of a scene with both -> that scene."""
    scene = world.random_scene(rng, world.random_subjects(rng, 2, held_out))
    images = [world.cut_out(p._replace(place=PLACES.index("center"), size=1)) for p in scene.subjects]
    return Sample("multi_image", data.subject_prompt(world, scene), images, world.draw(scene), scene)


# A rule (color, corner) paints the subject and moves it; None leaves it as it is. An eighth of those that do
# both is held out.
RULES = list(itertools.product((None, *range(len(COLORS))), (None, 0, 2, 6, 8)))
HELD_OUT_RULES = [rule for rule in RULES if None not in rule and sum(rule) % 8 == 0]
TRAIN_RULES = [rule for rule in RULES[1:] if rule not in HELD_OUT_RULES]  # the first does nothing


def follow(rule, scene):
    """The scene with its one subject painted and moved."""
    (subject, place, size), = scene.subjects
    color, corner = rule
    if color is not None:
        subject = Subject(subject.shape, color, color, PATTERNS.index("solid"))
    return scene._replace(subjects=(Placed(subject, place if corner is None else corner, size),))


def in_context(world, rng, held_out=False):
    """Two scenes, each before and after a rule that no word names, and a third -> the third after it."""
    rule, scenes = rng.choice(HELD_OUT_RULES if held_out else TRAIN_RULES), []
    while len(scenes) < 6:
        before = world.random_scene(rng, world.random_subjects(rng, 1, held_out))
        after = follow(rule, before)
        if held_out or after.subjects[0].subject in world.train_subjects:
            scenes += [before, after]
    *images, target = map(world.draw, scenes)
    return Sample("in_context", "<image> is <image>.\n" * 2 + "<image> is", images, target, scenes[5])


data.TASKS |= {"multi_image": multi_image, "in_context": in_context}


def main(arguments):
    """Run train.py or sample.py with this connector and these tasks."""
    programs = {"train": train.main, "sample": sample.main}
    if not arguments or arguments[0] in ("-h", "--help"):
        return print(__doc__)
    require(arguments[0] in programs, f"{arguments[0]}: the first argument must be train or sample")
    programs[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sample.cli(main, "extras.multi")
