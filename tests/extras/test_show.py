"""The page about a run: curves, the nearest training picture, inside a drawing; growth and guidance."""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, few_steps
from PIL import Image, ImageSequence

import sample
import train
from data import Sample, ShapesDataset, to_picture
from extras import show
from tokenizer import flatten

TINY = str(ROOT / "trained" / "tiny")


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def values_of(page):
    return json.loads(re.search(r"const D = (.*), N = D\.p", page)[1])


@pytest.fixture(scope="module")
def prompt(world):
    return ShapesDataset(world, {"subject_driven": 1.0}, 0, held_out=True)[0]


@pytest.fixture(scope="module")
def tiny_page(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShapesDataset, "count", 50)  # the training pictures among which the nearest is sought
        show.main([TINY, f"--out={out}"])
    return out


def test_the_page_needs_nothing_else(tiny_page):
    page = tiny_page.read_text()
    sources, bare = re.findall(r'src="([^"]*)"', page), re.sub(r"data:image/png;base64,[\w+/=]*", "", page)
    assert "This run has no log.jsonl" in page and "<svg" not in page and "the nearest of 50 training" in page
    assert not re.search(r"https?:|//\w|<link|@import|src=[^\"]", bare)
    assert len(sources) == 4 * 3 * 5 - 3 and all(decoded(uri).shape == (32, 32, 3) for uri in sources)
    assert all(bare.count(f"<{t}") == bare.count(f"</{t}>") for t in ("figure", "table", "script", "div"))
    assert not re.search("TITLE|CURVES|POOL|NEAR|USUAL|ROWS|PROMPT|COMMAND|DATA", bare)


def test_inside_shows_the_drawing_of_sample_py(pipeline, prompt):
    values, layers = show.inside(pipeline, prompt), pipeline.model.config.decoder.n_layer
    drawn = to_picture(pipeline.vqgan.decode(torch.tensor(values["codes"])[:, :1].T)[0])
    assert np.array_equal(decoded(values["picture"]), drawn)
    assert np.array_equal(decoded(values["picture"]), pipeline.draw([prompt])[0])
    assert values["words"].count("") == values["patches"] == 16 and values["words"][-1] == "</s>"
    assert "".join(values["words"]).split()[:2] == prompt.prompt.lower().split()[:2]
    attention, others = np.array(values["attention"]), np.array(values["p"])[:, 1:]      # in thousandths
    assert attention.shape == (layers + 1, 64, len(values["words"]) + 63)
    assert np.abs(attention.sum(-1) - 1000).max() <= attention.shape[-1] / 2
    assert np.abs(attention[1:].mean(0) - attention[0]).max() <= 1
    assert (np.diff(others) <= 0).all() and all(len(set(codes)) == 6 for codes in values["codes"])


def test_attention_and_probabilities_are_those_of_drawing(pipeline, prompt, monkeypatch):
    _, probabilities, attention = show.look(pipeline, prompt)  # to be those of the cached steps
    attend, maps, logits, guide = F.scaled_dot_product_attention, [], [], sample.guide

    def cached(q, k, v, attn_mask=None, is_causal=False, **options):
        if q.shape[2] == 1:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            maps.append(scores.masked_fill(~attn_mask, -torch.inf).softmax(-1).mean(1)[0, 0])
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", cached)
    monkeypatch.setattr(sample, "guide", lambda x, scale: logits.append(x[0]) or guide(x, scale))
    sample.generate(pipeline.model, pipeline.collate([prompt]), pipeline.model.config.sampling,
                    [torch.Generator().manual_seed(0)])
    torch.testing.assert_close(probabilities, torch.stack(logits).softmax(-1), atol=1e-4, rtol=0)
    steps = torch.stack(maps).unflatten(0, (63, -1)).transpose(0, 1)            # (layers, 63, cache)
    torch.testing.assert_close(attention[:, 1:], steps[..., : attention.shape[-1]], atol=1e-5, rtol=0)
    assert attention[:, 0, -63:].max() == 0                                     # no code was before the first


def test_a_swapped_code_is_decoded_in_its_place(pipeline):
    codes = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    others = torch.stack([codes[0], (codes[0] + 1) % 256], 1)
    sheet, changed = show.swapped(pipeline.vqgan, codes, others), codes.clone()
    changed[0, 19] = others[19, 1]                                                       # row 2, column 3
    whole = to_picture(pipeline.vqgan.decode(codes)[0])
    new = to_picture(pipeline.vqgan.decode(changed)[0])
    assert np.array_equal(sheet[19 * 12 : 20 * 12, :12], whole[4:16, 8:20])
    assert np.array_equal(sheet[19 * 12 : 20 * 12, 12:], new[4:16, 8:20]) and (new != whole).any()
    assert (sheet[:4, :12] == 128).all() and np.array_equal(sheet[4:12, 4:12], whole[:8, :8])  # a corner


def test_the_nearest_training_picture_is_found(pipeline, world, monkeypatch):
    dataset = ShapesDataset(world, {"text_to_image": 1.0}, 0)
    pool = [dataset[i].target for i in range(20)]
    monkeypatch.setattr(pipeline, "draw", lambda samples: [pool[7]])
    result = show.drawings(pipeline, [dataset[30]], pool)
    (drawn, _), (nearest, words) = re.findall(r'src="([^"]*)"><figcaption>(.*?)<', result["ROWS"])[:2]
    assert drawn == nearest and words == "nearest 1.00" and np.array_equal(decoded(nearest), pool[7])
    assert result["NEAR"] == "1.00" > result["USUAL"]


