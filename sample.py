r"""Draw with a trained model, and score it.

    python sample.py out/tiny "The star in <image>.\nA big star at the top on a red background" --images=a.png

Read in order: choosing a code, `generate`, Pipeline (a trained model with its tokenizers), the judge, the
command line.
"""

import argparse
import io
import json
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from data import (COLORS, PATTERNS, PLACES, Collate, Placed, Sample, Scene, Shapes, load_image, to_picture,
                  tokenizer_pixels)
from mentor import Mentor, MentorConfig
from tokenizer import VQGAN, TextTokenizer, TokenizerConfig, file_hash, load_model, require, write_json

# --- Choosing a code ---


def guide(logits, cfg_scale):
    """Classifier-free guidance: l_u + (l_c - l_u) * cfg_scale, logits (2B, V) with l_c first -> (B, V)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (conditional - unconditional) * cfg_scale


def filter_logits(logits, temperature, top_k, top_p):
    """Temperature, then top-k (ties with the k-th stay), then top-p (the best code stays): (B, V) -> (B, V),
    minus infinity for codes that are out. top_k 0 and top_p 1 keep all."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        out = probability.cumsum(-1) - probability > top_p  # the better ones exceed top_p
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits


def choose(logits, sampling, generators):
    """Choose one code per row: logits (B, V) float32, B generators -> (B,) int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    # argmax(p / Exp(1)) is a draw from p; unlike torch.multinomial it does not wait for the GPU
    rows = zip(probabilities, generators, strict=True)
    noise = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
    return (probabilities / noise).argmax(-1)


# --- Generation ---


@torch.no_grad()
def generate(model, batch, sampling, generators):
    """Draw the codes (B, N) int64 of every prompt in a data.Batch.

    generators: one per prompt, so that a picture does not depend on those beside it. With guidance the batch
    is doubled: conditional prefixes, then unconditional ones of the same lengths.
    """
    guided, lengths = sampling.cfg_scale != 1, batch.lengths
    hidden, keep = model.encoder(batch), torch.zeros_like(lengths, dtype=torch.bool)
    drops = [keep, ~keep] if guided else [keep]
    prefix = torch.cat([model.projector(hidden, lengths, drop) for drop in drops])
    logits, cache = model.prefill(prefix, lengths.repeat(1 + guided))
    codes = []
    for k in range(model.config.decoder.n_code):
        if k > 0:
            logits = model.decode_step(codes[-1].repeat(1 + guided), cache)
        codes.append(choose(guide(logits, sampling.cfg_scale) if guided else logits, sampling, generators))
    return torch.stack(codes, 1)


# --- A trained model and everything it needs ---


def best_device():
    """The first of cuda, mps and cpu that this machine has."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def usable(device):
    """A torch.device that this machine has."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"--device={device}: {error}") from None


def newest_stage(folder):
    """The folder of a run's last finished stage, or `folder` itself if it is a stage's."""
    for stage in (Path(folder, name).resolve() for name in ("instruct", "align", "pretrain", "")):
        finished = (stage / "stage.json").is_file() and (stage / "model.safetensors").is_file()
        if finished and stage.name not in ("tokenizer", "encoder"):
            return stage
    raise ValueError(f"{folder} holds no trained model (a tokenizer is none): run `python train.py tiny`")


class Pipeline:
    """Model, image tokenizer and text tokenizer, opened from a folder that train.py wrote."""

    def __init__(self, folder, device, compile=False):
        """folder: a run's, for its last finished stage, or a stage's."""
        stage, self.device = newest_stage(folder), usable(device)
        root, self.record = stage.parent, json.loads((stage / "stage.json").read_text())
        self.mix = self.record.get(f"{stage.name}.mix", "")
        self.model = load_model(Mentor, MentorConfig(), stage).to(self.device)
        self.vqgan = load_model(VQGAN, TokenizerConfig(), root / "tokenizer").to(self.device)
        self.text_tokenizer = TextTokenizer((root / "spiece.model").read_bytes())
        hashes = self.text_tokenizer.digest, file_hash(root / "tokenizer" / "model.safetensors")
        require(hashes == (self.record.get("text tokenizer"), self.record.get("weights of tokenizer")),
                f"{stage} was trained with another spiece.model or tokenizer than {root} holds")
        if self.device.type == "cuda":
            self.model.bfloat16()  # half the bytes to read; the complex rotary table stays exact
        if compile:
            step = torch.compile(self.model.decode_step, mode="reduce-overhead", fullgraph=True)
            self.model.decode_step = step
        self.size = self.vqgan.config.image_size
        self.collate = Collate(self.text_tokenizer, self.model.config, self.size)

    def draw(self, samples, sampling=None, seed=0, batch_size=128):
        """Pictures, uint8 (S, S, 3) each, for the samples' prompts; number i is drawn with seed + i."""
        sampling, codes = sampling or self.model.config.sampling, []
        for first in range(0, len(samples), batch_size):
            part = samples[first : first + batch_size]
            chance = [torch.Generator(self.device).manual_seed(seed + first + i) for i in range(len(part))]
            codes.append(generate(self.model, self.collate(part).to(self.device), sampling, chance))
        return [to_picture(image) for image in self.vqgan.decode(torch.cat(codes))]


