"""A folder of your own pictures: what is used and what is not, masks, the tasks, and a whole run on it."""

import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import data
import train
from conftest import SMALL, few_steps, same_weights
from data import Folder, load_mask
from tokenizer import TextTokenizer

GREEN, RED, WHITE, BLACK = (0, 160, 0), (200, 0, 0), (255, 255, 255), (0, 0, 0)


def draw(ground=GREEN, color=RED, box=np.s_[10:30, 4:20], size=(40, 40)):
    """A picture of a box of one colour on a ground of another."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:], pixels[box] = ground, color
    return pixels


def save(file, pixels, **keys):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **keys)
    return file


def add(folder, name, words="a box on green\nobject: box", mask=True, **look):
    """A picture, with its caption file unless words is None, and its mask."""
    file = save(folder / f"{name}.png", draw(**look))
    if words is not None:
        file.with_suffix(".txt").write_text(words)
    if mask:
        save(file.with_suffix(".mask.png"), draw(BLACK, WHITE)[..., 0])


def make_pets(folder, subjects=4, each=3):
    """A folder per subject, which allows all tasks: boxes of its colour on several grounds."""
    for s in range(subjects):
        for i in range(each):
            color, ground = (12 * s, 20, 200), (90, 40 * i, 10 * s)
            add(folder / f"pet_{s}", str(i), f"a box on ground {i}", color=color, ground=ground)
    return folder


def refused(folder, message):
    """The message of opening the folder, which must be a ValueError naming what is in it."""
    with pytest.raises(ValueError, match=message) as error:
        Folder(folder, 32)
    assert str(folder) in str(error.value)
    return str(error.value)


def names(folder):
    return [p.name for p in Folder(folder, 32).pictures]


def samples_of(folder, task, count=20, **options):
    dataset = folder.dataset({task: 1.0}, 0, **options)
    return [dataset[i] for i in range(count)]


# --- Which files are used
def test_hidden_files_and_system_folders_are_never_data(tmp_path):
    add(tmp_path, "dog")
    (tmp_path / "._dog.png").write_bytes(b"\0\5\26\7")  # what a Mac leaves on USB sticks
    for hidden in (".ipynb_checkpoints", ".Trash-1000", ".thumbnails", "@eaDir", "__MACOSX", "#recycle",
                   "$RECYCLE.BIN", "System Volume Information", "lost+found", "deep/.git", "deep/@eadir"):
        add(tmp_path / hidden, "old", "an old, wrong caption", mask=False)
    assert names(tmp_path) == ["dog"] and "old" not in Folder(tmp_path, 32).notes


def test_companions_are_found_whatever_their_case_and_unicode_form(tmp_path):
    for name, picture, words, mask in (("a", "PNG", "TXT", "Mask.PNG"), ("b", "JPG", "caption", ""),
                                       ("c", "webp", "Txt", "mask.png"), ("d", "Jpeg", "Caption", "")):
        kind = {"PNG": "PNG", "webp": "WEBP"}.get(picture, "JPEG")
        Image.fromarray(draw()).save(open(tmp_path / f"{name}.{picture}", "wb"), kind)
        (tmp_path / f"{name}.{words}").write_text(f"words of {name}\nObject: thing")
        if mask:
            Image.fromarray(draw(BLACK, WHITE)).save(open(tmp_path / f"{name}.{mask}", "wb"), "PNG")
    save(tmp_path / "café.png", draw())
    (tmp_path / unicodedata.normalize("NFD", "café.txt")).write_text("words of café")
    pictures = Folder(tmp_path, 32).pictures
    assert [p.name for p in pictures] == ["a", "b", "c", "café", "d"]
    assert all(p.captions == [f"words of {p.name}"] for p in pictures)
    assert [p.name for p in pictures if p.mask] == ["a", "c"]
    add(tmp_path, "a", mask=False)
    refused(tmp_path, r"a\.(png|PNG) and .*a\.(PNG|png)")


def test_what_nothing_uses_is_told(tmp_path):
    add(tmp_path / "some", "dog"), add(tmp_path, "cat", words=None, mask=False)
    for file in ("a.heic", "b.HEIC", "c.bmp", "lost.txt", "some/notes.md", "a.mask.txt", "LICENSE"):
        (tmp_path / file).write_text("a picture that is not there")
    notes = Folder(tmp_path, 32).notes
    for told in ("2 pictures", "1 with captions", "1 masks", "0 subjects", "2 .heic", "1 .bmp", "1 .md",
                 "LICENSE", "lost", "a.mask"):
        assert told in notes


def test_folders_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--data=nowhere: "):
        Folder("nowhere", 32)
    refused(tmp_path, "no pictures.*.jpg")
    add(tmp_path / "deep", "dog")
    scandir = os.scandir

    def forbidden(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:  # root may list all
        patch.setattr(os, "scandir", forbidden)
        refused(tmp_path, "deep: .*cannot be listed .*Permission denied")
    (tmp_path / "link").symlink_to(tmp_path / "deep")  # as other programs do
    assert len(names(tmp_path)) == 2
    (tmp_path / "link").unlink()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    try:  # a way in circles must not make forty copies of all
        assert names(tmp_path) == ["deep/dog"]
    except ValueError as error:
        assert "up" in str(error)


# --- Words
def test_all_captions_of_a_file_are_used(tmp_path):
    add(tmp_path, "dog", "\ufeffa dog on grass\n\n  a dog that runs \nOBJECT:  big dog\na third one\n")
    folder = Folder(tmp_path, 32)
    assert folder.pictures[0].captions == ["a dog on grass", "a dog that runs", "a third one"]
    assert folder.pictures[0].label == "big dog"
    captions = [s.prompt for s in samples_of(folder, "text_to_image", 60)]
    assert {captions.count(c) > 9 for c in folder.pictures[0].captions} == {True}
    assert samples_of(folder, "segmentation", 1)[0].prompt == "The big dog in <image>."
    known = folder.text_tokenizer()
    assert all(known.unknown_words(prompt) == [] for prompt in (*folder.prompts(), "The image is <image>"))


def test_without_words_the_folders_name_is_used(tmp_path):
    for name in ("red_dog2", "cat", "007"):
        add(tmp_path / name, "x", None if name != "cat" else "object: tom", mask=name == "cat")
    assert [(p.captions, p.label) for p in Folder(tmp_path, 32).pictures] == [
        (["007"], "007"), (["tom"], "tom"), (["red dog"], "red dog")]


@pytest.mark.parametrize("words, message", [
    (b"a dog\nobject: dog\nobject: cat", "dog.txt.*object: NAME"), (b"see <image>", "dog.txt.*<image>"),
    (b"a \xff dog", "dog.txt.*UTF-8"), (b"a dog", "dog.mask.png.*object: NAME"),
    (b"a dog\ndog", "dog.mask.png.*object: NAME"), (b"a dog\nobject:", "dog.mask.png.*object: NAME")])
def test_unclear_words_are_refused_by_name(words, message, tmp_path):
    """A mask needs its object's name, and the second line of captions is not it."""
    add(tmp_path, "dog")
    (tmp_path / "dog.txt").write_bytes(words)
    refused(tmp_path, message)


