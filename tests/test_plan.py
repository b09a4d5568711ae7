"""The plan of a run: counts, FLOPs and activations against a real small run; what keeps a run from starting."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from mentor import ConnectorConfig, DecoderConfig, Mentor, MentorConfig, TextConfig, TextEncoder, VisionConfig
from tokenizer import VQGAN

ROOT = Path(__file__).parent.parent
SMALL = ["--vqgan.ch=8", "--vqgan.ch_mult=1,1,1", "--vqgan.num_res_blocks=1", "--vqgan.norm_groups=4", "--vqgan.z_channels=8", "--vqgan.codebook_size=32",
         "--model.vision.width=16", "--model.vision.n_head=2", "--model.vision.n_layer=2", "--model.vision.mlp_width=32", "--model.text.width=16", "--model.text.n_head=2",
         "--model.text.mlp_width=32", "--model.decoder.width=32", "--model.decoder.n_layer=2", "--model.decoder.codebook_size=32",
         *(f"--{stage}.{key}" for stage in train.STAGES for key in ("steps=2", "global_batch=4"))]
CASES = [("pretrain", "scratch", "mlp"), ("align", "paper", "mlp"), ("align", "released", "mlp"), ("instruct", "paper", "mlp"), ("instruct", "paper", "query")]


def real_stage(name, recipe, kind, text_tokenizer, make_batch):
    """A real model of unequal widths with a stage's parts trained, a batch without padding, and the forward pass."""
    config = MentorConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=64, n_layer=3, n_head=2, mlp_width=256),
        connector=ConnectorConfig(kind=kind, n_query=8, width=64, n_layer=2, n_head=2),
        text=TextConfig(vocab_size=text_tokenizer.vocab_size, width=128, n_layer=3, n_head=4, head_width=32, mlp_width=320, dropout=0.0),
        decoder=DecoderConfig(codebook_size=512, grid_size=8, width=160, n_layer=4, n_head=4, multiple_of=32, dropout=0.0), context=64)
    torch.manual_seed(0)
    model = Mentor(config)
    for n, p in model.named_parameters():
        p.requires_grad_(n.startswith(train.TRAINED[recipe][name]))
    batch = make_batch(config, 4, **({"text_to_image": 1.0} if name == "pretrain" else {"subject_driven": 1.0}))
    batch = replace(batch, lengths=torch.full_like(batch.lengths, batch.text_ids.shape[1]))
    codes = torch.randint(512, (4, 64))

    def forward():
        pooled = model.encoder.vision.pool(torch.ones(4, 3, 32, 32)).square().mean() if name == "pretrain" else 0
        return model(batch, codes, batch.unconditional), pooled

    return model, batch, forward


