"""COCO's annotations as a manifest to train on.

    python -m extras.coco instances_train2017.json captions_train2017.json train2017 coco
    python -m extras.released train small --data=coco/manifest.jsonl

A caption becomes a line of text_to_image, a picture one of reconstruction, an object one of segmentation and
one of recovery if its name identifies it: the only one of that name in its picture, drawn as polygons, on 5%
to 95% of the picture. Others are counted with the reason; what training would refuse is refused here.

Polygons are in stored pixels. Masks turn with a picture that has an EXIF turn, and a copy of it without the
tag is put beside them, so that nobody turns one of the two alone.
"""

import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import exif_turn, load_image, read_image
from sample import cli
from tokenizer import require, write_atomically

SMALLEST, LARGEST = 0.05, 0.95  # share of the picture; smaller objects are hard to see on the code grid


def read_coco(path, **lists):
    """A file's lists of dictionaries, key=[fields that each must have], ids as texts. Raises ValueError
    naming the first entry that is wrong."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for key, fields in lists.items():
        right = isinstance(content, dict) and isinstance(content.get(key), list)
        require(right, f"{path}: no list {key!r} in it; give COCO's instances_*.json, then captions_*.json")
        for number, entry in enumerate(content[key]):
            for field in fields:
                value = entry.get(field) if isinstance(entry, dict) else None
                value = str(value) if field.endswith("id") and isinstance(value, int) else value
                right = isinstance(value, str) and not re.search("<image>|[\ud800-\udfff]", value)
                require(right and (value.strip() or field == "caption"), f"{path}: {key}[{number}] has "
                        f"{field}={value!r:.99}: must be a text without <image> or half letters, not empty")
                entry[field] = value if field == "file_name" else " ".join(value.split())
        for number, times in Counter(entry["id"] for entry in content[key] if "id" in fields).most_common(1):
            require(times == 1, f"{path}: {times} of {key} have the id {number}; give each its own")
    return [content[key] for key in lists]


def polygon_mask(points, width, height):
    """The pixels whose centres are in a polygon x, y, x, y, ..., bool (height, width). The first pixel goes
    from 0 to 1. (pycocotools follows the outline in fifths.)"""
    outline = np.zeros((height, width + 1), np.uint8)  # 1 where it crosses a row an odd number of times
    corners = np.array(points, float).reshape(-1, 2) - 0.5  # so that centres are whole numbers
    require(np.isfinite(corners).all(), "not finite")
    for ends in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist()):
        (x0, y0), (x1, y1) = sorted(ends, key=lambda corner: corner[1])
        rows = np.arange(max(math.ceil(y0), 0), min(math.ceil(y1), height))
        if len(rows):
            x = x0 + (rows - y0) / (y1 - y0) * (x1 - x0)
            outline[rows, np.ceil(x).clip(0, width).astype(int)] ^= 1
    return np.bitwise_xor.accumulate(outline, axis=1)[:, :-1] > 0


def choose_objects(annotations, pictures, names):
    """{image id: [(mask file, its content, name)]} of the objects to use, and {reason: number of others}."""
    chosen, left_out = defaultdict(list), Counter()
    whats = [(item["image_id"], names.get(item["category_id"], "").lower()) for item in annotations]
    counts = Counter(whats)
    for item, what in zip(tqdm(annotations, "objects", disable=None), whats):
        picture, polygons, file = pictures.get(what[0]), item.get("segmentation"), io.BytesIO()
        reason = ("of unknown pictures" if not picture else "of unknown categories" if not what[1] else
                  "crowds" if item.get("iscrowd") else "not alone with their name" if counts[what] > 1 else
                  "boxes only" if not polygons else "RLE, not polygons" if isinstance(polygons, dict) else "")
        if not reason:
            try:
                mask = np.logical_or.reduce([polygon_mask(points, *picture["size"]) for points in polygons])
                share = mask.mean()
                reason = "too small" if share < SMALLEST else "too large" if share > LARGEST else ""
            except (TypeError, ValueError, OverflowError):
                reason = "with polygons that are not x, y, x, y, ..."
        if reason:
            left_out[reason] += 1
            continue
        image, turn = Image.fromarray(mask), picture["turn"]
        (image if turn is None else image.transpose(turn)).save(file, "PNG")
        name = names[item["category_id"]]
        chosen[what[0]].append((f"masks/{quote(item['id'], '')}.png", file.getvalue(), name))
    return chosen, left_out


def convert(instances, captions, folder, out):
    """Write a manifest and its masks. Before that, raises ValueError naming what is wrong."""
    out, texts, others, lines = Path(out).resolve(), defaultdict(list), Counter(), []
    require(not out.exists() or not any(out.iterdir()), f"{out} is not empty: choose another")
    images, categories, annotations = read_coco(
        instances, images=["id", "file_name"], categories=["id", "name"],
        annotations=["id", "image_id", "category_id"])
    pictures, names = {p["id"]: p for p in images}, {c["id"]: c["name"] for c in categories}
    for caption in read_coco(captions, annotations=["image_id", "caption"])[0]:
        if caption["caption"] and caption["image_id"] in pictures:
            texts[caption["image_id"]].append(caption["caption"])
        else:
            others["of unknown pictures" if caption["caption"] else "empty"] += 1
    for p in tqdm(images, "pictures", disable=None):
        p["path"], said = Path(folder).resolve() / p["file_name"], (p.get("width"), p.get("height"))
        require(p["path"].is_file(), f"{p['path']}: there is no such picture, but {instances} names it")
        p["size"], p["turn"] = read_image(p["path"], lambda image: (image.size, exif_turn(image)))
        require(p["size"] == said, f"{p['path']} is stored with {p['size']} pixels, {instances} says {said}")
    objects, left_out = choose_objects(annotations, pictures, names)
    for what, used, reasons in (("pictures", [images], {}), ("captions", texts.values(), others),
                                ("objects", objects.values(), left_out)):
        text = f"{what}: {sum(map(len, used))} used, left out: {dict(reasons) or 'none'}"
        require(any(used), f"{text}: nothing to train on; are the files of one split?")
        print(text)

    (out / "masks").mkdir(parents=True)
    for number, picture in pictures.items():
        path = picture["path"]
        if objects[number] and picture["turn"] is not None:
            upright = Image.fromarray(load_image(path))
            path = out / "masks" / f"picture {quote(number, '')}.png"
            upright.save(path)
        path, caption = os.path.relpath(path, out), "".join(texts[number][:1])
        lines += [{"input_text": text, "image_path": path, "generation_only": True} for text in texts[number]]
        line = {"input_text": caption, "image_path": path, "source_image": path, "objects": None}
        lines.append(line)
        for file, content, name in objects[number]:
            (out / file).write_bytes(content)
            cut = {**line, "image_path": file, "objects": name}
            lines += [{**cut, "do_mask": True}, {**cut, "do_replace": True}][: 2 if caption else 1]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(out / "manifest.jsonl", lambda file: file.write_text(text, encoding="utf-8"))
    print(f"wrote {out}/manifest.jsonl, {len(lines)} lines")


def main(arguments):
    """Run the command line."""
    if {"-h", "--help"} & set(arguments):
        return print(__doc__)
    require(len(arguments) == 4, "usage: python -m extras.coco INSTANCES.json CAPTIONS.json PICTURES OUT")
    convert(*arguments)


if __name__ == "__main__":
    cli(main, "extras.coco")