def test_curves_compare_what_can_be_compared(tmp_path):
    lines = [{"step": 10, "loss": 5.0},
             {"step": 200, "loss": 3.0, "contrastive": 0.5, "hidden_words": 0.5, "held_out": 2.0}]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chart = show.curves(tmp_path, train.PRESETS["tiny"])
    points = {name: at.split() for name, at in re.findall(r'class=(\w+) points="([^"]*)"', chart)}
    assert points["train"][-1] == points["held"][-1] == "410.0,206.0" and points["train"][0][:5] == "62.3,"
    assert points["guess"][0].endswith(",16.0") and chart.count("<svg") == chart.count("</figure>") == 1
    assert {"0", "50", "200", "2", "5.5"} <= set(re.findall(r">([\d.]+)</text>", chart))
    assert "polyline" in show.chart({"train": [(1, -0.5), (2, 0.5)]})                    # an adversarial loss


def test_own_pictures_and_the_logs_that_training_writes(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):  # four subjects, four pictures each
        file = tmp_path / f"my pets/{'abcd'[i // 4]}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)).resize((40, 40)).save(file)
    keys = ["tiny", *SMALL, *few_steps(steps=2, global_batch=2), f"--data={tmp_path}/my pets",
            f"--out={tmp_path}/run"]
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    train.main(keys)
    show.main([f"{tmp_path}/run"])
    page, run = (tmp_path / "run/show.html").read_text(), train.parse(keys)
    assert page.count("<svg") == len(re.findall(r'class=held points="\d', page)) == 4
    dataset = train.make_dataset("instruct", run, train.open_source(run))
    assert int(re.search(r"the nearest of (\d+) training", page)[1]) == dataset.count >= 12
    assert "subject_driven" in page and values_of(page)["images"]
    command = shlex.split(re.search("<pre>(.*)", page)[1].replace("&#x27;", "'"))
    assert command[:3] == ["python", "train.py", "tiny"] and train.parse(command[2:]) == run
    keys = ["small", "--vqgan.ch_mult=1,2,4", "--compile=true", "--align.lr=0.002", "--train_scale=0.013"]
    made = train.parse(shlex.split(show.made_by(train.parse(keys)))[2:])
    assert flatten(made) | {"train_scale": 0.013} == flatten(train.parse(keys))


def test_gif(pipeline, tmp_path):
    words = "A big red star at the top left on a green background"
    show.main(["gif", TINY, words, f"--out={tmp_path}/star.gif"])
    frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(tmp_path / "star.gif"))]
    first, last = frames[0], pipeline.draw([Sample("", words, [])])[0]
    assert len(frames) == 32 and (first[32:] == 200).all() and (first[:32, 32:] == 200).all()
    assert not (first[:32, :32] == 200).all() and np.abs(frames[-1][4::8, 4::8].astype(int) - last).mean() < 8


def test_guidance_strip(monkeypatch, tmp_path, capsys):
    some = show.held_out_samples
    monkeypatch.setattr(show, "held_out_samples", lambda source, task, count: some(source, task, 8))
    show.main(["guidance", TINY, f"--out={tmp_path}/strip.png"])
    assert Image.open(tmp_path / "strip.png").size == (4 * 8 * 34, 4 * 5 * 34)
    rows = re.findall(r"guidance ([\d.]+): CP (\S+), PF (\S+)", capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", "2", "4", "7.5"] and float(rows[1][1]) > 0.6 < float(rows[1][2])


def test_user_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(show, "drawings", lambda *arguments: {})
    monkeypatch.setattr(ShapesDataset, "count", 5)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for arguments, words in (([TINY, "--prompt=A big red zebra"], "zebra"), ([str(ROOT)], "no trained model"),
                             ([TINY, f"--images={tmp_path}/a.png"], "0 <image>, but 1 images")):
        with pytest.raises(ValueError, match=words):
            show.main([*arguments, f"--out={tmp_path}/page.html"])


def test_the_script_in_a_browser(tiny_page):
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium or google-chrome: the page's script was not run")
    script = """<script>
        const covered = () => picture.cells.filter(c => c.style.opacity == .85).length
        const state = () => [$('k').value, covered(), cards[0].label.textContent], states = [state()]
        picture.cells[10].dispatchEvent(new Event('mouseenter')), states.push(state())
        picture.box.dispatchEvent(new Event('mouseleave')), states.push(state())
        picture.cells[20].click(), states.push(state()), $('layer').selectedIndex = 2, $('layer').onchange()
        states.push(words.map(w => w.dataset.p).join(' ')), $('play').click()
        setTimeout(() => { document.title = JSON.stringify([...states, state()]) }, 20000)
        </script>"""
    page, acted = tiny_page.read_text(), tiny_page.with_name("acted.html")
    acted.write_text(page + script)
    command = f"{browser} --headless --no-sandbox --disable-gpu --virtual-time-budget=30000 --dump-dom"
    dom = subprocess.run([*command.split(), acted.as_uri()], capture_output=True, text=True, timeout=60)
    states, values = json.loads(re.search("<title>(.*)</title>", dom.stdout)[1]), values_of(page)
    assert [s[:2] for s in states[:4]] == [["36", 27], ["36", 53], ["36", 27], ["20", 43]]
    for k, (_, _, label) in zip((36, 10, 36, 20), states):
        assert label == f"{values['codes'][k][0]}: {values['p'][k][0] / 10:.1f}%"
    assert states[4].split() == [f"{w / 10:.1f}%" for w in values["attention"][2][20][: len(values["words"])]]
    assert states[5][:2] == ["63", 0]
