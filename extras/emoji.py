"""The emoji world: the book's scenes with 1,280 emoji as subjects.

    python -m extras.emoji train small --out=out/emoji
    python -m extras.emoji score out/emoji
    python -m extras.emoji sample out/emoji "A big dolphin at the top on a red background"

Needs a colour emoji font (Debian: `apt install fonts-noto-color-emoji`), or --emoji_font=PATH.

A name must not tell what an emoji looks like, or a model learns 1,118 drawings by heart. So where a training
reference shows one alone, 70% of the prompts say `symbol`, half of these show halves of two, and all have one
of 48 looks (channels swapped, mirrored, turned). `tiny` with --train_scale=3 --vqgan.codebook_size=1024, 41
minutes of a core, drew the right one of 1,280 for 21.9% of held-out prompts (the tokenizer alone: 93%);
without halves, 12 looks: 11.3%; and all names: 4.9%; and one look: 1.4%. Twice the steps: 18.2%.
"""

import contextlib
import functools
import itertools
import random
import re
import unicodedata
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sample
import train
from data import Shapes, ShapesDataset
from tokenizer import TextTokenizer, file_hash, require, write_json

FONTS = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "/System/Library/Fonts/Apple Color Emoji.ttc",
         "C:/Windows/Fonts/seguiemj.ttf")
COUNT = 1280                      # the first in Unicode order
CHANNELS = tuple(itertools.permutations(range(3)))
TURNS = (None, *Image.Transpose)  # mirrored, turned
NAMED = 0.3                       # share with names where a reference shows one alone
HALVES = 0.5                      # share of the others that show halves of two

# a subject is (character,) or, in training, a Look: with another's right half, channels in this order, turned
Look = namedtuple("Look", "character other channels turn named", defaults=("", CHANNELS[0], None, True))


