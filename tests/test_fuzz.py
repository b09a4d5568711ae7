"""A thousand broken things at the loaders: each works or raises one ValueError in a line, never anything else."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import TextTokenizer, load_image
from mentor import Mentor, read_weights
from test_train import SMALL
from tokenizer import VQGAN

ODD = [0, -1, 1, 3, 7, 1000, 10**12, 1.5, float("inf"), float("nan"), True, None, "", "x", "\u202e\0", [], [1, -2], {}, {"a": 1}]


def survives(loader, *arguments):
    """Whether the loader worked; a ValueError of one line is fine too, everything else fails the test."""
    try:
        loader(*arguments)
        return True
    except ValueError as error:
        assert str(error) and "\n" not in str(error).strip(), repr(str(error))
        return False


def damaged(data, rng):
    """The bytes cut, overwritten, flipped, repeated or emptied somewhere."""
    data, at, kind = bytearray(data), rng.randrange(len(data)), rng.randrange(6)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at : at + 8] = rng.randbytes(8)
    elif kind == 2:
        for _ in range(20):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)  # the head, where formats keep what matters
    elif kind == 3:
        data[at:at] = data[: rng.randrange(100)]
    elif kind == 4:
        data[at] ^= 1 << rng.randrange(8)
    else:
        return rng.choice([b"", b"\0" * 100, b"hello", rng.randbytes(200), b"[" * 100_000])
    return bytes(data)


def damaged_json(text, rng):
    """One value somewhere in a JSON object replaced, removed or renamed, or else the text damaged."""
    if rng.random() < 0.2:
        return damaged(text.encode(), rng)
    values = json.loads(text)
    inner = values
    while isinstance(inner, dict) and rng.random() < 0.7 and (nested := [v for v in inner.values() if isinstance(v, dict) and v]):
        inner = rng.choice(nested)
    key, kind = rng.choice(list(inner)), rng.randrange(4)
    if kind == 0:
        del inner[key]
    elif kind == 1:
        inner[key + "x"] = inner.pop(key)
    else:
        inner[key] = rng.choice(ODD)
    return json.dumps(values).encode()


@pytest.fixture(scope="module")
def out(tmp_path_factory, text_tokenizer):
    """A folder as training leaves it, with the smallest models."""
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    run = train.parse(["tiny", *SMALL])[1]
    VQGAN(run.vqgan).save_pretrained(folder / "tokenizer")
    Mentor(run.model).save_pretrained(folder / "instruct")
    (folder / "spiece.model").write_bytes(text_tokenizer.proto)
    train.mentor.write_json(folder / "run.json", train.asdict(run))
    train.mentor.write_json(folder / "instruct" / "stage.json", {"weights of tokenizer": sample.weights_hash(folder / "tokenizer")})
    return folder


def try_file(path, change, loader, count, seed):
    """Load `count` times with the file changed; returns how often that worked. The file is whole again afterwards."""
    whole, rng, worked = path.read_bytes(), random.Random(seed), 0
    try:
        for _ in range(count):
            path.write_bytes(change(whole, rng))
            worked += survives(loader)
    finally:
        path.write_bytes(whole)
    assert survives(loader)
    return worked


@pytest.mark.parametrize("name, count", [("instruct/config.json", 60), ("tokenizer/config.json", 60), ("instruct/stage.json", 25), ("run.json", 25)])
def test_json_files(out, name, count):
    def open_all():
        sample.Pipeline.open(out, "cpu").world()

    worked = try_file(out / name, lambda whole, rng: damaged_json(whole.decode(), rng), open_all, count, name)
    assert worked < count


@pytest.mark.parametrize("name, loader", [("tokenizer", VQGAN.from_pretrained), ("instruct", Mentor.from_pretrained)])
def test_weights_of_a_folder(out, name, loader):
    try_file(out / name / "model.safetensors", damaged, lambda: loader(out / name), 40, name)


def test_released_weights(out, tmp_path):
    torch.save({"model": {"a": torch.arange(50.0), "b": torch.zeros(3, 4)}}, tmp_path / "a.pt")
    assert try_file(tmp_path / "a.pt", damaged, lambda: read_weights(tmp_path / "a.pt"), 100, 0) < 50
    torch.save({"a": torch.arange(50.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert not survives(read_weights, tmp_path / "old.bin")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "part.bin").write_bytes((tmp_path / "a.pt").read_bytes())
    index = tmp_path / "hub" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "part.bin", "b": "part.bin"}}))
    assert try_file(index, lambda whole, rng: damaged_json(whole.decode(), rng), lambda: read_weights(tmp_path / "hub"), 30, 1) < 25


def test_text_models(out):
    try_file(out / "spiece.model", damaged, lambda: TextTokenizer.from_file(out / "spiece.model").encode("a star in <image>"), 60, 2)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_pictures(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(file)
    try_file(file, damaged, lambda: load_image(file), 40, suffix)
    with pytest.raises(ValueError, match="not a readable image"):  # Pillow's own ValueErrors name no file
        load_image("a\0.png")


def test_command_lines():
    rng, keys = random.Random(3), list(train.flatten(train.PRESETS["tiny"]))
    values = [*map(str, ODD), "1,2", "(1,2,2)", "9" * 5000, "1e400", "-0.0", "shapes", "text_to_image:nan", "text_to_image:1,segmentation", ":", "🙂"]
    worked = 0
    for _ in range(300):
        arguments = [f"--{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.2:
            arguments.append(rng.choice(["", "--", "-", "=", "--=", "--seed", "---seed=1", "--model=1", "--model.decoder=1", "--vqgan.ch_mult", "--.=1", "x"]))
        worked += survives(train.parse, [rng.choice(["tiny"] * 9 + [""]), *arguments])
    assert 0 < worked < 150
    options = ["--n", "--cfg_scale", "--temperature", "--top_k", "--top_p", "--seed", "--device", "--gif", "--images", "--segment", "--out", "--odd"]
    for _ in range(100):
        survives(sample.parse, ["out/tiny", "A star", *(f"{rng.choice(options)}={rng.choice(values)}" for _ in range(rng.randint(0, 3)))])
