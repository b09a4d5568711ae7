"""The plan's formulas against models that were built and steps that were taken."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Collate
from extras import plan
from mentor import DecoderConfig, Mentor, MentorConfig, TextConfig, VisionConfig
from tokenizer import VQGAN

COUNT = 16

def one_card(dtype):
    return train.Machine(0, 1, torch.device("cpu"), dtype)

def real_step(name, dtype, checkpoint, world, text_tokenizer):
    """(run, batch, a function that takes a step) of unequal widths; prompts have the longest one's length."""
    config = MentorConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=64, n_layer=2, n_head=2, mlp_width=256),
        text=TextConfig(text_tokenizer.vocab_size, 128, n_layer=2, n_head=4, head_width=32, mlp_width=320),
        decoder=DecoderConfig(512, 8, width=160, n_layer=3, n_head=4, multiple_of=32), context=64)
    run = replace(train.PRESETS["tiny"], model=config, checkpoint=checkpoint)
    run = replace(run, **{name: replace(getattr(run, name), global_batch=COUNT)})
    stage = train.STAGE_MODULES[name](name, run, one_card(dtype), Mentor(config), VQGAN(run.vqgan)).train()
    mix = {"text_to_image": 1.0} if name == "encoder" else {"subject_driven": 1.0}
    batch = Collate(text_tokenizer, config, 32)([world.dataset(mix, "plan")[i] for i in range(COUNT)])
    batch = replace(batch, lengths=torch.full_like(batch.lengths, batch.text_ids.shape[1]))
    stage.model.encoder.text.relative_bias.requires_grad_(False)  # else the CPU has no fused attention for it
    for p in filter(lambda p: p.requires_grad, stage.parameters()):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    def step():
        with one_card(dtype).autocast():
            loss, _ = stage(batch, 0)
        loss.backward()
    return run, batch, step

@pytest.mark.parametrize("name", ["encoder", "align"])
def test_flops_are_those_torch_counts(name, world, text_tokenizer):
    run, batch, step = real_step(name, torch.float32, False, world, text_tokenizer)
    tokens, decoder = batch.text_ids.shape[1], run.model.decoder
    flops, _ = plan.costs(name, run, one_card(torch.float32), tokens, len(batch.pixels) / COUNT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which is counted
        step()
    half = 3 * 2 * decoder.n_layer * (tokens + 63) ** 2 * decoder.width  # of attention, left out by flash
    half *= name != "encoder"  # which does not run the decoder
    assert abs(COUNT * (flops + half) / counter.get_total_flops() - 1) < 0.01

def most_bytes(function):
    """The most memory that torch had given out at once while function() ran."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))

@pytest.mark.parametrize("name", ["encoder", "align"])
@pytest.mark.parametrize("dtype, checkpoint", [(torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float, 0)])
def test_memory_is_what_a_step_takes(name, dtype, checkpoint, world, text_tokenizer):
    run, batch, step = real_step(name, dtype, checkpoint, world, text_tokenizer)
    tokens, t, d, s = batch.text_ids.shape[1], run.model.text, run.model.decoder, dtype.itemsize
    memory = plan.costs(name, run, one_card(dtype), tokens, len(batch.pixels) / COUNT)[1]
    planned = sum(memory[what] for what in ("bfloat16", "activations", "logits"))
    # The CPU's norms keep one tensor more than CUDA's, and dropout's masks have the type of the values.
    texts = tokens + (name == "encoder") * run.model.image_tokens
    layers = 1 if checkpoint else None
    planned += (name != "encoder") * COUNT * (layers or d.n_layer) * 2 * (3 + s) * d.width * (tokens + 63)
    planned += COUNT * (layers or t.n_layer) * (2 * (3 + s) * t.width + (s - 1) * t.mlp_width) * texts
    measured = most_bytes(step)
    assert measured * 0.92 < planned < measured * (1.75 if checkpoint else 1.06)

@pytest.mark.parametrize("preset, name", [("tiny", "pretrain"), ("tiny", "align"), ("full", "instruct")])
def test_parameters_are_those_of_the_models(preset, name):
    run = train.parse([preset, f"--{name}.trains=projector,decoder", "--micro_batch=8"])
    with torch.device("meta"):
        model, vqgan = Mentor(run.model), VQGAN(run.vqgan)
    trained = sum(p.numel() for part in (model.projector, model.decoder) for p in part.parameters())
    every = sum(p.numel() for part in (model, vqgan) for p in part.parameters())
    memory = plan.costs(name, run, one_card(torch.bfloat16), 30, 0.5)[1]
    assert memory["gradients"] == 4 * trained == memory["AdamW"] / 2 and memory["weights"] == 4 * every
    if preset == "full":
        assert every - sum(p.numel() for p in vqgan.parameters()) == 2_311_729_408

def test_full_fits_a_card_of_80_gigabytes_at_a_micro_batch_of_8():
    """With prompts of the world of shapes, where an image takes 256 tokens."""
    for name, expected in (("align", 43.2), ("instruct", 64.3)):
        run = train.parse(["full", f"--stage={name}", "--micro_batch=8"])
        for checkpoint in (False, True):
            case = replace(run, checkpoint=checkpoint)
            _, memory = plan.costs(name, case, one_card(torch.bfloat16), 275, 0.5)
            size = (sum(memory.values()) - memory["codes"]) / 2**30
            assert size < 0.94 * 80 and (checkpoint or abs(size - expected) < 1)
        assert memory["activations"] < 4 * 2**30

def test_the_plan_is_printed(capsys):
    plan.main(["tiny", "--gpus=1", "--gigabytes=0.05", "--share=0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[1].startswith("tokenizer --checkpoint: ")
    assert {line.rsplit(": ", 1)[1] for line in lines} == {"fits", "does not fit"}

def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="--alignn.lr=1: no such key"):
        plan.main(["tiny", "--gpus=1", "--alignn.lr=1"])