def test_a_mask_whose_name_could_be_either_is_refused(tmp_path):
    add(tmp_path / "rex", "1", "a dog\na brown dog")  # the folder's name, or the second line?
    refused(tmp_path, "1.mask.png.*object: NAME")
    add(tmp_path / "rex", "1", "a brown dog")
    assert Folder(tmp_path, 32).pictures[0].label == "rex"


# --- Masks
@pytest.mark.parametrize("mask", ["dog_mask.png", "dog-mask.jpg", "mask_dog.png", "dog_mask1.png", "Dog.MASK.jpg",
                                  "dog_seg.png", "dog segmentation.webp", "masks/dog.png"])
def test_what_looks_like_a_mask_is_not_trained_on(mask, tmp_path):
    add(tmp_path, "dog", mask=False), add(tmp_path, "cat", mask=False)
    save(tmp_path / mask, draw(BLACK, WHITE))
    refused(tmp_path, f"{mask}.* mask")


def test_masks_and_pictures_belong_together(tmp_path):
    for name in ("masked ball", "damask", "unmasked dog", "segway"):  # no masks
        add(tmp_path, name, mask=False)
    assert len(names(tmp_path)) == 4
    save(tmp_path / "dgo.mask.png", draw(BLACK, WHITE))
    refused(tmp_path, "dgo.mask.png")


def shape(low=0, high=255, dtype=np.uint8):
    mask = np.full((40, 40), low, dtype)
    mask[10:30, 4:20] = high
    return mask


