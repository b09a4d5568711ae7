"""Stages, freezing, accumulation, resume, several processes, and the command line."""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mentor
import train
from conftest import SMALL, few_steps, randomize
from data import Collate, WorldDataset, to_picture, vision_pixels
from mentor import Mentor
from tokenizer import VQGAN
from train import Machine, MentorStage, TokenizerStage, index_batches, micro_batches, schedule

ROOT = Path(__file__).parent.parent
SHORT = [*SMALL, "--tokenizer.restart_every=3", "--model.decoder.dropout=0.1", *few_steps(steps=6, global_batch=4, lr=0.003, final_lr=0.5)]
CPU = Machine(0, 1, torch.device("cpu"), torch.float32)


def small_run(*arguments):
    return train.parse(["tiny", *SHORT, *arguments])[1]


def run_stage(out, stage, *arguments):
    train.main(["tiny", *SHORT, f"--out={out}", f"--stage={stage}", *arguments])


def weights(out, stage):
    return load_file(Path(out) / stage / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Collated(SimpleNamespace):
    """What a Batch is to the loop."""

    def to(self, device):
        return self


def stage_and_batch(name, recipe, world, text_tokenizer, drop=0.0):
    run = small_run(f"--recipe={recipe}")
    torch.manual_seed(0)
    stage = TokenizerStage(run, CPU) if name == "tokenizer" else MentorStage(name, run, CPU, Mentor(run.model), VQGAN(run.vqgan))
    mix = train.TOKENIZER_MIX if name == "tokenizer" else train.parse_mix(name, getattr(run, name).mix)
    dataset = WorldDataset(world, mix, 0, prefix_drop=drop)
    collate = Collate(text_tokenizer, 32, run.model.image_tokens, run.model.context, 32)
    return run, stage, collate([dataset[i] for i in range(8)])


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("name", train.STAGES)
def test_two_threads_give_the_same_bits_every_time(name, threads, world, text_tokenizer):
    """At the sizes of `tiny`, where threads share the work: indexing's gradient, for one, is added up in the order in which they come."""
    run, repeats = train.PRESETS["tiny"], 8
    torch.manual_seed(0)
    stage = TokenizerStage(run, CPU) if name == "tokenizer" else MentorStage(name, run, CPU, Mentor(run.model), VQGAN(run.vqgan))
    weights = [p for _, p in stage.trained()]
    for p in (p for p in weights if p.ndim > 1):
        torch.nn.init.normal_(p, std=0.05)  # no part starts silent
    dataset, collate = train.make_dataset(name, run, world), train.make_collate(run, text_tokenizer)
    batch = collate([dataset[i] for i in range(24)])
    batch = train.replace(batch, drop=torch.arange(24) % 2 == 0)
    gradients = [torch.autograd.grad(stage(batch, run.tokenizer.steps)[0], weights, allow_unused=True) for _ in range(repeats)]
    assert sum(g is not None for g in gradients[0]) > 50
    for first, *others in zip(*gradients):
        assert all(g is None if first is None else torch.equal(g, first) for g in others)


@pytest.mark.parametrize("recipe", train.TRAINED)
@pytest.mark.parametrize("name", train.STAGES[1:])
def test_frozen_parts_stay_bit_equal_and_trained_parts_move(name, recipe, world, text_tokenizer):
    run, stage, batch = stage_and_batch(name, recipe, world, text_tokenizer, drop=0.5)
    with torch.no_grad():
        stage.model.decoder.output.weight.normal_()  # a zero head would keep everything before it from learning
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    vqgan = {k: v.clone() for k, v in stage.vqgan[0].state_dict().items()}
    optimizers = train.make_optimizers(stage, getattr(run, name), run)
    stage.train()(batch, 0)[0].backward()
    for optimizer in optimizers:
        optimizer.step()
    parts = train.TRAINED[recipe][name]
    for key, after in stage.model.state_dict().items():
        moved = not torch.equal(before[key], after)
        if key.startswith(parts):
            assert moved, key
        else:
            assert not moved, key
    assert equal(vqgan, stage.vqgan[0].state_dict())
    assert not any("vqgan" in n for n, _ in stage.named_parameters())


def test_masked_tokens_are_predicted_from_the_picture_and_the_other_tokens(world, text_tokenizer):
    """Against each sample alone, without padding: the mean loss of its masked tokens, which the text encoder does not see."""
    run, stage, batch = stage_and_batch("pretrain", "scratch", world, text_tokenizer)
    model = randomize(stage.model).eval()
    encoder, patches = model.encoder, model.encoder.vision(train.as_vision_pixels(batch.targets, 32))
    assert len(set(batch.lengths.tolist())) > 1 and batch.masked.any(1).all() and not batch.masked.all(1).any()
    losses = []
    for i, length in enumerate(batch.lengths):
        words, masked = batch.text_ids[i, :length], batch.masked[i, :length]
        seen = encoder.text.embedding(torch.where(masked, torch.tensor(text_tokenizer.UNKNOWN), words))
        tokens = encoder.connector(patches[i : i + 1], encoder.text.embedding(torch.tensor([[text_tokenizer.EOS]])), torch.tensor([[True]]))[0]
        states = encoder.text(torch.cat([tokens, seen])[None], torch.ones(1, len(tokens) + length, dtype=torch.bool))[0, len(tokens) :]
        logits = states @ encoder.text.embedding.weight.T / model.config.text.width**0.5
        losses.append(torch.nn.functional.cross_entropy(logits[masked], words[masked]))
    torch.testing.assert_close(train.masked_token_loss(model, batch, patches), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


def test_a_new_decoder_starts_along_the_codebook(tmp_path, trained, world):
    run = small_run(f"--out={tmp_path}")
    link_stages(trained, tmp_path, "tokenizer")
    stage = train.build_stage("pretrain", run, CPU, world)
    codebook = stage.vqgan[0].quantize.codebook()
    for weight, std in ((stage.model.decoder.code_embedding.weight, 0.1), (stage.model.decoder.output.weight, 0.05)):
        directions = torch.linalg.lstsq(codebook, weight).solution                       # (codebook_dim, D)
        torch.testing.assert_close(codebook @ directions, weight, rtol=1e-3, atol=1e-4)  # nothing but the codebook, in D dimensions
        assert directions.std().item() == pytest.approx(std, rel=0.2)


def test_contrastive_training_compares_pictures_with_the_mean_of_their_real_words(world, text_tokenizer):
    run, stage, batch = stage_and_batch("pretrain", "scratch", world, text_tokenizer)
    vision, states, seen = stage.model.encoder.vision, stage.model.encoder(batch), []
    stage.contrastive.forward = lambda image, text: seen.extend([image, text])
    stage.pretraining_losses(batch, states)
    pixels = torch.stack([vision_pixels(to_picture(target), 32) for target in batch.targets])
    torch.testing.assert_close(train.as_vision_pixels(batch.targets, 32), pixels, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0], vision.pool(vision.before_last(pixels)), atol=1e-3, rtol=1e-3)
    for text, own, length in zip(seen[1], states, batch.lengths):
        torch.testing.assert_close(text, own[:length].mean(0), atol=1e-5, rtol=1e-4)


def test_contrastive_loss_is_clips():
    """The mean cross entropy of both directions, of cosines times a scale of at most 100."""
    torch.manual_seed(0)
    head, image, text = train.ContrastiveHead(small_run().model, CPU), torch.randn(5, 16), torch.randn(5, 16)
    for log_scale, scale in ((1.0, math.e), (9.0, 100.0)):
        torch.nn.init.constant_(head.log_scale, log_scale)
        scores = scale * torch.nn.functional.cosine_similarity(head.image(image)[:, None], head.text(text)[None], dim=-1)
        expected = -(scores.log_softmax(0).diag() + scores.log_softmax(1).diag()).mean() / 2
        torch.testing.assert_close(head(image, text), expected, atol=1e-4, rtol=1e-4)


def test_the_published_table_of_trained_parts():
    assert train.TRAINED["paper"]["align"] == ("projector", "decoder")
    assert all("encoder.vision" not in parts for table in train.TRAINED.values() for stage, parts in table.items() if stage != "pretrain")


def test_one_batch_can_be_overfitted(world, text_tokenizer):
    run, stage, batch = stage_and_batch("instruct", "scratch", world, text_tokenizer)
    with torch.no_grad():  # an untrained tokenizer gives every image the same code; these tell them apart
        codes = torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(0))
        stage.vqgan[0].encode = lambda targets: codes
    optimizer = torch.optim.Adam([p for _, p in stage.trained()], 3e-3)
    stage.eval()
    for _ in range(200):
        loss, logs = stage(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 and set(logs) == {*batch.tasks, "tokens", "images"}


def test_dropping_the_prompt_hides_it(world, text_tokenizer):
    """With every sample unconditional the loss does not depend on the words."""
    run, stage, batch = stage_and_batch("instruct", "scratch", world, text_tokenizer, drop=1.0)
    torch.nn.init.normal_(stage.model.decoder.output.weight)
    stage.eval()
    other = train.replace(batch, text_ids=torch.where(batch.text_ids == text_tokenizer.image_id, batch.text_ids, 5), pixels=batch.pixels + 1)
    assert batch.drop.all() and torch.equal(stage(batch, 0)[0], stage(other, 0)[0])
    seen = train.replace(batch, drop=~batch.drop)
    assert not torch.equal(stage(seen, 0)[0], stage(train.replace(seen, text_ids=other.text_ids), 0)[0])


def test_four_micro_batches_equal_one(trained, tmp_path):
    """Accumulation: the same weights to rounding, whatever the micro-batch."""
    for micro in (1, 4):
        out = tmp_path / str(micro)
        link_stages(trained, out, "tokenizer", "pretrain")
        run_stage(out, "align", f"--micro_batch={micro}", "--model.decoder.dropout=0", "--align.muon_lr=0", "--align.lr=0.001")
    one, four = weights(tmp_path / "1", "align"), weights(tmp_path / "4", "align")
    assert max((one[k] - four[k]).abs().max() for k in one) < 2e-4
    assert any((one[k] != weights(trained, "pretrain")[k]).any() for k in one)


def link_stages(source, out, *stages):
    out.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (out / stage).symlink_to(Path(source) / stage)


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_stage_that_was_stopped_goes_on_bit_for_bit(stage, trained, tmp_path, monkeypatch):
    """Stopped after 5 of 6 steps with a checkpoint at 3, then started again: the same weights as in one go."""
    link_stages(trained, tmp_path, *train.STAGES[: train.STAGES.index(stage)])
    step = train.Log.step

    def stop(self, done, *arguments):
        if done == 4:
            raise KeyboardInterrupt
        step(self, done, *arguments)

    monkeypatch.setattr(train.sample, "score", lambda *arguments: None)
    monkeypatch.setattr(train.Log, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, stage, "--save_every=3")
    monkeypatch.setattr(train.Log, "step", step)
    assert train.checkpoints(tmp_path / stage) and not (tmp_path / stage / "model.safetensors").is_file()
    run_stage(tmp_path, stage, "--save_every=3")
    assert equal(weights(tmp_path, stage), weights(trained, stage))
    assert not train.checkpoints(tmp_path / stage)


def test_a_discriminator_goes_on_bit_for_bit_too(tmp_path, monkeypatch):
    keys, step = ("--tokenizer.disc_start=0.3", "--save_every=2", "--seed=1"), train.Log.step
    run_stage(tmp_path / "straight", "tokenizer", *keys)

    def stop(self, done, *arguments):
        step(self, done, *arguments)
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Log, "step", stop)
        run_stage(tmp_path / "stopped", "tokenizer", *keys)
    state = mentor.read_pickle(train.checkpoints(tmp_path / "stopped" / "tokenizer")[-1])
    assert state["step"] == 4 and state["stage"]["counts"].any() and any(k.startswith("disc.") for k in state["stage"]) and state["optimizers"][1]["state"]
    run_stage(tmp_path / "stopped", "tokenizer", *keys)
    assert equal(weights(tmp_path / "straight", "tokenizer"), weights(tmp_path / "stopped", "tokenizer"))
    logs = [[{k: v for k, v in line.items() if k != "samples_per_s"} for line in train.read_log(tmp_path / name / "tokenizer" / "log.jsonl")] for name in ("straight", "stopped")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0] if "disc" in line] == [3, 4, 5, 6] and "d_weight" in logs[0][-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", train.STAGES)
def test_a_gpu_agrees_with_the_cpu(name, world, text_tokenizer):
    """In float32 without TF32: the loss to a thousandth, the gradient to a hundredth of its length. In bfloat16: the loss to 3%."""
    _, stage, batch = stage_and_batch(name, "scratch", world, text_tokenizer)
    if name != "tokenizer":
        torch.nn.init.normal_(stage.model.decoder.output.weight, std=0.1)  # a zero head would guess
        codes = stage.vqgan[0].encode(batch.targets)
        stage.vqgan[0].encode = lambda targets: codes.to(targets.device)
    results = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)):
        stage.eval().to(device).zero_grad()
        if name == "tokenizer":
            stage.usage.counts = stage.usage.counts.to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), torch.backends.cudnn.flags(allow_tf32=False):
            loss, _ = stage(batch.to(device), 0)
        loss.backward()
        results[device, dtype] = loss.item(), torch.cat([p.grad.flatten().cpu() for _, p in stage.trained() if p.grad is not None])
    (cpu, gradient), (gpu, same), (half, _) = results.values()
    assert abs(gpu / cpu - 1) < 1e-3 and (same - gradient).norm() < 1e-2 * gradient.norm() and abs(half / cpu - 1) < 3e-2


