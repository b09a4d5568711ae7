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
from data import Sample, Samples, Shapes, load_image, to_picture
from extras import show
from tokenizer import flatten

TINY = str(ROOT / "trained" / "tiny")
PROMPT = Shapes(32).dataset({"subject_driven": 1.0}, 0, held_out=True)[0]
STAR = "A big star at the top left on a green background"

def pictures_in(html):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
            for code in re.findall(r"url\(data:image/png;base64,([\w+/=]*)\)", html)]

@pytest.fixture(scope="module")
def tiny_page(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples.__init__, "__defaults__", (0.0, False, 50))  # of training pictures
        show.main([TINY, f"--out={out}"])
    return out

def test_the_page_needs_nothing_else(tiny_page):
    page = tiny_page.read_text()
    pictures, bare = pictures_in(page), re.sub(r"data:image/png;base64,[\w+/=]*", "", page)
    assert "This run has no log.jsonl" in page and "<svg" not in page and "the nearest of 50 training" in page
    assert not re.search(r"https?:|//\w|<link|@import|src=", bare)
    assert sum(p.shape == (32, 32, 3) for p in pictures) == 4 * 3 * 5 - 3 + 3       # and those inside
    assert bare.count("<figure") == bare.count("</figure>") and not re.search("[A-Z]{4}", bare)

def test_inside_shows_the_drawing_of_sample_py(pipeline):
    page = show.inside(pipeline, PROMPT)
    values, words = json.loads(page["DATA"]), re.findall("<span>(.*?)</span>", page["WORDS"])
    codes, drawn = torch.tensor(values["codes"])[:, :1].T, pipeline.draw([PROMPT])[0]
    assert np.array_equal(pictures_in(page["PICTURE"] + page["SEEN"]), [drawn, drawn, PROMPT.images[0]])
    assert np.array_equal(to_picture(pipeline.vqgan.decode(codes)[0]), drawn)
    assert "".join(words).split()[:2] == PROMPT.prompt.lower().split()[:2] and words[-1] == "&lt;/s&gt;"
    shares = [np.array(values["words"]), *map(np.array, values["seen"])]                # in thousandths
    assert [s.shape for s in shares] == [(64, len(words)), (64, 63), (64, 16)]
    assert np.abs(sum(s.sum(1) for s in shares) - 1000).max() <= (len(words) + 79) / 2
    assert (np.diff(np.array(values["p"])[:, 1:]) <= 0).all() and shares[1].any() and shares[2].any()
    assert all(len(set(codes)) == 5 for codes in values["codes"])
    assert len(json.loads(show.inside(pipeline, Sample("", STAR, []))["DATA"])["seen"]) == 1

def test_attention_and_probabilities_are_those_of_drawing(pipeline, monkeypatch):
    _, probabilities, attention = show.look(pipeline, PROMPT)  # to be those of the cached steps
    attend, maps, logits, guide = F.scaled_dot_product_attention, [], [], sample.guide
    def cached(q, k, v, attn_mask=None, is_causal=False, **options):
        if q.shape[2] == 1:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            maps.append(scores.masked_fill(~attn_mask, -torch.inf).softmax(-1).mean(1)[0, 0])
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", cached)
    monkeypatch.setattr(sample, "guide", lambda x, scale: logits.append(x[0]) or guide(x, scale))
    sample.generate(pipeline.model, pipeline.collate([PROMPT]), pipeline.model.config.sampling,
                    [torch.Generator().manual_seed(0)])
    torch.testing.assert_close(probabilities, torch.stack(logits).softmax(-1), atol=1e-4, rtol=0)
    steps = torch.stack(maps).unflatten(0, (63, -1)).mean(1)                    # (63, cache)
    torch.testing.assert_close(attention[1:], steps[:, : attention.shape[1]], atol=1e-5, rtol=0)
    assert attention[0, -63:].max() == 0                                        # no code was before the first

def test_a_swapped_code_is_decoded_in_its_place(pipeline):
    codes = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    others = torch.stack([codes[0], (codes[0] + 1) % 256], 1)
    sheet, changed = show.swapped(pipeline.vqgan, codes, others), codes.clone()
    changed[0, 19] = others[19, 1]                                                       # row 2, column 3
    whole, new = (to_picture(pipeline.vqgan.decode(c)[0]) for c in (codes, changed))
    assert np.array_equal(sheet[19 * 12 : 20 * 12, :12], whole[4:16, 8:20])
    assert np.array_equal(sheet[19 * 12 : 20 * 12, 12:], new[4:16, 8:20]) and (new != whole).any()
    assert (sheet[:4, :12] == 128).all() and np.array_equal(sheet[4:12, 4:12], whole[:8, :8])  # a corner

def test_the_nearest_training_picture_is_found(pipeline, world, monkeypatch):
    dataset = world.dataset({"text_to_image": 1.0}, 0)
    pool = [dataset[i].target for i in range(20)]
    monkeypatch.setattr(pipeline, "draw", lambda samples: [pool[7]])
    result = show.drawings(pipeline, [dataset[30]], pool)
    want = [pool[7], pool[7], dataset[30].target, *sample.through_codes(pipeline.vqgan, [dataset[30].target])]
    assert np.array_equal(pictures_in(result["ROWS"]), want)
    assert "nearest 1.00<" in result["ROWS"] and result["NEAR"] == "1.00" > result["USUAL"]

