"""Worlds, tasks, words, batches, and pictures of every kind."""

import random

import numpy as np
import pytest
from PIL import Image

import data
from data import COLORS, PATTERNS, PLACES, TASKS, Collate, Emoji, Placed, Scene, ShapeSubject, TextTokenizer, WorldDataset, load_image
from sample import EmojiJudge, concept_preservation

RED_STAR_BLUE_STRIPES = ShapeSubject(list(data.SHAPES).index("star"), list(COLORS).index("red"), list(COLORS).index("blue"), PATTERNS.index("striped"))


def place(subject, name="center", size=1):
    return Placed(subject, PLACES.index(name), size)


def rng(seed=0):
    return random.Random(seed)


def test_the_world_has_the_stated_counts(world):
    assert len(data.SHAPES) == len(COLORS) == 8 and len(PATTERNS) == 4 and len(PLACES) == 9 and len(data.SIZES) == 2
    subjects = world.all_subjects()
    assert len(subjects) == len(set(subjects)) == 8 * (8 + 3 * 8 * 7)
    held = sum(map(world.held_out, subjects))
    assert abs(held / len(subjects) - 1 / 8) < 0.02
    assert [i for i, s in enumerate(subjects) if world.held_out(s)][:5] == [5, 22, 23, 24, 25]  # trained/tiny has not seen these
    for attribute in range(4):  # every single attribute value is seen in training, only combinations are new
        assert {s[attribute] for s in world.subjects[False]} == {s[attribute] for s in subjects}


def test_training_samples_never_show_a_held_out_subject(world):
    for task in TASKS:
        dataset = WorldDataset(world, {task: 1.0}, 0)
        assert not any(world.held_out(p.subject) for i in range(100) for p in dataset[i].scene.subjects)
        held = WorldDataset(world, {task: 1.0}, 0, held_out=True)
        assert all(world.held_out(p.subject) for i in range(50) for p in held[i].scene.subjects)


def test_a_scene_pixel_by_pixel(world):
    """A big red star with blue stripes in the centre of a plain green background."""
    scene = Scene(list(COLORS).index("green"), 0, (place(RED_STAR_BLUE_STRIPES),))
    picture = world.draw(scene)
    ground = (0.55 * np.array(COLORS["green"]) + 0.45 * 255 + 0.5).astype(np.uint8)
    assert (picture[0, 0] == ground).all() and (picture[31, 31] == ground).all() and (picture[3, 16] == ground).all()
    assert (picture[14, 16] == COLORS["blue"]).all()  # the band above the centre
    assert (picture[17, 16] == COLORS["red"]).all()   # the band below it
    columns = np.flatnonzero((picture != ground).any((0, 2)))
    assert columns[0] >= 5 and columns[-1] <= 26 and columns[-1] - columns[0] >= 17  # 20 pixels wide
    assert world.caption(scene) == "A big red star with blue stripes at the center on a green background"
    assert world.caption(scene, looks=False) == "A big star at the center on a green background"
    orange = RED_STAR_BLUE_STRIPES._replace(color2=list(COLORS).index("orange"), pattern=PATTERNS.index("split"))
    scene = Scene(list(COLORS).index("orange"), 1, (place(orange),))
    assert world.caption(scene) == "A big red star with an orange half at the center on an orange striped background"


def test_patterns_lie_on_subjects_and_stand_on_backgrounds(world):
    striped, dotted, split = (PATTERNS.index(pattern) for pattern in ("striped", "dotted", "split"))
    for upright, (along, across) in ((True, (0, 1)), (False, (1, 0))):
        masks = [world.pattern_mask(pattern, 16, 16, upright)[..., 0] for pattern in (striped, split)]
        assert np.ptp(masks[0], along).max() == 0 and np.ptp(masks[0], across).max() == 1  # stripes
        assert np.ptp(masks[1], across).max() == 0 and np.ptp(masks[1], along).max() == 1  # a split, across the stripes
        assert abs(world.pattern_mask(dotted, 16, 16, upright).mean() - 0.5) < 0.02         # dots cover half the area
    ground = world.background(0, striped)
    assert np.ptp(ground, 0).max() == 0 and np.ptp(ground, 1).max() > 0


