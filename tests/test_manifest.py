"""Manifests and folders of one's own pictures: every task's target, the order of lines, messages, and a run on them."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import sample
import train
from conftest import SMALL, few_steps
from data import Collate, Manifest, ManifestDataset, TextTokenizer, manifest_of_folder, read_entry, shuffled

GREEN, RED, BLUE, BLACK = (0, 160, 0), (200, 0, 0), (0, 0, 220), (0, 0, 0)
BOX = np.s_[4:12, 8:20]  # where the red object stands


def picture(ground=GREEN, box=BOX, color=RED, size=(32, 32)):
    """A box of one colour on a ground of another."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:], pixels[box] = ground, color
    return pixels


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return path.name


@pytest.fixture
def folder(tmp_path):
    """scene.png with a red box, mask.png of it, second.png and secondmask.png (a box elsewhere), blue.png."""
    save(tmp_path / "scene.png", picture())
    save(tmp_path / "mask.png", picture(BLACK, color=(255, 255, 255)))
    save(tmp_path / "secondmask.png", picture(BLACK, np.s_[20:30, 2:6], (200, 200, 200)))
    save(tmp_path / "blue.png", picture(BLUE, np.s_[0:0, 0:0]))
    return tmp_path


T2I = {"input_text": "a red box on green", "image_path": "scene.png", "generation_only": True, "objects": None}
RECONSTRUCTION = {"input_text": "a red box on green", "image_path": "scene.png", "source_image": "scene.png", "objects": None}
SEGMENTATION = {"input_text": "a red box on green", "image_path": "mask.png", "source_image": "scene.png", "objects": "box", "do_mask": True}
RECOVERY = {"input_text": "a box on green", "image_path": "mask.png", "source_image": "scene.png", "objects": "box", "do_replace": True}
SUBJECT = {"input_text": "a box on green", "image_path": "blue.png", "source_image": "scene.png", "objects": "box"}
MULTI = {"input_text": "a box and a bar on green", "image_path": ["mask.png", "secondmask.png"], "source_image": "scene.png", "objects": ["box", "bar"]}
TASKS = [task for task in data.TASKS if task != "in_context"]  # which manifests do not have
ALL = [T2I, RECONSTRUCTION, SEGMENTATION, RECOVERY, SUBJECT, MULTI]


def write(folder, records, name="m.jsonl"):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder / name


def manifest(folder, records, **options):
    return Manifest(write(folder, records), quiet=True, **options)


def samples(folder, record, count=20, size=32, **options):
    """Samples of a manifest with one line, and of a blue picture to go behind."""
    extra = manifest_of_blue(folder)
    dataset = ManifestDataset(manifest(folder, [record], backgrounds=extra, **options), None, 0, size)
    return [dataset[i] for i in range(count)]


def manifest_of_blue(folder):
    return Manifest(write(folder, [{"image_path": "blue.png"}], "blue.jsonl"), quiet=True)


def test_text_to_image_and_reconstruction(folder):
    for drawn in samples(folder, T2I):
        assert (drawn.task, drawn.prompt, drawn.images, drawn.names) == ("text_to_image", "a red box on green", [], [])
        assert (drawn.target == picture()).all()
    rebuilt = samples(folder, RECONSTRUCTION)
    assert all((s.target == picture()).all() and (s.images[0] == picture()).all() and s.names == ["whole image"] for s in rebuilt)
    assert {s.prompt for s in rebuilt} == {"The image is <image>", "The image is <image>\na red box on green"}


def test_segmentation_keeps_the_object_and_blackens_the_rest(folder):
    cut, = samples(folder, SEGMENTATION, 1)
    assert (cut.prompt, cut.names) == ("The box in <image>.", ["box"])
    assert (cut.images[0] == picture()).all() and (cut.target == picture(BLACK)).all()


def test_recovery_pastes_only_the_object_on_another_picture(folder):
    areas = set()
    for drawn in samples(folder, RECOVERY):
        assert (drawn.prompt, drawn.names) == ("The box in <image>.\na box on green", ["box"])
        assert (drawn.target == picture()).all()
        red, green, blue = drawn.images[0].reshape(-1, 3).T.astype(int)
        assert (green == 0).all() and (red > 150).sum() > 20 and (blue > 200).sum() > 500  # the object and the other ground, nothing else
        areas.add(int((red > 100).sum()))
    assert len(areas) > 5  # its size changes


def test_recovery_takes_backgrounds_from_its_own_manifest_but_never_its_own_picture(folder):
    dataset = ManifestDataset(manifest(folder, [RECOVERY, {**T2I, "image_path": "blue.png"}]), {"recovery": 1.0}, 0, 32)
    assert all((dataset[i].images[0][..., 1] == 0).all() for i in range(20))
    alone = ManifestDataset(manifest(folder, [RECOVERY]), None, 0, 32)
    with pytest.raises(ValueError, match="m.jsonl line 1: .*no other picture than scene.png.*--backgrounds"):
        alone[0]


def test_subject_driven_and_multi_image(folder):
    drawn, = samples(folder, SUBJECT, 1)
    assert drawn.prompt == "The box in <image>.\na box on green" and (drawn.images[0] == BLUE).all() and (drawn.target == picture()).all()
    save(folder / "blue.png", picture(BLUE, np.s_[0:0, 0:0], size=(40, 60)))
    assert samples(folder, SUBJECT, 1)[0].images[0].shape == (40, 60, 3)  # references keep their size
    save(folder / "blue.png", picture(BLUE, np.s_[0:0, 0:0]))
    seen = set()
    for drawn in samples(folder, MULTI):
        assert drawn.prompt == "The box in <image>.\nThe bar in <image>.\na box and a bar on green" and drawn.names == ["box", "bar"]
        box, bar = drawn.images
        assert box.shape == (12, 12, 3) and (box[2:10] == RED).all() and not box[:2].any() and not box[10:].any()
        assert bar.shape == (10, 10, 3) and (bar[:, 3:7] == GREEN).all() and not bar[:, :3].any()
        seen.add(drawn.target.tobytes())
    assert seen == {picture().tobytes()}
    given, = samples(folder, {**MULTI, "image_path": None, "input_img_list": ["blue.png", "mask.png"]}, 1)
    assert (given.images[0] == BLUE).all() and given.images[1].shape == (32, 32, 3)