class Emoji(Shapes):
    """The world of shapes with other subjects, labelled by their Unicode names."""

    task = ""  # of the next sample; EmojiDataset sets it

    def __init__(self, image_size, font=""):
        """font: path of a colour emoji font; empty: try FONTS."""
        super().__init__(image_size)
        found = [f for f in ([font] if font else FONTS) if Path(f).is_file()]
        require(found, f"no colour emoji font at {font or FONTS}: install one, or give --emoji_font=PATH")
        self.font, self.digest = None, f"emoji {file_hash(found[0])}"
        for size in (109, 160, 96, 64, 137):  # bitmap fonts open only at the sizes that they contain
            with contextlib.suppress(OSError):
                self.font = self.font or ImageFont.truetype(found[0], size)
        require(self.font, f"--emoji_font={found[0]}: cannot be opened; use Noto Color Emoji")
        self.names = self.find_names()
        self.subjects = [(character,) for character in self.names]
        self.held_out_subjects = [s for s in self.subjects if zlib.crc32(repr(s).encode()) % 8 == 0]
        self.train_subjects = [s for s in self.subjects if s not in self.held_out_subjects]

    def find_names(self):
        """{character: name in lower case} of the emoji in use, which have a name and a colour drawing."""
        names, missing = {}, self.glyph("\U0010FFFD")  # the drawing for characters that the font lacks
        for character in map(chr, (*range(0x231A, 0x3300), *range(0x1F000, 0x1FB00))):
            name = unicodedata.name(character, "").lower()
            whole = name and not re.search("regional indicator|modifier|component", name)
            glyph = self.glyph(character) if whole and len(names) < COUNT else None
            if glyph and glyph != missing and glyph.convert("RGB").getcolors(8) is None:  # more than 8
                names[character] = name
        return names

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        return EmojiDataset(self, mix, seed, prefix_drop, held_out)

    def label(self, subject):
        look = Look(*subject)
        return self.names[look.character] if look.named else "symbol"

    describe = label  # there is no more to say

    def text_tokenizer(self):
        return TextTokenizer.train([*super().text_tokenizer().known_words(), "symbol"])

    def random_subjects(self, rng, count, held_out=False):
        """As Shapes does; in training with Looks, unless there is only text to tell them."""
        subjects = super().random_subjects(rng, count, held_out)
        if held_out or self.task == "text_to_image":
            return subjects
        looks = []
        for character, in subjects:
            named = count > 1 or self.task == "recovery" or rng.random() < NAMED  # several need their names
            other = "" if named or rng.random() > HALVES else rng.choice(self.train_subjects)[0]
            looks.append(Look(character, other, rng.choice(CHANNELS), rng.choice(TURNS), named))
        return looks

    def glyph(self, character):
        """The font's drawing, cropped to its bounds, an RGBA image or None."""
        canvas = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(canvas).text((20, 20), character, font=self.font, embedded_color=True)
        box = canvas.getchannel("A").getbbox()
        return canvas.crop(box) if box else None

    @functools.cache
    def scaled(self, character, width):
        """A drawing in the middle of a square of `width` pixels, premultiplied."""
        glyph, square = self.glyph(character).convert("RGBa"), Image.new("RGBa", (width, width))
        size = [max(1, round(side * width / max(glyph.size))) for side in glyph.size]
        square.paste(glyph.resize(size, Image.LANCZOS), [width // 2 - side // 2 for side in size])
        return square

    @functools.lru_cache(maxsize=COUNT)  # of 64 pixels a side: 84 MB in every data process
    def sprite(self, placed):
        """A placed emoji, float32 (S, S, 4) in [0, 255], colours premultiplied by coverage."""
        look, width = Look(*placed.subject), self.widths[placed.size]
        drawing, canvas = self.scaled(look.character, width).copy(), Image.new("RGBa", (self.image_size,) * 2)
        if look.other:
            drawing.paste(self.scaled(look.other, width).crop((width // 2, 0, width, width)), (width // 2, 0))
        x, y = self.center(placed.place, placed.size)
        turned = drawing if look.turn is None else drawing.transpose(look.turn)
        canvas.paste(turned, (x - width // 2, y - width // 2))
        return np.asarray(canvas, np.float32)[..., [*look.channels, 3]]

    def subject_mask(self, placed):
        return self.sprite(placed)[..., 3:] / 255

    def draw_subject(self, placed):
        sprite = self.sprite(placed)
        return (sprite[..., :3] / np.maximum(sprite[..., 3:] / 255, 1e-3)).clip(0, 255)


class EmojiDataset(ShapesDataset):
    """Samples that tell their world which task they are for."""

    def __getitem__(self, index):
        rng = random.Random(f"{self.seed} {index}")  # as ShapesDataset's
        self.world.task, = rng.choices(list(self.mix), list(self.mix.values()))
        return super().__getitem__(index)


def score(folder, font, prompts=512):
    """Score a model on held-out emoji: print the table, write scores.json and sheet.png into its folder."""
    pipeline = sample.Pipeline(folder, sample.best_device())
    world = Emoji(pipeline.size, font)
    require(pipeline.record["data"] == world.digest, f"{folder} was trained on another world or font")
    dataset, judge = world.dataset({"subject_driven": 1.0}, "scores", held_out=True), sample.Judge(world)
    samples = [dataset[i] for i in range(prompts)]
    targets = [s.target for s in samples]
    pictures = {"model": pipeline.draw(samples), "tokenizer": pipeline.rebuild(targets), "renders": targets}
    scores = {name: sample.judge_pictures(judge, drawn, samples) for name, drawn in pictures.items()}
    print("\n".join(f"{name:13} CP {row['cp']:.3f}, PF {row['pf']:.3f}" for name, row in scores.items()))
    write_json(Path(folder) / "scores.json", scores)
    sample.save_sheet({"held-out emoji": (samples[:12], pictures["model"])}, Path(folder) / "sheet.png")


def main(arguments):
    """Run the command line."""
    fonts = [a for a in arguments if a.startswith("--emoji_font=")]
    command, *others = [a for a in arguments if a not in fonts] or ["--help"]
    font = "".join(fonts).partition("=")[2]

    def open_source(run):
        require(not run.data, "this world has its own pictures: leave out --data")
        return Emoji(run.vqgan.image_size, font)

    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "train":
        train.main(others, open_source)
    elif command == "sample":
        sample.main(others)
    else:
        require(command == "score" and len(others) == 1, "give train, sample or score and a folder")
        score(others[0], font)


if __name__ == "__main__":
    sample.cli(main, "extras.emoji")