def through_codes(vqgan, pictures):
    """Pictures of any size, made by the tokenizer alone, uint8 (S, S, 3)."""
    device, size = vqgan.quantize.embedding.weight.device, vqgan.config.image_size
    images = torch.stack([tokenizer_pixels(p, size) for p in pictures]).to(device)
    return [to_picture(image) for image in vqgan.decode(vqgan.encode(images))]


# --- The judge and the scores ---


def products(a, b):
    """Inner products of all a (M, ...) with all b (K, ...): (M, K)."""
    return a.flatten(1) @ b.flatten(1).T


class Judge:
    """Analysis by synthesis: a drawing shows the background that fits most of its pixels, and on it the
    nearest of all subjects at all places and sizes."""

    def __init__(self, world):
        grounds = [world.background(c, p) for c in range(len(COLORS)) for p in range(len(PATTERNS))]
        self.grounds = torch.from_numpy(np.stack(grounds)).float() / 255  # (32, S, S, 3)
        self.subjects, self.candidates = world.subjects, []
        for place, size in np.ndindex(len(PLACES), len(world.widths)):
            (x, y), half = world.center(place, size), world.widths[size] // 2 + 1
            window = np.s_[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half]
            placed = [Placed(subject, place, size) for subject in self.subjects]
            masks = torch.from_numpy(np.stack([world.subject_mask(p) for p in placed]))[window]
            colors = torch.from_numpy(np.stack([world.draw_subject(p) for p in placed]))[window] / 255 * masks
            self.candidates.append((place, size, window, colors, 1 - masks))  # (subjects, h, w, 3 or 1)

    def read(self, pictures):
        """The nearest scene of one subject to each picture, uint8 (S, S, 3)."""
        x = torch.from_numpy(np.stack(pictures)).float() / 255  # (K, S, S, 3)
        distance = torch.stack([(x - ground).square().sum(-1) for ground in self.grounds])  # (32, K, S, S)
        ground = distance.clamp(max=0.05).sum((2, 3)).argmin(0)  # the clamp: a subject's pixels count little
        behind = self.grounds[ground]  # (K, S, S, 3)
        misfit = distance[ground, torch.arange(len(x))]  # (K, S, S)
        best, scenes = torch.full((len(x),), torch.inf), [None] * len(x)
        for place, size, window, colors, through in self.candidates:
            # |seen - colors - through * back|^2, multiplied out, and the rest of the picture: (subjects, K)
            seen, back = x[window], behind[window]
            error = (colors.square().sum((1, 2, 3))[:, None] - 2 * products(colors, seen)
                     + 2 * products(colors * through, back) - 2 * products(through, (seen * back).sum(-1))
                     + products(through.square(), back.square().sum(-1))
                     + seen.square().sum((1, 2, 3)) + misfit.sum((1, 2)) - misfit[window].sum((1, 2)))
            error, nearest = error.min(0)
            for i in (error < best).nonzero().flatten().tolist():
                placed = Placed(self.subjects[nearest[i]], place, size)
                best[i], scenes[i] = error[i], Scene(*divmod(int(ground[i]), len(PATTERNS)), (placed,))
        return scenes