def test_multi_image_shows_boxes_or_cut_outs(folder):
    mask = picture(BLACK, color=(255, 255, 255))
    mask[4:8, 8:14] = 0  # a corner of the object is missing
    save(folder / "mask.png", mask)
    corners = {tuple(s.images[0][2, 0].tolist()) for s in samples(folder, MULTI)}
    assert corners == {RED, BLACK}


def test_a_whole_prompt_is_taken_as_it_is_and_runs_of_placeholders_are_one(folder):
    for run in ("<image>", "<image>" * 256):
        drawn, = samples(folder, {**SUBJECT, "input_text": f"Draw the box of {run} on green"}, 1)
        assert drawn.prompt == "Draw the box of <image> on green"
    assert read_entry(json.dumps({**MULTI, "input_text": "<image><image> side by side"}).encode()).text == "<image><image> side by side"


def test_the_square_moves_to_show_the_object(folder):
    """In a wide picture the object at the right edge is out of the centred square."""
    wide, box = (32, 96), np.s_[8:24, 80:96]
    save(folder / "scene.png", picture(box=box, size=wide))
    save(folder / "mask.png", picture(BLACK, box, (255, 255, 255), wide))
    cut, = samples(folder, SEGMENTATION, 1)
    assert (cut.target == picture(BLACK, np.s_[8:24, 16:32])).all() and (cut.images[0] == picture(box=np.s_[8:24, 16:32])).all()
    large, = samples(folder, SEGMENTATION, 1, size=64)
    assert large.target.shape == (64, 64, 3)


@pytest.mark.parametrize("record", ALL, ids=TASKS)
def test_targets_alone_equal_the_samples_targets(folder, record):
    whole, = samples(folder, record, 1)
    alone = ManifestDataset(manifest(folder, [record]), None, 0, 32, targets_only=True)[0]
    assert (alone.target == whole.target).all() and alone.prompt == "" and alone.images == []


def test_samples_of_all_tasks_make_a_batch(folder):
    dataset = ManifestDataset(manifest(folder, ALL + [{"image_path": "blue.png"}]), None, 0, 32, prefix_drop=0.3)
    tokenizer = dataset.manifest.text_tokenizer()
    batch = Collate(tokenizer, 32, 16, 96, 32)([dataset[i] for i in range(14)])
    assert set(batch.tasks) == set(TASKS) and batch.targets.shape == (14, 3, 32, 32) and not (batch.text_ids == tokenizer.UNKNOWN).any()
    assert 0 < batch.drop.sum() < 14


def test_samples_are_a_function_of_seed_and_index(folder):
    lines = manifest(folder, ALL + [{"image_path": "blue.png"}])
    first, again, other = (ManifestDataset(lines, None, seed, 32) for seed in (1, 1, 2))
    assert all((first[i].target == again[i].target).all() and first[i].prompt == again[i].prompt for i in reversed(range(20)))
    assert [first.line(i) for i in range(7)] != [other.line(i) for i in range(7)] and len({first[i].mask_seed for i in range(5)}) == 5


def test_every_epoch_shows_every_line_once_in_another_order(folder):
    dataset = ManifestDataset(manifest(folder, ALL * 10), None, 0, 32)
    drawn = [dataset.line(i) for i in range(dataset.BLOCK * 3)]  # 30,000 indices are 500 epochs of 60 lines
    assert (np.bincount(drawn) == 500).all()
    epochs = {tuple(drawn[i : i + 60]) for i in range(0, 30_000, 60)}
    assert len(epochs) == 500 and all(len(set(epoch)) == 60 for epoch in epochs)
    mixed = ManifestDataset(manifest(folder, ALL * 10), {"text_to_image": 1.0, "segmentation": 3.0}, 0, 32)
    for lines in mixed.groups:
        own = [line for line in (mixed.line(i) for i in range(10_500)) if line in lines]
        assert all(len(set(own[i : i + len(lines)])) == len(lines) for i in range(0, len(own) - len(lines), len(lines)))


def test_a_few_pictures_are_held_out_with_all_their_lines(folder):
    for i in range(150):
        save(folder / f"{i}.png", picture(size=(8, 8)))
    records = [{**record, "image_path": f"{i}.png"} for i in range(150) for record in (T2I, {"input_text": ""})] + [SEGMENTATION]
    assert not manifest(folder, records[:80]).held.any()  # too few pictures
    lines = manifest(folder, records)
    held = {lines[i].picture for i in np.flatnonzero(lines.held)}
    assert len(held) == 3 and lines.held.sum() == 6 and {task: len(rows) for task, rows in lines.lines(True).items()} == {"text_to_image": 3, "reconstruction": 3}
    assert (manifest(folder, records).held == lines.held).all()
    for mix in (None, {"text_to_image": 1.0, "segmentation": 1.0}):
        taken, kept_back = (ManifestDataset(lines, mix, 0, 32, held_out=held_out) for held_out in (False, True))
        assert {lines[taken.line(i)].picture for i in range(2000)}.isdisjoint(held) and {lines[kept_back.line(i)].picture for i in range(200)} == held
        assert kept_back.count == (3 if mix else 6) and taken.count == (148 if mix else 295)
    only_segmentation = ManifestDataset(lines, {"segmentation": 1.0}, 0, 32, held_out=True)
    assert only_segmentation.count == 0 and train.held_out_loss(None, only_segmentation, None, 1, CPU) is None
    recovery = manifest(folder, records + [RECOVERY])
    rng = data.random.Random(0)
    seen = {data.some_background(recovery, recovery[301], rng) for _ in range(400)}
    assert len(seen) > 100 and seen.isdisjoint(held)


@pytest.mark.parametrize("count, held", [(49, 0), (50, 1), (6400, 128), (20_000, 128)])
def test_one_picture_in_50_is_held_out_but_at_most_128(count, held):
    pictures = np.random.default_rng(0).permutation(count)
    assert Manifest.choose_held_out(None, np.arange(count) % 2, pictures).sum() == held


