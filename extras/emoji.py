"""The world of shapes with 1,280 emoji as its subjects. Needs `apt install fonts-noto-color-emoji`.

    python -m extras.emoji small --out=out/emoji    # with any arguments of train.py
    python -m extras.emoji score out/emoji
    python sample.py out/emoji "A big dolphin at the top on a red background"

A name must not tell what an emoji looks like, or a model learns 1,118 drawings by heart. So where a training
reference shows one alone, 70% of the prompts say `symbol`, half of these show halves of two, and all have one
of 48 looks (channels swapped, mirrored, turned). `tiny` with --train_scale=3 --vqgan.codebook_size=1024 then
drew the right one for 21.9% of held-out prompts; without halves, 12 looks: 11.3%; and all names: 4.9%; and
one look: 1.4%.
"""

import functools
import itertools
import re
import unicodedata
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import sample
import train
from data import Shapes
from tokenizer import TextTokenizer, file_hash, require

FONT = "NotoColorEmoji.ttf"
COUNT = 1280   # the first in Unicode order
CHANNELS = tuple(itertools.permutations(range(3)))
NAMED = 0.3    # share with names where a reference shows one alone
HALVES = 0.5   # share of the others that show halves of two

# A subject is (character,) or, in training, a Look: with another's right half, its channels in this order,
# turned by so many quarters, from 4 on mirrored too.
Look = namedtuple("Look", "character other channels turn named", defaults=("", CHANNELS[0], 0, True))


class Emoji(Shapes):
    """The world of shapes with other subjects, labelled by their Unicode names."""

    task = ""  # of the sample in the making

    def __init__(self, image_size):
        super().__init__(image_size)
        try:
            self.font = ImageFont.truetype(FONT, 109)  # the one size that it has
        except OSError:
            raise ValueError(f"{FONT} is not among the fonts of this machine: install it") from None
        self.digest, self.names = f"emoji {file_hash(self.font.path)}", self.find_names()
        self.subjects = [(character,) for character in self.names]
        self.held_out_subjects = [s for s in self.subjects if zlib.crc32(repr(s).encode()) % 8 == 0]
        self.train_subjects = [s for s in self.subjects if s not in self.held_out_subjects]

    def find_names(self):
        """{character: name in lower case} of the emoji in use, which have more than 8 colours."""
        names = {}
        for character in map(chr, (*range(0x231A, 0x3300), *range(0x1F000, 0x1FB00))):
            name = unicodedata.name(character, "").lower()
            if name and len(names) < COUNT and not re.search("regional|modifier|component", name):
                if self.glyph(character).convert("RGB").getcolors(8) is None:
                    names[character] = name
        return names

    def sample(self, task, rng, held_out=False):
        self.task = task
        return super().sample(task, rng, held_out)

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
            looks.append(Look(character, other, rng.choice(CHANNELS), rng.randrange(8), named))
        return looks

    def glyph(self, character):
        """The font's drawing, cropped to its bounds, an RGBA image."""
        canvas = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(canvas).text((20, 20), character, font=self.font, embedded_color=True)
        return canvas.crop(canvas.getchannel("A").getbbox())

    @functools.cache
    def scaled(self, character, width):
        """A drawing in a square, uint8 (width, width, 4), colours premultiplied by coverage."""
        return np.asarray(ImageOps.pad(self.glyph(character).convert("RGBa"), (width, width), color=0))

    @functools.lru_cache(maxsize=COUNT)  # of 64 pixels a side: 84 MB in every data process
    def sprite(self, placed):
        """A placed emoji, float32 (S, S, 4) in [0, 255], premultiplied."""
        look, width = Look(*placed.subject), self.widths[placed.size]
        left, right = (self.scaled(c, width) for c in (look.character, look.other or look.character))
        drawing = np.hstack([left[:, : width // 2], right[:, width // 2 :]])
        drawing = np.rot90(drawing, look.turn)[:, :: -1 if look.turn > 3 else 1, [*look.channels, 3]]
        x, y = (middle - width // 2 for middle in self.center(placed.place, placed.size))
        canvas = np.zeros((self.image_size, self.image_size, 4), np.float32)
        canvas[y : y + width, x : x + width] = drawing
        return canvas

    def subject_mask(self, placed):
        return self.sprite(placed)[..., 3:] / 255

    def draw_subject(self, placed):
        return (self.sprite(placed)[..., :3] / np.maximum(self.subject_mask(placed), 1e-3)).clip(0, 255)


def open_source(run):
    """What a run trains on."""
    require(not run.data, f"--data={run.data}: leave it out, for this world draws its own pictures")
    return Emoji(run.vqgan.image_size)


def main(arguments):
    """Run the command line."""
    if arguments[:1] == ["score"] and len(arguments) == 2:
        pipeline = sample.Pipeline(arguments[1], sample.best_device())
        sample.score(pipeline, Path(arguments[1]), Emoji(pipeline.size))
    elif {"-h", "--help"} & set(arguments):
        print(__doc__)
    else:
        train.main(arguments, open_source)


if __name__ == "__main__":
    sample.cli(main, "extras.emoji")
