"""Everything up to a training batch: pictures, text, the built-in worlds, the tasks, manifests.

    scene         --task--┐
                          ├--> Sample (prompt with <image> placeholders, reference images, target image) --Collate--> Batch
    manifest line --------┘

A picture is a uint8 array (H, W, 3) throughout this file; only batches hold tensors. A sample depends on (seed, index) alone,
so any step of a run can be replayed, and any process can make its own share.

Read in order: pictures, the text tokenizer, the worlds (Shapes, then Emoji), the tasks of MENTOR's section 3,
manifests (the same tasks from picture files), making manifests of folders and of COCO, datasets and batches.
"""

import difflib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import stat
import sys
import unicodedata
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# --- Pictures ----------------------------------------------------------------------------------------------------

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
EXIF_TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE, 6: Image.ROTATE_270,
              7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # of EXIF's orientation tag


def load_image(path, under="white"):
    """Read any image file as a picture, uint8 (H, W, 3): rotated by its EXIF tag, 16 bits scaled to 8, the first frame of an
    animation, transparency on the colour `under`. Raises ValueError naming a file that is no readable image, or has 32 bits a channel."""
    try:
        with Image.open(path) as file:
            turn = EXIF_TURNS.get(file.getexif().get(0x0112))  # not ImageOps.exif_transpose, which fails at any other odd tag
            image = file if turn is None else file.transpose(turn)
            if image.mode[0] in "IF":
                values = np.asarray(image)
                if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("its values of 32 bits may mean any brightness")
                solid = (values != image.info.get("transparency", -1)) * 255
                image = Image.merge("LA", [Image.fromarray(v.round().astype(np.uint8)) for v in (values / 257, solid)])
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, under), image)
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such image file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); give a PNG, JPEG or WebP file") from None


