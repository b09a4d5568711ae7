"""Go on from a trained run: with your own pictures, another mix, or more steps.

    python -m extras.finetune tiny --start_from=trained/tiny --instruct.steps=300 --out=out/more
    python -m extras.finetune tiny --start_from=out/pets --data=cats --out=out/cats

The tokenizer of --start_from is taken over, its last weights become this run's stage `align`, and `instruct` (or what
--stage names) starts from them. All other arguments are train.py's. Words that the old run did not know are added to
its text tokenizer; another image tokenizer or other sizes are refused.
"""

import json
import shutil
import struct
from pathlib import Path

import sample
import train
from tokenizer import TextTokenizer, file_hash, require, write_json


def extended(tokenizer, text):
    """A TextTokenizer with the words of a text that it lacks, all its own ids the same. A SentencePiece model is a protobuf
    message, whose list of pieces goes on with those that are written after its end."""
    proto = tokenizer.proto
    for piece in dict.fromkeys(tokenizer.pieces.normalize(word) for word in tokenizer.unknown_words(text)):
        piece = piece.encode()
        require(len(piece) < 100, f"{piece.decode()!r}: a word must have less than 100 bytes")
        entry = b"\x0a" + bytes([len(piece)]) + piece + b"\x15" + struct.pack("<f", -20)  # and its score
        proto += b"\x0a" + bytes([len(entry)]) + entry
    return TextTokenizer(proto)


def take_over(start, run, source):
    """Copy into the run's folder what it starts from: `start`, the folder of a finished stage. Raises ValueError if the
    folder holds something else already."""
    out, origin = Path(run.out), {"imported from": file_hash(start / "model.safetensors")}
    record = out / "align" / "stage.json"
    if record.is_file() or (out / "tokenizer").exists():
        same = record.is_file() and json.loads(record.read_text()) == origin
        return require(same, f"{out} does not hold what --start_from={start} does: choose another --out")
    for stage, folder in (("tokenizer", start.parent / "tokenizer"), ("align", start)):
        shutil.copytree(folder, out / stage)
        if stage == "tokenizer":
            write_json(out / stage / "stage.json", origin)
    words = TextTokenizer((start.parent / "spiece.model").read_bytes())
    if words.whole_words:
        words = extended(words, " ".join(source.text_tokenizer().known_words()))
    (out / "spiece.model").write_bytes(words.proto)
    write_json(record, origin)  # last: now all is there


def main(arguments):
    """Run the command line."""
    starts = [a.partition("=")[2] for a in arguments if a.startswith("--start_from=")]
    if len(starts) != 1 or {"-h", "--help"} & set(arguments):
        return print(__doc__)
    rest = [a for a in arguments if not a.startswith("--start_from=")]
    run, start = train.parse(rest), sample.newest_stage(Path(starts[0]).expanduser())
    source = train.open_source(run)
    take_over(start, run, source)
    stage = [] if run.stage != "all" else ["--stage=instruct"]
    train.main([*rest, *stage], lambda run: source)


if __name__ == "__main__":
    sample.cli(main, "finetune")
