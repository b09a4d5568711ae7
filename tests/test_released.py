"""Released weights in and out: every tensor accounted for, nothing read in silence, import then export bit-identical."""

import json
import pickle
import re
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

import mentor
import train
from conftest import SMALL, randomize
from mentor import Mentor, read_weights, released_name
from sample import Pipeline
from tokenizer import VQGAN


@pytest.fixture
def files(tmp_path, text_tokenizer):
    """Random weights as people have them: CLIP and T5 folders, connector, generator, VQ. Returns (keys, model, vqgan)."""
    run = train.parse(["tiny", *SMALL])[1]
    model, vqgan = randomize(Mentor(run.model)), randomize(VQGAN(run.vqgan))
    names = {released_name(n): t for n, t in model.state_dict().items()}
    clip, t5 = "multimodal_encoder.vision_model.vision_tower.", "multimodal_encoder.language_model."
    for folder in ("clip", "t5"):
        (tmp_path / folder).mkdir()
    (tmp_path / "t5" / "spiece.model").write_bytes(text_tokenizer.proto)
    save_file({n.removeprefix(clip): t for n, t in names.items() if n.startswith(clip)}, tmp_path / "clip" / "model.safetensors")
    encoder = {n.removeprefix(t5): t for n, t in names.items() if n.startswith(t5)}
    halves = list(encoder)[::2], list(encoder)[1::2]
    for i, half in enumerate(halves):
        torch.save({n: encoder[n] for n in half}, tmp_path / "t5" / f"part{i}.bin")
    (tmp_path / "t5" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {n: f"part{i}.bin" for i, half in enumerate(halves) for n in half}}))
    torch.save({re.sub(".*language_projection", "model.mm_projector", n): t for n, t in names.items() if "language_projection" in n}, tmp_path / "mm_projector.bin")
    torch.save({"model": {n: t for n, t in names.items() if not n.startswith("multimodal")}}, tmp_path / "generator.pt")
    torch.save({"model": {**vqgan.state_dict(), "quantize.codebook_used": torch.zeros(65536)}}, tmp_path / "vq.pt")
    sources = {"clip": "clip", "t5": "t5", "connector": "mm_projector.bin", "generator": "generator.pt", "vq": "vq.pt"}
    keys = {source: f"--released.{source}={tmp_path / name}" for source, name in sources.items()}
    return keys, model, vqgan


def run_import(tmp_path, keys, *more):
    train.main(["tiny", *SMALL, "--stage=import", f"--out={tmp_path / 'out'}", *keys.values(), *more])