def test_a_task_keeps_its_lines_rather_than_losing_all():
    held = Manifest.choose_held_out(None, np.array([0] * 100 + [1]), np.array([*range(1, 101), 0]))
    assert np.flatnonzero(held).tolist() == [0]  # the last line's picture would be held out too


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 1000])
def test_shuffled_is_a_permutation(count):
    assert sorted(shuffled(count, "key")) == list(range(count)) and (count < 17 or (shuffled(count, "key") != shuffled(count, "another key")).any())


def test_a_mix_gives_tasks_their_shares_and_lines_their_turns(folder):
    lines = manifest(folder, [T2I] * 30 + [SEGMENTATION] * 7)
    dataset = ManifestDataset(lines, {"text_to_image": 3.0, "segmentation": 1.0, "recovery": 0.0}, 0, 32)
    drawn = np.bincount([dataset.line(i) for i in range(dataset.BLOCK)], minlength=37)
    assert drawn[:30].sum() == 7500 and drawn[30:].sum() == 2500
    assert drawn[:30].min() == drawn[:30].max() == 250 and drawn[30:].max() - drawn[30:].min() <= 1
    early = [dataset.line(i) >= 30 for i in range(400)]
    assert 60 < sum(early) < 140  # the shares hold within a block too
    assert early != [dataset.line(dataset.BLOCK + i) >= 30 for i in range(400)]  # and no two blocks are alike


@pytest.mark.parametrize("record, message", [
    ("{oops", "line 3: not JSON .*one object in braces"),
    ([1], "line 3: .*one JSON object"),
    ({**T2I, "image_path": "scene.pgn"}, "line 3: image_path='scene.pgn': there is no such file in .*folder that names are relative to"),
    ({**SEGMENTATION, "source_image": "other.png"}, "line 3: source_image='other.png': there is no such file"),
    ({**SEGMENTATION, "source_image": None}, "source_image=None: segmentation needs 1 here, not 0"),
    ({**T2I, "image_path": 7}, "image_path=7: must be a text, a list of texts or null"),
    ({**T2I, "image_path": ["scene.png", "blue.png"]}, "image_path=.*text_to_image needs 1 here, not 2"),
    ({**T2I, "input_text": ["a"]}, "input_text=.*must be a text"),
    ({**T2I, "input_text": " "}, "input_text=' ': text_to_image needs a caption"),
    ({**T2I, "input_text": "a box in <image>"}, "1 <image> placeholders, but text_to_image has 0 images"),
    ({**SUBJECT, "input_text": "<image> and <image>"}, "2 <image> placeholders, but subject_driven has 1 images"),
    ({**T2I, "generation_only": "yes"}, "generation_only='yes': must be true or false"),
    ({**RECOVERY, "do_mask": True}, "only one of generation_only, do_mask, do_replace true"),
    ({**RECONSTRUCTION, "source_image": "blue.png"}, "source_image='blue.png': reconstruction draws image_path='scene.png' from itself; name the subject in objects"),
    ({**MULTI, "objects": ["box"]}, "image_path=.*multi_image needs 1 here, not 2"),
    ({**MULTI, "objects": []}, "objects=.*at least one label"),
    ({**SEGMENTATION, "objects": ["box", "bar"]}, "objects=.*segmentation needs one label"),
    ({**SEGMENTATION, "objects": "box <image>"}, "objects='box <image>': a label stands in the prompt"),
])
def test_a_wrong_line_is_named_and_may_be_left_out(folder, record, message):
    path = folder / "m.jsonl"
    path.write_text(json.dumps(T2I) + "\n\n" + (record if isinstance(record, str) else json.dumps(record)) + "\n" + json.dumps(SEGMENTATION))
    with pytest.raises(ValueError, match=message):
        Manifest(path, quiet=True)
    kept = Manifest(path, quiet=True, skip_bad=True)
    assert len(kept) == 2 and len(kept.bad) == 1 and "m.jsonl line 3: " in kept.bad[0]
    assert [kept[i].task for i in range(2)] == ["text_to_image", "segmentation"] and kept.numbers[1] == 4


def test_manifests_that_hold_nothing_are_refused(folder):
    with pytest.raises(ValueError, match="nothing.jsonl: there is no such manifest"):
        Manifest(folder / "nothing.jsonl")
    with pytest.raises(ValueError, match="has no line"):
        manifest(folder, [])
    with pytest.raises(ValueError, match="has no line that is right; the first: .*line 1: image_path"):
        manifest(folder, [{}], skip_bad=True)


def test_names_start_from_the_root(folder, tmp_path_factory):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), [T2I])
    with pytest.raises(ValueError, match="no such file"):
        Manifest(elsewhere, quiet=True)
    assert (ManifestDataset(Manifest(elsewhere, root=folder, quiet=True), None, 0, 32)[0].target == picture()).all()


def test_transparency_in_a_mask_is_not_the_object(folder):
    dataset = ManifestDataset(manifest(folder, [SEGMENTATION]), None, 0, 32)
    white = dataset[0].target
    mask = np.asarray(Image.open(folder / "mask.png").convert("L"))
    save(folder / "mask.png", np.dstack([np.full_like(mask, 255)] * 3 + [mask]))  # white all over, transparent around the object
    assert (dataset[0].target == white).all() and (white != picture()).any()


def test_masks_that_do_not_fit_are_named_with_their_line(folder):
    dataset = ManifestDataset(manifest(folder, [SEGMENTATION]), None, 0, 32)
    save(folder / "mask.png", picture(BLACK, color=(255, 255, 255), size=(32, 40)))
    with pytest.raises(ValueError, match="m.jsonl line 1: .*mask.png: the mask is 40 x 32 pixels, but its picture scene.png is 32 x 32"):
        dataset[0]
    save(folder / "mask.png", picture(BLACK, color=(127, 127, 127)))
    with pytest.raises(ValueError, match="line 1: .*mask.png: the mask is all black"):
        dataset[0]
    save(folder / "scene.png", picture(size=(640, 640)))
    save(folder / "mask.png", picture(BLACK, np.s_[5:8, 5:8], (255, 255, 255), (640, 640)))
    with pytest.raises(ValueError, match="line 1: the object, 9 of 409600 pixels, is too small"):
        dataset[0]


