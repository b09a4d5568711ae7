"""A folder of your own pictures: what is used and what is not, masks, the tasks, and whole runs on it."""

import os
import random
import unicodedata
from functools import partial

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import data
import train
from conftest import FIVE, SMALL, few_steps, same_weights
from data import Folder, load_mask

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
        save(file.with_suffix(".mask.png"), draw(**look | {"ground": BLACK, "color": WHITE}))

def make_pets(folder, subjects=4, each=3):
    """A folder per subject, which allows all tasks: boxes of its colour on several grounds."""
    for s in range(subjects):
        for i in range(each):
            color, ground = (12 * s, 20, 200), (90, 40 * i, 10 * s)
            add(folder / f"pet_{s}", i, f"a box on ground {i}", color=color, ground=ground)
    return folder

def refused(folder, message):
    """The message of opening the folder, which must be a ValueError naming what is in it."""
    with pytest.raises(ValueError, match=message) as error:
        Folder(folder, 32)
    assert str(folder) in str(error.value)
    return str(error.value)

def samples_of(folder, task, count=20, **options):
    dataset = folder.dataset({task: 1.0}, 0, **options)
    return [dataset[i] for i in range(count)]

# --- Which files are used
def test_hidden_files_are_never_data_and_what_nothing_uses_is_told(tmp_path):
    add(tmp_path / "some", "dog"), add(tmp_path, "cat", words=None, mask=False)
    (tmp_path / "._dog.png").write_bytes(b"\0\5\26\7")  # what a Mac leaves on USB sticks
    for hidden in (".ipynb_checkpoints", ".Trash-1000", ".thumbnails", "@eaDir", "__MACOSX", "#recycle",
                   "$RECYCLE.BIN", "System Volume Information", "lost+found", "some/.git", "some/@eadir"):
        add(tmp_path / hidden, "old", "an old, wrong caption", mask=False)
    for file in ("a.heic", "b.HEIC", "c.bmp", "lost.txt", "some/notes.md", "a.mask.txt", "LICENSE"):
        (tmp_path / file).write_text("a picture that is not there")
    folder = Folder(tmp_path, 32)
    assert [p.name for p in folder.pictures] == ["cat", "some/dog"] and "old" not in folder.notes
    for told in ("2 pictures", "1 with captions", "1 masks", "0 subjects", "1 held out", "2 .heic", "1 .bmp",
                 "1 .md", "LICENSE", "lost", "a.mask"):
        assert told in folder.notes

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

def test_folders_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--data=nowhere: "):
        Folder("nowhere", 32)
    refused(tmp_path, "no pictures.*.jpg")
    add(tmp_path / "deep", "dog")
    scandir = os.scandir
    def forbidden(path):  # as root may list all
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", forbidden)
        refused(tmp_path, "deep: .*cannot be listed .*Permission denied")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    try:  # a way in circles must not make forty copies of all
        assert [p.name for p in Folder(tmp_path, 32).pictures] == ["deep/dog"]
    except ValueError as error:
        assert "up" in str(error)

# --- Words
def test_all_captions_of_a_file_are_used(tmp_path):
    add(tmp_path, "dog", "\ufeffa dog on grass\n\n  a dog that runs \nOBJECT:  big dog\na third one\n")
    folder = Folder(tmp_path, 32)
    assert folder.pictures[0].captions == ["a dog on grass", "a dog that runs", "a third one"]
    captions = [s.prompt for s in samples_of(folder, "text_to_image", 60)]
    assert {captions.count(c) > 9 for c in folder.pictures[0].captions} == {True}
    assert samples_of(folder, "segmentation", 1)[0].prompt == "The big dog in <image>."
    known = folder.text_tokenizer()
    assert all(known.unknown_words(prompt) == [] for prompt in (*folder.prompts(), "The image is <image>"))
    for name in ("red_dog2", "cat", "007"):  # without words the folder's name is used
        add(tmp_path / "more" / name, "x", "object: tom" if name == "cat" else None)
    assert [(p.captions, p.label) for p in Folder(tmp_path / "more", 32).pictures] == [
        (["007"], "007"), (["tom"], "tom"), (["red dog"], "red dog")]
    add(tmp_path / "more" / "cat", "y", "a dog\na brown dog")  # the folder's name, or the second line?
    refused(tmp_path, "y.mask.png.*object: NAME")

