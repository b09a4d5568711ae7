"""Go on from a trained run: with your own pictures, another mix, or more steps.

The last weights of --start_from become this run's stage `align`, from which `instruct` starts. Its tokenizer
stays, its text tokenizer learns new words. Other arguments are train.py's; all sizes must be as they were.

For example, train on pictures of some pets, then at a tenth of the learning rates on four of a new one, with
"Rex on the grass" in rex/1.txt and so on:

    python train.py tiny --data=pets --out=out/pets
    python -m extras.finetune tiny --start_from=out/pets --data=rex --out=out/rex \\
        --instruct.steps=60 --instruct.lr=3e-4 --instruct.muon_lr=8e-4
    python sample.py out/rex "Rex on the grass"
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import sample
import train
from tokenizer import TextTokenizer, file_hash, require, write_json


def extended(words, others):
    """A TextTokenizer with another's pieces too, its own ids the same: SentencePiece's models are protobuf
    messages, whose list of pieces goes on with what is written after their end."""
    proto = words.proto
    for piece in map(others.pieces.id_to_piece, range(3, others.pieces.vocab_size())):
        if words.pieces.piece_to_id(piece) == words.UNKNOWN:
            piece = piece.encode()
            require(len(piece) < 120, f"{piece.decode()} is too long a word")
            proto += bytes([10, len(piece) + 2, 10, len(piece)]) + piece  # 10: a piece, its text
    return TextTokenizer(proto)


def take_over(start, out, source):
    """Copy what a run starts from into its folder. start: the folder of a finished stage."""
    weights, record = file_hash(start / "model.safetensors"), out / "align" / "stage.json"
    if record.is_file() and json.loads(record.read_text()).get("imported from") == weights:
        return
    require(not out.is_dir() or not any(out.iterdir()),
            f"{out} is not empty, and did not start from {start}: choose another --out")
    words, tokenizer = TextTokenizer((start.parent / "spiece.model").read_bytes()), start.parent / "tokenizer"
    words = extended(words, source.text_tokenizer()) if words.whole_words else words
    origin = {"imported from": weights, "text tokenizer": words.digest,
              "weights of tokenizer": file_hash(tokenizer / "model.safetensors")}
    for stage, folder in (("tokenizer", tokenizer), ("align", start)):
        shutil.copytree(folder, out / stage, ignore=shutil.ignore_patterns("log.jsonl"))
        (out / "spiece.model").write_bytes(words.proto)
        write_json(out / stage / "stage.json", origin)  # align's comes last


def main(arguments):
    """Run the command line."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--start_from", required=True)
    options, rest = parser.parse_known_args(arguments)
    rest[1:1] = ["--stage=instruct"]
    run = train.parse(rest)
    source = train.open_source(run)
    if int(os.environ.get("RANK", 0)) == 0:  # other processes wait for it in train.main
        take_over(sample.newest_stage(Path(options.start_from).expanduser()), Path(run.out), source)
    train.main(rest, lambda run: source)


if __name__ == "__main__":
    sample.cli(main, "extras.finetune")
