"""COCO's annotations as a manifest to train on.

    python -m extras.coco instances_train2017.json captions_train2017.json train2017 coco
    python -m extras.released train small --data=coco/manifest.jsonl

A caption becomes a line of text_to_image, a picture one of reconstruction, an object one of segmentation and
one of recovery if its name identifies it: the only one of that name in its picture, drawn as polygons, on 5%
to 95% of the picture. Others are counted with the reason.

Polygons are in stored pixels, so masks turn with a picture that has an EXIF turn, and a copy of it without
the tag is put beside them.
"""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import exif_turn, load_image, read_image
from extras.released import read_entry
from sample import cli
from tokenizer import require, write_atomically

SMALLEST, LARGEST = 0.05, 0.95  # share of the picture; smaller objects are hard to see on the code grid


def read_lists(path, **lists):
    """A file's lists of dictionaries, key=[fields that each must have], ids as texts."""
    try:
        content = json.loads(Path(path).read_bytes())
        for key, fields in lists.items():
            for entry in content[key]:
                for field in fields:
                    value = entry[field]
                    entry[field] = str(value) if field.endswith("id") else " ".join(value.split())
            require("id" not in fields or len({e["id"] for e in content[key]}) == len(content[key]),
                    f"two of {key} have one id")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error!r}; give COCO's instances_*.json, then captions_*.json") from None
    return [content[key] for key in lists]


def polygon_mask(points, width, height):
    """The pixels whose centres are in a polygon x, y, x, y, ..., bool (height, width). The first pixel goes
    from 0 to 1. (pycocotools follows the outline in fifths.)"""
    outline = np.zeros((height, width + 1), bool)  # where it crosses a row an odd number of times
    corners = np.array(points, float).reshape(-1, 2) - 0.5  # so that centres are whole numbers
    require(np.isfinite(corners).all(), "not finite")
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        rows = np.flatnonzero((np.arange(height) < y0) != (np.arange(height) < y1))
        x = x0 + (rows - y0) / (y1 - y0) * (x1 - x0)
        outline[rows, np.ceil(x).clip(0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(outline, axis=1)[:, :-1]


def object_mask(item, picture, name, times):
    """Where an annotation's object is, in stored pixels, bool (H, W). Raises ValueError with the reason if it
    is of no use. times: how many in its picture have its name."""
    polygons = item.get("segmentation")
    require(picture, "of unknown pictures")
    require(name, "of unknown categories")
    require(not item.get("iscrowd"), "crowds")
    require(times == 1, "not alone with their name")
    require(polygons and isinstance(polygons, list), "boxes or RLE, not polygons")
    mask = np.logical_or.reduce([polygon_mask(points, *picture["size"]) for points in polygons])
    require(mask.mean() >= SMALLEST, "too small")
    require(mask.mean() <= LARGEST, "too large")
    return mask


def manifest_line(**line):
    """A line of the manifest. Raises ValueError if training would refuse it."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        read_entry(text)
    except ValueError as error:
        raise ValueError(f"{line}: {error}") from None
    return text + "\n"


def report(what, count):
    """Print how many were used, and how many not for which reason."""
    used = count.pop("used", 0)
    text = f"{what}: {used} used, left out: {dict(count) or 'none'}"
    require(used, f"{text}: nothing to train on; are the files of one split?")
    print(text)


def convert(instances, captions, folder, out):
    """Write a manifest and its masks, or raise ValueError naming what is wrong."""
    out, folder, lines, texts = Path(out).resolve(), Path(folder).resolve(), [], defaultdict(list)
    require(not out.exists() or not any(out.iterdir()), f"{out} is not empty: choose another")
    images, categories, annotations = read_lists(
        instances, images=["id"], categories=["id", "name"], annotations=["image_id", "category_id"])
    pictures, names = {p["id"]: p for p in images}, {c["id"]: c["name"] for c in categories}

    count = Counter()
    for caption in read_lists(captions, annotations=["image_id", "caption"])[0]:
        picture, text = caption["image_id"], caption["caption"]
        count["empty" if not text else "used" if picture in pictures else "of unknown pictures"] += 1
        texts[picture] += [text] if text else []
    report("captions", count)

    for number, p in enumerate(tqdm(images, "pictures", disable=None)):
        p["file"], said = folder / p.get("file_name", ""), (p.get("width"), p.get("height"))
        p["size"], p["turn"] = read_image(p["file"], lambda image: (image.size, exif_turn(image)))
        require(p["size"] == said, f"{p['file']} is stored with {p['size']} pixels, {instances} says {said}")
        path = os.path.relpath(p["file"], out) if p["turn"] is None else f"masks/upright{number}.png"
        lines += [manifest_line(input_text=t, image_path=path, generation_only=True) for t in texts[p["id"]]]
        p["line"] = {"input_text": "".join(texts[p["id"]][:1]), "image_path": path, "source_image": path}
        lines.append(manifest_line(**p["line"]))
    report("pictures", Counter(used=len(images)))

    count, whats = Counter(), [(a["image_id"], names.get(a["category_id"], "").lower()) for a in annotations]
    times = Counter(whats)
    for number, item in enumerate(tqdm(annotations, "objects", disable=None)):
        p = pictures.get(item["image_id"])
        try:
            mask = Image.fromarray(object_mask(item, p, whats[number][1], times[whats[number]]))
        except (TypeError, ValueError) as reason:
            count[str(reason)] += 1
            continue
        line = {**p["line"], "image_path": f"masks/{number}.png", "objects": names[item["category_id"]]}
        tasks = ("do_mask", "do_replace") if line["input_text"] else ("do_mask",)
        lines += [manifest_line(**line, **{task: True}) for task in tasks]
        (out / "masks").mkdir(parents=True, exist_ok=True)
        (mask if p["turn"] is None else mask.transpose(p["turn"])).save(out / line["image_path"])
        count["used"] += 1
    report("objects", count)

    for p in images:
        if p["turn"] is not None:
            Image.fromarray(load_image(p["file"])).save(out / p["line"]["image_path"])
    write_atomically(out / "manifest.jsonl", lambda file: file.write_text("".join(lines), encoding="utf-8"))
    print(f"wrote {out}/manifest.jsonl, {len(lines)} lines")


def main(arguments):
    """Run the command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    require(len(arguments) == 4, "give INSTANCES.json CAPTIONS.json PICTURES OUT")
    convert(*arguments)


if __name__ == "__main__":
    cli(main, "extras.coco")