@pytest.mark.parametrize("words, message", [
    (b"a dog\nobject: dog\nobject: cat", "dog.txt.*object: NAME"), (b"see <image>", "dog.txt.*<image>"),
    (b"a \xff dog", "dog.txt.*UTF-8"), (b"a dog", "dog.mask.png.*object: NAME"),
    (b"a dog\ndog", "dog.mask.png.*object: NAME"), (b"a dog\nobject:", "dog.mask.png.*object: NAME")])
def test_unclear_words_are_refused_by_name(words, message, tmp_path):
    """A mask needs its object's name, and the second line of captions is not it."""
    add(tmp_path, "dog")
    (tmp_path / "dog.txt").write_bytes(words)
    refused(tmp_path, message)

# --- Masks
@pytest.mark.parametrize("mask", ["dog_mask.png", "dog-mask.jpg", "mask_dog.png", "dog_mask1.png",
                                  "masks/dog.png", "Dog.MASK.jpg", "dog_seg.png", "dog segmentation.webp"])
def test_what_looks_like_a_mask_is_not_trained_on(mask, tmp_path):
    for name in ("dog", "masked ball", "damask", "unmasked dog", "segway"):
        add(tmp_path, name, mask=False)
    assert len(Folder(tmp_path, 32).pictures) == 5
    save(tmp_path / mask, draw(BLACK, WHITE))
    refused(tmp_path, f"{mask}.* mask")
    os.rename(tmp_path / mask, tmp_path / "dgo.mask.png")
    refused(tmp_path, "dgo.mask.png")

def shape(low=0, high=255):
    mask = np.full((40, 40), low, np.uint8)
    mask[10:30, 4:20] = high
    return mask

SMOOTH = np.asarray(Image.fromarray(shape()).resize((160, 160)).resize((40, 40)))
CLEAR = {"black and white": shape(), "grey": shape(0, 90), "0, 1": shape(0, 1), "10, 255": shape(10, 255),
         "bits": shape() > 0, "smooth": SMOOTH, "cut-out": np.dstack([draw(), shape()]),
         "dark cut-out": np.dstack([draw(color=(9, 9, 9)), shape()]), "colours": draw(BLACK, WHITE)}
