"""Speed that changes no result: each fast way against the plain one, and what a GPU must not be made to wait for."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from conftest import randomize, small_config
from data import TASKS, Batch, WorldDataset
from mentor import KVCache, Mentor, SamplingConfig
from sample import GraphedDecoder, Pipeline, continue_prefix, generate
from tokenizer import VQGAN, TokenizerConfig

CPU = train.Machine(0, 1, torch.device("cpu"), torch.float32)
GREEDY = SamplingConfig(cfg_scale=3.0, temperature=0.0)


def small_vqgan():
    return VQGAN(TokenizerConfig(image_size=32, ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4, z_channels=8, codebook_size=64))


def small_stage(text_tokenizer, name="instruct", **keys):
    run = replace(train.PRESETS["tiny"], model=small_config(text_tokenizer), **keys)
    torch.manual_seed(0)
    return train.MentorStage(name, run, CPU, randomize(Mentor(run.model)), small_vqgan()).train()


class Recording:
    """A decoder that keeps all logits."""

    def __init__(self, decoder):
        self.decoder, self.logits = decoder, []

    def prefill(self, prefix, lengths):
        logits, cache = self.decoder.prefill(prefix, lengths)
        self.logits.append(logits)
        return logits, cache

    def decode_step(self, codes, cache):
        self.logits.append(self.decoder.decode_step(codes, cache).clone())
        return self.logits[-1]


# Training


@pytest.mark.parametrize("window", [None, 64])
def test_the_straightforward_forward_gives_the_same_losses_and_gradients(text_tokenizer, make_batch, window):
    """Left padding, a dense mask and the head everywhere, on the batch's longest prompt or the whole window: the same function."""
    stage = small_stage(text_tokenizer)
    batch = make_batch(stage.model.config, 6)
    batch = replace(batch, drop=torch.arange(6) % 3 == 0)
    codes = torch.randint(64, (6, 64), generator=torch.Generator().manual_seed(0))
    results = []
    for losses in (lambda: stage.code_losses(batch, codes)[0], lambda: train.straightforward_losses(stage.model, train.widen(batch, window) if window else batch, codes),
                   lambda: train.straightforward_losses(stage.model, batch, codes, everywhere=False)):
        stage.zero_grad()
        value = losses()
        value.mean().backward()
        results.append((value.detach(), {n: p.grad.clone() for n, p in stage.trained() if p.grad is not None}))
    for value, gradients in results[1:]:
        torch.testing.assert_close(value, results[0][0], atol=1e-5, rtol=1e-5)
        for n, gradient in results[0][1].items():
            torch.testing.assert_close(gradients[n], gradient, atol=2e-5, rtol=1e-3, msg=n)


class Waits(TorchDispatchMode):
    """Notes every operation that makes the CPU wait for a GPU: reading a number, and sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "repeat_interleave.Tensor")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        masks = name.startswith("index") and any(torch.is_tensor(t) and t.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for t in a)
        if name.startswith(self.NAMES) or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", train.STAGES)
def test_a_training_step_never_waits_for_the_gpu(name, text_tokenizer, make_batch):
    run = replace(train.PRESETS["tiny"], model=small_config(text_tokenizer), vqgan=small_vqgan().config)
    stage = train.TokenizerStage(run, CPU).train() if name == "tokenizer" else small_stage(text_tokenizer, name)
    optimizers = train.make_optimizers(stage, getattr(run, name), run)
    batch = make_batch(run.model, 6)
    with Waits() as waits:
        loss, logs = stage(batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in stage.trained()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        stage.after_step(0)
    assert waits.found == [] and (name == "tokenizer" or set(batch.tasks) < logs.keys())
    with Waits() as waits:
        loss.item(), batch.lengths[batch.lengths > 3]
    assert len(waits.found) == 2  # the net holds


def test_a_batch_knows_how_to_be_pinned(text_tokenizer, make_batch, monkeypatch):
    """The DataLoader pins what has a pin_memory method, and leaves anything else as it is without a word."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = make_batch(small_config(text_tokenizer), 2)
    same = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert isinstance(same, Batch) and len(pinned) == sum(torch.is_tensor(v) for v in vars(batch).values()) > 6 and same.tasks == batch.tasks