@pytest.mark.parametrize("size", [16, 48, 64])
def test_subjects_that_are_apart_never_touch(size):
    world = data.Shapes(size)
    for a, b in ((a, b) for a in range(9) for b in range(9) if data.apart(a, b)):
        masks = [world.shape_mask(list(data.SHAPES).index("square"), at, 0) for at in (a, b)]
        assert not (masks[0] * masks[1]).any()


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_a_placeholder_an_image_and_only_known_words(world, text_tokenizer, task):
    for i in range(50):
        sample = TASKS[task](world, rng(i))
        assert sample.prompt.count("<image>") == len(sample.images) == len(sample.names)
        assert sample.target.shape == (32, 32, 3) and sample.target.dtype == np.uint8
        assert text_tokenizer.UNKNOWN not in text_tokenizer.encode(sample.prompt)
        assert all(text_tokenizer.UNKNOWN not in text_tokenizer.encode(name) for name in sample.names)


def test_targets_of_every_task(world):
    for i in range(30):
        sample = data.text_to_image(world, rng(i))
        assert sample.prompt == world.caption(sample.scene) and (sample.target == world.draw(sample.scene)).all()
        sample = data.reconstruction(world, rng(i))
        assert (sample.target == sample.images[0]).all()
        sample = data.segmentation(world, rng(i))
        mask = world.subject_mask(sample.scene.subjects[0])[..., 0]
        assert (sample.target[mask == 0] == 0).all()
        assert (sample.target[mask == 1] == sample.images[0][mask == 1]).all()
        sample = data.subject_driven(world, rng(i))
        assert (sample.target == world.draw(sample.scene)).all() and (sample.target != sample.images[0]).any()
        sample = data.recovery(world, rng(i))
        assert (sample.target == world.draw(sample.scene)).all()
        sample = data.multi_image(world, rng(i))
        for placed, image in zip(sample.scene.subjects, sample.images):
            assert (image == world.cut_out(place(placed.subject))).all()


def test_subject_prompts_never_tell_the_subjects_looks(world):
    """Neither colours nor pattern: the only colour word is the background's."""
    for task in ("recovery", "subject_driven", "multi_image"):
        for i in range(50):
            sample = TASKS[task](world, rng(i))
            words = sample.prompt.split()
            assert sum(word in COLORS for word in words) == 1 and words[words.index("background") - 1] in (*COLORS, *PATTERNS)
            assert not {"stripes", "dots", "half", "solid"} & set(words)


def test_two_subjects_never_share_a_name(world, monkeypatch):
    """Neither in a scene, nor the subject of recovery and those of the picture that it is pasted on."""
    scenes, scene_of = [], data.some_scene
    monkeypatch.setattr(data, "some_scene", lambda *arguments: scenes.append(scene_of(*arguments)) or scenes[-1])
    for i in range(60):
        assert len({world.label(subject) for subject in world.random_subjects(rng(i), 2)}) == 2
        assert data.recovery(world, rng(i)).names[0] not in [world.label(placed.subject) for placed in scenes[-1].subjects]
    assert len(scenes) > 60  # some were refused


def test_recovery_shows_the_subject_distorted_on_another_picture(world):
    """The subject's colours are in the input; its place and shape differ from the target's."""
    same = 0
    for i in range(40):
        sample = data.recovery(world, rng(i))
        color = np.array(list(COLORS.values())[sample.scene.subjects[0].subject.color])
        near = np.abs(sample.images[0].astype(int) - color).sum(-1) < 40
        assert near.any()
        same += (sample.images[0] == sample.target).all()
    assert same == 0


def test_paste_distorted_scales_and_moves(world):
    """At a fixed draw without distortion the subject's area scales with the square of its scale."""
    placed, black = place(RED_STAR_BLUE_STRIPES), np.zeros((32, 32, 3), np.uint8)
    mask, cut = world.subject_mask(placed), world.cut_out(placed)

    class Fixed(random.Random):
        def random(self):
            return 0.9  # no rotation, stretch, shear or perspective

        def uniform(self, low, high):
            return 0.8 if (low, high) == (0.6, 1.1) else (low + high) / 2

    out = data.paste_distorted(cut, mask, black, Fixed())
    area = (out.max(-1) > 100).sum() / (cut.max(-1) > 100).sum()
    assert 0.5 < area < 0.8
    centroid = np.argwhere(out.max(-1) > 100).mean(0)
    assert np.abs(centroid - 15.5).max() < 2


