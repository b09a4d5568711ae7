"""Released files: weights in and out with the same bits, and manifests, of which no line is misread."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from conftest import ROOT, SMALL, contents, few_steps, randomize, same_weights
from extras import released
from extras.released import CONNECTOR, LANGUAGE, VISION, Manifest, read_entry, read_weights, released_name
from mentor import Mentor
from sample import Pipeline
from tokenizer import VQGAN

def write_released(folder, model, vqgan, proto):
    """Weights as people have them: folders of CLIP and a sharded T5, and files. Returns an import's keys."""
    names = {released_name(n): t.detach() for n, t in model.state_dict().items()}
    part = lambda start: {n.removeprefix(start): t for n, t in names.items() if n.startswith(start)}
    clip = part(VISION.removesuffix("vision_model.")) | {"text_model.a": torch.zeros(1)}
    for name in ("clip", "t5"):
        (folder / name).mkdir()
    save_file(clip, folder / "clip" / "model.safetensors")
    for i in range(2):
        torch.save(dict([*part(LANGUAGE).items()][i::2]), folder / "t5" / f"pytorch_model-{i}-of-2.bin")
    (folder / "t5" / "spiece.model").write_bytes(proto)
    connector = {f"model.mm_projector.{n}": t for n, t in part(CONNECTOR).items()}
    torch.save(connector, folder / "mm_projector.bin", _use_new_zipfile_serialization=False)  # an old pickle
    generator = {n: t for n, t in names.items() if not n.startswith("multimodal")}
    torch.save({"model": generator, "args": Namespace(more=Namespace(x=[1]))}, folder / "generator.pt")
    torch.save({"model": {**vqgan.state_dict(), "quantize.codebook_used": torch.zeros(9)}}, folder / "vq.pt")
    files = "clip=clip", "t5=t5", "connector=mm_projector.bin", "generator=generator.pt", "vq=vq.pt"
    return {f.partition("=")[0]: "--" + f.replace("=", f"={folder}/") for f in files}

@pytest.fixture
def files(tmp_path, text_tokenizer):
    """(keys of an import, the model and the VQGAN whose weights they name)."""
    run = train.parse(["tiny", *SMALL])
    model, vqgan = randomize(Mentor(run.model)), randomize(VQGAN(run.vqgan))
    return write_released(tmp_path, model, vqgan, text_tokenizer.proto), model, vqgan

def run_import(out, keys, *more):
    released.main(["import", "tiny", *SMALL, f"--out={out}", *keys.values(), *more])
    return out

def test_parts_in_then_everything_out_and_in_has_the_same_bits(files, tmp_path, capsys):
    keys, model, vqgan = files
    out = run_import(tmp_path / "out", keys)
    said = capsys.readouterr().out
    assert "clip: 39 tensors, 1 left aside" in said and "vq.pt: 179 tensors, 1 left aside" in said
    assert same_weights(Pipeline(out, "cpu").model, model) and same_weights(Pipeline(out, "cpu").vqgan, vqgan)
    assert f'"t5": "{tmp_path}/t5"' in (out / "pretrain" / "stage.json").read_text()
    released.main(["export", str(out), f"{tmp_path}/new"])
    whole, codes = (torch.load(tmp_path / f"new/{n}.pt")["model"] for n in ("mentor", "vq"))
    words = whole.pop(LANGUAGE + "encoder.embed_tokens.weight")
    assert torch.equal(words, model.encoder.text.embedding.weight)
    assert same_weights(whole, {released_name(n): t for n, t in model.state_dict().items()})
    assert codes.pop("quantize.codebook_used").shape == (65536,) and same_weights(codes, vqgan.state_dict())

    halves = {n: t.bfloat16() for n, t in whole.items()}
    torch.save({"model": halves}, tmp_path / "new" / "halves.pt")
    keys = {"spiece": f"--spiece={tmp_path}/t5/spiece.model", "vq": f"--vq={tmp_path}/new/vq.pt",
            "mentor": f"--mentor={tmp_path}/new/halves.pt"}
    run_import(tmp_path / "again", keys, "--into=instruct")
    tensors = load_file(tmp_path / "again" / "instruct" / "model.safetensors")
    assert same_weights({released_name(n): t for n, t in tensors.items()}, halves)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}