def test_a_long_manifest_opens_fast(folder):
    path = folder / "long.jsonl"
    path.write_text((json.dumps(SEGMENTATION) + "\n") * 100_000)
    started = time.process_time()
    lines = Manifest(path, quiet=True)
    assert time.process_time() - started < 4 and len(lines) == 100_000
    started = time.process_time()
    dataset = ManifestDataset(lines, None, 0, 32)
    assert {dataset.manifest[dataset.line(i)].task for i in range(1000)} == {"segmentation"}
    assert time.process_time() - started < 1
    assert lines.offsets.nbytes + lines.numbers.nbytes + sum(t.nbytes for t in lines.lines().values()) <= 24 * len(lines)


def test_chunks_and_processes_change_nothing(folder, monkeypatch):
    path = write(folder, (ALL + [{"image_path": "blue.png"}]) * 20)
    path.write_text(path.read_text().replace("\n", "\n\n \n", 5))
    monkeypatch.setattr(Manifest, "CHUNK", 777)
    whole, shared = Manifest(path, quiet=True), Manifest(path, workers=2, quiet=True)
    monkeypatch.setattr(Manifest, "CHUNK", 2**22)
    once = Manifest(path, quiet=True)
    for other in (whole, shared):
        assert (other.offsets == once.offsets).all() and (other.numbers == once.numbers).all() and (other.n_image == once.n_image).all() and (other.most_tokens == once.most_tokens).all()
        assert all((other.lines()[task] == once.lines()[task]).all() for task in TASKS) and other[77] == once[77]
    assert whole.digest == shared.digest and once.numbers[-1] == 150
    path.write_text(path.read_text().replace("blue.png", "lost.png") + "oops")
    monkeypatch.setattr(Manifest, "CHUNK", 777)
    with pytest.raises(ValueError, match="m.jsonl line 13: image_path='lost.png'"):
        Manifest(path, workers=2, quiet=True)
    assert [int(message.split("line ")[1].split(":")[0]) for message in Manifest(path, workers=2, skip_bad=True, quiet=True).bad][-2:] == [150, 151]


def test_no_prompt_has_more_tokens_than_its_bound(text_tokenizer):
    golden = Path(__file__).parent / "golden" / "tokenizer" / "spiece.model"
    rng, letters = random.Random(0), "abc de.,<>()\n 019" * 4 + "é½ﬃ㍿…①ーアﷺ\u3000"
    for tokenizer in (text_tokenizer, TextTokenizer.from_file(golden)):
        for _ in range(300):
            text = "".join(rng.choices([*letters, "<image>", "</s>"], k=rng.randrange(40)))
            assert len(tokenizer.encode(text)) - text.count("<image>") <= data.most_tokens(text), text


def test_prompts_too_long_are_found_at_the_start(folder):
    words = "red box on green".split()
    fits, long = (" ".join(words * 9)[:count] for count in (60, 90))
    records = [{**T2I, "input_text": fits}, {**SUBJECT, "input_text": fits}, {**SUBJECT, "input_text": long}, {**RECONSTRUCTION, "input_text": long}, {**SEGMENTATION, "input_text": long}]
    tokenizer = manifest(folder, records).text_tokenizer()
    most = len(tokenizer.encode(f"The box in <image>.\n{fits}", 16))
    with pytest.raises(ValueError, match=f"m.jsonl line 3: the prompt takes .* tokens, 16 of them for 1 images, but the model reads at most {most}"):
        manifest(folder, records).check_prompts(Collate(tokenizer, 32, 16, most, 32))
    kept = manifest(folder, records, skip_bad=True)
    kept.check_prompts(Collate(tokenizer, 32, 16, most, 32))
    assert [message.split(": ")[0][-6:] for message in kept.bad] == ["line 3", "line 4"]  # segmentation does not say the caption
    assert {task: lines.tolist() for task, lines in kept.lines().items()} == {"text_to_image": [0], "subject_driven": [1], "segmentation": [4]}
    with pytest.raises(ValueError, match="400 of them for 2 images"):  # little text, large images
        manifest(folder, [MULTI]).check_prompts(Collate(tokenizer, 32, 200, 300, 32))
    with pytest.raises(ValueError, match="line 2: the prompt takes"):
        manifest(folder, records).check_prompts(Collate(tokenizer, 32, 16, most - 1, 32))


def test_a_dry_run_opens_every_file(pictures, tmp_path):
    (pictures / "cat.png").write_text("no picture")
    save(pictures / "dog.mask.png", picture(BLACK, color=BLACK))
    with pytest.raises(ValueError, match=r"(?s)could not start: .*line 1: .*cat.png: not a readable image.*line 2: .*cat.png.*line 5: .*mask is all black.*line 6"):
        train.main(["tiny", *SHORT, "--stage=tokenizer", "--dry_run=true", f"--data={pictures}", f"--out={tmp_path}/out"])
    (pictures / "cat.png").write_bytes(b"")
    with pytest.raises(ValueError, match="line 1: image_path='cat.png': it is empty"):
        train.main(["tiny", *SHORT, "--stage=tokenizer", f"--data={pictures}", f"--out={tmp_path}/out"])


def test_a_run_says_at_the_start_that_a_prompt_is_too_long(folder, capsys):
    path = write(folder, [T2I, {**T2I, "input_text": "a red box on green " * 30}])
    arguments = ["tiny", *SHORT, "--stage=pretrain", f"--data={path}", f"--out={folder}/out"]
    with pytest.raises(ValueError, match="m.jsonl line 2: the prompt takes 151 tokens, but the model reads at most 96"):
        train.main(arguments)
    with pytest.raises(ValueError, match="tokenizer"):  # goes on, to find that the stage before is missing
        train.main([*arguments, "--skip_bad=true"])
    assert "left out 1 of 2 lines of" in capsys.readouterr().out