FEW, MANY = shape(0, 15), shape(0, 15)  # class numbers, with a border of 255 that is no object
FEW[9], FEW[35:], MANY[9], MANY[35:] = 255, 3, 255, np.arange(40) % 21
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
RAMP = (np.arange(1600).reshape(40, 40) // 7).astype(np.uint8)

def test_clear_masks_are_read(tmp_path):
    save(tmp_path / "a.png", draw())
    for kind, mask in CLEAR.items():
        wrong = load_mask(save(tmp_path / "a.mask.png", mask), tmp_path / "a.png") != (shape() > 0)
        assert wrong.sum() <= (24 if kind == "smooth" else 0), kind

def test_unclear_masks_are_refused_by_name(tmp_path):
    for mask, message in (
            (shape(0, 0), "0"), (shape(255, 255), "255"), (FEW, "255"), (MANY, "255"), (RAMP, "255"),
            (NOISE, "clear"), (np.dstack([draw(), shape(9, 9)]), "9"), (shape()[:, :39], r"\(39, 40\).*40")):
        add(tmp_path, "dog")
        save(tmp_path / "dog.mask.png", mask)
        assert "dog.mask.png" in refused(tmp_path, message)
    (tmp_path / "dog.mask.png").write_bytes(b"PNG")
    assert "dog.mask.png" in refused(tmp_path, "not a readable image")
    save(tmp_path / "dog.mask.png", shape())
    for tag in range(2, 9):  # is the mask turned, too? Its size says so only sometimes
        exif = Image.Exif()
        exif[0x0112] = tag
        save(tmp_path / "dog.png", draw(), exif=exif)
        refused(tmp_path, "dog.png.* EXIF .*dog.mask.png")

# --- Samples
def test_samples_of_every_task(tmp_path):
    """Of pictures that are held out, and so not cropped by chance: pixel by pixel."""
    looks = {"rex/1": ((200, 0, 0), (0, 160, 0)), "rex/2": ((90, 0, 0), (0, 0, 220)),
             "tom/1": ((250, 0, 90), (0, 0, 90)), "tom/2": ((90, 0, 250), (9, 90, 9))}
    for name, (color, ground) in looks.items():
        add(tmp_path / name[:3], name[-1], f"a box {name[-1]}", color=color, ground=ground)
    folder = Folder(tmp_path, 40)
    folder.usable = {(task, part): sorted(folder.usable[task, False] + folder.usable[task, True])
                     for task, part in folder.usable}
    whole = {name: draw(ground, color) for name, (color, ground) in looks.items()}
    cut = {name: draw(BLACK, color) for name, (color, _) in looks.items()}
    for task in folder.tasks:
        for s in samples_of(folder, task, 40, held_out=True):
            name, = (n for n in looks if (s.target == (cut if task == "segmentation" else whole)[n]).all())
            line, caption, (color, ground) = f"The {name[:3]} in <image>.", f"a box {name[-1]}", looks[name]
            image_line = "The image is <image>"
            assert s.prompt in {"text_to_image": [caption], "segmentation": [line], "reconstruction": [
                image_line, f"{image_line}\n{caption}"]}.get(task, [f"{line}\n{caption}"])
            assert len(s.images) == (task != "text_to_image")
            if task in ("reconstruction", "segmentation"):
                assert (s.images[0] == whole[name]).all()
            elif task == "subject_driven":  # another picture of the same subject
                assert (s.images[0] == whole[name[:4] + {"1": "2", "2": "1"}[name[-1]]]).all()
            elif task == "recovery":  # its object on another picture, never its own
                assert (s.images[0] == color).all(-1).any() and not (s.images[0] == ground).all(-1).any()
    assert folder.tasks == set(FIVE)

PARTS = ("reconstruction", False), ("reconstruction", True)

def test_a_tenth_is_held_out_subjects_as_a_whole(tmp_path):
    make_pets(tmp_path / "few", 1), add(tmp_path / "few" / "alone", "x", "a box")
    assert {p.subject for p in Folder(tmp_path / "few", 32).pictures} == {"pet_0", ""}  # a small one alone
    [add(tmp_path / "one" / "rex", f"{i}", "a box") for i in range(11)]
    assert "subject_driven" not in Folder(tmp_path / "one", 32).tasks  # a large one is no subject
    add(tmp_path / "few" / "alone", "y", "a box"), add(tmp_path / "few", "pet_0", mask=False)
    few = Folder(tmp_path / "few", 32)
    assert {p.subject for p in few.pictures} == {"pet_0", "alone", ""} and len(few.groups["pet_0"]) == 3
    folder = Folder(make_pets(tmp_path / "many", 20, 3), 32)
    seen, look = {False: set(), True: set()}, folder.look
    def watched(held_out, i, *how):
        seen[held_out].add((folder.pictures[i].name, folder.pictures[i].subject))
        return look(i, *how)
    for held_out in (False, True):
        for task in folder.tasks - {"recovery"} if held_out else folder.tasks:  # on a ground from all others
            folder.look = partial(watched, held_out)
            samples_of(folder, task, 200, held_out=held_out)
    assert not seen[True] & seen[False] and len(seen[True]) == 6 and len(seen[False]) == 54
    assert not {subject for _, subject in seen[True]} & {subject for _, subject in seen[False]}
    add(tmp_path / "two", "a", mask=False), add(tmp_path / "two", "b", mask=False)
    assert [len(i) for i in map(Folder(tmp_path / "two", 32).usable.get, PARTS)] == [1, 1]
    (tmp_path / "two" / "b.png").unlink()
    assert [len(i) for i in map(Folder(tmp_path / "two", 32).usable.get, PARTS)] == [1, 0]  # it is needed

def test_training_crops_and_mirrors_at_random_unless_words_say_left_or_right(tmp_path):
    for name, words in zip("abcd", ("a box", "a box on the LEFT", "the right, bright box", "box")):
        add(tmp_path, name, f"{words}\nobject: box", size=(40, 64))
    folder = Folder(tmp_path, 32)
    sides = {i: set() for i in range(4)}
    for i in range(4):
        folder.usable["text_to_image", i == 3] = [i]
        for seed in range(60):
            target = folder.sample("text_to_image", random.Random(seed), held_out=i == 3).target
            red = np.flatnonzero((target[16, :, 0] > 150) & (target[16, :, 1] < 50))
            sides[i].add((bool(red.mean() > 16), len(red)))
            assert len(red) > 9  # the object is always in it
    mirrored = {i: {side for side, _ in seen} for i, seen in sides.items()}
    assert mirrored[1] == mirrored[2] == mirrored[3] == {False} and mirrored[0] == {False, True}
    assert len(sides[0]) > 4 and len(sides[3]) == 1  # validation sees the middle, at one size

def test_all_that_cannot_be_used_is_named_at_the_start_not_in_training(tmp_path):
    for edge in range(1, 9):
        for i, size in enumerate(range(40, 130, 13)):
            box = np.s_[7 + i : 7 + i + edge, 11 : 11 + edge]
            add(tmp_path, f"{edge}{i}", "object: dot", size=(size, size), box=box)
    add(tmp_path, "wide", "object: dots", size=(40, 120))
    save(tmp_path / "wide.mask.png", (np.arange(4800).reshape(40, 120) % 120 % 50 < 9) * np.uint8(255))
    for line in refused(tmp_path, "files cannot be used:").splitlines()[1:]:  # too small to be seen
        for suffix in (".png", ".mask.png", ".txt"):
            os.unlink(line.strip().partition(".png:")[0].removesuffix(".mask") + suffix)
    folder = Folder(tmp_path, 32)
    assert len(folder.pictures) > 20 and folder.pictures[-1].name == "wide"
    for task in ("segmentation", "recovery"):
        assert all(s.target.any() for s in samples_of(folder, task, 8 * len(folder.pictures)))
    (tmp_path / "wide.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    (tmp_path / "82.png").unlink(), (tmp_path / "82.png").symlink_to("nowhere.png")
    save(tmp_path / "83.mask.png", shape()[:20]), save(tmp_path / "84.mask.png", FEW)
    message = refused(tmp_path, "^4 files")
    assert all(name in message for name in ("wide.png", "82.png", "83.mask.png", "84.mask.png"))

def test_a_large_set_is_read_when_it_is_needed_and_gives_the_same(tmp_path, monkeypatch):
    for name, (height, width) in {"a": (300, 500), "b": (40, 33), "c": (20, 20)}.items():
        save(tmp_path / "some" / f"{name}.jpg", draw(size=(height, width)))
    sizes = [min(picture.shape[:2]) for picture, _ in Folder(tmp_path / "some", 32).kept.values()]
    assert sizes == [37, 33, 20]  # kept as small as they can be
    whole = Folder(make_pets(tmp_path / "pets"), 32)
    monkeypatch.setattr(data, "KEEP", 5000)
    lazy = Folder(tmp_path / "pets", 32)
    assert len(lazy.kept) < len(whole.kept) == 12 and lazy.digest == whole.digest
    for task in whole.tasks:
        for a, b in zip(samples_of(whole, task), samples_of(lazy, task)):
            assert a.prompt == b.prompt and (a.target == b.target).all()
            assert all((x == y).all() for x, y in zip(a.images, b.images, strict=True))

# --- Runs
def run(folder, out, *arguments):
    keys = few_steps(steps=2, global_batch=4)
    train.main(["tiny", *SMALL, *keys, f"--data={folder}", f"--out={out}", *arguments])

def test_a_run_ends_with_pictures_and_what_to_try(tmp_path, capsys):
    """With what a first folder has: a few pictures, some with captions, nothing else."""
    for i in range(6):
        words = f"a box on ground {i}" if i % 2 else None
        add(tmp_path / "my pets", i, words, mask=False, ground=(0, 40 * i, 9))
    run(tmp_path / "my pets", tmp_path / "out")
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("data: ")]
    left_out, = (line for line in lines if "left out" in line)  # one line for all stages
    assert all(task in left_out for task in ("recovery", "segmentation", "subject_driven"))
    assert any("6 pictures, 3 with captions" in line for line in lines)
    assert "python sample.py" in said.out and "\r" not in said.out + said.err
    assert all((tmp_path / "out" / file).is_file() for file in ("sheet.png", "curves.png"))
    assert (np.asarray(Image.open(tmp_path / "out" / "curves.png"))[-1] == 255).all()  # no number is cut off
    run(tmp_path / "my pets", tmp_path / "alone", "--stage=tokenizer")
    assert (tmp_path / "alone" / "tokenizer.png").is_file()

@pytest.mark.parametrize("keys, message", [
    (["--align.mix=recovery:1,text_to_image:1"], "recovery.*--align.mix"),
    (["--align.mix=segmentation:1", "--instruct.mix=recovery:1"], "recovery, segmentation.*--instruct.mix"),
    (["--model.context=40"], "tokens.*--model.context"),  # the prompt of most tokens, not of most letters
    (["--model.text.vocab_size=99"], r"vocab_size=99: .*\d\d\d")])
def test_what_cannot_work_is_refused_before_training(keys, message, tmp_path):
    add(tmp_path / "pets", "dog", f"a dog {'x' * 99}\na dog{',' * 25}", mask=False)
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
        assert "pet_" not in capsys.readouterr().out
    assert same_weights(load_file("out/tokenizer/model.safetensors"), weights)
    add(tmp_path / "moved" / "pet_1", "2", "a box on ground 0", ground=GREEN)
    run("moved", "out", "--stage=tokenizer")  # with a mended picture it goes on, and names it
    said = capsys.readouterr().out
    assert "changed" in said and "pet_1/2" in said and said.count("pet_") == 1 and "already" in said
    add(tmp_path / "moved" / "pet_1", "3", "a box on ground 0")
    with pytest.raises(ValueError, match="data=12 pictures.*13 pictures"):
        run("moved", "out", "--stage=tokenizer", "--seed=5")
    assert '"seed": 0' in open("out/run.json").read()  # the run that was made
    add(tmp_path / "moved" / "pet_1", "2", "a zebra")  # for which the word table has no row
    with pytest.raises(ValueError, match="spiece.model.*zebra"):
        run("moved", "out")

def test_what_is_learnt_by_heart_is_said_and_the_best_weights_are_kept(tmp_path, monkeypatch, capsys):
    """The held-out loss is best at step 2 of 4, while the training loss falls."""
    seen, note_best = [], train.note_best
    def falls_then_rises(best, held_out, step, stage, log):
        note_best(best, abs(step - 2) + 1.0, step, stage, log)
        seen.append({name: tensor.clone() for name, tensor in stage.model.state_dict().items()})
    monkeypatch.setattr(train, "note_best", falls_then_rises)
    make_pets(tmp_path / "pets")
    run(tmp_path / "pets", tmp_path / "out", *few_steps(steps=1), "--pretrain.steps=4")
    said, kept = capsys.readouterr().out, load_file(tmp_path / "out" / "pretrain" / "model.safetensors")
    assert same_weights(kept, seen[3]) and not same_weights(kept, seen[5])  # the first is the encoder's
    assert "pretrain: " in said and "weights of step 2" in said and "heart" in said
    seen.clear()  # a discriminator makes pictures sharper and the held-out loss larger
    run(tmp_path / "pets", tmp_path / "gan", "--stage=tokenizer", "--tokenizer.disc_start=0.5")
    assert not seen and "weights of step" not in capsys.readouterr().out
