"""The limits of the book: its size, its lines, its imports, and that it needs nothing beside it."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

from conftest import ROOT, SMALL, contents, few_steps

BOOK = ["tokenizer", "mentor", "data", "sample", "train"]
BELOW = {"tokenizer": set(), "mentor": {"tokenizer"}, "data": {"tokenizer"},
         "sample": {"tokenizer", "mentor", "data"}, "train": {"tokenizer", "mentor", "data", "sample"}}
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "sentencepiece", "safetensors", *sys.stdlib_module_names}
PAGES = [ROOT / f"{name}.py" for name in BOOK]
EXTRAS = sorted((ROOT / "extras").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

def size(files):
    return sum(len(file.read_bytes()) for file in files)

def imports(file):
    """The names that a file imports, at its top or anywhere else."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module

def packages(file):
    return {name.split(".")[0] for name in imports(file)}

def test_the_book_is_short():
    nodes = sum(1 for page in PAGES for _ in ast.walk(ast.parse(page.read_text())))
    assert size(PAGES) <= 150_000 and nodes <= 30_000
    assert {page.name: size([page]) for page in PAGES if size([page]) > 42_000} == {}

def test_what_stands_around_the_book_is_short():
    assert size(EXTRAS) <= 100_000 and size([ROOT / "README.md"]) <= 14_000
    assert sum(len(file.read_text().splitlines()) for file in TESTS) <= 4_000
    assert sorted(ROOT.glob("*.py")) == sorted(PAGES)  # nothing hides beside it

def test_no_line_is_above_110_columns():
    assert {f"{file.relative_to(ROOT)}:{number}": len(line) for file in (*PAGES, *EXTRAS, *TESTS)
            for number, line in enumerate(file.read_text().split("\n"), 1) if len(line) > 110} == {}

def test_no_function_is_above_60_lines():
    functions = [(f"{file.name}: {node.name}", node) for file in (*PAGES, *EXTRAS)
                 for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in functions}
    assert len(lines) > 100 and {name: count for name, count in lines.items() if count > 60} == {}

def test_imports_point_down():
    for page in PAGES:
        assert packages(page) & {*BOOK, "extras"} <= BELOW[page.stem], page.name
    assert {"mentor", "data"} < packages(PAGES[3]) and "sample" in packages(PAGES[4])  # the net holds

def test_only_few_packages_are_needed():
    for file in PAGES:
        assert packages(file) <= PACKAGES | set(BOOK), file.name
    for file in EXTRAS:
        assert packages(file) <= PACKAGES | {*BOOK, "extras"}, file.name
    named = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert named == {"torch", "numpy", "pillow", "tqdm", "sentencepiece", "safetensors"}

STATE = """
import importlib, os, random, signal, sys
import numpy, torch

def state():
    return {"chance": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
            "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
            "threads": torch.get_num_threads(), "gradients": torch.is_grad_enabled(),
            "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "processes": torch.distributed.is_initialized(), "environment": dict(os.environ),
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], "folder": os.getcwd()}

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    changed = [key for key, value in state().items() if value != before[key]]
    assert not changed, f"importing {name} changed {changed}"
"""

def run(command, folder, **environment):
    """Run a command in a folder; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done

def test_importing_has_no_side_effects(tmp_path):
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (*PAGES, *EXTRAS)]
    done = run([sys.executable, "-c", STATE, *names], tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout == done.stderr == "" and list(tmp_path.iterdir()) == []

def test_the_book_alone_runs_the_readmes_two_commands(tmp_path):
    """The first of each program, at two steps a stage."""
    lines = [re.search(rf"^python {program}\.py .*$", (ROOT / "README.md").read_text(), re.MULTILINE)[0]
             for program in ("train", "sample")]
    train, draw = (shlex.split(line, comments=True) for line in lines)
    for page in PAGES:
        shutil.copy(page, tmp_path)
    assert train[:3] == ["python", "train.py", "tiny"] and draw[:3] == ["python", "sample.py", "out/tiny"]
    run([sys.executable, *train[1:], *SMALL, *few_steps(steps=2, global_batch=4)], tmp_path, PYTHONPATH="")
    run([sys.executable, *draw[1:], "--device=cpu"], tmp_path, PYTHONPATH="")
    written = {name.as_posix() for name in contents(tmp_path)} - {page.name for page in PAGES}
    weights = {f"out/tiny/{s}/model.safetensors" for s in ("tokenizer", "encoder", "pretrain", "align",
                                                           "instruct")}
    assert written >= weights | {"sample.png", "out/tiny/sheet.png", "out/tiny/scores.json"}
    assert all(name.startswith("out/tiny/") for name in written - {"sample.png"})
