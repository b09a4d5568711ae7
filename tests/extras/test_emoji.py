"""The emoji world, with drawings made up here, and with a real font where there is one."""

import functools
import itertools
import random
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sample
import train
from conftest import SMALL, few_steps
from data import Placed
from extras import emoji
from extras.emoji import CHANNELS, Emoji, Look

TASKS = ["text_to_image", "reconstruction", "segmentation", "recovery", "subject_driven"]

def draw(self, character):
    """In place of Emoji.glyph: noise with holes, 100 x 80. Some characters have no drawing."""
    noise = np.random.default_rng(ord(character)).integers(0, 256, (8, 10, 4)).astype(np.uint8)
    noise[..., 3] = 255 * (noise[..., 3] > 60) * ("SYMBOL" not in unicodedata.name(character))
    return Image.fromarray(noise * (noise[..., 3:] > 0), "RGBA").resize((100, 80), 0)

@pytest.fixture
def world(monkeypatch, tmp_path):
    font = SimpleNamespace(path=tmp_path / "font.ttf")
    font.path.write_bytes(b"a font")
    monkeypatch.setattr(emoji, "ImageFont", SimpleNamespace(truetype=lambda name, size: font))
    monkeypatch.setattr(Emoji, "glyph", draw)
    monkeypatch.setattr(emoji, "COUNT", 60)
    return Emoji(32)

def read_back(world, subjects):
    """Whether the judge reads true renders of scenes with these subjects."""
    scenes = [world.random_scene(random.Random(i), [subject]) for i, subject in enumerate(subjects)]
    return sample.Judge(world).read([world.draw(scene) for scene in scenes]) == scenes

def test_an_eighth_is_held_out_and_every_word_is_known(world):
    train, held = set(world.train_subjects), set(world.held_out_subjects)
    assert len(world.subjects) == 60 and train | held == set(world.subjects) and not train & held
    assert 2 < len(held) < 15 and world.label(("⌚",)) == "watch" and read_back(world, world.subjects)
    datasets = [world.dataset(dict.fromkeys(TASKS, 1.0), 0, held_out=held) for held in (False, True)]
    prompts = [dataset[i].prompt for dataset in datasets for i in range(60)]
    assert not world.text_tokenizer().unknown_words(" ".join([*prompts, *world.names.values()]))

@pytest.mark.parametrize("task", TASKS)
def test_other_looks_are_for_training_references_alone(world, task):
    seen, held = ([s[0].subject for s in (dataset[i].scene.subjects for i in range(80)) if len(s) == 1]
                  for dataset in (world.dataset({task: 1.0}, 0, held_out=held) for held in (False, True)))
    assert set(held) <= set(world.held_out_subjects) and {s[:1] for s in seen} <= set(world.train_subjects)
    if task == "text_to_image":
        assert {*map(len, seen)} == {1}
        return
    assert {look.channels for look in seen} == {*CHANNELS} and {look.turn for look in seen} == {*range(8)}
    hidden, halves = [look for look in seen if not look.named], [look for look in seen if look.other]
    assert set(halves) <= set(hidden) and {(look.other,) for look in halves} <= set(world.train_subjects)
    shares = len(hidden) / len(seen), len(halves) / max(1, len(hidden))
    assert shares == (0, 0) if task == "recovery" else 0.55 < shares[0] < 0.85 and 0.3 < shares[1] < 0.7
    assert {world.label(look) for look in hidden} <= {"symbol"}
    assert all(s.named for i in range(20) for s in world.random_subjects(random.Random(i), 2))

def test_looks_swap_channels_turn_and_put_halves_together(world):
    (one,), (other,), window = world.subjects[10], world.subjects[20], np.s_[6:26, 6:26]
    plain, second, both = (world.cut_out(Placed(s, 4, 1)) for s in ((one,), (other,), Look(one, other)))
    looks = {turn: world.cut_out(Placed(Look(one, turn=turn), 4, 1))[window] for turn in range(8)}
    for turn, channels in itertools.product(range(8), CHANNELS):  # halves have left the whole as it was
        made = world.cut_out(Placed(Look(one, channels=channels, turn=turn), 4, 1))[window]
        assert (made == looks[turn][..., list(channels)]).all()
    assert {drawing.tobytes() for drawing in looks.values()} == {
        np.rot90(side, turn).tobytes() for side in (plain[window], plain[window][::-1]) for turn in range(4)}
    assert (both == np.concatenate([plain[:, :16], second[:, 16:]], axis=1)).all() and (plain != second).any()

def test_it_trains_and_scores(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    emoji.main(["tiny", *SMALL, *few_steps(steps=1, global_batch=2), f"--out={out}"])
    monkeypatch.setattr(sample, "score", functools.partial(sample.score, prompts=8))
    emoji.main(["score", str(out)])
    assert "true renders  cp 1.000  pf 1.000" in capsys.readouterr().out and (out / "scores.json").is_file()
    (tmp_path / "font.ttf").write_bytes(b"another font")
    for arguments, message in ((["tiny", "--data=x", "--stage=align"], "--data=x: leave it out"),
                               (["score", str(out)], "trained on other data")):
        with pytest.raises(ValueError, match=message):
            emoji.main(arguments)

def test_a_font_is_needed_and_noto_has_1280_emoji(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no.ttf is not among the fonts"):
        patch.setattr(emoji, "FONT", "no.ttf")
        Emoji(32)
    try:
        world = Emoji(32)
    except ValueError as error:
        pytest.skip(str(error))
    assert len(world.subjects) == 1280 and len(world.held_out_subjects) == 162
    world.subjects = world.held_out_subjects  # to judge faster
    assert read_back(world, world.subjects[:30])