@pytest.mark.skipif(not os.environ.get("MENTOR_FULL_SIZE"), reason="MENTOR_FULL_SIZE=1 compiles: half a minute")
def test_compiled_blocks_share_one_program_and_give_the_same_gradients(text_tokenizer, make_batch, monkeypatch, capsys):
    torch._dynamo.reset()
    count, real = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keys: real(function, backend=count, **keys))
    results = []
    for keys in ({"compile": "false"}, {"compile": "true"}, {"compile": "true", "checkpoint": True}):
        stage = small_stage(text_tokenizer, **keys)
        for size in (6, 5):
            loss, _ = stage(make_batch(stage.model.config, size, seed=size), 0)
            loss.backward()
        results.append({n: p.grad for n, p in stage.trained()})
    for gradients in results[1:]:
        for n, gradient in results[0].items():
            torch.testing.assert_close(gradients[n], gradient, atol=1e-5, rtol=1e-4, msg=n)
    assert 2 <= count.frame_count <= 8, "one program a kind of block, not one a block or a length"
    assert "blocks compiled in" in capsys.readouterr().out


def test_where_torch_compile_fails_the_blocks_stay_and_one_line_says_so(text_tokenizer, make_batch, monkeypatch, capsys):
    def broken(*arguments, **keys):
        raise RuntimeError("no compiler here\nand much more")

    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keys: real(function, backend=broken, **keys))
    stage = small_stage(text_tokenizer, compile="true")
    assert capsys.readouterr().out == "blocks not compiled: torch.compile fails here (no compiler here)\n"
    plain = small_stage(text_tokenizer)
    batch = make_batch(stage.model.config, 4)
    assert torch.equal(stage(batch, 0)[0], plain(batch, 0)[0])


# Drawing


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("large", [False, True])
def test_a_prompt_draws_the_same_bits_alone_and_in_a_batch(model, world, text_tokenizer, threads, scale, large, monkeypatch):
    """Different prompts, ragged prefixes, one call: the logits of every step, not only the codes. (The VQ decoder's convolutions round by batch.)"""
    monkeypatch.setattr(sample, "PACK_FROM", 0 if large else 256)
    vision, connector = replace(model.config.vision, patch_size=8), replace(model.config.connector, n_query=12)
    model = randomize(Mentor(replace(model.config, vision=vision, connector=connector, context=128))).eval()
    pipeline = Pipeline(model, small_vqgan(), text_tokenizer, {}, "cpu")
    samples = [WorldDataset(world, dict.fromkeys(TASKS, 1.0), 0)[i] for i in range(7)]
    sampling = replace(GREEDY, cfg_scale=scale)

    def drawn(group):
        """Pictures, codes and the logits of every step, conditional and unconditional rows."""
        recording = pipeline.decoder = Recording(model)
        pictures, codes = pipeline.draw(group, sampling)
        logits = torch.stack(recording.logits)
        return pictures, codes, logits[:, : len(group)], logits[:, len(group) : 2 * len(group)] if scale != 1 else logits[:, :0]

    alone = [drawn([s]) for s in samples]
    assert pipeline.collate(samples).lengths.unique().numel() > 3 and len({tuple(codes[0].tolist()) for _, codes, *_ in alone}) > 3
    for size in (2, 3, 5, 7):
        pictures, codes, conditional, unconditional = drawn(samples[:size])
        for i, (picture, code, *logits) in enumerate(alone[:size]):
            assert torch.equal(code[0], codes[i]) and np.abs(picture[0].astype(int) - pictures[i]).max() <= 1
            assert torch.equal(logits[0][:, 0], conditional[:, i]), (size, i)
            assert scale == 1 or torch.equal(logits[1][:, 0], unconditional[:, i]), (size, i)


@torch.no_grad()
def test_an_image_becomes_the_same_tokens_alone_and_beside_another(threads):
    """At the width of `small`, whose sums are long enough to be split."""
    config = sample.mentor.PRESETS["small"]
    torch.manual_seed(0)
    encoder = sample.mentor.MultimodalEncoder(replace(config, text=replace(config.text, n_layer=1))).eval()
    pixels = torch.randn(2, 3, 64, 64)
    first, both = (encoder.connector(encoder.vision(images), None, None) for images in (pixels[:1], pixels))
    assert torch.equal(first[0], both[0])


@pytest.mark.parametrize("large", [False, True])
def test_packed_matrices_give_the_same_logits(model, make_batch, large, monkeypatch):
    """Transposed or in oneDNN's layout: the plain model's products, within rounding."""
    monkeypatch.setattr(sample, "PACK_FROM", 0 if large else 256)
    batch, runs = make_batch(model.config, 3), []
    prefix, codes = model.prefix(batch, torch.zeros(3, dtype=torch.bool)), torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        logits, cache = model.prefill(prefix, batch.lengths)
        runs.append(torch.stack([logits, *(model.decode_step(codes[:, k], cache) for k in range(20))]))
        sample.pack(model)
    assert all("forward" in vars(module) for module in model.decoder.modules() if isinstance(module, torch.nn.Linear))
    torch.testing.assert_close(runs[1], runs[0], atol=1e-5, rtol=1e-4)


