"""Released files: weights in and out with the same bits, and manifests, of which no line is misread."""

import json
import os
import pickle
import random
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from conftest import ROOT, SMALL, contents, few_steps, randomize, same_weights
from data import Collate
from extras import released
from extras.released import LANGUAGE, VISION, Manifest, read_entry, read_weights, released_name
from mentor import Mentor
from sample import Pipeline
from tokenizer import VQGAN, flatten, write_json

# Weights


def write_released(folder, model, vqgan, proto):
    """Weights as people have them: folders of CLIP and a sharded T5, and files. Returns an import's keys."""
    names = {released_name(n): t.detach() for n, t in model.state_dict().items()}
    part = lambda start: {n.removeprefix(start): t for n, t in names.items() if n.startswith(start)}
    for name in ("clip", "t5"):
        (folder / name).mkdir()
    save_file(part(VISION.removesuffix("vision_model.")), folder / "clip" / "model.safetensors")
    t5 = part(LANGUAGE)
    shards = {n: f"part{i % 2}.bin" for i, n in enumerate(t5)}
    for shard in set(shards.values()):
        torch.save({n: t5[n] for n in t5 if shards[n] == shard}, folder / "t5" / shard)
    (folder / "t5" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "t5" / "spiece.model").write_bytes(proto)
    connector = {f"model.mm_projector.{n}": t for n, t in part(released.CONNECTOR).items()}
    torch.save(connector, folder / "mm_projector.bin")
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


def run_import(tmp_path, keys, *more):
    released.main(["import", "tiny", *SMALL, f"--out={tmp_path / 'out'}", *keys.values(), *more])
    return tmp_path / "out"


def test_parts_in_then_everything_out_and_in_has_the_same_bits(files, tmp_path):
    keys, model, vqgan = files
    out = run_import(tmp_path, keys)
    assert same_weights(Pipeline(out, "cpu").model, model) and same_weights(Pipeline(out, "cpu").vqgan, vqgan)
    assert f'"t5": "{tmp_path}/t5"' in (out / "pretrain" / "stage.json").read_text()
    new = [f"--mentor={tmp_path}/whole.pt", f"--vq={tmp_path}/codes.pt"]
    released.main(["export", str(out), *new])
    whole, codes = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["model"] for n in ("whole", "codes"))
    words = whole.pop(LANGUAGE + "encoder.embed_tokens.weight")
    assert torch.equal(words, model.encoder.text.embedding.weight)
    assert same_weights(whole, {released_name(n): t for n, t in model.state_dict().items()})
    assert codes.pop("quantize.codebook_used").shape == (65536,) and same_weights(codes, vqgan.state_dict())
    halves = {n: t.bfloat16() for n, t in whole.items()}
    torch.save({"model": halves}, tmp_path / "halves.pt")
    again = ["--into=instruct", f"--spiece={tmp_path}/t5/spiece.model", f"--out={tmp_path}/again", new[1]]
    released.main(["import", "tiny", *SMALL, *again, f"--mentor={tmp_path}/halves.pt"])
    again = load_file(tmp_path / "again" / "instruct" / "model.safetensors")
    assert same_weights({released_name(n): t for n, t in again.items()}, halves)  # still of 16 bits
    assert Pipeline(tmp_path / "again", "cpu").model


def test_export_overwrites_nothing_and_knows_its_tokenizer(files, tmp_path):
    out = run_import(tmp_path, files[0])
    before = contents(tmp_path)
    for vq, message in (("vq.pt", "vq.pt exists already"), ("new.pt", "export: needs"),
                        (f"../{tmp_path.name}/new.pt", "export: needs")):
        with pytest.raises(ValueError, match=message):
            released.main(["export", str(out), f"--mentor={tmp_path}/new.pt", f"--vq={tmp_path}/{vq}"])
    assert contents(tmp_path) == before
    save_file({"a": torch.zeros(1)}, out / "tokenizer" / "model.safetensors")
    with pytest.raises(ValueError, match="pretrain was trained with another VQGAN"):
        released.main(["export", str(out), f"--mentor={tmp_path}/new.pt", f"--vq={tmp_path}/new_vq.pt"])


