"""Going on from a trained run: what is taken over, new words, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import sample
import train
from conftest import SMALL, contents, few_steps, same_weights
from extras import finetune
from extras.finetune import extended
from tokenizer import TextTokenizer, load_model

KEYS = ["tiny", *SMALL, *few_steps(steps=1, global_batch=2)]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of all stages on the world of shapes."""
    out = tmp_path_factory.mktemp("start") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_result", lambda *arguments: None)
        train.main([*KEYS, f"--out={out}"])
    return out


def finetune_from(start, out, *keys):
    finetune.main([*KEYS, f"--start_from={start}", f"--out={out}", *keys])


def test_new_words_are_added_and_old_ids_stay():
    ours = TextTokenizer.train(["a dog on the beach"])
    others = TextTokenizer.train(["A zebra on the beach…", "沙滩, a zebra", "x" * 100])
    longer = extended(ours, others)
    assert longer.encode("a dog on the beach") == ours.encode("a dog on the beach")
    assert longer.unknown_words("a zebra, on the beach… 沙滩 dog " + "x" * 100) == []
    assert longer.vocab_size == ours.vocab_size + 6 and longer.digest != ours.digest
    assert extended(ours, TextTokenizer.train(["beach dog"])).proto == ours.proto
    with pytest.raises(ValueError, match="x: such a long word cannot be added"):
        extended(ours, TextTokenizer.train(["x" * 150]))


def test_a_run_goes_on_with_the_world_of_shapes(start, tmp_path, monkeypatch, capsys):
    models = []

    def steps(stage, *arguments):
        models.append({name: tensor.clone() for name, tensor in stage.model.state_dict().items()})
        return train_steps(stage, *arguments)

    train_steps = train.train_steps
    monkeypatch.setattr(train, "train_steps", steps)
    out = tmp_path / "out"
    finetune_from(start, out, "--instruct.mix=text_to_image:1")
    before, old = (sample.Pipeline(folder, "cpu") for folder in (out / "align", start))
    assert same_weights(models[0], old.model) and same_weights(before.model, old.model) and len(models) == 1
    assert same_weights(before.vqgan, old.vqgan)
    assert before.text_tokenizer.digest == old.text_tokenizer.digest
    assert not same_weights(sample.Pipeline(out, "cpu").model, old.model)

    # resume: a stage that is not finished starts from the same, a finished one stays
    files = contents(out)
    finetune_from(start, out, "--instruct.mix=text_to_image:1")
    assert "holds its weights already" in capsys.readouterr().out and contents(out) == files
    (out / "instruct" / "model.safetensors").unlink()
    finetune_from(start, out, "--instruct.mix=text_to_image:1")
    assert same_weights(models[1], old.model) and contents(out).keys() == files.keys()


def test_a_run_goes_on_with_own_pictures(start, tmp_path):
    folder = tmp_path / "rex"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("Rex on a sofa")
    finetune_from(start, tmp_path / "out", f"--data={folder}")
    pipeline, old = sample.Pipeline(tmp_path / "out", "cpu"), sample.Pipeline(start, "cpu")
    text = "a big red star at the top"
    assert pipeline.text_tokenizer.encode(text) == old.text_tokenizer.encode(text)
    assert not pipeline.text_tokenizer.unknown_words("the star in rex on a sofa")
    assert "4 pictures" in pipeline.record["data"] and pipeline.mix == train.PRESETS["tiny"].instruct.mix
    finetune_from(start / "align", tmp_path / "other", f"--data={folder}")  # any stage can be the start
    assert same_weights(load_model(train.Mentor, train.MentorConfig(), tmp_path / "other" / "align"),
                        sample.Pipeline(start / "align", "cpu").model)


def test_what_does_not_fit_is_refused(start, tmp_path):
    used = tmp_path / "used"
    finetune_from(start, used)
    files = contents(used)
    for origin, out, keys, message in (
            (start / "align", used, [], f"used is not empty, and did not start from {start}/align: choose"),
            (start, start, [], "is not empty, and did not start from"),
            (start, tmp_path / "a", ["--model.decoder.width=48"], "decoder.width=32, this run 48"),
            (start, tmp_path / "b", ["--vqgan.ch=16"], "tokenizer has vqgan.ch=8, this run 16"),
            (start, used, ["--instruct.lr=1"], "instruct has instruct.lr="),
            (tmp_path, used, [], "holds no trained model"),
            (start / "tokenizer", used, [], "holds no trained model")):
        with pytest.raises(ValueError, match=message):
            finetune_from(origin, out, *keys)
    assert contents(used) == files and json.loads((start / "run.json").read_text())["stage"] == "all"