def marks(judge, pictures, samples):
    """CP, concept preservation: how many of a subject's attributes are as in the reference. PF, prompt
    following: of background colour, background pattern, place and size. (K, 2) shares."""
    rows = []
    for seen, sample in zip(judge.read(pictures), samples, strict=True):
        (a,), (b,) = seen.subjects, sample.scene.subjects
        kept = np.equal(a.subject, b.subject)
        followed = np.equal((*seen[:2], a.place, a.size), (*sample.scene[:2], b.place, b.size))
        rows.append((kept.mean(), followed.mean()))
    return np.array(rows)


def judge_pictures(judge, pictures, samples):
    """The mean marks."""
    cp, pf = marks(judge, pictures, samples).mean(0).tolist()
    return {"cp": cp, "pf": pf, "cp_pf": cp * pf}


def score(pipeline, out, world=None, prompts=512):
    """Score a model on a world's held-out subjects: print a table, write scores.json and sheet.png."""
    world = world or Shapes(pipeline.size)
    require(pipeline.record.get("data") == world.digest, "this model was trained on other data")

    dataset = world.dataset({"subject_driven": 1.0}, "scores", held_out=True)
    samples = [dataset[i] for i in range(prompts)]
    targets = [s.target for s in samples]
    # no model beats its tokenizer, true renders test the judge, copies have all CP and little PF
    pictures = {"model": pipeline.draw(samples), "tokenizer": through_codes(pipeline.vqgan, targets),
                "true renders": targets, "copying": [s.images[0] for s in samples]}
    judge = Judge(world)
    scores = {name: judge_pictures(judge, drawn, samples) for name, drawn in pictures.items()}
    for name, row in scores.items():
        print(f"{name:13}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    save_sheet({"held-out subjects": (samples[:12], pictures["model"])}, out / "sheet.png")
    write_json(out / "scores.json", {**scores.pop("model"), "prompts": prompts, "bounds": scores})


def save_sheet(parts, path, side=96, width=330):
    """Save parts {heading: (samples, drawings)} as rows of reference, prompt, drawing, ideal."""
    height = sum(20 + side * len(samples) for samples, _ in parts.values())
    sheet, y = Image.new("RGB", (3 * side + width, height), "white"), 0
    pen = ImageDraw.Draw(sheet)
    for heading, part in parts.items():
        pen.text((4, y + 4), f"{heading}: reference, prompt, drawing, ideal", fill="#808080")
        y += 20
        for sample, drawn in zip(*part):
            lines = [textwrap.fill(line, 52) for line in sample.prompt.split("\n")]
            pen.multiline_text((side + 4, y), "\n".join(lines), fill="black")
            pictures = sample.target, drawn, *sample.images
            for x, picture in zip((2 * side + width, side + width, 0), pictures):
                square = ImageOps.fit(Image.fromarray(picture), (side - 4, side - 4), Image.NEAREST)
                sheet.paste(square, (x, y))
            y += side
    sheet.save(path)


def enlarged(pictures, least=256):
    """Pictures of one size side by side, enlarged: a Pillow image."""
    image = Image.fromarray(np.concatenate(pictures, axis=1))
    return ImageOps.scale(image, -(-least // image.height), Image.NEAREST)


# --- Command line ---


def parse(arguments):
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Draw with a trained model, or score it.")
    add = parser.add_argument
    add("folder", help="of a run or of one of its stages, for example out/tiny")
    add("prompt", nargs="?", default="", help=r"with an <image> for each of --images; \n is a line break")
    add("--images", action="append", default=[], metavar="FILE", help="once for each <image>")
    add("--score", action="store_true", help="score the model with its own sampling")
    add("--cfg_scale", type=float, help="guidance: 0 unconditional, 1 conditional")
    add("--temperature", type=float, help="0 is greedy")
    add("--top_k", type=int, help="keep this many codes, 0 all")
    add("--top_p", type=float, help="keep the best codes up to this probability")
    add("--n", type=int, default=1, help="how many to draw (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first drawing (default: %(default)s)")
    add("--out", default="sample.png", help="file to write (default: %(default)s)")
    add("--device", default=best_device(), help="cuda, mps or cpu (default: %(default)s)")
    add("--compile", action="store_true", help="draw faster on a GPU, after a minute's wait")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if options.prompt.startswith("--"):  # an unknown option with spaces, for argparse
        unknown.append(options.prompt)
    require(not unknown, f"{' '.join(unknown)}: no such option; the prompt is the second argument")
    require(options.n > 0, f"--n={options.n}: must be at least 1")
    require(Image.registered_extensions().get(Path(options.out).suffix.lower()) in Image.SAVE,
            f"--out={options.out}: must end as a picture does: .png")
    return options


def check_words(pipeline, prompt):
    """The prompt without punctuation that the model never met. Other words raise ValueError."""
    unknown = pipeline.text_tokenizer.unknown_words(prompt)
    words = [word for word in unknown if word[0].isalnum() or word in "<>"]
    if words:
        known = f"it knows {' '.join(pipeline.text_tokenizer.known_words()[:400])}"
        if pipeline.record.get("data") == Shapes.digest:
            known = f"its sentences are like `{Shapes.template}`"
        raise ValueError(f"the model does not know {', '.join(words)}; {known}")
    for mark in unknown:
        prompt = prompt.replace(mark, " ")
        print(f"note: left out {mark!r}, which the model has never met")
    return prompt


def main(arguments):
    """Run the command line."""
    options = parse(arguments)
    pipeline = Pipeline(options.folder, options.device, options.compile)
    if options.score:
        return score(pipeline, Path(options.folder))

    # what to draw
    prompt, files = options.prompt.replace("\\n", "\n"), options.images
    task = "text_to_image" if not files else "subject_driven" if "\n" in prompt else "segmentation"
    if pipeline.mix and f"{task}:" not in pipeline.mix:
        print(f"note: {options.folder} was trained last on {pipeline.mix}, without {task}")
    options.prompt = check_words(pipeline, prompt)
    samples = [Sample(task, options.prompt, [load_image(file) for file in files])] * options.n

    # how: the model's sampling, but for what is given
    sampling, given = pipeline.model.config.sampling, vars(options)
    sampling = replace(sampling, **{key: given[key] for key in asdict(sampling) if given[key] is not None})
    drawn = pipeline.draw(samples, sampling, options.seed)
    notes, out = PngInfo(), Path(options.out).expanduser()
    for key, value in (given | asdict(sampling)).items():
        notes.add_itxt(key, str(value))
    enlarged(drawn).save(out, pnginfo=notes)  # other formats have no notes
    print(f"wrote {out} ({sampling}, seed {options.seed})")


class PatientFile(io.FileIO):
    """stdout or stderr, where a full disk or a closed pipe costs lines, not the run."""

    def write(self, data):
        """Write the bytes, or drop them."""
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def cli(main, program):
    """Run a command line. Errors that a user can mend become one line and exit code 2."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(PatientFile(stream.fileno(), "w", closefd=False)), stream.encoding,
                         "backslashreplace", line_buffering=True) for stream in (sys.stdout, sys.stderr))
    try:
        return main(sys.argv[1:])
    except (torch.OutOfMemoryError, MemoryError) as error:
        problem = f"out of memory ({str(error)[:150]}): lower --n, or for training --micro_batch"
    except (ValueError, OSError) as error:
        problem = error
    print(f"{program}: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    cli(main, "sample.py")
