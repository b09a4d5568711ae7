"""Going on from a trained run: what is taken over, new words, what is refused."""

import copy

import numpy as np
import pytest
from PIL import Image

import train
from conftest import SMALL, contents, few_steps, same_weights
from extras import finetune
from extras.finetune import extended
from sample import Pipeline
from tokenizer import TextTokenizer

KEYS = ["tiny", *SMALL, *few_steps(steps=1, global_batch=2)]

@pytest.fixture(scope="module", autouse=True)
def start(tmp_path_factory):
    """A run of all stages on the world of shapes."""
    out = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_result", lambda *arguments: None)
        train.main([*KEYS, f"--out={out}"])
        yield out

def go_on(start, out, *keys):
    finetune.main([*KEYS, f"--start_from={start}", f"--out={out}", *keys])

def test_new_words_are_added_and_old_ids_stay():
    ours = TextTokenizer.train(["a dog on the beach"])
    longer = extended(ours, TextTokenizer.train(["A zebra on the beach…", "沙滩, a zebra", "x" * 100]))
    assert longer.encode("a dog on the beach") == ours.encode("a dog on the beach")
    assert longer.unknown_words("a zebra, on the beach… 沙滩 dog " + "x" * 100) == []
    assert longer.vocab_size == ours.vocab_size + 6
    assert extended(ours, ours).proto == ours.proto
    with pytest.raises(ValueError, match="x is too long a word"):
        extended(ours, TextTokenizer.train(["x" * 150]))

def test_a_run_goes_on_with_the_world_of_shapes_and_resumes(start, tmp_path, monkeypatch, capsys):
    first, steps = [], train.train_steps
    monkeypatch.setattr(train, "train_steps", lambda stage, *arguments: (
        first.append(copy.deepcopy(stage.model)), steps(stage, *arguments)))
    out, mix = tmp_path / "out", "--instruct.mix=text_to_image:1"
    go_on(start, out, mix)
    old, taken, new = (Pipeline(folder, "cpu") for folder in (start, out / "align", out))
    assert same_weights(first.pop(), old.model) and not first and same_weights(taken.vqgan, old.vqgan)
    assert taken.text_tokenizer.digest == old.text_tokenizer.digest
    assert not same_weights(new.model, old.model) and new.mix == "text_to_image:1"

    files = contents(out)
    go_on(start, out, mix)  # what is finished stays
    assert "holds its weights already" in capsys.readouterr().out and contents(out) == files
    (out / "instruct" / "model.safetensors").unlink()
    go_on(start, out, mix)  # what is not starts from the same
    assert same_weights(first.pop(), old.model) and same_weights(Pipeline(out, "cpu").model, new.model)

def test_a_run_goes_on_with_own_pictures(start, tmp_path):
    folder, out = tmp_path / "rex", tmp_path / "out"
    folder.mkdir()
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), np.uint8)):
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("Rex on a sofa")
    go_on(start / "align", out, f"--data={folder}")  # from any stage
    pipeline, taken, old = (Pipeline(stage, "cpu") for stage in (out, out / "align", start / "align"))
    words, text = pipeline.text_tokenizer, "a big red star at the top"
    assert words.encode(text) == old.text_tokenizer.encode(text) and not words.unknown_words("rex on a sofa")
    assert "4 pictures" in pipeline.record["data"] and same_weights(taken.model, old.model)

def test_what_does_not_fit_is_refused_in_one_line(start, tmp_path):
    go_on(start, used := tmp_path / "used")
    weights = contents(used / "instruct")
    for origin, out, keys, message in (
            (start / "align", used, [], f"used is not empty, and did not start from {start}/align: choose"),
            (start, tmp_path / "a", ["--model.decoder.width=48"], "model.decoder.width=32, this run 48"),
            (start, tmp_path / "b", ["--vqgan.ch=16"], "tokenizer has vqgan.ch=8, this run 16"),
            (start, used, ["--instruct.lr=1"], "instruct has instruct.lr="),
            (start / "tokenizer", used, [], "holds no trained model")):
        with pytest.raises(ValueError, match=message) as refused:
            go_on(origin, out, *keys)
        assert "\n" not in str(refused.value)
    assert contents(used / "instruct") == weights
