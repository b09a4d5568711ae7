"""DreamBench's and DreamBench++'s folders, drawn in the layout that DreamBench++'s scorer reads."""

import shutil

import pytest
from PIL import Image

from extras import dreambench

STAR, RING = "live_subject/animal/00", "object/07"
WORDS = {STAR: "Big/Star\nA big star on a red background\nA small star\n", RING: "ring\nA ring at the left\n"}

@pytest.fixture
def run(pipeline, monkeypatch, tmp_path):
    """run(folder, option, ...) draws into tmp_path/out with the model of the repository."""
    monkeypatch.setattr(dreambench, "Pipeline", lambda folder, device: pipeline)
    return lambda *arguments: dreambench.main(["model", *map(str, arguments), f"--out={tmp_path}/out"])

def write(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text) if text else Image.new("RGB", (70, 50)).save(path)

@pytest.fixture
def bench(tmp_path):
    """A folder as DreamBench++'s data, with a star and a ring."""
    for name, text in WORDS.items():
        write(tmp_path / f"bench/images/{name}.{'JPG' if name == STAR else 'jpg'}")
        write(tmp_path / f"bench/captions/{name}.txt", text)
    return tmp_path / "bench"

def test_it_is_written_as_the_scorer_reads_it(bench, run, pipeline, tmp_path, monkeypatch):
    for hidden in ("._07", ".ipynb_checkpoints/07", "__MACOSX/07", "@eaDir/07"):
        write(bench / f"captions/object/{hidden}.txt", "\0")
        write(bench / f"images/object/{hidden}.jpg", "\0")
    sizes, save, out = [], Image.Image.save, tmp_path / "out"
    monkeypatch.setattr(Image.Image, "save", lambda p, *a, **k: sizes.append(p.size) or save(p, *a, **k))
    asked, draw = [], pipeline.draw
    monkeypatch.setattr(pipeline, "draw", lambda part, **keys: (
        asked.extend(s.prompt for s in part), draw(part, **keys))[1])
    run(bench, "--n=2")
    assert [text.split()[-1] for text in asked] == ["background"] * 2 + ["star"] * 2 + ["left"] * 2
    star, ring = "live_subject_animal_00_big_star", "object_07_ring"
    stems = [f"{subject}_{n}" for subject in (f"{star}/0", f"{star}/1", f"{ring}/0") for n in (0, 1)]
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        f"{kind}/{stem}.{'txt' if kind == 'text' else 'jpg'}"
        for kind in ("src_image", "text", "tgt_image") for stem in stems}
    assert (out / f"text/{star}/1_0.txt").read_text() == "A small star"
    assert Image.open(out / f"src_image/{ring}/0_1.jpg").size == (70, 50)
    assert sizes.count((70, 50)) == 2  # each reference is encoded once
    first, second = (Image.open(out / f"tgt_image/{star}/0_{n}.jpg") for n in (0, 1))
    assert first.size == (32, 32) and first != second
    with pytest.raises(ValueError, match="out is not empty"):  # a scorer would read what another run has left
        run(bench)

@pytest.mark.parametrize("name, content, message", [
    (f"captions/{RING}.txt", b"ring\n" + b"a ring at the left " * 40, "221 tokens"),
    (f"captions/{RING}.txt", b"ring\na \xff ring", "07.txt: .*UTF-8"),
    (f"captions/{RING}.txt", b"ring\n", "07.txt: must have a label, then prompts"),
    (f"captions/{RING}.txt", b"ring\na zebra", "zebra"),
    (f"images/{RING}.jpg", b"no picture", "07.jpg: not a readable image"),
    (f"images/{RING}.png", b"", "07.png and .*07.jpg have one name"),
    ("images/object/08.jpg", b"", "only one of images and captions has object/08"),
])
def test_what_is_wrong_is_named_before_anything_is_drawn(name, content, message, bench, run, tmp_path):
    (bench / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(bench)
    assert not (tmp_path / "out").exists()

def test_the_first_dreambench_is_read_from_its_list(run, tmp_path):
    line, bench = "'a {0} {1} at the %s'.format(unique_token, class_token)", tmp_path / "dataset"
    for name in ("star_toy/02", "star_toy/00", "star_toy/._00", "cat2/03"):
        write(bench / f"{name}.jpg")
    write(bench / "prompts_and_classes.txt", "\n".join([
        "Classes\n\nsubject_name,class\nstar_toy,big star\ncat2, cat \n\nObject Prompts\n\nprompt_list = [",
        line % "left" + ",", line % "right", "]\nLive Subject Prompts\nprompt_list = [", line % "top", "]"]))
    assert [(s[0], s[1].name, *s[2:]) for s in dreambench.dreambench(bench / "prompts_and_classes.txt")] == [
        ("star_toy", "00.jpg", "big star", ["a big star at the left", "a big star at the right"]),
        ("cat2", "03.jpg", "cat", ["a cat at the top"])]
    shutil.rmtree(bench / "star_toy")
    for folder, message in ((bench, "star_toy"), (tmp_path / "no", "no/images")):
        with pytest.raises(ValueError, match=f"{message}: this folder cannot be listed"):
            run(folder)
