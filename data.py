"""Everything up to a training batch: pictures, words, the built-in world of shapes, the tasks, your own
pictures.

    scene         --task--┐
                          ├--> Sample (prompt with <image> placeholders, images, target) --Collate--> Batch
    your pictures --------┘

A picture is a uint8 array (H, W, 3) throughout this file; only batches hold tensors. A sample depends on its
dataset's seed and its index alone, so any step of a run can be replayed, and any process can make its own
share.

Read in order: pictures, Shapes, the tasks of MENTOR's section 3, Folder (the same tasks
from your own pictures), datasets and batches.
"""

import functools
import itertools
import os
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from tokenizer import TextTokenizer, require

# --- Pictures -------------------------------------------------------------------------------------------

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
EXIF_TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
              6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # of EXIF's orientation tag


def read_image(path, use):
    """use(the opened Pillow image). Raises ValueError naming a file that is no readable image."""
    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:  # Pillow's decoders raise whatever the damage suggests
        raise ValueError(f"{path}: not a readable image ({error})") from None


def exif_turn(image):
    """How an opened image must be turned to look right, or None."""
    return EXIF_TURNS.get(image.getexif().get(0x0112))  # ImageOps.exif_transpose fails at any other odd tag


def load_image(path, least=0):
    """An image file as it looks, uint8 (H, W, 3): turned by its EXIF tag, 16 bits scaled to 8, the first
    frame, transparency on white; ICC profiles are ignored. With `least` a JPEG is decoded smaller, but not
    below it."""
    def use(image):
        if least:
            image.draft(None, (least, least))
        turn = exif_turn(image)
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    return read_image(path, use)


def load_mask(path, picture_path):
    """Where a mask's object is, bool (H, W), turned as its picture: the alpha of a cut-out, or the larger of
    two grey values, smooth edges allowed. (The released code takes all above 0.) What is unclear is
    refused."""
    stored, turn = read_image(picture_path, lambda image: (image.size, exif_turn(image)))
    seen = stored if turn is None else Image.new("1", stored).transpose(turn).size
    mask, alpha = read_image(path, lambda image: map(np.asarray, image.convert("LA").split()))
    mask = mask if alpha.min() == 255 else alpha
    values, size = np.unique(mask), mask.shape[::-1]
    middle = (values[0] + int(values[-1])) / 2
    edges = (np.abs(mask - middle) < (middle - values[0]) / 2).mean()
    require(len(values) == 2 or len(values) > 8 and edges < 0.1,
            f"{path}: no clear mask, with values {values[:9].tolist()}: write 255 for the object, else 0")
    require(size in (stored, seen), f"{path}: the mask has {size} pixels, its picture {seen}")
    require(turn is None or stored != seen,
            f"{picture_path} has an EXIF turn, and {path} may be turned already: save the picture without it")
    if turn is not None and size == stored:
        mask = np.asarray(Image.fromarray(mask).transpose(turn))
    return mask > middle


