r"""Released files: weights into a run's folder and out of it, and the published manifests as data.

    python -m extras.released import full --out=out/full --mentor=stage2.pt --vq=vq.pt --spiece=spiece.model
    python -m extras.released export out/full exported
    python -m extras.released check manifest.jsonl --run=out/full
    python -m extras.released train full --stage=align --out=out/full --data=clean.jsonl

import  makes finished stages: of --vq the tokenizer, and --into=pretrain (default), align or instruct of
        --mentor, MENTOR's checkpoint, or its parts, --clip, --t5, --generator and --connector (or `new`).
export  writes a run's newest stage and its VQGAN as the released code reads them.
check   lists a manifest's lines that are wrong, name a file that is, or are too long for --run, and writes
        the others to --clean=NAME beside it (clean.jsonl).
train   is train.py with a manifest as --data. Behind recovery's objects come pictures of the folder
        --backgrounds, or else of other such lines.

docs/released.md leads to the paper's model.
"""

import argparse
import functools
import json
import os
import random
import re
import zipfile
import zlib
from array import array
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import extras.multi  # noqa: F401  (its task and its connector)
import sample
import train
from data import (PICTURES, TASKS, Folder, Sample, center_crop, load_image, load_mask, object_line,
                  paste_distorted, square_of_object, walk)
from mentor import CONNECTORS, Mentor
from tokenizer import VQGAN, TextTokenizer, file_hash, require, save_model, write_atomically, write_json

# --- Names: ours, and those in MENTOR's checkpoints, which are CLIP's, T5's and LlamaGen's own

ENCODER = "multimodal_encoder."
VISION, LANGUAGE = f"{ENCODER}vision_model.vision_tower.vision_model.", f"{ENCODER}language_model."
CONNECTOR = f"{ENCODER}language_projection."
PARTS = {  # our prefix: theirs, and what to replace after it, in order
    "decoder.": ("", {"code_embedding": "tok_embeddings", "blocks": "layers", "norm1": "attention_norm",
                      "norm2": "ffn_norm", "mlp": "feed_forward"}),
    "projector.": ("cls_embedding.", {"fc": "cap_proj.fc", "unconditional": "uncond_embedding"}),
    "encoder.connector.": (CONNECTOR, {"fc1": "0", "fc2": "2"}),
    "encoder.vision.": (VISION, {
        "(.*_embedding)": r"embeddings.\1", "(position_embedding)": r"\1.weight", "pre_norm": "pre_layrnorm",
        "post_norm": "post_layernorm", r"\.norm": ".layer_norm", r"\.fc": ".mlp.fc",
        r"attention\.(\w+)": r"self_attn.\1_proj", "blocks": "encoder.layers"}),
    "encoder.text.": (LANGUAGE, {
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "^embedding": "shared", "^norm": "encoder.final_layer_norm", "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm", r"\.([qkvo])\.": r".layer.0.SelfAttention.\1.",
        r"\.(w[io])": r".layer.1.DenseReluDense.\1", "blocks": "encoder.block"})}
SOURCES = {"clip": VISION, "t5": LANGUAGE, "connector": CONNECTOR, "generator": "", "mentor": "", "vq": ""}
LEFT_ASIDE = re.compile(rf"{VISION}(text_|visual_|logit_)|{LANGUAGE}(decoder|lm_head)\.|embed_tokens|"
                        "position_ids|freqs_cis|codebook_used")  # embed_tokens is `shared` again


def released_name(name):
    """A parameter's name in MENTOR's checkpoints."""
    ours = next(part for part in PARTS if name.startswith(part))
    (theirs, changes), name = PARTS[ours], name.removeprefix(ours)
    for old, new in changes.items():
        name = re.sub(old, new, name)
    return theirs + name


# --- Weights