def test_paste_distorted_turns_by_degrees_and_keeps_the_area():
    """A flat bar, half the time turned and stretched, never otherwise."""
    mask = np.zeros((64, 64, 1), np.float32)
    mask[28:36, 16:48] = 1
    bar = (mask * 255).astype(np.uint8).repeat(3, 2)

    class Fixed(random.Random):
        def random(self):
            return self.chance

        def uniform(self, low, high):
            return {(0.6, 1.1): 1.0, (-20, 20): self.angle, (0.85, 1.18): self.stretch}.get((low, high), (low + high) / 2)

    def pasted(chance, angle=0.0, stretch=1.0):
        draws = Fixed()
        draws.chance, draws.angle, draws.stretch = chance, angle, stretch
        y, x = np.nonzero(data.paste_distorted(bar, mask, np.zeros_like(bar), draws)[..., 0] > 127)
        return len(x), np.degrees(np.arctan(np.cov(x, y)[0, 1] / np.cov(x, y)[0, 0])), np.ptp(x) + 1, np.ptp(y) + 1

    assert pasted(0.6, angle=15.0, stretch=1.18) == pasted(0.6) == (256, 0, 32, 8)
    area, angle, *_ = pasted(0.4, angle=15.0)
    assert abs(area - 256) < 16 and abs(abs(angle) - 15) < 2
    area, angle, width, height = pasted(0.4, stretch=1.18)
    assert abs(area - 256) < 32 and width < 30 and height > 8


def test_samples_are_a_function_of_seed_and_index(world):
    mix = dict.fromkeys(TASKS, 1.0)
    first, again, other = WorldDataset(world, mix, 5), WorldDataset(world, mix, 5), WorldDataset(world, mix, 6)
    assert first[1000].prompt == again[1000].prompt and (first[1000].target == again[1000].target).all()
    assert any(first[i].prompt != other[i].prompt for i in range(5))
    assert len({first[i].mask_seed for i in range(5)}) == 5


def test_tasks_come_in_their_shares(world):
    dataset = WorldDataset(world, {"text_to_image": 3.0, "segmentation": 1.0}, 0, prefix_drop=0.1)
    samples = [dataset[i] for i in range(1000)]
    assert abs(sum(s.task == "segmentation" for s in samples) / 1000 - 0.25) < 0.05
    assert abs(sum(s.drop for s in samples) / 1000 - 0.1) < 0.03


def test_wrong_prompts_are_refused_with_a_reason(world, text_tokenizer):
    collate = Collate(text_tokenizer, 32, 16, 40, 32)
    image = np.zeros((32, 32, 3), np.uint8)

    def encode(prompt, images):
        return collate.encode(prompt, len(images))

    with pytest.raises(ValueError, match="0 <image> placeholders, but 1 images"):
        encode("The star", [image])
    with pytest.raises(ValueError, match="2 <image> placeholders, but 1 images"):
        encode("The star in <image> and <image>", [image])
    with pytest.raises(ValueError, match="at most 40"):
        encode("The star in <image>.\nThe star in <image>.\nThe star in <image>.", [image] * 3)
    longest = encode("a star " * 19 + "a", [])
    assert len(longest) == 40  # exactly as many as fit
    assert encode("", []) == [text_tokenizer.EOS]  # an empty prompt is a prompt
    with pytest.raises(ValueError, match="'sqare'.*square"):
        text_tokenizer.check_words("A big sqare in <image>")
    with pytest.raises(ValueError, match="'SQARE'.*square"):
        text_tokenizer.check_words("A BIG SQARE")


def test_text_tokenizer_treats_image_as_one_added_token(text_tokenizer):
    ids = text_tokenizer.encode("The star in <image>.\nA star", image_tokens=3)
    assert ids.count(text_tokenizer.image_id) == 3 and ids[-1] == text_tokenizer.EOS
    assert text_tokenizer.encode("the STAR\n in<image> .  a  star", 3) == ids  # case-folded, white space swallowed
    assert TextTokenizer(text_tokenizer.proto).encode("a star") == text_tokenizer.encode("a star")


def test_collate_puts_every_image_into_its_slots(world, text_tokenizer):
    dataset = WorldDataset(world, {"multi_image": 1.0, "text_to_image": 1.0}, 0)
    batch = Collate(text_tokenizer, 32, 16, 96, 32)([dataset[i] for i in range(8)])
    assert len(batch.pixels) == 2 * batch.tasks.count("multi_image")
    assert (batch.text_ids.flatten()[batch.image_slots] == text_tokenizer.image_id).all()
    assert len(batch.image_slots) == 16 * len(batch.pixels) == int((batch.text_ids == text_tokenizer.image_id).sum())
    for ids, length in zip(batch.text_ids, batch.lengths):
        assert ids[length - 1] == text_tokenizer.EOS and not ids[length:].any()
    assert batch.targets.min() >= -1 and batch.targets.max() <= 1
    assert 0.4 < batch.masked.sum() / batch.lengths.sum() < 0.6 and not batch.masked[batch.text_ids == 0].any()


