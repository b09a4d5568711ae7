"""COCO's annotations as a manifest: which lines and masks, what is counted, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from data import load_image, load_mask
from extras import coco
from extras.released import Manifest

RED = (220, 30, 30)
BOX, SECOND = [4, 6, 30, 6, 30, 38, 4, 38], [40, 0, 60, 0, 60, 6, 40, 6]  # x 4..29, y 6..37; x 40..59, y 0..5

def annotation(category=1, picture=1, segmentation=(BOX, SECOND), **more):
    return {"image_id": picture, "category_id": category, "segmentation": segmentation, **more}

def make(folder, change=lambda instances, captions: None, turn=1):
    """Two turned pictures with a red object of two boxes, annotated in the first. Returns convert's files."""
    picture, exif = Image.new("RGB", (64, 48), (40, 160, 60)), Image.Exif()
    picture.paste(RED, (4, 6, 30, 38))
    picture.paste(RED, (40, 0, 60, 6))
    exif[0x0112] = turn
    (folder / "im").mkdir()
    for i in (1, 2):
        picture.save(folder / f"im/{i}.png", exif=exif)
    instances = {"images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2)],
                 "categories": [{"id": i, "name": name} for i, name in ((1, "box"), (2, "dog"), (3, "cat"))],
                 "annotations": [annotation()]}
    captions = {"annotations": [{"image_id": 1, "caption": text} for text in ("A box. \n", "Two")]}
    change(instances, captions)
    files = [folder / name for name in ("instances.json", "captions.json", "im", "out")]
    for file, content in zip(files, (instances, captions)):
        file.write_text(json.dumps(content))
    return files

def change(key, entry, captions=0, **fields):
    return lambda *files: files[captions][key][entry].update(fields)

def test_pictures_captions_and_objects_become_lines(tmp_path):
    def odd(instances, captions):
        instances["images"][0].update(id="a/..", width=64.0)
        for entry in (*instances["annotations"], *captions["annotations"]):
            entry.update(image_id="a/..", category_id="1")

    coco.main([*map(str, files := make(tmp_path, odd))])
    a, b, mask = "../im/1.png", "../im/2.png", "masks/0.png"
    whole = {"source_image": a, "input_text": "A box."}
    assert [json.loads(line) for line in open(files[3] / "manifest.jsonl")] == [
        *({"input_text": text, "image_path": a, "generation_only": True} for text in ("A box.", "Two")),
        {**whole, "image_path": a}, {"source_image": b, "input_text": "", "image_path": b},
        *({**whole, "image_path": mask, "objects": "box", task: True} for task in ("do_mask", "do_replace"))]
    assert Image.open(files[3] / mask).convert("L").histogram()[255] == 26 * 32 + 20 * 6
    with pytest.raises(ValueError, match="out is not empty"):
        coco.convert(*files)

def test_what_cannot_be_used_is_counted_with_its_reason(tmp_path, capsys):
    def more(instances, captions):
        shapes = [[], {"size": [48, 64], "counts": [3072]}, None, [[1, 1, 3, 1, 3, 3]],
                  [[0, 0, 64, 0, 64, 48, 0, 48]], [[0]], BOX, ["x"], [[1e400, 0, 3, 9]]]
        names = {20: " Dog", 21: " ", **{4 + i: f"{i}" for i in range(len(shapes))}}
        instances["categories"] += [{"id": i, "name": name} for i, name in names.items()]
        instances["annotations"] += [
            *(annotation(4 + i, segmentation=shape) for i, shape in enumerate(shapes)), annotation(2),
            annotation(1, 2), annotation(20), annotation(3, iscrowd=1), annotation(3, 99), annotation(77),
            annotation(21)]
        captions["annotations"] += [{"image_id": 99, "caption": "x"}, {"image_id": 2, "caption": " \n"}]

    coco.convert(*make(tmp_path, more))
    said = capsys.readouterr().out
    assert "captions: 2 used, 2 empty or of unknown pictures" in said and "7 lines of 2 pictures" in said
    assert all(f"'{reason}': {n}" in said for reason, n in {
        "used": 2, "not alone with their name": 2, "crowds": 1, "of unknown pictures or categories": 3,
        "boxes or RLE, not polygons": 3, "too small": 1, "too large": 1,
        "cannot reshape array of size 1 into shape (2)": 2, "without end": 1}.items())
    assert {file.name for file in (tmp_path / "out/masks").iterdir()} == {"0.png", "11.png"}

@pytest.mark.parametrize("change, message", [
    (lambda i, c: [x.update(image_id=9) for x in c["annotations"]], "captions.json: not of the pictures in "),
    (change("annotations", 0, segmentation=[]), "instances.json: has no object that can be used"),
    (change("images", 0, width=640, height=480), r"1.png is stored with \(64, 48\).*says \(640, 480\)"),
    (change("images", 1, file_name="c.png"), "c.png: not a readable image"),
    (change("categories", 2, name="a <image>"), "instances.json: .*'a <image>': <image> or half letters"),
    (change("annotations", 1, 1, caption="half \ud83d"), "captions.json: .*<image> or half letters"),
    (change("images", 1, id="1"), "instances.json: .*two images have one id"),
    (lambda i, c: i.pop("categories"), r"instances.json: KeyError\('categories'\); give COCO's"),
])
def test_what_training_would_refuse_is_refused_before_anything_is_written(change, message, tmp_path):
    files = make(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        coco.convert(*files)
    assert not files[3].exists()

@pytest.mark.parametrize("turn", range(1, 9))
def test_masks_turn_with_their_pictures(turn, tmp_path):
    coco.convert(*make(tmp_path, turn=turn))
    manifest = tmp_path / "out/manifest.jsonl"
    picture = tmp_path / "out" / json.loads(manifest.read_text().splitlines()[-1])["source_image"]
    seen = load_image(picture)
    assert (seen == load_image(tmp_path / "im/1.png")).all() and seen.shape[0] == (48, 64)[turn > 4]
    assert (load_mask(tmp_path / "out/masks/0.png", picture) == (seen == RED).all(-1)).all()
    target = Manifest(str(manifest), 48).dataset({"segmentation": 1.0}, 0)[0].target
    assert (target == RED).mean() > 0.2 and {RED, (0, 0, 0)} <= {tuple(c) for c in target.reshape(-1, 3)}

def test_a_polygon_covers_the_pixels_whose_centres_are_in_it():
    def inside(corners, x, y):
        edges = zip(corners, [*corners[1:], corners[0]])
        return sum((b > y) != (d > y) and x < a + (y - b) / (d - b) * (c - a) for (a, b), (c, d) in edges) % 2

    for seed in range(60):
        corners = np.random.default_rng(seed).uniform(-5, 30, (1 + seed % 8, 2)).tolist()
        expected = [[inside(corners, x + 0.5, y + 0.5) for x in range(24)] for y in range(20)]
        assert (coco.polygon_mask(sum(corners, []), 24, 20) == expected).all()
