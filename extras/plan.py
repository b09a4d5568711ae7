"""What each stage of a run costs, its prompts padded to the longest of 32.

    python -m extras.plan full --micro_batch=8 --gpus=8 --tflops=989 --gigabytes=80 --share=0.4

Keys of train.py; cards, and the share of their peak that is used (the paper: 0.18).
"""

import argparse
from dataclasses import replace

import torch
import torch.nn as nn

import sample
import train
from data import Collate
from mentor import Mentor
from tokenizer import VQGAN


def picture(size, *parts):
    """One picture's convolutions: [FLOPs, values made]."""
    cost = [0, 0]

    def note(module, x, y):
        cost[0] += 2 * module.weight.numel() * y[0, 0].numel()
        cost[1] += y.numel()

    for module in nn.ModuleList(parts).modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    nn.Sequential(*parts)(torch.empty(1, 3, size, size, device="meta"))
    return cost


def weights(module):
    """Weights that a position is multiplied with."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def forward_pass(hidden, model, tokens, images, s, checkpoint):
    """One sample's way: [(part, FLOPs, bytes kept for gradients)]; hidden: positions asked for words in the
    encoder's stage, else 0.

    A block keeps its inputs (4 bytes a value), what its matrices read (s bytes, and a cast each), q, k, v,
    attention's output, the MLP's values, a byte for each dropout; with checkpoint one block at a time.
    """
    def kept(layers, width, block):
        return 4 * layers * width + block if checkpoint else layers * block

    v, t, d, cast = model.config.vision, model.config.text, model.config.decoder, s == 2
    P, inner = tokens + bool(hidden) * model.config.image_tokens, t.n_head * t.head_width
    T, patches, seen = tokens + d.n_code - 1, images * (1 + v.n_patch), v.n_layer - 1
    vision, connector, text, blocks = *model.encoder.children(), model.decoder.blocks
    hide, head = hidden * t.vocab_size * t.width, d.n_code * d.codebook_size * d.width
    look = patches * ((8 + (6 + 2 * cast) * s) * v.width + 3 * s * v.mlp_width)
    read = (10 + (2 + 3 * cast) * s) * t.width + 4 * s * inner + (4 * s + 1) * t.mlp_width
    draw = (10 + (8 + cast) * s) * d.width + 4 * s * blocks[0].mlp.w2.in_features
    rows = [
        (vision, 2 * patches * seen * (weights(vision.blocks[0]) + 2 * v.width * v.n_patch), seen * look),
        (connector, 2 * patches * weights(connector), 0),
        (text, 2 * (P * weights(text) + 2 * t.n_layer * inner * P * P + hide),
         P * (kept(t.n_layer, t.width, read) + 20 * t.width) + s * t.n_head * P * P),
        (model.projector, 2 * tokens * weights(model.projector), 0),
        (model.decoder, 2 * (T * (weights(blocks) + d.n_layer * d.width * T) + head),
         T * (kept(d.n_layer, d.width, draw) + 16 * d.width) + (4 + s) * d.n_code * d.width)]
    return rows[:3] if hidden else rows


def costs(name, run, machine, tokens, images):
    """FLOPs of a sample, {what: bytes of a micro-batch}."""
    micro, s = train.micro_batches(getattr(run, name), run, machine)[0], machine.dtype.itemsize
    d, size = run.model.decoder, run.vqgan.image_size
    with torch.device("meta"):
        vqgan = VQGAN(run.vqgan).requires_grad_(False)
        stage = (train.TokenizerStage(run, machine, None) if name == "tokenizer" else
                 train.STAGE_MODULES[name](name, run, machine, Mentor(run.model), vqgan))
    vqgan = {"tokenizer": stage.model, "encoder": nn.Module()}.get(name, vqgan)
    every = {*stage.parameters(), *vqgan.parameters()}
    learning = sum(p.numel() * p.requires_grad for p in every)
    memory = {"weights": 4 * sum(map(torch.numel, every)), "gradients": 4 * learning, "AdamW": 8 * learning}
    if name == "tokenizer":  # keeps each value, also normalised and cast
        flops, made = picture(size, vqgan.encoder, vqgan.quant_conv, vqgan.post_quant_conv, vqgan.decoder)
        return 3 * flops, memory | {"activations": micro * made * (8 + s)}
    flops, learns = 0, False
    # positions that are asked: of half of the samples image tokens, of the others hidden words
    hidden = (0.8 * tokens + min(tokens, run.model.image_tokens)) / 2 if name == "encoder" else 0
    logits = hidden * run.model.text.vocab_size if hidden else d.n_code * d.codebook_size
    memory |= {"bfloat16": 0, "activations": 0, "logits": 12 * micro * logits, "codes": 0}
    if not hidden:
        flops = picture(size, vqgan.encoder, vqgan.quant_conv)[0]
        memory["codes"] = 20 * min(micro, vqgan.at_once) * run.vqgan.ch * size**2
    rows = forward_pass(hidden, stage.model, tokens, 1 if hidden else images, s, run.checkpoint)
    for part, forward, kept in rows:
        trains = any(p.requires_grad for p in part.parameters())
        learns |= trains
        flops += forward * (1 + trains + learns)
        memory["bfloat16"] += 2 * weights(part) * learns * (s == 2)
        memory["activations"] += micro * kept * learns
    return flops, memory


def main(arguments):
    """Print the plan."""
    parser = argparse.ArgumentParser(usage=__doc__)
    for key, default in {"gpus": 8, "tflops": 989.0, "gigabytes": 80.0, "share": 0.4}.items():
        parser.add_argument(f"--{key}", type=type(default), default=default)
    cards, keys = parser.parse_known_args(arguments or ["--help"])
    run, rate = train.parse(keys), cards.gpus * cards.tflops * cards.share * 3.6e15  # FLOPs an hour
    dtype = torch.float32 if run.dtype == "float32" else torch.bfloat16
    machine, source = train.Machine(0, cards.gpus, torch.device("cpu"), dtype), train.open_source(run)
    collate = Collate(source.text_tokenizer(), run.model, run.vqgan.image_size)
    for name in train.STAGES if run.stage == "all" else [run.stage]:
        config, dataset = getattr(run, name), train.make_dataset(name, run, source)
        prompts = [(s.prompt, len(s.images)) for s in map(dataset.__getitem__, range(32))]
        tokens, images = max(len(collate.encode(*p)) for p in prompts), sum(n for _, n in prompts) / 32
        for checkpoint in (False, True):
            flops, memory = costs(name, replace(run, checkpoint=checkpoint), machine, tokens, images)
            hours = config.steps * config.global_batch * flops / rate
            most = (sum(memory.values()) - min(memory["activations"], memory.get("codes", 0))) / 2**30
            fits = "fits" if most < 0.94 * cards.gigabytes else "does not fit"  # CUDA takes the rest
            print(f"{name}{' --checkpoint' * checkpoint}: {hours:.3g} h, {flops:.3g} FLOPs a sample, "
                  f"at most {most:.3g} GiB: {fits}")


if __name__ == "__main__":
    sample.cli(main, "plan.py")