CLEAR = {"black and white": shape(), "grey": shape(0, 90), "0 and 1": shape(0, 1), "1 and 2": shape(1, 2),
         "bits": shape() > 0, "10 and 255": shape(10, 255),
         "smooth": np.asarray(Image.fromarray(shape()).resize((160, 160)).resize((40, 40))),
         "cut-out": np.dstack([draw(), shape()]), "dark cut-out": np.dstack([draw(color=(9, 9, 9)), shape()]),
         "colours": draw(BLACK, WHITE)}
CLASSES, MANY = shape(0, 15), shape(0, 15)
CLASSES[9], CLASSES[35:] = 255, 3   # with a border of 255 that is no object
MANY[9], MANY[35:] = 255, np.arange(40) % 21
RAMP = np.arange(1600).reshape(40, 40) // 7


@pytest.mark.parametrize("kind", CLEAR)
def test_clear_masks_are_read(kind, tmp_path):
    picture = save(tmp_path / "a.png", draw())
    mask = load_mask(save(tmp_path / "a.mask.png", CLEAR[kind]), picture)
    wrong = mask != (shape() > 0)
    assert mask.dtype == bool and wrong.sum() <= (24 if kind == "smooth" else 0)


@pytest.mark.parametrize("mask, message", [
    (shape(0, 0), "0"), (shape(255, 255), "255"), (CLASSES, "255"), (MANY, "255"), (RAMP.astype(np.uint8), "255"),
    (shape()[:, :39], r"\(39, 40\).*\(40, 40\)"), (np.dstack([draw(), shape(128, 128)]), "128"),
    (draw(), "mask"), (None, "not a readable image")])
