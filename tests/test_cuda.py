"""What a GPU needs: steps that wait for no number, few compiled programs, and a CPU's results. The last test
skips where there is no CUDA; `python -m extras.bench gpu` prints the numbers that it bounds."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from conftest import FIVE, ROOT, randomize, small_config
from data import Collate, Shapes, Samples
from mentor import Mentor
from sample import Pipeline, generate
from tokenizer import VQGAN

TINY = train.parse(["tiny"])

def new_stage(name, config, device="cpu", dtype=torch.float32, **keys):
    """A stage of a small model with random weights, and its optimizers."""
    run, machine = replace(TINY, model=config, **keys), train.Machine(0, 1, torch.device(device), dtype)
    torch.manual_seed(0)
    vqgan, model = VQGAN(replace(TINY.vqgan, codebook_size=64)), randomize(Mentor(config), 0.05)
    parts = (run, machine, None) if name == "tokenizer" else (name, run, machine, model, vqgan)
    stage = train.STAGE_MODULES[name](*parts).train()
    stage = stage if device == "cpu" else stage.to(device)
    return stage, train.make_optimizers(stage, getattr(run, name), run)

@pytest.mark.parametrize("name", [name for name in train.STAGES if name != "encoder"])  # picks hidden words
def test_a_training_step_waits_for_no_number(name, text_tokenizer, make_batch):
    """FakeTensorMode's tensors hold nothing: reading a number, or a size that depends on one, fails."""
    batch = make_batch(small_config(text_tokenizer), 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage, optimizers = new_stage(name, small_config(text_tokenizer))
        loss, _ = stage(batch, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in stage.parameters() if p.requires_grad], 1.0)
        optimizers[0].step()
        with pytest.raises(DataDependentOutputException):
            loss.item()

def test_compiled_blocks_share_few_programs(text_tokenizer, make_batch):
    """None for a layer's or a length's sake; gradients stay the same; checkpoint lets them be compiled."""
    torch._dynamo.reset()
    config, count, gradients = small_config(text_tokenizer), CompileCounterWithBackend("eager"), []
    config = replace(config, **{p: replace(getattr(config, p), n_layer=4) for p in ("text", "decoder")})
    batches = [make_batch(config, 6, seed=seed) for seed in range(3)]
    with patch.object(torch, "compile", partial(torch.compile, backend=count)):
        for keys in ({}, {"compile": True, "checkpoint": True}):
            stage, _ = new_stage("instruct", config, **keys)
            for batch in batches:
                stage(batch, 0)[0].backward()
            gradients.append([p.grad for p in stage.parameters() if p.grad is not None])
    assert 2 <= count.frame_count <= 5 and len({batch.text_ids.shape for batch in batches}) > 1
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    with torch.no_grad():  # validation, whose last batch is smaller
        [stage.eval().validation_loss(make_batch(config, size)) for size in (6, 1)]
    assert count.frame_count <= 12

@torch.no_grad()
def test_a_decode_step_is_one_program(text_tokenizer):
    """For each number of rows and of the cache's slots the first two times, then for all."""
    config, count = small_config(text_tokenizer), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    model = Mentor(replace(config, decoder=replace(config.decoder, n_layer=3, width=16, n_head=1))).eval()
    step = torch.compile(model.decode_step, backend=count, fullgraph=True)
    for rows, n_prefix, programs in ((2, 9, 1), (2, 64, 1), (2, 65, 2), (6, 129, 3), (8, 300, 3)):
        logits, cache = model.prefill(torch.randn(rows, n_prefix, 16), torch.full((rows,), n_prefix))
        for _ in range(63 if n_prefix == 9 else 3):
            logits = step(logits.argmax(-1), cache)
        assert count.frame_count == programs

def step_difference(device, dtype):
    """Relative differences of a step of tiny on the CPU and on the device: [of the loss, of the gradient]."""
    dataset, results = Samples(Shapes(32), dict.fromkeys(FIVE, 1.0), 0), []
    batch = Collate(Shapes(32).text_tokenizer(), TINY.model, 32)([dataset[i] for i in range(16)])
    codes = torch.arange(16)[:, None] * torch.arange(64) % 64  # the tokenizer's may differ by a near tie
    for where in ("cpu", device):
        stage, _ = new_stage("instruct", TINY.model, where, dtype)
        stage.vqgan[0].encode = lambda targets: codes.to(targets.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), stage.machine.autocast():
            loss, _ = stage(batch.to(where), 0)
        loss.backward()
        gradients = [p.grad.flatten().cpu() for p in stage.parameters() if p.grad is not None]
        results.append((loss.detach().cpu(), torch.cat(gradients)))
    return [((a - b).norm() / a.norm()).item() for a, b in zip(*results)]

@torch.no_grad()
def same_codes(device, dtype, compile=False):
    """Share of codes that trained/tiny draws greedily on the device as on the CPU in float32."""
    dataset, codes, folder = Samples(Shapes(32), {"subject_driven": 1.0}, 0), [], ROOT / "trained/tiny"
    for where, exact in (("cpu", True), (device, dtype == torch.float32)):
        pipeline = Pipeline(folder, "cpu") if exact else Pipeline(folder, where, compile)
        model = pipeline.model.to(where) if exact else pipeline.model.bfloat16()
        batch = pipeline.collate([dataset[i] for i in range(16)]).to(where)
        greedy = replace(model.config.sampling, temperature=0.0)
        codes.append(generate(model, batch, greedy, [torch.Generator(where)] * 16).cpu())
    return (codes[0] == codes[1]).float().mean().item()

def test_the_comparisons_and_bfloat16_work_on_the_cpu():
    assert step_difference("cpu", torch.float32) == [0, 0] and same_codes("cpu", torch.bfloat16) > 0.8

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_takes_the_cpus_step_and_draws_its_codes():
    assert max(step_difference("cuda", torch.float32)) < 1e-3
    assert max(step_difference("cuda", torch.bfloat16)) < 0.03
    assert same_codes("cuda", torch.float32) > 0.9 and same_codes("cuda", torch.bfloat16) > 0.75
    assert same_codes("cuda", torch.bfloat16, True) > 0.75 and not counters["inductor"]["cudagraph_skips"]