def middle_part(picture):
    """A picture, cut at both ends to 100 times its width if it is longer: resized as a whole it would take gigabytes."""
    height, width = picture.shape[:2]
    top, left = (max(0, (side - 100 * min(height, width)) // 2) for side in (height, width))
    return picture[top : height - top, left : width - left]


def center_crop(picture, size):
    """A picture's or mask's largest centred square at size x size: a box filter halves it, then bicubic (as ADM and LlamaGen)."""
    image = Image.fromarray(middle_part(picture))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def vision_pixels(picture, size):
    """A picture as CLIP's input: short side resized (bicubic), centred square, normalised; float32 (3, size, size)."""
    image, short = Image.fromarray(middle_part(picture)), min(picture.shape[:2])
    image = image.resize((int(image.width * size / short), int(image.height * size / short)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    square = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    return torch.from_numpy(((square / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1).copy())


def tokenizer_pixels(picture, size):
    """A picture as the VQGAN's input: float32 (3, size, size) in [-1, 1]."""
    return torch.from_numpy(center_crop(picture, size).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


def to_picture(image):
    """An image tensor (3, H, W), clamped to [-1, 1], as a picture."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def contact_sheet(rows, pad=2, scale=1):
    """A grid of pictures, uint8 (H, W, 3): `rows` is a list of lists of pictures of one size (None leaves a gap)."""
    height, width = next(p for row in rows for p in row if p is not None).shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((pad + len(rows) * (height + pad), pad + columns * (width + pad), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture is not None:
                y, x = pad + i * (height + pad), pad + j * (width + pad)
                sheet[y : y + height, x : x + width] = picture
    return sheet.repeat(scale, 0).repeat(scale, 1)


# --- The text tokenizer ------------------------------------------------------------------------------------------

HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate, which SentencePiece cannot read
EDGE = re.compile(r"(?<!\w)[^\w\s]|[^\w\s](?!\w)")  # a character that is no letter, digit or space, at the edge of a word


def punctuation_apart(text):
    """A text with spaces around the punctuation at the edges of words: "(a T-shirt)." -> " ( a T-shirt )  . "."""
    return EDGE.sub(lambda found: f" {found[0]} " if unicodedata.category(found[0])[0] in "PS" else found[0], text)


class TextTokenizer:
    """SentencePiece pieces plus T5's added tokens: ids 0 pad, 1 </s>, 2 unknown, then the pieces, then
    <extra_id_99> .. <extra_id_0> and last <image> (32100 with T5's own 32000 pieces).

    After an added token the text gets a leading space again, as in transformers' T5: `in <image>.` is `_in <image> _ .`.
    """

    PAD, EOS, UNKNOWN = 0, 1, 2

    def __init__(self, proto):
        """proto: the bytes of a SentencePiece model (`spiece.model`)."""
        if not proto:
            raise RuntimeError("it is empty")  # SentencePiece would take that as "none given"
        self.proto, self.digest = proto, hashlib.sha256(proto).hexdigest()[:16]
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.whole_words = len(self.pieces.encode("a.b")) == 1  # then `beach.` would be another word than `beach`
        first = self.pieces.vocab_size()
        self.added = {"<pad>": self.PAD, "</s>": self.EOS, "<unk>": self.UNKNOWN}
        self.added.update({f"<extra_id_{99 - i}>": first + i for i in range(100)})
        self.image_id = self.added["<image>"] = first + 100
        self.vocab_size = first + 101
        self.split = re.compile("(" + "|".join(map(re.escape, self.added)) + ")")

    def encode(self, text, image_tokens=1):
        """The text's ids and </s>, a list of int; each <image> becomes `image_tokens` ids."""
        ids = []
        for part in self.split.split(text):
            if part in self.added:
                ids += [self.added[part]] * (image_tokens if part == "<image>" else 1)
            else:
                ids += self.pieces.encode(self.apart(part))
        return ids + [self.EOS]

    def apart(self, text):
        """A text as the pieces want it: with punctuation apart if they are whole words."""
        return punctuation_apart(text) if self.whole_words else text

    def unknown_word(self, text):
        """The first word of a text that the text model does not know; None if it knows all."""
        for word in self.apart(text.replace("<image>", " ")).split():
            if HALF.search(word) or self.UNKNOWN in self.pieces.encode(word):
                return word
        return None

    def check_words(self, text):
        """Raise ValueError naming the first word that the text model does not know, and known words like it."""
        word = self.unknown_word(text)
        if word:
            known = sorted({self.pieces.id_to_piece(i).strip("▁") for i in range(3, self.pieces.vocab_size())})
            near = difflib.get_close_matches(word.lower(), known, n=3) or [*known[:20], *["..."] * (len(known) > 20)]
            raise ValueError(f"the text model does not know the word {word!r}; similar known words: {', '.join(near)}")

    @classmethod
    def train(cls, sentences):
        """Train a case-folded SentencePiece model of the sentences' 32,000 most frequent words and their punctuation."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(punctuation_apart, sentences), model_writer=model, model_type="word", vocab_size=32_000,
            max_sentence_length=2**30,  # longer ones would be left out
            hard_vocab_limit=False, normalization_rule_name="nmt_nfkc_cf", pad_id=cls.PAD, eos_id=cls.EOS,
            unk_id=cls.UNKNOWN, bos_id=-1, character_coverage=1.0, minloglevel=2)
        return cls(model.getvalue())

    @classmethod
    def from_file(cls, path):
        """Read `spiece.model`. Raises ValueError naming the file if it is missing or no SentencePiece model."""
        try:
            return cls(Path(path).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path}: the text tokenizer's SentencePiece model is missing") from None
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({str(error).splitlines()[0]})") from None


# --- The built-in worlds -----------------------------------------------------------------------------------------

COLORS = {"red": (215, 35, 40), "orange": (245, 140, 25), "yellow": (250, 220, 45), "green": (35, 150, 65),
          "cyan": (45, 190, 215), "blue": (35, 65, 200), "purple": (130, 45, 165), "pink": (245, 140, 190)}
RGB = np.array(list(COLORS.values()), np.float32)  # (8, 3), of the colours by index
PATTERNS = ("solid", "striped", "dotted", "split")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SIZES = ("small", "big")
WHOLE = "whole image"  # the query connector's words when no subject is meant (section 3.1)
PROMPT_WORDS = ["The in", ".", "The image is", WHOLE]  # in the tasks' prompts, besides captions and labels
SUPERSAMPLE = 8  # antialiasing: masks are drawn this many times larger, then averaged

Placed = namedtuple("Placed", "subject place size")        # a subject, an index into PLACES and one into SIZES
Scene = namedtuple("Scene", "color pattern subjects")      # the background's two indices, and one or two Placed


def polygon(*corners):
    """Corners as (angle in degrees from the top, radius) pairs -> points in the unit box, y down."""
    return [(r * np.sin(np.radians(a)), -r * np.cos(np.radians(a))) for a, r in corners]


ARM = 0.36  # half the width of the cross's arms
SHAPES = {
    "circle": polygon(*((a, 1.0) for a in range(0, 360, 6))),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": polygon(*((a, 1.05 if a % 72 == 0 else 0.48) for a in range(0, 360, 36))),
    "heart": [(16 * np.sin(t) ** 3 / 17, (2 - 13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)) / 17 - 0.1)
              for t in np.linspace(0, 2 * np.pi, 60)],
    "cross": [(ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM), (ARM, 1),
              (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM), (-ARM, -1)],
    "ring": polygon(*((a, 1.0) for a in range(0, 361, 6)), *((a, 0.42) for a in range(360, -1, -6))),
}


def with_article(words):
    """For example "a red half", "an orange half"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def an_eighth(thing):
    """Whether a tuple belongs to the eighth of all, chosen by hash, that training never shows."""
    return zlib.crc32(repr(tuple(thing)).encode()) % 8 == 0


def apart(a, b):
    """Whether two small subjects fit at these places: two columns or two rows apart."""
    return max(abs(a // 3 - b // 3), abs(a % 3 - b % 3)) == 2


class World:
    """Scenes of one or two subjects on a patterned background, and the words for them.

    A subclass defines the subjects:
        all_subjects()        every subject, a tuple each
        label(subject)        its name in prompts
        describe(subject)     its full description in captions
        subject_mask(placed)  where it covers the picture, float32 (S, S, 1) in [0, 1]
        draw_subject(placed)  its colours, float32 (S, S, 3) in [0, 255]; only those under its mask are used

    Subjects stand on a 3 x 3 grid of places and are 14/32 or 20/32 of the image wide. Places are whole cells of a code
    grid of 8 per side, so a subject has similar codes wherever it stands.
    """

    def __init__(self, image_size):
        self.image_size = image_size
        self.widths = [round(image_size * w / 32) for w in (14, 20)]

    def center(self, place, size):
        """Pixel centre (x, y) of a place: 8, 16, 24 of 32 for small subjects and 12, 16, 20 for big ones."""
        middle, step = self.image_size // 2, self.image_size * (8, 4)[size] // 32
        return middle + (place % 3 - 1) * step, middle + (place // 3 - 1) * step

    @functools.lru_cache(maxsize=None)
    def pattern_mask(self, pattern, x, y, upright):
        """Where a pattern shows its second colour: float32 (S, S, 1) in [0, 1], anchored at (x, y) pixels. On subjects
        stripes lie and a split stands (left and right); on backgrounds (upright) stripes stand and a split lies."""
        fine = self.image_size * SUPERSAMPLE
        grid = (np.arange(fine, dtype=np.float32) + 0.5) / SUPERSAMPLE
        u, v = (grid[None, :] - x, grid[:, None] - y) if upright else (grid[:, None] - y, grid[None, :] - x)
        u, v = np.broadcast_arrays(u, v)
        band = self.image_size / 8
        if PATTERNS[pattern] == "solid":
            mask = np.zeros_like(u)
        elif PATTERNS[pattern] == "striped":
            mask = np.floor(u / band) % 2
        elif PATTERNS[pattern] == "dotted":
            mask = np.hypot(u % (2 * band) - band, v % (2 * band) - band) < 0.8 * band  # half the area
        else:
            mask = v >= 0
        return self.shrink(mask)

    def shrink(self, fine):
        """Average a supersampled mask down to (S, S, 1)."""
        s = self.image_size
        return np.asarray(fine, np.float32).reshape(s, SUPERSAMPLE, s, SUPERSAMPLE).mean((1, 3))[..., None]

    @functools.lru_cache(maxsize=None)
    def background(self, color, pattern):
        """The empty scene, float32 (S, S, 3) in [0, 255]: a light tone of the colour, patterned in a lighter one."""
        base, second = 0.55 * RGB[color] + 0.45 * 255, 0.2 * RGB[color] + 0.8 * 255
        mask = self.pattern_mask(pattern, 0, self.image_size // 2, True)
        return base + mask * (second - base)

    def draw(self, scene):
        """The picture of a scene, uint8 (S, S, 3)."""
        image = self.background(scene.color, scene.pattern)
        for placed in scene.subjects:
            image = image + self.subject_mask(placed) * (self.draw_subject(placed) - image)
        return (image + 0.5).astype(np.uint8)

    def cut_out(self, placed):
        """The target of segmentation, the subject's pixels on black: uint8 (S, S, 3)."""
        return (self.subject_mask(placed) * self.draw_subject(placed) + 0.5).astype(np.uint8)

    def attributes(self, subject):
        """What makes a subject itself, a tuple: CP compares it, and the held-out eighth is chosen by it."""
        return subject

    def held_out(self, subject):
        """Whether a subject is kept out of training."""
        return an_eighth(self.attributes(subject))

    @functools.cached_property
    def subjects(self):
        """{False: training subjects, True: held-out ones}."""
        return {held: [s for s in self.all_subjects() if self.held_out(s) == held] for held in (False, True)}

    def random_scene(self, rng, subjects):
        """The subjects at random places on a random background; two of them are two columns or two rows apart."""
        color, pattern = rng.randrange(len(COLORS)), rng.randrange(len(PATTERNS))
        if len(subjects) == 1:
            return Scene(color, pattern, (Placed(subjects[0], rng.randrange(9), rng.randrange(2)),))
        while True:
            a, b = rng.randrange(9), rng.randrange(9)
            if apart(a, b):
                return Scene(color, pattern, (Placed(subjects[0], a, 0), Placed(subjects[1], b, 0)))

    def vary(self, subject, rng, alone):
        """The subject with other looks, and if it is alone perhaps without its name, if the world has such."""
        return subject

    def random_subjects(self, rng, count, held_out=False, varied=True, alone=True):
        """Some training (or held-out) subjects with different labels, so that a label names one of them. Training subjects are
        varied, so that the label does not tell what they look like, unless there is only text to tell it. alone: whether a
        single one is alone in its reference."""
        subjects = [rng.choice(self.subjects[held_out])]
        while len(subjects) < count:
            other = rng.choice(self.subjects[held_out])
            if self.label(other) not in map(self.label, subjects):
                subjects.append(other)
        return [self.vary(s, rng, alone and count == 1) for s in subjects] if varied and not held_out else subjects

    def caption(self, scene, looks=True):
        """The sentence for a scene. With looks=False it leaves the subjects' colours and patterns to a reference image."""
        words = []
        for subject, place, size in scene.subjects:
            what = self.describe(subject) if looks else self.label(subject)
            words.append(f"a {SIZES[size]} {what} at the {PLACES[place]}")
        color, pattern = list(COLORS)[scene.color], PATTERNS[scene.pattern]
        ground = f"{color} {pattern} background" if pattern != "solid" else f"{color} background"
        text = " and ".join(words) + f" on {with_article(ground)}"
        return text[0].upper() + text[1:]

    def text_tokenizer(self):
        """A text tokenizer that knows every word of this world."""
        return TextTokenizer.train(self.sentences())

    def sentences(self):
        """Sentences with every word of this world's prompts."""
        grounds = [f"on an on a {c} {p} background" for c in COLORS for p in PATTERNS[1:]]
        places = [f"a {s} at the {p} and" for s in SIZES for p in PLACES]
        things = [self.describe(s) for kind in self.subjects.values() for s in kind]
        return grounds + places + things + [self.label(s) for s in self.all_subjects()] + PROMPT_WORDS


ShapeSubject = namedtuple("ShapeSubject", "shape color color2 pattern")  # indices; color2 == color when solid


class Shapes(World):
    """8 shapes x 8 colours x second colour x 4 fill patterns: 1,408 subjects."""

    name = "shapes"

    def all_subjects(self):
        """A solid subject has no second colour."""
        everything = itertools.product(range(len(SHAPES)), range(len(PATTERNS)), range(len(COLORS)), range(len(COLORS)))
        return [ShapeSubject(s, a, b, p) for s, p, a, b in everything if (a == b) == (PATTERNS[p] == "solid")]

    def label(self, subject):
        return list(SHAPES)[subject.shape]

    def describe(self, subject):
        """For example "red star with blue stripes"."""
        color, color2 = list(COLORS)[subject.color], list(COLORS)[subject.color2]
        pattern = {"solid": "", "striped": f" with {color2} stripes", "dotted": f" with {color2} dots",
                   "split": f" with {with_article(color2)} half"}
        return f"{color} {self.label(subject)}{pattern[PATTERNS[subject.pattern]]}"

    @functools.lru_cache(maxsize=None)
    def shape_mask(self, shape, place, size):
        """A shape's coverage, float32 (S, S, 1) in [0, 1]."""
        (x, y), radius, fine = self.center(place, size), self.widths[size] / 2, self.image_size * SUPERSAMPLE
        points = [((x + px * radius) * SUPERSAMPLE - 0.5, (y + py * radius) * SUPERSAMPLE - 0.5)
                  for px, py in list(SHAPES.values())[shape]]
        canvas = Image.new("L", (fine, fine))
        ImageDraw.Draw(canvas).polygon(points, fill=1)
        return self.shrink(np.asarray(canvas))

    def subject_mask(self, placed):
        return self.shape_mask(placed.subject.shape, placed.place, placed.size)

    def draw_subject(self, placed):
        first, second = RGB[placed.subject.color], RGB[placed.subject.color2]
        mask = self.pattern_mask(placed.subject.pattern, *self.center(placed.place, placed.size), False)
        return first + mask * (second - first)


EMOJI_FONTS = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "/System/Library/Fonts/Apple Color Emoji.ttc",
               "C:/Windows/Fonts/seguiemj.ttf")
CHANNELS = tuple(itertools.permutations(range(3)))
TURNS = (None, *Image.Transpose)  # mirrored and turned by quarters: eight ways
# a character, or its left half and another's right half; order of the colour channels; one of TURNS; whether it has its name
EmojiSubject = namedtuple("EmojiSubject", "character other channels turn named", defaults=("", CHANNELS[0], None, True))
NAMED = 0.3  # share of emoji with their names, where a training reference shows one alone
HALVES = 0.5  # share of the nameless that are put together from two


class Emoji(World):
    """The same scenes with emoji as subjects: real drawings with exact masks, labelled by their Unicode names."""

    name = "emoji"
    COUNT = 1280  # emoji in use, the first in Unicode order

    def __init__(self, image_size, font=""):
        """font: path of a colour emoji font; empty: try EMOJI_FONTS. Raises ValueError if there is none."""
        super().__init__(image_size)
        found = [f for f in ([font] if font else EMOJI_FONTS) if Path(f).is_file()]
        if not found:
            raise ValueError(f"no colour emoji font at {font or ', '.join(EMOJI_FONTS)}; install one "
                             "(Debian: `apt install fonts-noto-color-emoji`) or name a file with --emoji_font=PATH")
        for strike in (109, 160, 96, 64, 137):  # bitmap fonts open only at the sizes they contain
            try:
                self.font = ImageFont.truetype(found[0], strike)
                break
            except OSError:
                continue
        else:
            raise ValueError(f"emoji_font={found[0]}: does not open at any known bitmap size; use Noto Color Emoji")

    @functools.lru_cache(maxsize=None)
    def glyph(self, character):
        """The font's colour drawing, cropped to its bounds, an RGBA image; None if it has none."""
        canvas = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(canvas).text((20, 20), character, font=self.font, embedded_color=True)
        box = canvas.getchannel("A").getbbox()
        return canvas.crop(box) if box else None

    @functools.cached_property
    def characters(self):
        """{character: name} of the emoji in use: single code points with a name and a colour drawing."""
        kept, missing = {}, self.glyph("\U0010FFFD")  # the font's drawing for characters it lacks, if any
        for code in (*range(0x231A, 0x3300), *range(0x1F000, 0x1FB00)):
            name = unicodedata.name(chr(code), "").lower()
            if not name or "regional indicator" in name or "modifier" in name or "component" in name:
                continue
            glyph = self.glyph(chr(code))
            if glyph and glyph != missing and glyph.convert("RGB").getcolors(8) is None:  # more than 8 colours
                kept[chr(code)] = name
            if len(kept) == self.COUNT:
                break
        return kept

    def all_subjects(self):
        return [EmojiSubject(c) for c in self.characters]

    def label(self, subject):
        """The emoji's Unicode name in lower case, or a word for all of them."""
        return self.characters[subject.character] if subject.named else "symbol"

    describe = label  # there is no more to say

    def attributes(self, subject):
        """The character, in whatever colours."""
        return subject[:1]

    def vary(self, subject, rng, alone):
        """Swap the colour channels, turn, and mostly hide the name and perhaps put two halves together, 48 looks for each of a million
        drawings: or a model learns them by heart. Of several emoji only names tell which is which."""
        subject = subject._replace(channels=rng.choice(CHANNELS), turn=rng.choice(TURNS), named=not alone or rng.random() < NAMED)
        if subject.named or rng.random() > HALVES:
            return subject
        return subject._replace(other=rng.choice(self.subjects[False]).character)

    @functools.lru_cache(maxsize=1000)  # of 64 pixels a side: 66 MB in every data process
    def sprite(self, placed):
        """RGBA of a placed emoji, float32 (S, S, 4) in [0, 255], colours premultiplied by coverage."""
        subject, width = placed.subject, self.widths[placed.size]
        drawing, canvas = self.scaled(subject.character, width), Image.new("RGBa", (self.image_size,) * 2)
        if subject.other:
            drawing.paste(self.scaled(subject.other, width).crop((width // 2, 0, width, width)), (width // 2, 0))
        if subject.turn is not None:
            drawing = drawing.transpose(subject.turn)
        x, y = self.center(placed.place, placed.size)
        canvas.paste(drawing, (x - width // 2, y - width // 2))
        return np.asarray(canvas, np.float32)[..., [*subject.channels, 3]]

    def scaled(self, character, width):
        """A character's drawing as large as fits into a square of `width` pixels a side, in its middle: a premultiplied image."""
        glyph, square = self.glyph(character).convert("RGBa"), Image.new("RGBa", (width, width))
        scale = width / max(glyph.size)
        glyph = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.LANCZOS)
        square.paste(glyph, (width // 2 - glyph.width // 2, width // 2 - glyph.height // 2))
        return square

    def subject_mask(self, placed):
        return self.sprite(placed)[..., 3:] / 255

    def draw_subject(self, placed):
        sprite = self.sprite(placed)
        return (sprite[..., :3] / np.maximum(sprite[..., 3:] / 255, 1e-3)).clip(0, 255)


WORLDS = {"shapes": Shapes, "emoji": Emoji}


def open_world(name, image_size, font=""):
    """The built-in world of that name, for pictures of that many pixels per side; font: Emoji's."""
    return Emoji(image_size, font) if name == "emoji" else WORLDS[name](image_size)


# --- The tasks (MENTOR section 3.2): each turns random scenes into a prompt, reference images and a target -------


@dataclass
class Sample:
    """One example of a task, before tokenization."""

    task: str
    prompt: str                                         # with one <image> per reference
    images: list[np.ndarray]                            # the references
    names: list[str]                                    # the subject of each reference: the query connector's words
    target: np.ndarray | None                           # the picture to draw; None where only a prompt is given
    scene: Scene | None                                 # for the judge; in_context: before the rule; None: your own pictures
    drop: bool = False                                  # train without the prompt (for guidance)
    line: int = -1                                      # its line in the manifest
    mask_seed: int = 0                                  # seed of the choice of tokens that pretraining masks


TWO_SUBJECTS = 0.1  # share of scenes with two subjects, in tasks that allow them


def some_scene(world, rng, held_out, varied=True):
    """A scene of one or two subjects."""
    return world.random_scene(rng, world.random_subjects(rng, 2 if rng.random() < TWO_SUBJECTS else 1, held_out, varied))


def text_to_image(world, rng, held_out=False):
    """`{caption}` -> the image."""
    scene = some_scene(world, rng, held_out, varied=False)
    return Sample("text_to_image", world.caption(scene), [], [], world.draw(scene), scene)


def reconstruction(world, rng, held_out=False):
    """`The image is <image>`, half the time with its caption -> the same image."""
    scene = some_scene(world, rng, held_out)
    image = world.draw(scene)
    caption = f"\n{world.caption(scene)}" if rng.random() < 0.5 else ""
    return Sample("reconstruction", "The image is <image>" + caption, [image], [WHOLE], image, scene)


def segmentation(world, rng, held_out=False):
    """`The {label} in <image>.` -> the named object's pixels, the rest black."""
    scene = some_scene(world, rng, held_out)
    placed = scene.subjects[rng.randrange(len(scene.subjects))]
    label = world.label(placed.subject)
    return Sample("segmentation", object_line(label), [world.draw(scene)], [label], world.cut_out(placed),
                  scene._replace(subjects=(placed,)))


def object_line(label):
    """The line of a prompt that introduces an object."""
    return f"The {label} in <image>."


def subject_prompt(world, scene):
    """`The {label} in <image>.` for each subject, then the new scene's caption without the subjects' looks."""
    return "\n".join([*(object_line(world.label(p.subject)) for p in scene.subjects), world.caption(scene, looks=False)])


def recovery(world, rng, held_out=False):
    """The segmented object, distorted and pasted on a random other image, and the caption -> the original image."""
    scene = world.random_scene(rng, world.random_subjects(rng, 1, held_out, alone=False))
    label = world.label(scene.subjects[0].subject)
    other = some_scene(world, rng, held_out)
    while label in [world.label(placed.subject) for placed in other.subjects]:
        other = some_scene(world, rng, held_out)
    mask = world.subject_mask(scene.subjects[0])
    pasted = paste_distorted(world.cut_out(scene.subjects[0]), mask, world.draw(other), rng)
    return Sample("recovery", subject_prompt(world, scene), [pasted], [label], world.draw(scene), scene)


def paste_distorted(cut_out, mask, background, rng):
    """Paste a segmented object at a random place and scale (0.6 to 1.1) onto another picture; with probability 1/2
    also rotate it by up to 20 degrees, stretch it, shear it and change its perspective.

    cut_out, background uint8 (H, W, 3) of one size; mask float (H, W, 1) in [0, 1], not all zero.
    """
    height, width = mask.shape[:2]
    sprite = Image.fromarray(np.concatenate([cut_out, (mask * 255).astype(np.uint8)], axis=-1), "RGBa")
    left, top, right, bottom = sprite.getchannel("a").getbbox()
    # Maps output pixels to input pixels, as homogeneous 3 x 3 matrices: from the new centre, undistort, to the old centre.
    matrix = np.eye(3)
    scale = rng.uniform(0.6, 1.1)
    if rng.random() < 0.5:
        angle, stretch, shear = np.radians(rng.uniform(-20, 20)), rng.uniform(0.85, 1.18), rng.uniform(-0.2, 0.2)
        matrix = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        matrix = matrix @ np.array([[stretch, shear, 0], [0, 1 / stretch, 0], [0, 0, 1]])
        matrix[2, :2] = [rng.uniform(-0.3, 0.3) / width, rng.uniform(-0.3, 0.3) / height]
    half_w, half_h = scale * (right - left) / 2, scale * (bottom - top) / 2
    x = rng.uniform(min(half_w, width / 2), max(width - half_w, width / 2))
    y = rng.uniform(min(half_h, height / 2), max(height - half_h, height / 2))
    to_old = np.array([[1, 0, (left + right) / 2], [0, 1, (top + bottom) / 2], [0, 0, 1]])
    from_new = np.array([[1 / scale, 0, -x / scale], [0, 1 / scale, -y / scale], [0, 0, 1]])
    whole = to_old @ matrix @ from_new
    warped = sprite.transform((width, height), Image.PERSPECTIVE, (whole / whole[2, 2]).flatten()[:8].tolist(), Image.BILINEAR)
    warped = np.asarray(warped, np.float32)
    return (warped[..., :3] + (1 - warped[..., 3:] / 255) * background + 0.5).clip(0, 255).astype(np.uint8)


def subject_driven(world, rng, held_out=False):
    """A reference of the subject and the caption of a new scene -> the new scene with the same subject."""
    subjects = world.random_subjects(rng, 1, held_out)
    reference, scene = world.random_scene(rng, subjects), world.random_scene(rng, subjects)
    label = world.label(subjects[0])
    return Sample("subject_driven", subject_prompt(world, scene), [world.draw(reference)], [label], world.draw(scene), scene)


def multi_image(world, rng, held_out=False):
    """Images of one object each, centred on black, and the caption of a scene with all of them -> that scene."""
    scene = world.random_scene(rng, world.random_subjects(rng, 2, held_out))
    images = [world.cut_out(placed._replace(place=PLACES.index("center"), size=1)) for placed in scene.subjects]
    return Sample("multi_image", subject_prompt(world, scene), images, [world.label(p.subject) for p in scene.subjects],
                  world.draw(scene), scene)


# What a rule does to the subject: paint it (index into COLORS or None), move it (index into PLACES or None), cut it out (bool).
Rule = namedtuple("Rule", "color corner cut")


@functools.cache
def rules(world_name, new=False):
    """The rules that training uses, or with new=True the held-out ones: an eighth of the rules with several parts. Each part
    of a new rule is known from training, its combination is not. Only shapes can be painted."""
    found, colors = [], (None, *range(len(COLORS))) if world_name == "shapes" else (None,)
    for rule in itertools.starmap(Rule, itertools.product(colors, (None, 0, 2, 6, 8), (False, True))):
        parts = (rule.color is not None) + (rule.corner is not None) + rule.cut
        if parts and (parts > 1 and an_eighth(rule)) == new:
            found.append(rule)
    return found


def follow(rule, scene):
    """The scene with its one subject painted and moved."""
    placed, = scene.subjects
    if rule.color is not None:
        solid = ShapeSubject(placed.subject.shape, rule.color, rule.color, PATTERNS.index("solid"))
        placed = placed._replace(subject=solid)
    if rule.corner is not None:
        placed = placed._replace(place=rule.corner)
    return scene._replace(subjects=(placed,))


def draw_rule(world, rule, scene):
    """The picture of a scene after a rule."""
    after = follow(rule, scene)
    return world.cut_out(*after.subjects) if rule.cut else world.draw(after)


def in_context(world, rng, held_out=False, new_rule=False):
    """Two scenes, each before and after a rule, then a third -> the third after the rule. No word names the rule."""
    rule, scenes = rng.choice(rules(world.name, new_rule)), []
    while len(scenes) < 3:
        scene = world.random_scene(rng, world.random_subjects(rng, 1, held_out))
        if held_out or not world.held_out(follow(rule, scene).subjects[0].subject):  # paint must not make a held-out subject
            scenes.append(scene)
    before, after = [world.draw(scene) for scene in scenes], [draw_rule(world, rule, scene) for scene in scenes]
    images = [before[0], after[0], before[1], after[1], before[2]]
    return Sample("in_context", "<image> is <image>.\n<image> is <image>.\n<image> is", images, [WHOLE] * 5, after[2], scenes[2])


TASKS = {f.__name__: f for f in (text_to_image, reconstruction, segmentation, recovery, subject_driven, multi_image, in_context)}

# --- Manifests: the same tasks from picture files, one JSON line per sample --------------------------------------

FLAGS = {"generation_only": "text_to_image", "do_mask": "segmentation", "do_replace": "recovery"}
HELD_OUT_EVERY, HELD_OUT_MOST = 50, 128  # one picture in 50 is held out for validation, but at most 128
TASK_NUMBERS = {task: i for i, task in enumerate(TASKS)}


class Entry(NamedTuple):
    """A manifest line, parsed. File names are as written there."""

    task: str
    text: str                                           # a caption, or the whole prompt if it contains <image>
    picture: str                                        # the picture to draw; for segmentation, to cut from
    labels: tuple[str, ...] = ()                        # the names of the objects
    masks: tuple[str, ...] = ()                         # their masks, or
    references: tuple[str, ...] = ()                    # pictures of them

    @property
    def n_image(self):
        """Number of images in the prompt."""
        return len(self.labels) or int(self.task == "reconstruction")


def read_entry(line):
    """Parse a manifest line (bytes) into an Entry. Raises ValueError naming the field, its value and what is legal.

    | task           | objects | source_image      | image_path                 | flag            |
    |----------------|---------|-------------------|----------------------------|-----------------|
    | text_to_image  |         |                   | the picture                | generation_only |
    | reconstruction | null    | null, or the same | the picture                |                 |
    | segmentation   | label   | the picture       | the object's mask          | do_mask         |
    | recovery       | label   | the picture       | the object's mask          | do_replace      |
    | subject_driven | label   | the picture       | a reference of the subject |                 |
    | multi_image    | list    | the picture       | a list of masks (*)        |                 |

    (*) or, in input_img_list, pictures of the objects. `input_text` is the caption. If it contains <image>, once per image
    or in runs (the released manifests repeat it once per image token), it is the whole prompt. Other fields are ignored.
    """
    record = read_object(line)
    task = read_task(record)
    if task in ("text_to_image", "reconstruction"):
        picture, = strings(record, "image_path", task, 1)
        if task == "reconstruction" and strings(record, "source_image") not in ((), (picture,)):
            raise ValueError(f"source_image={record['source_image']!r}: reconstruction draws image_path={picture!r} from itself; "
                             "name the subject in objects to draw source_image from image_path")
        return Entry(task, read_text(record, task, int(task == "reconstruction")), picture)
    labels = strings(record, "objects")
    if not labels or isinstance(record["objects"], list) != (task == "multi_image"):
        needed = "at least one label" if task == "multi_image" else "one label"
        raise ValueError(f"objects={record.get('objects')!r}: {task} needs {needed}")
    if any("<image>" in label for label in labels):
        raise ValueError(f"objects={record['objects']!r}: a label stands in the prompt, where <image> is a picture's place; leave it out")
    text = read_text(record, task, len(labels))
    picture, = strings(record, "source_image", task, 1)
    given = "input_img_list" if task == "multi_image" and record.get("input_img_list") else "image_path"
    files = strings(record, given, task, len(labels))
    masked = task != "subject_driven" and given == "image_path"
    return Entry(task, text, picture, labels, files, ()) if masked else Entry(task, text, picture, labels, (), files)


def read_object(line):
    """Parse a line (bytes) into a dict. Raises ValueError if it is anything else."""
    try:
        record = json.loads(line.decode() if line.isascii() else line)   # bytes make it guess the encoding
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); each line must be one object in braces") from None
    if not isinstance(record, dict):
        raise ValueError(f"{record!r:.80}: each line must be one JSON object in braces")
    return record


def read_task(record):
    """The task, from a record's flag and the type of its objects. Raises ValueError naming a flag that is unclear."""
    flags = [flag for flag in FLAGS if record.get(flag)]
    for flag in flags:
        if record[flag] is not True or len(flags) > 1:
            raise ValueError(f"{flag}={record[flag]!r}: must be true or false, and only one of {', '.join(FLAGS)} true")
    if flags:
        return FLAGS[flags[0]]
    objects = record.get("objects")
    return "reconstruction" if objects is None else "multi_image" if isinstance(objects, list) else "subject_driven"


def strings(record, name, task="", count=None):
    """A field's text or list of texts as a tuple, () for null. Raises ValueError for anything else, or not `count` texts."""
    value = record.get(name)
    values = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    for v in values:
        if not isinstance(v, str) or not v:
            raise ValueError(f"{name}={value!r}: must be a text, a list of texts or null")
    if count is not None and len(values) != count:
        raise ValueError(f"{name}={value!r}: {task} needs {count} here, not {len(values)}")
    return values


def read_text(record, task, images):
    """A record's input_text, with one <image> per image or none at all. Raises ValueError for any other number."""
    text = record.get("input_text") or ""
    if not isinstance(text, str):
        raise ValueError(f"input_text={text!r}: must be a text")
    words = text
    if "<" in text:                                                      # by far the fastest check of a long caption
        if text.count("<image>") > images:
            text = re.sub("<image>(?:<image>)+", "<image>", text)
        if text.count("<image>") not in (0, images):
            raise ValueError(f"input_text={text!r}: {text.count('<image>')} <image> placeholders, but {task} has {images} images here; "
                             "write one for each, not side by side, or none")
        words = text.replace("<image>", "")
    if task not in ("reconstruction", "segmentation") and not words.strip():
        raise ValueError(f"input_text={text!r}: {task} needs a caption")
    return text.strip()


def entry_prompt(entry, rng=None):
    """An entry's text if that is a whole prompt, else the task's prompt with its caption; without rng, the longest one."""
    if "<image>" in entry.text or entry.task == "text_to_image":
        return entry.text
    if entry.task == "reconstruction":
        return "The image is <image>" + (f"\n{entry.text}" if entry.text and (not rng or rng.random() < 0.5) else "")
    return "\n".join([object_line(label) for label in entry.labels] + [entry.text] * (entry.task != "segmentation"))


def most_tokens(text):
    """An upper bound on a prompt's tokens, without those of its images: a piece has at least one character, and each part of
    the text may start with a piece for its leading space (the characters of <image> make up for that)."""
    return 2 + len(text if text.isascii() else unicodedata.normalize("NFKC", text))


class Manifest:
    """A file of JSON lines. Opening it checks all but keeps little more than offsets: a million take seconds and megabytes."""

    CHUNK = 2**22  # bytes of lines to check at a time

    def __init__(self, path, root="", backgrounds=None, skip_bad=False, workers=0, quiet=False, content=None):
        """root: the folder that file names are relative to, by default the manifest's own; backgrounds: the Manifest whose
        pictures go behind recovery's objects, by default this one; workers: processes to check with; quiet: no progress
        bar; content: its bytes, if the file is not written yet.

        Raises ValueError with line number, field and value at the first line that is wrong or names a missing file; with
        skip_bad such lines are left out and their messages kept in `bad`.
        """
        self.path, self.root, self.backgrounds = Path(path), str(root or Path(path).parent), backgrounds or self
        self.skip_bad, self.quiet, self.bad, self.content = skip_bad, quiet, [], content
        if content is None and not self.path.is_file():
            raise ValueError(f"{path}: there is no such manifest; give a .jsonl file, or a folder of pictures")
        rows = self.check_lines(workers)
        if not len(rows):
            first = f" that is right; the first: {self.bad[0]}" if self.bad else ""
            raise ValueError(f"{path}: the manifest has no line{first}")
        offsets, numbers, tasks, n_image, most_tokens, pictures = rows.T  # (lines,) each; copied below, so that rows is freed
        self.offsets, self.numbers = offsets.copy(), numbers.copy()      # where each line begins, and its number
        self.n_image, self.most_tokens = n_image.astype(np.int32), most_tokens.astype(np.int32)  # of its prompt
        self.task = tasks.astype(np.int8)                                # in TASK_NUMBERS
        self.held = self.choose_held_out(tasks, pictures)                # not for training
        self.usable = np.ones(len(rows), bool)                           # as far as anyone was told to look

    def check_lines(self, workers):
        """Check all lines. Returns check_chunk's rows for the right ones, (lines, 6) int64. Sets `digest`, of the lines and the
        sizes of the files they name, and `times`, of when these were written."""
        size = self.path.stat().st_size if self.content is None else len(self.content)
        chunks = -(-size // self.CHUNK)
        loader = torch.utils.data.DataLoader(range(chunks), num_workers=min(workers, chunks // 2), collate_fn=self.check_chunk)
        lines, found, digests = 0, [np.zeros((0, 6), int)], [hashlib.blake2b(digest_size=8) for _ in range(2)]
        for count, rows, wrong, states in tqdm(loader, desc=f"checking {self.path.name}", disable=self.quiet):
            for number, message in wrong:
                self.leave_out(lines + number + 1, message)
            for digest, state in zip(digests, states):
                digest.update(state)
            rows[:, 1] += lines + 1
            found.append(rows)
            lines += count
        self.digest, self.times = (digest.hexdigest() for digest in digests)
        return np.concatenate(found)

    def choose_held_out(self, tasks, pictures):
        """Choose the lines to hold out of training, bool (lines,), from each line's task number and picture hash: all lines of
        some pictures, so that training never draws them (though one may be another picture's reference). A task that would have
        no lines left keeps them."""
        different = np.unique(pictures)
        held = pictures < different[min(len(different) // HELD_OUT_EVERY, HELD_OUT_MOST)]
        for i in range(len(TASKS)):
            held[tasks == i] &= not held[tasks == i].all()
        return held

    def check_chunk(self, chunks):
        """Check the lines that begin in a chunk of the file, [its number]. Returns how many there are; (right lines, 6) int64:
        byte offset, number from 0, and check_line's four values; [(number, what is wrong)] for the others; and two digests,
        of the lines and the sizes of the files they name, and of the times of these files."""
        begin, end = chunks[0] * self.CHUNK, (chunks[0] + 1) * self.CHUNK
        with self.open() as file:
            file.seek(max(0, begin - 1))
            if begin:
                file.readline()                                          # up to the first line that begins there or later
            offset = file.tell()
            chunk = file.read(end - 1 - offset) + file.readline() if offset < end else b""
        lines, rows, wrong, files = io.BytesIO(chunk).readlines(), array("q"), [], {}
        for number, line in enumerate(lines):
            try:
                if not line.isspace():
                    rows.extend((offset, number, *self.check_line(line, files)))
            except ValueError as error:
                wrong.append((number, str(error)))
            offset += len(line)
        sizes, times = (repr([state[i] for state in files.values()]).encode() for i in range(2))
        digests = [hashlib.blake2b(state, digest_size=8).digest() for state in (chunk + sizes, times)]
        return len(lines), np.array(rows).reshape(-1, 6), wrong, digests

    def check_line(self, line, files):
        """Check a line (bytes). Returns its task's number, its prompt's n_image and most_tokens, and a hash of its picture's name.
        `files` collects the files named so far: {name: (size, time, hash of the name)}."""
        entry = read_entry(line)
        for text in (entry.text, *entry.labels):
            if not text.isascii() and HALF.search(text):
                raise ValueError(f"{text!r:.80}: contains half of a character (a lone surrogate), which no text model can read; "
                                 "correct the text")
        for name in (entry.picture, *entry.masks, *entry.references):
            if name not in files:
                files[name] = self.file_state(name, line)
        return TASK_NUMBERS[entry.task], entry.n_image, most_tokens(entry_prompt(entry)), files[entry.picture][2]

    def file_state(self, name, line):
        """Size and time of a file, and a hash of its name. Raises ValueError naming the line's field if it is missing or empty."""
        try:
            state = os.stat(os.path.join(self.root, name))
        except (OSError, ValueError):
            state = None
        if state and stat.S_ISREG(state.st_mode) and state.st_size:
            return state.st_size, state.st_mtime_ns, zlib.crc32(os.fsencode(name))
        named = next(f for f in ("image_path", "source_image", "input_img_list") if name in strings(json.loads(line), f))
        what = "it is empty, or no file" if state else f"there is no such file in {self.root}, the folder that names are relative to"
        raise ValueError(f"{named}={name!r}: {what}")

    def leave_out(self, number, message):
        """Record that a line is wrong. Raises ValueError, or with skip_bad only keeps the message."""
        self.bad.append(f"{self.path} line {number}: {message}")
        if not self.skip_bad:
            raise ValueError(self.bad[-1])

    def check_prompts(self, collate):
        """Tokenize every prompt that may be too long for the context. Raises ValueError naming the first that is, or
        with skip_bad leaves such lines out."""
        long = np.flatnonzero(self.most_tokens + self.n_image * collate.image_tokens > collate.context).tolist()
        wrong = []
        for index, entry in zip(long, self.read(long)):
            try:
                collate.encode(entry_prompt(entry), entry.n_image)
            except ValueError as error:
                self.leave_out(self.numbers[index], error)
                wrong.append(index)
        self.usable[wrong] = False

    def check_backgrounds(self):
        """Raise ValueError naming the first line of recovery that has no other picture to put behind its object."""
        usable = np.flatnonzero(self.backgrounds.usable & ~self.backgrounds.held).tolist()
        pictures = (self.backgrounds.path_of(entry.picture) for entry in self.backgrounds.read(usable))
        first = next(pictures, None)
        if any(picture != first for picture in pictures):                # as almost always, and found at once
            return
        for line in self.lines().get("recovery", ()):
            try:
                some_background(self, self[line], random.Random(0))
            except ValueError as error:
                raise ValueError(f"{self.path} line {self.numbers[line]}: {error}") from None

    def lines(self, held_out=False):
        """{task: its usable lines} to train on, or those held out; without tasks that have none."""
        chosen = self.usable & (self.held == held_out)
        found = {task: np.flatnonzero(chosen & (self.task == number)) for task, number in TASK_NUMBERS.items()}
        return {task: lines for task, lines in found.items() if len(lines)}

    def check_files(self, size, workers):
        """Open every file of every line. Returns messages about those that cannot be used; with skip_bad their lines are left out.
        Then raises ValueError if there are no others."""
        loader = torch.utils.data.DataLoader(np.flatnonzero(self.usable).tolist(), batch_size=16, num_workers=workers,
                                             collate_fn=functools.partial(self.wrong_files, size))
        batches = tqdm(loader, desc="opening all files", unit_scale=16, disable=self.quiet)
        wrong = {line: message for batch in batches for line, message in batch}
        if self.skip_bad:
            self.bad += wrong.values()
            self.usable[list(wrong)] = False
            if not self.usable.any():
                raise ValueError(f"{self.path}: the files of no line can be read; the first: {self.bad[-len(wrong)]}")
        return list(wrong.values())

    def wrong_files(self, size, lines):
        """[(index, message)] about some lines, a list of indices. A background of recovery is another line's matter."""
        wrong = []
        for line in lines:
            entry, rng = self[line], random.Random(line)
            try:
                if entry.task == "recovery":
                    entry_sample(self, entry, size)
                    some_background(self, entry, rng)
                else:
                    entry_sample(self, entry, size, rng)
            except ValueError as error:
                wrong.append((line, f"{self.path} line {self.numbers[line]}: {error}"))
        return wrong

    def open(self):
        """Open the lines as a binary file."""
        return open(self.path, "rb") if self.content is None else io.BytesIO(self.content)

    def __len__(self):
        return len(self.offsets)

    def some(self, count):
        """At most `count` entries, in order: always the same random ones, since every k-th line may be of one task."""
        return self.read(sorted(random.Random(0).sample(range(len(self)), min(count, len(self)))))

    def __getitem__(self, index):
        """The Entry of a line, counted from 0 without the bad ones."""
        return next(self.read([index]))

    def read(self, indices):
        """Yield the Entries of lines."""
        with self.open() as file:                                        # opened each time: worker processes must not share a position
            for index in indices:
                file.seek(self.offsets[index])
                yield read_entry(file.readline())

    def path_of(self, name):
        """The path of a file named by the manifest, the same for every way to write it."""
        return os.path.abspath(os.path.join(self.root, name))

    def load(self, name, under="white"):
        """The picture in a file named by the manifest, transparency on the colour `under`."""
        return load_image(os.path.join(self.root, name), under)

    def load_mask(self, name, entry, picture):
        """One of an entry's masks, bool (H, W), True above 127, transparency as black. Raises ValueError if it is not of the
        picture's size or all black."""
        mask = np.asarray(Image.fromarray(self.load(name, "black")).convert("L")) > 127
        if mask.shape != picture.shape[:2]:
            (height, width), (h, w) = mask.shape, picture.shape[:2]
            raise ValueError(f"{name}: the mask is {width} x {height} pixels, but its picture {entry.picture} is {w} x {h}; "
                             "they must be equal")
        if not mask.any():
            raise ValueError(f"{name}: the mask is all black; the object must be white (above 127)")
        return mask

    def text_tokenizer(self):
        """A word-level text tokenizer of the texts and labels, of at most 100,000 lines."""
        texts = (text.replace("<image>", " ") for entry in self.some(100_000) for text in (entry.text, *entry.labels) if text)
        return TextTokenizer.train(itertools.chain(PROMPT_WORDS, texts))


def square_of_object(picture, mask, size):
    """A picture's largest square that shows the masked object, as central as possible, at size x size.

    picture uint8 (H, W, 3), mask bool (H, W) -> uint8 (size, size, 3), float32 (size, size, 1) in [0, 1]. Raises
    ValueError if the object is too small to be seen at that size.
    """
    left, top, right, bottom = Image.fromarray(mask).getbbox()
    side, window = min(mask.shape), []
    for first, last, length in ((top, bottom, mask.shape[0]), (left, right, mask.shape[1])):
        start = min(max((length - side) // 2, last - side), first) if last - first <= side else (first + last - side) // 2
        window.append(slice(start, start + side))
    small = center_crop(mask[tuple(window)].astype(np.uint8) * 255, size)[..., None]
    if small.max() < 128:
        raise ValueError(f"the object, {mask.sum()} of {mask.size} pixels, is too small to be seen at {size} x {size}; leave it out")
    return center_crop(picture[tuple(window)], size), small.astype(np.float32) / 255


def object_on_black(picture, mask, box):
    """A masked object's bounding box (box=True), or only its own pixels, centred on a black square: uint8 (S, S, 3)."""
    left, top, right, bottom = Image.fromarray(mask).getbbox()
    window = np.s_[top:bottom, left:right]
    part = Image.fromarray(picture[window] if box else picture[window] * mask[window][..., None])
    side = max(part.size)
    x, y = (side - part.width) // 2, (side - part.height) // 2
    return np.asarray(part.crop((-x, -y, side - x, side - y)))           # black around the part


def entry_sample(manifest, entry, size, rng=None):
    """A manifest entry's Sample: target at size x size, references at their own; without rng the target alone, never random."""
    picture, labels, task = manifest.load(entry.picture), list(entry.labels), entry.task
    masks = [manifest.load_mask(name, entry, picture) for name in entry.masks]
    whole, mask = square_of_object(picture, np.logical_or.reduce(masks), size) if masks else (center_crop(picture, size), None)
    cut_out = (mask * whole + 0.5).astype(np.uint8) if task in ("segmentation", "recovery") else None
    target = cut_out if task == "segmentation" else whole
    if rng is None:
        return Sample(task, "", [], [], target, None)
    prompt = entry_prompt(entry, rng)
    if task == "segmentation":
        return Sample(task, prompt, [whole], labels, target, None)
    if task == "recovery":
        background = center_crop(manifest.backgrounds.load(some_background(manifest, entry, rng)), size)
        return Sample(task, prompt, [paste_distorted(cut_out, mask, background, rng)], labels, target, None)
    if task == "reconstruction":
        return Sample(task, prompt, [picture], [WHOLE], target, None)
    images = [manifest.load(name) for name in entry.references]
    images += [object_on_black(picture, mask, rng.random() < 0.5) for mask in masks]
    return Sample(task, prompt, images, labels, target, None)


def some_background(manifest, entry, rng):
    """The file of a picture other than the entry's, of manifest.backgrounds. Raises ValueError if none is found."""
    others, own = manifest.backgrounds, manifest.path_of(entry.picture)

    def lines():
        """Random lines; if a hundred of them will not do, all in random order."""
        yield from (rng.randrange(len(others)) for _ in range(100))
        yield from rng.sample(range(len(others)), len(others))

    for line in lines():
        if others.usable[line] and not others.held[line] and others.path_of(picture := others[line].picture) != own:
            return picture
    raise ValueError(f"{others.path} has no other picture than {entry.picture} to put behind the {entry.labels[0]!r}; "
                     "give --backgrounds a manifest or folder with more")


# --- Making manifests: of a folder of pictures, and of COCO with `python data.py coco INSTANCES CAPTIONS IMAGES_DIR OUT_DIR` 

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OBJECT_SHARE = (0.05, 0.95)  # of a COCO picture; smaller objects are hard to see on the code grid


def lines_of_picture(picture, captions, objects):
    """The manifest lines (str) of a picture with captions and objects, a (mask file, label) each."""
    caption = captions[0] if captions else ""
    records = [{"input_text": text, "image_path": picture, "generation_only": True} for text in captions]
    records.append({"input_text": caption, "image_path": picture, "source_image": picture, "objects": None})
    for mask, label in objects:
        cut = {"input_text": caption, "image_path": mask, "source_image": picture, "objects": label}
        records.append({**cut, "do_mask": True})
        if captions:
            records.append({**cut, "do_replace": True})
    return [json.dumps(record, ensure_ascii=False) + "\n" for record in records]


def read_words(file):
    """The content of a text file, "" if there is no such file. Raises ValueError naming a file that is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None


def read_caption(file):
    """The first two lines of a text file, stripped; "" for lines that are missing, or if there is no such file."""
    first, second = [*read_words(file).split("\n"), "", ""][:2]
    return first.strip(), second.strip()


def files_below(folder):
    """The files in a folder and below it, sorted, also behind links to folders (each folder once)."""
    seen, files = set(), []
    for path, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        files += [Path(path, name) for name in names]
    return sorted(files)


def manifest_of_folder(folder):
    """The manifest of a folder of pictures, as bytes; file names are relative to the folder.

        dog.jpg         a picture: .jpg, .jpeg, .png or .webp, in the folder or below it; for reconstruction
        dog.txt         its caption, on the first line; for text-to-image
        dog.mask.png    white where its object is, with the object's name on the second line of dog.txt; for
                        segmentation, and with a caption for recovery (without one, the first line stays empty)

    Raises ValueError naming a mask without picture or name, two pictures with one caption, or a folder without pictures.
    """
    pictures, masks, lines = {}, {}, []                                  # the first two: {path without suffix: file}
    for file in (f for f in files_below(folder) if f.suffix.lower() in PICTURE_SUFFIXES):
        if HALF.search(str(file.relative_to(folder))):
            raise ValueError(f"{file}: its name is not UTF-8, in which a manifest is written; rename it")
        if file.stem.endswith(".mask") and file.suffix != ".png":
            raise ValueError(f"{file}: a mask must be a .png file, since others do not keep its edges; convert or rename it")
        if file.name.endswith(".mask.png"):
            masks[file.with_name(file.name.removesuffix(".mask.png"))] = file
        elif (first := pictures.setdefault(file.with_suffix(""), file)) != file:
            raise ValueError(f"{file} and {first} would share one caption; rename one")
    for stem, mask in masks.items():
        if stem not in pictures:
            raise ValueError(f"{mask}: there is no picture of that name beside the mask")
    if not pictures:
        raise ValueError(f"{folder}: no picture in it ({', '.join(PICTURE_SUFFIXES)})")
    for stem, picture in pictures.items():
        words, mask = picture.with_suffix(".txt"), masks.get(stem)
        caption, label = read_caption(words)
        if mask and not label:
            raise ValueError(f"{mask}: the mask's object has no name; write it on the second line of {words}")
        objects = [(str(mask.relative_to(folder)), label)] if mask else []
        lines += lines_of_picture(str(picture.relative_to(folder)), [caption] if caption else [], objects)
    return "".join(lines).encode()


INSTANCES = {"images": {"id": int, "file_name": str, "width": int, "height": int}, "categories": {"id": int, "name": str},
             "annotations": {"id": int, "image_id": int, "category_id": int, "segmentation": (list, dict)}}
CAPTIONS = {"annotations": {"image_id": int, "caption": str}}


def read_coco(path, lists):
    """Read a COCO file's lists, {key: fields of each entry and their types}. Raises ValueError naming the file and what it lacks."""
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for key, wanted in lists.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: no {key!r} in it; give COCO's instances_*.json, then captions_*.json")
        for number, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in wanted.items()):
                raise ValueError(f"{path}: {key}[{number}] is {json.dumps(entry):.120}; it must have COCO's {', '.join(wanted)}")
        for number, times in Counter(entry["id"] for entry in content[key] if "id" in wanted).most_common(1):
            if times > 1:
                raise ValueError(f"{path}: {times} of {key} have the id {number}; give each its own")
    return [content[key] for key in lists]


def object_mask(item, width, height):
    """The mask of a COCO annotation with polygons, an "L" image. Raises TypeError or ValueError if it has none."""
    mask = Image.new("L", (width, height))
    for points in item["segmentation"]:                                  # x, y, x, y, ...
        ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def check_coco(instances, pictures, names, annotations, images):
    """Raise ValueError naming an entry of COCO's lists that lacks its picture, or an object without mask or name."""
    for picture in pictures:
        path = Path(images) / picture["file_name"]
        if not path.is_file():
            raise ValueError(f"{path}: there is no such picture, but {instances} names it; "
                             "IMAGES_DIR must be the folder with its .jpg files")
        if not all(1 <= picture[side] <= 2**15 for side in ("width", "height")):
            raise ValueError(f"{instances}: image {picture['id']} is {picture['width']} x {picture['height']} pixels; it must have 1 to "
                             f"{2**15} a side")
    for item in annotations:
        try:
            names[item["category_id"]], object_mask(item, 1, 1)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{instances}: annotation {item['id']} has no known category or no polygons ({error!r})") from None


def manifest_of_coco(instances, captions, images, out):
    """Write out/manifest.jsonl and out/masks/ID.png for COCO's pictures, with the objects that cover OBJECT_SHARE of one and that
    their label identifies: the only ones of their category there, and no crowd regions. Returns the number of lines. Raises
    ValueError naming a file or an entry that is wrong, before anything is written."""
    pictures, categories, annotations = read_coco(instances, INSTANCES)
    names, texts, objects = {c["id"]: c["name"] for c in categories}, defaultdict(list), defaultdict(list)
    alike = Counter((item["image_id"], item["category_id"]) for item in annotations)
    clear = [item for item in annotations if alike[item["image_id"], item["category_id"]] == 1 and not item.get("iscrowd")]
    check_coco(instances, pictures, names, clear, images)
    for item in clear:
        objects[item["image_id"]].append(item)
    for caption in read_coco(captions, CAPTIONS)[0]:
        if words := " ".join(caption["caption"].split()):
            texts[caption["image_id"]].append(words)
    out, count = Path(out).resolve(), 0                                  # not behind a link, from which .. would lead elsewhere
    (out / "masks").mkdir(parents=True, exist_ok=True)
    with open(out / "manifest.jsonl.tmp", "w", encoding="utf-8") as file:
        for picture in tqdm(pictures, desc="coco"):
            masked = []                                                  # (mask file, label) of each object
            for item in objects[picture["id"]]:
                mask = object_mask(item, picture["width"], picture["height"])
                if OBJECT_SHARE[0] <= mask.histogram()[255] / (mask.width * mask.height) <= OBJECT_SHARE[1]:
                    masked.append((f"masks/{item['id']}.png", names[item["category_id"]]))
                    mask.save(out / masked[-1][0])
            name = os.path.relpath(Path(images).resolve() / picture["file_name"], out)
            lines = lines_of_picture(name, texts[picture["id"]], masked)
            file.writelines(lines)
            count += len(lines)
    os.replace(file.name, out / "manifest.jsonl")                        # whole or not at all
    return count


# --- Datasets and batches ----------------------------------------------------------------------------------------


class WorldDataset(torch.utils.data.Dataset):
    """Samples of a world's tasks, mixed by shares. Endless: any index is legal, and (seed, index) determines the sample."""

    count = float("inf")  # of different samples

    def __init__(self, world, mix, seed, held_out=False, prefix_drop=0.0):
        """mix: {name in TASKS: share}, any positive numbers; held_out: use the held-out subjects; prefix_drop: probability that a
        sample's prompt is dropped."""
        self.world, self.seed, self.held_out, self.prefix_drop = world, seed, held_out, prefix_drop
        self.tasks, self.shares = list(mix), list(mix.values())

    def __getitem__(self, index):
        rng = random.Random(f"{self.seed} {index}")
        task, = rng.choices(self.tasks, self.shares)
        drop = rng.random() < self.prefix_drop
        sample = TASKS[task](self.world, rng, self.held_out)
        return replace(sample, drop=drop, mask_seed=rng.getrandbits(63))


@functools.lru_cache(maxsize=16)
def shuffled(count, key):
    """A permutation of range(count) determined by the text `key`: (count,) int32."""
    return np.random.default_rng(list(key.encode())).permutation(np.arange(count, dtype=np.int32))


class ManifestDataset(torch.utils.data.Dataset):
    """Samples of a manifest's lines. Endless: any index is legal, and (seed, index) determines the sample. In each task every
    line comes once before any comes again, in an order that changes every epoch."""

    BLOCK = 10_000  # indices in which each task has exactly its share

    def __init__(self, manifest, mix, seed, size, prefix_drop=0.0, targets_only=False, held_out=False):
        """mix: {task: share}, or None for all lines alike; size: pixels per side of the targets; targets_only: without prompts
        and references, for the tokenizer; held_out: use the held-out lines. Tasks of the mix that have no lines are left out."""
        self.manifest, self.seed, self.size, self.prefix_drop, self.targets_only = manifest, seed, size, prefix_drop, targets_only
        lines = manifest.lines(held_out)
        shares = {task: share for task, share in mix.items() if share and task in lines} if mix else {"": 1.0}
        self.groups = [lines[task] if task else np.flatnonzero((manifest.held == held_out) & manifest.usable) for task in shares]
        self.count = sum(map(len, self.groups))                          # of lines
        edges = np.cumsum([*shares.values()])
        self.edges = [0, *(edges / edges[-1:] * self.BLOCK).round().astype(int).tolist()]  # task k: edges[k] to edges[k + 1] of a block

    def line(self, index):
        """The manifest's line for an index."""
        block, position = divmod(index, self.BLOCK)
        places = shuffled(self.BLOCK, f"{self.seed} {block}")
        k = bisect_right(self.edges, places[position]) - 1               # the task's number
        lines, first, end = self.groups[k], self.edges[k], self.edges[k + 1]
        earlier = places[:position]
        before = block * (end - first) + int(((first <= earlier) & (earlier < end)).sum())  # samples of this task so far
        epoch, position = divmod(before, len(lines))
        return int(lines[shuffled(len(lines), f"{self.seed} {k} {epoch}")[position]])

    def __getitem__(self, index):
        rng, line = random.Random(f"{self.seed} {index}"), self.line(index)
        entry, drop = self.manifest[line], rng.random() < self.prefix_drop
        try:
            if self.targets_only:
                return entry_sample(self.manifest, entry, self.size)
            sample = entry_sample(self.manifest, entry, self.size, rng)
            return replace(sample, drop=drop, line=line, mask_seed=rng.getrandbits(63))
        except ValueError as error:
            raise ValueError(f"{self.manifest.path} line {self.manifest.numbers[line]}: {error}") from None


@dataclass
class Batch:
    """The model's input: prompts as padded ids, and all their images in one tensor."""

    text_ids: torch.Tensor          # (B, L) int64, padded with 0 on the right
    lengths: torch.Tensor           # (B,) int64: number of real ids in each prompt
    pixels: torch.Tensor            # (M, 3, S, S) float32, for the vision encoder: the images of sample 0, then of 1, ...
    image_slots: torch.Tensor       # (M * image_tokens,) int64: their positions in the flattened text_ids
    name_ids: torch.Tensor          # (M, Q) int64: name of each image's subject, for the query connector
    name_mask: torch.Tensor         # (M, Q) bool
    targets: torch.Tensor           # (B, 3, S, S) float32 in [-1, 1], for the tokenizer; (0, 3, S, S) if there are none
    drop: torch.Tensor              # (B,) bool: samples to train without their prompt
    masked: torch.Tensor            # (B, L) bool: about half of the real tokens, which pretraining replaces by <unk>
    tasks: list[str]
    lines: list[int] = field(default_factory=list)  # their lines in the manifest

    def to(self, device):
        """The same batch with its tensors on the device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """The same batch in page-locked memory, for faster copies to a GPU; the DataLoader calls this."""
        return self.map(torch.Tensor.pin_memory)

    def share(self):
        """The same batch in shared memory, through which a data process hands it over. Raises ValueError if there is too little:
        left to the DataLoader, that would end in waiting forever."""
        try:
            return self.map(torch.Tensor.share_memory_)
        except RuntimeError as error:
            raise ValueError(f"too little shared memory (/dev/shm) for the batches of data processes ({error}): set --workers=0, or "
                             "give the container more (docker run --shm-size=8g)") from None

    def map(self, change):
        """The same batch with change() applied to every tensor."""
        return Batch(**{k: change(v) if torch.is_tensor(v) else v for k, v in vars(self).items()})

    def __len__(self):
        return len(self.text_ids)


@dataclass(eq=False)
class Collate:
    """Makes a Batch of Samples. Checks placeholders and prompt lengths, mistakes in which would go unnoticed."""

    text_tokenizer: TextTokenizer
    vision_size: int                # pixels per side of the vision encoder's images
    image_tokens: int               # ids per image
    context: int                    # most ids in a prompt
    target_size: int                # pixels per side of the targets
    multiple: int = 1               # prompts are padded to the longest, rounded up to a multiple of this

    def encode(self, prompt, images):
        """Ids of a prompt with that many images. Raises ValueError for a wrong number of placeholders or too long a prompt."""
        placeholders = prompt.count("<image>")
        if placeholders != images:
            raise ValueError(f"the prompt has {placeholders} <image> placeholders, but {images} images were given: {prompt!r}")
        ids = self.text_tokenizer.encode(prompt, self.image_tokens)
        if len(ids) > self.context:
            share = f", {images * self.image_tokens} of them for {images} images" if images else ""
            raise ValueError(f"the prompt takes {len(ids)} tokens{share}, but the model reads at most {self.context}: "
                             f"shorten the text or give fewer images: {prompt!r}")
        return ids

    def __call__(self, samples):
        ids = [self.encode(s.prompt, len(s.images)) for s in samples]
        text_ids = pad(ids, self.multiple)
        images = [image for s in samples for image in s.images]
        names = pad([self.text_tokenizer.encode(name) for s in samples for name in s.names], self.multiple)
        size, real = self.vision_size, text_ids != self.text_tokenizer.PAD
        draws = [torch.rand(real.shape[1], generator=torch.Generator().manual_seed(s.mask_seed)) for s in samples]  # whatever the batch
        targets = [tokenizer_pixels(s.target, self.target_size) for s in samples if s.target is not None]
        batch = Batch(
            text_ids=text_ids,
            lengths=torch.tensor([len(i) for i in ids]),
            pixels=torch.stack([vision_pixels(i, size) for i in images]) if images else torch.zeros(0, 3, size, size),
            image_slots=(text_ids.flatten() == self.text_tokenizer.image_id).nonzero().flatten(),
            name_ids=names, name_mask=names != self.text_tokenizer.PAD,
            targets=torch.stack(targets) if targets else torch.zeros(0, 3, self.target_size, self.target_size),
            drop=torch.tensor([s.drop for s in samples]),
            masked=real & (torch.stack(draws) < 0.5),
            tasks=[s.task for s in samples],
            lines=[s.line for s in samples])
        return batch.share() if torch.utils.data.get_worker_info() else batch  # in a data process


def pad(rows, multiple=1):
    """Lists of ids -> (len(rows), longest) int64 with zeros on the right; the longest is rounded up to a multiple."""
    longest = -(-max((len(row) for row in rows), default=1) // multiple) * multiple
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long).view(len(rows), longest)


if __name__ == "__main__":
    try:
        if len(sys.argv) != 6 or sys.argv[1] != "coco":
            raise ValueError("usage: python data.py coco INSTANCES.json CAPTIONS.json IMAGES_DIR OUT_DIR")
        count, written = manifest_of_coco(*sys.argv[2:]), f"{sys.argv[5]}/manifest.jsonl"
        print(f"wrote {written}, {count} lines; train with --data={written}")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
