"""One page about a run, to look at or to project; also a picture growing, and what guidance does.

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
from tqdm import tqdm

import sample
import train
from data import Sample, Shapes, center_crop, load_image, to_picture, tokenizer_pixels
from tokenizer import flatten, rebuild, require

# --- Curves ---


def chart(lines):
    """SVG of {class: [(step, loss)]} with numbers on both axes; the loss's is logarithmic."""
    x, y = np.array(sum(lines.values(), [])).T
    last, low, high = x.max(), y.min(), 1.001 * y.max()

    def at(step, loss):
        return 44 + 366 * step / last, 206 - 190 * np.log(loss / low) / np.log(high / low)

    parts = ['<path d="M44 %.1fH410"/><text x=0 y=%.1f>%.2g</text>' % (at(0, v)[1], at(0, v)[1] + 5, v)
             for v in np.geomspace(low, high, 6)]
    parts += ["<text x=%.1f y=228>%.0f</text>" % (at(v, low)[0] - 10, v) for v in np.linspace(0, last, 5)]
    for name, line in lines.items():  # the last point twice: a line of one point is a dot
        points = " ".join("%.1f,%.1f" % at(*point) for point in line + line[-1:])
        parts.append(f'<polyline class={name} points="{points}"/>')
    return f'<svg viewBox="0 0 440 232">{"".join(parts)}</svg>'


def curves(root, run):
    """Each stage's chart, without the losses that only help training: the held-out loss lacks them too."""
    charts = ""
    for stage in train.STAGES:
        log = root / stage / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        if lines:
            charts += f"<figure class=chart>{stage}" + chart({
                "train": [(x["step"], x.get("reconstruction") or
                           x["loss"] - x.get("contrastive", 0) - x.get("hidden_words", 0)) for x in lines],
                "held": [(x["step"], x["held_out"]) for x in lines if "held_out" in x],
                "guess": [(x["step"], np.log(run.vqgan.codebook_size)) for x in lines if stage != "tokenizer"],
            }) + "</figure>"
    return charts or "<p><b>This run has no log.jsonl.</b></p>"


# --- Does it draw or remember? ---


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