def test_parts_in_then_everything_out_is_bit_identical(files, tmp_path):
    keys, model, vqgan = files
    run_import(tmp_path, keys)
    pipeline = Pipeline.open(tmp_path / "out", "cpu")
    for ours, theirs in ((pipeline.model, model), (pipeline.vqgan, vqgan)):
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    train.main(["tiny", *SMALL, "--stage=export", f"--out={tmp_path / 'out'}", f"--released.mentor={tmp_path}/whole.pt", f"--released.vq={tmp_path}/vq_again.pt"])
    whole = read_weights(tmp_path / "whole.pt")
    assert all(torch.equal(whole[released_name(n)], t) for n, t in model.state_dict().items())
    train.main(["tiny", *SMALL, "--stage=import", f"--out={tmp_path / 'again'}", f"--released.mentor={tmp_path}/whole.pt", f"--released.vq={tmp_path}/vq_again.pt",
                f"--released.spiece={tmp_path}/t5/spiece.model", "--released.into=instruct"])
    again = Pipeline.open(tmp_path / "again" / "instruct", "cpu").model
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_an_export_overwrites_nothing_and_leaves_nothing_half(files, tmp_path, monkeypatch):
    run_import(tmp_path, files[0])

    def export(whole, vq):
        train.main(["tiny", *SMALL, "--stage=export", f"--out={tmp_path / 'out'}", f"--released.mentor={tmp_path / whole}", f"--released.vq={tmp_path / vq}"])

    before = (tmp_path / "vq.pt").read_bytes()
    for names, message in ((("whole.pt", "vq.pt"), "vq.pt exists already: give another name, or delete it"), (("there/whole.pt", "new.pt"), "there/whole.pt: make its folder first"),
                           (("same.pt", "same.pt"), "needs --released.mentor"), (("same.pt", "../" + tmp_path.name + "/same.pt"), "needs --released.mentor")):
        with pytest.raises(ValueError, match=message):
            export(*names)
    assert (tmp_path / "vq.pt").read_bytes() == before

    def full(values, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_pickle", full)
    with pytest.raises(OSError, match="whole.pt could not be written .*No space"):
        export("whole.pt", "new.pt")
    assert not {"whole.pt", "new.pt", "whole.pt.tmp"} & {path.name for path in tmp_path.iterdir()}


def test_what_is_left_aside_is_said_and_a_file_of_nothing_else_refused(files, tmp_path, capsys):
    keys = files[0]
    tensors = {**read_weights(tmp_path / "clip"), **{f"text_model.{i}": torch.zeros(1) for i in range(4)}, "logit_scale": torch.zeros(1)}
    save_file(tensors, tmp_path / "clip" / "model.safetensors")
    run_import(tmp_path, keys)
    said = capsys.readouterr().out
    assert f"{len(tensors) - 5} tensors from {tmp_path}/clip, 5 of other parts left aside (logit_scale, text_model.0, text_model.1, ...)" in said
    assert f"tensors from {tmp_path}/vq.pt, 1 of other parts left aside (quantize.codebook_used)" in said and "generator.pt\n" in said
    with pytest.raises(ValueError, match=r"--released.connector=.*generator.pt: none of its \d+ tensors is of that part \(cls_embedding"):
        run_import(tmp_path, {**keys, "connector": f"--released.connector={tmp_path}/generator.pt"})


def test_options_beside_the_weights_are_read_and_other_classes_named(tmp_path):
    weights = {"a": torch.ones(2)}
    torch.save({"model": weights, "args": Namespace(lr=0.1, nested=Namespace(steps=[1]))}, tmp_path / "options.pt")
    assert torch.equal(read_weights(tmp_path / "options.pt")["a"], weights["a"])
    torch.save({"model": weights, "args": Namespace(path=tmp_path)}, tmp_path / "path.pt")
    with pytest.raises(ValueError) as refused:
        read_weights(tmp_path / "path.pt")
    assert str(refused.value) == f"{tmp_path}/path.pt: not a readable file of torch.save (it asks for pathlib.PosixPath, which may run code: save its tensors alone)"


def test_training_goes_on_from_imported_parts(files, tmp_path, monkeypatch):
    run_import(tmp_path, files[0])
    monkeypatch.setattr(train.sample, "score", lambda *arguments: None)
    train.main(["tiny", *SMALL, f"--out={tmp_path / 'out'}", "--stage=align", "--align.steps=1", "--align.global_batch=2"])
    assert Pipeline.open(tmp_path / "out" / "align", "cpu")


def test_a_table_of_other_length_is_fitted_and_said(files, tmp_path, capsys):
    keys, model, _ = files
    for context, verb in (("80", "was cut from 96 to 80"), ("128", "grew from 96 to 128")):
        run_import(tmp_path, keys, f"--model.context={context}")
        assert verb in capsys.readouterr().out
        table = Pipeline.open(tmp_path / "out", "cpu").model.projector.unconditional
        assert len(table) == int(context) and torch.equal(table[-80:], model.projector.unconditional[-80:])


def test_every_tensor_that_does_not_fit_is_named(files, tmp_path):
    keys, _, _ = files
    with pytest.raises(ValueError, match="missing: .*language_projection"):
        run_import(tmp_path, {k: v for k, v in keys.items() if k != "connector"})
    with pytest.raises(ValueError, match=r"of another shape: .* where the model has"):
        run_import(tmp_path, keys, "--model.decoder.width=64")
    generator = read_weights(tmp_path / "generator.pt")
    torch.save({**generator, "layers.9.odd": torch.zeros(1)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="1 unexpected: layers.9.odd"):
        run_import(tmp_path, {**keys, "generator": f"--released.generator={tmp_path}/odd.pt"})
    with pytest.raises(ValueError, match="--released.fresh=projecter: the model has no part 'projecter'; give vision, connector"):
        run_import(tmp_path, keys, "--released.fresh=projecter")
    assert not (tmp_path / "out" / "pretrain").exists()
    run_import(tmp_path, {k: v for k, v in keys.items() if k not in ("connector", "generator")}, "--released.fresh=connector,decoder,projector")


def test_files_that_are_no_weights_are_refused_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}))
    (tmp_path / "text.bin").write_text("hello")
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:200])
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:200])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "args": Namespace(evil=Evil())}, tmp_path / "options.pt")
    for name in ("evil.pt", "text.bin", "cut.pt", "cut.safetensors", "list.pt", "options.pt", "missing.pt", "."):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        model, vqgan = Mentor(mentor.PRESETS["full"]), VQGAN(train.PRESETS["full"].vqgan)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.encoder.vision) == 303_179_776        # CLIP ViT-L/14's vision tower
    assert count(model.encoder.text) == 1_223_527_424        # Flan-T5-XL's encoder
    assert abs(count(model.decoder) / 775e6 - 1) < 0.01      # LlamaGen-XL
    assert abs(count(model) / 2.3e9 - 1) < 0.02
    assert count(vqgan) == 71_883_403                        # VQ-16 (72M)
    assert len({released_name(n) for n, _ in model.named_parameters()}) == len(list(model.parameters()))


def test_a_trained_stage_is_never_imported_over(files, tmp_path):
    train.main(["tiny", *SMALL, f"--out={tmp_path / 'out'}", "--stage=tokenizer", "--tokenizer.steps=1"])
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="out/tokenizer holds a stage that was trained: choose another --out"):
        run_import(tmp_path, files[0])
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_a_changed_model_key_is_refused(files, tmp_path):
    run_import(tmp_path, files[0])
    with pytest.raises(ValueError, match="--model.connector.n_query=9, but .* was trained with 8"):
        train.main(["tiny", *SMALL, f"--out={tmp_path / 'out'}", "--stage=align", "--model.connector.n_query=9"])
