"""Pictures, the world of shapes and its tasks, datasets and batches. (test_folder.py: your own pictures.)"""

import hashlib
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import FIVE, small_config
from data import (COLORS, PATTERNS, PLACES, SHAPES, TASKS, Batch, Collate, Placed, Sample,
                  Scene, Samples, Subject, load_image, square_window, vision_pixels)
from sample import Judge
from tokenizer import TextTokenizer

STAR = Subject(list(SHAPES).index("star"), *map(list(COLORS).index, ("red", "blue")), 1)  # 1: striped
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

def samples_of(world, task, count, **options):
    dataset = Samples(world, {task: 1.0}, 0, **options)
    return [dataset[i] for i in range(count)]

# --- Pictures
def test_pictures_of_every_kind_are_read_as_they_look(tmp_path):
    def read(image, name, **keys):
        image.save(tmp_path / name, **keys)
        picture = load_image(tmp_path / name)
        assert picture.shape[2] == 3 and picture.dtype == np.uint8
        return picture.astype(int)

    plain, grey = Image.fromarray(NOISE), NOISE[..., :1]
    assert (read(plain, "plain.png") == NOISE).all()
    assert np.abs(read(plain.quantize(256), "palette.png") - NOISE).mean() < 20
    assert np.abs(read(plain.convert("CMYK"), "cmyk.tif") - NOISE).max() < 3
    assert (read(Image.fromarray(grey[..., 0].astype(np.uint16) * 257), "deep.png") == grey).all()
    assert (read(Image.fromarray(grey[..., 0]), "grey.png") == grey).all()
    assert (read(Image.fromarray(grey[..., 0] > 127), "bits.png") == 255 * (grey > 127)).all()
    alpha = np.dstack([NOISE, np.zeros((20, 30), np.uint8)])
    alpha[10:, :, 3], alpha[5:10, :, 3] = 255, 51  # transparency is on white
    seen = read(Image.fromarray(alpha), "alpha.png")
    assert (seen[:5] == 255).all() and (seen[10:] == NOISE[10:]).all()
    assert np.abs(seen[5:10] - (0.2 * NOISE[5:10] + 0.8 * 255)).max() < 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (0, 0, 4, 8))
    seen = read(palette, "hole.png", transparency=0)
    assert (seen[:, :4] == (40, 50, 60)).all() and (seen[:, 4:] == 255).all()
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    assert (read(red, "moving.gif", save_all=True, append_images=[blue]) == (255, 0, 0)).all()

