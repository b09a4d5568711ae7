r"""Released files: weights into a run's folder and out of it, and the published manifests as data.

    python -m extras.released import full --out=out/full --mentor=stage2.pt --vq=vq.pt --spiece=spiece.model
    python -m extras.released export out/full --mentor=new.pt --vq=new_vq.pt
    python -m extras.released check manifest.jsonl --clean=clean.jsonl --run=out/full --workers=8
    python -m extras.released train full --stage=align --out=out/full --data=clean.jsonl

import  makes finished stages of --mentor, MENTOR's checkpoint, or its parts, --clip, --t5, --connector and
        --generator; and of --vq and --spiece. --into: whose result they are, pretrain (default), align or
        instruct. --fresh: parts to begin anew, for example connector,projector.
export  writes a run's newest stage and its VQGAN as the released code reads them.
check   lists a manifest's lines that are wrong, name a file that is, or have prompts too long for --run, and
        writes the others to --clean.
train   is train.py with a manifest as --data. Behind recovery's objects come pictures of --backgrounds, a
        folder or another manifest, or else its own.

docs/released.md leads from the downloads to the paper's model.
"""

import argparse
import functools
import json
import os
import random
import re
import sys
import zipfile
import zlib
from array import array
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import extras.multi  # noqa: F401  (for its task and its connector)
import sample
import train
from data import (PICTURES, TASKS, Collate, EntryDataset, Sample, center_crop, load_image, load_mask,
                  object_line, paste_distorted, square_of_object, walk)
from mentor import Mentor
from tokenizer import (VQGAN, TextTokenizer, file_hash, flatten, rebuild, require, save_model,
                       write_atomically, write_json)

# --- Names: ours, and those in MENTOR's checkpoints, which are CLIP's, T5's and LlamaGen's own

ENCODER = "multimodal_encoder."
VISION, LANGUAGE = f"{ENCODER}vision_model.vision_tower.vision_model.", f"{ENCODER}language_model."
CONNECTOR = f"{ENCODER}language_projection."
ATTENTION, MLP = ".layer.0.SelfAttention.", ".layer.1.DenseReluDense."
PARTS = [  # our prefix, theirs, and what to replace after it, in order
    ("decoder.", "", {"code_embedding": "tok_embeddings", "blocks": "layers", "norm1": "attention_norm",
                      "norm2": "ffn_norm", "mlp": "feed_forward"}),
    ("projector.", "cls_embedding.", {"fc": "cap_proj.fc", "unconditional": "uncond_embedding"}),
    ("encoder.connector.fc", CONNECTOR, {"1.": "0."}),
    ("encoder.connector.", f"{ENCODER}query_connector.", {}),  # ours alone
    ("encoder.vision.", VISION, {
        "class_embedding": "embeddings.class_embedding", "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding.weight", "pre_norm": "pre_layrnorm",  # so spelt
        "post_norm": "post_layernorm", ".norm": ".layer_norm", ".fc": ".mlp.fc", "blocks": "encoder.layers",
        **{f".attention.{x}": f".self_attn.{x}_proj" for x in ("q", "k", "v", "out")}}),
    ("encoder.text.", LANGUAGE, {
        "relative_bias": f"encoder.block.0{ATTENTION}relative_attention_bias", "embedding": "shared",
        "norm.": "encoder.final_layer_norm.", "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm",
        "blocks": "encoder.block", ".wi_": f"{MLP}wi_", ".wo.": f"{MLP}wo.",
        **{f".{x}.": f"{ATTENTION}{x}." for x in "qkvo"}})]
SOURCES = {  # names to leave aside, and the prefix of the others in MENTOR's checkpoints
    "clip": (r"^(text_|visual_|logit_)|position_ids$", VISION),
    "t5": (r"^(decoder|lm_head|encoder\.embed_tokens)\.", LANGUAGE),
    "connector": (r"^(?!model\.mm_projector\.)", CONNECTOR),
    "generator": (f"^(freqs_cis|{ENCODER})", ""),
    "mentor": (r"encoder\.embed_tokens|position_ids$|freqs_cis", ""),  # embed_tokens: `shared` again
    "vq": ("codebook_used", "")}


def released_name(name):
    """A parameter's name in MENTOR's checkpoints."""
    ours, theirs, changes = next(part for part in PARTS if name.startswith(part[0]))
    name = name.removeprefix(ours)
    for old, new in changes.items():
        name = name.replace(old, new)
    return theirs + name


# --- Reading weights


