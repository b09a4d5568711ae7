"""Draw with a trained model, and score it.

    python sample.py out/tiny "The star in <image>.\\nA big star at the top left on a green background" --images=ref.png

Read in order: choosing a code (filters, guidance); generate (prefill, then one cached step per code); faster forms of it
(CUDA graphs, packed matrices, bfloat16 on GPUs; skip at first); the judge that reads a drawing back into a scene; Pipeline
(a trained model and its tokenizers); the scores (CP, PF and their bounds); --bench; the command line with DreamBench's
layouts.
"""

import argparse
import hashlib
import itertools
import random
import re
import sys
import textwrap
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import mentor
import tokenizer
from data import (WORLDS, Collate, Placed, Sample, Scene, ShapeSubject, TextTokenizer, contact_sheet, object_line, to_picture,
                  tokenizer_pixels)
from mentor import KVCache, Mentor, SamplingConfig, first_line, read_json
from tokenizer import VQGAN

# --- Choosing a code ---------------------------------------------------------------------------------------------


def guide(conditional, unconditional, cfg_scale):
    """Classifier-free guidance on logits: l_u + (l_c - l_u) * cfg_scale. Scale 1 is conditional, 0 unconditional."""
    return unconditional + (conditional - unconditional) * cfg_scale


def filter_logits(logits, temperature, top_k, top_p):
    """Temperature, then top-k (ties with the k-th stay), then top-p (the best code always stays): (B, V) -> (B, V), with
    minus infinity for codes that are out. top_k 0 and top_p 1 keep all."""
    logits = logits / max(temperature, 1e-5)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        out = probability.cumsum(-1) - probability > top_p                               # the better codes have more without it
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits


def choose(logits, sampling, generator):
    """Choose one code per row: logits (B, V) float32 -> (B,) int64. Temperature 0 takes the best."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    # argmax(p / Exp(1)) is a draw from p; unlike multinomial it does not wait for the GPU
    noise = torch.empty(probabilities.shape, device=generator.device).exponential_(generator=generator).to(probabilities.device)
    return (probabilities / noise).argmax(-1)


# --- Generation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, batch, sampling, generator, decoder=None):
    """Draw the codes of every prompt in the batch.

    model: Mentor in eval mode; batch: a data.Batch on its device; sampling: a mentor.SamplingConfig; generator: a
    torch.Generator; decoder: the object whose prefill and decode_step to call, a GraphedDecoder or (default) the model.
    Returns codes (B, N) int64.

    With guidance the batch is doubled: first conditional, then unconditional prefixes of the same lengths.
    """
    hidden, lengths = model.encoder(batch), batch.lengths
    drop_none = torch.zeros(len(batch), dtype=torch.bool, device=lengths.device)
    drops = {0: [~drop_none], 1: [drop_none]}.get(sampling.cfg_scale, [drop_none, ~drop_none])
    prefix = torch.cat([model.projector(hidden, lengths, drop) for drop in drops])
    return continue_prefix(decoder or model, prefix, lengths.repeat(len(drops)), len(drops) == 2, model.config.decoder.n_code,
                           sampling, generator, row_multiple(model))


def continue_prefix(decoder, prefix, lengths, guided, n_code, sampling, generator, row_multiple=1):
    """Read the prefixes (R, P, D) of lengths (R,), R = B or with guidance 2B, then draw code by code. Returns (B, n_code).
    The decoder gets a multiple of row_multiple rows: the last ones are filled up with prefixes of zeros."""
    R, codes = len(prefix), []
    more = -R % row_multiple
    logits, cache = decoder.prefill(F.pad(prefix, (0, 0, 0, 0, 0, more)), F.pad(lengths, (0, more), value=1))
    for k in range(n_code):
        logits = guide(*logits[:R].chunk(2), sampling.cfg_scale) if guided else logits[:R]
        codes.append(choose(logits, sampling, generator))                                # (B,)
        if k + 1 < n_code:
            logits = decoder.decode_step(F.pad(codes[-1].repeat(2 if guided else 1), (0, more)), cache)
    return torch.stack(codes, 1)


# --- The same function, sooner: prepare a model for a device. Only rounding changes (bfloat16 on GPUs); skip at first. 

# Prompts are padded to a multiple of this, so that a CPU splits attention's sums alike for a prompt alone and in a batch.
PROMPT_MULTIPLE = 32


def row_multiple(model):
    """The decoder's rows on a CPU must be a multiple of this, so that a prompt's logits are the same bits alone and in a batch:
    rows beyond whole fours (in oneDNN's layout, a row alone) go through other kernels, which round differently."""
    return 1 if model.decoder.norm.weight.device.type != "cpu" else 2 if is_large(model) else 4


def record_graph(step):
    """Record the kernels that step() launches on the current device. Returns a function that runs them again, and step's tensor,
    which each run overwrites."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # once unrecorded: libraries make allocations for this stream that may not be recorded
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # a training run's other threads allocate too
        result = step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result


class GraphedDecoder:
    """Mentor's prefill and decode_step, with each step a recorded CUDA graph: one launch instead of hundreds. A graph has fixed
    shapes and addresses. So codes, logits and cache stay in place from prompt to prompt, and each number of buckets that attention
    reads has its own graph, recorded when first needed. Another batch size starts over."""

    def __init__(self, model, record=record_graph):
        self.model, self.record, self.cache = model, record, None
        self.warmup = 0.0                       # seconds spent recording

    def prefill(self, prefix, lengths):
        """Mentor.prefill, always into the same cache, which has room for the longest possible prompt."""
        R, P, _ = prefix.shape
        if self.cache is None or R != len(self.codes):
            config = self.model.config
            self.graphs, self.cache = {}, None  # free their memory before the new cache takes its own
            self.cache = KVCache(config.decoder, R, max(P, config.context), prefix.device, prefix.dtype)
            self.codes = torch.zeros(R, dtype=torch.long, device=prefix.device)
        return self.model.prefill(prefix, lengths, self.cache)

    def decode_step(self, codes, cache):
        """Mentor.decode_step; the next call overwrites the logits."""
        self.codes.copy_(codes)
        read = cache.whole_buckets(cache.used + 1)
        if read not in self.graphs:
            started = time.perf_counter()
            self.graphs[read] = self.recorded(cache)
            self.warmup += time.perf_counter() - started
        replay, logits = self.graphs[read]
        used = cache.used
        replay()
        cache.used = used + 1
        return logits

    def recorded(self, cache):
        """Record the next step as a graph, leaving the cache unchanged."""
        used, state = cache.used, (cache.mask, cache.slot, cache.position)
        before = [tensor.clone() for tensor in state]

        def step():
            cache.used = used
            return self.model.decode_step(self.codes, cache)

        graph, cache.used = self.record(step), used
        for tensor, old in zip(state, before):
            tensor.copy_(old)
        return graph


PACK_FROM = 256  # decoder width: narrower matrices fit the CPU's cache, where oneDNN's calls cost more than they save


def packed_linear(weight, x):
    """F.linear with a weight in oneDNN's layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def attend_one(q, k, v, mask):
    """Attention as products of matrices, for one query a row. The CPU's fused kernel gives each thread a buffer whose place in
    memory sets how its sums round, so that a prompt's bits would depend on which thread computes it."""
    if mask is None:  # the prefix
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = torch.add(mask, q @ k.transpose(2, 3), alpha=q.shape[-1] ** -0.5)           # (B, H, 1, slots)
    return scores.softmax(-1) @ v


def is_large(model):
    """Whether the decoder's matrices gain from oneDNN's layout."""
    return model.config.decoder.width >= PACK_FROM and torch.backends.mkldnn.is_available()


def pack(model):
    """On a CPU, copy the decoder's matrices (none has a bias) into the layout that is fastest for few rows. Large ones get
    oneDNN's layout and are read at the memory's speed; small ones are transposed, which halves the time of a call. The weights
    themselves stay, for saving; if they change, this must run again. Attention becomes attend_one."""
    for block in model.decoder.blocks:
        block.attention.attend = attend_one
    for linear in (module for module in model.decoder.modules() if isinstance(module, nn.Linear)):
        weight = linear.weight.detach()
        if is_large(model):
            layout = torch.ops.mkldnn._reorder_linear_weight(weight, 2)  # for 2 rows, one guided prompt
            linear.forward = partial(packed_linear, layout)
        else:
            linear.forward = partial(torch.matmul, other=weight.t().contiguous())


def make_ready(model, device):
    """Put a Mentor on the device in its fastest form for drawing. Returns the object whose prefill and decode_step to call. Not
    for a model in training: its weights may lose half their bits, or drawing may use copies that do not follow them."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs are recorded on the current device; on another they would be empty
        if torch.cuda.is_bf16_supported(including_emulation=False):
            model.bfloat16()  # half the bytes to read per step; the rotary table, complex, stays exact
    model.to(device).eval()
    if device.type == "cpu":
        pack(model)
    return GraphedDecoder(model) if device.type == "cuda" else model


# --- The judge: reads a drawing back into the scene it shows -----------------------------------------------------


class ShapesJudge:
    """Analysis by synthesis: of all scenes with one subject, the picture shows the one whose render is nearest.

    8 shapes x 9 places x 2 sizes x 176 fills x 32 backgrounds are too many to render one by one, but the squared
    distance splits into regions (outside, first colour, second colour), so the search over fills and backgrounds
    is a few matrix products. The best geometries are then compared exactly, antialiased edges included.
    """

    SHORTLIST = 12

    def __init__(self, world):
        self.attributes = world.attributes
        self.geometries = list(itertools.product(*(range(len(names)) for names in (data.SHAPES, data.PLACES, data.SIZES))))
        coverage = np.stack([world.shape_mask(*g).ravel() for g in self.geometries])                       # (G, P)
        second = np.stack([[world.pattern_mask(p, *world.center(place, size), False).ravel() for p in range(len(data.PATTERNS))]
                           for _, place, size in self.geometries])                                         # (G, 4, P)
        self.first = torch.from_numpy(coverage[:, None] * (1 - second))      # weight of the first colour at each pixel
        self.second = torch.from_numpy(coverage[:, None] * second)
        self.outside = torch.from_numpy(1 - coverage)
        self.colors = torch.from_numpy(data.RGB) / 255                                                     # (8, 3)
        grounds = [world.background(c, p).reshape(-1, 3) for c in range(len(data.COLORS)) for p in range(len(data.PATTERNS))]
        self.grounds = torch.from_numpy(np.stack(grounds)) / 255                                           # (32, P, 3)
        same = torch.eye(len(self.colors), dtype=torch.bool)
        self.forbidden = torch.stack([~same if p == "solid" else same for p in data.PATTERNS])             # (4, 8, 8)

    def distances(self, picture):
        """A picture's pixels; the squared distance of each geometry and pattern with its best colours; of each pixel to each ground."""
        x = torch.from_numpy(picture.reshape(-1, 3).astype(np.float32)) / 255                              # (P, 3)
        to_color = (x[:, None] - self.colors).square().sum(-1)                                             # (P, 8)
        to_ground = (x[:, None] - self.grounds.transpose(0, 1)).square().sum(-1)                           # (P, 32)
        fill = (self.first @ to_color)[..., :, None] + (self.second @ to_color)[..., None, :]              # (G, 4, 8, 8)
        return x, fill.masked_fill(self.forbidden, torch.inf).flatten(2).amin(-1), to_ground               # (P, 3), (G, 4), (P, 32)

    def read(self, picture):
        """The nearest scene of one subject to a picture, uint8 (S, S, 3)."""
        x, fill, to_ground = self.distances(picture)
        ground_error, ground = (self.outside @ to_ground).min(-1)                                          # (G,)
        shortlist = (fill + ground_error[:, None]).flatten().topk(self.SHORTLIST, largest=False).indices.tolist()
        candidates = [self.exact(x, g, pattern, ground[g]) for g, pattern in (divmod(i, len(data.PATTERNS)) for i in shortlist)]
        return min(candidates, key=lambda candidate: candidate[0])[1]

    def read_two(self, picture):
        """The nearest scene of two small subjects: their masks do not overlap, so their changes to the distance add up."""
        x, fill, to_ground = self.distances(picture)
        change = fill.amin(1)[:, None] - (1 - self.outside) @ to_ground                                    # (G, 32)
        change = change.view(len(data.SHAPES), len(data.PLACES), len(data.SIZES), -1)[:, :, 0].amin(0)     # (9, 32), of small ones
        pairs = {(a, b): change[a] + change[b] + to_ground.sum(0) for a in range(len(change)) for b in range(a) if data.apart(a, b)}
        places = min(pairs, key=lambda pair: pairs[pair].min())
        ground, found = pairs[places].argmin(), []
        for place in places:
            geometries = [g for g, (_, p, size) in enumerate(self.geometries) if (p, size) == (place, 0)]
            candidates = [self.exact(x, g, pattern, ground) for g in geometries for pattern in range(len(data.PATTERNS))]
            found.append(min(candidates, key=lambda candidate: candidate[0])[1])
        return found[0]._replace(subjects=found[0].subjects + found[1].subjects)

    def exact(self, x, geometry, pattern, ground):
        """The best colours for one geometry and pattern: (squared distance, Scene)."""
        shape, place, size = self.geometries[geometry]
        color, ground_pattern = divmod(ground.item(), len(data.PATTERNS))
        w1, w2 = self.first[geometry, pattern], self.second[geometry, pattern]
        rest = x - self.outside[geometry][:, None] * self.grounds[ground]
        # |rest - w1 a - w2 b|^2 for all pairs of colours a, b, expanded
        one = (w1 @ w1) * self.colors.square().sum(1) - 2 * self.colors @ (w1 @ rest)
        two = (w2 @ w2) * self.colors.square().sum(1) - 2 * self.colors @ (w2 @ rest)
        error = one[:, None] + two[None] + 2 * (w1 @ w2) * (self.colors @ self.colors.T) + rest.square().sum()
        best = error.masked_fill(self.forbidden[pattern], torch.inf).flatten().min(0)
        a, b = divmod(best.indices.item(), len(self.colors))
        return best.values.item(), Scene(color, ground_pattern, (Placed(ShapeSubject(shape, a, b, pattern), place, size),))


def concept_preservation(seen, meant, attributes=tuple):
    """Share of the subjects' attributes (a World's; by default all: shape, colours, pattern) that match the references, in [0, 1]."""
    pairs = [pair for a, b in zip(seen.subjects, meant.subjects) for pair in zip(attributes(a.subject), attributes(b.subject))]
    return sum(x == y for x, y in pairs) / len(pairs)


def prompt_following(seen, meant):
    """Share of what the prompt asked for, in [0, 1]: background colour and pattern, place, and a single subject's size."""
    pairs = [(seen.color, meant.color), (seen.pattern, meant.pattern)]
    for a, b in zip(seen.subjects, meant.subjects):
        pairs.append((a.place, b.place))
        if len(meant.subjects) == 1:
            pairs.append((a.size, b.size))
    return sum(x == y for x, y in pairs) / len(pairs)


class EmojiJudge:
    """Analysis by synthesis for emoji: the background that fits most pixels, then the nearest of all emoji at all places."""

    def __init__(self, world):
        self.attributes = world.attributes
        self.grounds = np.stack([world.background(c, p) for c in range(len(data.COLORS)) for p in range(len(data.PATTERNS))]) / 255
        self.subjects = world.all_subjects()
        # for every place and size: (place, size, window, and of each emoji colours, transparency, their product, sum of squares)
        self.candidates = []
        for size, width in enumerate(world.widths):
            for place in range(len(data.PLACES)):
                x, y, half = *world.center(place, size), (width + 1) // 2
                window = np.s_[max(y - half, 0) : y + half, max(x - half, 0) : x + half]
                sprites = np.stack([world.sprite(Placed(s, place, size))[window] for s in self.subjects]) / 255  # (K, h, w, 4)
                colors, through = sprites[..., :3], 1 - sprites[..., 3]
                self.candidates.append((place, size, window, colors.reshape(len(sprites), -1), through.reshape(len(sprites), -1),
                                        (colors * through[..., None]).reshape(len(sprites), -1), np.square(colors).sum((1, 2, 3))))

    def read(self, picture):
        """The nearest scene of one emoji to a picture, uint8 (S, S, 3)."""
        x = picture.astype(np.float32) / 255
        distance = np.square(x - self.grounds).sum(-1)                                   # (32, S, S)
        ground = int(np.minimum(distance, 0.05).sum((1, 2)).argmin())                    # limits the weight of a subject's pixels
        found = []
        for place, size, window, colors, through, both, squared in self.candidates:
            seen, behind = x[window], self.grounds[ground][window]
            # |seen - colors - through * behind|^2 for all emoji at once, expanded
            error = (squared - 2 * colors @ seen.ravel() - 2 * through @ (seen * behind).sum(-1).ravel() + 2 * both @ behind.ravel()
                     + np.square(through) @ np.square(behind).sum(-1).ravel() + np.square(seen).sum())
            error += distance[ground].sum() - distance[ground][window].sum()
            k = error.argmin()
            found.append((error[k], Placed(self.subjects[k], place, size)))
        return Scene(*divmod(ground, len(data.PATTERNS)), (min(found, key=lambda candidate: candidate[0])[1],))


JUDGES = {"shapes": ShapesJudge, "emoji": EmojiJudge}

# --- A trained model and everything it needs ---------------------------------------------------------------------


def weights_hash(folder):
    """The first 16 hex digits of the SHA-256 of a model's weights file."""
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        stage = Path(folder).name
        raise ValueError(f"{file} is missing: train the stage {stage} first (--stage={stage}, or all stages without --stage)")
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def check_text_model(folder, text_tokenizer):
    """Raise ValueError if the stage in a folder was trained with another text model."""
    trained_with = read_json(folder / "stage.json").get("text model", text_tokenizer.digest)
    if trained_with != text_tokenizer.digest:
        raise ValueError(f"{folder} was trained with another text model (hash {trained_with}) than {folder.parent / 'spiece.model'} "
                         f"({text_tokenizer.digest}): its words would mean nothing; put the right one there")


def check_tokenizer(folder):
    """Raise ValueError if the folder's stage was trained with another tokenizer than lies beside it."""
    beside = folder.parent / "tokenizer"
    trained_with, there = read_json(folder / "stage.json").get("weights of tokenizer"), weights_hash(beside)
    if trained_with != there:
        raise ValueError(f"{folder} was trained with another tokenizer (weights {trained_with}) than {beside} holds ({there}): "
                         f"its codes would mean nothing; put the right one there, or make {folder.name} again")


def best_device():
    """The first that this machine has of cuda, mps and cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name):
    """The torch.device of that name, with its number. Raises ValueError if it is unknown, not there or holds no numbers."""
    try:
        there = torch.zeros(1, device=name)
        there.item()  # torch's device "meta" has no values
        return there.device
    except (RuntimeError, AssertionError) as error:                                      # a torch without CUDA asserts
        reason = first_line(error)[:100]
        raise ValueError(f"--device={name}: torch cannot use it here ({reason}); leave out --device, or give cpu, cuda or mps") from None


STAGES = ("instruct", "align", "pretrain")  # those whose models draw, the last one first


def finished_stages(root):
    """The folders of a run's finished stages that draw, the last one first."""
    return [root / s for s in STAGES if (root / s / "model.safetensors").is_file()]


def newest_stage(folder):
    """(a run's folder, the folder of its last finished stage), given the first or the folder of a stage in it. Raises ValueError
    if there is no such stage, or if it was trained with another tokenizer than the one beside it."""
    folder = Path(folder)
    root = folder.parent if folder.name in STAGES and not (folder / "run.json").is_file() else folder
    found = [folder] if root != folder else finished_stages(root)
    if not found or not (root / "run.json").is_file():
        raise ValueError(f"{folder} holds no trained model; `python train.py tiny --out={folder}` makes one")
    check_tokenizer(found[0])
    return root, found[0]


class Pipeline:
    """Model, image tokenizer and text tokenizer, opened from a folder that train.py wrote."""

    def __init__(self, model, vqgan, text_tokenizer, run, device):
        """Prepares the model for drawing, after which it must not be trained."""
        self.model, self.vqgan, self.text_tokenizer, self.run, self.device = model, vqgan, text_tokenizer, run, usable_device(device)
        self.decoder = make_ready(model, self.device)
        self.vqgan.to(self.device, memory_format=torch.channels_last).eval()
        config = model.config
        self.collate = Collate(text_tokenizer, config.vision.image_size, config.image_tokens, config.context,
                               vqgan.config.image_size, PROMPT_MULTIPLE)
        self.seconds = {}  # of the last draw, by part

    @classmethod
    def open(cls, folder, device):
        """Open a run's folder (its last finished stage) or the folder of a stage in it. Raises ValueError if incomplete."""
        (root, stage), device = newest_stage(folder), usable_device(device)
        model, vqgan = Mentor.from_pretrained(stage), VQGAN.from_pretrained(root / "tokenizer")
        text_tokenizer = TextTokenizer.from_file(root / "spiece.model")
        check_text_model(stage, text_tokenizer)
        return cls(model, vqgan, text_tokenizer, read_json(root / "run.json"), device)

    def world(self):
        """The built-in world of the run. Raises ValueError if it was trained on other pictures, or if run.json names no world."""
        if self.run.get("data"):
            raise ValueError(f"this model was trained on {self.run['data']}, not on a built-in world: it can draw, but not be scored")
        name, font = str(self.run.get("world")), str(self.run.get("emoji_font", ""))
        if name not in WORLDS:
            raise ValueError(f"the run's run.json names the world {name!r}; it must be one of {', '.join(WORLDS)}")
        return data.open_world(name, self.vqgan.config.image_size, font)

    def draw(self, samples, sampling=None, seed=0, batch_size=128):
        """Draw the samples' prompts. Returns pictures, uint8 (S, S, 3) each, and their codes (B, N)."""
        sampling, generator = sampling or self.model.config.sampling, torch.Generator(self.device).manual_seed(seed)
        warmup, started, codes = self.warmup(), time.perf_counter(), []
        for i in range(0, len(samples), batch_size):
            batch = self.collate(samples[i : i + batch_size]).to(self.device)
            codes.append(generate(self.model, batch, sampling, generator, self.decoder))
        codes = torch.cat(codes)
        synchronize(self.device)
        drawn, warmup = time.perf_counter(), self.warmup() - warmup
        pictures = self.decode(codes)
        self.seconds = {"codes": drawn - started - warmup, "pixels": time.perf_counter() - drawn, "warm-up": warmup}
        return pictures, codes

    def warmup(self):
        """Seconds spent so far on recording graphs."""
        return getattr(self.decoder, "warmup", 0.0)

    def decode(self, codes):
        """Codes (B, N) -> pictures."""
        return [to_picture(image) for image in self.vqgan.decode(codes)]

    def rebuild(self, pictures):
        """Pictures of any size encoded and decoded by the tokenizer alone: the best that the model could draw."""
        images = torch.stack([tokenizer_pixels(p, self.vqgan.config.image_size) for p in pictures])
        return self.decode(self.vqgan.encode(images.to(self.device)))


# --- Scores ------------------------------------------------------------------------------------------------------

PROMPTS, FEWER_PROMPTS, SCALES = 512, 128, (1.0, 2.0, 4.0, 7.5)
MEASURES = {"cp": "CP", "pf": "PF", "cp_pf": "CP*PF"}


def held_out_samples(world, task, count):
    """The fixed samples that all scores use: subjects that no training stage has seen."""
    dataset = data.WorldDataset(world, {task: 1.0}, "scores", held_out=True)
    return [dataset[i] for i in range(count)]


def judge_pictures(judge, pictures, samples):
    """Mean CP and PF of pictures against the scenes asked for, CP*PF and CP/PF, and the standard errors of the first three.
    Two subjects may be read in either order; the better one counts."""
    marks = []
    for picture, sample in zip(pictures, samples, strict=True):
        meant = sample.scene
        seen = judge.read(picture) if len(meant.subjects) == 1 else judge.read_two(picture)
        orders = (seen, seen._replace(subjects=seen.subjects[::-1]))
        marks.append(max(((concept_preservation(s, meant, judge.attributes), prompt_following(s, meant)) for s in orders), key=sum))
    each = np.array(marks)
    cp, pf = each.mean(0).tolist()
    errors = (each @ [[1, 0, pf], [0, 1, cp]]).std(0) / len(each) ** 0.5  # a product's error is that of pf * cp_i + cp * pf_i
    return {"cp": cp, "pf": pf, "cp_pf": cp * pf, "cp_over_pf": cp / max(pf, 1e-9),
            **dict(zip(("cp_se", "pf_se", "cp_pf_se"), errors.tolist()))}


def cp_by_pattern(judge, pictures, samples):
    """{pattern: mean CP of the pictures whose subject has it}; for shapes."""
    groups = {pattern: [] for pattern in data.PATTERNS}
    for pair in zip(pictures, samples, strict=True):
        groups[data.PATTERNS[pair[1].scene.subjects[0].subject.pattern]].append(pair)
    return {pattern: judge_pictures(judge, *zip(*pairs))["cp"] for pattern, pairs in groups.items() if pairs}


def pixel_l2(pictures, samples):
    """Root mean squared difference from the target, pixels in [0, 1], averaged over the pictures."""
    differences = [(p.astype(np.float32) - s.target) / 255 for p, s in zip(pictures, samples, strict=True)]
    return float(np.mean([np.sqrt(np.square(difference).mean()) for difference in differences]))


def segmentation_iou(pictures, samples):
    """Intersection over union of the pixels that are not black (any channel above 64 of 255), averaged over the pictures."""
    masks = [(p.max(-1) > 64, s.target.max(-1) > 64) for p, s in zip(pictures, samples, strict=True)]
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in masks]))