def test_unclear_masks_are_refused_by_name(mask, message, tmp_path):
    add(tmp_path, "dog")
    (tmp_path / "dog.mask.png").write_bytes(b"PNG") if mask is None else save(tmp_path / "dog.mask.png", mask)
    if mask is not None and mask.shape == (40, 40, 3):  # a photograph
        save(tmp_path / "dog.mask.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    assert "dog.mask.png" in refused(tmp_path, message)


@pytest.mark.parametrize("tag", range(1, 9))
def test_masks_turn_with_their_pictures(tag, tmp_path):
    """A mask in stored pixels is turned, one in seen pixels is not; where both have one size it is unclear."""
    exif = Image.Exif()
    exif[0x0112] = tag
    sides = np.random.default_rng(0).integers(0, 2, (5, 8)).repeat(4, 0).repeat(4, 1).astype(bool)
    for stored in (sides, sides[:, :20]):
        picture = save(tmp_path / "a.png", np.where(stored[..., None], np.uint8(RED), np.uint8(GREEN)), exif=exif)
        seen = data.load_image(picture)[..., 0] == RED[0]
        for mask in (stored, seen):
            save(tmp_path / "a.mask.png", mask)
            if tag == 1 or tag > 4 and stored.shape[0] != stored.shape[1]:
                assert (load_mask(tmp_path / "a.mask.png", picture) == seen).all()
            else:
                with pytest.raises(ValueError, match="a.png.* EXIF .*a.mask.png"):
                    load_mask(tmp_path / "a.mask.png", picture)


# --- Samples
def test_samples_of_every_task(tmp_path):
    """Of pictures that are held out, and so not cropped by chance: pixel by pixel."""
    looks = {"rex/1": ((200, 0, 0), (0, 160, 0)), "rex/2": ((90, 0, 0), (0, 0, 220)),
             "tom/1": ((250, 0, 90), (0, 0, 90)), "tom/2": ((90, 0, 250), (9, 90, 9))}
    for name, (color, ground) in looks.items():
        add(tmp_path / name[:3], name[-1], f"a box {name[-1]}", color=color, ground=ground)
    folder = Folder(tmp_path, 40)
    folder.held_out[:] = True
    seen = {name: draw(ground, color) for name, (color, ground) in looks.items()}
    cut = {name: draw(BLACK, color) for name, (color, _) in looks.items()}
    for task in folder.tasks:
        for s in samples_of(folder, task, 40, held_out=True):
            name, = (n for n in looks if (s.target == (cut if task == "segmentation" else seen)[n]).all())
            color, ground = looks[name]
            line, caption = f"The {name[:3]} in <image>.", f"a box {name[-1]}"
            assert s.prompt in {"text_to_image": [caption], "segmentation": [line],
                                "reconstruction": ["The image is <image>", f"The image is <image>\n{caption}"]
                                }.get(task, [f"{line}\n{caption}"])
            if task == "text_to_image":
                assert s.images == []
                continue
            image, = s.images
            if task in ("reconstruction", "segmentation"):
                assert (image == seen[name]).all()
            elif task == "subject_driven":  # another picture of the same subject
                assert (image == seen[name[:4] + {"1": "2", "2": "1"}[name[-1]]]).all()
            else:  # recovery: its object on another picture, never its own
                assert (image == color).all(-1).any() and not (image == ground).all(-1).any()
    assert folder.tasks == set(train.TASKS)


def test_a_subject_is_a_folder_of_several_pictures_beside_others(tmp_path):
    make_pets(tmp_path, 1)
    assert "subject_driven" not in Folder(tmp_path, 32).tasks  # one folder of pictures is not one subject
    make_pets(tmp_path, 3), add(tmp_path / "alone", "x", "a box"), add(tmp_path, "loose", mask=False)
    folder = Folder(tmp_path, 32)
    assert {p.subject for p in folder.pictures} == {"pet_0", "pet_1", "pet_2", ""} and len(folder.groups) == 5


def test_a_tenth_is_held_out_subjects_as_a_whole(tmp_path):
    folder = Folder(make_pets(tmp_path, 20, 3), 32)
    held = {folder.pictures[i].name: bool(h) for i, h in zip(folder.of, folder.held_out)}
    assert sum(held.values()) == 6
    assert len({(folder.pictures[i].subject, bool(h)) for i, h in zip(folder.of, folder.held_out)}) == 20
    seen = {h: set() for h in (False, True)}
    look = folder.look
    for held_out in (False, True):
        for task in folder.tasks - {"recovery"}:  # whose grounds are of all pictures
            folder.look = lambda i, *how, h=held_out: seen[h].add(folder.pictures[i].name) or look(i, *how)
            samples_of(folder, task, 120, held_out=held_out)
    assert not seen[True] & seen[False] and sorted(seen[True]) == sorted(n for n in held if held[n])
    two = tmp_path / "two"
    add(two, "a", mask=False), add(two, "b", mask=False)
    assert sum(Folder(two, 32).held_out) == 2  # one of two, with both of its tasks
    (two / "b.png").unlink()
    assert not any(Folder(two, 32).held_out)  # training needs the only one


def test_training_crops_and_mirrors_at_random_unless_words_say_left_or_right(tmp_path):
    for name, words in (("a", "a box"), ("b", "a box on the LEFT"), ("c", "the right, bright box"), ("d", "box")):
        add(tmp_path, name, f"{words}\nobject: box", size=(40, 64))
        save(tmp_path / f"{name}.mask.png", draw(BLACK, WHITE, size=(40, 64))[..., 0])
    folder = Folder(tmp_path, 32)
    folder.held_out[:] = folder.of == 3
    sides = {i: set() for i in range(4)}
    for line in np.flatnonzero(folder.task_of == "text_to_image"):
        for seed in range(60):
            target = folder.sample(line, random.Random(seed)).target
            red = np.flatnonzero((target[16, :, 0] > 150) & (target[16, :, 1] < 50))
            sides[folder.of[line]].add((bool(red.mean() > 16), len(red)))
            assert len(red) > 9  # the object is always in it
    mirrored = {i: {side for side, _ in seen} for i, seen in sides.items()}
    assert mirrored[1] == mirrored[2] == mirrored[3] == {False} and mirrored[0] == {False, True}
    assert len(sides[0]) > 4 and len(sides[3]) == 1  # validation sees the middle, at one size


def test_pictures_are_kept_as_small_as_they_can_be(tmp_path):
    for name, (height, width) in {"a": (300, 500), "b": (40, 33), "c": (20, 20)}.items():
        save(tmp_path / f"{name}.jpg", draw(size=(height, width)))
    sizes = [picture.shape[:2] for picture, _ in Folder(tmp_path, 32).kept.values()]
    assert [min(s) for s in sizes[:2]] == [37, 33] and sizes[2] == (20, 20)


def test_tiny_objects_are_named_at_the_start_not_in_training(tmp_path):
    for edge in range(1, 9):
        for i, size in enumerate(range(40, 130, 13)):
            dot = np.s_[7 + i : 7 + i + edge, 11 : 11 + edge]
            save(tmp_path / f"{edge}{i}.png", draw(size=(size, size)))
            save(tmp_path / f"{edge}{i}.mask.png", draw(BLACK, WHITE, dot, (size, size)))
            (tmp_path / f"{edge}{i}.txt").write_text("object: dot")
    for line in refused(tmp_path, "files cannot be used:").splitlines()[1:]:
        mask = line.strip().partition(".mask.png")[0]
        for file in (f"{mask}.png", f"{mask}.mask.png", f"{mask}.txt"):
            os.unlink(file)
    folder = Folder(tmp_path, 32)
    assert len(folder.pictures) > 20
    for sample in samples_of(folder, "segmentation", 8 * len(folder.pictures)):
        assert sample.target.any()


def test_all_bad_files_are_named_at_once(tmp_path):
    for name in "abcde":
        add(tmp_path, name)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    save(tmp_path / "b.mask.png", shape()[:20])
    (tmp_path / "d.png").unlink()
    (tmp_path / "d.png").symlink_to("nowhere.png")
    save(tmp_path / "e.mask.png", CLASSES)
    message = refused(tmp_path, "^4 files")
    assert all(f in message for f in ("a.png", "b.mask.png", "d.png", "e.mask.png")) and "c." not in message


def test_a_large_set_is_read_when_it_is_needed_and_gives_the_same(tmp_path, monkeypatch):
    make_pets(tmp_path)
    whole = Folder(tmp_path, 32)
    monkeypatch.setattr(data, "KEEP", 5000)
    lazy = Folder(tmp_path, 32)
    assert len(lazy.kept) < len(whole.kept) == 12 and lazy.digest == whole.digest and lazy.tasks == whole.tasks
    for task in whole.tasks:
        for a, b in zip(samples_of(whole, task), samples_of(lazy, task)):
            assert a.prompt == b.prompt and (a.target == b.target).all()
            assert all((x == y).all() for x, y in zip(a.images, b.images, strict=True))


# --- Runs
SHORT = ["tiny", *SMALL, *few_steps(steps=2, global_batch=4)]


def run(folder, out, *arguments):
    train.main([*SHORT, f"--data={folder}", f"--out={out}", *arguments])


def test_a_run_ends_with_pictures_and_what_to_try(tmp_path, capsys):
    """With what a first folder has: a few pictures, some with captions, nothing else."""
    for i in range(6):
        add(tmp_path / "my pets", f"p{i}", [f"a box on ground {i}", None][i % 2], mask=False, ground=(0, 40 * i, 9))
    run(tmp_path / "my pets", tmp_path / "out")
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("data: ")]
    assert "6 pictures, 3 with captions" in lines[0] + lines[1]
    left_out, = (line for line in lines if "left out" in line)  # one line for all stages
    assert all(task in left_out for task in ("recovery", "segmentation", "subject_driven"))
    assert "python sample.py" in said.out and "\r" not in said.out + said.err
    assert all((tmp_path / "out" / f).is_file() for f in ("sheet.png", "curves.png"))
    run(tmp_path / "my pets", tmp_path / "alone", "--stage=tokenizer")
    assert (tmp_path / "alone" / "tokenizer.png").is_file()