@pytest.mark.parametrize("name, recipe, kind", CASES)
def test_flops_are_those_torch_counts(name, recipe, kind, text_tokenizer, make_batch):
    model, batch, forward = real_stage(name, recipe, kind, text_tokenizer, make_batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # spelt out, attention is counted too
        logits, pooled = forward()
        (logits.square().mean() + pooled).backward()
    tokens, decoder = batch.text_ids.shape[1], model.config.decoder
    flops = train.training_flops(model, tokens, len(batch.pixels) / 4, int(name == "pretrain"))
    unneeded = 3 * 2 * decoder.n_layer * (tokens + 63) ** 2 * decoder.width  # the half of causal attention that flash leaves out
    assert abs(4 * (sum(flops.values()) + unneeded) / counter.get_total_flops() - 1) < 0.03
    assert abs(4 * sum(flops.values()) / counter.get_total_flops() - 1) < 0.10


@pytest.mark.parametrize("name, recipe, kind", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(name, recipe, kind, dtype, text_tokenizer, make_batch):
    model, batch, forward = real_stage(name, recipe, kind, text_tokenizer, make_batch)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, saved = train.saved_bytes(forward, model)
    size, pooled = dtype.itemsize, int(name == "pretrain")
    estimate = 4 * train.activation_bytes(model, batch.text_ids.shape[1], len(batch.pixels) / 4, size, pooled=pooled)
    tables = sum(p.numel() for n, p in model.named_parameters() if "embedding" in n or "unconditional" in n)
    copies = train.fixed_bytes(model, 0, size, 1)["weights"] - 4 * sum(p.numel() for p in model.parameters())
    if size < 4:  # autocast's copies of the matrices are saved too; tables are never cast
        saved -= copies - size * tables if name != "pretrain" else copies - size * (tables + sum(p.numel() for p in model.encoder.connector.parameters()))
    assert abs(estimate / saved - 1) < (0.06 if kind == "query" else 0.03)  # the Q-Former is taken for an MLP


def test_a_long_prompt_costs_its_square_in_the_text_encoder():
    """The small model's prompts are too short to show it."""
    config = TextConfig(vocab_size=8, width=64, n_layer=4, n_head=4, head_width=16, mlp_width=128, dropout=0.0)
    model = TextEncoder(config)
    embeddings, mask = torch.randn(2, 200, 64, requires_grad=True), torch.ones(2, 200, dtype=torch.bool)
    _, saved = train.saved_bytes(lambda: model(embeddings, mask), model)
    assert abs(2 * 200 * (4 * train.text_block_bytes(config, 4, 200) + 4 * 2 * 64) / saved - 1) < 0.05  # four blocks and the last norm


def test_recomputing_costs_the_memory_that_the_plan_says(text_tokenizer, make_batch):
    model, batch, forward = real_stage("instruct", "paper", "mlp", text_tokenizer, make_batch)
    train.recompute_activations(model)
    _, saved = train.saved_bytes(forward, model)
    tokens = batch.text_ids.shape[1]
    again = tokens * train.text_block_bytes(model.config.text, 4, tokens) + (tokens + 63) * train.decoder_block_bytes(model.config.decoder, 4, True)
    estimate = train.activation_bytes(model, tokens, len(batch.pixels) / 4, 4, checkpoint=True)  # holds what one block computes again
    assert abs(4 * (estimate - again) / saved - 1) < 0.08


def test_parameters_are_those_of_the_model():
    run = train.parse(["tiny"])[1]
    for name in train.STAGES[1:]:
        stage = train.MentorStage(name, run, train.Machine(0, 1, torch.device("cpu"), torch.float32), Mentor(run.model), VQGAN(run.vqgan))
        planned = train.meta_mentor(run.model, train.TRAINED[run.recipe][name])
        assert [(n, p.shape, p.requires_grad) for n, p in planned.named_parameters()] == [(n, p.shape, p.requires_grad) for n, p in stage.model.named_parameters()]
        learning = sum(p.numel() for n, p in stage.trained() if not n.startswith("contrastive"))
        assert train.fixed_bytes(planned, 7, 4, 1) == {"weights": 4 * (sum(p.numel() for p in stage.model.parameters()) + 7), "gradients": 4 * learning, "optimizer": 8 * learning}


def test_cards_are_found_by_what_the_driver_calls_them():
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 PCIe": 989, "NVIDIA H200": 989, "NVIDIA GeForce RTX 4090": 165, "NVIDIA L4": 121, "NVIDIA L40S": None}
    assert {name: train.peak_tflops(name) for name in names} == names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer and a pretrained model, two steps each."""
    out = tmp_path_factory.mktemp("plan") / "run"
    for stage in ("tokenizer", "pretrain"):
        train.main(["tiny", *SMALL, f"--stage={stage}", f"--out={out}"])
    return out


def dry_run(out, *arguments):
    train.main(["tiny", *SMALL, f"--out={out}", "--dry_run=true", *arguments])


def test_a_run_that_could_start_is_planned_and_nothing_is_written(trained, tmp_path, capsys):
    files = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    dry_run(trained, "--stage=align")
    text = capsys.readouterr().out
    assert "align: 2 steps of 4" in text and "largest micro_batch with --checkpoint=true: 4 in 24 GiB" in text and "everything needed is there" in text
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == files
    dry_run(tmp_path / "new")
    assert "instruct: a sample is" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_what_is_missing_is_named(trained, tmp_path):
    with pytest.raises(ValueError, match=r"could not start: align needs .*tokenizer.*pretrain/model.safetensors: --stage=tokenizer and --stage=pretrain make them"):
        dry_run(tmp_path, "--stage=align")
    with pytest.raises(ValueError, match="global_batch=4 .* 1 x 3 x"):
        dry_run(trained, "--stage=align", "--micro_batch=3")
    with pytest.raises(ValueError, match="--model.text.n_layer=3, but .*pretrain was trained with 2"):
        dry_run(trained, "--stage=align", "--model.text.n_layer=3")
    with pytest.raises(ValueError, match="plans training; --stage=export trains nothing"):
        dry_run(trained, "--stage=export")


def test_weights_of_another_model_are_noticed(trained, tmp_path):
    for stage in ("tokenizer", "pretrain"):
        (tmp_path / stage).mkdir()
        for file in (trained / stage).iterdir():
            (tmp_path / stage / file.name).write_bytes(file.read_bytes())
    (tmp_path / "spiece.model").write_bytes((trained / "spiece.model").read_bytes())
    tensors = load_file(tmp_path / "pretrain" / "model.safetensors")
    save_file({**tensors, "decoder.output.weight": torch.zeros(3, 3)}, tmp_path / "pretrain" / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder.output.weight of shape \(3, 3\), the model wants \(32, 32\), and 0 more"):
        dry_run(tmp_path, "--stage=align")


def test_a_plan_that_fails_exits_with_code_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "tiny", "--stage=align", "--dry_run=true", f"--out={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "TFLOPs a sample" in done.stdout


def test_training_prints_its_speed(trained, tmp_path, capsys, monkeypatch):
    class Stage:
        model = Mentor(train.parse(["tiny", *SMALL])[1].model)
        flops = staticmethod(lambda means: 3e12)

    log = train.Log(tmp_path, "align", train.StageConfig(steps=2), 0, train.Machine(0, 1, torch.device("cpu"), torch.float32), Stage())
    assert log.speed({}, 10.0) == ", 640 codes/s"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    log.machine = train.Machine(0, 2, torch.device("cuda:0"), torch.bfloat16)
    assert log.speed({}, 104.0) == ", 6656 codes/s, 50% of the peak, 3.0 GiB"
    log.close()
    stage = train.MentorStage("align", train.parse(["tiny"])[1], train.Machine(0, 1, torch.device("cpu"), torch.float32), Mentor(train.PRESETS["tiny"].model), VQGAN(train.PRESETS["tiny"].vqgan))
    assert 2e8 < stage.flops({"tokens": 21.0, "images": 0.75}) < 5e8
