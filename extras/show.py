"""A page about a run, to look at or to project; a picture growing; what guidance does.

    python -m extras.show out/pets --prompt="A dog on a beach"  # writes out/pets/show.html
    python -m extras.show out/tiny --out=star.gif --prompt="A big red star at the top on a pink background"
    python -m extras.show out/tiny --out=guidance.png           # rows at guidance 1, 2, 4 and 7.5
"""

import argparse
import base64
import io
import json
import re
import shlex
from dataclasses import replace
from html import escape
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import sample
import train
from data import Sample, Shapes, center_crop, load_image, to_picture, tokenizer_pixels
from tokenizer import flatten, rebuild, require

# --- Curves ---


def chart(lines):
    """SVG of {class: [(step, loss)]}; the loss's axis is logarithmic."""
    x, y = np.array(sum(lines.values(), [])).T
    last, low, high, parts = x.max(), y.min(), 1.001 * y.max(), ""

    def at(step, loss):
        return 44 + 366 * step / last, 206 - 190 * np.log(loss / low) / np.log(high / low)

    for step, loss in zip(np.linspace(0, last, 6), np.geomspace(low, high, 6)):
        x, y = at(step, loss)
        parts += f'<path d="M44 {y}H410"/><text x=0 y={y + 5}>{loss:.3g}</text>'
        parts += f"<text x={x - 10} y=228>{step:.0f}</text>"
    for name, line in lines.items():  # the last point twice: a line of one point is a dot
        points = " ".join("%.1f,%.1f" % at(*point) for point in line + line[-1:])
        parts += f'<polyline class={name} points="{points}"/>'
    return f'<svg viewBox="0 0 440 232">{parts}</svg>'


def curves(root):
    """Each stage's chart, without the losses that only help training: the held-out loss lacks them too."""
    charts = ""
    for stage in train.STAGES:
        log = root / stage / "log.jsonl"
        lines = [json.loads(line) for line in open(log)] if log.is_file() else []
        if lines:
            charts += f"<figure class=chart>{stage}" + chart({
                "train": [(x["step"], x.get("reconstruction", x["loss"])) for x in lines],
                "held": [(x["step"], x["held_out"]) for x in lines if "held_out" in x]}) + "</figure>"
    return charts or "This run has no log.jsonl."


# --- Does it draw or remember? ---


def uri(picture):
    """A picture, uint8 (H, W, 3), as a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(picture, words, side=0):
    """A picture behind side x side cells that can hide it, and words below."""
    box = f'<div style="--side: {side}; background-image: url({uri(picture)})">{"<i></i>" * side**2}</div>'
    return f"<figure>{box}<figcaption>{words}</figcaption></figure>"


def held_out_samples(source, task, count):
    """Samples that training did not see; or training samples, if none is held out."""
    dataset = source.dataset({task: 1.0}, "show", held_out=True)
    dataset = dataset if dataset.count else source.dataset({task: 1.0}, "show")
    return [dataset[i] for i in range(min(count, dataset.count))]


def features(pipeline, pictures):
    """Pictures -> (M, N * C), whose products are the mean cosines of their codes' vectors."""
    images = torch.stack([tokenizer_pixels(p, pipeline.size) for p in pictures]).to(pipeline.device)
    vectors = pipeline.vqgan.quantize.codebook().detach()[pipeline.vqgan.encode(images)]
    return vectors.flatten(1) / vectors.shape[1] ** 0.5


def drawings(pipeline, samples, pool):
    """A row of pictures for each sample, and the means of the numbers below them."""
    asked, rows = [s.target for s in samples], ""
    drawn, made = pipeline.draw(samples), sample.through_codes(pipeline.vqgan, asked)
    near, which = (features(pipeline, drawn + asked) @ features(pipeline, pool).T).max(1)
    near, usual = near.chunk(2)
    for i, s in enumerate(samples):
        figures = [*(figure(center_crop(p, pipeline.size), "reference") for p in s.images),
                   figure(drawn[i], "drawn"), figure(pool[which[i]], f"nearest {near[i]:.2f}"),
                   figure(asked[i], f"asked for {usual[i]:.2f}"), figure(made[i], "tokenizer")]
        rows += f"<div class=row><b>{escape(s.prompt)}</b><div>{''.join(figures)}</div></div>"
    return {"ROWS": rows, "NEAR": f"{near.mean():.2f}", "USUAL": f"{usual.mean():.2f}"}