def test_pictures_of_every_kind_are_read_right(tmp_path):
    base = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(base).save(tmp_path / "plain.png")
    assert (load_image(tmp_path / "plain.png") == base).all()
    Image.fromarray(base).quantize(256).save(tmp_path / "palette.png")
    assert np.abs(load_image(tmp_path / "palette.png").astype(int) - base).mean() < 20
    alpha = np.dstack([base, np.zeros((20, 30), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 255).all()
    deep = (base[..., 0].astype(np.uint16)) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (load_image(tmp_path / "deep.png")[..., 0] == base[..., 0]).all()
    deep[:5] = 300
    Image.fromarray(deep).save(tmp_path / "hole.png", transparency=300)
    assert (load_image(tmp_path / "hole.png")[:5] == 255).all() and (load_image(tmp_path / "hole.png", under="black")[:5] == 0).all()
    assert (load_image(tmp_path / "hole.png")[5:, :, 2] == base[5:, :, 0]).all()
    for values in (np.random.default_rng(0).random((20, 30), np.float32), np.full((20, 30), 70_000, np.int32)):
        Image.fromarray(values).save(tmp_path / "wide.tif")  # was read as black, or as white
        with pytest.raises(ValueError, match="wide.tif: not a readable image .its values of 32 bits may mean any brightness"):
            load_image(tmp_path / "wide.tif")
    Image.fromarray(base).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(load_image(tmp_path / "cmyk.tif").astype(int) - base).max() < 3
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.fromarray(base).save(tmp_path / "turned.png", exif=exif)
    assert (load_image(tmp_path / "turned.png") == np.rot90(base, -1)).all()


def test_pictures_become_tensors_and_the_same_pictures_again():
    picture = np.arange(3 * 16 * 16, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)  # every value of a byte
    assert (data.to_picture(data.tokenizer_pixels(picture, 16)) == picture).all()


def test_clips_long_side_is_rounded_down():
    picture = np.random.default_rng(0).integers(0, 256, (29, 640, 3), dtype=np.uint8)
    square = np.asarray(Image.fromarray(picture).resize((617, 28), Image.BICUBIC).crop((294, 0, 322, 28)))  # 640 * 28 / 29 is 617.9
    expected = (square / 255 - data.CLIP_MEAN) / data.CLIP_STD
    assert np.abs(data.vision_pixels(picture, 28).numpy().transpose(1, 2, 0) - expected).max() < 1e-5


@pytest.mark.parametrize("long", [2000, 2001])
def test_a_line_of_pixels_is_not_enlarged_as_a_whole(long, monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest))
    line = np.random.default_rng(0).integers(0, 256, (long, 1, 3), dtype=np.uint8)
    for picture in (line, line.transpose(1, 0, 2)):
        whole = np.asarray(resize(Image.fromarray(picture), (picture.shape[1] * 16, picture.shape[0] * 16), Image.BICUBIC))
        top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 16) // 2
        square = whole[top : top + 16, left : left + 16]
        assert (data.center_crop(picture, 16) == square).all()
        assert np.abs(data.vision_pixels(picture, 16).numpy().transpose(1, 2, 0) - (square / 255 - data.CLIP_MEAN) / data.CLIP_STD).max() < 1e-5
    assert max(map(max, sizes)) <= 101 * 16  # 60,000 pixels at 512 would be 47 GB