@pytest.fixture
def pictures(tmp_path):
    """A folder: dog with caption, label and mask; cat with a caption; sub/tree alone."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    save(root / "dog.png", picture())
    save(root / "dog.mask.png", picture(BLACK, color=(255, 255, 255)))
    (root / "dog.txt").write_text("a dog on grass\ndog\n")
    save(root / "cat.png", picture(BLUE))
    (root / "cat.txt").write_text("a cat")
    save(root / "sub" / "tree.png", picture(RED))
    return root


def test_a_folder_becomes_a_manifest(pictures, tmp_path):
    (tmp_path / "m.jsonl").write_bytes(manifest_of_folder(pictures))
    lines = Manifest(tmp_path / "m.jsonl", root=pictures, quiet=True)
    found = {(e.task, e.picture, e.text, e.labels) for e in (lines[i] for i in range(len(lines)))}
    assert found == {("text_to_image", "cat.png", "a cat", ()), ("reconstruction", "cat.png", "a cat", ()),
                     ("text_to_image", "dog.png", "a dog on grass", ()), ("reconstruction", "dog.png", "a dog on grass", ()),
                     ("segmentation", "dog.png", "a dog on grass", ("dog",)), ("recovery", "dog.png", "a dog on grass", ("dog",)),
                     ("reconstruction", "sub/tree.png", "", ())}
    cut = ManifestDataset(lines, {"segmentation": 1.0}, 0, 32)[0]
    assert (cut.target == picture(BLACK)).all() and cut.prompt == "The dog in <image>."


def test_a_mask_without_caption_still_gives_segmentation(pictures, tmp_path):
    (pictures / "dog.txt").write_text("\ndog\n")
    (tmp_path / "m.jsonl").write_bytes(manifest_of_folder(pictures))
    lines = Manifest(tmp_path / "m.jsonl", root=pictures, quiet=True)
    assert set(lines.lines()) == {"text_to_image", "reconstruction", "segmentation"}


def test_folders_that_are_wrong_are_named(pictures):
    (pictures / "dog.txt").write_text("a dog on grass\n")
    with pytest.raises(ValueError, match="dog.mask.png: the mask's object has no name; write it on the second line of .*dog.txt"):
        manifest_of_folder(pictures)
    (pictures / "dog.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="dog.txt: not UTF-8"):
        manifest_of_folder(pictures)
    save(pictures / "cat.jpg", picture())
    with pytest.raises(ValueError, match="cat.png and .*cat.jpg would share one caption"):
        manifest_of_folder(pictures)
    (pictures / "cat.jpg").rename(pictures / "cat.mask.jpg")
    with pytest.raises(ValueError, match="cat.mask.jpg: a mask must be a .png file"):
        manifest_of_folder(pictures)
    (pictures / "cat.mask.jpg").unlink()
    (pictures / "dog.png").unlink()
    with pytest.raises(ValueError, match="dog.mask.png: there is no picture of that name"):
        manifest_of_folder(pictures)
    save(pictures / "sub" / "caf\udce9.png", picture())
    with pytest.raises(ValueError, match="caf.*.png: its name is not UTF-8, in which a manifest is written; rename it"):
        manifest_of_folder(pictures)
    with pytest.raises(ValueError, match="sub2: no picture in it"):
        (pictures / "sub2").mkdir()
        manifest_of_folder(pictures / "sub2")


def coco_files(tmp_path):
    """Two pictures: in the first a cat (two triangles' square), two dogs and a crowd; in the second a dot."""
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        save(tmp_path / "images" / name, picture(size=(40, 60)))
    square = [[10, 5, 29, 5, 29, 24], [10, 5, 10, 24, 29, 24]]
    objects = [{"id": 7, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": square},
               {"id": 8, "image_id": 1, "category_id": 2, "iscrowd": 0, "segmentation": square},
               {"id": 9, "image_id": 1, "category_id": 2, "iscrowd": 0, "segmentation": square},
               {"id": 10, "image_id": 1, "category_id": 3, "iscrowd": 1, "segmentation": {"counts": [5], "size": [40, 60]}},
               {"id": 11, "image_id": 2, "category_id": 1, "iscrowd": 0, "segmentation": [[1, 1, 3, 1, 3, 3]]}]
    (tmp_path / "instances.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in (1, 2)],
        "annotations": objects, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "person"}]}))
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 1, "caption": t} for t in ("A cat. \n", "Two dogs and a cat")]}))
    return [tmp_path / name for name in ("instances.json", "captions.json", "images", "coco")]


def test_coco_becomes_a_manifest(tmp_path):
    files = coco_files(tmp_path)
    assert data.manifest_of_coco(*files) == 6
    lines = Manifest(tmp_path / "coco" / "manifest.jsonl", quiet=True)
    found = [(e.task, Path(e.picture).name, e.text, e.labels) for e in (lines[i] for i in range(len(lines)))]
    assert found == [("text_to_image", "1.jpg", "A cat.", ()), ("text_to_image", "1.jpg", "Two dogs and a cat", ()), ("reconstruction", "1.jpg", "A cat.", ()),
                     ("segmentation", "1.jpg", "A cat.", ("cat",)), ("recovery", "1.jpg", "A cat.", ("cat",)), ("reconstruction", "2.jpg", "", ())]
    mask = np.asarray(Image.open(tmp_path / "coco" / "masks" / "7.png"))
    assert mask.shape == (40, 60) and (mask[5:25, 10:30] == 255).all() and mask.sum() == 20 * 20 * 255
    assert [f.name for f in (tmp_path / "coco" / "masks").iterdir()] == ["7.png"]  # no crowd, no namesakes, nothing tiny