@pytest.mark.parametrize("keys, message", [
    (["--align.mix=recovery:1,text_to_image:1"], "recovery.*--align.mix"),
    (["--align.mix=segmentation:1", "--instruct.mix=subject_driven:1"], "segmentation.*subject_driven.*--instruct.mix"),
    (["--model.context=20"], "tokens.*--model.context"), (["--model.text.vocab_size=100"], r"vocab_size=100: .*\d\d\d")])
def test_what_cannot_work_is_refused_before_training(keys, message, tmp_path):
    add(tmp_path / "pets", "dog", "a dog and many words more than there is room for", mask=False)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "pets", tmp_path / "out", *keys)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_same_pictures_are_the_same_data_wherever_they_are(tmp_path, monkeypatch, capsys):
    make_pets(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    run("pets", "out", "--stage=tokenizer")
    weights = load_file("out/tokenizer/model.safetensors")
    os.rename("pets", "moved")
    for spelling in ("moved/", "./moved", tmp_path / "moved", "out/../moved"):
        run(spelling, "out", "--stage=tokenizer")
        assert "changed" not in capsys.readouterr().out
    assert same_weights(load_file("out/tokenizer/model.safetensors"), weights)
    add(tmp_path / "moved" / "pet_1", "2", "a mended caption", ground=GREEN)  # mended: it goes on, and is named
    run("moved", "out", "--stage=tokenizer")
    said = capsys.readouterr().out
    assert "changed" in said and "pet_1/2" in said and "pet_1/1" not in said and "already" in said
    add(tmp_path / "moved" / "pet_1", "3", "a new one")
    with pytest.raises(ValueError, match="data=13 pictures|data=12 pictures.*13 pictures"):
        run("moved", "out", "--stage=tokenizer")


def test_what_is_learnt_by_heart_is_said_and_the_best_weights_are_kept(tmp_path, monkeypatch, capsys):
    """The held-out loss is best at step 2 of 4, while the training loss falls."""
    seen, note_best = [], train.note_best

    def falls_then_rises(best, held_out, step, stage, log, *rest):
        note_best(best, abs(step - 2) + 1.0, step, stage, log, *rest)
        seen.append({name: tensor.clone() for name, tensor in stage.model.state_dict().items()})

    monkeypatch.setattr(train, "note_best", falls_then_rises)
    make_pets(tmp_path / "pets")
    run(tmp_path / "pets", tmp_path / "out", "--stage=tokenizer", "--tokenizer.steps=4", "--tokenizer.lr=1e-4",
        "--tokenizer.codebook_start=0")
    said, kept = capsys.readouterr().out, load_file(tmp_path / "out" / "tokenizer" / "model.safetensors")
    assert same_weights(kept, seen[1]) and not same_weights(kept, seen[3])
    assert "weights of step 2" in said and ("warning" in said) == ("at step 2: " in said)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A run on four subjects, to start others from."""
    folder = tmp_path_factory.mktemp("pets")
    run(make_pets(folder / "pets"), folder / "run")
    return folder / "run"


def test_a_run_starts_from_another_with_new_words(pets, tmp_path, monkeypatch, capsys):
    for i in range(4):
        add(tmp_path / "new", f"z{i}", f"a zebra on ground {i}\nobject: zebra")
    started, build_stage = [], train.build_stage
    monkeypatch.setattr(train, "build_stage", lambda *given: started.append(build_stage(*given)) or started[-1])
    monkeypatch.setattr(train, "train_steps", lambda stage, *rest: started.append(
        {n: t.clone() for n, t in stage.model.state_dict().items()}))
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    run(tmp_path / "new", tmp_path / "out", f"--start_from={pets}", "--instruct.mix=text_to_image:1,recovery:1")
    assert same_weights(started[1], load_file(pets / "instruct" / "model.safetensors"))
    old, new = (TextTokenizer((folder / "spiece.model").read_bytes()) for folder in (pets, tmp_path / "out"))
    assert new.unknown_words("a zebra on ground 3") == [] and old.unknown_words("a zebra") == ["zebra"]
    assert new.encode("a box on ground 1")[:-1] == old.encode("a box on ground 1")[:-1]
    assert same_weights(*(load_file(f / "tokenizer/model.safetensors") for f in (pets, tmp_path / "out")))
    run(tmp_path / "new", tmp_path / "out", f"--start_from={pets}", "--instruct.mix=text_to_image:1,recovery:1")
    assert "already" in capsys.readouterr().out


def test_other_sizes_and_tokenizers_are_refused(pets, tmp_path):
    new = tmp_path / "new"
    add(new, "z", mask=False), add(new, "y", mask=False)
    for keys, message in ((["--model.decoder.width=64"], "model.decoder.width=32.*64"),
                          (["--vqgan.ch=16"], "vqgan.ch=8.*16"), (["--start_from=nowhere"], "nowhere")):
        with pytest.raises(ValueError, match=message):
            run(new, tmp_path / "out", f"--start_from={pets}", *keys)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run(new, tmp_path / "own", "--stage=tokenizer")
    before = (tmp_path / "own" / "tokenizer" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another --out"):
        run(new, tmp_path / "own", f"--start_from={pets}")
    assert before == (tmp_path / "own" / "tokenizer" / "model.safetensors").read_bytes()


def test_stopped_while_it_takes_over_a_run_it_takes_all_of_it(pets, tmp_path, monkeypatch):
    add(tmp_path / "new", "z", mask=False), add(tmp_path / "new", "y", "a zebra", mask=False)
    write_json, count = train.write_json, iter(range(99))

    def killed(path, values):
        write_json(path, values)
        if next(count) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "write_json", killed)
        run(tmp_path / "new", tmp_path / "out", f"--start_from={pets}")
    run(tmp_path / "new", tmp_path / "out", f"--start_from={pets}")
    old, new = (TextTokenizer((folder / "spiece.model").read_bytes()) for folder in (pets, tmp_path / "out"))
    assert new.encode("a box on ground 1")[:-1] == old.encode("a box on ground 1")[:-1]