def test_animations_and_clear_palettes(tmp_path):
    """The first frame of an animation; a palette's transparent entry on white."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (load_image(tmp_path / "moving.gif") == (255, 0, 0)).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(1, (0, 0, 4, 8))
    palette.save(tmp_path / "clear.png", transparency=0)
    picture = load_image(tmp_path / "clear.png")
    assert (picture[:, :4] == (40, 50, 60)).all() and (picture[:, 4:] == 255).all()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match="bomb.png: not a readable image .*decompression bomb"):
        load_image(tmp_path / "bomb.png")


def test_broken_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("text.png", "empty.png", "cut.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            load_image(tmp_path / name)


def test_emoji_without_a_font_says_how_to_get_one():
    with pytest.raises(ValueError, match="no colour emoji font at /nowhere.*--emoji_font"):
        Emoji(64, "/nowhere")


def emoji_or_skip(image_size):
    try:
        return Emoji(image_size)
    except ValueError as error:
        pytest.skip(str(error))


def test_the_judge_reads_true_renders_of_emoji():
    world, chance = emoji_or_skip(32), rng()
    judge = EmojiJudge(world)
    scenes = [world.random_scene(chance, world.random_subjects(chance, 1, held_out=True)) for _ in range(60)]
    assert [judge.read(world.draw(scene)) for scene in scenes] == scenes
    subject = scenes[0].subjects[0].subject
    assert judge.attributes(subject) == (subject.character,)
    assert world.sprite.cache_info().maxsize * 64 * 64 * 16 < 2**27  # bytes of a data process that draws 64 pixels a side


def test_emoji_have_other_looks_only_where_a_training_reference_shows_them():
    world, plain = emoji_or_skip(32), data.EmojiSubject("x")[1:]
    for task in data.TASKS:
        looks = {held: {p.subject[1:] for i in range(40) for p in data.TASKS[task](world, rng(i), held).scene.subjects} for held in (False, True)}
        assert looks[True] == {plain} and (looks[False] == {plain} if task == "text_to_image" else len(looks[False]) > 6)
    subject = world.all_subjects()[100]
    swapped = world.cut_out(place(subject._replace(channels=(1, 2, 0))))
    assert (swapped == world.cut_out(place(subject))[..., [1, 2, 0]]).all()
    drawn, other = world.cut_out(place(subject)), world.all_subjects()[200]
    x, y, half = *world.center(4, 1), world.widths[1] // 2
    window = np.s_[y - half : y - half + world.widths[1], x - half : x - half + world.widths[1]]
    for turn in data.TURNS[1:]:
        turned = np.asarray(Image.fromarray(drawn[window]).transpose(turn))
        assert (world.cut_out(place(subject._replace(turn=turn)))[window] == turned).all()
    both = world.cut_out(place(subject._replace(other=other.character)))
    assert (both[:, :x] == drawn[:, :x]).all() and (both[:, x:] == world.cut_out(place(other))[:, x:]).all() and (both != drawn).any()
    assert world.held_out(subject) == world.held_out(world.vary(subject, rng(), True))
    alone = [world.vary(subject, rng(i), True) for i in range(200)]
    named = [s for s in alone if world.label(s) == world.label(subject)]
    assert 0.2 < len(named) / 200 < 0.4 and {world.label(s) for s in alone if s not in named} == {"symbol"}
    halves = {s.other for s in alone if s.other}
    assert 50 < len(halves) < 90 and not any(s.other for s in named) and halves <= {s.character for s in world.subjects[False]}
    assert all(world.label(p.subject) != "symbol" for i in range(40) for p in data.multi_image(world, rng(i)).scene.subjects)
    assert world.text_tokenizer().unknown_word("symbol") is None
    scenes = [Scene(0, 0, (place(s),)) for s in (subject, subject._replace(channels=(2, 1, 0)), world.all_subjects()[101])]
    assert [concept_preservation(s, scenes[0], world.attributes) for s in scenes] == [1, 1, 0]


def test_emoji_world():
    world = emoji_or_skip(64)
    assert len(world.all_subjects()) == 1280
    sample = data.subject_driven(world, rng())
    assert sample.target.shape == (64, 64, 3) and (sample.target == world.draw(sample.scene)).all()
    mask = world.subject_mask(sample.scene.subjects[0])
    assert mask.max() == 1 and mask.min() == 0


def test_an_odd_exif_tag_does_not_hide_a_readable_picture(tmp_path):
    """Width stored as text: ImageOps.exif_transpose raises struct.error when it writes the tags again."""
    base = np.random.default_rng(0).integers(0, 256, (24, 18, 3), dtype=np.uint8)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = turn, "hello"
        Image.fromarray(base).save(tmp_path / "odd.png", exif=exif)
        plain = load_image(tmp_path / "odd.png")
        Image.fromarray(base).save(tmp_path / "odd.png", exif=exif.tobytes().replace(b"\x01\x0e", b"\x01\x00").replace(b"\x0e\x01", b"\x00\x01"))
        assert (load_image(tmp_path / "odd.png") == plain).all()


def test_recovery_names_the_emoji_that_is_meant():
    """Its reference shows others too."""
    world = emoji_or_skip(32)
    assert all(data.recovery(world, rng(i)).names != ["symbol"] for i in range(60))


def test_punctuation_is_not_part_of_a_word():
    tokenizer = TextTokenizer.train(["A dog on the beach.", "(two cats, one T-shirt)"])
    for text in ("beach", "cats (dog) T-shirt.", "a dog, two cats"):
        assert tokenizer.unknown_word(text) is None and tokenizer.UNKNOWN not in tokenizer.encode(text)
    assert tokenizer.encode("beach.") == tokenizer.encode("beach .") and tokenizer.unknown_word("T") == "T"


def test_every_word_of_many_and_of_long_sentences_is_known():
    tokenizer = TextTokenizer.train([*(f"w{i}" for i in range(9000)), " ".join(f"q{i}" for i in range(2000))])
    assert tokenizer.unknown_word(" ".join([*(f"w{i}" for i in range(9000)), *(f"q{i}" for i in range(2000))])) is None