def naming_samples(world, count):
    """Held-out scenes of two subjects, a sample for each: segmentation in which only the name tells which is meant."""
    samples = []
    for scene in (s.scene for s in held_out_samples(world, "multi_image", count // 2)):
        for placed in scene.subjects:
            label = world.label(placed.subject)
            samples.append(Sample("segmentation", object_line(label), [world.draw(scene)], [label], world.cut_out(placed), None))
    return samples


def rule_following(world, pictures, samples):
    """Find the rule whose outcome is nearest to each in-context drawing. Returns the share of right rules and of right parts."""
    every, right = [data.Rule(None, None, False), *data.rules(world.name), *data.rules(world.name, new=True)], []
    for picture, sample in zip(pictures, samples, strict=True):
        outcomes = np.stack([data.draw_rule(world, rule, sample.scene) for rule in every]).astype(np.float32)
        seen, meant = (every[np.square(outcomes - p).sum((1, 2, 3)).argmin()] for p in (picture, sample.target))
        right.append([a == b for a, b in zip(seen, meant)])
    return {"whole": float(np.all(right, 1).mean()), "parts": float(np.mean(right))}


def claim_scores(pipeline):
    """The measurements behind the paper's claims, all on held-out subjects: {name: number or scores}."""
    world = pipeline.world()
    judge = JUDGES[world.name](world)

    def held_out(task, count=FEWER_PROMPTS):
        """(drawings, samples) of a task."""
        samples = held_out_samples(world, task, count)
        return pipeline.draw(samples)[0], samples

    def rules(new):
        """rule_following for the rules of training, or for new combinations of their parts."""
        samples = [data.in_context(world, random.Random(f"scores {i}"), True, new) for i in range(FEWER_PROMPTS)]
        return rule_following(world, pipeline.draw(samples)[0], samples)

    subject, rebuilt, named = held_out("subject_driven", PROMPTS), held_out("reconstruction"), naming_samples(world, FEWER_PROMPTS)
    cut = pipeline.draw(named)[0]
    others = [named[i ^ 1] for i in range(len(named))]  # the same scene, the other subject
    return {**judge_pictures(judge, *subject), "two subjects": judge_pictures(judge, *held_out("multi_image")),
            "reconstruction_l2": pixel_l2(*rebuilt),
            "tokenizer_l2": pixel_l2(pipeline.rebuild([s.target for s in rebuilt[1]]), rebuilt[1]),
            "segmentation_iou": segmentation_iou(*held_out("segmentation")),
            "named_iou": segmentation_iou(cut, named), "other_iou": segmentation_iou(cut, others),
            "known_rules": rules(new=False), "new_rules": rules(new=True),
            "repeats": float(torch.equal(*(pipeline.draw(subject[1][:8], seed=1)[1] for _ in range(2))))}


@torch.no_grad()
def next_code_loss(pipeline, samples):
    """Mean cross entropy of the targets' codes given the prompts and the codes before, in nats per code."""
    batch = pipeline.collate(samples).to(pipeline.device)
    codes = pipeline.vqgan.encode(batch.targets)
    return F.cross_entropy(pipeline.model(batch, codes, batch.drop).transpose(1, 2), codes).item()


def balance_scores(pipeline):
    """What each modality and guidance contribute, on subject-driven prompts: {case: loss, CP, PF, ...}."""
    world, default = pipeline.world(), pipeline.model.config.sampling
    judge, whole = JUDGES[world.name](world), held_out_samples(world, "subject_driven", FEWER_PROMPTS)
    only_text = [replace(s, prompt=s.prompt.split("\n")[1], images=[], names=[]) for s in whole]
    only_image = [replace(s, prompt="<image>", names=[data.WHOLE]) for s in whole]
    nothing = [replace(s, drop=True) for s in whole]
    cases = {"image and text": (whole, default.cfg_scale), "image dropped": (only_text, default.cfg_scale),
             "text dropped": (only_image, default.cfg_scale), "both dropped": (nothing, 0.0),
             **{f"guidance {scale:g}": (whole, scale) for scale in SCALES}}
    scores = {}
    for name, (samples, scale) in cases.items():
        pictures, _ = pipeline.draw(samples, replace(default, cfg_scale=scale))
        scores[name] = {"loss": next_code_loss(pipeline, samples), **judge_pictures(judge, pictures, whole)}
    return scores


def score(pipeline, out):
    """Score a model on held-out subjects: print the table, write scores.json, sheet.png and guidance.png into `out`."""
    started, world = time.perf_counter(), pipeline.world()
    judge, default = JUDGES[world.name](world), pipeline.model.config.sampling
    subject = held_out_samples(world, "subject_driven", PROMPTS)
    rebuilt, cut = (held_out_samples(world, task, FEWER_PROMPTS) for task in ("reconstruction", "segmentation"))

    def all_scores(of_subject, of_rebuilt, of_cut):
        return {**judge_pictures(judge, of_subject, subject), "reconstruction_l2": pixel_l2(of_rebuilt, rebuilt),
                "segmentation_iou": segmentation_iou(of_cut, cut)}

    drawn, *others = (pipeline.draw(samples)[0] for samples in (subject, rebuilt, cut))
    through_tokenizer = (pipeline.rebuild([s.target for s in samples]) for samples in (subject, rebuilt, cut))
    few, strip, guidance = subject[:FEWER_PROMPTS], [], {}
    for scale in SCALES:
        pictures, _ = pipeline.draw(few, replace(default, cfg_scale=scale))
        guidance[f"{scale:g}"] = judge_pictures(judge, pictures, few)
        strip.append(pictures[:8])
    scores = {**all_scores(drawn, *others), "cfg_scale": default.cfg_scale, "prompts": PROMPTS,
              "bounds": {"true renders": judge_pictures(judge, [s.target for s in subject], subject),
                         "tokenizer": all_scores(*through_tokenizer),
                         "copying the reference": judge_pictures(judge, [s.images[0] for s in subject], subject)},
              "guidance": guidance, "cp_by_pattern": cp_by_pattern(judge, drawn, subject) if world.name == "shapes" else {},
              "seconds": time.perf_counter() - started}
    out.mkdir(parents=True, exist_ok=True)
    mentor.write_json(out / "scores.json", scores)
    save_sheet(subject[:12], drawn, out / "sheet.png")
    Image.fromarray(contact_sheet([[s.images[0] for s in few[:8]], *strip], scale=2)).save(out / "guidance.png")
    print(score_table(scores))
    return scores


def score_table(scores):
    """The scores as a markdown table."""
    rows = [(f"**model**, guidance {scores['cfg_scale']:g}, {scores['prompts']} prompts", scores)]
    rows += [(f"model, guidance {scale}, {FEWER_PROMPTS} prompts", row) for scale, row in scores["guidance"].items()]
    rows += list(scores["bounds"].items())
    columns = {"CP": "cp", "PF": "pf", "CP*PF": "cp_pf", "CP/PF": "cp_over_pf",
               "recon. L2": "reconstruction_l2", "segm. IoU": "segmentation_iou"}
    cells = [[name, *(row.get(key, "") for key in columns.values())] for name, row in rows]
    patterns = "".join(f", {pattern} {cp:.2f}" for pattern, cp in scores["cp_by_pattern"].items())
    return (table(["held-out subjects", *columns], cells) + f"\nCP by the subject's pattern: {patterns[2:]}" * bool(patterns)
            + f"\nscored in {scores['seconds']:.0f} s")


def table(header, rows, number="{:.3f}".format):
    """A markdown table, with floats formatted by number()."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(number(cell) if isinstance(cell, float) else str(cell) for cell in line)} |" for line in lines)


def print_table(header, rows):
    """Print measurements, with three digits each, as a table."""
    print("\n" + table(header, rows, lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}") + "\n", flush=True)


def titled_rows(rows, titles, before=0, label="", text_width=190, top=100):
    """Rows of pictures with a title over each column: uint8 (H, W, 3). rows: {the row's text: its pictures}; the text comes after
    the first `before` pictures, in a column titled `label`."""
    grid = contact_sheet(list(rows.values()), scale=3)
    step = (grid.shape[1] - 6) // len(titles)                                            # without the gap at the edge
    at = before * step
    wide = np.insert(grid, [at] * text_width, 255, axis=1)                               # a white column for the labels
    sheet = Image.fromarray(np.pad(wide, ((top, 0), (0, 0), (0, 0)), constant_values=255))
    pen = ImageDraw.Draw(sheet)
    pen.text((at + 8, 4), label, fill="black")
    for j, title in enumerate(titles):
        x = j * step + text_width * (j >= before)
        pen.multiline_text((x + 6, 4), textwrap.fill(title, 15), fill="black")
    for i, text in enumerate(rows):
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, (text_width - 20) // 6)]
        pen.multiline_text((at + 8, top + i * step + step // 3), "\n".join(lines), fill="black")
    return np.asarray(sheet)


def save_sheet(samples, drawn, path):
    """A contact sheet of samples, a row each: reference, prompt, output, ideal."""
    rows = {f"{i + 1}. {s.prompt}": [data.center_crop(s.images[0], len(picture)) if s.images else None, picture, s.target]
            for i, (s, picture) in enumerate(zip(samples, drawn))}
    Image.fromarray(titled_rows(rows, ["reference", "output", "ideal"], before=1, label="prompt", text_width=330, top=24)).save(path)


def show_pictures(pipeline, samples, out):
    """Draw samples of own pictures into out/sheet.png, and their targets from themselves; print how near those come."""
    save_sheet(samples, pipeline.draw(samples)[0], out / "sheet.png")
    targets = [s.target for s in samples]
    again = [Sample("reconstruction", "The image is <image>", [target], [data.WHOLE], target, None) for target in targets]
    print(f"reconstruction L2 of {len(samples)} pictures: {pixel_l2(pipeline.draw(again)[0], again):.4f}, "
          f"the tokenizer alone {pixel_l2(pipeline.rebuild(targets), again):.4f}; look at {out}/sheet.png")


# --- Speed (--bench): every variant beside its baseline, in turns, so that noise affects both --------------------


def synchronize(device):
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(variants, device, rounds=5):
    """{name: function} -> {name: median seconds per call}: each once to warm up, then all in turn, `rounds` times."""
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, function in variants.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def measure_limits(device, dtype):
    """Measure a device's limits: bytes per second of a copy (read plus written), FLOPs per second of a matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, 2**28 if device.type == "cuda" else 2**25, device=device)
    x = torch.randn(size, size, device=device, dtype=dtype)
    seconds = median_seconds({"copy": lambda: b.copy_(a), "product": lambda: x @ x}, device, 9)
    return 2 * a.nbytes / seconds["copy"], 2 * size**3 / seconds["product"]


class CacheFreeDecoder:
    """The baseline for the KV cache: reads prefix and codes again for every code."""

    def __init__(self, model):
        self.model = model

    def prefill(self, prefix, lengths):
        """As Mentor.prefill; the cache holds everything to read again."""
        cache = [prefix, lengths, lengths.new_empty(len(lengths), 0)]
        return self.logits(*cache), cache

    def decode_step(self, codes, cache):
        """As Mentor.decode_step."""
        cache[2] = torch.cat([cache[2], codes[:, None]], dim=1)
        return self.logits(*cache)

    def logits(self, prefix, lengths, codes):
        """Logits of the code that follows `codes`, (R, V)."""
        hidden = self.model.next_code_hidden(prefix, lengths, F.pad(codes, (0, 1)))      # the code to predict is never read
        return self.model.decoder.output(hidden[:, -1]).float()


STEPS = 8  # codes that a measurement reads


def some_steps(decoder, prefix, done=0):
    """A function that reads STEPS codes after prefix (R, P, D) and `done` codes, the same ones at every call."""
    R, P, _ = prefix.shape
    _, cache = decoder.prefill(prefix, torch.full((R,), P, device=prefix.device))
    codes = torch.zeros(R, dtype=torch.long, device=prefix.device)
    cache.mask.zero_()

    def run():
        cache.used = P + done
        cache.slot.fill_(P + done - 1)
        cache.position.fill_(done)
        for _ in range(STEPS):
            decoder.decode_step(codes, cache)

    return run


class Bench:
    """Cost of drawing with random weights at a preset's sizes: each method prints a table."""

    def __init__(self, preset, device):
        if preset not in mentor.PRESETS:
            raise ValueError(f"--bench={preset}: must be one of {', '.join(mentor.PRESETS)}")
        torch.manual_seed(0)
        small, config = mentor.PRESETS["tiny"], mentor.PRESETS[preset]
        self.preset, self.device = preset, device
        self.config = replace(config, vision=small.vision, connector=small.connector, text=small.text)  # read once per prompt
        self.model = self.new()
        self.decoder = make_ready(self.model, device)
        self.graphed = self.decoder is not self.model
        self.dtype = self.model.decoder.norm.weight.dtype
        self.n_prefix, self.n_code = min(64, config.context), min(64, config.decoder.n_code)
        self.prefix = self.prefixes(1, self.n_prefix)
        self.weights = sum(p.numel() for p in self.model.decoder.parameters()) - self.model.decoder.code_embedding.weight.numel()

    def new(self, **sizes):
        """A new model, with other decoder sizes."""
        return Mentor(replace(self.config, decoder=replace(self.config.decoder, **sizes)))

    def prefixes(self, samples, length):
        """Prefixes for that many guided samples, (2 * samples, length, D)."""
        return torch.randn(2 * samples, length, self.config.decoder.width, device=self.device, dtype=self.dtype)

    def again(self):
        """The model's decoder with a new cache."""
        return GraphedDecoder(self.model) if self.graphed else self.model

    def against_plain(self):
        """Codes/s for one prompt: each optimisation beside the plain way."""
        generator, lengths = torch.Generator(self.device).manual_seed(0), torch.full((2,), self.n_prefix, device=self.device)

        def loop(decoder, rows=row_multiple(self.model)):
            return lambda: continue_prefix(decoder, self.prefix, lengths, True, self.n_code, self.config.sampling, generator, rows)

        ours, rows = loop(self.decoder), []
        baselines = [("KV cache", "cache-free loop", loop(CacheFreeDecoder(self.model), 1))]
        if self.graphed:
            baselines.append(("steps as CUDA graphs", "launched one by one", loop(self.model)))
        else:
            baselines.append(("matrices packed", "as they are", loop(self.new().eval())))
        for name, baseline, theirs in baselines:
            fast, slow = median_seconds({name: ours, baseline: theirs}, self.device, 3).values()
            rows.append([name, self.n_code / fast, baseline, self.n_code / slow, slow / fast])
        print_table([f"one prompt, {self.n_code} codes", "codes/s", "against", "codes/s", "ratio"], rows)
        if not self.graphed:
            print("(CUDA graphs: no CUDA here)")

    def by_samples(self, copied, multiplied):
        """Steps with more and more prompts at once, beside the limits of copying (bytes/s) and multiplying (FLOPs/s)."""
        samples, size, decoder = (1, 2, 4, 8, 16, 32, 64), self.dtype.itemsize, self.config.decoder
        seconds = {}
        for n in samples:  # one at a time: all caches together would fill a GPU
            try:
                seconds.update(median_seconds({n: some_steps(self.again(), self.prefixes(n, self.n_prefix))}, self.device, 3))
            except torch.OutOfMemoryError:
                break  # the table ends where memory does
        cached = 2 * self.n_prefix * decoder.n_layer * decoder.width * size
        limits = {n: max((self.weights * size + 2 * n * cached) / copied, 4 * n * self.weights / multiplied) for n in seconds}
        print_table(["prompts at once", "codes/s", "ms per step", "limit, ms", "of the limit"],
                    [[str(n), STEPS * n / seconds[n], 1e3 * seconds[n] / STEPS, 1e3 * limits[n], f"{STEPS * limits[n] / seconds[n]:.0%}"]
                     for n in seconds])

    def by_grid(self):
        """Steps early and late in an image, for images of more and more codes."""
        rows = []
        for side in (16, 32, 64):
            decoder = make_ready(self.new(grid_size=side), self.device)
            at = [int((side**2 - 1 - STEPS) * share) for share in (0, 1 / 3, 2 / 3, 1)]
            seconds = list(median_seconds({k: some_steps(decoder, self.prefix, k) for k in at}, self.device, 3).values())
            first, last, mean = seconds[0] / STEPS, seconds[-1] / STEPS, np.mean(seconds) / STEPS
            rows.append([f"{side} x {side}", 1e3 * first, 1e3 * last, side**2 * mean])
        print_table(["codes", "ms per code, first", "last", "s per image"], rows)

    def by_prefix(self):
        """Prefill and steps for longer and longer prefixes."""
        rows = []
        for length in sorted({32, 128, 512, self.config.context}):
            prefix, lengths = self.prefixes(1, length), torch.full((2,), length, device=self.device)
            seconds = median_seconds({"prefill": lambda: self.model.prefill(prefix, lengths),
                                      "steps": some_steps(self.again(), prefix)}, self.device, 3)
            rows.append([str(length), 1e3 * seconds["prefill"], 1e3 * seconds["steps"] / STEPS])
        print_table(["prefix tokens", "prefill, ms", "ms per code"], rows)

    def pixels(self):
        """The VQ decoder in two memory layouts, and its share of the time of one image."""
        vqgan, plain = (VQGAN(tokenizer.PRESETS[self.preset]).to(self.device).eval() for _ in range(2))
        vqgan.to(memory_format=torch.channels_last)
        codes = torch.zeros(1, self.config.decoder.n_code, dtype=torch.long, device=self.device)
        last, first, steps = median_seconds({"last": lambda: vqgan.decode(codes), "first": lambda: plain.decode(codes),
                                             "steps": some_steps(self.decoder, self.prefix)}, self.device, 3).values()
        share = last / (codes.numel() * steps / STEPS + last)
        print_table(["VQ decoder, one image", "ms", "against", "ms", "ratio", "of the time"],
                    [["channels last", 1e3 * last, "channels first", 1e3 * first, first / last, f"{share:.0%}"]])


@torch.no_grad()
def bench(preset, device):
    """Measure and print a preset's speed in drawing."""
    tables = Bench(preset, device)
    copied, multiplied = measure_limits(device, tables.dtype)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{preset}: a decoder of {tables.weights / 1e6:.4g}M weights in {str(tables.dtype)[6:]}, guided, prefixes of {tables.n_prefix}; "
          f"{torch.get_num_threads()} threads; {machine} copies {copied / 1e9:.3g} GB/s and multiplies {multiplied / 1e12:.3g} TFLOPS")
    tables.against_plain()
    tables.by_samples(copied, multiplied)
    tables.by_grid()
    tables.by_prefix()
    tables.pixels()


# --- Command line ------------------------------------------------------------------------------------------------


def enlarged(picture):
    """Repeat a small picture's pixels until it is at least 256 wide, so that people can see it."""
    scale = -(-256 // picture.shape[1])
    return picture.repeat(scale, 0).repeat(scale, 1)


def save_gif(pipeline, codes, path):
    """Save an animation of one image appearing code by code, codes (N,), in up to 32 frames: cells not yet drawn are grey."""
    side, order = pipeline.model.config.decoder.grid_size, torch.arange(len(codes), device=codes.device)
    counts = np.linspace(1, len(codes), min(32, len(codes))).round().astype(int).tolist()
    so_far = torch.stack([torch.where(order < count, codes, codes[count - 1]) for count in counts])
    pictures = []
    for count, picture in zip(counts, pipeline.decode(so_far)):
        cell = picture.shape[0] // side
        drawn = (np.arange(len(codes)) < count).reshape(side, side).repeat(cell, 0).repeat(cell, 1)
        pictures.append(Image.fromarray(enlarged(np.where(drawn[..., None], picture, 200).astype(np.uint8))))
    pictures[0].save(path, save_all=True, append_images=pictures[1:] + [pictures[-1]] * 15, duration=80, loop=0)


def chosen_sampling(pipeline, options):
    """The model's SamplingConfig with the command line's changes."""
    given = {f.name: getattr(options, f.name) for f in fields(SamplingConfig)}
    return replace(pipeline.model.config.sampling, **{key: value for key, value in given.items() if value is not None})


def draw_prompt(pipeline, options):
    """Draw one prompt `--n` times; returns the pictures in rows of up to four."""
    images = [data.load_image(path) for path in options.images]
    names = re.findall(r"[Tt]he ([^.\n]*?) in <image>", options.prompt)
    names = names if len(names) == len(images) else [data.WHOLE] * len(images)
    sample = Sample("prompt", options.prompt, images, names, None, None)
    pipeline.text_tokenizer.check_words(options.prompt)
    sampling = chosen_sampling(pipeline, options)
    pictures, codes = pipeline.draw([sample] * options.n, sampling, options.seed)
    drawing, decoding, warmup = pipeline.seconds.values()
    print(f"{options.n} x {codes.shape[1]} codes in {drawing:.2f} s, {codes.numel() / drawing:.0f} codes/s, "
          f"then {decoding:.2f} s for the pixels ({decoding / (drawing + decoding):.0%} of the time)"
          + f", warm-up {warmup:.1f} s before" * (warmup > 0) + "; " + ", ".join(f"{k}={v}" for k, v in asdict(sampling).items()))
    if sampling.temperature == 0:
        print("temperature 0 takes the likeliest code each time: such pictures are flat; 0.6 to 1 gives them detail")
    if options.gif:
        save_gif(pipeline, codes[0], Path(options.out).with_suffix(".gif"))
        print(f"wrote {Path(options.out).with_suffix('.gif')}")
    return [pictures[i : i + 4] for i in range(0, len(pictures), 4)]


def reconstruct(pipeline, options):
    """An image, its reconstruction by the tokenizer alone, and by the model; prints the L2 of both."""
    size = pipeline.vqgan.config.image_size
    image = data.center_crop(data.load_image(options.reconstruct), size)
    ceiling = pipeline.rebuild([image])[0]
    options.prompt, options.images, options.n = "The image is <image>", [options.reconstruct], 1
    drawn = draw_prompt(pipeline, options)[0][0]
    target = [Sample("reconstruction", "", [], [], image, None)]
    print(f"pixel L2: tokenizer {pixel_l2([ceiling], target):.4f}, model {pixel_l2([drawn], target):.4f} (image | tokenizer | model)")
    return [[image, ceiling, drawn]]


def reconstruct_alone(folder, options):
    """The image and what the tokenizer in a folder makes of it, before there is a model; prints their L2."""
    device, vqgan = usable_device(options.device), VQGAN.from_pretrained(folder)
    image = data.center_crop(data.load_image(options.reconstruct), vqgan.config.image_size)
    pixels = tokenizer_pixels(image, vqgan.config.image_size)[None].to(device)
    rebuilt = to_picture(vqgan.to(device).decode(vqgan.encode(pixels))[0])
    print(f"pixel L2: tokenizer {pixel_l2([rebuilt], [Sample('reconstruction', '', [], [], image, None)]):.4f} (image | tokenizer)")
    return [[image, rebuilt]]


def dreambench_subjects(folder):
    """Yield (id, picture file, label, prompts) of DreamBench's dataset. Raises ValueError naming what is missing.

    It has SUBJECT/*.jpg, the first of which is the reference, and prompts_and_classes.txt with SUBJECT,LABEL lines and two
    lists of 'a {0} {1} on ...'.format(...), for objects and for cats and dogs; {0} is DreamBooth's rare word, left out here.
    """
    file = Path(folder) / "prompts_and_classes.txt"
    text = data.read_words(file)
    lists = [re.findall(r"^'(.*)'\.format", part, re.M) for part in text.split("Live Subject Prompts")]
    for name, label in re.findall(r"^([^\s,']+),[ \t]*([^,'\n]*[^,'\s])[ \t]*$", text, re.M)[1:]:  # without the head
        pictures = sorted((Path(folder) / name).glob("*.jpg"))
        if not pictures:
            raise ValueError(f"{file}: there is no picture in {Path(folder) / name}")
        if len(list(filter(None, lists))) < 2:
            raise ValueError(f"{file}: needs two lists of 'a {{0}} {{1}} ...'.format(...), the second after Live Subject Prompts")
        yield name, pictures[0], label, [p.replace("{0} ", "").replace("{1}", label) for p in lists[label in ("cat", "dog")]]


def dreambench_plus_subjects(folder):
    """The same for DreamBench++'s data: images/**/N.jpg and captions/**/N.txt, a label on the first line, prompts on the others."""
    captions = Path(folder) / "captions"
    for file in sorted(captions.rglob("*.txt")):
        picture = Path(folder) / "images" / file.relative_to(captions).with_suffix(".jpg")
        label, *prompts = [line.strip() for line in data.read_words(file).splitlines() if line.strip()] or [""]
        if not prompts:
            raise ValueError(f"{file}: needs a label on the first line and prompts on the others")
        if not picture.is_file():
            raise ValueError(f"{file}: there is no picture {picture} to go with it")
        group = f"live_subject_{file.parent.name}" if file.parent.name in ("animal", "human") else file.parent.name
        yield f"{group}_{file.stem}_{label.lower().replace(' ', '_')}", picture, label, prompts


def draw_dreambench(pipeline, options, out):
    """Draw every prompt of DreamBench or DreamBench++ options.n times, in the layout of DreamBench++'s scorer: src_image/,
    text/ and tgt_image/, each with a folder per subject that has PROMPT_SAMPLE.jpg or .txt."""
    folder = options.dreambench
    subjects = [*dreambench_subjects(folder), *dreambench_plus_subjects(folder)]
    if not subjects:
        raise ValueError(f"--dreambench={folder}: no captions/**/*.txt and no prompts_and_classes.txt in it; give DreamBench++'s "
                         "data folder, which has images/ and captions/, or DreamBench's dataset folder")
    prompts = {}
    for name, _, label, asked in subjects:
        if name in prompts:
            raise ValueError(f"--dreambench={folder}: two subjects would share the folder {name}; give one of them another label")
        prompts[name] = [f"{object_line(label)}\n{prompt}" for prompt in asked]
    for prompt in (p for asked in prompts.values() for p in asked):
        pipeline.text_tokenizer.check_words(prompt)
        pipeline.collate.encode(prompt, 1)
    for _, file, *_ in tqdm(subjects, desc="checking pictures"):  # before hours of drawing
        data.load_image(file)
    for name, file, label, asked in tqdm(subjects, desc="subjects"):
        source = data.load_image(file)
        wanted = [Sample("dreambench", prompt, [source], [label], None, None) for prompt in prompts[name] for _ in range(options.n)]
        pictures, _ = pipeline.draw(wanted, chosen_sampling(pipeline, options), options.seed, batch_size=16)
        for kind in ("src_image", "text", "tgt_image"):
            (out / kind / name).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            stem = "{}_{}".format(*divmod(i, options.n))
            Image.fromarray(source).save(out / "src_image" / name / f"{stem}.jpg", quality=95)
            (out / "text" / name / f"{stem}.txt").write_text(asked[i // options.n], encoding="utf-8")
            Image.fromarray(picture).save(out / "tgt_image" / name / f"{stem}.jpg", quality=95)
    print(f"wrote {out}: {len(subjects)} subjects, {sum(map(len, prompts.values()))} prompts, {options.n} samples each")


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError."""

    def error(self, message):
        raise ValueError(f"{message}; `python sample.py --help` lists the arguments")


SAMPLING = ("cfg_scale", "temperature", "top_k", "top_p", "seed")
NOT_FOR = {  # what would be ignored, and why
    "score": ("draws as the model's config.json says, with seed 0", (*SAMPLING, "n", "images", "gif")),
    "reconstruct": ("draws the one picture that it names, once", ("n", "images")),
    "dreambench": ("draws what its folder holds, as pictures", ("images", "gif")),
    "bench": ("measures random weights and writes nothing", (*SAMPLING, "n", "images", "gif", "out"))}


def make_parser():
    """The parser of the command line."""
    parser = Parser(prog="sample.py", description="Draw with a trained model, or score it.",
                    formatter_class=argparse.RawDescriptionHelpFormatter, epilog=r"""examples:
  python sample.py trained/tiny "A big red star at the top on a green background"
  python sample.py trained/tiny "The star in <image>.\nA small star at the left on a blue background" --images=assets/ref.png
  python sample.py trained/tiny --segment=star --images=assets/ref.png
  python sample.py out/tiny/align --reconstruct=assets/ref.png
  python sample.py out/tiny --score""")
    parser.add_argument("folder", nargs="?", default="", help="folder that train.py wrote, for example out/tiny or out/tiny/align")
    parser.add_argument("prompt", nargs="?", help=r"text with one <image> for each of --images; \n is a line break")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="reference images, in the order of their <image>")
    parser.add_argument("--segment", metavar="NAME", help="cut the named subject out of the one image in --images")
    parser.add_argument("--reconstruct", metavar="FILE", help="reconstruct this image, beside the tokenizer's own reconstruction")
    parser.add_argument("--score", action="store_true", help="score the model on held-out subjects of its world: scores.json, sheet.png and guidance.png")
    parser.add_argument("--bench", metavar="PRESET", help="measure how fast a preset draws, with random weights; needs no folder")
    parser.add_argument("--dreambench", metavar="FOLDER",
                        help="draw all prompts of DreamBench++'s data folder, or DreamBench's dataset, --n times each, for a scorer")
    parser.add_argument("--out", default="sample.png",
                        help="file to write (default %(default)s); with --score or --dreambench a folder (default: the model's)")
    parser.add_argument("--n", type=int, default=1, help="how many samples to draw, as a grid (default %(default)s)")
    parser.add_argument("--cfg_scale", type=float,
                        help="guidance: 0 unconditional, 1 conditional, more follows the prompt more closely (default: the model's)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's)")
    parser.add_argument("--top_k", type=int, help="keep this many codes, 0 all (default: the model's)")
    parser.add_argument("--top_p", type=float, help="keep the best codes up to this total probability (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same picture (default %(default)s)")
    parser.add_argument("--gif", action="store_true", help="also write an animation of the first sample appearing")
    parser.add_argument("--device", default=best_device(), help="cuda, mps or cpu; by default the first that is there (here %(default)s)")
    return parser


def check_options(options, parser):
    """Raise ValueError naming an option that is out of its range, missing, or would be ignored."""
    limits = {"n": (1, 10**6), "seed": (0, 2**63), **{f.name: mentor.LIMITS[f.name] for f in fields(SamplingConfig)}}
    for key, (low, high) in limits.items():
        value = getattr(options, key)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{key}={value}: must be at least {low} and at most {high}")
    asked = [f"--{key}" for key in ("segment", "reconstruct", "score", "dreambench", "bench") if getattr(options, key)]
    asked += ["a prompt"] * (options.prompt is not None)
    out, whole_folder = Path(options.out), options.score or options.dreambench
    file = next(filter(Path.is_file, (out, *out.parents)), None)
    writable = out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and out.parent.is_dir()
    for wrong, message in (
        (len(asked) > 1, f"{' and '.join(asked)}: give one of them"),
        (options.segment and len(options.images) != 1,
         f"--segment={options.segment}: give one image to cut it out of, --images=FILE; got {len(options.images)}"),
        (not whole_folder and not writable, f"--out={out}: must end in .png, .jpg or .webp, in a folder that exists"),
        (whole_folder and file and options.out != parser.get_default("out"),
         f"--out={out}: must be a folder, an existing or a new one, but {file} is a file"),
        (not (options.folder or options.bench),
         "give the folder that train.py wrote, for example out/tiny; `python sample.py --help` lists the arguments"),
        (not asked, 'give a prompt ("A big red star at the top on a green background"), --segment, --reconstruct, --dreambench or --score'),
    ):
        if wrong:
            raise ValueError(message)
    for mode, (why, keys) in NOT_FOR.items():
        own = [f"--{key}" for key in keys if getattr(options, key) != parser.get_default(key)]
        if getattr(options, mode) and own:
            raise ValueError(f"--{mode} {why}: leave out {', '.join(own)}")


def parse(arguments):
    """Parse the command line into an argparse Namespace. Raises ValueError naming the argument that is wrong."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_options(options, parser)
    prompt = object_line(options.segment) if options.segment else options.prompt or ""   # "" is a prompt too
    options.prompt = prompt.replace("\\n", "\n")
    return options


def save_rows(rows, out):
    """Write rows of pictures as one."""
    Image.fromarray(contact_sheet([[enlarged(p) for p in row] for row in rows], pad=8)).save(out)
    print(f"wrote {out}")


def main(arguments):
    """Run the command line."""
    options = parse(arguments)
    if options.bench:
        return bench(options.bench, usable_device(options.device))
    folder = Path(options.folder)
    if options.reconstruct and (folder / "tokenizer" / "model.safetensors").is_file() and not finished_stages(folder):
        return save_rows(reconstruct_alone(folder / "tokenizer", options), options.out)
    pipeline = Pipeline.open(options.folder, options.device)
    if options.score:
        score(pipeline, Path(options.folder if options.out == "sample.png" else options.out))
    elif options.dreambench:
        draw_dreambench(pipeline, options, Path(options.folder, "dreambench") if options.out == "sample.png" else Path(options.out))
    else:
        save_rows(reconstruct(pipeline, options) if options.reconstruct else draw_prompt(pipeline, options), options.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"sample.py: out of memory ({first_line(error)}): draw fewer at once with --n", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