def test_another_run_in_the_same_folder_is_refused(trained):
    with pytest.raises(ValueError, match="align was trained with align.lr=.*this run has 0.5.*another --out"):
        run_stage(trained, "align", "--align.lr=0.5")
    with pytest.raises(ValueError, match="tokenizer was trained with seed=0, this run has 1"):
        run_stage(trained, "tokenizer", "--seed=1")


def test_an_unfinished_stage_of_another_run_is_refused_too(tmp_path):
    mentor.write_json(tmp_path / "stage.json", {"align.lr": 0.1})
    train.check_record(tmp_path, {"align.lr": 0.2})  # nothing to go on from
    (tmp_path / "state-3.pt").touch()
    with pytest.raises(ValueError, match="was trained with align.lr=0.1, this run has 0.2"):
        train.check_record(tmp_path, {"align.lr": 0.2})


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in ("9", "10", "100", "x"):
        (tmp_path / f"state-{step}.pt").touch()
    assert [f.name for f in train.checkpoints(tmp_path)] == ["state-9.pt", "state-10.pt", "state-100.pt"]


def test_a_stage_without_its_predecessor_says_what_to_run(tmp_path, capsys):
    with pytest.raises(ValueError, match="pretrain needs .*tokenizer/config.json, .*model.safetensors: --stage=tokenizer make"):
        run_stage(tmp_path, "pretrain")
    assert not list(tmp_path.iterdir())
    assert "world: shapes, built in; --data=FOLDER_OR_MANIFEST trains on your pictures" in capsys.readouterr().out