# --- Inside one drawing ---


@torch.no_grad()
def look(pipeline, prompt):
    """Draw a Sample's prompt: its codes (1, N), the model's probabilities for each (N, V), before guidance
    and temperature, and the attention behind them, to prompt and codes before, (N, P + N - 1)."""
    model, batch = pipeline.model, pipeline.collate([prompt]).to(pipeline.device)
    chance = torch.Generator(pipeline.device).manual_seed(0)
    codes = sample.generate(model, batch, model.config.sampling, [chance])
    attend, maps = F.scaled_dot_product_attention, []

    def watched(q, k, v, **options):
        if options.get("is_causal"):  # the decoder's
            scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (1, H, T, T)
            later = torch.ones_like(scores).triu(1).bool()
            maps.append(scores.masked_fill(later, -torch.inf).softmax(-1).mean((0, 1)))
        return attend(q, k, v, **options)

    with patch.object(F, "scaled_dot_product_attention", watched):
        logits = model(batch, codes, batch.drop)[0]
    return codes, logits.softmax(-1), torch.stack(maps).mean(0)[batch.lengths - 1 :]


def swapped(vqgan, codes, others):
    """Each code in turn exchanged and decoded: codes (1, N), others (N, K) -> N rows of K cut-outs, 3 x 3
    cells around the code."""
    rows, side, cell = [], vqgan.config.grid_size, vqgan.config.cell
    for k, other in enumerate(tqdm(others, "decoding")):
        changed = codes.repeat(len(other), 1)
        changed[:, k] = other
        images = F.pad(vqgan.decode(changed), (cell,) * 4)[:, :, k // side * cell :, k % side * cell :]
        rows.append(to_picture(torch.cat([*images[:, :, : 3 * cell, : 3 * cell]], -1)))
    return np.concatenate(rows)


def inside(pipeline, prompt):
    """What the page shows of the drawing of one prompt, a Sample."""
    text, vqgan, n_patch = pipeline.text_tokenizer, pipeline.vqgan, pipeline.model.config.image_tokens
    codes, chances, attention = look(pipeline, prompt)
    others = chances.scatter(1, codes.T, 2.0).topk(5).indices  # the drawn one first
    ids = torch.tensor(pipeline.collate.encode(prompt.prompt, len(prompt.images)))
    is_word, to_prompt, to_codes = ids != text.image_id, attention[:, : len(ids)], attention[:, len(ids) :]
    to_images = to_prompt[:, ~is_word].split(n_patch, 1)[: len(prompt.images)]
    p, words, *seen = ((1000 * x).round().int().tolist()
                       for x in (chances.gather(1, others), to_prompt[:, is_word], to_codes, *to_images))
    names = (text.pieces.id_to_piece(i).replace("▁", " ") for i in ids[is_word].tolist())
    drawn, side, n = to_picture(vqgan.decode(codes)[0]), vqgan.config.grid_size, round(n_patch**0.5)
    figures = [figure(center_crop(x, pipeline.size), "reference ", n) for x in prompt.images]
    return {"PROMPT": escape(prompt.prompt), "PICTURE": figure(drawn, "", side),
            "SHEET": uri(swapped(vqgan, codes, others)),
            "WORDS": "".join(f"<span>{escape(name)}</span>" for name in names),
            "SEEN": "".join([figure(drawn, "codes before ", side), *figures]),
            "DATA": json.dumps({"codes": others.tolist(), "p": p, "words": words, "seen": seen})}


# --- The page ---

PAGE = """<!doctype html><meta charset=utf-8><title>TITLE</title><style>
body { background: #fbfaf6; font: 17px/1.5 system-ui; width: 1160px; margin: 60px auto;
  image-rendering: pixelated }
h2 { font: 34px Georgia, serif; margin: 60px 0 12px }
figure { display: inline-block; width: 100px; margin: 0 10px 12px 0 }
figure div { aspect-ratio: 1; background-size: cover; display: grid;
  grid: repeat(var(--side), 1fr) / repeat(var(--side), 1fr) }
figcaption, svg { font-size: 13px; opacity: .75 }
path { stroke: #ddd }
polyline { fill: none; stroke: currentColor }
.chart { width: 540px }
.train { color: #4c86c0 }
.held { color: #d9702e; stroke-width: 4; stroke-linecap: round }
.row { display: flex; gap: 20px }
.row > * { flex: 1 }
.row b { white-space: pre-wrap; font-weight: normal }
#picture figure, input { width: 100%; accent-color: #d9702e }
#best div { background: url(SHEET) 0 / 500% }
#seen figure { width: 240px }
i { background: #fbfaf6; color: #d9702e }
[data-p]::after { content: attr(data-p) }
span { display: inline-block; padding: 2px 6px }
span::after { display: block; font-size: 11px }
</style><h2>TITLE: how it learned</h2><p>Loss by step, <b class=train>training</b> and
<b class=held>held out</b>: in nats per code (GUESS is guessing), of the tokenizer a squared error.</p>
CURVES<h2>What it draws</h2><p>Beside each drawing is the nearest of POOL training pictures, by the mean
cosine of the codes' vectors. Drawings are NEAR near on average, what was asked for USUAL; one that is much
nearer is remembered. Last is what the tokenizer makes of the picture asked for.</p>ROWS
<h2>Inside one drawing</h2><p>Click a code, or move the slider. Probabilities are the model's, before guidance
and temperature; attention is averaged over layers and heads.</p>
<div class=row><div id=picture>PICTURE<input type=range></div>
<div><b>PROMPT</b><p>Drawn code, and the best others</p><div id=best>CARDS</div><p>Attention</p><p>WORDS</p>
<div id=seen>SEEN</div></div></div><h2>How it was made</h2>COMMAND<script>
const D = DATA, N = D.p.length, all = (selector, part = document) => part.querySelectorAll(selector)
const [slider] = all('input'), percent = w => (w / 10).toFixed(1) + '%'
function show(k) {
  slider.value = k
  all('#picture i').forEach((c, i) => {
    c.style = i == k ? 'background: none; outline: 3px solid; z-index: 1' : `opacity: ${i < k ? 0 : .85}`
  })
  all('#best figure').forEach((f, i) => {
    f.firstChild.style.backgroundPosition = `${25 * i}% ${100 * k / (N - 1)}%`
    f.lastChild.dataset.p = `${D.codes[k][i]}: ${percent(D.p[k][i])}`
  })
  all('span').forEach((w, i) => {
    w.style.background = `rgb(217 112 46 / ${D.words[k][i] / Math.max(...D.words[k], 1)})`
    w.dataset.p = percent(D.words[k][i])
  })
  all('#seen figure').forEach((f, i) => {
    const weights = D.seen[i][k], most = Math.max(...weights, 1)
    all('i', f).forEach((c, p) => c.style.opacity = .85 - .85 * (weights[p] || 0) / most)
    f.lastChild.dataset.p = percent(weights.reduce((x, y) => x + y))
  })
}
slider.max = N - 1
slider.oninput = () => show(+slider.value)
all('#picture i').forEach((c, k) => c.onclick = () => show(k))
show(N / 2 + Math.sqrt(N) / 2)
</script>"""


def made_by(run):
    """A command that leads to the run's keys."""
    tiny = flatten(train.parse(["tiny"])) | {"train_scale": run.train_scale}
    keys = (f"--{key}={'true' if value is True else str(value).strip('()')}"
            for key, value in flatten(run).items() if value != tiny[key])
    return shlex.join(["python", "train.py", "tiny", *keys])


def page(pipeline, prompt, stage):
    """The page about the run with that stage's folder, HTML."""
    keys = json.loads((stage.parent / "run.json").read_text())
    run = rebuild(train.PRESETS["tiny"], flatten(train.PRESETS["tiny"]) | keys)  # old runs lack new keys
    source = train.open_source(run)
    require(source.digest == pipeline.record.get("data"), f"{stage}: not trained on {run.data or 'shapes'}")
    tasks = [task for task in train.parse_mix(pipeline.mix) if task in source.tasks][::-1]
    samples = [s for task in tasks for s in held_out_samples(source, task, 3)]
    prompt = prompt if prompt.prompt or prompt.images else samples[0]
    seen = train.make_dataset(stage.name, run, source)
    pool = [seen[i].target for i in range(min(2000, seen.count))]
    values = {"TITLE": escape(stage.parent.name), "CURVES": curves(stage.parent),
              "GUESS": f"{np.log(run.vqgan.codebook_size):.2f}", "COMMAND": escape(made_by(run)),
              "POOL": str(len(pool)), "CARDS": "<figure><div></div><figcaption></figcaption></figure>" * 5,
              **drawings(pipeline, samples, pool), **inside(pipeline, prompt)}
    return re.sub("|".join(values), lambda key: values[key[0]], PAGE)


def growing(picture, side):
    """A picture appearing code by code, side x side of them, in 32 frames: cells not yet drawn are grey."""
    cell, last = len(picture) // side, side**2 - 1
    code = np.arange(last + 1).reshape(side, side).repeat(cell, 0).repeat(cell, 1)[..., None]  # of each pixel
    frames = (np.where(code > k, np.uint8(200), picture) for k in np.linspace(0, last, 32).astype(int))
    return [sample.enlarged([frame]) for frame in frames]


def guidance(pipeline):
    """Rows of pictures: references, then their prompts drawn at four scales; prints CP and PF."""
    require(pipeline.record["data"] == Shapes.digest, "guidance is scored in the world of shapes alone")
    world = Shapes(pipeline.size)
    judge, samples = sample.Judge(world), held_out_samples(world, "subject_driven", 128)
    rows = [[s.images[0] for s in samples]]
    for scale in (1.0, 2.0, 4.0, 7.5):
        rows.append(pipeline.draw(samples, replace(pipeline.model.config.sampling, cfg_scale=scale)))
        scores = sample.judge_pictures(judge, rows[-1], samples)
        print(f"guidance {scale:g}: CP {scores['cp']:.3f}, PF {scores['pf']:.3f}")
    return sample.enlarged([np.concatenate(column) for column in zip(*(row[:8] for row in rows))], 640)


def main(arguments):
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run, or of a stage in it")
    parser.add_argument("--prompt", default="", help="of the drawing (the page: default a held-out one)")
    parser.add_argument("--images", action="append", default=[], metavar="FILE", help="once for each <image>")
    parser.add_argument("--out", type=Path, help=".html, .gif or .png (default: FOLDER/show.html)")
    options = parser.parse_args(arguments)
    out, stage = options.out or options.folder / "show.html", sample.newest_stage(options.folder)
    pipeline = sample.Pipeline(stage, sample.best_device())
    prompt = sample.check_words(pipeline, options.prompt.replace("\\n", "\n"))
    prompt = Sample("prompt", prompt, [load_image(file) for file in options.images])
    if out.suffix == ".gif":
        first, *frames = growing(pipeline.draw([prompt])[0], pipeline.vqgan.config.grid_size)
        first.save(out, save_all=True, append_images=frames, duration=[80] * 31 + [1500], loop=0)
    elif out.suffix == ".png":
        guidance(pipeline).save(out)
    else:
        out.write_text(page(pipeline, prompt, stage), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    sample.cli(main, "extras.show")
