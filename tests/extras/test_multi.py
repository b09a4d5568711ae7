"""The query connector and the tasks of several images."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, few_steps, randomize, small_config
from PIL import Image

import data
import sample
import train
from data import COLORS, PATTERNS, Collate, Placed, Scene, Shapes, Subject
from extras import multi
from mentor import Mentor

WORLD, STAR = Shapes(32), ROOT / "assets" / "ref.png"
TEXT = WORLD.text_tokenizer()
CONFIG = small_config(TEXT, connector="query", n_query=3)

@pytest.fixture
def model():
    return randomize(Mentor(CONFIG)).eval()

def samples_of(count, **mix):
    return [WORLD.dataset(mix, 0)[i] for i in range(count)]

def logits(model, samples):
    batch, codes = Collate(TEXT, CONFIG, 32)(samples), torch.arange(64).repeat(len(samples), 1)
    return model(batch, codes, batch.drop)

def test_a_prompt_alone_is_as_in_a_batch(model):
    samples = samples_of(8, text_to_image=1, segmentation=1, multi_image=1, in_context=1)
    assert {len(s.images) for s in samples} == {0, 1, 2, 5}
    together = logits(model, samples)
    for i, s in enumerate(samples):
        torch.testing.assert_close(together[i : i + 1], logits(model, [s]), atol=5e-5, rtol=1e-4)

def test_a_batch_without_images_trains_every_weight_that_others_train(model):
    """Distributed training waits for each gradient, so zeros must come where there are no images."""
    trained = []
    for task in ("multi_image", "text_to_image"):
        model.train().zero_grad()
        logits(model, samples_of(3, **{task: 1})).logsumexp(-1).mean().backward()
        trained.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert trained[0].keys() == trained[1].keys() and trained[0]["encoder.connector.queries"].any()
    assert all(grad.isfinite().all() for grad in trained[1].values())

def test_the_connector_by_hand(model):
    connector, generator = model.encoder.connector, torch.Generator().manual_seed(1)
    patches, words = (torch.randn(2, n, 32, generator=generator) for n in (4, 6))
    def attend(attention, x, y):
        heads = zip(*(z.split(16, -1) for z in (attention.q(x), attention.k(y), attention.v(y))))
        return attention.out(torch.cat([(q @ k.mT / 4).softmax(-1) @ v for q, k, v in heads], -1))
    x = torch.cat([connector.queries.expand(2, -1, -1), connector.word_in(words)], 1)
    for block in connector.blocks:
        x = x + attend(block.attention, block.norm1(x), block.norm1(x))
        x[:, :3] += attend(block.cross_attention, block.norm2(x[:, :3]), connector.patch_norm(patches))
        x = x + block.mlp[2](F.gelu(block.mlp[0](block.norm3(x))))
    padded, mask = F.pad(words, (0, 0, 0, 5), value=1.0), F.pad(torch.ones(2, 6, dtype=torch.bool), (0, 5))
    want = connector.out(connector.norm(x[:, :3]))
    torch.testing.assert_close(connector(patches, padded, mask), want, atol=2e-5, rtol=1e-4)
    assert len(connector.blocks) == 2 and want.shape == (2, 3, 32)
    assert len(Mentor(replace(CONFIG, n_query=0)).encoder.connector.queries) == 4  # one per patch
    with pytest.raises(ValueError, match="model.text.width=32: for queries a multiple of n_head=3"):
        Mentor(replace(CONFIG, text=replace(CONFIG.text, n_head=3)))

def test_words_and_pictures_reach_their_own_prompt(model):
    samples = samples_of(4, multi_image=1)
    before = logits(model, samples)
    picture = replace(samples[1], images=[samples[1].images[0], 255 - samples[1].images[1]])
    words = replace(samples[2], prompt=samples[2].prompt.replace("background", "half"))
    after = logits(model, [samples[0], picture, words, samples[3]])
    assert (before != after).flatten(1).any(1).tolist() == [False, True, True, False]

def test_multi_image_shows_each_subject_alone():
    for i in range(20):
        s = data.TASKS["multi_image"](WORLD, random.Random(i), held_out=i % 2 == 1)
        assert len(s.images) == s.prompt.count("<image>") == 2 and (s.target == WORLD.draw(s.scene)).all()
        for line, placed, image in zip(s.prompt.split("\n"), s.scene.subjects, s.images):
            assert line == f"The {WORLD.label(placed.subject)} in <image>."
            assert (image == WORLD.cut_out(Placed(placed.subject, 4, 1))).all()
            assert (placed.subject in WORLD.held_out_subjects) == (i % 2 == 1)
        assert sum(word in COLORS for word in s.prompt.split()) == 1  # the background's alone

def star(color, color2, pattern, place):
    return Scene(3, 0, (Placed(Subject(4, color, color2, PATTERNS.index(pattern)), place, 1),))

def test_in_context_pairs_follow_one_rule_that_no_word_tells():
    scene, seen, new = star(0, 5, "striped", 5), multi.TRAIN_RULES, multi.HELD_OUT_RULES
    assert multi.follow((4, None), scene) == star(4, 4, "solid", 5)
    assert multi.follow((None, 0), scene) == star(0, 5, "striped", 0)
    assert len(seen) + len(new) == 9 * 5 - 1 and len(new) == 4 and not set(seen) & set(new)
    assert all({rule[part] for rule in seen} == {rule[part] for rule in multi.RULES} for part in range(2))
    judge = sample.Judge(WORLD)
    for i in range(6):
        s = data.TASKS["in_context"](WORLD, random.Random(i), held_out := i % 2 == 1)
        rule = random.Random(i).choice(new if held_out else seen)
        before = judge.read(s.images[::2])
        afters = [WORLD.draw(multi.follow(rule, scene)) for scene in before]
        assert all((a == b).all() for a, b in zip(afters, (*s.images[1::2], s.target), strict=True))
        assert s.scene == multi.follow(rule, before[2]) and (WORLD.draw(before[2]) == s.images[4]).all()
        assert (before[2].subjects[0].subject in WORLD.held_out_subjects) == held_out
        assert s.prompt == "<image> is <image>.\n<image> is <image>.\n<image> is"
    painted = {multi.in_context(WORLD, random.Random(i)).scene.subjects[0].subject for i in range(99)}
    assert painted <= set(WORLD.train_subjects)

def test_the_command_trains_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "held_out_loss", lambda *arguments: 0.0)  # only slow
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    out, keys = tmp_path / "query", ["--model.connector=query", "--instruct.mix=in_context:1,multi_image:1"]
    multi.main(["train", "tiny", *few_steps(steps=2, global_batch=4), *keys, "--model.n_query=2",
                "--device=cpu", f"--out={out}"])
    prompt = r"The star in <image>.\nThe star in <image>.\nA big star at the top on a green background"
    multi.main(["sample", str(out), prompt, *[f"--images={STAR}"] * 2, f"--out={tmp_path}/a.png"])
    assert Image.open(tmp_path / "a.png").size == (256, 256)
    with pytest.raises(ValueError, match="draw: the first argument must be train or sample"):
        multi.main(["draw"])