@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_chosen(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(train.sample, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert train.sample.parse(["out/tiny", "A star"]).device == train.start_machine(small_run("--device=auto")).device.type == best


def test_every_stage_and_seed_has_its_own_samples(world):
    runs = [(name, small_run(f"--seed={seed}", f"--{name}.mix=text_to_image:1")) for name in ("align", "instruct") for seed in (0, 1)]
    first = [tuple(train.make_dataset(name, run, world)[i].prompt for i in range(3)) for name, run in runs]
    assert len(set(first)) == 4


def test_dropout_is_another_at_every_step(trained, tmp_path, monkeypatch):
    seeds, add_gradients = [], train.add_gradients
    monkeypatch.setattr(train, "add_gradients", lambda *arguments: seeds.append(torch.initial_seed()) or add_gradients(*arguments))
    link_stages(trained, tmp_path, "tokenizer", "pretrain")
    run_stage(tmp_path, "align")
    assert len(seeds) == len(set(seeds)) == 6


def test_train_scale_multiplies_the_steps_of_every_stage(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(train, "train_stages", lambda names, run, *arguments: runs.append(run))
    train.main(["tiny", f"--out={tmp_path}", "--stage=tokenizer", "--train_scale=1.5"])
    assert [getattr(runs[0], s).steps for s in train.STAGES] == [3000, 1275, 1275, 1800]


def test_batches_cover_every_sample_once():
    indices = [i for rank in (0, 1) for batch in index_batches(0, 3, 8, 2, 2, rank) for i in batch]
    assert sorted(indices) == list(range(24))
    assert list(index_batches(2, 3, 8, 2, 2, 1)) == [[20, 21], [22, 23]]  # going on from a step is the same order
    assert micro_batches(train.StageConfig(global_batch=8), small_run("--micro_batch=2"), CPU) == (2, 4)
    with pytest.raises(ValueError, match="global_batch=8 .* 1 x 3 x 2.67"):
        micro_batches(train.StageConfig(global_batch=8), small_run("--micro_batch=3"), CPU)
    with pytest.raises(ValueError, match="global_batch=8 is not processes x micro_batch x a whole number: 16 x 1 x 0.50"):
        micro_batches(train.StageConfig(global_batch=8), small_run(), Machine(0, 16, torch.device("cpu"), torch.float32))
    run = small_run("--tokenizer.global_batch=6", "--micro_batch=3")
    with pytest.raises(ValueError, match="micro_batch=3: --tokenizer.consistency pairs .* even"):
        micro_batches(run.tokenizer, run, CPU)
    assert micro_batches(train.replace(run.tokenizer, consistency=0.0), run, CPU) == (3, 2)


def test_schedule_warms_up_and_ends_at_its_fraction():
    run = train.PRESETS["full"]
    factors = [schedule(s, train.replace(run.align, steps=1000), run) for s in range(1000)]
    assert factors[0] == 1 / 50 and factors[49] == 1 and max(factors) == 1
    assert abs(factors[-1] - 0.1) < 1e-3 and abs(factors[525] - 0.55) < 1e-2


def test_muon_is_torchs_muon():
    torch.manual_seed(0)
    a = [torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 20), (12, 20), (20, 5))]  # two go through the iteration together
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    ours, theirs = train.Muon(a, 0.02, 0.1), torch.optim.Muon(b, 0.02, 0.1)
    for _ in range(5):
        for p, q, size in zip(a, b, (1, 100, 1)):
            p.grad = torch.randn(p.shape) * size
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)  # theirs iterates in bfloat16