def test_curves_compare_what_can_be_compared(tmp_path):
    logs = {"tokenizer": [{"step": 1, "loss": -0.5, "reconstruction": 0.1}],             # with an adversary
            "encoder": [{"step": 10, "loss": 5.0}, {"step": 200, "loss": 2.0, "held_out": 2.0}], "align": []}
    for stage, lines in logs.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer, chart = show.curves(tmp_path).split("</figure>")[:-1]
    points = {name: at.split() for name, at in re.findall(r'class=(\w+) points="([^"]*)"', chart)}
    assert points["train"][-1] == points["held"][-1] == "410.0,206.0" and points["train"][0][:5] == "62.3,"
    assert {"0", "40", "200", "2", "5"} <= set(re.findall(r">([\d.]+)</text>", chart))
    assert "<polyline" in tokenizer and ">0.1</text>" in tokenizer

def test_own_pictures_and_the_logs_that_training_writes(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):  # four subjects, four pictures each
        (folder := tmp_path / "my pets" / "abcd"[i // 4]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), np.uint8)).save(folder / f"{i}.png")
    keys = ["tiny", *SMALL, *few_steps(steps=2, global_batch=2), f"--data={tmp_path}/my pets",
            f"--out={tmp_path}/run"]
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    train.main(keys)
    show.main([f"{tmp_path}/run"])
    page, run = (tmp_path / "run/show.html").read_text(), train.parse(keys)
    assert page.count("<svg") == len(re.findall(r'class=held points="\d', page)) == 5 and "(3.47 is" in page
    count = train.make_dataset("instruct", run, train.open_source(run)).count
    assert f"the nearest of {count} training" in page and ">reference </figcaption>" in page
    command = shlex.split(re.search("</h2>(python .*)<script>", page)[1].replace("&#x27;", "'"))
    assert command[:3] == ["python", "train.py", "tiny"] and train.parse(command[2:]) == run
    keys = ["small", "--vqgan.ch_mult=1,2,4", "--compile=true", "--align.lr=0.002", "--train_scale=0.013"]
    made = train.parse(shlex.split(show.made_by(train.parse(keys)))[2:])
    assert flatten(made) | {"train_scale": 0.013} == flatten(train.parse(keys))

def test_gif_and_guidance_strip(pipeline, monkeypatch, tmp_path, capsys):
    words, star = f"The star in <image>.\n{STAR}", str(ROOT / "assets" / "ref.png")
    show.main([TINY, "--prompt=" + words.replace("\n", r"\n"), f"--images={star}", f"--out={tmp_path}/a.gif"])
    frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(tmp_path / "a.gif"))]
    first, last = frames[0], pipeline.draw([Sample("", words, [load_image(star)])])[0]
    assert len(frames) == 32 and (first[32:] == 200).all() and (first[:32, 32:] == 200).all()
    assert not (first[:32, :32] == 200).all() and np.abs(frames[-1][4::8, 4::8].astype(int) - last).mean() < 8
    monkeypatch.setattr(Samples.__init__, "__defaults__", (0.0, False, 8))  # of 128 prompts
    show.main([TINY, f"--out={tmp_path}/strip.png"])
    assert Image.open(tmp_path / "strip.png").size == (4 * 8 * 32, 4 * 5 * 32)
    rows = re.findall(r"guidance ([\d.]+): CP (\S+), PF (\S+)", capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", "2", "4", "7.5"] and float(rows[1][1]) > 0.6 < float(rows[1][2])

def test_user_errors(tmp_path, monkeypatch, pipeline):
    for arguments, words in (([TINY, "--prompt=A big red zebra"], "zebra"), ([str(ROOT)], "no trained model"),
                             ([TINY, "--prompt=The star in <image>."], "1 <image>, but 0 images")):
        with pytest.raises(ValueError, match=words):
            show.main([*arguments, f"--out={tmp_path}/star.gif"])
    monkeypatch.setitem(pipeline.record, "data", "emoji")
    with pytest.raises(ValueError, match="world of shapes alone"):
        show.guidance(pipeline)
    with pytest.raises(ValueError, match="instruct: not trained on shapes"):
        show.page(pipeline, None, ROOT / "trained" / "tiny" / "instruct")

def test_the_script_in_a_browser(tiny_page):
    if not (browser := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium or google-chrome: the page's script was not run")
    script = """<script>
        const covered = () => [...all('#picture i')].filter(c => c.style.opacity == .85).length
        const text = selector => [...all(selector)].map(x => x.dataset.p).join(' ')
        const state = () => [+slider.value, covered(), text('#best figcaption'), text('span')]
        const first = state(), second = (all('#picture i')[20].click(), state())
        slider.value = 63, slider.oninput()
        document.title = JSON.stringify([first, second, state(), text('#seen figcaption')])
        </script>"""
    page, acted = tiny_page.read_text(), tiny_page.with_name("acted.html")
    acted.write_text(page + script)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", acted.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60)
    *states, seen = json.loads(re.search("<title>(.*)</title>", dom.stdout)[1])
    values = json.loads(re.search(r"const D = (.*), N = D\.p", page)[1])
    for (k, covered, best, words), want in zip(states, ([36, 27], [20, 43], [63, 0]), strict=True):
        assert [k, covered] == want and words == " ".join(f"{w / 10:.1f}%" for w in values["words"][k])
        assert best == " ".join(f"{c}: {p / 10:.1f}%" for c, p in zip(values["codes"][k], values["p"][k]))
    assert seen == " ".join(f"{sum(shares[63]) / 10:.1f}%" for shares in values["seen"])
