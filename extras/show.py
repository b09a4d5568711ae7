"""One page about a run, to look at and to project; also a picture growing, and what guidance does.

    python -m extras.show out/pets --prompt="A dog on a beach"  # writes out/pets/show.html, all in one file
    python -m extras.show gif out/tiny "A big red star at the top on a pink background"
    python -m extras.show guidance out/tiny                     # a row each at guidance 1, 2, 4 and 7.5
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

import sample
import train
from data import Sample, Shapes, center_crop, load_image, to_picture, tokenizer_pixels
from tokenizer import flatten, rebuild

# --- Curves


def chart(lines):
    """SVG of {class: [(step, loss)]} with numbers on both axes; the loss's is logarithmic if it can be."""
    x, y = np.array(sum(lines.values(), [])).T
    low, high = y.min(), y.max() + 1e-9
    scale, ticks = (np.log, np.geomspace) if low > 0 else (np.float64, np.linspace)

    def at(step, loss):
        return 44 + 366 * step / x.max(), 206 - 190 * (scale(loss) - scale(low)) / (scale(high) - scale(low))

    parts = ['<path d="M44 %.1fH410"/><text x=0 y=%.1f>%.2g</text>' % (at(0, v)[1], at(0, v)[1] + 5, v)
             for v in ticks(low, high, 6)]
    parts += ["<text x=%.1f y=228>%.0f</text>" % (at(v, low)[0] - 10, v) for v in np.linspace(0, x.max(), 5)]
    for name, line in lines.items():  # the last point twice: a line of one point is a dot
        points = " ".join("%.1f,%.1f" % at(*point) for point in line + line[-1:])
        parts.append(f'<polyline class={name} points="{points}"/>')
    return f'<svg viewBox="0 0 440 232">{"".join(parts)}</svg>'


def curves(root, run):
    """Each stage's chart. What only helps training is taken off its loss: the held-out loss lacks it too."""
    helps, charts = {"contrastive": 1, "hidden_words": 1, "consistency": run.tokenizer.consistency}, ""
    for stage in train.STAGES:
        log = root / stage / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        guess = [(x["step"], np.log(run.vqgan.codebook_size)) for x in lines if stage != "tokenizer"]
        if lines:
            charts += f"<figure class=chart>{stage}" + chart({
                "train": [(x["step"], x["loss"] - sum(helps[k] * x.get(k, 0) for k in helps)) for x in lines],
                "held": [(x["step"], x["held_out"]) for x in lines if "held_out" in x],
                "guess": guess}) + "</figure>"
    return charts or "<p><b>This run has no log.jsonl.</b></p>"


# --- Does it draw or remember?


def uri(picture):
    """A picture, uint8 (H, W, 3), as a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def held_out_samples(source, task, count):
    """Samples of a task that training did not see; or training samples, if none is held out."""
    dataset = source.dataset({task: 1.0}, "show", held_out=True)
    if not dataset.count:
        dataset = source.dataset({task: 1.0}, "show")
    return [dataset[i] for i in range(min(count, dataset.count))]


def features(pipeline, pictures):
    """Pictures -> (M, N * C), whose products are the mean cosine of their codes' vectors, cell by cell."""
    images = torch.stack([tokenizer_pixels(p, pipeline.size) for p in pictures]).to(pipeline.device)
    vectors = pipeline.vqgan.quantize.codebook().detach()[pipeline.vqgan.encode(images)]
    return vectors.flatten(1) / vectors.shape[1] ** 0.5


def drawings(pipeline, samples, pool):
    """A row of pictures for each sample, and the means of the numbers below them."""
    asked, rows = [s.target for s in samples], ""
    drawn, made = pipeline.draw(samples), pipeline.rebuild(asked)
    near, which = (features(pipeline, drawn + asked) @ features(pipeline, pool).T).max(1)
    near, usual = near.chunk(2)
    for i, s in enumerate(samples):
        rows += f"<tr><td><small>{s.task}</small><br>{escape(s.prompt)}<td>"
        for words, picture in [
                *(("reference", center_crop(p, pipeline.size)) for p in s.images), ("drawn", drawn[i]),
                (f"nearest {near[i]:.2f}", pool[which[i]]), (f"asked for {usual[i]:.2f}", asked[i]),
                ("tokenizer", made[i])]:
            rows += f'<figure><img src="{uri(picture)}"><figcaption>{words}</figcaption></figure>'
    return {"ROWS": rows, "POOL": len(pool), "NEAR": f"{near.mean():.2f}", "USUAL": f"{usual.mean():.2f}"}


