"""`full` at its true size, with random weights in bfloat16 on the CPU. Minutes of work, so only when asked for:

    MENTOR_FULL_SIZE=1 python -m pytest -s tests/test_full_size.py

Each check runs in a process of its own, whose peak memory must stay within 12 GiB.
"""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import mentor  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import Collate, Shapes, WorldDataset  # noqa: E402
from mentor import Mentor, SamplingConfig  # noqa: E402
from tokenizer import VQGAN  # noqa: E402

LIMIT_GIB, NEEDED_GIB, N_CODE = 12, 14, 4
RUN = train.PRESETS["full"]


def fill(module):
    """Cheap random weights for what was built on the meta device: small uniform matrices, norms 1, biases 0."""
    module.to_empty(device="cpu")
    for name, p in module.named_parameters():
        p.data.uniform_(-0.03, 0.03) if p.ndim > 1 else p.data.fill_("norm" in name and name.endswith("weight"))
    return module


def random_mentor():
    """`full` in bfloat16, never there in float32."""
    with torch.device("meta"):
        model = Mentor(RUN.model).bfloat16()
    rotary = mentor.rotary_table(RUN.model.decoder.grid_size, RUN.model.decoder.width // RUN.model.decoder.n_head)
    fill(model).decoder.rotary = rotary
    return model


def one_sample():
    """A batch of one prompt with one image, and its target of 512 pixels."""
    world = Shapes(RUN.vqgan.image_size)
    collate = Collate(world.text_tokenizer(), RUN.model.vision.image_size, RUN.model.image_tokens, RUN.model.context, RUN.vqgan.image_size)
    return collate([WorldDataset(world, {"subject_driven": 1.0}, 0)[0]])


@torch.no_grad()
def draw():
    """The first codes of a picture, guided: prefill once for both halves, then cached steps."""
    model, batch, generator = random_mentor().eval(), one_sample(), torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, codes = model.encoder(batch), []
        prefix = torch.cat([model.projector(hidden, batch.lengths, torch.tensor([dropped])) for dropped in (False, True)])
        logits, cache = model.prefill(prefix, batch.lengths.repeat(2))
        for _ in range(N_CODE):
            codes.append(sample.choose(sample.guide(*logits.chunk(2), 7.5), SamplingConfig(), generator))
            logits = model.decode_step(codes[-1].repeat(2), cache)
    assert prefix.shape == (2, int(batch.lengths), 1280) and cache.k.dtype == torch.bfloat16 and cache.used == int(batch.lengths) + N_CODE
    assert logits.shape == (2, 16384) and logits.isfinite().all() and logits.std() > 0
    return {"codes": torch.cat(codes).tolist()}


def step():
    """A training step's forward: codes of the target, then the loss, keeping what the backward pass needs."""
    with torch.device("meta"):
        vqgan = VQGAN(RUN.vqgan)
    machine = train.Machine(0, 1, torch.device("cpu"), torch.bfloat16)
    stage = train.MentorStage("align", RUN, machine, random_mentor(), fill(vqgan)).train()
    with machine.autocast():
        loss, logs = stage(one_sample(), 0)
    assert loss.requires_grad and abs(loss.item() - 9.7) < 3    # about ln(16384), as nothing is learnt
    return {"loss": loss.item()}


def released():
    """Released files as people have them, in bfloat16; --stage=import, --stage=export: the same bits in every tensor."""
    folder, text_tokenizer = Path(sys.argv[2]), Shapes(32).text_tokenizer()
    digests = lambda tensors: {n: hashlib.sha256(t.detach().view(torch.uint8).numpy()).hexdigest() for n, t in tensors.items()}  # noqa: E731
    with torch.device("meta"):
        vqgan = VQGAN(RUN.vqgan).bfloat16()
    parameters = {n: p.detach().uniform_(-1, 1) for n, p in mentor.released_parameters(random_mentor()).items()}  # norms too, so that no two are alike
    codes = {n: p.detach().uniform_(-1, 1) for n, p in fill(vqgan).named_parameters()}
    before = digests(parameters), digests(codes)
    part = lambda start: {n.removeprefix(start): p for n, p in parameters.items() if n.startswith(start)}  # noqa: E731
    for name in ("clip", "t5"):
        (folder / name).mkdir()
    save_file(part("multimodal_encoder.vision_model.vision_tower."), folder / "clip" / "model.safetensors")
    t5, shards = part("multimodal_encoder.language_model."), {}
    for i, n in enumerate(t5):
        shards.setdefault(f"shard{2 * i // len(t5)}.bin", {})[n] = t5[n]
    for shard, tensors in shards.items():
        torch.save(tensors, folder / "t5" / shard)
    (folder / "t5" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {n: shard for shard, tensors in shards.items() for n in tensors}}))
    (folder / "t5" / "spiece.model").write_bytes(text_tokenizer.proto)
    torch.save({n.replace("multimodal_encoder.language_projection", "model.mm_projector"): p for n, p in parameters.items() if "language_projection" in n}, folder / "mm_projector.bin")
    torch.save({"model": {n: p for n, p in parameters.items() if not n.startswith("multimodal")}}, folder / "generator.pt")
    torch.save({"model": codes}, folder / "vq.pt")
    del parameters, codes, vqgan, part, t5, tensors, shards
    times = [time.perf_counter()]
    parts = {"clip": "clip", "t5": "t5", "connector": "mm_projector.bin", "generator": "generator.pt", "vq": "vq.pt"}
    train.main(["full", "--stage=import", f"--out={folder}/out", "--device=cpu", *(f"--released.{source}={folder}/{name}" for source, name in parts.items())])
    times.append(time.perf_counter())
    train.main(["full", "--stage=export", f"--out={folder}/out", "--device=cpu", f"--released.mentor={folder}/whole.pt", f"--released.vq={folder}/codes.pt"])
    times.append(time.perf_counter())
    after = digests(mentor.released_tensors("mentor", folder / "whole.pt")), digests(mentor.released_tensors("vq", folder / "codes.pt"))
    assert after == before and all(len(set(d.values())) == len(d) for d in after)
    return {"tensors": [len(d) for d in after], "import_s": round(times[1] - times[0], 1), "export_s": round(times[2] - times[1], 1)}


def available_gib():
    """GiB that a new process could have; 0 where the system does not say."""
    if not Path("/proc/meminfo").is_file():
        return 0
    words = Path("/proc/meminfo").read_text().split()
    return int(words[words.index("MemAvailable:") + 1]) / 2**20


@pytest.mark.parametrize("check", ["draw", "step", "released"])
def test_full_size_within_12_gib(check, tmp_path):
    if os.environ.get("MENTOR_FULL_SIZE") != "1":
        pytest.skip("takes minutes; MENTOR_FULL_SIZE=1 runs it")
    if available_gib() < NEEDED_GIB:
        pytest.skip(f"needs {NEEDED_GIB} GiB of memory, {available_gib():.1f} are free")
    done = subprocess.run([sys.executable, __file__, check, str(tmp_path)], capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(check, result)
    assert result["peak_gib"] < LIMIT_GIB


if __name__ == "__main__":
    torch.manual_seed(0)
    started = time.perf_counter()
    outcome = {"draw": draw, "step": step, "released": released}[sys.argv[1]]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**outcome, "seconds": round(time.perf_counter() - started, 1), "peak_gib": round(peak, 2)}))