def read_weights(path):
    """{name: tensor} of a file, or of a Hub folder with one file or shards. No code in a pickle runs: the one
    class it may hold is argparse's Namespace, for LlamaGen's options."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        return {name: tensor for file in files for name, tensor in read_weights(file).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = tensors.get("model", tensors)
        require(all(map(torch.is_tensor, tensors.values())), "no tensors")
        return tensors
    except Exception as error:  # a damaged file raises whatever the damage suggests
        refused = re.search(r"GLOBAL (\S+)", str(error))  # torch's advice is to load it all the same
        reason = f"it asks for {refused[1]}, which may run code" if refused else type(error).__name__
        raise ValueError(f"{path}: no weights ({reason}); a Git LFS pointer needs `git lfs pull`") from None


def released_tensors(source, path):
    """One of SOURCES, {name in MENTOR's checkpoints: tensor}, all finite."""
    own, others = {}, 0
    for name, tensor in read_weights(path).items():
        name = SOURCES[source] + re.sub(r"^(vision_model|model\.mm_projector)\.", "", name)
        if LEFT_ASIDE.search(name):
            others += 1
        else:
            require(tensor.isfinite().all(), f"{path}: {name} is not finite")
            own[name] = tensor.contiguous()
    print(f"{path}: {len(own)} tensors, {others} left aside")
    return own


def own_options(arguments, names):
    """A command line's options of these names, {name: value}, and its other arguments."""
    own = {a: a[2:].split("=", 1) for a in arguments if re.match(f"--({'|'.join(names)})=", a)}
    return dict(own.values()), [a for a in arguments if a not in own]


def import_weights(arguments):
    """Write released weights as finished stages of a run."""
    given, rest = own_options(arguments, (*SOURCES, "spiece", "into"))
    require(rest and "vq" in given, "import: needs a preset, such as full, and --vq=FILE")
    run, into = train.parse(rest), given.pop("into", "pretrain")
    out, tensors = Path(run.out), {}
    require(into in ("pretrain", "align", "instruct"), f"--into={into}: must be pretrain, align or instruct")
    spiece = Path(given.pop("spiece", f"{given.get('t5', '--spiece=FOLDER')}/spiece.model"))
    text_tokenizer = TextTokenizer(spiece.read_bytes())

    # all must fit before anything is written
    torch.manual_seed(run.seed)
    with torch.device("meta"):
        model, vqgan = Mentor(run.model), VQGAN(run.vqgan)
    ours = {released_name(name): name for name in model.state_dict()}
    if given.get("connector") == "new":
        new = CONNECTORS[run.model.connector](run.model).state_dict()
        tensors = {f"encoder.connector.{name}": tensor for name, tensor in new.items()}
    for source in (s for s in given if s != "vq" and given[s] != "new"):
        part = {ours.get(n, n): t for n, t in released_tensors(source, given[source]).items()}
        require(not part.keys() & tensors.keys(), f"--{source}={given[source]}: came from elsewhere already")
        tensors |= part

    # prefixes use this table's last rows, so others come and go at its front
    name, own = "projector.unconditional", model.projector.unconditional
    table = tensors.get(name, own)
    if len(table) != len(own) and table.shape[1:] == own.shape[1:]:
        print(f"the unconditional table had {len(table)} rows, now it has {len(own)}")
        tensors[name] = torch.randn(own.shape, dtype=table.dtype) * own.shape[1] ** -0.5
        tensors[name][-len(table):] = table[-len(own):]
    try:
        vqgan.load_state_dict(released_tensors("vq", given["vq"]), assign=True)
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # it lists all names and shapes that do not fit
        raise ValueError(" ".join(str(error).split())) from None

    out.mkdir(parents=True)
    write_atomically(out / "spiece.model", lambda file: file.write_bytes(text_tokenizer.proto))
    record = {"imported from": given, "text tokenizer": text_tokenizer.digest}
    for folder, module in ((out / "tokenizer", vqgan), (out / into, model)):
        save_model(module, folder)
        write_json(folder / "stage.json", record)
        record["weights of tokenizer"] = file_hash(out / "tokenizer" / "model.safetensors")


def export_weights(arguments):
    """Write a run's newest stage and its VQGAN under their released names."""
    require(len(arguments) == 2, "export: needs a run's folder and a new one")
    stage, out = sample.newest_stage(arguments[0]), Path(arguments[1])
    tensors = {released_name(n): t for n, t in read_weights(stage).items()}
    tensors[f"{LANGUAGE}encoder.embed_tokens.weight"] = tensors[f"{LANGUAGE}shared.weight"]
    codes = read_weights(stage.parent / "tokenizer") | {"quantize.codebook_used": torch.zeros(65536)}
    out.mkdir(parents=True)  # overwrites nothing
    for name, weights in (("mentor.pt", tensors), ("vq.pt", codes)):
        write_atomically(out / name, functools.partial(torch.save, {"model": weights}))


# --- A manifest: one JSON object a line

FLAGS = {"generation_only": "text_to_image", "do_mask": "segmentation", "do_replace": "recovery"}

# prompts: one by chance, the longest last; files: of their images, if masked of the objects' masks
Entry = namedtuple("Entry", "task prompts picture files masked")


def read_entry(line):
    """The Entry of a manifest's line, whose fields docs/released.md lists."""
    try:
        record = {**json.loads(line)}
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not one JSON object ({error})") from None
    objects, flags = record.get("objects"), {flag: record[flag] for flag in FLAGS if record.get(flag)}
    require(list(flags.values()) in ([], [True]), f"{flags}: only one of them, and true")
    task = (FLAGS[next(iter(flags))] if flags else "reconstruction" if objects is None else
            "multi_image" if isinstance(objects, list) else "subject_driven")

    def texts(field, count=1):
        value = record.get(field)
        values = value if isinstance(value, list) else [value]
        require(len(values) == count and all(isinstance(v, str) and v.strip() for v in values),
                f"{field}={value!r:.80}: {task} needs {count} here")
        return values

    alone, several = task in ("text_to_image", "reconstruction"), task == "multi_image"
    picture, = texts("image_path" if alone else "source_image")
    require(task != "reconstruction" or record.get("source_image") in (None, picture, [picture]),
            f"source_image: not {picture} as image_path, but there are no objects")
    labels = [] if alone else texts("objects", max(1, len(objects)) if several else 1)
    field = "input_img_list" if several and record.get("input_img_list") else "image_path"
    files = texts(field, len(labels)) if labels else [picture] * (task == "reconstruction")

    text = texts("input_text")[0].strip() if record.get("input_text") else ""
    if labels:  # the released code has its lines about the objects in place of this
        text = re.sub(r"^The image( 0)? is (<image>)+\s*", "", text)
    if text.count("<image>") > len(files):  # one for each token of an image
        text = re.sub("(<image>)+", "<image>", text)
    require(task in ("reconstruction", "segmentation") or text.replace("<image>", "").strip(),
            f"input_text={text!r:.80}: {task} needs a caption")
    if "<image>" in text:  # the whole prompt
        prompts = [text]
    elif task == "reconstruction":
        prompts = ["The image is <image>", f"The image is <image>\n{text}".strip()]
    else:
        lines = [object_line(label) for label in labels]
        prompts = ["\n".join(lines if task == "segmentation" else [*lines, text])]
    prompts[-1].encode()  # ValueError at half a character
    count = prompts[-1].count("<image>")
    require(count == len(files), f"{prompts[-1]!r:.80} has {count} <image>, but {task} {len(files)} images")
    masked = field == "image_path" and task in ("segmentation", "recovery", "multi_image")
    return Entry(task, prompts, picture, files, masked)


def another(files, file, rng):
    """The picture in one of the files, but not in this one."""
    for other in rng.sample(files, min(100, len(files))):
        if not other.samefile(file):
            return load_image(other)
    raise ValueError("no other picture to put behind the object: give --backgrounds")


def entry_sample(entry, root, size, rng, backgrounds=None):
    """The Sample of an entry with files in `root`; backgrounds: files to put behind recovery's object."""
    task, file, prompt = entry.task, root / entry.picture, rng.choice(entry.prompts)
    picture = load_image(file)
    if not entry.masked:
        images = [load_image(root / name) for name in entry.files]
        for name, image in zip(entry.files, images):
            tones = ((image > 32) & (image < 224)).mean() if image.shape == picture.shape else 1
            require(tones > 0.02 or np.ptp(image, axis=-1).max() > 16 or task == "reconstruction",
                    f"{name} looks like a mask: is do_mask or do_replace missing?")
        return Sample(task, prompt, images, center_crop(picture, size))
    masks = [load_mask(root / name, file) for name in entry.files]
    whole, mask = square_of_object(picture, np.logical_or.reduce(masks), size)
    cut_out, images = (mask * whole + 0.5).astype(np.uint8), []
    if task == "segmentation":
        return Sample(task, prompt, [whole], cut_out)
    if task == "recovery":
        other = picture if backgrounds is None else another(backgrounds, file, rng)
        images = [paste_distorted(cut_out, mask, center_crop(other, size), rng)]
    else:
        for mask in masks:  # each object on a black square: what its box shows, or it alone
            part = Image.fromarray(picture if rng.random() < 0.5 else picture * mask[..., None])
            part = part.crop(Image.fromarray(mask).getbbox())
            images.append(np.asarray(ImageOps.pad(part, [max(part.size)] * 2)))
    return Sample(task, prompt, images, whole)


class Manifest(Folder):
    """A manifest as a source. Its lines are checked, but `usable` keeps only their places in bytes: millions
    fit. A fiftieth of the pictures is held out."""

    def __init__(self, path, size, backgrounds=""):
        """size: pixels per side of the targets; backgrounds: a folder."""
        self.path, self.root, self.size, start, checksum = path, Path(path).parent, size, 0, 0
        self.usable = {(task, part): array("q") for task in TASKS for part in (False, True)}
        for number, line in enumerate(tqdm(open(path, "rb"), disable=None), 1):
            try:
                task, _, picture, files, _ = read_entry(line)
                sizes = [(self.root / name).stat().st_size for name in (picture, *files)]
            except (ValueError, OSError) as error:
                raise ValueError(f"{path} line {number}: {error}") from None
            checksum = zlib.crc32(line + repr(sizes).encode(), checksum)
            self.usable[task, zlib.crc32(picture.encode()) % 50 == 0].append(start)
            start += len(line)
        self.tasks = {task for task in TASKS if self.usable[task, False]}
        self.backgrounds = [self.root / self.entry(i).picture for i in self.usable["recovery", False]]
        if backgrounds:
            self.backgrounds = [file for file in walk(backgrounds)
                                if file.suffix.lower() in PICTURES and ".mask." not in file.name]
        self.digest = f"{checksum:08x}, {len(self.backgrounds)} backgrounds"

    def entry(self, start):
        """The Entry of the line at this byte."""
        with open(self.path, "rb") as file:  # each time: processes must not share a place in it
            file.seek(start)
            return read_entry(file.readline())

    def text_tokenizer(self):
        return TextTokenizer.train(read_entry(line).prompts[-1] for line in open(self.path, "rb"))

    def sample(self, task, rng, held_out=False):
        start = rng.choice(self.usable[task, held_out])
        try:
            return entry_sample(self.entry(start), self.root, self.size, rng, self.backgrounds)
        except ValueError as error:
            number = 1 + open(self.path, "rb").read(start).count(b"\n")
            raise ValueError(f"{self.path} line {number}: {error}") from None


def train_on(arguments):
    """Run train.py on a manifest."""
    given, rest = own_options(arguments, ["backgrounds"])
    train.main(rest, lambda run: Manifest(run.data, run.vqgan.image_size, **given))


def fault(root, collate, line):
    """What is wrong with a manifest's line, or None."""
    try:
        entry = read_entry(line)
        entry_sample(entry, root, 512, random.Random(0))
        if collate:
            collate.encode(entry.prompts[-1], len(entry.files))
    except (ValueError, OSError) as error:
        return str(error)


def check(arguments):
    """Open every file of a manifest, list its wrong lines, and write the others."""
    given, rest = own_options(arguments, ["clean", "run"])
    require(len(rest) == 1, "check: needs one manifest")
    path, right = Path(rest[0]), []
    clean = path.with_name(given.get("clean", "clean.jsonl"))
    require(not clean.exists(), f"{clean} exists already: choose another --clean")
    collate = sample.Pipeline(given["run"], "cpu").collate if "run" in given else None
    lines, look = open(path, "rb").readlines(), functools.partial(fault, path.parent, collate)
    faults = DataLoader(lines, batch_size=None, num_workers=os.cpu_count(), collate_fn=look)
    for number, wrong in enumerate(tqdm(faults, disable=None), 1):
        if wrong:
            print(f"{path} line {number}: {wrong}")
        else:
            right.append(lines[number - 1])
    print(f"{len(lines) - len(right)} lines are wrong, {len(right)} right")
    write_atomically(clean, lambda file: file.write_bytes(b"".join(right)))


def main(arguments):
    """Run the command line."""
    commands = {"import": import_weights, "export": export_weights, "check": check, "train": train_on}
    command = arguments[0] if arguments else "--help"
    if command in commands:
        return commands[command](arguments[1:])
    require(command in ("-h", "--help"), f"{command}: must be one of {', '.join(commands)}")
    print(__doc__)


if __name__ == "__main__":
    sample.cli(main, "extras.released")