# --- Inside one drawing


@torch.no_grad()
def look(pipeline, prompt):
    """Draw a Sample's prompt: its codes (1, N), the model's probabilities for each (N, V), before guidance
    and temperature, and the attention behind them, to prompt and codes before, (layers, N, P + N - 1)."""
    model, batch = pipeline.model, pipeline.collate([prompt]).to(pipeline.device)
    chance = torch.Generator(pipeline.device).manual_seed(0)
    codes = sample.generate(model, batch, model.config.sampling, [chance])
    attend, maps = F.scaled_dot_product_attention, []

    def watched(q, k, v, **options):
        if options.get("is_causal"):  # the decoder's
            scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (1, H, T, T)
            later = torch.ones_like(scores).triu(1).bool()
            maps.append(scores.masked_fill(later, -torch.inf).softmax(-1).mean(1))
        return attend(q, k, v, **options)

    with patch.object(F, "scaled_dot_product_attention", watched):
        logits = model(batch, codes, batch.drop)[0]
    return codes, logits.softmax(-1), torch.cat(maps)[:, batch.lengths - 1 :]


def swapped(vqgan, codes, others):
    """Each code in turn exchanged and decoded: codes (1, N), others (N, K) -> N rows of K cut-outs, 3 x 3
    cells around the code."""
    rows, side = [], vqgan.config.grid_size
    cell = vqgan.config.image_size // side
    for k, other in enumerate(others):
        changed = codes.repeat(len(other), 1)
        changed[:, k] = other
        images = F.pad(vqgan.decode(changed), (cell,) * 4)[:, :, k // side * cell :, k % side * cell :]
        rows.append(to_picture(torch.cat([*images[:, :, : 3 * cell, : 3 * cell]], -1)))
    return np.concatenate(rows)


def inside(pipeline, prompt):
    """What the page's script shows of the drawing of one prompt, a Sample; shares are in thousandths."""
    config, text, vqgan = pipeline.model.config, pipeline.text_tokenizer, pipeline.vqgan
    codes, probabilities, attention = look(pipeline, prompt)
    others = probabilities.scatter(1, codes.T, 2.0).topk(6).indices  # the drawn one first
    maps = torch.cat([attention.mean(0, keepdim=True), attention])
    names = {i: name for name, i in text.added.items()} | {text.image_id: ""}
    return {"words": [names[i] if i in names else text.pieces.id_to_piece(i).replace("▁", " ")
                      for i in pipeline.collate.encode(prompt.prompt, len(prompt.images))],
            "codes": others.tolist(), "p": (1000 * probabilities.gather(1, others)).round().int().tolist(),
            "attention": (1000 * maps).round().int().tolist(),
            "picture": uri(to_picture(vqgan.decode(codes)[0])), "sheet": uri(swapped(vqgan, codes, others)),
            "images": [uri(center_crop(p, pipeline.size)) for p in prompt.images],
            "patches": 1 if config.n_query else config.image_tokens}


# --- The page

PAGE = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>TITLE</title><style>
:root { color-scheme: light dark; --paper: light-dark(#fbfaf6, #15171b) }
body { background: var(--paper); font: 17px/1.5 system-ui; max-width: 1160px; margin: auto; padding: 24px;
  image-rendering: pixelated; accent-color: #d9702e }
h2 { font: 34px Georgia, serif; margin: 64px 0 12px }
figure { display: inline-block; width: 104px; margin: 0 10px 12px 0; vertical-align: top }
.chart { width: 540px; max-width: 100% }
figcaption, small { font-size: 13px; opacity: .75 }
img { display: block; width: 100% }
svg { font-size: 13px; fill: currentColor }
path { stroke: #8884 }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linecap: round }
.train { color: #4c86c0 }
.held { color: #d9702e; stroke-width: 4 }
.guess { stroke-dasharray: 1 6 }
table, tbody { display: block }
td, #prompt, pre { white-space: pre-wrap }
tr, #inside { display: flex; flex-wrap: wrap; gap: 0 32px }
td:first-child, #inside > div { flex: 1 1 320px; min-width: 0 }
#best, #images { display: flex }
#inside figure { flex: 1; max-width: 240px }
#inside #picture figure, #k { width: 100%; max-width: none }
.grid { display: grid; aspect-ratio: 1; background-size: cover }
.grid i { background: var(--paper) }
.grid .on { background: none; outline: 3px solid #d9702e; z-index: 1 }
#words span { display: inline-block; padding: 2px 6px; background: rgb(217 112 46 / var(--a)) }
#words span::after { content: attr(data-p); display: block; font-size: 11px }
#words span:empty { display: none }
</style><h2>TITLE: how it learned</h2><p>Loss by step: <b class=train>training</b>,
<b class=held>held out</b>, and guessing (dotted), in nats per code; the tokenizer's is a squared error.</p>
CURVES<h2>What it draws</h2><p>Beside each drawing is the nearest of POOL training pictures, by the mean
cosine of the codes' vectors, cell by cell. Drawings are on average <b>NEAR</b> near to theirs, what was asked
for <b>USUAL</b>; one that is much nearer is remembered. Last, what the tokenizer makes of the picture asked
for, the best that the model could draw.</p><table>ROWS</table><h2>Inside one drawing</h2>
<b id=prompt>PROMPT</b><p>Point at a code, or move the slider: what comes after it is not drawn yet.
Probabilities are the model's, before guidance and temperature; attention is that with which the code was
chosen, averaged over heads.</p>
<div id=inside><div><div id=picture></div><button id=play>play</button><input id=k type=range></div>
<div>Drawn code, and the best others<div id=best></div>Attention in <select id=layer></select><p id=words></p>
<div id=images></div></div></div><h2>How it was made</h2><pre>COMMAND</pre><script>
const D = DATA, N = D.p.length, K = D.p[0].length, P = D.words.length, $ = id => document.getElementById(id)
const make = (parent, tag, textContent) =>
  Object.assign(parent.appendChild(document.createElement(tag)), {textContent})
const percent = w => (w / 10).toFixed(1) + '%'
function grid(parent, picture, n) {  // a picture below n cells that can hide it
  const figure = make($(parent), 'figure'), box = make(figure, 'div'), side = `repeat(${Math.sqrt(n)}, 1fr)`
  box.className = 'grid'
  box.style = `background-image: url(${picture}); grid: ${side} / ${side}`
  return {box, label: make(figure, 'figcaption'), cells: Array.from({length: n}, () => make(box, 'i'))}
}
function shine({cells, label}, name, weights) {
  cells.forEach((c, i) => c.style.opacity = .85 * (1 - (weights[i] || 0) / Math.max(...weights, 1)))
  label.textContent = name + percent(weights.reduce((x, y) => x + y, 0))
}
const picture = grid('picture', D.picture, N), before = grid('images', D.picture, N)
const images = D.images.map(uri => grid('images', uri, D.patches))
const cards = D.p[0].map(() => grid('best', D.sheet, 0))
const words = D.words.map(w => make($('words'), 'span', w))
D.attention.forEach((_, l) => make($('layer'), 'option', l ? 'layer ' + l : 'all layers'))
function show(k) {
  const a = D.attention[$('layer').selectedIndex][k], most = Math.max(...a.slice(0, P))
  const patches = a.filter((_, p) => D.words[p] == '')
  picture.cells.forEach((c, i) => {
    c.style.opacity = i < k ? 0 : i > k ? .85 : 1
    c.className = i == k ? 'on' : ''
  })
  cards.forEach(({box, label}, j) => {
    box.style.background = `${100 * j / (K - 1)}% ${100 * k / (N - 1)}% / ${100 * K}% url(${D.sheet})`
    label.textContent = `${D.codes[k][j]}: ${percent(D.p[k][j])}`
  })
  shine(before, 'codes before ', a.slice(P))
  images.forEach((x, i) => shine(x, 'reference ', patches.splice(0, patches.length / (images.length - i))))
  words.forEach((w, p) => {
    w.style.setProperty('--a', a[p] / most)
    w.dataset.p = percent(a[p])
  })
}
const pin = k => show(+($('k').value = k))
$('k').max = N - 1
$('k').oninput = $('layer').onchange = picture.box.onmouseleave = () => pin($('k').value)
$('play').onclick = () => D.p.forEach((_, k) => setTimeout(pin, 9000 / N * k, k))
picture.cells.forEach((c, k) => Object.assign(c, {onmouseenter: () => show(k), onclick: () => pin(k)}))
pin(N / 2 + Math.sqrt(N) / 2)
</script>"""


def made_by(run):
    """A command that leads to the run's keys, of all presets' the shortest."""
    commands = []
    for preset in train.PRESETS:
        base = flatten(train.parse([preset])) | {"train_scale": run.train_scale}
        keys = {key: value for key, value in flatten(run).items() if value != base[key]}
        texts = (f"--{k}={'true' if v is True else str(v).strip('()')}" for k, v in keys.items())
        commands.append(shlex.join(["python", "train.py", preset, *texts]))
    return min(commands, key=len)


def growing(pipeline, codes):
    """A picture appearing code by code, codes (1, N), in 32 frames: cells not yet drawn are grey."""
    frames, side = [], pipeline.vqgan.config.grid_size
    for last in np.linspace(0, side**2 - 1, 32).astype(int):
        so_far, cell, (row, column) = codes.clone(), pipeline.size // side, divmod(last, side)
        so_far[:, last:] = codes[:, last]
        picture = to_picture(pipeline.vqgan.decode(so_far)[0])
        picture[(row + 1) * cell :] = picture[row * cell :, (column + 1) * cell :] = 200
        frames.append(sample.enlarged([picture]))
    return frames + frames[-1:] * 15


def guidance(pipeline, source, tasks):
    """Rows of pictures: the references, then the same held-out prompts at four scales; prints CP and PF."""
    judge = sample.Judge(source) if type(source) is Shapes else None
    samples = held_out_samples(source, "subject_driven" if judge else tasks[0], 128 if judge else 8)
    rows = [[center_crop([*s.images, s.target][0], pipeline.size) for s in samples]]
    for scale in (1.0, 2.0, 4.0, 7.5):
        rows.append(pipeline.draw(samples, replace(pipeline.model.config.sampling, cfg_scale=scale)))
        if judge:
            scores = sample.judge_pictures(judge, rows[-1], samples)
            print(f"guidance {scale:g}: CP {scores['cp']:.3f}, PF {scores['pf']:.3f}")
    gap = ((0, 2), (0, 2), (0, 0))
    rows = [np.concatenate([np.pad(p, gap, constant_values=255) for p in row[:8]], 1) for row in rows]
    return sample.enlarged([np.concatenate(rows)], 640)


def main(arguments, open_source=train.open_source):
    """Run the command line."""
    what = arguments.pop(0) if arguments[:1] in (["gif"], ["guidance"]) else "page"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run, or of a stage in it")
    parser.add_argument("prompt" if what == "gif" else "--prompt", default="", help="default: a held-out one")
    parser.add_argument("--images", action="append", default=[], metavar="FILE", help="once for each <image>")
    parser.add_argument("--out", help="file to write (default: in the folder)")
    options = parser.parse_args(arguments)
    pipeline = sample.Pipeline(options.folder, sample.best_device())
    prompt = sample.check_words(pipeline, options.prompt.replace("\\n", "\n"))
    prompt = Sample("prompt", prompt, [load_image(file) for file in options.images])
    name = {"page": "show.html", "gif": "show.gif", "guidance": "guidance.png"}[what]
    out, stage = Path(options.out or options.folder / name), sample.newest_stage(options.folder)
    if what == "gif":
        first, *frames = growing(pipeline, look(pipeline, prompt)[0])
        first.save(out, save_all=True, append_images=frames, duration=80, loop=0)
        return print(f"wrote {out}")
    keys = flatten(train.PRESETS["tiny"]) | json.loads((stage.parent / "run.json").read_text())
    run = rebuild(train.PRESETS["tiny"], keys)
    source = open_source(run)
    tasks = [task for task in train.parse_mix(pipeline.mix) if task in source.tasks][::-1]
    if what == "guidance":
        guidance(pipeline, source, tasks).save(out)
        return print(f"wrote {out}")
    samples = [s for task in tasks for s in held_out_samples(source, task, 3)]
    if not prompt.prompt and not prompt.images:
        prompt = next((s for s in samples if s.images), samples[0])
    seen = train.make_dataset(stage.name, run, source)
    pool = [seen[i].target for i in range(min(2000, seen.count))]
    values = {"TITLE": escape(stage.parent.name), "CURVES": curves(stage.parent, run),
              "PROMPT": escape(prompt.prompt), **drawings(pipeline, samples, pool),
              "COMMAND": escape(f"{made_by(run)}\npython -m extras.show {shlex.join(arguments)}"),
              "DATA": json.dumps(inside(pipeline, prompt)).replace("</", "<\\/")}
    out.write_text(re.sub("|".join(values), lambda key: str(values[key[0]]), PAGE), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    sample.cli(main, "extras.show")