def test_training_goes_on_from_imported_parts_and_nothing_is_overwritten(files, tmp_path):
    out = run_import(tmp_path / "out", files[0])
    train.main(["tiny", *SMALL, f"--out={out}", "--stage=align", *few_steps(steps=1, global_batch=2)])
    assert Pipeline(out / "align", "cpu")
    before = contents(tmp_path)
    for command in (lambda: run_import(out, files[0]), lambda: released.main(["export", str(out), str(out)])):
        with pytest.raises(FileExistsError, match=str(out)):
            command()
    with pytest.raises(ValueError, match="export: needs"):
        released.main(["export", str(out)])
    assert contents(tmp_path) == before

def test_what_does_not_fit_is_named_and_nothing_written(files, tmp_path):
    keys, generator, vq = files[0], read_weights(tmp_path / "generator.pt"), read_weights(tmp_path / "vq.pt")
    torch.save(generator | {"layers.9.odd": torch.zeros(1)}, tmp_path / "odd.pt")
    torch.save(vq | {"encoder.conv_in.bias": torch.full((8,), torch.inf)}, tmp_path / "inf.pt")
    for source, key, more, message in (
            ("connector", "", "", 'Missing.*"encoder.connector.fc1.weight"'),
            ("", "", "--model.decoder.width=64", "size mismatch for .*decoder.output.weight"),
            ("generator", f"--generator={tmp_path}/odd.pt", "", 'Unexpected.*"layers.9.odd"'),
            ("", "", f"--mentor={tmp_path}/generator.pt", "--mentor=.* came from elsewhere already"),
            ("", "", "--into=tokenizer", "--into=tokenizer: must be pretrain, align or instruct"),
            ("vq", "", "", "import: needs .*--vq"), ("vq", "--vq=new", "", "^new: no weights"),
            ("vq", f"--vq={tmp_path}/inf.pt", "", "inf.pt: encoder.conv_in.bias is not finite"),
            ("", "", f"--spiece={tmp_path}/vq.pt", "spiece.model cannot be read"),
            ("t5", "", "", "--spiece=FOLDER/spiece.model"), ("", "", "--mentr=x", "--mentr=x: no such key")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_import(tmp_path / "out", {n: k for n, k in (keys | {source: key, "more": more}).items() if k})
    assert not (tmp_path / "out").exists()

def test_a_new_connector_and_a_table_of_other_length(files, tmp_path, capsys):
    keys, old = files[0] | {"connector": "--connector=new"}, files[1].state_dict()
    old_table, query = old.pop("projector.unconditional"), ["--model.connector=query", "--model.n_query=4"]
    for more, part, rows in (([], "fc1.weight", 80), (query, "queries", 128)):
        out = run_import(tmp_path / part, keys, f"--model.context={rows}", *more)
        assert f"the unconditional table had 96 rows, now it has {rows}" in capsys.readouterr().out
        weights = load_file(out / "pretrain" / "model.safetensors")
        table = weights["projector.unconditional"]
        assert len(table) == rows and torch.equal(table[-80:], old_table[-80:])
        assert weights[f"encoder.connector.{part}"].std() > 0
        assert all(torch.equal(weights[n], t) for n, t in old.items() if ".connector." not in n)
    assert 0.1 < table[:32].std() < 1 and len({released_name(n) for n in weights}) == len(weights)

class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_hold_no_weights_are_named_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {"a": torch.zeros(100)}
    for name, content in (("options", {"model": tensors, "args": Namespace(evil=Evil())}), ("list", [1, 2]),
                          ("numbers", {"model": {"a": 1}}), ("whole", tensors)):
        torch.save(content, f"{name}.pt")
    save_file(tensors, "whole.safetensors")
    Path("evil.bin").write_bytes(pickle.dumps({"model": Evil()}))
    for name in ("whole.pt", "whole.safetensors"):
        Path(f"cut_{name}").write_bytes(Path(name).read_bytes()[:200])
        Path(name.replace("whole", "lfs")).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    for name, reason in (
            ("evil.bin", ""), ("options.pt", "asks for .*system, which may run code"), ("list.pt", ""),
            ("numbers.pt", ""), ("cut_whole.pt", ""), ("cut_whole.safetensors", ""),
            ("missing.pt", "FileNotFound"), ("missing.safetensors", "FileNotFound"),
            ("lfs.pt", "a Git LFS pointer"), ("lfs.safetensors", "a Git LFS pointer needs `git lfs pull`")):
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: no weights.*{reason}") as refused:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()

def test_full_size_has_the_published_parameters():
    full = train.PRESETS["full"]
    with torch.device("meta"):
        model, vqgan = Mentor(full.model), VQGAN(full.vqgan)
    parts = model.encoder.vision, model.encoder.text, vqgan, model.decoder, model
    *exact, decoder, whole = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert exact == [303_179_776, 1_223_527_424, 71_883_403]  # ViT-L/14, Flan-T5-XL, VQ-16
    assert abs(decoder / 775e6 - 1) < 0.01 and abs(whole / 2.3e9 - 1) < 0.02  # LlamaGen-XL, MENTOR
    names, block = {released_name(n) for n in model.state_dict()}, LANGUAGE + "encoder.block."
    assert {"tok_embeddings.weight", "layers.35.feed_forward.w3.weight", "cls_embedding.cap_proj.fc2.weight",
            VISION + "encoder.layers.23.self_attn.out_proj.bias", LANGUAGE + "shared.weight",
            VISION + "embeddings.position_embedding.weight", block + "23.layer.1.DenseReluDense.wi_1.weight",
            block + "0.layer.0.SelfAttention.relative_attention_bias.weight", CONNECTOR + "2.bias"} <= names

GREEN, RED, BLUE, BLACK, WHITE = (0, 160, 0), (200, 0, 0), (0, 0, 220), (0, 0, 0), (255, 255, 255)
BOX = np.s_[4:12, 8:20]  # where the red object stands

def picture(ground=GREEN, box=BOX, color=RED, size=(32, 32)):
    """A box of one colour on a ground of another."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:], pixels[box] = ground, color
    return pixels

def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)

@pytest.fixture
def folder(tmp_path):
    """scene.png with a red box, mask.png of it, second.png (a mask of 0 and 1 elsewhere), blue.png."""
    (tmp_path / "behind").mkdir()
    save(tmp_path / "scene.png", picture())
    save(tmp_path / "mask.png", picture(BLACK, color=WHITE))
    save(tmp_path / "second.png", picture(BLACK, np.s_[20:30, 2:6], (1, 1, 1))[..., 0])
    for name in ("blue.png", "behind/blue.png"):
        save(tmp_path / name, picture(BLUE, np.s_[0:0, 0:0]))
    return tmp_path

RECONSTRUCTION = {"input_text": "a red box on green", "image_path": "scene.png", "source_image": "scene.png"}
T2I = {**RECONSTRUCTION, "input_text": "a box on grass", "generation_only": True, "objects": None}
CUT = {**RECONSTRUCTION, "input_text": "a box on green", "image_path": "mask.png", "objects": "box"}
SEGMENTATION, RECOVERY = {**CUT, "do_mask": True}, {**CUT, "do_replace": True, "do_mask": False}
SUBJECT = {**CUT, "image_path": "blue.png"}
MULTI = {**CUT, "input_text": "both", "image_path": ["mask.png", "second.png"], "objects": ["box", "bar"]}
ALL = [T2I, RECONSTRUCTION, SEGMENTATION, RECOVERY, SUBJECT, MULTI]
TASKS = ["text_to_image", "reconstruction", "segmentation", "recovery", "subject_driven", "multi_image"]

def write(folder, records, name="m.jsonl"):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder / name)

def samples(folder, record, count=20, size=32):
    """Samples of a manifest with one line, and of a blue picture to go behind."""
    manifest = Manifest(write(folder, [record]), size, folder / "behind")
    return [manifest.sample(*manifest.tasks, random.Random(i)) for i in range(count)]

def test_text_to_image_reconstruction_and_segmentation(folder):
    drawn, = samples(folder, T2I, 1)
    assert (drawn.task, drawn.prompt, drawn.images) == ("text_to_image", "a box on grass", [])
    assert (drawn.target == picture()).all()
    rebuilt = samples(folder, RECONSTRUCTION)
    assert all((s.target == picture()).all() and (s.images[0] == picture()).all() for s in rebuilt)
    assert {s.prompt for s in rebuilt} == {"The image is <image>", "The image is <image>\na red box on green"}
    cut, = samples(folder, SEGMENTATION, 1)
    assert cut.prompt == "The box in <image>." and (cut.images[0] == picture()).all()
    assert (cut.target == picture(BLACK)).all()

def test_recovery_pastes_only_the_object_on_another_picture(folder):
    for drawn in samples(folder, RECOVERY):
        assert drawn.prompt == "The box in <image>.\na box on green" and (drawn.target == picture()).all()
        red, green, blue = drawn.images[0].reshape(-1, 3).T.astype(int)
        assert (green == 0).all() and (red > 150).sum() > 20 and (blue > 200).sum() > 500  # nothing else
    save(folder / "behind/dog.mask.png", picture(BLACK))  # no background
    (folder / "behind/same.png").symlink_to("../scene.png")  # never behind itself
    grounds = {tuple(s.images[0][31, 31]) for s in samples(folder, RECOVERY)}
    assert BLUE in grounds and not {GREEN, BLACK} & grounds
    for records in ([T2I, RECOVERY], [T2I, RECOVERY, {**RECOVERY, "source_image": "./scene.png"}]):
        with pytest.raises(ValueError, match="m.jsonl line [23]: no other picture .*--backgrounds"):
            Manifest(write(folder, records), 32).sample("recovery", random.Random(0))
        manifest = Manifest(write(folder, [*records, {**RECOVERY, "source_image": "blue.png"}]), 32)
        for drawn in (manifest.sample("recovery", random.Random(i)) for i in range(20)):
            assert {tuple(drawn.target[31, 31]), tuple(drawn.images[0][31, 31])} >= {BLUE, GREEN}

def test_subject_driven_and_multi_image(folder):
    save(folder / "blue.png", picture(BLUE, np.s_[0:0, 0:0], size=(40, 60)))
    drawn, = samples(folder, SUBJECT, 1)
    assert drawn.prompt == "The box in <image>.\na box on green" and (drawn.target == picture()).all()
    assert drawn.images[0].shape == (40, 60, 3) and (drawn.images[0] == BLUE).all()
    save(folder / "mask.png", picture(BLACK, color=WHITE) * (picture(BLACK, np.s_[4:8, 8:14], WHITE) == 0))
    corners = set()  # of the object one is missing
    for drawn in samples(folder, MULTI):
        assert drawn.prompt == "The box in <image>.\nThe bar in <image>.\nboth"
        box, bar = drawn.images
        assert box.shape == (12, 12, 3) and (box[6:10, 6:] == RED).all() and not box[:2].any()
        assert bar.shape == (10, 10, 3) and (bar[:, 3:7] == GREEN).all() and not bar[:, :3].any()
        assert (drawn.target == picture()).all()
        corners.add(tuple(box[2, 0].tolist()))
    assert corners == {RED, BLACK}  # boxes and cut-outs
    given, = samples(folder, {**MULTI, "input_img_list": ["blue.png", "scene.png"]}, 1)
    assert (given.images[0] == BLUE).all() and (given.images[1] == picture()).all()

def test_the_square_moves_to_show_all_objects(folder):
    wide, box = (32, 96), np.s_[8:24, 70:80]  # at the right, out of the centred square
    save(folder / "scene.png", picture(box=box, size=wide))
    save(folder / "mask.png", picture(BLACK, box, WHITE, wide))
    save(folder / "second.png", picture(BLACK, np.s_[8:24, 84:94], WHITE, wide))
    cut, both = (samples(folder, record, 1)[0].target for record in (SEGMENTATION, MULTI))
    assert (cut == picture(BLACK, np.s_[8:24, 22:32])).all()
    assert (both == picture(GREEN, np.s_[8:24, 8:18])).all()

def test_whole_prompts_and_the_forms_of_the_released_manifests():
    prompts = lambda record, text: read_entry(json.dumps({**record, "input_text": text}).encode()).prompts
    for run in ("<image>", "<image>" * 256):
        assert prompts(SUBJECT, f"Draw the {run} on green") == ["Draw the <image> on green"]
        assert prompts(SUBJECT, f"The image 0 is {run}\na box") == ["The box in <image>.\na box"]
        assert prompts(RECONSTRUCTION, f"The image is {run}\na box") == ["The image is <image>\na box"]
    assert prompts(SEGMENTATION, "The image is <image>") == ["The box in <image>."]
    assert prompts(MULTI, "<image><image> side by side") == ["<image><image> side by side"]
    assert read_entry(b'\xef\xbb\xbf{"image_path": "a.png"}').task == "reconstruction"

def test_jpeg_masks_are_read_and_are_no_references(folder):
    """The released masks are JPEG files (of which the released code takes all above 0)."""
    disc = np.hypot(*(np.mgrid[:160, :160] - 80)) < 50
    save(folder / "scene.png", np.where(disc[..., None], RED, GREEN).astype(np.uint8))
    for quality in (60, 75, 95):
        save(folder / "mask.jpg", disc.astype(np.uint8) * 255, quality=quality)
        cut, = samples(folder, {**SEGMENTATION, "image_path": "mask.jpg"}, 1, 160)
        assert ((cut.target == RED).all(-1) != disc).mean() < 0.002
        with pytest.raises(ValueError, match="mask.jpg looks like a mask: is do_mask or do_replace missing"):
            samples(folder, {**CUT, "image_path": "mask.jpg"}, 1)
    assert samples(folder, {"image_path": "mask.jpg"}, 1)  # but may be rebuilt

@pytest.mark.parametrize("record, message", [
    ("{oops", "not one JSON object"), ("[" * 99_999, "not one JSON object"), ("", "not one JSON object"),
    ("[1]", "not one JSON object"), ({}, "image_path=None: reconstruction needs 1"),
    ({**T2I, "image_path": "scene.pgn"}, "scene.pgn"), ({**CUT, "source_image": "other.png"}, "other.png"),
    ({**CUT, "objects": " "}, "objects=' '"), ({**MULTI, "objects": []}, "objects=.*needs 1"),
    ({**CUT, "source_image": None}, "source_image=None: subject_driven needs 1"),
    ({**T2I, "image_path": ["scene.png", "blue.png"]}, "image_path=.*text_to_image needs 1"),
    ({**T2I, "input_text": 7}, "input_text=7: "), ({**T2I, "input_text": ""}, "input_text='': .* a caption"),
    ({**SUBJECT, "input_text": "The image is <image>"}, "input_text='': subject_driven needs a caption"),
    ({**T2I, "input_text": "half \ud83d"}, "surrogates not allowed"),
    ({**T2I, "input_text": "in <image>"}, "'in <image>' has 1 <image>, but text_to_image 0"),
    ({**SUBJECT, "input_text": "<image> and <image>"}, "has 2 <image>, but subject_driven 1"),
    ({**T2I, "generation_only": "false"}, "'generation_only': 'false'.*only one of them"),
    ({**RECOVERY, "do_mask": True}, "do_mask.*do_replace.*only one of them"),
    ({**RECONSTRUCTION, "source_image": "blue.png"}, "source_image: not scene.png as image_path"),
    ({**MULTI, "objects": ["box", "bar", "lid"]}, "image_path=.*multi_image needs 3"),
    ({**SEGMENTATION, "objects": ["box", "bar"]}, "objects=.*segmentation needs 1")])
def test_a_wrong_line_stops_a_run(folder, record, message):
    path, wrong = folder / "m.jsonl", record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{json.dumps(T2I)}\n{wrong}\n{json.dumps(SEGMENTATION)}")
    with pytest.raises(ValueError, match=f"m.jsonl line 2: .*{message}"):
        Manifest(path, 32)

def test_check_opens_every_file_and_writes_the_right_lines(folder, capsys):
    save(folder / "small.png", picture(size=(32, 40)))
    save(folder / "black.png", picture(BLACK, color=BLACK))
    save(folder / "vast.png", picture(size=(1024, 1024)))
    save(folder / "dot.png", picture(BLACK, np.s_[5:6, 5:6], WHITE, (1024, 1024)))
    (folder / "cut.png").write_bytes((folder / "scene.png").read_bytes()[:60])
    wrong = {"cut.png": {**T2I, "image_path": "cut.png"}, "cut.png:": {**SUBJECT, "image_path": "cut.png"},
             "small.png": {**SEGMENTATION, "image_path": "small.png"},
             "black.png": {**SEGMENTATION, "image_path": "black.png"},
             "the object ": {**SEGMENTATION, "image_path": "dot.png", "source_image": "vast.png"},
             "lost.png": {**T2I, "image_path": "lost.png"}, "objects=7": {**SUBJECT, "objects": 7},
             "tokens, .*context=96": {**RECONSTRUCTION, "input_text": "a red box on green " * 30}}
    path, right = write(folder, ALL + [*wrong.values()]), write(folder, ALL, "right.jsonl")
    released.main(["check", path, f"--run={ROOT}/trained/tiny", "--clean=clean.jsonl"])
    said = capsys.readouterr().out
    assert all(re.search(f"m.jsonl line {n}: .*{reason}", said) for n, reason in enumerate(wrong, 7)), said
    assert said.endswith("8 lines are wrong, 6 right\n") and said.count("\n") == 9
    assert (folder / "clean.jsonl").read_text() == open(right).read()
    for more in ([], ["--clean=m.jsonl"], ["--clean=behind/new.jsonl"]):
        with pytest.raises(ValueError, match="exists already: choose another --clean|Invalid name"):
            released.main(["check", path, *more])

def test_a_picture_is_held_out_with_all_its_lines(folder):
    for i in range(500):
        (folder / f"{i}.png").symlink_to("scene.png")
    records = [{**record, "image_path": f"{i}.png"} for i in range(500) for record in (T2I, {})]
    manifest = Manifest(write(folder, records), 32)
    kept, held = ({task: {manifest.entry(i).picture for i in manifest.usable[task, part]}
                   for task in ("text_to_image", "reconstruction")} for part in (False, True))
    assert 3 < len(held["reconstruction"]) < 20 and held["reconstruction"] == held["text_to_image"]
    assert not any(held[task] & kept[task] for task in kept)

def test_a_digest_is_of_contents_not_of_places(folder):
    path, moved = write(folder, [SEGMENTATION]), folder / "moved" / "m.jsonl"
    shutil.copytree(folder, moved.parent)
    digest = Manifest(path, 32).digest
    assert Manifest(moved, 32).digest == digest != Manifest(path, 32, folder / "behind").digest
    save(folder / "moved" / "mask.png", picture(BLACK, np.s_[3:9, 4:5], WHITE))
    assert Manifest(moved, 32).digest != digest

def test_a_run_on_a_manifest_trains_draws_and_goes_on_only_with_the_same(folder):
    mix = [f"--align.mix={':1,'.join(TASKS)}:1", "--instruct.mix=recovery:1,subject_driven:1"]
    run = ["train", "tiny", *SMALL, *few_steps(steps=2, global_batch=2), *mix, f"--out={folder}/out"]
    released.main([*run, f"--data={write(folder, ALL)}", f"--backgrounds={folder}/behind"])
    assert Image.open(folder / "out" / "sheet.png").height > 32
    assert Pipeline(folder / "out", "cpu").text_tokenizer.unknown_words("The red bar in a box on grass") == []
    with pytest.raises(ValueError, match="data"):
        released.main([*run, f"--data={write(folder, ALL * 2)}", f"--backgrounds={folder}/behind"])
    command = [sys.executable, "-m", "extras.released", "train", "tiny", "--data=lost.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "lost.jsonl" in done.stderr

def test_full_size_in_and_out(tmp_path, text_tokenizer):
    """Files of the true sizes in bfloat16: import, export, the same bits."""
    if os.environ.get("MENTOR_FULL_SIZE") != "1":
        pytest.skip("takes minutes, 16 GiB of memory and 20 GB of disk; MENTOR_FULL_SIZE=1 runs it")
    full = train.PRESETS["full"]
    with torch.device("meta"):
        model, vqgan = Mentor(full.model).bfloat16(), VQGAN(full.vqgan).bfloat16()
    for p in (*model.to_empty(device="cpu").parameters(), *vqgan.to_empty(device="cpu").parameters()):
        p.data.uniform_(-0.03, 0.03)
    keys = write_released(tmp_path, model, vqgan, text_tokenizer.proto)
    released.main(["import", "full", f"--out={tmp_path}/out", *keys.values()])
    released.main(["export", f"{tmp_path}/out", f"{tmp_path}/new"])
    weights = {released_name(n): t for n, t in model.state_dict().items()}
    for source, expected in (("mentor", weights), ("vq", vqgan.state_dict())):
        found = released.released_tensors(source, tmp_path / "new" / f"{source}.pt")
        assert same_weights(found, expected) and {t.dtype for t in found.values()} == {torch.bfloat16}
