"""Draw the prompts of DreamBench or DreamBench++, for DreamBench++'s scorer.

    python -m extras.dreambench out/full dreambench_plus/data --out=out/full/dreambench_plus --n=4
    python -m extras.dreambench out/full dreambooth/dataset --out=out/full/dreambench --n=4

DreamBench++'s data has images/**/N.jpg and captions/**/N.txt, a label and then a prompt a line; DreamBench's
SUBJECT/*.jpg, the first of which is the reference, and prompts_and_classes.txt. --out gets src_image, text
and tgt_image, each with SUBJECT/PROMPT_SAMPLE.jpg or .txt.
"""

import argparse
import io
import re
import unicodedata
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import CAPTIONS, PICTURES, Sample, load_image, object_line, read_words, walk
from sample import Pipeline, best_device, check_words, cli
from tokenizer import require


def visible(folder, suffixes):
    """{name without suffix: file} of the files below a folder with these suffixes."""
    found = {}
    for file in walk(folder):
        if file.suffix.lower() in suffixes:
            name = unicodedata.normalize("NFC", file.relative_to(folder).with_suffix("").as_posix())
            other = found.setdefault(name, file)
            require(other is file, f"{file} and {other} have one name")
    return found


def dreambench(file):
    """(name, picture, label, prompts) of DreamBench's subjects. The file has lines SUBJECT,LABEL and two
    lists of 'a {0} {1} on ...'.format(...), the second for cats and dogs; {0} is DreamBooth's rare word."""
    text = "\n".join(read_words(file)[0])
    lists = [re.findall(r"^'(.*)'\.format", part, re.M) for part in text.split("Live Subject Prompts")]
    require(len(lists) == 2 and all(lists), f"{file}: must have two lists of prompts")
    for name, label in re.findall(r"^([^\s,']+),\s*([^,'\n]*[^,'\s])$", text, re.M)[1:]:  # without the head
        pictures = visible(file.parent / name, PICTURES)
        require(pictures, f"{file}: there is no picture in {name}")
        prompts = [p.replace("{0} ", "").replace("{1}", label) for p in lists[label in ("cat", "dog")]]
        yield name, pictures[min(pictures)], label, prompts


def dreambench_plus(folder):
    """As dreambench()."""
    pictures, captions = visible(folder / "images", PICTURES), visible(folder / "captions", CAPTIONS)
    lost = sorted(pictures.keys() ^ captions.keys())
    require(not lost, f"{folder}: only one of images and captions has {', '.join(lost[:5])}")
    for path, file in captions.items():
        label, *prompts = read_words(file)[0] or [""]
        require(prompts, f"{file}: must have a label, then prompts, a line each")
        yield re.sub(r"\W+", "_", f"{path}_{label.lower()}"), pictures[path], label, prompts


def draw(pipeline, subjects, out, n):
    """Draw each prompt n times, in the scorer's layout. First of all, everything is read and checked."""
    todo = []
    for name, file, label, prompts in subjects:
        picture, words = load_image(file), object_line(label)
        texts = [check_words(pipeline, f"{words}\n{prompt}") for prompt in prompts]
        samples = [Sample("subject_driven", text, [picture]) for text in texts for _ in range(n)]
        pipeline.collate(samples[::n])
        todo.append((name, picture, prompts, samples))
    for name, picture, prompts, samples in tqdm(todo, disable=None):
        jpeg = io.BytesIO()
        Image.fromarray(picture).save(jpeg, "JPEG", quality=95)
        for kind in ("src_image", "text", "tgt_image"):
            (out / kind / name).mkdir(parents=True)
        for i, drawing in enumerate(pipeline.draw(samples, batch_size=16)):
            stem = f"{name}/{i // n}_{i % n}"
            (out / f"src_image/{stem}.jpg").write_bytes(jpeg.getvalue())
            (out / f"text/{stem}.txt").write_text(prompts[i // n], encoding="utf-8")
            Image.fromarray(drawing).save(out / f"tgt_image/{stem}.jpg", quality=95)


def main(arguments):
    """Run the command line."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1, help="drawings of each prompt")
    options = parser.parse_args(arguments)
    out, listed = options.out.expanduser(), options.folder / "prompts_and_classes.txt"
    require(options.n > 0, f"--n={options.n}: must be at least 1")
    require(not out.exists() or not any(out.iterdir()), f"--out={out} is not empty: choose another")
    subjects = list(dreambench(listed) if listed.is_file() else dreambench_plus(options.folder))
    require(subjects, f"{options.folder}: there are no subjects in it")
    draw(Pipeline(options.model, best_device()), subjects, out, options.n)
    print(f"wrote {len(subjects)} subjects to {out}")


if __name__ == "__main__":
    cli(main, "extras.dreambench")
