"""COCO's annotations as a manifest to train on.

    python -m extras.coco instances_train2017.json captions_train2017.json train2017 coco
    python -m extras.released train small --data=coco/manifest.jsonl

A caption becomes a line of text_to_image, a picture one of reconstruction, an object one of segmentation and
one of recovery: if it is the only one of its name in its picture, drawn as polygons, on 5% to 95% of the
picture. Others are counted with the reason. Polygons are in stored pixels, so masks turn with a picture that
has an EXIF turn, and a copy of it without the tag is put beside them.
"""

import itertools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import EXIF_TURNS, ORIENTATION, load_image, read_image
from sample import cli
from tokenizer import require, write_atomically

SMALLEST, LARGEST = 0.05, 0.95  # share of the picture; smaller objects are hard to see on the code grid


def read_lists(path, **lists):
    """A file's lists of dictionaries, key=[texts that each must have], of which ids may be numbers."""
    try:
        content = json.loads(Path(path).read_bytes())
        for key, fields in lists.items():
            for entry, field in itertools.product(content[key], fields):
                text = str(entry[field]) if field.endswith("id") else " ".join(entry[field].split())
                require(not re.search("<image>|[\ud800-\udfff]", text), f"{text!r}: <image> or half letters")
                entry[field] = text
            ids = [entry["id"] for entry in content[key] if "id" in fields]
            require(len(set(ids)) == len(ids), f"two {key} have one id")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r}; give COCO's instances_*.json, then captions_*.json") from None
    return [content[key] for key in lists]


def polygon_mask(points, width, height):
    """The pixels whose centres are in a polygon x, y, x, y, ..., bool (height, width)."""
    outline = np.zeros((height, width + 1), bool)  # where it crosses a row an odd number of times
    corners = np.array(points, float).reshape(-1, 2) - 0.5  # so that centres are whole numbers
    require(np.isfinite(corners).all(), "without end")
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        rows = np.flatnonzero((np.arange(height) < y0) != (np.arange(height) < y1))
        x = x0 + (rows - y0) / (y1 - y0) * (x1 - x0)
        outline[rows, np.ceil(x).clip(0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(outline, axis=1)[:, :-1]


def object_mask(item, picture, times):
    """Where an annotation's object is, in stored pixels, bool (H, W). times: how many in its picture have its
    name. Raises an error with the reason if it is of no use."""
    polygons = item.get("segmentation")
    require(picture and item["name"], "of unknown pictures or categories")
    require(not item.get("iscrowd"), "crowds")
    require(times == 1, "not alone with their name")
    require(polygons and isinstance(polygons, list), "boxes or RLE, not polygons")
    mask = np.logical_or.reduce([polygon_mask(points, *picture["size"]) for points in polygons])
    require(mask.mean() >= SMALLEST, "too small")
    require(mask.mean() <= LARGEST, "too large")
    return mask


def convert(instances, captions, folder, out):
    """Write a manifest and its masks."""
    folder, out = Path(folder).resolve(), Path(out).resolve()
    texts, lines, counts = defaultdict(list), [], Counter()
    require(not out.exists() or not any(out.iterdir()), f"{out} is not empty: choose another")
    images, categories, annotations = read_lists(
        instances, images=["id"], categories=["id", "name"], annotations=["image_id", "category_id"])
    pictures, names = {p["id"]: p for p in images}, {c["id"]: c["name"] for c in categories}
    described, = read_lists(captions, annotations=["image_id", "caption"])
    for entry in described:
        if entry["caption"] and entry["image_id"] in pictures:
            texts[entry["image_id"]].append(entry["caption"])
    used = sum(map(len, texts.values()))
    print(f"captions: {used} used, {len(described) - used} empty or of unknown pictures")
    require(used, f"{captions}: not of the pictures in {instances}")

    for number, p in enumerate(tqdm(images, "pictures", disable=None)):
        p["file"], said = folder / str(p.get("file_name")), (p.get("width"), p.get("height"))
        p["size"], tag = read_image(p["file"], lambda image: (image.size, image.getexif().get(ORIENTATION)))
        p["turn"] = EXIF_TURNS.get(tag)
        require(p["size"] == said, f"{p['file']} is stored with {p['size']} pixels, {instances} says {said}")
        path = os.path.relpath(p["file"], out) if p["turn"] is None else f"masks/upright{number}.png"
        lines += [{"input_text": t, "image_path": path, "generation_only": True} for t in texts[p["id"]]]
        p["line"] = {"input_text": "".join(texts[p["id"]][:1]), "image_path": path, "source_image": path}
        lines.append(p["line"])

    for item in annotations:
        item["name"] = names.get(item["category_id"], "")
    times = Counter((item["image_id"], item["name"].lower()) for item in annotations)
    for number, item in enumerate(tqdm(annotations, "objects", disable=None)):
        p = pictures.get(item["image_id"])
        try:
            mask = Image.fromarray(object_mask(item, p, times[item["image_id"], item["name"].lower()]))
        except (TypeError, ValueError) as reason:
            counts[str(reason)] += 1
            continue
        counts["used"] += 1
        line = {**p["line"], "image_path": f"masks/{number}.png", "objects": item["name"]}
        tasks = ("do_mask", "do_replace") if line["input_text"] else ("do_mask",)
        lines += [{**line, task: True} for task in tasks]
        (out / "masks").mkdir(parents=True, exist_ok=True)
        (mask if p["turn"] is None else mask.transpose(p["turn"])).save(out / line["image_path"])
    print(f"objects: {dict(counts)}")
    require(counts["used"], f"{instances}: has no object that can be used")

    for p in images:
        if p["turn"] is not None:
            Image.fromarray(load_image(p["file"])).save(out / p["line"]["image_path"])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(out / "manifest.jsonl", lambda file: file.write_text(text, encoding="utf-8"))
    print(f"wrote {out}/manifest.jsonl, {len(lines)} lines of {len(images)} pictures")


def main(arguments):
    """Run the command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    require(len(arguments) == 4, "give INSTANCES.json CAPTIONS.json PICTURES OUT")
    convert(*arguments)


if __name__ == "__main__":
    cli(main, "extras.coco")