def test_coco_files_that_are_wrong_are_named(tmp_path):
    files = coco_files(tmp_path)
    with pytest.raises(ValueError, match="captions.json: no 'images' in it; give COCO's instances"):
        data.manifest_of_coco(files[1], *files[1:])
    with pytest.raises(ValueError, match="nothing.json: there is no such file"):
        data.manifest_of_coco(tmp_path / "nothing.json", *files[1:])
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="deep.json: not JSON"):
        data.manifest_of_coco(tmp_path / "deep.json", *files[1:])
    (tmp_path / "images" / "2.jpg").unlink()
    with pytest.raises(ValueError, match="2.jpg: there is no such picture, but .*instances.json names it"):
        data.manifest_of_coco(*files)
    assert not (tmp_path / "coco").exists()  # whole or not at all
    done = subprocess.run([sys.executable, data.__file__, "coco"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: python data.py coco INSTANCES.json" in done.stderr


@pytest.mark.parametrize("file, keys, value, message", [
    (0, ("images", 1), {"id": 2}, r"instances.json: images\[1\] is {\"id\": 2}; it must have COCO's id, file_name, width, height"),
    (0, ("annotations", 0, "category_id"), "cat", r"instances.json: annotations\[0\] is .*; it must have COCO's id, image_id, category_id"),
    (0, ("annotations", 0, "category_id"), 77, r"instances.json: annotation 7 has no known category or no polygons"),
    (0, ("annotations", 0, "segmentation"), {"counts": [5], "size": [40, 60]}, r"instances.json: annotation 7 has no known category or no polygons"),
    (0, ("annotations", 0, "segmentation"), [[0, 0, 9]], r"instances.json: annotation 7 has no known category or no polygons"),
    (0, ("annotations", 4, "id"), 7, "instances.json: 2 of annotations have the id 7; give each its own"),  # one mask would replace the other
    (0, ("images", 1, "id"), 1, "instances.json: 2 of images have the id 1; give each"),
    (0, ("categories", 1, "id"), 1, "instances.json: 2 of categories have the id 1; give each"),
    (0, ("images", 1, "width"), 0, "instances.json: image 2 is 0 x 40 pixels"),
    (0, ("images", 1, "height"), 10**9, "instances.json: image 2 is 60 x 1000000000 pixels; it must have 1 to 32768 a side"),
    (0, ("categories",), {"1": "cat"}, "instances.json: no 'categories' in it"),
    (1, ("annotations", 0, "caption"), None, r"captions.json: annotations\[0\] is .*; it must have COCO's image_id, caption"),
])
def test_coco_entries_that_are_wrong_are_named(file, keys, value, message, tmp_path):
    files = coco_files(tmp_path)
    content = inner = json.loads(files[file].read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    files[file].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        data.manifest_of_coco(*files)
    assert not files[3].exists()  # nothing is written


def test_coco_may_be_written_behind_a_link(tmp_path):
    files = coco_files(tmp_path)
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    assert data.manifest_of_coco(*files[:3], tmp_path / "link" / "coco") == 6
    lines = Manifest(tmp_path / "link" / "coco" / "manifest.jsonl", quiet=True)
    assert all(lines.load(lines[i].picture).shape == (40, 60, 3) for i in range(6))


SHORT = [*SMALL, *few_steps(steps=2, global_batch=4)]
CPU = train.Machine(0, 1, train.torch.device("cpu"), train.torch.float32)
MIXES = ["--align.mix=text_to_image:1,reconstruction:1,segmentation:1", "--instruct.mix=recovery:1,segmentation:1"]


def test_a_run_on_own_pictures_trains_and_draws(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(["tiny", *SHORT, *MIXES, f"--data={pictures}", f"--out={out}"])
    said = capsys.readouterr().out
    assert "data: text_to_image 2, reconstruction 3, segmentation 1, recovery 1 lines" in said and "no scores" in said and not (out / "scores.json").exists()
    assert "none of these pictures is held out" in said and re.search(r"reconstruction L2 of 2 pictures: 0.\d+, the tokenizer alone 0.\d+; look at .*sheet.png", said)
    assert Image.open(out / "sheet.png").height > 2 * 32 * 3
    assert set(json.loads((out / "align" / "log.jsonl").read_text().splitlines()[-1])) & {"text_to_image", "reconstruction", "segmentation"}
    assert TextTokenizer.from_file(out / "spiece.model").pieces.encode("grass", out_type=str) == ["▁grass"]
    sample.main([str(out), "a dog on grass", f"--out={tmp_path}/drawn.png", "--device=cpu"])
    assert Image.open(tmp_path / "drawn.png").width > 100
    with pytest.raises(ValueError, match="trained on .*pictures, not on a built-in world"):
        sample.main([str(out), "--score", "--device=cpu"])


def test_held_out_pictures_are_shown_where_there_are_any(folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(train.sample, "show_pictures", lambda pipeline, samples, out: shown.extend(samples))
    monkeypatch.setattr(data, "HELD_OUT_EVERY", 2)
    path = write(folder, [{**T2I, "input_text": "a box"}, {**T2I, "image_path": "blue.png", "input_text": "another box"}])
    train.main(["tiny", *SHORT, f"--data={path}", f"--out={tmp_path}/out", "--align.mix=text_to_image:1", "--instruct.mix=text_to_image:1"])
    lines = Manifest(path, quiet=True)
    assert [s.line for s in shown] == lines.lines(True)["text_to_image"].tolist() and len(shown) == 1


def test_before_there_is_a_model_the_tokenizer_reconstructs_alone(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(["tiny", *SHORT, "--stage=tokenizer", f"--data={pictures}", f"--out={out}"])
    sample.main([str(out), f"--reconstruct={pictures}/dog.png", f"--out={tmp_path}/drawn.png", "--device=cpu"])
    assert re.search(r"pixel L2: tokenizer 0.\d+ \(image \| tokenizer\)", capsys.readouterr().out) and Image.open(tmp_path / "drawn.png").width == 2 * 256 + 3 * 8
    with pytest.raises(ValueError, match="holds no trained model"):
        sample.main([str(out), "a dog", f"--out={tmp_path}/drawn.png", "--device=cpu"])


def test_with_skip_bad_pictures_that_cannot_be_read_are_left_out_at_the_start(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "plan_stage", lambda *arguments: None)  # seconds, and tested elsewhere
    (pictures / "cat.png").write_text("no picture")
    arguments = ["tiny", *SHORT, *MIXES, f"--data={pictures}", f"--out={tmp_path}/out", "--instruct.mix=segmentation:1"]
    with pytest.raises(ValueError, match="line 2: .*cat.png: not a readable image|line 1: .*cat.png: not a readable image"):
        train.main(arguments)
    train.main([*arguments, "--skip_bad=true", "--dry_run=true"])
    train.main([*arguments, "--skip_bad=true"])
    said = capsys.readouterr().out
    assert said.count("cat.png: not a readable image") == 4 and "left out 2 of 7 lines of" in said and "text_to_image 1, reconstruction 2, segmentation 1, recovery 1 lines" in said
    bad = Manifest(tmp_path / "out" / "data.jsonl", root=str(pictures), skip_bad=True, quiet=True)
    bad.check_files(32, 0)
    for targets_only in (True, False):  # neither a target nor a background
        dataset = data.ManifestDataset(bad, None if targets_only else {"recovery": 1.0}, 0, 32, targets_only=targets_only)
        assert [dataset[i] for i in range(40)]
    for name in ("dog.png", "sub/tree.png"):
        (pictures / name).write_text("no picture")
    with pytest.raises(ValueError, match="data.jsonl: the files of no line can be read; the first: .*line 1: .*cat.png"):
        train.main([*arguments, "--stage=tokenizer", "--skip_bad=true", f"--out={tmp_path}/new"])


def test_a_run_wants_only_tasks_that_the_data_has(pictures, tmp_path):
    with pytest.raises(ValueError, match="--instruct.mix=text_to_image:300.*has nothing for subject_driven; it has text_to_image, reconstruction, segmentation, recovery, so give"):
        train.main(["tiny", *SHORT, f"--data={pictures}", f"--out={tmp_path}/out"])
    with pytest.raises(ValueError, match="--align.mix=text_to_image:99999,segmentation:1: segmentation has too small a share of it to be drawn even once in 10000 samples"):
        train.main(["tiny", *SHORT, *MIXES, f"--data={pictures}", f"--out={tmp_path}/out", "--align.mix=text_to_image:99999,segmentation:1"])
    assert not (tmp_path / "out").exists()  # said before anything is trained or written


def test_recovery_without_another_picture_is_refused_before_anything_is_trained(pictures, folder, tmp_path):
    for name in ("cat.png", "sub/tree.png"):
        (pictures / name).unlink()
    arguments = ["tiny", *SHORT, *MIXES, f"--data={pictures}", f"--out={tmp_path}/out"]
    for backgrounds in ([], [f"--backgrounds={pictures}"]):
        with pytest.raises(ValueError, match="data.jsonl line 4: .*.jsonl has no other picture than dog.png to put behind the 'dog'; give --backgrounds"):
            train.main([*arguments, *backgrounds])
    assert not (tmp_path / "out").exists()
    manifest(folder, [RECOVERY] * 2, backgrounds=manifest_of_blue(folder)).check_backgrounds()


def test_data_that_changed_is_refused(pictures, tmp_path):
    out = tmp_path / "out"
    arguments = ["tiny", *SHORT, "--stage=tokenizer", f"--data={pictures}", f"--out={out}"]
    train.main(arguments)
    written = (out / "data.jsonl").read_bytes()
    save(pictures / "cat.png", picture(BLUE))  # the same bytes at another time
    train.main(arguments)
    (pictures / "cat.txt").write_text("a cow")
    with pytest.raises(ValueError, match=r"tokenizer was trained with contents of data=\w+, this run has \w+ \(lines, or sizes of files, have changed: bring the old ones back, or give --stage for those that shall see the new\); choose"):
        train.main(arguments)
    (pictures / "cat.txt").write_text("a cat")
    save(pictures / "cat.png", picture(BLUE, size=(40, 40)))
    with pytest.raises(ValueError, match="contents of data="):
        train.main(arguments)
    assert (out / "data.jsonl").read_bytes() == written and "a cat" in written.decode()


def test_words_of_captions_that_come_after_the_tokenizer_are_known(pictures, tmp_path):
    captions = {file: file.read_text() for file in pictures.rglob("*.txt")}
    for file in captions:
        file.write_text("\n" + file.read_text().partition("\n")[2])  # the objects' names alone
    arguments = ["tiny", *SHORT, f"--data={pictures}", f"--out={tmp_path}/out"]
    train.main([*arguments, "--stage=tokenizer"])
    for file, words in captions.items():
        file.write_text(words)
    train.main([*arguments, "--stage=pretrain"])
    assert TextTokenizer.from_file(tmp_path / "out" / "spiece.model").unknown_word("a dog on grass") is None


@pytest.mark.parametrize("kind", ["data", "backgrounds"])
def test_a_run_does_not_write_among_its_pictures(kind, pictures, tmp_path):
    for out in (pictures, pictures / "sub" / ".." / "out"):
        with pytest.raises(ValueError, match=f"--{kind}=.*pictures: --out=.* lies in it"):
            train.main(["tiny", *SHORT, f"--data={tmp_path / 'm.jsonl' if kind == 'backgrounds' else pictures}", f"--{kind}={pictures}", f"--out={out}"])


def test_words_that_the_text_model_does_not_know_are_counted_and_too_many_refused(folder, capsys):
    run = train.replace(train.PRESETS["tiny"], data="m.jsonl", out="out")
    lines, known = manifest(folder, [{**T2I, "input_text": f"a {'b' * (i // 2 + 1)} box"} for i in range(20)]), "a box "
    for count, said in ((10, ""), (9, "data: 10.00% of the lines have words that the text model does not know and reads as <unk>; the first is 'bbbbbbbbbb'"), (5, "data: 50.00% of the lines")):
        train.check_text_tokenizer(TextTokenizer.train([known + " ".join("b" * (i + 1) for i in range(count))]), run, lines, CPU)
        assert capsys.readouterr().out.startswith(said)
    with pytest.raises(ValueError, match="out/spiece.model: this text model does not know 'bbbbb' and other words of m.jsonl, so it was made for something else; choose another --out"):
        train.check_text_tokenizer(TextTokenizer.train([known + "b bb bbb bbbb"]), run, lines, CPU)


def test_a_run_lists_the_lines_it_leaves_out(folder, capsys):
    path = write(folder, [T2I, {**T2I, "image_path": "lost.png"}, RECONSTRUCTION])
    with pytest.raises(ValueError, match="line 2: image_path='lost.png'"):
        train.main(["tiny", *SHORT, "--stage=tokenizer", f"--data={path}", f"--out={folder}/out"])
    train.main(["tiny", *SHORT, "--stage=tokenizer", f"--data={path}", f"--out={folder}/out", "--skip_bad=true"])
    said = capsys.readouterr().out
    assert "left out: " in said and "line 2: image_path='lost.png'" in said and "left out 1 of 3 lines of" in said


def test_a_data_process_fails_in_one_line(folder, monkeypatch, capsys):
    (folder / "scene.png").write_bytes((folder / "scene.png").read_bytes()[:60])
    monkeypatch.setattr("sys.argv", ["train.py", "tiny", *SHORT, "--stage=tokenizer", "--workers=1", f"--data={write(folder, [T2I])}", f"--out={folder}/out"])
    with pytest.raises(SystemExit) as stopped:
        train.cli()
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith("train.py: ") and "line 1: " in said and "scene.png: not a readable image" in said


def test_cached_codes_are_the_tokenizers_and_change_nothing(pictures, tmp_path, monkeypatch):
    counts = []
    encode = train.VQGAN.encode
    monkeypatch.setattr(train, "show_held_out", lambda *arguments: None)  # it encodes too
    monkeypatch.setattr(train.VQGAN, "encode", lambda self, images: counts.append(len(images)) or encode(self, images))
    arguments = ["tiny", *SHORT, *MIXES, f"--data={pictures}", "--align.steps=8"]
    train.main([*arguments, f"--out={tmp_path / 'plain'}"])
    plain = sum(counts)
    counts.clear()
    train.main([*arguments, f"--out={tmp_path / 'cached'}", "--cache_codes=true"])
    assert plain == 4 * (2 + 8 + 2) and sum(counts) < plain / 3  # there are seven lines; a batch may hold a new one twice
    for stage in ("pretrain", "align", "instruct"):
        assert sample.weights_hash(tmp_path / "plain" / stage) == sample.weights_hash(tmp_path / "cached" / stage)
    kept, = (tmp_path / "cached" / "codes").iterdir()
    rows = np.load(kept)
    assert rows.shape == (7, 64) and kept.name.startswith(sample.weights_hash(tmp_path / "cached" / "tokenizer"))


def test_cached_codes_know_their_tokenizer_and_their_pictures(folder):
    lines, out = manifest(folder, [T2I, RECONSTRUCTION]), folder / "out"
    run = train.replace(train.PRESETS["tiny"], out=str(out))
    for seed in (0, 1):
        train.torch.manual_seed(seed)
        vqgan = train.VQGAN(run.vqgan)
        vqgan.save_pretrained(out / "tokenizer")
        cache = train.CodeCache(run, CPU, lines)
        batch = Collate(lines.text_tokenizer(), 32, 16, 96, 32)([ManifestDataset(lines, None, 0, 32)[i] for i in range(3)])
        assert (cache.encode(vqgan, batch) == vqgan.encode(batch.targets)).all() and (cache.encode(None, batch) == vqgan.encode(batch.targets)).all()
    assert len(list((out / "codes").iterdir())) == 2
    for file in (out / "codes").iterdir():
        train.os.truncate(file, 100)
    with pytest.raises(ValueError, match="codes/.*.npy: damaged .*: delete it, and its codes are made again"):
        train.CodeCache(run, CPU, lines)
    save(folder / "scene.png", picture(BLUE, size=(40, 40)))
    assert manifest(folder, [T2I, RECONSTRUCTION]).digest != lines.digest


def test_cached_codes_have_their_place_on_the_disk_from_the_start(tmp_path):
    (tmp_path / "plain").write_bytes(bytes(2**20))
    if (tmp_path / "plain").stat().st_blocks * 512 < 2**20:
        pytest.skip("this file system stores zeros without their space")
    train.save_zeros(np.uint16, (2**19, 1), tmp_path / "codes")
    assert (tmp_path / "codes").stat().st_blocks * 512 >= 2**20 and not np.load(tmp_path / "codes").any()


def test_the_last_code_can_be_cached(folder):
    lines, run = manifest(folder, [T2I]), train.replace(train.PRESETS["tiny"], out=str(folder / "out"))
    vqgan = train.VQGAN(run.vqgan)
    vqgan.save_pretrained(folder / "out" / "tokenizer")
    vqgan.encode = lambda targets: train.torch.full((len(targets), 64), run.vqgan.codebook_size - 1)
    cache, batch = train.CodeCache(run, CPU, lines), SimpleNamespace(lines=[0], targets=train.torch.zeros(1, 3, 32, 32))
    assert all((cache.encode(vqgan, batch) == run.vqgan.codebook_size - 1).all() for _ in range(2))


def test_caching_codes_needs_data():
    with pytest.raises(ValueError, match="--cache_codes=true: .*use it with --data"):
        train.parse(["tiny", "--cache_codes=true"])


def test_several_objects_are_in_the_picture_that_is_to_be_drawn(folder):
    """In a wide picture both stand at the right edge, out of the centred square."""
    wide = (32, 96)
    save(folder / "scene.png", picture(box=np.s_[8:24, 80:96], size=wide))
    save(folder / "mask.png", picture(BLACK, np.s_[8:24, 80:96], (255, 255, 255), wide))
    save(folder / "secondmask.png", picture(BLACK, np.s_[8:24, 70:76], (255, 255, 255), wide))
    drawn, = samples(folder, MULTI, 1)
    alone = ManifestDataset(manifest(folder, [MULTI]), None, 0, 32, targets_only=True)[0]
    assert (drawn.target == picture(box=np.s_[8:24, 16:32])).all() and (alone.target == drawn.target).all()


def test_a_background_is_found_among_many_lines_of_one_picture_however_it_is_named(folder):
    lines = manifest(folder, [RECOVERY] * 300 + [{"image_path": "./scene.png"}, {"image_path": "blue.png"}])
    assert {data.some_background(lines, lines[0], random.Random(i)) for i in range(30)} == {"blue.png"}


def test_some_lines_are_not_all_of_one_task(folder):
    lines = manifest(folder, [T2I, RECONSTRUCTION, SEGMENTATION, RECOVERY] * 50)
    assert len({entry.task for entry in lines.some(50)}) == 4 and len(list(lines.some(50))) == 50 and list(lines.some(999)) == list(lines.read(range(200)))


def test_captions_with_a_byte_order_mark_and_folders_behind_links(folder, tmp_path_factory):
    (folder / "scene.txt").write_bytes("\ufeff\nbox\n".encode())
    (folder / "scene.mask.png").write_bytes((folder / "mask.png").read_bytes())
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "more.png", picture())
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    records = [json.loads(line) for line in manifest_of_folder(folder).splitlines()]
    assert not any(r.get("generation_only") or r.get("do_replace") for r in records)
    assert [r["image_path"] for r in records if r["image_path"].startswith("l")] == ["link/more.png"]


def test_a_picture_that_is_a_link_to_nothing_is_named(folder):
    (folder / "lost.jpg").symlink_to("another disk/lost.jpg")
    with pytest.raises(ValueError, match="image_path='lost.jpg': there is no such file"):
        Manifest(folder, root=folder, content=manifest_of_folder(folder), quiet=True)
