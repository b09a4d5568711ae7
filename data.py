"""Everything up to a training batch, from the built-in world of shapes or from your own pictures.

    scene         --task--┐
                          ├--> Sample (prompt with <image> placeholders, images, target) --Collate--> Batch
    your pictures --------┘

A picture is a uint8 array (H, W, 3); only batches hold tensors. A sample depends on its dataset's seed and
its index alone, so any step of a run can be replayed, and any process can make its own share.
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
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from tokenizer import TextTokenizer, require

# --- Pictures ---

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
EXIF_TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
              6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
ORIENTATION = 0x0112  # EXIF's tag, whose values EXIF_TURNS knows


def read_image(path, use):
    """Returns use(image) of the file, opened by Pillow."""
    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:  # Pillow's decoders raise whatever the damage suggests
        raise ValueError(f"{path}: not a readable image ({error})") from None


def load_image(path, least=0):
    """An image file as it looks: turned by its EXIF tag, 16 bits scaled to 8, the first frame, transparency
    on white, without ICC profiles. With `least` a JPEG is decoded smaller, but not below it."""
    def use(image):
        if least:
            image.draft(None, (least, least))
        turn = EXIF_TURNS.get(image.getexif().get(ORIENTATION))  # exif_transpose fails at other broken tags
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    return read_image(path, use)


def load_mask(path, picture_path):
    """A mask's object, bool (H, W): a cut-out's alpha or the larger of two greys; many greys are edges, 3 to
    8 are refused."""
    size, tag = read_image(picture_path, lambda image: (image.size, image.getexif().get(ORIENTATION)))
    (grey, alpha), lossy = read_image(path, lambda image: (
        [*map(np.asarray, image.convert("LA").split())], image.format in ("JPEG", "WEBP")))
    mask = grey if alpha.min() == 255 else alpha
    values = np.unique(mask).tolist()
    middle = (values[0] + values[-1]) / 2
    edges = (np.abs(mask - middle) < (middle - values[0]) * (0.5 if lossy else 1)).mean()
    require(len(values) == 2 or len(values) > (1 if lossy else 8) and edges < 0.15,
            f"{path}: no clear mask, with values {values[:9]}: write 255 for the object, else 0")
    require(mask.shape[::-1] == size, f"{path}: the mask has {mask.shape[::-1]} pixels, its picture {size}")
    require(tag not in EXIF_TURNS, f"{picture_path} has an EXIF turn, and so may {path}: save both upright")
    return mask > middle


def halve(image, size):
    """Halve a Pillow image while its sides stay at least `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    return image


def resize_and_crop(image, sides, size):
    """Resize a Pillow image to sides (width, height), and keep the middle size x size."""
    left, top = ((side - size) // 2 for side in sides)
    return image.resize(sides, Image.BICUBIC).crop((left, top, left + size, top + size))


def center_crop(picture, size):
    """The centred square of a picture or mask at size x size: halved, then bicubic (as ADM)."""
    image = halve(Image.fromarray(picture), size)
    scale = size / min(image.size)
    return np.asarray(resize_and_crop(image, [round(side * scale) for side in image.size], size))


def vision_pixels(picture, size):
    """The centred square of a picture as CLIP's input: float32 (3, size, size), normalised."""
    image = Image.fromarray(picture)
    image = resize_and_crop(image, [int(side * size / min(image.size)) for side in image.size], size)
    pixels = (np.asarray(image, np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def tokenizer_pixels(picture, size):
    """The centred square as the VQGAN's input: float32 (3, size, size) in [-1, 1]."""
    return torch.from_numpy(center_crop(picture, size).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


def as_vision_pixels(targets, size):
    """Targets (B, 3, S, S) in [-1, 1] as the vision encoder's input (B, 3, size, size)."""
    targets = F.interpolate(targets, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.from_numpy(x).to(targets.device, non_blocking=True)[:, None, None]
                 for x in (CLIP_MEAN, CLIP_STD))
    return ((targets + 1) / 2 - mean) / std


def to_picture(image):
    """An image tensor (3, H, W) in [-1, 1], clamped, as a picture."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


# --- The built-in world of shapes ---

COLORS = {"red": (215, 35, 40), "orange": (245, 140, 25), "yellow": (250, 220, 45), "green": (35, 150, 65),
          "cyan": (45, 190, 215), "blue": (35, 65, 200), "purple": (130, 45, 165), "pink": (245, 140, 190)}
RGB = np.array(list(COLORS.values()), np.float32)  # (8, 3), by a colour's index
PATTERNS = ("solid", "striped", "dotted", "split")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SIZES = ("small", "big")
SUPERSAMPLE = 8  # antialiasing: masks are drawn this many times larger, then averaged

# all by index into the above
Subject = namedtuple("Subject", "shape color color2 pattern")  # color2 == color when solid
Placed = namedtuple("Placed", "subject place size")
Scene = namedtuple("Scene", "color pattern subjects")  # the background's two, and one or two Placed


def polygon(*corners):
    """Corners (degrees from the top, radius) -> points in the unit box, y down."""
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
    colour: 1,408, an eighth of which is held out of training. Its 3 x 3 places are whole cells
    of an 8 x 8 code grid apart, so that its codes are similar at each.
    """

    digest = "shapes"  # a run goes on only with data of the same digest
    template = ("A {small, big} {colour} {shape} [with {colour} stripes, {colour} dots, a {colour} half] at "
                "the {place} on a {colour} [striped, dotted, split] background")

    def __init__(self, image_size):
        self.image_size = image_size
        self.widths = [round(image_size * w / 32) for w in (14, 20)]  # of small and big subjects
        everything = itertools.product(*map(range, map(len, (SHAPES, COLORS, COLORS, PATTERNS))))
        self.subjects = [s for s in itertools.starmap(Subject, everything)
                         if (s.color == s.color2) == (PATTERNS[s.pattern] == "solid")]
        self.held_out_subjects = [s for s in self.subjects if zlib.crc32(repr(tuple(s)).encode()) % 8 == 0]
        self.train_subjects = [s for s in self.subjects if s not in self.held_out_subjects]

    @property
    def tasks(self):
        return set(TASKS)

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        """Samples of a mix {task: share} of tasks, of held-out subjects or all others."""
        return Samples(self, mix, seed, prefix_drop, held_out)

    def sample(self, task, rng, held_out=False):
        return TASKS[task](self, rng, held_out)

    # words

    def label(self, subject):
        """A subject's name in prompts: its shape, not colour or pattern."""
        return list(SHAPES)[subject.shape]

    def describe(self, subject):
        """Its looks in captions: "red star with blue stripes"."""
        color, color2 = list(COLORS)[subject.color], list(COLORS)[subject.color2]
        pattern = {"solid": "", "striped": f" with {color2} stripes", "dotted": f" with {color2} dots",
                   "split": f" with {with_article(color2)} half"}
        return f"{color} {self.label(subject)}{pattern[PATTERNS[subject.pattern]]}"

    def caption(self, scene, looks=True):
        """The sentence for a scene; without looks, these are left to a reference."""
        name = self.describe if looks else self.label
        words = [f"a {SIZES[p.size]} {name(p.subject)} at the {PLACES[p.place]}" for p in scene.subjects]
        pattern = f" {PATTERNS[scene.pattern]}" if scene.pattern else ""
        text = " and ".join(words) + f" on {with_article(list(COLORS)[scene.color] + pattern)} background"
        return "A" + text[1:]

    def text_tokenizer(self):
        rng = random.Random(0)
        scenes = [self.some_scene(rng, held_out) for held_out in (False, True) for _ in range(1000)]
        return TextTokenizer.train(["The in .", "The image is", *map(self.caption, scenes)])

    # pictures

    def center(self, place, size):
        """Pixel centre (x, y) of a place: 8, 16, 24 of 32 for small subjects, 12, 16, 20 for big ones."""
        middle, step = self.image_size // 2, self.image_size * (8, 4)[size] // 32
        return middle + (place % 3 - 1) * step, middle + (place // 3 - 1) * step

    def shrink(self, fine):
        """A supersampled mask, averaged down to (S, S, 1)."""
        s = self.image_size
        return np.asarray(fine, np.float32).reshape(s, SUPERSAMPLE, s, SUPERSAMPLE).mean((1, 3))[..., None]

    @functools.cache
    def pattern_mask(self, pattern, x, y, upright):
        """Where a pattern anchored at (x, y) shows its second colour, float32 (S, S, 1) in [0, 1]. Upright
        (in backgrounds) stripes are vertical, and halves are above each other."""
        grid = (np.arange(self.image_size * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
        across, along = np.broadcast_arrays(grid[None, :] - x, grid[:, None] - y)
        u, v = (across, along) if upright else (along, across)
        band = self.image_size / 8
        return self.shrink({
            "solid": np.zeros_like(u),
            "striped": np.floor(u / band) % 2,
            "dotted": np.hypot(u % (2 * band) - band, v % (2 * band) - band) < 0.8 * band,
            "split": v >= 0}[PATTERNS[pattern]])

    @functools.cache
    def background(self, color, pattern):
        """A light tone patterned in a lighter one: float32 (S, S, 3) in [0, 255]."""
        base, second = 0.55 * RGB[color] + 0.45 * 255, 0.2 * RGB[color] + 0.8 * 255
        return base + self.pattern_mask(pattern, 0, self.image_size // 2, True) * (second - base)

    @functools.cache
    def shape_mask(self, shape, place, size):
        """A shape's coverage, float32 (S, S, 1) in [0, 1]."""
        points = np.array(list(SHAPES.values())[shape]) * self.widths[size] / 2 + self.center(place, size)
        canvas = Image.new("L", (self.image_size * SUPERSAMPLE,) * 2)
        ImageDraw.Draw(canvas).polygon((points * SUPERSAMPLE - 0.5).flatten().tolist(), fill=1)
        return self.shrink(canvas)

    def subject_mask(self, placed):
        """Its coverage, float32 (S, S, 1) in [0, 1]."""
        return self.shape_mask(placed.subject.shape, placed.place, placed.size)

    def draw_subject(self, placed):
        """Its colours, float32 (S, S, 3) in [0, 255], of use under its mask alone."""
        _, color, color2, pattern = placed.subject
        mask = self.pattern_mask(pattern, *self.center(placed.place, placed.size), False)
        return RGB[color] + mask * (RGB[color2] - RGB[color])

    def draw(self, scene):
        """The picture of a scene, uint8 (S, S, 3)."""
        image = self.background(scene.color, scene.pattern)
        for placed in scene.subjects:
            image = image + self.subject_mask(placed) * (self.draw_subject(placed) - image)
        return (image + 0.5).astype(np.uint8)

    def cut_out(self, placed):
        """The subject alone, on black: uint8 (S, S, 3)."""
        return (self.subject_mask(placed) * self.draw_subject(placed) + 0.5).astype(np.uint8)

    # chance

    def random_subjects(self, rng, count, held_out=False):
        """Subjects with different labels."""
        subjects = []
        while len(subjects) < count:
            subject = rng.choice(self.held_out_subjects if held_out else self.train_subjects)
            if self.label(subject) not in map(self.label, subjects):
                subjects.append(subject)
        return subjects

    def random_scene(self, rng, subjects):
        """Subjects at random places on a random background; two are small, on opposite sides."""
        color, pattern = rng.randrange(len(COLORS)), rng.randrange(len(PATTERNS))
        if len(subjects) == 1:
            return Scene(color, pattern, (Placed(*subjects, rng.randrange(9), rng.randrange(2)),))
        a = b = 0  # two of the 3 x 3 places
        while max(abs(a // 3 - b // 3), abs(a % 3 - b % 3)) < 2:
            a, b = rng.randrange(9), rng.randrange(9)
        return Scene(color, pattern, (Placed(subjects[0], a, 0), Placed(subjects[1], b, 0)))

    def some_scene(self, rng, held_out):
        """A scene of one subject, every tenth of two."""
        return self.random_scene(rng, self.random_subjects(rng, 2 if rng.random() < 0.1 else 1, held_out))


# --- The tasks (MENTOR section 3.2) ---


@dataclass
class Sample:
    """One example of a task, before tokenization."""

    task: str
    prompt: str                # with one <image> per reference
    images: list               # the references
    target: np.ndarray = None  # the picture to draw; None where only a prompt is given
    scene: Scene = None        # for the judge; None: your own pictures
    drop: bool = False         # train without the prompt (for guidance)
    mask_seed: int = 0         # of the choice of words that the encoder's stage hides


def object_line(label):
    """The line of a prompt that introduces an object."""
    return f"The {label} in <image>."


def subject_prompt(world, scene):
    """The line of each subject, then the scene's caption without their looks."""
    lines = [object_line(world.label(p.subject)) for p in scene.subjects]
    return "\n".join([*lines, world.caption(scene, looks=False)])


def text_to_image(world, rng, held_out=False):
    """`{caption}` -> the image."""
    scene = world.some_scene(rng, held_out)
    return Sample("text_to_image", world.caption(scene), [], world.draw(scene), scene)


def reconstruction(world, rng, held_out=False):
    """`The image is <image>`, half the time with its caption -> the same image."""
    scene = world.some_scene(rng, held_out)
    image, caption = world.draw(scene), f"\n{world.caption(scene)}" if rng.random() < 0.5 else ""
    return Sample("reconstruction", "The image is <image>" + caption, [image], image, scene)


def segmentation(world, rng, held_out=False):
    """`The {label} in <image>.` -> the object's pixels, the rest black."""
    scene = world.some_scene(rng, held_out)
    placed = rng.choice(scene.subjects)
    prompt, target = object_line(world.label(placed.subject)), scene._replace(subjects=(placed,))
    return Sample("segmentation", prompt, [world.draw(scene)], world.cut_out(placed), target)


def recovery(world, rng, held_out=False):
    """The object, distorted and pasted on another image, and the caption -> the original image."""
    scene = other = world.random_scene(rng, world.random_subjects(rng, 1, held_out))
    placed, = scene.subjects
    while world.label(placed.subject) in [world.label(p.subject) for p in other.subjects]:
        other = world.some_scene(rng, held_out)
    pasted = paste_distorted(world.cut_out(placed), world.subject_mask(placed), world.draw(other), rng)
    return Sample("recovery", subject_prompt(world, scene), [pasted], world.draw(scene), scene)


def paste_distorted(cut_out, mask, background, rng):
    """Paste a segmented object at a random place and scale onto another picture; half the time also rotate,
    stretch and shear it and change its perspective.

    cut_out (times mask already), background uint8 (H, W, 3); mask (H, W, 1) in [0, 1], not all 0.
    """
    height, width = mask.shape[:2]
    sprite = Image.fromarray(np.concatenate([cut_out, (mask * 255).astype(np.uint8)], axis=-1), "RGBa")
    left, top, right, bottom = sprite.getchannel("a").getbbox()
    # homogeneous, from new pixels to old: from the new centre, undistort, to the old centre
    undistort, scale = np.eye(3), rng.uniform(0.6, 1.1)
    if rng.random() < 0.5:
        angle = np.radians(rng.uniform(-20, 20))
        stretch, shear = rng.uniform(0.85, 1.18), rng.uniform(-0.2, 0.2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        undistort[:2, :2] = turn @ [[stretch, shear], [0, 1 / stretch]]
        undistort[2, :2] = [rng.uniform(-0.3, 0.3) / width, rng.uniform(-0.3, 0.3) / height]
    x, y = (rng.uniform(min(half, side / 2), max(side - half, side / 2))  # the new centre
            for half, side in ((scale * (right - left) / 2, width), (scale * (bottom - top) / 2, height)))
    from_new = [[1 / scale, 0, -x / scale], [0, 1 / scale, -y / scale], [0, 0, 1]]
    to_old = [[1, 0, (left + right) / 2], [0, 1, (top + bottom) / 2], [0, 0, 1]]
    whole = to_old @ undistort @ from_new
    numbers = (whole / whole[2, 2]).flatten()[:8].tolist()
    warped = np.float32(sprite.transform((width, height), Image.PERSPECTIVE, numbers, Image.BILINEAR))
    return (warped[..., :3] + (1 - warped[..., 3:] / 255) * background + 0.5).clip(0, 255).astype(np.uint8)


def subject_driven(world, rng, held_out=False):
    """An image of the subject, and the caption of a new scene -> the new scene with the same subject."""
    subjects = world.random_subjects(rng, 1, held_out)
    reference, scene = world.random_scene(rng, subjects), world.random_scene(rng, subjects)
    prompt, images = subject_prompt(world, scene), [world.draw(reference)]
    return Sample("subject_driven", prompt, images, world.draw(scene), scene)


TASKS = {f.__name__: f for f in (text_to_image, reconstruction, segmentation, recovery, subject_driven)}

# --- Your own pictures ---

PICTURES, CAPTIONS, MASK = (".jpg", ".jpeg", ".png", ".webp"), (".txt", ".caption"), ".mask.png"
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
KEEP = 10**9  # bytes of pictures that stay in memory

Picture = namedtuple("Picture", "file name captions label mask subject")  # mask: a file or None


def walk(folder):
    """All files below a folder, without hidden ones and the system's own."""
    def refuse(error):
        raise ValueError(f"{error.filename}: this folder cannot be listed ({error.strerror})")
    seen = set()
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(path))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in SYSTEM_FOLDERS
                            and os.path.realpath(Path(path, f)) not in seen)  # a link may lead back
        yield from (Path(path, f) for f in sorted(files) if not f.startswith("."))


def read_words(file):
    """A caption file: its captions, and the name in its line `object: NAME`, or ""."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text ({error})") from None
    names = [line for line in lines if line.lower().startswith("object:")]
    require(len(names) < 2 and "<image>" not in "".join(lines),
            f"{file}: must have one `object: NAME` at most, and no <image>")
    return [line for line in lines if line not in names], "".join(names)[7:].strip()


class Folder:
    """Your own pictures, as samples of the tasks that they allow:

        dog.jpg         a picture (.jpg, .jpeg, .png or .webp)        reconstruction, text-to-image
        dog.txt         its captions, one a line, and perhaps
                        a line `object: NAME`
        dog.mask.png    white where that object is, black elsewhere   segmentation, recovery
        rex/*.jpg       a folder per subject, two pictures or more    subject-driven: one picture from another

    Where there is no caption or name, the folder's name stands in. About a tenth (from 1,000 pictures on a
    fiftieth) is held out, subjects as a whole. Training crops at random, and mirrors half where no word says
    left or right.
    """

    def __init__(self, folder, size):
        """size: pixels per side of the targets."""
        self.path, self.size = Path(folder), size
        require(self.path.is_dir(), f"--data={folder}: there is no such folder")
        self.pictures, self.notes = self.find()

        # groups: subjects or single pictures; some are held out, never all
        self.groups, held = defaultdict(list), np.zeros(len(self.pictures), bool)
        for i, p in enumerate(self.pictures):
            self.groups[p.subject or p.name + "."].append(i)
        enough = max(1, len(held) // (10 if len(held) < 1000 else 50))
        for name in sorted(self.groups, key=lambda name: zlib.crc32(name.encode()))[:-1]:
            if held.sum() < enough:
                held[self.groups[name]] = True
        self.notes += f"; {held.sum()} held out"
        # the field a task needs; the pictures that have it, held out or not
        needs = {"text_to_image": "file", "reconstruction": "file", "segmentation": "mask",
                 "recovery": "mask", "subject_driven": "subject"}
        self.usable = {(task, part): [i for i, p in enumerate(self.pictures)
                                      if held[i] == part and getattr(p, need)]
                       for task, need in needs.items() for part in (False, True)}
        self.tasks = {task for task in needs if self.usable[task, False]}

        self.kept, self.contents = {}, {}
        self.open_all()  # digest of names: pictures may be mended
        self.digest = f"{len(self.pictures)} pictures, {zlib.crc32(repr(sorted(self.contents)).encode()):08x}"

    def find(self):
        """A Picture of each one, and a line on what became of every file."""
        masks, words, pictures, unused = {}, {}, {}, Counter()  # {name: file}; below, MASK before its .png
        kinds = {MASK: masks, **dict.fromkeys(CAPTIONS, words), **dict.fromkeys(PICTURES, pictures)}
        for file in walk(self.path):
            name = unicodedata.normalize("NFC", file.relative_to(self.path).as_posix())
            suffix = next((s for s in kinds if name.lower().endswith(s)), None)
            if not suffix:
                unused[file.suffix.lower() or file.name] += 1
                continue
            other = kinds[suffix].setdefault(name[: -len(suffix)], file)
            require(other is file, f"{file} and {other} have one name: rename one of them")
            mask = re.search(r"(\b|_)(mask|seg|segmentation)s?\d*(\b|_)", name.lower())
            require(not mask or suffix not in PICTURES,
                    f"{file}: looks like a mask; name it NAME{MASK} beside NAME.jpg, or rename it")
        require(pictures, f"{self.path}: there are no pictures in it ({', '.join(PICTURES)})")
        lost = ", ".join(str(masks[name]) for name in masks.keys() - pictures.keys())
        require(not lost, f"masks without a picture of their name: {lost}")

        counts = Counter(name.rpartition("/")[0] for name in pictures)
        subjects = {folder for folder, count in counts.items() if folder and count > 1}
        subjects = subjects if len(subjects) > 1 or len(pictures) < 11 else set()  # one large folder is none
        described = []
        for name, file in pictures.items():
            captions, label = read_words(words[name]) if name in words else ([], "")
            folder, mask, above = name.rpartition("/")[0], masks.get(name), file.parent.resolve().name
            require(label or not mask or folder and len(captions) < 2,
                    f"{mask}: its object needs a name: a line `object: NAME` in {file.stem}.txt")
            label = label or re.sub(r"[\W\d_]+", " ", above).strip() or above  # red_dog2: red dog
            subject = folder if folder in subjects else ""
            described.append(Picture(file, name, captions or [label], label, mask, subject))
        unused.update(f"caption {name}" for name in sorted(words.keys() - pictures.keys()))
        ignored = ", ".join(f"{n} {kind}" for kind, n in unused.items()) or "nothing"
        return described, (f"{len(pictures)} pictures, {len(words.keys() & pictures.keys())} with captions, "
                           f"{len(masks)} masks, {len(subjects)} subjects; ignored: {ignored}")

    def open_all(self):
        """Read and keep pictures while there is room, to see now what is wrong. Hash words and files (without
        room, file sizes)."""
        room, problems = KEEP, []
        for i, p in enumerate(tqdm(self.pictures, "opening pictures", disable=not sys.stderr.isatty())):
            try:
                hashes = [zlib.crc32(file.read_bytes()) if room > 0 else file.stat().st_size
                          for file in (p.file, p.mask) if file]
                self.contents[p.name] = f"{zlib.crc32(repr((hashes, p.captions, p.label)).encode()):08x}"
                if room > 0:
                    self.kept[i] = self.read(i)
                    self.look(i)
                    room -= self.kept[i][0].nbytes
            except (ValueError, OSError) as error:
                problems.append(f"\n  {p.file}: {str(error).removeprefix(f'{p.file}: ')}")
        require(not problems, f"{len(problems)} files cannot be used:{''.join(problems)}")

    def read(self, i):
        """Picture i shrunk to what the model can use, uint8 (H, W, 3), and its mask, bool (H, W)."""
        p = self.pictures[i]
        image = halve(Image.fromarray(load_image(p.file, 2 * self.size)), self.size)
        if not p.mask:
            return np.asarray(image), np.ones((image.height, image.width), bool)
        mask = Image.fromarray(load_mask(p.mask, p.file)).convert("L").resize(image.size, Image.BOX)
        return np.asarray(image), np.asarray(mask) > 127

    def text_tokenizer(self):
        return TextTokenizer.train(["The in .", "The image is", *self.prompts()])

    def prompts(self):
        """The longest prompt with each caption."""
        return [f"{object_line(p.label)}\n{caption}" for p in self.pictures for caption in p.captions]

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        mix = {task: share for task, share in mix.items() if self.usable[task, held_out]}
        require(mix or held_out, f"{self.path} has nothing for the mix")
        count = sum(len(self.usable[task, held_out]) for task in mix)
        return Samples(self, mix, seed, prefix_drop, held_out, count)

    def sample(self, task, rng, held_out=False):
        i = rng.choice(self.usable[task, held_out])
        p, crop = self.pictures[i], None if held_out else rng
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
        others = [k for k in self.usable["text_to_image", False] if k != i] or [i]
        background, _ = self.look(rng.choice(others), crop, mirrored)
        return Sample(task, prompt, [paste_distorted(cut_out, mask, background, rng)], image)

    def look(self, i, rng=None, mirrored=False):
        """Picture i cropped, uint8 (size, size, 3), and its mask, float32 (size, size, 1)."""
        picture, mask = self.kept.get(i) or self.read(i)
        turn = slice(None, None, -1 if mirrored else 1)
        return square_of_object(picture[:, turn], mask[:, turn], self.size, rng)


def square_window(shape, box, rng=None):
    """Slices (rows, columns) of a square of a picture of shape (H, W) that shows the box (left, top, right,
    bottom) as far as it fits: the largest, most central one, or with rng any of 0.8 to 1 of its side."""
    side = round(min(shape[:2]) * (rng.uniform(0.8, 1.0) if rng else 1))
    (left, top, right, bottom), window = box, []
    for first, last, length in ((top, bottom, shape[0]), (left, right, shape[1])):
        low, high = sorted((max(0, last - side), min(first, length - side)))
        start = rng.randint(low, high) if rng else min(max((length - side) // 2, low), high)
        window.append(slice(start, start + side))
    return tuple(window)


def square_of_object(picture, mask, size, rng=None):
    """A picture's square that shows its object, and its mask, at size x size: uint8 (H, W, 3), bool (H, W) ->
    uint8 (size, size, 3), float32 (size, size, 1) in [0, 1]."""
    window = square_window(mask.shape, Image.fromarray(mask).getbbox() or (0, 0, 0, 0), rng)
    small = center_crop(mask[window].astype(np.uint8) * 255, size)[..., None]
    if rng and small.max() < 128:  # cut away by chance
        return square_of_object(picture, mask, size)
    require(small.max() > 127, f"the object cannot be seen at {size} x {size} pixels")
    return center_crop(picture[window], size), small.astype(np.float32) / 255


# --- Datasets and batches ---


class Samples(torch.utils.data.Dataset):
    """Samples of tasks, mixed by shares. Endless: (seed, index) determines a sample."""

    def __init__(self, source, mix, seed, prefix_drop=0.0, held_out=False, count=float("inf")):
        """source: has sample(task, rng, held_out), count: of different samples; mix: {task: share};
        prefix_drop: probability that a sample's prompt is dropped."""
        self.source, self.mix, self.seed, self.count = source, mix, seed, count
        self.prefix_drop, self.held_out = prefix_drop, held_out

    def __getitem__(self, index):
        rng = random.Random(f"{self.seed} {index}")
        drop = rng.random() < self.prefix_drop
        task, = rng.choices(list(self.mix), list(self.mix.values()))
        sample = self.source.sample(task, rng, self.held_out)
        return replace(sample, drop=drop, mask_seed=rng.getrandbits(63))


@dataclass
class Batch:
    """The model's input: prompts as padded ids, and all their images."""

    text_ids: torch.Tensor     # (B, L) int64, padded with 0 on the right
    lengths: torch.Tensor      # (B,) int64: number of real ids in each prompt
    pixels: torch.Tensor       # (M, 3, S, S) float32, for the vision encoder: those of sample 0, of 1, ...
    image_slots: torch.Tensor  # (M * image_tokens,) int64: their positions in the flattened text_ids
    targets: torch.Tensor      # (B, 3, S, S) float32 in [-1, 1], for the tokenizer; (0, 3, S, S): none
    drop: torch.Tensor         # (B,) bool: samples to train without their prompt
    masked: torch.Tensor       # (B, L) bool: four fifths of the real tokens or all, for the encoder's stage
    tasks: list[str]

    def to(self, device):
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """DataLoader calls this, for faster copies to a GPU."""
        return self.each(torch.Tensor.pin_memory)

    def each(self, change):
        return replace(self, **{k: change(v) for k, v in vars(self).items() if torch.is_tensor(v)})


class Collate:
    """Makes a Batch of Samples. Checks placeholders and lengths, mistakes in which would go unnoticed.

    config: a MentorConfig; target_size: pixels per side of the targets.
    """

    def __init__(self, text_tokenizer, config, target_size):
        self.text_tokenizer, self.config, self.target_size = text_tokenizer, config, target_size

    def encode(self, prompt, images):
        """Ids of a prompt for this many images."""
        placeholders = prompt.count("<image>")
        require(placeholders == images, f"{placeholders} <image>, but {images} images: {prompt!r}")
        each, most = self.config.image_tokens, self.config.context
        ids = self.text_tokenizer.encode(prompt, each)
        require(len(ids) <= most,
                f"{len(ids)} tokens, {each} of them for each image, but --model.context={most}: {prompt!r}")
        return ids

    def __call__(self, samples):
        ids = [self.encode(s.prompt, len(s.images)) for s in samples]
        longest, size = max(map(len, ids)), self.config.vision.image_size
        text_ids = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
        images = [vision_pixels(image, size) for s in samples for image in s.images]
        targets = [tokenizer_pixels(s.target, self.target_size) for s in samples if s.target is not None]
        seeds = (torch.Generator().manual_seed(s.mask_seed) for s in samples)
        chance = torch.stack([torch.rand(1 + longest, generator=seed) for seed in seeds])
        hidden = (chance[:, 1:] < 0.8) | (chance[:, :1] < 0.5)
        batch = Batch(
            text_ids=text_ids,
            lengths=torch.tensor([len(i) for i in ids]),
            pixels=torch.stack(images) if images else torch.zeros(0, 3, size, size),
            image_slots=(text_ids.flatten() == self.text_tokenizer.image_id).nonzero().flatten(),
            targets=torch.stack(targets) if targets else torch.zeros(0, 3, *[self.target_size] * 2),
            drop=torch.tensor([s.drop for s in samples]),
            masked=(text_ids != TextTokenizer.PAD) & hidden,
            tasks=[s.task for s in samples])
        # without shared memory, fail here, not unseen in a queue's thread
        return batch.each(torch.Tensor.share_memory_) if torch.utils.data.get_worker_info() else batch