# --- Inside one drawing ---


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
    rows, side, cell = [], vqgan.config.grid_size, vqgan.config.cell
    for k, other in enumerate(tqdm(others, "decoding")):
        changed = codes.repeat(len(other), 1)
        changed[:, k] = other
        images = F.pad(vqgan.decode(changed), (cell,) * 4)[:, :, k // side * cell :, k % side * cell :]
        rows.append(to_picture(torch.cat([*images[:, :, : 3 * cell, : 3 * cell]], -1)))
    return np.concatenate(rows)


def grid(picture, n, words=""):
    """A picture behind n cells that can hide it."""
    side = f"repeat({round(n ** 0.5)}, 1fr)"
    style = f"background-image: url({uri(picture)}); grid: {side} / {side}"
    return f'<figure><div style="{style}">{"<i></i>" * n}</div><figcaption>{words}</figcaption></figure>'


def inside(pipeline, prompt):
    """What the page shows of the drawing of one prompt, a Sample. Its script's shares are in thousandths."""
    config, text, vqgan = pipeline.model.config, pipeline.text_tokenizer, pipeline.vqgan
    codes, probabilities, attention = look(pipeline, prompt)
    others = probabilities.scatter(1, codes.T, 2.0).topk(6).indices  # the drawn one first
    maps = torch.cat([attention.mean(0, keepdim=True), attention])
    names = {i: name for name, i in text.added.items()} | {text.image_id: ""}
    words = [names[i] if i in names else text.pieces.id_to_piece(i).replace("▁", " ")
             for i in pipeline.collate.encode(prompt.prompt, len(prompt.images))]
    drawn, patches = to_picture(vqgan.decode(codes)[0]), 1 if config.n_query else config.image_tokens
    seen = [grid(center_crop(p, pipeline.size), patches, "reference ") for p in prompt.images]
    data = {"codes": others, "p": 1000 * probabilities.gather(1, others), "attention": 1000 * maps}
    return {"PROMPT": escape(prompt.prompt), "PICTURE": grid(drawn, len(others)),
            "SHEET": uri(swapped(vqgan, codes, others)), "CARDS": grid(drawn, 0) * 6,
            "LAYERS": "".join(f"<option>layer {i}" for i in range(1, len(maps))),
            "WORDS": "".join(f"<span>{escape(word)}</span>" for word in words),
            "SEEN": grid(drawn, len(others), "codes before ") + "".join(seen),
            "DATA": json.dumps({name: x.round().int().tolist() for name, x in data.items()})}


# --- The page ---

PAGE = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>TITLE</title><style>
:root { color-scheme: light dark; --paper: light-dark(#fbfaf6, #15171b) }
body { background: var(--paper); font: 17px/1.5 system-ui; max-width: 1160px; margin: auto; padding: 24px;
  image-rendering: pixelated; accent-color: #d9702e }
h2 { font: 34px Georgia, serif; margin: 64px 0 12px }
figure { display: inline-block; width: 104px; margin: 0 10px 12px 0; vertical-align: top }
.chart { width: 540px; max-width: 100% }
figcaption, small { font-size: 13px; opacity: .75 }
figcaption::after, #words span::after { content: attr(data-p) }
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
#best, #seen { display: flex }
#inside figure { flex: 1; max-width: 240px }
#inside #picture figure, #k { width: 100%; max-width: none }
figure div { display: grid; aspect-ratio: 1; background-size: cover }
#best div { background: url(SHEET) 0 / 600% }
i { background: var(--paper) }
.on { background: none; outline: 3px solid #d9702e; z-index: 1 }
#words span { display: inline-block; padding: 2px 6px }
#words span::after { display: block; font-size: 11px }
#words span:empty { display: none }
</style><h2>TITLE: how it learned</h2><p>Loss by step: <b class=train>training</b>,
<b class=held>held out</b>, and guessing (dotted), in nats per code; the tokenizer's is a squared error.</p>
CURVES<h2>What it draws</h2><p>Beside each drawing is the nearest of POOL training pictures, by the mean
cosine of the codes' vectors, cell by cell. Drawings are on average <b>NEAR</b> near to theirs, what was asked
for <b>USUAL</b>; one that is much nearer is remembered. Last, what the tokenizer makes of the picture asked
for, the best that the model could draw.</p><table>ROWS</table><h2>Inside one drawing</h2>
<b id=prompt>PROMPT</b><p>Click a code, or move the slider: what comes after it is not drawn yet.
Probabilities are the model's, before guidance and temperature; attention is that with which the code was
chosen, averaged over heads.</p><div id=inside>
<div><div id=picture>PICTURE</div><button id=play>play</button><input id=k type=range></div>
<div>Drawn code, and the best others<div id=best>CARDS</div>
Attention in <select id=layer><option>all layersLAYERS</select><p id=words>WORDS</p><div id=seen>SEEN</div></div>
</div><h2>How it was made</h2><pre>COMMAND</pre><script>
const D = DATA, N = D.p.length, $ = id => document.getElementById(id)
const all = (selector, part = document) => [...part.querySelectorAll(selector)]
const words = all('#words span'), P = words.length, percent = w => (w / 10).toFixed(1) + '%'
function shine(figure, weights) {
  all('i', figure).forEach((c, i) => c.style.opacity = .85 * (1 - (weights[i] || 0) / Math.max(...weights, 1)))
  figure.lastChild.dataset.p = percent(weights.reduce((x, y) => x + y, 0))
}
function show() {
  const k = +$('k').value, a = D.attention[$('layer').selectedIndex][k]
  const [before, ...references] = all('#seen figure')
  const patches = a.filter((_, p) => words[p]?.textContent == '')
  all('#picture i').forEach((c, i) => {
    c.style.opacity = i < k ? 0 : i > k ? .85 : 1
    c.className = i == k ? 'on' : ''
  })
  all('#best figure').forEach((f, j) => {
    f.firstChild.style.backgroundPosition = `${20 * j}% ${100 * k / (N - 1)}%`
    f.lastChild.dataset.p = `${D.codes[k][j]}: ${percent(D.p[k][j])}`
  })
  words.forEach((w, p) => {
    w.style.background = `rgb(217 112 46 / ${a[p] / Math.max(...a.slice(0, P), 1)})`
    w.dataset.p = percent(a[p])
  })
  shine(before, a.slice(P))
  references.forEach((f, i) => shine(f, patches.splice(0, patches.length / (references.length - i))))
}
function go(k) {
  $('k').value = k
  show()
}
$('k').max = N - 1
$('k').oninput = $('layer').onchange = show
$('play').onclick = () => D.p.forEach((_, k) => setTimeout(go, 9000 / N * k, k))
all('#picture i').forEach((c, k) => c.onclick = () => go(k))
go(N / 2 + Math.sqrt(N) / 2)
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


def growing(picture, side):
    """A picture appearing code by code, side x side of them, in 32 frames: cells not yet drawn are grey."""
    frames, cell = [], len(picture) // side
    for last in np.linspace(0, side**2 - 1, 32).astype(int):
        frame, row, column = picture.copy(), last // side * cell, last % side * cell
        frame[row + cell :] = frame[row:, column + cell :] = 200
        frames.append(sample.enlarged([frame]))
    return frames


def guidance(pipeline, world):
    """Rows of pictures: the references, then the same held-out prompts at four scales; prints CP and PF."""
    require(isinstance(world, Shapes), "guidance is scored in the world of shapes alone")
    judge, samples = sample.Judge(world), held_out_samples(world, "subject_driven", 128)
    rows = [[s.images[0] for s in samples]]
    for scale in (1.0, 2.0, 4.0, 7.5):
        rows.append(pipeline.draw(samples, replace(pipeline.model.config.sampling, cfg_scale=scale)))
        scores = sample.judge_pictures(judge, rows[-1], samples)
        print(f"guidance {scale:g}: CP {scores['cp']:.3f}, PF {scores['pf']:.3f}")
    rows = [np.pad(row[:8], ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255) for row in rows]
    return sample.enlarged([np.concatenate([np.concatenate(row, 1) for row in rows])], 640)


def main(arguments, open_source=train.open_source):
    """Run the command line."""
    what = arguments.pop(0) if arguments[:1] in (["gif"], ["guidance"]) else "page"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run, or of a stage in it")
    parser.add_argument("prompt" if what == "gif" else "--prompt", default="", help="default: a held-out one")
    parser.add_argument("--images", action="append", default=[], metavar="FILE", help="once for each <image>")
    parser.add_argument("--out", help="file to write (default: in the folder)")
    options = parser.parse_args(arguments)
    pipeline, stage = sample.Pipeline(options.folder, sample.best_device()), sample.newest_stage(options.folder)
    prompt = sample.check_words(pipeline, options.prompt.replace("\\n", "\n"))
    prompt = Sample("prompt", prompt, [load_image(file) for file in options.images])
    name = {"page": "show.html", "gif": "show.gif", "guidance": "guidance.png"}[what]
    out, root = Path(options.out or options.folder / name), stage.parent
    if what == "gif":
        first, *frames = growing(pipeline.draw([prompt])[0], pipeline.vqgan.config.grid_size)
        first.save(out, save_all=True, append_images=frames, duration=[80] * 31 + [1500], loop=0)
        return print(f"wrote {out}")
    run = train.PRESETS["tiny"]
    run = rebuild(run, flatten(run) | json.loads((root / "run.json").read_text()))
    source = open_source(run)
    if what == "guidance":
        guidance(pipeline, source).save(out)
        return print(f"wrote {out}")
    tasks = [task for task in train.parse_mix(pipeline.mix) if task in source.tasks][::-1]
    samples = [s for task in tasks for s in held_out_samples(source, task, 3)]
    if not prompt.prompt and not prompt.images:
        prompt = next((s for s in samples if s.images), samples[0])
    seen = train.make_dataset(stage.name, run, source)
    pool = [seen[i].target for i in range(min(2000, seen.count))]
    values = {"TITLE": escape(root.name), "CURVES": curves(root, run), **drawings(pipeline, samples, pool),
              "COMMAND": escape(f"{made_by(run)}\npython -m extras.show {shlex.join(arguments)}"),
              **inside(pipeline, prompt)}
    out.write_text(re.sub("|".join(values), lambda key: str(values[key[0]]), PAGE), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    sample.cli(main, "extras.show")