def test_every_parameter_has_its_optimizer_and_its_decay(world, text_tokenizer):
    run, stage, _ = stage_and_batch("pretrain", "scratch", world, text_tokenizer)
    adamw, muon = train.make_optimizers(stage, run.pretrain, run)
    assert adamw.defaults["betas"] == (0.9, 0.95)
    (matrices, rest), (hidden,) = adamw.param_groups, muon.param_groups
    assert matrices["weight_decay"] == hidden["weight_decay"] == run.weight_decay and rest["weight_decay"] == 0
    assert all(p.ndim < 2 for p in rest["params"]) and all(p.ndim == 2 for p in hidden["params"])
    names = {p: name for name, p in stage.trained()}
    tables = {names[p].removeprefix("model.") for p in matrices["params"]}
    assert tables == {"encoder.vision.position_embedding", "encoder.vision.patch_embedding.weight", "encoder.text.embedding.weight",
                      "encoder.text.relative_bias.weight", "projector.unconditional", "decoder.code_embedding.weight", "decoder.output.weight",
                      "contrastive.image.weight", "contrastive.text.weight"}
    assert len(names) == len(matrices["params"]) + len(rest["params"]) + len(hidden["params"])


def test_gradients_of_micro_batches_are_averaged():
    """AdamW would hide a sum, but the norm that is clipped and Muon's momentum would not be those of one batch."""
    weight, log = torch.nn.Parameter(torch.zeros(3)), SimpleNamespace(machine=CPU, add=lambda values: None)
    batches = [Collated(tasks=[task], x=torch.full((3,), x)) for task, x in (("a", 1.0), ("b", 5.0))]
    loss, tasks = train.add_gradients(0, lambda batch, step: ((weight * batch.x).sum() + batch.x[0], {}), iter(batches), 2, log)
    assert loss == 3 and tasks == {"a", "b"} and weight.grad.tolist() == [3, 3, 3]