def test_drawing_reads_no_number_back_and_lets_nothing_grow(model, make_batch):
    batch, shapes = make_batch(model.config, 3), set()

    class Watched(Recording):
        def decode_step(self, codes, cache):
            shapes.add((codes.shape, cache.k.data_ptr(), cache.k.shape, cache.mask.data_ptr()))
            return super().decode_step(codes, cache)

    with Waits() as waits:
        generate(model, batch, SamplingConfig(cfg_scale=3.0, top_k=9, top_p=0.9), torch.Generator().manual_seed(0), Watched(model))
    assert waits.found == [] and len(shapes) == 1


def test_a_step_reads_the_buckets_that_are_filled_and_no_more(model, monkeypatch):
    monkeypatch.setattr(KVCache, "BUCKET", 16)
    logits, cache = model.prefill(torch.randn(2, 20, 64), torch.tensor([20, 7]))
    read, append = [], cache.append
    cache.append = lambda *stored: read.append((kept := append(*stored))[0].shape[2]) or kept
    for _ in range(63):
        model.decode_step(logits.argmax(-1), cache)
    assert cache.k.shape[3] == 96 and read[::2] == [-(-(21 + k) // 16) * 16 for k in range(63)]


def test_the_cache_has_room_for_the_last_code(model, make_batch, monkeypatch):
    batch = make_batch(model.config, 3)
    drawn = generate(model, batch, GREEDY, torch.Generator())
    monkeypatch.setattr(KVCache, "BUCKET", 1)
    assert torch.equal(generate(model, batch, GREEDY, torch.Generator()), drawn)


def run_twice(step):
    """In record_graph's place: a warm-up run, then a function that runs the step into the tensor of the first run."""
    step()
    kept = step()
    return lambda: kept.copy_(step()), kept


def test_a_graphed_decoder_draws_the_same_from_buffers_that_stay(model, make_batch, monkeypatch):
    """What a CUDA graph needs, with the recording replaced: fixed addresses, one graph a bucket, an untouched cache."""
    monkeypatch.setattr(KVCache, "BUCKET", 16)
    recorded = []
    decoder = GraphedDecoder(model, lambda step: recorded.append(decoder.cache.used) or run_twice(step))
    addresses = set()
    for seed in (0, 1, 2):
        batch = make_batch(model.config, 3, seed=seed)
        plain = generate(model, batch, GREEDY, torch.Generator())
        assert torch.equal(generate(model, batch, GREEDY, torch.Generator(), decoder), plain)
        addresses.add((decoder.codes.data_ptr(), decoder.cache.k.data_ptr(), decoder.cache.mask.data_ptr()))
        assert len(recorded) == len(decoder.graphs) <= 1 + decoder.cache.k.shape[3] // 16
    assert len(addresses) == 1 and decoder.warmup > 0 and decoder.cache.k.shape[3] >= model.config.context + 63
    generate(model, make_batch(model.config, 5), GREEDY, torch.Generator(), decoder)
    assert len(decoder.codes) == 12 and len(recorded) > len(decoder.graphs)  # another size (10 rows, in whole fours) starts over


def test_a_model_is_made_ready_without_dropout(model):
    assert not sample.make_ready(model.train(), torch.device("cpu")).training


@torch.no_grad()  # as drawing is; the norm for gradients rounds more
def test_drawing_in_bfloat16_stays_near_float32(model, make_batch):
    batch = make_batch(model.config, 3)
    logits, _ = model.prefill(model.prefix(batch, torch.zeros(3, dtype=torch.bool)), batch.lengths)
    model.bfloat16()
    codes = generate(model, batch, GREEDY, torch.Generator())
    halved, cache = model.prefill(model.prefix(batch, torch.zeros(3, dtype=torch.bool)), batch.lengths)
    assert cache.k.dtype == torch.bfloat16 and halved.dtype == torch.float32 and codes.shape == (3, 64) and model.decoder.rotary.dtype == torch.complex64
    assert (halved - logits).abs().max() < 0.4 * logits.std()


# The benchmarks


@pytest.fixture
def once(monkeypatch):
    """Every variant runs once and takes a millisecond."""
    monkeypatch.setattr(sample, "median_seconds", lambda variants, device, rounds=0: {name: (function(), 1e-3)[1] for name, function in variants.items()})


def test_the_training_benchmark_prints_its_table(once, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", None)
    train.main(["tiny", "--bench", "--stage=align", "--align.global_batch=2"])
    out = capsys.readouterr().out
    assert out.count("align: steps of 2 samples") == out.count("| all of it |") == out.count("| cached codes |") == out.count("blocks not compiled") == 1 and "GB/s" in out


def test_a_baseline_that_does_not_fit_costs_only_its_row(once, monkeypatch, capsys):
    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train, "straightforward_losses", too_large)
    monkeypatch.setattr(torch, "compile", None)
    train.main(["tiny", "--bench", "--instruct.global_batch=2"])
    out = capsys.readouterr().out
    assert "instruct: steps of 2 samples" in out and "| no mask |  |  | dense mask, left padding | out of memory |  |" in out and "| cached codes | 2,000 |" in out
    monkeypatch.setattr(train.VQGAN, "encode", too_large)
    with pytest.raises(ValueError, match="out of memory on .* set --micro_batch=1"):
        train.main(["tiny", "--bench", "--instruct.global_batch=2"])


def test_the_sampling_benchmark_prints_its_tables(once, capsys):
    sample.main(["--bench=tiny"])
    out = capsys.readouterr().out
    assert "| KV cache |" in out and "| 64 x 64 |" in out and "| 512 |" in out and "channels last" in out
    assert ("steps as CUDA graphs" if torch.cuda.is_available() else "no CUDA here") in out
    with pytest.raises(ValueError, match="--bench=huge: must be one of tiny, small"):
        sample.main(["--bench=huge"])


class LlamaDecoder:
    """transformers' Llama of the same width, depth and heads, with its static cache, as a decoder of random codes."""

    def __init__(self, config, hidden, size):
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        self.config = LlamaConfig(vocab_size=config.codebook_size, hidden_size=config.width, intermediate_size=hidden, num_hidden_layers=config.n_layer,
                                  num_attention_heads=config.n_head, num_key_value_heads=config.n_head, max_position_embeddings=2048, attn_implementation="sdpa")
        self.model, self.new_cache = LlamaForCausalLM(self.config).eval(), lambda: StaticCache(config=self.config, max_cache_len=size)

    def prefill(self, prefix, lengths):
        cache = self.new_cache()
        self.at = torch.arange(prefix.shape[1])
        return self.model(inputs_embeds=prefix, past_key_values=cache, cache_position=self.at, logits_to_keep=1).logits[:, -1], cache

    def decode_step(self, codes, cache):
        self.at = self.at[-1:] + 1
        return self.model(input_ids=codes[:, None], past_key_values=cache, cache_position=self.at, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_steps_beside_a_llama_of_transformers(preset):
    """Same width, depth, heads, vocabulary, prompt and draws. Prints the ratio (pytest -s). tiny must be faster; at base both wait for
    the memory to give the weights, and which layout of them it likes better depends on the processor."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    if preset != "tiny" and os.environ.get("MENTOR_FULL_SIZE") != "1":
        pytest.skip("takes minutes; MENTOR_FULL_SIZE=1 runs it")
    small, config = sample.mentor.PRESETS["tiny"], sample.mentor.PRESETS[preset]
    model = Mentor(replace(config, vision=small.vision, connector=small.connector, text=small.text))
    decoder, n_prefix, n_code = sample.make_ready(model, torch.device("cpu")), 32, 64
    llama = LlamaDecoder(config.decoder, model.decoder.blocks[0].mlp.w1.out_features, n_prefix + n_code)
    prefix, lengths, generator = torch.randn(2, n_prefix, config.decoder.width), torch.full((2,), n_prefix), torch.Generator().manual_seed(0)

    def draw(decoder, rows):
        return continue_prefix(decoder, prefix, lengths, True, n_code, SamplingConfig(cfg_scale=2.0), generator, rows)

    seconds = sample.median_seconds({"ours": lambda: draw(decoder, sample.row_multiple(model)), "llama": lambda: draw(llama, 1)}, torch.device("cpu"))
    print(f"{preset}: {n_code / seconds['ours']:.0f} codes/s, transformers' Llama {n_code / seconds['llama']:.0f}, ratio {seconds['llama'] / seconds['ours']:.2f}")
    assert seconds["llama"] / seconds["ours"] > {"tiny": 1.0, "base": 0.75}[preset]