def test_pictures_turn_as_their_camera_was_held(tmp_path):
    """Also beside a tag that Pillow cannot write again: the width as text."""
    turned = {1: NOISE, 2: NOISE[:, ::-1], 3: NOISE[::-1, ::-1], 4: NOISE[::-1], 5: NOISE.transpose(1, 0, 2),
              6: np.rot90(NOISE, -1), 7: NOISE[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(NOISE)}
    for tag, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = tag, "hello"
        odd = exif.tobytes().replace(b"\x01\x0e", b"\x01\x00").replace(b"\x0e\x01", b"\x00\x01")
        for tags in (exif, odd):
            Image.fromarray(NOISE).save(tmp_path / "a.png", exif=tags)
            assert (load_image(tmp_path / "a.png") == expected).all(), tag

@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the damage
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp", "avif", "dds", "blp"])
def test_a_damaged_picture_is_one_line_that_names_it(suffix, tmp_path, monkeypatch):
    file, rng, failed = tmp_path / f"a.{suffix}", random.Random(suffix), 0
    Image.fromarray(NOISE).convert("P" if suffix == "blp" else "RGB").save(file)
    whole = file.read_bytes()
    for i in range(40):  # cut; overwritten somewhere; changed where formats keep what matters; replaced
        at, head = rng.randrange(len(whole)), bytearray(whole[:400])
        for _ in range(20):
            head[rng.randrange(len(head))] = rng.randrange(256)
        file.write_bytes((whole[:at], whole[:at] + rng.randbytes(8) + whole[at + 8 :], head + whole[400:],
                          rng.choice([b"", b"\0" * 100, rng.randbytes(200)]))[i % 4])
        try:
            load_image(file)
        except ValueError as error:
            assert str(error).startswith(f"{file}: not a readable image") and "\n" not in str(error)
            failed += 1
    assert failed > 10
    file.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # too large to open
    for name in (f"a.{suffix}", f"none.{suffix}"):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            load_image(tmp_path / name)

def test_a_square_window_shows_the_box():
    chance = random.Random(0)
    for _ in range(2000):
        height, width = chance.randint(1, 60), chance.randint(1, 60)
        left, top = chance.randrange(width), chance.randrange(height)
        right, bottom = chance.randint(left, width), chance.randint(top, height)
        for rng in (None, chance):
            rows, columns = square_window((height, width, 3), (left, top, right, bottom), rng)
            side, short = rows.stop - rows.start, min(height, width)
            assert side == columns.stop - columns.start and round(0.8 * short) <= side <= short
            assert rng or side == short
            for window, first, last, length in ((rows, top, bottom, height), (columns, left, right, width)):
                assert 0 <= window.start and window.stop <= length
                shown = window.start <= first and last <= window.stop  # or, of a box that is too long, a part
                assert shown or last - first > side and first <= window.start and window.stop <= last
    assert square_window((10, 30, 3), (15, 5, 15, 5)) == np.s_[0:10, 10:20]      # the most central
    assert square_window((10, 30, 3), (22, 0, 28, 9)) == np.s_[0:10, 18:28]      # no farther than needed
    assert len({str(square_window((20, 30), (12, 8, 16, 12), chance)) for _ in range(50)}) > 30

# --- The world of shapes
def test_the_world_has_the_stated_counts(world):
    assert [*map(len, (SHAPES, COLORS, PATTERNS, PLACES, data.SIZES))] == [8, 8, 4, 9, 2]
    assert len(set(world.subjects)) == len(world.subjects) == 1408 == 8 * (8 + 3 * 8 * 7)
    held, trained = set(world.held_out_subjects), set(world.train_subjects)
    assert len(held) == 176 and len(trained) == 1408 - 176 and not held & trained
    of_trained_tiny = hashlib.md5(repr(sorted(map(tuple, held))).encode()).hexdigest()
    assert of_trained_tiny == "2d2db9ba42426852e3ef3b48c8b31150"  # those that it has not seen
    for attribute in range(4):  # only combinations are new
        assert {s[attribute] for s in trained} == {s[attribute] for s in world.subjects}

@pytest.mark.parametrize("task", FIVE)
def test_training_never_shows_a_held_out_subject(task, world, monkeypatch):
    """Nor in a reference, or behind a pasted subject."""
    drawn, held = set(), set(world.held_out_subjects)
    draw, cut_out = world.draw, world.cut_out
    see = lambda placed: drawn.update(p.subject for p in placed)  # noqa: E731
    monkeypatch.setattr(world, "draw", lambda scene: see(scene.subjects) or draw(scene))
    monkeypatch.setattr(world, "cut_out", lambda placed: see([placed]) or cut_out(placed))
    samples_of(world, task, 300)
    assert len(drawn) > 100 and not drawn & held
    drawn.clear()
    samples_of(world, task, 100, held_out=True)
    assert len(drawn) > 50 and drawn <= held

def test_words_and_colours_of_a_scene(world):
    green, orange = list(COLORS).index("green"), list(COLORS).index("orange")
    scene = Scene(green, 0, (Placed(STAR, PLACES.index("center"), 1),))
    shown = world.draw(scene)[[0, 3, 14, 17], [0, 16, 16, 16]].tolist()
    ground = [int(0.55 * part + 0.45 * 255 + 0.5) for part in COLORS["green"]]
    assert shown == [ground, ground, list(COLORS["blue"]), list(COLORS["red"])]
    assert world.caption(scene) == "A big red star with blue stripes at the center on a green background"
    assert world.caption(scene, looks=False) == "A big star at the center on a green background"
    half, plain = STAR._replace(color2=orange, pattern=3), STAR._replace(color2=STAR.color, pattern=0)
    assert world.caption(Scene(orange, 1, (Placed(half, 4, 0), Placed(plain, 0, 0)))) == (
        "A small red star with an orange half at the center and a small red star at the top left on an "
        "orange striped background")

def test_two_subjects_never_touch_or_share_a_name(world, monkeypatch):
    rng, square, others, some_scene = random.Random(0), list(SHAPES).index("square"), [], world.some_scene
    for _ in range(60):
        scene = world.random_scene(rng, world.random_subjects(rng, 2))
        first, second = (world.shape_mask(square, p.place, p.size) for p in scene.subjects)
        assert not (first * second).any() and len({world.label(p.subject) for p in scene.subjects}) == 2
    monkeypatch.setattr(world, "some_scene", lambda *given: others.append(some_scene(*given)) or others[-1])
    for i in range(60):  # nor do the object of recovery and what it is pasted on
        name = world.label(TASKS["recovery"](world, random.Random(i)).scene.subjects[0].subject)
        assert name not in [world.label(p.subject) for p in others[-1].subjects]
    assert len(others) > 60  # some were refused

def test_captions_say_what_the_pictures_show(world):
    """The judge reads the picture; its scene's caption is the prompt's."""
    judge = Judge(world)
    for task, line, looks in (("text_to_image", 0, True), ("subject_driven", 1, False)):
        samples = [s for s in samples_of(world, task, 60) if len(s.scene.subjects) == 1]
        for sample, seen in zip(samples, judge.read([s.target for s in samples]), strict=True):
            assert seen == sample.scene and sample.prompt.split("\n")[line] == world.caption(seen, looks)
    for sample, seen in zip(samples, judge.read([s.images[0] for s in samples]), strict=True):
        assert seen.subjects[0].subject == sample.scene.subjects[0].subject  # the reference shows the same

def test_prompts_and_targets_of_every_task(world, text_tokenizer):
    for task in FIVE:
        heads = set()
        for s in samples_of(world, task, 40):
            assert s.task == task and s.prompt.count("<image>") == len(s.images) and len(s.scene.subjects) < 3
            assert s.target.shape == (32, 32, 3) and s.target.dtype == np.uint8
            assert text_tokenizer.unknown_words(s.prompt) == []
            placed, name = s.scene.subjects[0], world.label(s.scene.subjects[0].subject)
            heads.add(s.prompt.replace(name, "it").partition("\n")[0] if s.images else "")
            if task == "segmentation":
                mask = world.subject_mask(placed)[..., 0]
                assert not s.target[mask == 0].any()
                assert (s.target[mask == 1] == s.images[0][mask == 1]).all()
            else:
                assert (s.target == world.draw(s.scene)).all()
            if task == "reconstruction":
                assert (s.images[0] == s.target).all()
            if task in ("recovery", "subject_driven"):  # the words tell nothing that the reference shows
                words = s.prompt.split()
                assert sum(word in COLORS for word in words) == 1 and (s.images[0] != s.target).any()
                assert words[words.index("background") - 1] in (*COLORS, *PATTERNS)
                assert not {"stripes", "dots", "half", "solid", "with"} & set(words)
            if task == "recovery":  # the subject's colour is in its input
                color = list(COLORS.values())[placed.subject.color]
                assert (np.abs(s.images[0].astype(int) - color).sum(-1) < 40).any()
        head = {"text_to_image": "", "reconstruction": "The image is <image>"}
        assert heads == {head.get(task, "The it in <image>.")}

def test_paste_distorted():
    """A flat bar: always moved and scaled by 0.6 to 1.1, half the time turned, stretched and sheared."""
    mask, grey, seen = np.zeros((64, 64, 1), np.float32), np.full((64, 64, 3), 90, np.uint8), []
    mask[28:36, 16:48] = 1
    for i in range(200):
        cut_out = (mask * 255).astype(np.uint8).repeat(3, 2)
        pasted = data.paste_distorted(cut_out, mask, grey, random.Random(i))
        y, x = np.nonzero(pasted[..., 0] > 172)
        slope = np.degrees(np.arctan(np.cov(x, y)[0, 1] / np.cov(x, y)[0, 0]))
        seen.append((len(x), abs(slope), x.mean(), y.mean(), pasted.min(), pasted.max()))
    area, slope, x, y, low, high = np.array(seen).T
    assert 0.3 * 256 < area.min() < 0.45 * 256 and 1.1 * 256 < area.max() < 1.5 * 256
    assert 0.35 < (slope < 1).mean() < 0.65 and 15 < slope.max() < 40
    assert x.std() > 5 and y.std() > 5 and set(low) == {90} and set(high) == {255}

# --- Datasets
def test_samples_depend_on_seed_and_index_alone(world):
    mix = {"text_to_image": 3.0, "segmentation": 1.0}
    first, again, other = (Samples(world, mix, seed, 0.1) for seed in (5, 5, 6))
    for i in (1000, 3, 10**12):
        a, b = first[i], again[i]
        assert (a.prompt, a.drop, a.mask_seed) == (b.prompt, b.drop, b.mask_seed)
        assert (a.target == b.target).all()
    assert any(first[i].prompt != other[i].prompt for i in range(5))
    samples = [first[i] for i in range(1000)]
    assert abs(np.mean([s.task == "segmentation" for s in samples]) - 0.25) < 0.05
    assert abs(np.mean([s.drop for s in samples]) - 0.1) < 0.03
    assert len({s.mask_seed for s in samples}) == 1000
    assert not any(Samples(world, mix, 0)[i].drop for i in range(50))

# --- Words and batches
def test_words_are_apart_where_nothing_is_between_them():
    """Punctuation always; characters of scripts without spaces."""
    ours = TextTokenizer.train(["(two cats, one T-shirt)", "1girl,solo,red_hair", "雪の中の犬", "犬 dog", "สวน"])
    for text in ("cats,one", "solo, 1girl", "shirt-T", "red_hair", "犬の雪", "中dog犬", "นวส"):
        assert ours.unknown_words(text) == [] and ours.UNKNOWN not in ours.encode(text), text
    assert ours.unknown_words("猫の犬, a hair") == ["猫", "a", "hair"]
    assert ours.encode("cats,one") == ours.encode("cats , one") and len(ours.encode("雪の中")) == 4

def test_prompts_that_do_not_fit_are_refused(text_tokenizer):
    collate = Collate(text_tokenizer, small_config(text_tokenizer, context=20), 32)
    for prompt, images, message in (("The star", 1, "0 <image>, but 1"), ("<image> <image>", 1, "2 <image>"),
                                    ("a star " * 10, 0, "21 tokens.*context=20"),
                                    ("<image>" * 5, 5, "21 tokens, 4 of them for each image")):
        with pytest.raises(ValueError, match=message) as error:
            collate.encode(prompt, images)
        assert repr(prompt) in str(error.value)
    assert len(collate.encode("a star " * 9 + "a", 0)) == 20 and collate.encode("", 0) == [TextTokenizer.EOS]

def test_a_batch_of_samples(world, text_tokenizer, monkeypatch):
    dataset = Samples(world, {"subject_driven": 1.0, "text_to_image": 1.0}, 0, prefix_drop=0.5)
    samples = [dataset[i] for i in range(16)] + [Sample("two", "a <image> <image>", [NOISE] * 2, NOISE)]
    collate = Collate(text_tokenizer, small_config(text_tokenizer), 16)
    batch, images = collate(samples), [vision_pixels(image, 32) for s in samples for image in s.images]
    assert torch.equal(batch.pixels, torch.stack(images)) and batch.targets.shape == (17, 3, 16, 16)
    assert (batch.text_ids.flatten()[batch.image_slots] == text_tokenizer.image_id).all()
    assert len(batch.image_slots) == 4 * len(images) == (batch.text_ids == text_tokenizer.image_id).sum()
    assert (batch.image_slots.diff() > 0).all()
    for i, sample in enumerate(samples):
        ids = text_tokenizer.encode(sample.prompt, 4)
        assert batch.text_ids[i].tolist() == ids + [0] * (batch.text_ids.shape[1] - len(ids))
        target = data.tokenizer_pixels(sample.target, 16)
        assert batch.lengths[i] == len(ids) and torch.equal(batch.targets[i], target)
    assert batch.drop.tolist() == [s.drop for s in samples] and batch.tasks == [s.task for s in samples]
    shares = batch.masked.sum(1) / batch.lengths
    assert 0.2 < (shares == 1).float().mean() < 0.8 and 0.7 < shares[shares < 1].mean() < 0.9
    assert not batch.masked[batch.text_ids == 0].any()
    alone = collate(samples[3:4])  # what is hidden depends on the sample alone
    assert torch.equal(alone.masked[0], batch.masked[3, : alone.masked.shape[1]])
    none = collate([Sample("", "a star", [])])
    assert none.pixels.shape == (0, 3, 32, 32) and none.targets.shape == (0, 3, 16, 16)
    pinned = []  # the DataLoader pins what has a pin_memory method, and leaves anything else without a word
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    same = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert isinstance(same, Batch) and len(pinned) == 7 and same.tasks == batch.tasks
    assert {v.device.type for v in vars(batch.to("meta")).values() if torch.is_tensor(v)} == {"meta"}
