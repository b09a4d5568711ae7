"""Two thousand broken things at the loaders: each works or raises one ValueError in a line, never anything else."""

import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import Collate, ManifestDataset, TextTokenizer, load_image
from mentor import Mentor, read_weights
from test_manifest import ALL, folder  # noqa: F401
from test_train import CPU, SHORT
from tokenizer import LPIPS, VQGAN

ODD = [0, -1, 1, 3, 7, 1000, 10**12, 1.5, float("inf"), float("nan"), True, None, "", "x", "\u202e\0", [], [1, -2], {}, {"a": 1}]


def survives(loader, *arguments, named=""):
    """Whether the loader worked; a ValueError of one line that matches `named` is fine too, everything else fails the test."""
    try:
        loader(*arguments)
        return True
    except ValueError as error:
        assert str(error) and "\n" not in str(error).strip() and re.search(named, str(error)), repr(str(error))
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
    run = train.parse(["tiny", *SHORT])[1]
    VQGAN(run.vqgan).save_pretrained(folder / "tokenizer")
    Mentor(run.model).save_pretrained(folder / "instruct")
    (folder / "spiece.model").write_bytes(text_tokenizer.proto)
    train.mentor.write_json(folder / "run.json", train.asdict(run))
    train.mentor.write_json(folder / "instruct" / "stage.json", {"weights of tokenizer": sample.weights_hash(folder / "tokenizer")})
    return folder


def try_file(path, change, loader, count, seed, named=""):
    """Load `count` times with the file changed; returns how often that worked. The file is whole again afterwards."""
    whole, rng, worked = path.read_bytes(), random.Random(seed), 0
    try:
        for _ in range(count):
            path.write_bytes(change(whole, rng))
            worked += survives(loader, named=named)
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


def test_weights_of_the_perceptual_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(LPIPS, "LAYERS", ())  # and so without VGG's 500 MB
    for name in ("vgg16-397923af.pth", "vgg.pth"):
        torch.save({"a": torch.arange(50.0)}, tmp_path / name, _use_new_zipfile_serialization=name == "vgg.pth")
    for name in ("vgg.pth", "vgg16-397923af.pth"):
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 1, 10, len(whole) // 2, len(whole) - 8):
            (tmp_path / name).write_bytes(whole[:cut])
            assert not survives(LPIPS, tmp_path, named=f"{name} is broken")


def test_text_models(out):
    try_file(out / "spiece.model", damaged, lambda: TextTokenizer.from_file(out / "spiece.model").encode("a star in <image>"), 60, 2)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_pictures(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(file)
    try_file(file, damaged, lambda: load_image(file), 40, suffix)
    with pytest.raises(ValueError, match="not a readable image"):  # Pillow's own ValueErrors name no file
        load_image("a\0.png")


@pytest.fixture
def opened(folder, text_tokenizer):  # noqa: F811
    """opened(lines) writes them as a manifest, opens it as a run does and makes a batch of its samples."""
    run = train.replace(train.PRESETS["tiny"], data=str(folder / "m.jsonl"), out=str(folder / "out"), align=train.StageConfig(mix="text_to_image:1,segmentation:1"), stage="align")
    collate = Collate(text_tokenizer, 32, 16, 96, 32)

    def open_manifest(lines, skip_bad=False):
        (folder / "m.jsonl").write_bytes(lines)
        manifest = train.open_source(train.replace(run, skip_bad=skip_bad), CPU)[0]
        dataset = ManifestDataset(manifest, None, 0, 32)
        collate([dataset[i] for i in range(len(manifest))])
        return manifest

    return open_manifest


WHOLE = "".join(json.dumps(record) + "\n" for record in [*ALL, {"image_path": "blue.png"}])


def test_manifests(opened, folder, capsys):  # noqa: F811
    """A value of a line changed, or the bytes damaged; the message names the line, or what the file as a whole lacks."""
    rng, worked, named = random.Random(4), 0, r"m\.jsonl line \d+: |m\.jsonl: the manifest has no line|m\.jsonl has nothing for|the prompt takes"
    for count in range(700):
        lines = WHOLE.splitlines()
        k = rng.randrange(len(lines))
        broken = damaged(WHOLE.encode(), rng) if count % 3 == 0 else b"\n".join([*(line.encode() for line in lines[:k]), damaged_json(lines[k], rng), *(line.encode() for line in lines[k + 1 :])])
        worked += survives(opened, broken, rng.random() < 0.3, named=named)
    assert 100 < worked < 600


def test_odd_texts_in_manifests(opened):
    odd = ["\u202e\0", "\ud800", "\ufeff", "a\tb\r\nc", "\U0001f642 " * 30, "<unk> </s> <pad> <extra_id_0>", "e\u0301" * 50, "\u2028", "x" * 5000, "\x7f\x1b[31m", "<image", "< image >", "%s {} \\ '\""]
    for text in odd:
        lines = "".join(json.dumps({**record, "input_text": text, **({"objects": text} if record.get("objects") == "box" else {})}) + "\n" for record in ALL)
        if survives(opened, lines.encode(), named=r"m\.jsonl line \d+: |the prompt takes"):
            survives(lambda: opened(lines.encode()).text_tokenizer().encode(text))


def test_damaged_pictures_of_a_manifest(opened, folder):  # noqa: F811
    for name, line in (("scene.png", r"[1-6]"), ("mask.png", "[3-6]"), ("blue.png", "[57]")):
        try_file(folder / name, damaged, lambda: opened(WHOLE.encode()), 40, name, named=rf"m\.jsonl line {line}: .*{name}")


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