def test_training_goes_on_from_imported_parts(files, tmp_path):
    out = run_import(tmp_path, files[0])
    steps = ["--align.steps=1", "--align.global_batch=2", "--align.mix=text_to_image:1"]
    train.main(["tiny", *SMALL, f"--out={out}", "--stage=align", *steps])
    assert Pipeline(out / "align", "cpu")
    before = contents(out)
    with pytest.raises(ValueError, match="out/align was trained: choose another --out"):
        run_import(tmp_path, files[0])
    assert contents(out) == before


def test_what_is_left_aside_is_said_and_a_file_of_nothing_else_refused(files, tmp_path, capsys):
    keys, tensors = files[0], read_weights(tmp_path / "clip")
    others = {f"text_model.{i}": torch.zeros(1) for i in range(4)} | {"logit_scale": torch.zeros(1)}
    save_file(tensors | others, tmp_path / "clip" / "model.safetensors")
    run_import(tmp_path, keys)
    said = capsys.readouterr().out
    assert f"{len(tensors)} tensors from {tmp_path}/clip; 5 of other parts left aside: " in said
    assert "vq.pt; 1 of other parts left aside: quantize.codebook_used" in said and "table" not in said
    with pytest.raises(ValueError, match="--connector=.*generator.pt: has nothing of that part"):
        run_import(tmp_path, {**keys, "connector": f"--connector={tmp_path}/generator.pt"})


def test_a_table_of_other_length_is_fitted_and_said(files, tmp_path, capsys):
    keys, model, _ = files
    for rows in (80, 128):
        out = run_import(tmp_path, keys, f"--model.context={rows}")
        assert f"the unconditional table had 96 rows, now it has {rows}" in capsys.readouterr().out
        table = Pipeline(out, "cpu").model.projector.unconditional
        assert len(table) == rows and torch.equal(table[-80:], model.projector.unconditional[-80:])
    assert table[:32].std() > 0.1


def test_what_does_not_fit_is_named_and_nothing_written(files, tmp_path):
    keys, whole = files[0], {released_name(n): t for n, t in files[1].state_dict().items()}
    torch.save(whole, tmp_path / "whole.pt")
    odd = read_weights(tmp_path / "generator.pt") | {"layers.9.odd": torch.zeros(1)}
    torch.save(odd, tmp_path / "odd.pt")
    for source, key, more, message in (
            ("connector", "", "", 'Missing.*"encoder.connector.fc1.weight"'),
            ("", "", "--model.decoder.width=64", "size mismatch for .*decoder.output.weight"),
            ("generator", f"--generator={tmp_path}/odd.pt", "", 'Unexpected.*"layers.9.odd"'),
            ("", "", f"--mentor={tmp_path}/whole.pt", "--mentor=.* came from elsewhere already"),
            ("", "", "--fresh=projecter", "--fresh=projecter: there is no part projecter"),
            ("", "", "--fresh=connector", r"fc1.bias'.* came from elsewhere already"),
            ("", "", "--into=tokenizer", "--into=tokenizer: must be pretrain, align or instruct"),
            ("vq", "", "", "import: needs .*--vq"), ("t5", "", "", "--spiece=.*there is no such file"),
            ("", "", f"--spiece={tmp_path}/vq.pt", "spiece.model"),
            ("", "", "--model.text.vocab_size=100", "vocab_size=100: must be at least"),
            ("", "", "--mentr=x", "--mentr=x: no such key")):
        with pytest.raises(ValueError, match=message):
            run_import(tmp_path, {n: k for n, k in {**keys, source: key, "more": more}.items() if k})
    assert not (tmp_path / "out").exists()