def halve(image, size):
    """Halve a Pillow image with a box filter while its sides stay at least `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    return image


def center_crop(picture, size):
    """A picture's or mask's largest centred square at size x size: halved, then bicubic (as ADM)."""
    image = halve(Image.fromarray(picture), size)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def vision_pixels(picture, size):
    """A picture as CLIP's input: short side resized, centred square, normalised; float32 (3, size, size)."""
    image, short = Image.fromarray(picture), min(picture.shape[:2])
    width, height = (int(side * size / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))
    pixels = (np.asarray(image, np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def tokenizer_pixels(picture, size):
    """A picture as the VQGAN's input: float32 (3, size, size) in [-1, 1]."""
    return torch.from_numpy(center_crop(picture, size).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


def to_picture(image):
    """An image tensor (3, H, W) in [-1, 1], clamped, as a picture."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


# --- The built-in world of shapes -----------------------------------------------------------------------

COLORS = {"red": (215, 35, 40), "orange": (245, 140, 25), "yellow": (250, 220, 45), "green": (35, 150, 65),
          "cyan": (45, 190, 215), "blue": (35, 65, 200), "purple": (130, 45, 165), "pink": (245, 140, 190)}
RGB = np.array(list(COLORS.values()), np.float32)  # (8, 3), of the colours by index
PATTERNS = ("solid", "striped", "dotted", "split")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SIZES = ("small", "big")
SUPERSAMPLE = 8  # antialiasing: masks are drawn this many times larger, then averaged

Subject = namedtuple("Subject", "shape color color2 pattern")  # indices; color2 == color when solid
Placed = namedtuple("Placed", "subject place size")       # a subject, an index into PLACES and one into SIZES
Scene = namedtuple("Scene", "color pattern subjects")    # the background's two indices, and one or two Placed


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
    "heart": [(16 * np.sin(t) ** 3 / 17, (2 - np.cos([t, 2 * t, 3 * t, 4 * t]) @ [13, -5, -2, -1]) / 17 - 0.1)
              for t in np.linspace(0, 2 * np.pi, 60)],
    "cross": [(ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM), (ARM, 1),
              (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM), (-ARM, -1)],
    "ring": polygon(*((a, 1.0) for a in range(0, 361, 6)), *((a, 0.42) for a in range(360, -1, -6))),
}


def with_article(words):
    """a red half, an orange half."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class Shapes:
    """Scenes of one or two subjects on a patterned background, and the words for them.

    A subject is one of 8 shapes in one of 8 colours with one of 4 patterns, all but solid with a second
    colour: 1,408, an eighth of which is held out of training. It stands at one of 3 x 3 places and is 14/32
    or 20/32 of the image wide. Places are whole cells of a code grid of 8 per side, so a subject has similar
    codes wherever it stands.
"""

    def __init__(self, image_size):
        self.image_size = image_size
        self.widths = [round(image_size * w / 32) for w in (14, 20)]
        everything = itertools.product(*map(range, map(len, (SHAPES, COLORS, COLORS, PATTERNS))))
        self.subjects = [Subject(*s) for s in everything if (s[1] == s[2]) == (PATTERNS[s[3]] == "solid")]
        held = [zlib.crc32(repr(tuple(s)).encode()) % 8 == 0 for s in self.subjects]
        self.train_subjects = [s for s, h in zip(self.subjects, held) if not h]
        self.held_out_subjects = [s for s, h in zip(self.subjects, held) if h]

    digest = "shapes"  # what a stage's record knows of its data
    template = ("A {small, big} {colour} {shape} [with {colour} stripes, {colour} dots, a {colour} half] at "
                "the {place} on a {colour} [striped, dotted, split] background")

    @property
    def tasks(self):
        """The tasks that it has samples of."""
        return set(TASKS)

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        """Samples of a mix {task: share} of held-out subjects, or of all others."""
        return ShapesDataset(self, mix, seed, prefix_drop, held_out)

    # words

    def label(self, subject):
        """Its name in prompts, which says nothing about colours and pattern."""
        return list(SHAPES)[subject.shape]

    def describe(self, subject):
        """Its description in captions, for example "red star with blue stripes"."""
        color, color2 = list(COLORS)[subject.color], list(COLORS)[subject.color2]
        pattern = {"solid": "", "striped": f" with {color2} stripes", "dotted": f" with {color2} dots",
                   "split": f" with {with_article(color2)} half"}
        return f"{color} {self.label(subject)}{pattern[PATTERNS[subject.pattern]]}"

    def caption(self, scene, looks=True):
        """The sentence for a scene; with looks=False, colours and patterns are left to a reference."""
        names = [self.describe(p.subject) if looks else self.label(p.subject) for p in scene.subjects]
        words = [f"a {SIZES[p.size]} {name} at the {PLACES[p.place]}"
                 for p, name in zip(scene.subjects, names)]
        pattern = f" {PATTERNS[scene.pattern]}" if scene.pattern else ""
        text = " and ".join(words) + f" on {with_article(list(COLORS)[scene.color] + pattern)} background"
        return text[0].upper() + text[1:]

    def text_tokenizer(self):
        """A text tokenizer that knows every word of this world's prompts."""
        grounds = [f"on an on a {c} {p} background" for c in COLORS for p in PATTERNS[1:]]
        places = [f"a {s} at the {p} and" for s in SIZES for p in PLACES]
        looks = [self.describe(subject) for subject in self.subjects]
        return TextTokenizer.train([*grounds, *places, *looks, "The in .", "The image is"])

    # pictures

    def center(self, place, size):
        """Pixel centre (x, y) of a place: 8, 16, 24 of 32 for small subjects and 12, 16, 20 for big ones."""
        middle, step = self.image_size // 2, self.image_size * (8, 4)[size] // 32
        return middle + (place % 3 - 1) * step, middle + (place // 3 - 1) * step

    def shrink(self, fine):
        """Average a supersampled mask down to (S, S, 1)."""
        s = self.image_size
        return np.asarray(fine, np.float32).reshape(s, SUPERSAMPLE, s, SUPERSAMPLE).mean((1, 3))[..., None]

    @functools.cache
    def pattern_mask(self, pattern, x, y, upright):
        """Where a pattern anchored at (x, y) shows its second colour: float32 (S, S, 1) in [0, 1]. `upright`
        patterns, those of backgrounds, have vertical stripes and an upper and a lower half."""
        grid = (np.arange(self.image_size * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
        across, along = np.broadcast_arrays(grid[None, :] - x, grid[:, None] - y)
        u, v = (across, along) if upright else (along, across)
        band = self.image_size / 8
        return self.shrink({
            "solid": lambda: np.zeros_like(u),
            "striped": lambda: np.floor(u / band) % 2,
            "dotted": lambda: np.hypot(u % (2 * band) - band, v % (2 * band) - band) < 0.8 * band,
            "split": lambda: v >= 0,
        }[PATTERNS[pattern]]())

    @functools.cache
    def background(self, color, pattern):
        """The empty scene, float32 (S, S, 3) in [0, 255]: a light tone, patterned in a lighter one."""
        base, second = 0.55 * RGB[color] + 0.45 * 255, 0.2 * RGB[color] + 0.8 * 255
        return base + self.pattern_mask(pattern, 0, self.image_size // 2, True) * (second - base)

    @functools.cache
    def shape_mask(self, shape, place, size):
        """A shape's coverage, float32 (S, S, 1) in [0, 1]."""
        (x, y), radius, fine = self.center(place, size), self.widths[size] / 2, self.image_size * SUPERSAMPLE
        points = [((x + px * radius) * SUPERSAMPLE - 0.5, (y + py * radius) * SUPERSAMPLE - 0.5)
                  for px, py in list(SHAPES.values())[shape]]
        canvas = Image.new("L", (fine, fine))
        ImageDraw.Draw(canvas).polygon(points, fill=1)
        return self.shrink(canvas)

    def subject_mask(self, placed):
        """Where a placed subject covers the picture, float32 (S, S, 1) in [0, 1]."""
        return self.shape_mask(placed.subject.shape, placed.place, placed.size)

    def draw_subject(self, placed):
        """Its colours, float32 (S, S, 3) in [0, 255]; only those under its mask are used."""
        first, second = RGB[placed.subject.color], RGB[placed.subject.color2]
        mask = self.pattern_mask(placed.subject.pattern, *self.center(placed.place, placed.size), False)
        return first + mask * (second - first)

    def draw(self, scene):
        """The picture of a scene, uint8 (S, S, 3)."""
        image = self.background(scene.color, scene.pattern)
        for placed in scene.subjects:
            image = image + self.subject_mask(placed) * (self.draw_subject(placed) - image)
        return (image + 0.5).astype(np.uint8)

    def cut_out(self, placed):
        """The target of segmentation, the subject's pixels on black: uint8 (S, S, 3)."""
        return (self.subject_mask(placed) * self.draw_subject(placed) + 0.5).astype(np.uint8)

    # chance

    def random_subjects(self, rng, count, held_out=False):
        """Training (or held-out) subjects with different labels, so that a label names one of them."""
        subjects = []
        while len(subjects) < count:
            subject = rng.choice(self.held_out_subjects if held_out else self.train_subjects)
            if self.label(subject) not in map(self.label, subjects):
                subjects.append(subject)
        return subjects

    def random_scene(self, rng, subjects):
        """The subjects at random places on a random background; two are small, and two cells apart."""
        color, pattern = rng.randrange(len(COLORS)), rng.randrange(len(PATTERNS))
        if len(subjects) == 1:
            return Scene(color, pattern, (Placed(subjects[0], rng.randrange(9), rng.randrange(2)),))
        while True:
            a, b = rng.randrange(9), rng.randrange(9)
            if max(abs(a // 3 - b // 3), abs(a % 3 - b % 3)) == 2:
                return Scene(color, pattern, (Placed(subjects[0], a, 0), Placed(subjects[1], b, 0)))

    def some_scene(self, rng, held_out):
        """A scene of one subject, or in a tenth of all cases of two."""
        return self.random_scene(rng, self.random_subjects(rng, 2 if rng.random() < 0.1 else 1, held_out))


# --- The tasks (MENTOR section 3.2): each turns random scenes into a prompt, reference images and a targe


@dataclass
class Sample:
    """One example of a task, before tokenization."""

    task: str
    prompt: str                     # with one <image> per reference
    images: list                    # the references
    target: np.ndarray = None       # the picture to draw; None where only a prompt is given
    scene: Scene = None             # for the judge; None: your own pictures
    drop: bool = False              # train without the prompt (for guidance)
    mask_seed: int = 0              # of the choice of words that pretraining hides


def object_line(label):
    """The line of a prompt that introduces an object."""
    return f"The {label} in <image>."


def subject_prompt(world, scene):
    """`The {label} in <image>.` for each subject, then the scene's caption without their looks."""
    lines = [object_line(world.label(p.subject)) for p in scene.subjects]
    return "\n".join([*lines, world.caption(scene, looks=False)])


def text_to_image(world, rng, held_out=False):
    """`{caption}` -> the image."""
    scene = world.some_scene(rng, held_out)
    return Sample("text_to_image", world.caption(scene), [], world.draw(scene), scene)


def reconstruction(world, rng, held_out=False):
    """`The image is <image>`, half the time with its caption -> the same image."""
    scene = world.some_scene(rng, held_out)
    image = world.draw(scene)
    caption = f"\n{world.caption(scene)}" if rng.random() < 0.5 else ""
    return Sample("reconstruction", "The image is <image>" + caption, [image], image, scene)


def segmentation(world, rng, held_out=False):
    """`The {label} in <image>.` -> the named object's pixels, the rest black."""
    scene = world.some_scene(rng, held_out)
    placed = rng.choice(scene.subjects)
    prompt, target = object_line(world.label(placed.subject)), scene._replace(subjects=(placed,))
    return Sample("segmentation", prompt, [world.draw(scene)], world.cut_out(placed), target)


def recovery(world, rng, held_out=False):
    """The segmented object, distorted and pasted on another image, and the caption -> the original image."""
    scene = world.random_scene(rng, world.random_subjects(rng, 1, held_out))
    placed, = scene.subjects
    other = world.some_scene(rng, held_out)
    while world.label(placed.subject) in [world.label(p.subject) for p in other.subjects]:
        other = world.some_scene(rng, held_out)
    pasted = paste_distorted(world.cut_out(placed), world.subject_mask(placed), world.draw(other), rng)
    return Sample("recovery", subject_prompt(world, scene), [pasted], world.draw(scene), scene)


def paste_distorted(cut_out, mask, background, rng):
    """Paste a segmented object at a random place and scale (0.6 to 1.1) onto another picture; half the time
    also rotate it by up to 20 degrees, stretch it, shear it and change its perspective.

    cut_out, background uint8 (H, W, 3) of one size; mask float (H, W, 1) in [0, 1], not all zero.
    """
    height, width = mask.shape[:2]
    sprite = Image.fromarray(np.concatenate([cut_out, (mask * 255).astype(np.uint8)], axis=-1), "RGBa")
    left, top, right, bottom = sprite.getchannel("a").getbbox()
    # homogeneous 3 x 3 matrices from new pixels to old: from the new centre, undistort, to the old centre
    matrix, scale = np.eye(3), rng.uniform(0.6, 1.1)
    if rng.random() < 0.5:
        angle = np.radians(rng.uniform(-20, 20))
        stretch, shear = rng.uniform(0.85, 1.18), rng.uniform(-0.2, 0.2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix[:2, :2] = turn @ [[stretch, shear], [0, 1 / stretch]]
        matrix[2, :2] = [rng.uniform(-0.3, 0.3) / width, rng.uniform(-0.3, 0.3) / height]
    half_w, half_h = scale * (right - left) / 2, scale * (bottom - top) / 2
    x = rng.uniform(min(half_w, width / 2), max(width - half_w, width / 2))
    y = rng.uniform(min(half_h, height / 2), max(height - half_h, height / 2))
    to_old = [[1, 0, (left + right) / 2], [0, 1, (top + bottom) / 2], [0, 0, 1]]
    from_new = [[1 / scale, 0, -x / scale], [0, 1 / scale, -y / scale], [0, 0, 1]]
    whole = to_old @ matrix @ from_new
    numbers = (whole / whole[2, 2]).flatten()[:8].tolist()
    warped = np.float32(sprite.transform((width, height), Image.PERSPECTIVE, numbers, Image.BILINEAR))
    return (warped[..., :3] + (1 - warped[..., 3:] / 255) * background + 0.5).clip(0, 255).astype(np.uint8)


def subject_driven(world, rng, held_out=False):
    """A reference of the subject and the caption of a new scene -> the new scene with the same subject."""
    subjects = world.random_subjects(rng, 1, held_out)
    reference, scene = world.random_scene(rng, subjects), world.random_scene(rng, subjects)
    prompt, images = subject_prompt(world, scene), [world.draw(reference)]
    return Sample("subject_driven", prompt, images, world.draw(scene), scene)


# extras/multi.py adds two
TASKS = {f.__name__: f for f in (text_to_image, reconstruction, segmentation, recovery, subject_driven)}

# --- Your own pictures, with captions and masks beside them ---------------------------------------------

PICTURES, CAPTIONS, MASK = (".jpg", ".jpeg", ".png", ".webp"), (".txt", ".caption"), ".mask.png"
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
KEEP = 10**9  # bytes of pictures that stay in memory

Picture = namedtuple("Picture", "file name captions label mask subject")  # mask None, subject "": none


def walk(folder):
    """All files below a folder, without hidden ones and the system's own; a folder that cannot be listed is
    named."""
    def refuse(error):
        raise ValueError(f"{error.filename}: this folder cannot be listed ({error.strerror})")
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in SYSTEM_FOLDERS)
        yield from (Path(path, f) for f in sorted(files) if not f.startswith("."))


def read_words(file):
    """A caption file: its captions, and the name in its line `object: NAME`, or none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text ({error})") from None
    names = [line[7:].strip() for line in lines if line.lower().startswith("object:")]
    require(len(names) < 2 and "<image>" not in "".join(lines),
            f"{file}: must have one `object: NAME` at most, and no <image>")
    return [line for line in lines if not line.lower().startswith("object:")], "".join(names)


class Folder:
    """Your own pictures, as samples of the tasks that they allow:

        dog.jpg         a picture (.jpg, .jpeg, .png or .webp)        reconstruction, text-to-image
        dog.txt         its captions, one a line, and perhaps
                        a line `object: NAME`
        dog.mask.png    white where that object is, black elsewhere   segmentation, recovery
        rex/*.jpg       a folder per subject, two pictures or more    subject-driven: one picture from another

    Where there is no caption or name, it is the folder's. About a tenth (from 1,000 pictures on a fiftieth)
    is held out, subjects as a whole. Pictures are opened at once and kept, shrunk to what the model can use,
    up to KEEP bytes. In training they are cropped at random, and half are mirrored where no word says left or
    right.
"""

    def __init__(self, folder, size):
        """size: pixels per side of targets. All files that are wrong or unclear are refused by name."""
        self.path, self.size = Path(folder), size
        require(self.path.is_dir(), f"--data={folder}: there is no such folder")
        self.pictures, self.notes = self.find()
        self.groups = defaultdict(list)  # a subject's pictures, or a single one
        for i, p in enumerate(self.pictures):
            self.groups[p.subject or p.name].append(i)
        entries = [(task, i) for i, p in enumerate(self.pictures) for task, possible in (
            ("text_to_image", True), ("reconstruction", True), ("segmentation", p.mask), ("recovery", p.mask),
            ("subject_driven", p.subject)) if possible]
        self.task_of, self.of = (np.array(column) for column in zip(*entries))
        self.tasks, self.held_out = {task for task, _ in entries}, self.hold_out()[self.of]
        self.kept, self.contents = self.open_all()
        self.digest = f"{len(self.pictures)} pictures, {zlib.crc32(repr(sorted(self.contents)).encode()):08x}"

    def find(self):
        """Account for every file: the pictures, and a line on what was found and what is not used."""
        masks, words, pictures, unused = {}, {}, {}, Counter()  # the first three {name without suffix: file}
        for file in walk(self.path):
            name = unicodedata.normalize("NFC", file.relative_to(self.path).as_posix())
            for found, suffixes in ((masks, [MASK]), (words, CAPTIONS), (pictures, PICTURES)):
                suffix = next((s for s in suffixes if name.lower().endswith(s)), None)
                if suffix:
                    other = found.setdefault(name[: -len(suffix)], file)
                    require(other is file, f"{file} and {other} have one name: rename one of them")
                    require(found is not pictures or not re.search(r"(\b|_)(mask|seg)s?(\b|_)", name.lower()),
                            f"{file}: looks like a mask; name it NAME{MASK} beside its NAME.jpg, or rename it")
                    break
            else:
                unused[file.suffix.lower() or file.name] += 1
        require(pictures, f"{self.path}: there are no pictures in it ({', '.join(PICTURES)})")
        lost = [str(masks[name]) for name in masks.keys() - pictures.keys()]
        require(not lost, f"masks without a picture of their name: {', '.join(lost)}")
        counts = Counter(name.rpartition("/")[0] for name in pictures)
        subjects = {folder for folder, count in counts.items() if folder and count > 1}
        subjects = subjects if len(subjects) > 1 else set()  # one folder of pictures is not one subject
        described = []
        for name, file in pictures.items():
            captions, label = read_words(words[name]) if name in words else ([], "")
            folder, mask, above = name.rpartition("/")[0], masks.get(name), file.parent.resolve().name
            require(label or not mask or folder and len(captions) < 2,
                    f"{mask}: its object needs a name: a line `object: NAME` in {file.stem}.txt")
            label = label or re.sub(r"[\W\d_]+", " ", above).strip() or above  # red_dog2: red dog
            subject = folder if folder in subjects else ""
            described.append(Picture(file, name, captions or [label], label, mask, subject))
        lost = sorted(words.keys() - pictures.keys())
        ignored = [f"{n} {kind}" for kind, n in unused.items()] + [f"the caption {name}" for name in lost]
        return described, (f"{len(pictures)} pictures, {len(words) - len(lost)} with captions, {len(masks)} masks, "
                           f"{len(subjects)} subjects; ignored: {', '.join(ignored) or 'nothing'}")

    def hold_out(self):
        """Which pictures are held out, (pictures,) bool: some groups, chosen by their names."""
        total, held = len(self.pictures), np.zeros(len(self.pictures), bool)
        for name in sorted(self.groups, key=lambda name: zlib.crc32(name.encode()))[: len(self.groups) - 1]:
            if held.sum() < max(1, total // (10 if total < 1000 else 50)):
                held[self.groups[name]] = True
        return held

    def open_all(self):
        """Open as many pictures as can be kept. Returns what read() gave, by number, and a hash of each one's
        files by its name."""
        kept, room, problems, contents = {}, KEEP, [], {}
        for i, p in enumerate(tqdm(self.pictures, "opening pictures", disable=not sys.stderr.isatty())):
            try:
                hashes = [zlib.crc32(file.read_bytes()) if room > 0 else file.stat().st_size
                          for file in (p.file, p.mask) if file]
                contents[p.name] = f"{zlib.crc32(repr((hashes, p.captions, p.label)).encode()):08x}"
                if room > 0:
                    kept[i] = self.read(i)
                    room -= kept[i][0].nbytes
            except (ValueError, OSError) as error:
                problems.append(f"\n  {error}")
        require(not problems, f"{len(problems)} files cannot be used:{''.join(problems)}")
        return kept, contents

    def read(self, i):
        """Picture i shrunk to what the model can use, uint8 (H, W, 3), and its mask, bool (H, W) or None."""
        p = self.pictures[i]
        image = halve(Image.fromarray(load_image(p.file, 2 * self.size)), self.size)
        if not p.mask:
            return np.asarray(image), np.ones((image.height, image.width), bool)
        mask = Image.fromarray(load_mask(p.mask, p.file)).convert("L").resize(image.size, Image.BOX)
        require(mask.getextrema()[1] > 127, f"{p.mask}: its object cannot be seen at {self.size} pixels")
        return np.asarray(image), np.asarray(mask) > 127

    def text_tokenizer(self):
        """A text tokenizer that knows every word of the captions and names."""
        return TextTokenizer.train(["The in .", "The image is", *self.prompts()])

    def prompts(self):
        """The longest prompt of each caption."""
        return [f"{object_line(p.label)}\n{caption}" for p in self.pictures for caption in p.captions]

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        """Samples of a mix {task: share}, of which only the tasks count; held-out ones, or all others."""
        return EntryDataset(self, mix, seed, prefix_drop, held_out)

    def sample(self, line, rng):
        """The Sample of an entry."""
        task, i = self.task_of[line], self.of[line]
        p, crop = self.pictures[i], None if self.held_out[line] else rng
        caption = rng.choice(p.captions)
        prompt = f"{object_line(p.label)}\n{caption}"
        mirrored = crop and rng.random() < 0.5 and not re.search(r"\b(left|right)\b", prompt.lower())
        image, mask = self.look(i, crop, mirrored)
        if task == "text_to_image":
            return Sample(task, caption, [], image)
        if task == "reconstruction":
            return Sample(task, "The image is <image>" + rng.choice(["", f"\n{caption}"]), [image], image)
        if task == "subject_driven":
            other = rng.choice([k for k in self.groups[p.subject] if k != i])
            return Sample(task, prompt, [self.look(other, crop, mirrored)[0]], image)
        cut_out = (mask * image + 0.5).astype(np.uint8)
        if task == "segmentation":
            return Sample(task, object_line(p.label), [image], cut_out)
        background, _ = self.look(rng.randrange(len(self.pictures)), crop, mirrored)
        return Sample(task, prompt, [paste_distorted(cut_out, mask, background, rng)], image)

    def look(self, i, crop, mirrored):
        """Picture i as a square, uint8 (size, size, 3), and its mask, float32 (size, size, 1) or None."""
        picture, mask = self.kept.get(i) or self.read(i)
        turn = slice(None, None, -1 if mirrored else 1)
        return square_of_object(picture[:, turn], mask[:, turn], self.size, crop)


def square_window(shape, box, rng=None):
    """Slices (rows, columns) of a square in a picture of shape (H, W, ...) that shows the box (left, top,
    right, bottom) as far as it fits: the largest and most central; with rng any, of 0.8 to 1 times its
    side."""
    side = round(min(shape[:2]) * (rng.uniform(0.8, 1.0) if rng else 1))
    (left, top, right, bottom), window = box, []
    for first, last, length in ((top, bottom, shape[0]), (left, right, shape[1])):
        low, high = sorted((max(0, last - side), min(first, length - side)))
        start = rng.randint(low, high) if rng else min(max((length - side) // 2, low), high)
        window.append(slice(start, start + side))
    return tuple(window)


def square_of_object(picture, mask, size, rng=None):
    """The square of a picture that shows the masked object (square_window), at size x size.

    picture uint8 (H, W, 3), mask bool (H, W) -> uint8 (size, size, 3), float32 (size, size, 1) in [0, 1].
"""
    window = square_window(mask.shape, Image.fromarray(mask).getbbox(), rng)
    small = center_crop(mask[window].astype(np.uint8) * 255, size)[..., None]
    require(small.max() > 127, f"the object is too small to be seen at {size} x {size} pixels")
    return center_crop(picture[window], size), small.astype(np.float32) / 255


# --- Datasets and batches -------------------------------------------------------------------------------


class ShapesDataset(torch.utils.data.Dataset):
    """Samples of tasks, mixed by shares. Endless: (seed, index) determines a sample."""

    count = float("inf")  # of different samples

    def __init__(self, world, mix, seed, prefix_drop=0.0, held_out=False):
        """mix: {name in TASKS: share}; prefix_drop: probability that a sample's prompt is dropped."""
        self.world, self.mix, self.seed = world, mix, seed
        self.prefix_drop, self.held_out = prefix_drop, held_out

    def __getitem__(self, index):
        rng = random.Random(f"{self.seed} {index}")
        task, = rng.choices(list(self.mix), list(self.mix.values()))
        drop = rng.random() < self.prefix_drop
        sample = TASKS[task](self.world, rng, self.held_out)
        return replace(sample, drop=drop, mask_seed=rng.getrandbits(63))


class EntryDataset(torch.utils.data.Dataset):
    """Samples of a source's entries, those of the mix's tasks. Endless too: every entry comes once before any
    comes again, in an order that changes every epoch."""

    def __init__(self, source, mix, seed, prefix_drop=0.0, held_out=False):
        """source: has `path`, arrays `task_of` and `held_out` (entries,), and sample(line, rng)."""
        self.source, self.seed, self.prefix_drop = source, seed, prefix_drop
        self.lines = np.flatnonzero(np.isin(source.task_of, list(mix)) & (source.held_out == held_out))
        self.count = len(self.lines)
        require(self.count or held_out, f"{source.path} has nothing for {', '.join(mix)}")

    def __getitem__(self, index):
        epoch, i = divmod(index, self.count)
        line = self.lines[shuffled(self.count, f"{self.seed} {epoch}")[i]]
        rng = random.Random(f"{self.seed} {index}")
        sample = self.source.sample(line, rng)
        return replace(sample, drop=rng.random() < self.prefix_drop, mask_seed=rng.getrandbits(63))


@functools.lru_cache(maxsize=4)
def shuffled(count, key):
    """A permutation of range(count), determined by the text `key`: (count,) int32."""
    return np.random.default_rng(list(key.encode())).permutation(np.arange(count, dtype=np.int32))


@dataclass
class Batch:
    """The model's input: prompts as padded ids, and all their images in one tensor."""

    text_ids: torch.Tensor          # (B, L) int64, padded with 0 on the right
    lengths: torch.Tensor           # (B,) int64: number of real ids in each prompt
    pixels: torch.Tensor     # (M, 3, S, S) float32, for the vision encoder: the images of sample 0, of 1, ...
    image_slots: torch.Tensor       # (M * image_tokens,) int64: their positions in the flattened text_ids
    targets: torch.Tensor       # (B, 3, S, S) float32 in [-1, 1], for the tokenizer; without any (0, 3, S, S)
    drop: torch.Tensor              # (B,) bool: samples to train without their prompt
    masked: torch.Tensor            # (B, L) bool: about half of the real tokens, which pretraining hides
    tasks: list[str]

    def to(self, device):
        """The same batch with its tensors on the device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """The same batch in page-locked memory, for faster copies to a GPU; DataLoader calls this."""
        return self.each(torch.Tensor.pin_memory)

    def each(self, change):
        """The same batch with all tensors changed."""
        return Batch(**{k: change(v) if torch.is_tensor(v) else v for k, v in vars(self).items()})


class Collate:
    """Makes a Batch of Samples. Checks placeholders and lengths, mistakes in which would go unnoticed."""

    def __init__(self, text_tokenizer, config, target_size):
        """config: a MentorConfig; target_size: pixels per side of the targets."""
        self.text_tokenizer, self.config, self.target_size = text_tokenizer, config, target_size

    def encode(self, prompt, images):
        """Ids of a prompt with that many images."""
        placeholders = prompt.count("<image>")
        require(placeholders == images, f"{placeholders} <image>, but {images} images: {prompt!r}")
        ids, most = self.text_tokenizer.encode(prompt, self.config.image_tokens), self.config.context
        require(len(ids) <= most, f"{len(ids)} tokens, {self.config.image_tokens} of them for each image, "
                f"but --model.context={most}: {prompt!r}")
        return ids

    def __call__(self, samples):
        ids = [self.encode(s.prompt, len(s.images)) for s in samples]
        longest, size = max(map(len, ids)), self.config.vision.image_size
        text_ids = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
        images = [vision_pixels(image, size) for s in samples for image in s.images]
        targets = [tokenizer_pixels(s.target, self.target_size) for s in samples if s.target is not None]
        chance = [torch.Generator().manual_seed(s.mask_seed) for s in samples]
        hide = torch.stack([torch.rand(longest, generator=g) < 0.5 for g in chance])
        batch = Batch(
            text_ids=text_ids,
            lengths=torch.tensor([len(i) for i in ids]),
            pixels=torch.stack(images) if images else torch.zeros(0, 3, size, size),
            image_slots=(text_ids.flatten() == self.text_tokenizer.image_id).nonzero().flatten(),
            targets=torch.stack(targets) if targets else torch.zeros(0, 3, *[self.target_size] * 2),
            drop=torch.tensor([s.drop for s in samples]),
            masked=(text_ids != TextTokenizer.PAD) & hide,
            tasks=[s.task for s in samples])
        # a data process shares its batch: without the memory for it fail here, not unseen in a queue's thread
        return batch.each(torch.Tensor.share_memory_) if torch.utils.data.get_worker_info() else batch