def check_file(path):
    """Raise ValueError if a file is missing, or has not come from Git LFS yet."""
    require(os.path.isfile(path), f"{path}: there is no such file")
    with open(path, "rb") as file:
        require(file.read(20) != b"version https://git-", f"{path} is a Git LFS pointer: run `git lfs pull`")


def read_pickle(path):
    """What torch.save wrote: a zip archive, whose checksums torch ignores, or an older pickle. Runs no code:
    of classes it may hold argparse's Namespace alone, LlamaGen's options."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "it is damaged")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)


def read_weights(path):
    """{name: tensor} of a file, or of a Hub folder with one file or shards."""
    path, kinds = Path(path), ("model.safetensors", "pytorch_model.bin")
    if path.is_dir():
        names = [*(f"{kind}.index.json" for kind in kinds), *kinds]
        path /= next((name for name in names if (path / name).is_file()), " or ".join(kinds))
    check_file(path)
    try:
        if path.suffix == ".json":
            shards = {path.parent / shard for shard in json.loads(path.read_bytes())["weight_map"].values()}
            return {name: tensor for shard in shards for name, tensor in read_weights(shard).items()}
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
        tensors = tensors.get("model", tensors)
        require(tensors and all(map(torch.is_tensor, tensors.values())), "it is no dictionary of tensors")
        return tensors
    except Exception as error:  # a damaged file raises whatever the damage suggests
        reason, refused = repr(error).partition("\\n")[0], re.search(r"GLOBAL (\S+)", str(error))
        if "weights_only" in reason:  # torch's advice is to load it all the same
            reason = f"it asks for {refused[1]}, which may run code" if refused else "it is of another kind"
        raise ValueError(f"{path}: no weights that can be read ({reason})") from None


def released_tensors(source, path):
    """One of SOURCES, {name in MENTOR's checkpoints: tensor}, all finite. Prints what else the file has."""
    (left_out, prefix), own, others = SOURCES[source], {}, []
    for name, tensor in read_weights(path).items():
        if re.search(left_out, name):
            others.append(name)
            continue
        require(tensor.isfinite().all(), f"{path}: {name} holds numbers that are not finite")
        own[prefix + re.sub(r"^(vision_model|model\.mm_projector)\.", "", name)] = tensor.contiguous()
    print(f"{len(own)} tensors from {path}; {len(others)} of other parts left aside: {', '.join(others[:3])}")
    require(own, f"--{source}={path}: has nothing of that part")
    return own


# --- Import and export


def own_options(arguments, names):
    """A command line's options of these names, {name: value}, and its other arguments."""
    found = {a: re.fullmatch(f"--({'|'.join(names)})=(.+)", a) for a in arguments}
    own = {match[1]: match[2] for match in found.values() if match}
    return own, [argument for argument, match in found.items() if not match]


def load(model, tensors):
    """Give a model its tensors. Raises ValueError listing all that do not fit."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None


def import_weights(arguments):
    """Write released weights as finished stages of a run."""
    given, rest = own_options(arguments, (*SOURCES, "spiece", "into", "fresh"))
    require(rest and "vq" in given, "import: needs a preset, such as full, and --vq=FILE")
    run, into, fresh = train.parse(rest), given.pop("into", "pretrain"), given.pop("fresh", "")
    out, tensors = Path(run.out), {}
    require(into in ("pretrain", "align", "instruct"), f"--into={into}: must be pretrain, align or instruct")
    for record in out.glob("*/stage.json"):
        require("imported from" in record.read_text(), f"{record.parent} was trained: choose another --out")
    spiece = given.pop("spiece", os.path.join(given.get("t5", "--spiece=FOLDER"), "spiece.model"))
    check_file(spiece)
    text_tokenizer = TextTokenizer(Path(spiece).read_bytes())
    words, size = text_tokenizer.vocab_size, run.model.text.vocab_size
    require(words <= size, f"--model.text.vocab_size={size}: must be at least {words}, as in {spiece}")

    # see that all fits before anything is written
    torch.manual_seed(run.seed)
    with torch.device("meta"):
        model, vqgan = Mentor(run.model), VQGAN(run.vqgan)
    parts = {source: released_tensors(source, given[source]) for source in SOURCES if source in given}
    load(vqgan, parts.pop("vq"))
    ours = {released_name(name): name for name in model.state_dict()}
    for part in filter(None, fresh.split(",")):
        new = {n: t for n, t in Mentor(run.model).state_dict().items() if f".{part}." in f".{n}"}
        require(new, f"--fresh={fresh}: there is no part {part}")
        tensors |= new
    for source, part in parts.items():
        part = {ours.get(name, name): tensor for name, tensor in part.items()}
        twice = sorted(part.keys() & tensors.keys())[:3]
        require(not twice, f"--{source}={given[source]}: {twice} came from elsewhere already")
        tensors |= part

    # the one change: prefixes use this table's last rows, so others come and go at its front
    name, rows, width = "projector.unconditional", run.model.context, run.model.text.width
    table = tensors.get(name, torch.zeros(rows, width))
    if len(table) != rows and table.shape[1:] == (width,):
        print(f"the unconditional table had {len(table)} rows, now it has {rows}")
        new = torch.randn(max(0, rows - len(table)), width, dtype=table.dtype) * width**-0.5
        tensors[name] = torch.cat([new, table[-rows:]])
    load(model, tensors)

    # weights come last: with them a folder is complete
    record = {"imported from": given, "text tokenizer": text_tokenizer.digest}
    for folder, module in ((out / "tokenizer", vqgan), (out / into, model)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").unlink(missing_ok=True)
        write_json(folder / "stage.json", record)
        save_model(module, folder)
        record["weights of tokenizer"] = file_hash(out / "tokenizer" / "model.safetensors")
    write_atomically(out / "spiece.model", lambda file: file.write_bytes(text_tokenizer.proto))
    write_json(out / "run.json", flatten(run))
    print(f"wrote {out}/tokenizer and {out}/{into}")


def export_weights(arguments):
    """Write a run's newest stage and its VQGAN under their released names."""
    given, rest = own_options(arguments, ("mentor", "vq"))
    require(len(rest) == 1 and len({*map(os.path.realpath, given.values())}) == 2,
            "export: needs a run's folder, --mentor=FILE and --vq=OTHER_FILE")
    for path in given.values():
        require(not os.path.exists(path), f"{path} exists already: give another name")
    stage = sample.newest_stage(rest[0])
    vqgan = stage.parent / "tokenizer" / "model.safetensors"
    require(file_hash(vqgan) in (stage / "stage.json").read_text(), f"{stage} was trained with another VQGAN")
    tensors = {released_name(n): t for n, t in read_weights(stage / "model.safetensors").items()}
    tensors[f"{LANGUAGE}encoder.embed_tokens.weight"] = tensors[f"{LANGUAGE}shared.weight"]
    codes = read_weights(vqgan) | {"quantize.codebook_used": torch.zeros(65536)}
    for path, weights in ((given["mentor"], tensors), (given["vq"], codes)):
        write_atomically(path, functools.partial(torch.save, {"model": weights}))


# --- A manifest: one JSON object a line

FLAGS = {"generation_only": "text_to_image", "do_mask": "segmentation", "do_replace": "recovery"}

# files: of the objects with these labels, if masked their masks, else pictures of them
Entry = namedtuple("Entry", "task text picture labels files masked")


def read_entry(line):
    """Parse a manifest's line, whose fields docs/released.md lists. Raises ValueError naming a wrong one."""
    try:
        record = {**json.loads(line)}
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not one JSON object ({error})") from None
    record.setdefault("image_path", record.get("input_image"))  # as the released backgrounds have it
    objects, flags = record.get("objects"), {flag: record[flag] for flag in FLAGS if record.get(flag)}
    require(list(flags.values()) in ([], [True]), f"{flags}: only one of them, and true")
    several = isinstance(objects, list)
    task = (FLAGS[next(iter(flags))] if flags else
            "reconstruction" if objects is None else "multi_image" if several else "subject_driven")
    alone = task in ("text_to_image", "reconstruction")
    pictures = task == "subject_driven" or several and record.get("input_img_list")
    require(alone or several == (task == "multi_image"), f"objects={objects!r:.80}: {task} needs one name")

    def texts(field, count=1):
        value = record.get(field)
        values = value if isinstance(value, list) else [value]
        require(len(values) == count and all(isinstance(v, str) and v.strip() for v in values),
                f"{field}={value!r:.80}: {task} needs {count} here")
        return values

    picture, = texts("image_path" if alone else "source_image")
    source = record.get("source_image")
    require(task != "reconstruction" or source in (None, picture, [picture]),
            f"source_image={source!r:.80}: must be as image_path, where there are no objects")
    labels = [] if alone else texts("objects", max(1, len(objects)) if several else 1)
    files = texts("input_img_list" if several and pictures else "image_path", len(labels)) if labels else []

    text, images = record.get("input_text") or "", len(labels) or int(task == "reconstruction")
    require(isinstance(text, str), f"input_text={text!r:.80}: must be a text")
    if labels:  # the released code has its lines about the objects in place of this
        text = re.sub(r"^The image( 0)? is (<image>)+\s*", "", text)
    if text.count("<image>") > images:  # one for each token of an image
        text = re.sub("(<image>)+", "<image>", text)
    require(task in ("reconstruction", "segmentation") or text.replace("<image>", "").strip(),
            f"input_text={text!r:.80}: {task} needs a caption")
    entry = Entry(task, text.strip(), picture, labels, files, bool(files and not pictures))
    prompt = entry_prompt(entry)
    prompt.encode()  # raises ValueError at half a character
    count = prompt.count("<image>")
    require(count == images, f"{prompt!r:.80} has {count} <image>, but {task} {images} images")
    return entry


def entry_prompt(entry, caption=True):
    """An entry's prompt; caption: whether reconstruction has it."""
    if "<image>" in entry.text or entry.task == "text_to_image":
        return entry.text
    if entry.task == "reconstruction":
        return "The image is <image>" + (f"\n{entry.text}" if entry.text and caption else "")
    lines = [object_line(label) for label in entry.labels]
    return "\n".join(lines if entry.task == "segmentation" else [*lines, entry.text])


class Manifest:
    """A manifest as a source of samples. Its lines are checked, but only their places kept: millions fit. One
    picture in 50, but at most 128, is held out."""

    def __init__(self, path, size, backgrounds="", bad=None):
        """size: pixels per side of targets; backgrounds: a folder or manifest. A wrong line raises
        ValueError, or is noted in `bad`, {its number: message}."""
        check_file(path)
        self.path, self.root, self.size, self.bad = path, os.path.dirname(path), size, bad
        digest, found, start = 0, array("q"), 0
        for number, line in enumerate(tqdm(open(path, "rb"), "checking", disable=not sys.stderr.isatty()), 1):
            digest = zlib.crc32(line, digest)
            try:
                if line.strip():
                    task, _, picture, _, files, _ = read_entry(line)
                    sizes = [os.path.getsize(self.file(name)) for name in (picture, *files)]
                    digest = zlib.crc32(repr(sizes).encode(), digest)
                    found.extend((start, number, zlib.crc32(picture.encode()), [*TASKS].index(task)))
            except (ValueError, OSError) as error:
                wrong = f"{path} line {number}: {error}"
                require(bad is not None, wrong)
                bad[number] = wrong
            start += len(line)
        require(found, "\n".join((bad or {}).values()) or f"{path}: there is no line")
        self.starts, self.numbers, pictures, tasks = np.array(found).reshape(-1, 4).T
        different = np.unique(pictures)
        self.held_out = pictures < different[min(len(different) // 50, 128)]
        self.task_of, self.backgrounds = np.array([*TASKS], object)[tasks], np.flatnonzero(~self.held_out)
        self.tasks = {*self.task_of[self.backgrounds]}
        if os.path.isdir(backgrounds):
            files = [f for f in walk(backgrounds) if f.suffix.lower() in PICTURES]
            self.backgrounds = [str(f) for f in files if ".mask." not in f.name]
        elif backgrounds:
            other = Manifest(backgrounds, size)
            self.backgrounds = [other.file(other.entry(i).picture) for i in other.backgrounds]
        self.digest = f"{len(tasks)} lines, {digest:08x}; {len(self.backgrounds)} backgrounds"

    def file(self, name):
        """The path of a file that a line names."""
        return os.path.join(self.root, name)

    def entry(self, line):
        """The Entry of a line, counted without the wrong ones."""
        with open(self.path, "rb") as file:  # each time: processes must not share a place in it
            file.seek(self.starts[line])
            return read_entry(file.readline())

    def text_tokenizer(self):
        """A text tokenizer that knows every word of the prompts."""
        return TextTokenizer.train(entry_prompt(self.entry(i)) for i in range(len(self.starts)))

    def dataset(self, mix, seed, prefix_drop=0.0, held_out=False):
        """Samples of the mix's tasks, in the lines' shares."""
        return EntryDataset(self, mix, seed, prefix_drop, held_out)

    def sample(self, line, rng, collate=None):
        """The Sample of a line; with collate its prompt is checked, too."""
        entry = self.entry(line)
        try:
            if collate:
                collate.encode(entry_prompt(entry), entry_prompt(entry).count("<image>"))
            return self.make(entry, rng)
        except ValueError as error:
            raise ValueError(f"{self.path} line {self.numbers[line]}: {error}") from None

    def background(self, entry, rng):
        """The file of another picture than the entry's."""
        for _ in range(1000):
            other = rng.choice(self.backgrounds)
            other = other if isinstance(other, str) else self.file(self.entry(other).picture)
            if os.path.abspath(other) != os.path.abspath(self.file(entry.picture)):
                return other
        raise ValueError("no other picture was found to put behind the object: give --backgrounds")

    def make(self, entry, rng):
        """The Sample of an entry."""
        task, size, file = entry.task, self.size, self.file(entry.picture)
        picture, prompt = load_image(file), entry_prompt(entry, rng.random() < 0.5)
        if entry.masked:
            masks = [load_mask(self.file(name), file) for name in entry.files]
            whole, mask = square_of_object(picture, np.logical_or.reduce(masks), size)
            cut_out = (mask * whole + 0.5).astype(np.uint8)
            if task == "segmentation":
                return Sample(task, prompt, [whole], cut_out)
            if task == "multi_image":
                images = [object_on_black(picture, mask, rng.random() < 0.5) for mask in masks]
                return Sample(task, prompt, images, whole)
            other = file if self.bad is not None else self.background(entry, rng)  # no matter for a check
            pasted = paste_distorted(cut_out, mask, center_crop(load_image(other), size), rng)
            return Sample(task, prompt, [pasted], whole)
        images = [load_image(self.file(name)) for name in entry.files]
        for name, image in zip(entry.files, images):
            tones = ((image > 32) & (image < 224)).mean() if image.shape == picture.shape else 1
            require(tones > 0.02 or np.ptp(image, axis=-1).max() > 16,
                    f"{name} looks like a mask: is do_mask or do_replace missing?")
        images = [picture] if task == "reconstruction" else images
        return Sample(task, prompt, images, center_crop(picture, size))


def object_on_black(picture, mask, box):
    """A masked object's bounding box, or (box=False) its pixels alone, on a black square: uint8 (S, S, 3)."""
    part = Image.fromarray(picture if box else picture * mask[..., None])
    part = part.crop(Image.fromarray(mask).getbbox())
    side = max(part.size)
    x, y = (side - part.width) // 2, (side - part.height) // 2
    return np.asarray(part.crop((-x, -y, side - x, side - y)))


# --- Checking and training


def wrong_lines(manifest, collate, lines):
    """{number: message} of the lines that cannot be used."""
    wrong = {}
    for line in lines:
        try:
            manifest.sample(line, random.Random(line), collate)
        except ValueError as error:
            wrong[int(manifest.numbers[line])] = str(error)
    return wrong


def check(arguments):
    """Open every file of a manifest, list the lines that are wrong, and write the others."""
    given, rest = own_options(arguments, ("clean", "run", "workers"))
    require(len(rest) == 1, "check: needs one manifest, beside its options")
    path, clean, collate, size, bad = rest[0], given.get("clean"), None, 512, {}
    new = not clean or os.path.dirname(clean) == os.path.dirname(path) and not os.path.exists(clean)
    require(new, f"--clean={clean}: must be a new file in the folder of {path}")
    if "run" in given:
        run = rebuild(train.PRESETS["full"], json.loads(Path(given["run"], "run.json").read_bytes()))
        size = run.vqgan.image_size
        collate = Collate(TextTokenizer(Path(given["run"], "spiece.model").read_bytes()), run.model, size)
    manifest = Manifest(path, size, bad=bad)
    look, workers = functools.partial(wrong_lines, manifest, collate), int(given.get("workers", 0))
    batches = DataLoader(range(len(manifest.starts)), 16, num_workers=workers, collate_fn=look)
    for wrong in tqdm(batches, "opening files", unit_scale=16, disable=not sys.stderr.isatty()):
        bad |= wrong
    right = {*manifest.numbers.tolist()} - bad.keys()
    for number in sorted(bad):
        print(bad[number])
    print(f"{len(bad)} lines are wrong, {len(right)} right")
    if clean:
        lines = [line for number, line in enumerate(open(path, "rb"), 1) if number in right]
        write_atomically(clean, lambda file: file.write_bytes(b"".join(lines)))


def train_on(arguments):
    """Run train.py on a manifest."""
    given, rest = own_options(arguments, ("backgrounds",))
    train.main(rest, lambda run: Manifest(run.data, run.vqgan.image_size, **given))


def main(arguments):
    """Run the command line."""
    commands = {"import": import_weights, "export": export_weights, "check": check, "train": train_on}
    if not arguments or {"-h", "--help"} & {*arguments}:
        return print(__doc__)
    require(arguments[0] in commands, f"{arguments[0]}: must be one of {', '.join(commands)}")
    commands[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sample.cli(main, "extras.released")