def test_a_step_clips_scales_and_clears():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([{"params": [p], "peak": 1.0}], 1.0)
    for _ in range(2):
        p.grad = torch.full((4,), 10.0)
        assert train.update_weights(SimpleNamespace(trained=lambda: [("p", p)]), [optimizer], 0.5, 0.2) == 20 and p.grad is None
    torch.testing.assert_close(p.detach(), torch.full((4,), -2 * 0.5 * 0.1))  # two steps of norm 0.2 at half the peak


def test_published_recipe_is_the_default_of_full():
    run = train.PRESETS["full"]
    assert (run.align.lr, run.align.global_batch, run.align.muon_lr) == (5e-4, 128, 0) and (run.instruct.lr, run.instruct.global_batch, run.instruct.muon_lr) == (1e-4, 128, 0)
    assert (run.grad_clip, run.warmup, run.align.final_lr, run.weight_decay, run.prefix_drop, run.recipe) == (1.0, 0.05, 0.1, 0.05, 0.1, "paper")
    assert run.align.steps == 2_480_000 // 128 and run.instruct.steps == 2 * 1_300_000 // 128


@pytest.mark.parametrize("arguments, message", [
    (["tinny"], "tiny, small, base, full, multi; got 'tinny'"),
    (["tiny", "--sede=1"], "--sede=1: no such key; the nearest is --seed=0"),
    (["tiny", "--resume"], "--resume: no such key; a run goes on from its last checkpoint by itself: give the same command again"),
    (["tiny", "--dtype=float16"], "--dtype=float16: must be one of auto, bfloat16, float32; T5 overflows in float16"),
    (["tiny", "--seed"], "--seed: write --key=value"),
    (["tiny", "--seed=abc"], "--seed=abc: not of type int; the default is 0"),
    (["tiny", "--vqgan.ch_mult=1,x"], "not a list of int"),
    (["tiny", "--world=cubes"], "--world=cubes: must be one of shapes, emoji"),
    (["tiny", "--align.mix=drawing:1"], "'drawing:1': the task must be one of text_to_image"),
    (["tiny", "--align.mix=segmentation"], "'segmentation' is not task:share"),
    (["tiny", "--model.decoder.codebook_size=64"], "codes of 256, but .*codebook_size=64"),
    (["tiny", "--model.decoder.n_head=5"], "decoder.width=96 is not legal"),
    (["tiny", "--model.text.n_bucket=3"], "text.n_bucket=3 is not legal: it must be at least 4"),
    (["tiny", "--model.text.max_distance=8"], "text.max_distance=8 is not legal: it must be more than .* = 8"),
    (["tiny", "--released.into=tokenizer"], "--released.into=tokenizer: must be one of pretrain, align, instruct"),
    (["tiny", "--tokenizer.codebook_start=3"], "codebook_start=3.0 is not legal: it must be a number from 0 to 1"),
    (["tiny", "--out="], "--out=: name the folder"),
    (["tiny", f"--out={ROOT}/README.md", "--dry_run"], "--out=.*README.md: .*README.md is no folder; name a folder"),
    (["tiny", f"--out={ROOT}/README.md/new"], "--out=.*README.md/new: .*README.md is no folder; name a folder"),
    (["tiny", "--bench", "--stage=import"], "--bench=true measures steps .* leave out --stage=import"),
    (["tiny", "--bench", "--dry_run"], "--bench=true measures steps .* leave out --dry_run"),
    (["tiny", "--backgrounds=here"], "--backgrounds=here: a built-in world draws its own"),
    (["tiny", "--data_root=here"], "--data_root=here: only a manifest has file names"),
    (["tiny", "--data=.", "--data_root=here"], "--data_root=here: only a manifest has file names"),
    (["tiny", "--skip_bad"], "--skip_bad=true: a built-in world has no bad lines"),
    (["tiny", "--emoji_font=font.ttf"], "--emoji_font=font.ttf: only the world emoji has a font"),
    (["small", "--data=.", "--emoji_font=font.ttf"], "--emoji_font=font.ttf: only the world emoji has a font"),
])
def test_mistakes_on_the_command_line_get_a_message(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.main(arguments)


@pytest.mark.parametrize("keys", [["--model.vision.width=30", "--model.vision.n_head=3"], ["--vqgan.ch=20", "--vqgan.norm_groups=5", "--vqgan.ch_mult=1,2,3"]])
def test_keys_are_legal_together_in_any_order(keys):
    runs = [train.parse(["small", *order])[1] for order in (keys, keys[::-1])]
    assert runs[0] == runs[1] != train.PRESETS["small"]
    with pytest.raises(ValueError, match="vision.width=30 is not legal|norm_groups=32 does not divide"):
        train.parse(["small", keys[0]])


def test_mistakes_exit_with_code_2_and_one_line():
    done = subprocess.run([sys.executable, ROOT / "train.py", "tiny", "--sede=1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nearest is --seed" in done.stderr


def test_help_shows_every_key_with_its_meaning(capsys):
    train.main(["--help"])
    text = capsys.readouterr().out
    for key in ("--seed=0", "--align.lr=0.0005", "--model.decoder.n_layer=36", "--vqgan.codebook_size=16384"):
        assert key in text
    described = [line for line in text.splitlines() if re.match(r"  --\S+\s+\w", line)]
    assert len(described) == text.count("\n  --") == len(train.flatten(train.PRESETS["full"])) > 100
    train.main(["tiny", "--align.lr=1", "--help"])
    text = capsys.readouterr().out
    assert "defaults of tiny" in text and "--model.decoder.n_layer=4 " in text


def test_a_loss_that_is_not_finite_stops_the_run(trained, tmp_path):
    link_stages(trained, tmp_path, "tokenizer", "pretrain")
    with pytest.raises(ValueError, match="align: loss .* at step .* lower --align.lr"):
        run_stage(tmp_path, "align", "--align.lr=1e30", "--align.muon_lr=0")


def test_presets_fit_together():
    for name, run in train.PRESETS.items():
        train.validate(run)
        assert run.model is mentor.PRESETS[name] and run.vqgan.image_size % run.vqgan.downsample == 0


def test_curves_of_stages_without_logs_are_an_empty_picture(tmp_path):
    train.draw_curves(tmp_path, tmp_path / "curves.png")  # as where all stages were imported
    assert (tmp_path / "curves.png").is_file()