def test_fresh_parts_are_new_and_the_others_released(files, tmp_path):
    keys, model, _ = files
    del keys["connector"]
    old = {n: t for n, t in model.state_dict().items() if ".connector." not in n}
    query = ["--model.connector=query", "--model.n_query=4"]
    for more, part in (([], "encoder.connector.fc1.weight"), (query, "encoder.connector.queries")):
        folder = run_import(tmp_path, keys, "--fresh=connector", *more) / "pretrain"
        weights = load_file(folder / "model.safetensors")
        assert part in weights and len({released_name(n) for n in weights}) == len(weights)
        assert all(torch.equal(weights[n], t) for n, t in old.items())


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_hold_no_weights_are_named_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors, file = {"a": torch.zeros(100)}, lambda name, content: (tmp_path / name).write_bytes(content)
    file("evil.bin", pickle.dumps({"model": Evil()}))
    torch.save({"model": tensors, "args": Namespace(evil=Evil())}, "options.pt")
    torch.save([1, 2], "list.pt")
    torch.save(tensors, "whole.pt")
    save_file(tensors, "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        file(f"cut_{name}", (tmp_path / name).read_bytes()[:200])
        file(name.replace("whole", "lfs"), b"version https://git-lfs.github.com/spec/v1\nsize 9\n")
    damaged = bytearray((tmp_path / "whole.pt").read_bytes())
    damaged[damaged.index(bytes(400)) + 100] ^= 1  # a bit of the tensor
    file("damaged.pt", damaged)
    for folder in ("hub", "nothing"):
        (tmp_path / folder).mkdir()
    file("hub/model.safetensors.index.json", b'{"weight_map": {"a": "lost.safetensors"}}')
    file("text.bin", b"hello")
    file("empty.pt", b"")
    for name, reason in (
            ("evil.bin", ""), ("options.pt", "asks for .*system, which may run code"), ("list.pt", ""),
            ("cut_whole.pt", ""), ("cut_whole.safetensors", ""), ("damaged.pt", "it is damaged"),
            ("empty.pt", ""), ("text.bin", ""), ("lfs.pt", "is a Git LFS pointer"),
            ("lfs.safetensors", "is a Git LFS pointer"), ("missing.pt", "there is no such file"),
            ("hub", "lost.safetensors: there is no such file"), ("nothing", "there is no such file")):
        with pytest.raises(ValueError, match=f"^{tmp_path / name}.*{reason}") as refused:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_old_pickles_are_read_and_numbers_that_are_not_finite_refused(files, tmp_path):
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pt")["a"], torch.ones(2))
    infinite = {"encoder.conv_in.bias": torch.full((8,), torch.inf)}
    torch.save(files[2].state_dict() | infinite, tmp_path / "inf.pt")
    with pytest.raises(ValueError, match="inf.pt: encoder.conv_in.bias holds numbers that are not finite"):
        run_import(tmp_path, {**files[0], "vq": f"--vq={tmp_path}/inf.pt"})


def test_full_size_has_the_published_parameters():
    full = train.PRESETS["full"]
    with torch.device("meta"):
        model, vqgan = Mentor(full.model), VQGAN(full.vqgan)
    parts = model.encoder.vision, model.encoder.text, vqgan, model.decoder, model
    vision, text, codes, decoder, whole = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert (vision, text, codes) == (303_179_776, 1_223_527_424, 71_883_403)  # ViT-L/14, Flan-T5-XL, VQ-16
    assert abs(decoder / 775e6 - 1) < 0.01 and abs(whole / 2.3e9 - 1) < 0.02  # LlamaGen-XL, MENTOR
    names, block = {released_name(n) for n in model.state_dict()}, LANGUAGE + "encoder.block."
    assert len(names) == len(model.state_dict())
    assert {"tok_embeddings.weight", "layers.35.feed_forward.w3.weight", "cls_embedding.cap_proj.fc2.weight",
            VISION + "encoder.layers.23.self_attn.out_proj.bias", LANGUAGE + "shared.weight",
            VISION + "embeddings.position_embedding.weight", block + "23.layer.1.DenseReluDense.wi_1.weight",
            block + "0.layer.0.SelfAttention.relative_attention_bias.weight"} <= names


# Manifests

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
    save(tmp_path / "scene.png", picture())
    save(tmp_path / "mask.png", picture(BLACK, color=WHITE))
    save(tmp_path / "second.png", picture(BLACK, np.s_[20:30, 2:6], (1, 1, 1))[..., 0])
    save(tmp_path / "blue.png", picture(BLUE, np.s_[0:0, 0:0]))
    return tmp_path


RECONSTRUCTION = {"input_text": "a red box on green", "image_path": "scene.png", "source_image": "scene.png"}
T2I = {**RECONSTRUCTION, "generation_only": True, "objects": None}
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
    write(folder, [{"input_image": "blue.png"}], "blue.jsonl")
    manifest = Manifest(write(folder, [record]), size, str(folder / "blue.jsonl"))
    return [manifest.sample(0, random.Random(i)) for i in range(count)]


def test_text_to_image_reconstruction_and_segmentation(folder):
    for drawn in samples(folder, T2I):
        assert (drawn.task, drawn.prompt, drawn.images) == ("text_to_image", "a red box on green", [])
        assert (drawn.target == picture()).all()
    rebuilt = samples(folder, RECONSTRUCTION)
    assert all((s.target == picture()).all() and (s.images[0] == picture()).all() for s in rebuilt)
    assert {s.prompt for s in rebuilt} == {"The image is <image>", "The image is <image>\na red box on green"}
    cut, = samples(folder, SEGMENTATION, 1)
    assert cut.prompt == "The box in <image>." and (cut.images[0] == picture()).all()
    assert (cut.target == picture(BLACK)).all()


def test_recovery_pastes_only_the_object_on_another_picture(folder):
    areas = set()
    for drawn in samples(folder, RECOVERY):
        assert drawn.prompt == "The box in <image>.\na box on green" and (drawn.target == picture()).all()
        red, green, blue = drawn.images[0].reshape(-1, 3).T.astype(int)
        assert (green == 0).all() and (red > 150).sum() > 20 and (blue > 200).sum() > 500  # nothing else
        areas.add(int((red > 100).sum()))
    assert len(areas) > 5
    save(folder / "dog.mask.png", picture(BLACK))  # no background
    for more, backgrounds in (([{"image_path": "blue.png"}], ""), ([], str(folder))):
        manifest = Manifest(write(folder, [RECOVERY, *more]), 32, backgrounds)
        grounds = {tuple(manifest.sample(0, random.Random(i)).images[0][31, 31]) for i in range(20)}
        assert BLUE in grounds and GREEN not in grounds and "dog" not in str(manifest.backgrounds)
    for records in ([RECOVERY], [RECOVERY, {"image_path": "./scene.png"}]):
        with pytest.raises(ValueError, match="m.jsonl line 1: no other picture .*--backgrounds"):
            Manifest(write(folder, records), 32).sample(0, random.Random(0))


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
    for record, expected in ((SEGMENTATION, picture(BLACK, np.s_[8:24, 22:32])),
                             (MULTI, picture(GREEN, np.s_[8:24, 8:18]))):
        assert (samples(folder, record, 1)[0].target == expected).all()


def test_whole_prompts_and_the_forms_of_the_released_manifests():
    text_of = lambda record, text: read_entry(json.dumps({**record, "input_text": text}).encode()).text
    for run in ("<image>", "<image>" * 256):
        assert text_of(SUBJECT, f"Draw the {run} on green") == "Draw the <image> on green"
        assert text_of(SEGMENTATION, f"The image 0 is {run}\na box") == "a box"
        assert text_of(RECONSTRUCTION, f"The image is {run}\na box") == "The image is <image>\na box"
    assert text_of(MULTI, "<image><image> side by side") == "<image><image> side by side"
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


def test_samples_of_all_tasks_make_a_batch_and_depend_on_seed_and_index(folder):
    manifest = Manifest(write(folder, ALL + [{"image_path": "blue.png"}]), 32)
    tokenizer, mix = manifest.text_tokenizer(), dict.fromkeys(TASKS, 1.0)
    first, again, other = (manifest.dataset(mix, seed, prefix_drop=0.3) for seed in (1, 1, 2))
    batch = Collate(tokenizer, train.PRESETS["tiny"].model, 32)([first[i] for i in range(14)])
    assert set(batch.tasks) == set(TASKS) == manifest.tasks and batch.targets.shape == (14, 3, 32, 32)
    assert 0 < batch.drop.sum() < 14 and first.count == 7 and not (batch.text_ids == tokenizer.UNKNOWN).any()
    for i in reversed(range(14)):
        assert (first[i].target == again[i].target).all() and first[i].mask_seed == again[i].mask_seed
    assert [first[i].prompt for i in range(7)] != [other[i].prompt for i in range(7)]


@pytest.mark.parametrize("record, message", [
    ("{oops", "not one JSON object"), ("[1]", "not one JSON object"), ("[" * 99_999, "not one JSON object"),
    ({**T2I, "image_path": "scene.pgn"}, "scene.pgn"), ({**T2I, "image_path": 7}, "image_path=7: "),
    ({**CUT, "source_image": "other.png"}, "other.png"), ({**MULTI, "objects": []}, "objects=.*needs 1"),
    ({**CUT, "source_image": None}, "source_image=None: subject_driven needs 1"),
    ({**T2I, "image_path": ["scene.png", "blue.png"]}, "image_path=.*text_to_image needs 1"),
    ({**T2I, "input_text": ["a"]}, "input_text=.*must be a text"), ({}, "image_path=None: reconstruction"),
    ({**T2I, "input_text": " "}, "input_text=' ': text_to_image needs a caption"),
    ({**T2I, "input_text": "half \ud83d"}, "surrogates not allowed"),
    ({**T2I, "input_text": "in <image>"}, "'in <image>' has 1 <image>, but text_to_image 0"),
    ({**SUBJECT, "input_text": "<image> and <image>"}, "has 2 <image>, but subject_driven 1"),
    ({**T2I, "generation_only": "false"}, "'generation_only': 'false'.*only one of them"),
    ({**RECOVERY, "do_mask": True}, "do_mask.*do_replace.*only one of them"),
    ({**RECONSTRUCTION, "source_image": "blue.png"}, "source_image='blue.png': must be"),
    ({**MULTI, "objects": ["box"]}, "image_path=.*multi_image needs 1"),
    ({**MULTI, "objects": ["box", "bar", "lid"]}, "image_path=.*multi_image needs 3"),
    ({**SEGMENTATION, "objects": ["box", "bar"]}, "objects=.*segmentation needs one name"),
    ({**SEGMENTATION, "objects": "box <image>"}, "has 2 <image>"), ({**CUT, "objects": " "}, "objects=' '")])
def test_a_wrong_line_stops_a_run_and_check_lists_it(folder, record, message, capsys):
    path, wrong = folder / "m.jsonl", record if isinstance(record, str) else json.dumps(record)
    path.write_text("\n".join([json.dumps(T2I), "", wrong, json.dumps(SEGMENTATION)]))
    with pytest.raises(ValueError, match=f"m.jsonl line 3: .*{message}"):
        Manifest(str(path), 32)
    released.main(["check", str(path), f"--clean={folder}/clean.jsonl"])
    said = capsys.readouterr().out
    assert re.search(f"m.jsonl line 3: .*{message}", said) and "1 lines are wrong, 2 right" in said
    assert (folder / "clean.jsonl").read_text() == f"{json.dumps(T2I)}\n{json.dumps(SEGMENTATION)}"


def test_check_opens_every_file_and_knows_the_context(folder, capsys):
    save(folder / "small.png", picture(size=(32, 40)))
    save(folder / "black.png", picture(BLACK, color=BLACK))
    save(folder / "vast.png", picture(size=(640, 640)))
    save(folder / "dot.png", picture(BLACK, np.s_[5:8, 5:8], WHITE, (640, 640)))
    (folder / "cut.png").write_bytes((folder / "scene.png").read_bytes()[:60])
    wrong = {"cut.png": {**T2I, "image_path": "cut.png"}, "cut.png:": {**SUBJECT, "image_path": "cut.png"},
             "small.png": {**SEGMENTATION, "image_path": "small.png"},
             "black.png": {**SEGMENTATION, "image_path": "black.png"},
             "the object ": {**SEGMENTATION, "image_path": "dot.png", "source_image": "vast.png"},
             "tokens": {**RECONSTRUCTION, "input_text": "a red box on green " * 30}}
    path, right = write(folder, ALL + [*wrong.values()]), write(folder, ALL, "right.jsonl")
    run, clean = folder / "run", f"--clean={folder}/clean.jsonl"
    run.mkdir()
    write_json(run / "run.json", flatten(train.parse(["tiny"])))
    (run / "spiece.model").write_bytes(Manifest(right, 32).text_tokenizer().proto)
    for more in (["--workers=0", clean], ["--workers=2"]):
        released.main(["check", path, f"--run={run}", *more])
        said = capsys.readouterr().out
        for number, reason in enumerate(wrong, 7):
            assert re.search(f"m.jsonl line {number}: .*{reason}", said), said
        assert "6 lines are wrong, 6 right" in said
    assert (folder / "clean.jsonl").read_text() == (folder / "right.jsonl").read_text()
    released.main(["check", write(folder, [RECOVERY, wrong["cut.png"]])])
    assert "1 lines are wrong, 1 right" in capsys.readouterr().out  # a background is another line's matter
    with pytest.raises(ValueError, match="must be a new file in the folder of"):
        released.main(["check", path, f"--clean={run}/clean.jsonl"])
    with pytest.raises(ValueError, match="m.jsonl line 2: .*cut.png: not a readable image"):
        Manifest(path, 32).sample(1, random.Random(0))


def test_a_picture_is_held_out_with_all_its_lines(folder):
    for i in range(150):
        (folder / f"{i}.png").symlink_to("scene.png")
    records = [{**record, "image_path": f"{i}.png"} for i in range(150) for record in (T2I, {})]
    assert not Manifest(write(folder, records[:80]), 32).held_out.any()  # too few pictures
    manifest = Manifest(write(folder, records), 32)
    held = {manifest.entry(i).picture for i in np.flatnonzero(manifest.held_out)}
    assert len(held) == 3 and manifest.held_out.sum() == 6
    kept = manifest.dataset({"text_to_image": 1.0}, 0, held_out=True)
    assert {manifest.entry(i).picture for i in kept.lines} == held


def test_a_digest_is_of_contents_not_of_places(folder):
    path, moved = write(folder, [SEGMENTATION]), folder / "moved"
    moved.mkdir()
    for name in ("scene.png", "mask.png", "m.jsonl"):
        (moved / name).write_bytes((folder / name).read_bytes())
    assert Manifest(str(moved / "m.jsonl"), 32).digest == Manifest(path, 32).digest
    save(moved / "mask.png", picture(BLACK, np.s_[3:9, 4:5], WHITE))
    assert Manifest(str(moved / "m.jsonl"), 32).digest != Manifest(path, 32).digest


def test_a_run_on_a_manifest_trains_draws_and_goes_on_only_with_the_same(folder):
    mix = ["--align.mix=segmentation:1,multi_image:1", "--instruct.mix=recovery:1,subject_driven:1"]
    run = ["train", "tiny", *SMALL, *few_steps(steps=2, global_batch=2), *mix, f"--out={folder}/out"]
    released.main([*run, f"--data={write(folder, ALL)}", f"--backgrounds={folder}"])
    assert Image.open(folder / "out" / "sheet.png").height > 32
    assert Pipeline(folder / "out", "cpu").text_tokenizer.unknown_words("The bar in a box on green") == []
    with pytest.raises(ValueError, match="data"):
        released.main([*run, f"--data={write(folder, ALL * 2)}", f"--backgrounds={folder}"])
    command = f"{sys.executable} -m extras.released train tiny --data=lost.jsonl".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "extras.released: lost.jsonl: there is no such file" in done.stderr


def test_full_size_in_and_out(tmp_path, text_tokenizer):
    """Files of the true sizes in bfloat16: import, export, the same bits."""
    if os.environ.get("MENTOR_FULL_SIZE") != "1":
        pytest.skip("takes minutes, 16 GiB of memory and 20 GB of disk; MENTOR_FULL_SIZE=1 runs it")
    full = train.PRESETS["full"]
    with torch.device("meta"):
        model, vqgan = Mentor(full.model).bfloat16(), VQGAN(full.vqgan).bfloat16()
    for module in (model, vqgan):
        new = lambda tensor: torch.empty_like(tensor, device="cpu").uniform_(-0.03, 0.03)
        module.load_state_dict({n: new(t) for n, t in module.state_dict().items()}, assign=True)
    keys = write_released(tmp_path, model, vqgan, text_tokenizer.proto)
    released.main(["import", "full", f"--out={tmp_path}/out", *keys.values()])
    released.main(["export", f"{tmp_path}/out", f"--mentor={tmp_path}/whole.pt", f"--vq={tmp_path}/codes.pt"])
    weights = {released_name(n): t for n, t in model.state_dict().items()}
    for source, name, expected in (("mentor", "whole.pt", weights), ("vq", "codes.pt", vqgan.state_dict())):
        assert same_weights(released.released_tensors(source, tmp_path / name), expected)
