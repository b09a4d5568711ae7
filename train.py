"""Train Mentor on the built-in world of shapes or on your own pictures.

    python train.py tiny                                 # all stages, into out/tiny
    python train.py tiny --stage=align --align.lr=0.001  # one stage, one key changed
    python train.py tiny --data=pets                     # a folder of your own pictures
    torchrun --nproc_per_node=8 train.py full            # on eight GPUs

Five stages, of which the first three stand in for released weights:

    tokenizer   the VQGAN: pixels to codes and back
    encoder     in place of CLIP and T5: the hidden words of a picture's caption
    pretrain    in place of LlamaGen: captions to codes, with the encoder frozen
    align       the paper's stage 1 teaches what an image in the prompt means
    instruct    the paper's stage 2 teaches what to keep of it, and what to change
"""

import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from inspect import getsource
from pathlib import Path
from textwrap import shorten

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import sample
from data import TASKS, Collate, Folder, Shapes, as_vision_pixels, tokenizer_pixels
from mentor import (DecoderConfig, Mentor, MentorConfig, SamplingConfig, TextConfig, VisionConfig,
                    length_mask, start_from_codebook)
from tokenizer import (VQGAN, StageConfig, TextTokenizer, TokenizerConfig, TokenizerStage,
                       TokenizerStageConfig, file_hash, flatten, load_model, rebuild, require, save_model,
                       write_atomically, write_json)

# --- Keys and presets ---


@dataclass(frozen=True)
class MentorStageConfig(StageConfig):
    """Training of Mentor's stages."""

    trains: str = "connector,text,projector,decoder"  # parts that train; all others are frozen
    guess_start: float = 1.0  # fraction of the steps after which half the codes read are guessed


ALIGN_MIX = "text_to_image:700,reconstruction:180,segmentation:1600"  # thousands of samples, as published
INSTRUCT_MIX = "text_to_image:600,segmentation:150,recovery:150,subject_driven:400"
TINY_MIX = "text_to_image:300,segmentation:100,recovery:100,subject_driven:800"


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Nested keys have dots: --model.decoder.n_layer=6."""

    out: str = ""               # folder to write
    stage: str = "all"          # all, tokenizer, encoder, pretrain, align or instruct
    data: str = ""              # a folder of your own pictures; empty: the world of shapes
    seed: int = 0               # of all that is random
    train_scale: float = 1.0    # multiplies the steps of every stage
    micro_batch: int = 0        # samples in one pass of one process; 0: its share of global_batch
    weight_decay: float = 0.05  # on matrices
    grad_clip: float = 1.0      # larger gradients are scaled down to this norm
    warmup: float = 0.05        # fraction of the steps with a rising learning rate
    prefix_drop: float = 0.1    # share of samples without their prompt, for guidance
    device: str = ""            # a torch device; empty: the first of cuda, mps and cpu
    dtype: str = ""             # of autocast: bfloat16 or float32; empty: bfloat16 on CUDA
    compile: bool = False       # torch.compile the blocks of text encoder and decoder
    checkpoint: bool = False    # compute activations again when needed: less memory, slower
    workers: int = 0            # processes that prepare samples; 0: the training process does
    save_every: int = 1000      # steps between checkpoints; 0: none
    vqgan: TokenizerConfig = TokenizerConfig()
    model: MentorConfig = MentorConfig()
    tokenizer: TokenizerStageConfig = TokenizerStageConfig()
    encoder: MentorStageConfig = MentorStageConfig(trains="encoder")
    pretrain: MentorStageConfig = MentorStageConfig(trains="projector,decoder")
    align: MentorStageConfig = MentorStageConfig(19375, mix=ALIGN_MIX)
    instruct: MentorStageConfig = MentorStageConfig(20312, lr=1e-4, mix=INSTRUCT_MIX)


STAGES = {"tokenizer": (), "encoder": (), "pretrain": ("tokenizer", "encoder"),
          "align": ("tokenizer", "pretrain"), "instruct": ("tokenizer", "align")}  # and what each reads from

PRESETS = {
    # the shapes at 32 pixels: minutes on two CPU cores
    # stages by steps, global_batch, lr, muon_lr, final_lr, mix
    "tiny": RunConfig(
        weight_decay=0.1, save_every=200,
        vqgan=TokenizerConfig(image_size=32, ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, norm_groups=1,
                              z_channels=64, codebook_size=512),
        model=MentorConfig(
            vision=VisionConfig(image_size=32, patch_size=8, width=128, n_layer=3, n_head=4, mlp_width=256),
            text=TextConfig(vocab_size=2048, width=128, n_layer=2, n_head=4, head_width=32, mlp_width=256,
                            dropout=0.0),
            decoder=DecoderConfig(width=96, n_layer=4, n_head=4, multiple_of=32, dropout=0.0,
                                  rope_scale=3.14, rope_base=10.0),
            sampling=SamplingConfig(cfg_scale=2.0, temperature=0.6), context=96),
        tokenizer=TokenizerStageConfig(1300, 16, 1.5e-3, 0.02, 0.0, codebook_weight=0.2, codebook_start=0.4,
                                       consistency=0.05, restart_every=260, disc_start=1.0),
        encoder=MentorStageConfig(1200, 64, 1e-2, 0.02, 0.05, trains="encoder"),
        pretrain=MentorStageConfig(1150, 24, 1e-2, 0.02, 0.3, trains="projector,decoder", guess_start=0.5),
        align=MentorStageConfig(200, 24, 4e-3, 0.01, 0.6, ALIGN_MIX, trains="projector,decoder"),
        instruct=MentorStageConfig(650, 24, 1.5e-3, 0.004, 0.0, TINY_MIX, "text,projector,decoder")),
    # 64 pixels, shapes or your own pictures: for one GPU
    "small": RunConfig(
        weight_decay=0.01, workers=4,
        vqgan=TokenizerConfig(image_size=64, ch=64, ch_mult=(1, 2, 2), z_channels=128, codebook_size=2048),
        model=MentorConfig(
            vision=VisionConfig(image_size=64, patch_size=8, width=256, n_layer=6, n_head=4, mlp_width=1024),
            text=TextConfig(vocab_size=2048, width=256, n_layer=4, n_head=4, mlp_width=512, dropout=0.0),
            decoder=DecoderConfig(width=384, n_layer=8, n_head=6, dropout=0.05),
            sampling=SamplingConfig(cfg_scale=3.0), context=192),
        tokenizer=TokenizerStageConfig(8000, 32, 5e-4, codebook_start=0.2, consistency=0.05,
                                       restart_every=1600),
        encoder=MentorStageConfig(8000, 64, 1e-3, 0.02, trains="encoder"),
        pretrain=MentorStageConfig(8000, 64, 1e-3, 0.02, trains="projector,decoder"),
        align=MentorStageConfig(8000, 64, 1e-3, 0.02, mix=ALIGN_MIX),
        instruct=MentorStageConfig(16000, 64, 1e-3, 0.02, mix=INSTRUCT_MIX)),
    # 256 pixels, photographs: for a few GPUs
    "base": RunConfig(
        workers=8, vqgan=TokenizerConfig(image_size=256, codebook_size=8192),
        model=MentorConfig(text=TextConfig(width=768, n_layer=12, n_head=12, mlp_width=2048),
                           decoder=DecoderConfig(width=768, n_layer=12, n_head=12))),
    # the published model: stage 1 trains projector and decoder alone
    "full": RunConfig(workers=8, align=MentorStageConfig(19375, mix=ALIGN_MIX, trains="projector,decoder")),
}

# --- Processes and devices ---


@dataclass(frozen=True)
class Machine:
    """This process's place in a run, and its exchange with the others."""

    rank: int  # of this process among world_size
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def average(self, tensor):
        """The mean of all processes' tensors, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.div_(self.world_size)

    def say(self, words):
        """Print, in the first process alone."""
        if self.rank == 0:
            tqdm.write(words, file=sys.stdout)


def start_machine(run):
    """This process's Machine, from torchrun's environment."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = sample.usable(run.device or sample.best_device())
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    # never float16, in which T5 overflows
    dtype = getattr(torch, run.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    machine = Machine(rank, world_size, device, dtype)
    machine.say(f"device {device}, processes {world_size}, {dtype}, torch {torch.__version__}")
    return machine


# --- The losses ---


class MentorStage(nn.Module):
    """Mentor with the next-code loss (equation 3) on a mix of tasks."""

    def __init__(self, name, run, machine, model, vqgan):
        super().__init__()
        self.machine, self.model, self.own_optimizers = machine, model, []  # beside make_optimizers' ones
        self.vqgan = [vqgan]  # in a list: not trained, not saved
        config = getattr(run, name)
        self.guess_from = config.guess_start * config.steps
        model.requires_grad_(False)
        for part in config.trains.split(","):
            chosen = [p for path, p in model.named_parameters() if path.startswith((part, f"encoder.{part}"))]
            require(part and chosen, f"--{name}.trains={config.trains}: the model has no part {part!r}")
            for p in chosen:
                p.requires_grad_(True)
        vision = model.encoder.vision  # nothing reads CLIP's end
        nn.ModuleList([vision.blocks[-1], vision.post_norm]).requires_grad_(False)
        for block in (*model.decoder.blocks, *model.encoder.text.blocks):
            if run.compile:
                block.forward = torch.compile(block.forward, dynamic=True)  # prompts have any length
            if run.checkpoint:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def code_losses(self, batch, guess=False):
        """Each sample's mean next-code loss (B,). guess: half of the codes are read as the model guesses
        them, wrong ones too, so that it learns to trust the prompt (scheduled sampling, arXiv 1906.07651)."""
        with torch.no_grad(), torch.autocast(batch.targets.device.type, enabled=False):
            codes = read = self.vqgan[0].encode(batch.targets)  # (B, N)
        prefix = self.model.projector(self.model.encoder(batch), batch.lengths, batch.drop)  # (B, P, D)
        if guess:
            with torch.no_grad():
                logits = self.model.next_code_logits(prefix, batch.lengths, codes)
            guesses = (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)  # as choose
            read = torch.where(torch.rand(codes.shape, device=codes.device) < 0.5, guesses, codes)
        logits = self.model.next_code_logits(prefix, batch.lengths, read).flatten(0, 1)  # (B * N, V)
        return F.cross_entropy(logits, codes.flatten(), reduction="none").view_as(codes).mean(1)

    def validation_loss(self, batch):
        return self.code_losses(batch).mean()

    def forward(self, batch, step):
        """(loss, logs) of a batch. Logs: the loss of each task."""
        losses = self.code_losses(batch, guess=step >= self.guess_from)
        logs = {task: torch.stack([one for one, t in zip(losses.detach(), batch.tasks) if t == task]).mean()
                for task in set(batch.tasks)}
        return losses.mean(), logs

    def after_step(self, step):
        """Nothing; TokenizerStage does more."""


class EncoderStage(MentorStage):
    """Mentor's encoder alone learns BERT's task (arXiv 1810.04805) with pictures: to tell the hidden words of
    a caption by the others and by the picture. Where all words are hidden, the image tokens must tell them
    unaided, the first one the first word and so on: a prompt's images then read like captions."""

    def validation_loss(self, batch):
        encoder, n, ids = self.model.encoder, self.model.config.image_tokens, batch.text_ids
        patches = encoder.vision(as_vision_pixels(batch.targets, self.model.config.vision.image_size))
        table, real = encoder.text.embedding, length_mask(batch.lengths, ids.shape[1])  # real (B, L)
        alone = (batch.masked == real).all(1, keepdim=True)                             # (B, 1)
        words = table(ids.masked_fill(batch.masked, TextTokenizer.UNKNOWN))             # (B, L, Dt)
        image = encoder.connector(patches, words, real)                                 # (B, n, Dt)
        mask = F.pad(real & ~alone, (n, 0), value=True)
        states = encoder.text(torch.cat([image, words], 1), mask)  # (B, n + L, Dt)
        fit = 0, n - ids.shape[1]  # a word for each image token
        answers = torch.cat([F.pad(ids, fit), ids], 1)  # (B, n + L)
        asked = torch.cat([F.pad(real & alone, fit), batch.masked & ~alone], 1)
        # the word table is the head too
        logits = F.linear(states[asked] * states.shape[-1] ** -0.5, table.weight)  # (W, vocab_size)
        losses = F.cross_entropy(logits.float(), answers[asked], reduction="none")  # (W,)
        share = asked / asked.sum(1, keepdim=True).clamp(min=1)  # samples count the same
        return (losses * share[asked]).sum() / len(ids)

    def forward(self, batch, step):
        """(loss, no logs) of a batch."""
        return self.validation_loss(batch), {}


# --- The optimizers ---


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, so that all directions of a matrix learn at one rate (Keller
    Jordan, 2024). As torch.optim.Muon, but in float32 off CUDA, and for convolutions too."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95).flatten(1)  # Nesterov's, (outputs, inputs)
                tall = len(update) > update.shape[1]
                x = update.T if tall else update
                x = x.bfloat16() if x.is_cuda else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: pushes the singular values towards 1
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1, len(update) / update.shape[1]) ** 0.5
                p.sub_((x.T if tall else x).view_as(p), alpha=rate)


def make_optimizers(stage, config, run):
    """AdamW for everything, or with muon_lr Muon for the matrices of hidden layers."""
    others = ("embedding", "relative_bias", "unconditional", "queries", "decoder.output", "conv_in",
              "conv_out", "quant_conv")
    matrices, rest = [], []
    for name, p in stage.named_parameters():
        if p.requires_grad:
            hidden = config.muon_lr and p.ndim in (2, 4) and not any(other in name for other in others)
            (matrices if hidden else rest).append(p)
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": run.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, run.weight_decay))
    return optimizers


def schedule(step, config, run):
    """Factor on the peak learning rate: linear warm-up, then a cosine down to final_lr."""
    warmup = max(1, round(run.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


# --- Training one stage ---


def make_dataset(name, run, source, held_out=False):
    """A stage's samples; the held-out ones are the same for every seed."""
    seed, drop = ("validation", 0.0) if held_out else (f"{run.seed} {name}", run.prefix_drop)
    return source.dataset(parse_mix(getattr(run, name).mix), seed, drop, held_out)


def check_same(folder, old, new):
    """Refuse a folder that was made with other keys, naming the first."""
    for key in sorted(old.keys() | new.keys()):
        require(old.get(key) == new.get(key) or key.startswith("model.sampling."),
                f"{folder} has {key}={old.get(key)}, this run {new.get(key)}: choose another --out")


def load_as(cls, config, folder, prefix):
    """load_model, of this config."""
    model = load_model(cls, config, folder)
    check_same(folder, flatten(model.config, prefix), flatten(config, prefix))
    model.config = config  # sampling may differ
    return model


STAGE_MODULES = dict.fromkeys(STAGES, MentorStage) | {"tokenizer": TokenizerStage, "encoder": EncoderStage}


def build_stage(name, run, machine, source):
    """A stage's module, with the weights it starts from."""
    torch.manual_seed(run.seed)
    module, out = STAGE_MODULES[name], Path(run.out)
    if name == "tokenizer":
        dataset, size = make_dataset(name, run, source), run.vqgan.image_size
        return module(run, machine, lambda i: tokenizer_pixels(dataset[i].target, size)).to(machine.device)
    if name == "encoder":
        return module(name, run, machine, Mentor(run.model), None).to(machine.device)
    vqgan = load_as(VQGAN, run.vqgan, out / "tokenizer", "vqgan.").requires_grad_(False)
    model = load_as(Mentor, run.model, out / STAGES[name][-1], "model.")
    if name == "pretrain":
        start_from_codebook(model.decoder, vqgan.quantize.codebook())
    return module(name, run, machine, model, vqgan.to(machine.device)).to(machine.device)


def micro_batches(config, run, machine):
    """(samples in a micro-batch, micro-batches in a step) of one process."""
    share = config.global_batch // machine.world_size
    micro = run.micro_batch or share
    require(micro and config.global_batch % (machine.world_size * micro) == 0,
            f"global_batch={config.global_batch}: no multiple of {machine.world_size} x micro_batch={micro}")
    return micro, share // micro


@contextmanager
def stop_signals():
    """A list of Ctrl-C and SIGTERM, for the loop to see after its step. A second Ctrl-C stops at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals(worker):
    """A data process leaves Ctrl-C to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which Python ends it


def make_batches(dataset, collate, config, run, machine, start):
    """This process's micro-batches from step `start` on. A checkpoint holds no data: a sample depends
    on its index alone."""
    micro, accumulate = micro_batches(config, run, machine)
    firsts = (step * config.global_batch + (machine.rank * accumulate + m) * micro
              for step in range(start, config.steps) for m in range(accumulate))
    indices = (range(first, first + micro) for first in firsts)
    loader = DataLoader(dataset, batch_sampler=indices, collate_fn=collate, num_workers=run.workers,
                        pin_memory=machine.device.type == "cuda", worker_init_fn=leave_signals,
                        generator=torch.Generator())  # it draws a seed, which must not change the dropout
    try:
        yield from loader
    except (RuntimeError, ValueError) as error:  # of a data process, with a whole traceback
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def train_stage(name, run, machine, source, text_tokenizer):
    """Train one stage, from its checkpoint or the stages before, and save its weights."""
    folder, config = Path(run.out) / name, getattr(run, name)
    record, file = stage_record(name, run, source, text_tokenizer), folder / "stage.json"
    before = json.loads(file.read_text()) if file.is_file() else record
    if "imported from" not in before:  # by one of the extras
        check_same(folder, before, record)
    if (folder / "model.safetensors").is_file():
        return machine.say(f"{name}: {folder} holds its weights already")
    stage = build_stage(name, run, machine, source)
    optimizers = make_optimizers(stage, config, run)
    start, best = load_checkpoint(folder, stage, optimizers)
    if machine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
        write_json(folder.parent / "run.json", flatten(run))

    collate = Collate(text_tokenizer, run.model, run.vqgan.image_size)
    dataset, held_out = (make_dataset(name, run, source, held_out=h) for h in (False, True))
    batches = make_batches(dataset, collate, config, run, machine, start)
    micro, accumulate = micro_batches(config, run, machine)
    validate = partial(held_out_loss, stage, held_out, collate, micro, machine)
    log = Log(name, run, machine, start)
    trains = {part: sum(p.numel() for p in module.parameters() if p.requires_grad)
              for part, module in stage.model.named_children()}
    machine.say(f"{name}: parameters that train {trains}, {config.steps} steps of {config.global_batch} = "
                f"{machine.world_size} processes x {accumulate} x {micro}, from step {start}")

    # few samples may be learnt by heart; a discriminator costs held-out loss
    best = best if dataset.count < math.inf and not stage.own_optimizers else None
    with stop_signals() as stop:
        train_steps(stage, run, config, machine, batches, optimizers, log, start, best, validate, stop)
    if best and 0 < best["step"] < config.steps:
        machine.say(f"{name}: ends with the weights of step {best['step']}, the best on held-out samples")
        stage.model.load_state_dict(best["weights"])
    if machine.rank == 0:
        save_model(stage.model, folder)
        (folder / "state.pt").unlink(missing_ok=True)
    if machine.world_size > 1:
        dist.barrier()  # the next stage reads what the first process has written
    if stop:  # too late for the last step
        sys.exit(128 + max(stop))


def train_steps(stage, run, config, machine, batches, optimizers, log, start, best, validate, stop):
    """The loop. best: the weights with the smallest held-out loss, or None; validate(): that loss."""
    accumulate, wrapped = micro_batches(config, run, machine)[1], stage.train()
    trained = [p for p in stage.parameters() if p.requires_grad]
    if machine.world_size > 1:
        wrapped = DistributedDataParallel(stage, gradient_as_bucket_view=True)  # gradients once in memory

    for step in range(start, config.steps):
        torch.manual_seed(run.seed * 1_000_003 + step * machine.world_size + machine.rank)  # for dropout

        # forward and backward
        for m in range(accumulate):
            batch = next(batches).to(machine.device)
            if machine.world_size > 1:  # gradients are exchanged once per step
                wrapped.require_backward_grad_sync = m == accumulate - 1
            with machine.autocast():
                loss, logs = wrapped(batch, step)
            (loss / accumulate).backward()
            log.add(loss=loss.detach(), **logs)

        # the optimizers
        grad_norm = nn.utils.clip_grad_norm_(trained, run.grad_clip)
        factor = schedule(step, config, run)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        stage.after_step(step)
        log.add(grad_norm=grad_norm, lr=config.lr * factor)

        # now and then the held-out loss, a line in the log, a checkpoint
        done, last = step + 1, step + 1 == config.steps
        stopped = machine.average(torch.tensor([float(len(stop))])).item() > 0  # of any process
        validating = last or done % max(1, config.steps // 15) == 0
        saving = stopped or not last and run.save_every and done % run.save_every == 0
        if validating and (held_out := validate()) is not None:
            log.add(held_out=held_out)
            if best:
                note_best(best, held_out, done, stage, log)
        if validating or saving or done % max(1, config.steps // 200) == 0:  # float() waits for a GPU
            log.write(done)
        if saving:
            save_checkpoint(log.path.parent, stage, optimizers, done, best, machine)
        if stopped:
            machine.say(f"stopped after step {done}; the same command goes on")
            sys.exit(128 + max(stop, default=signal.SIGTERM))


@torch.no_grad()
def held_out_loss(stage, dataset, collate, micro, machine, most=128):
    """Mean loss of the first held-out samples, shared by the processes; None if nothing is held out."""
    if not dataset.count:
        return None
    mine, total = range(machine.rank, most, machine.world_size), torch.zeros((), device=machine.device)
    stage.eval()
    for first in range(0, len(mine), micro):
        batch = collate([dataset[i] for i in mine[first : first + micro]]).to(machine.device)
        with machine.autocast():
            total += stage.validation_loss(batch).float() * len(batch.tasks)
    stage.train()
    return machine.average(total).item() * machine.world_size / most


def note_best(best, held_out, step, stage, log):
    """Keep the best weights; warn when only the training loss falls."""
    loss = log.mean("loss")
    if held_out < best["loss"]:
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in stage.model.state_dict().items()}
        best |= {"loss": held_out, "step": step, "training loss": loss, "weights": weights}
    elif held_out > 1.05 * best["loss"] and loss < best["training loss"]:
        log.machine.say(f"warning: held-out loss {held_out:.3f}, after {best['loss']:.3f} at step "
                        f"{best['step']}: the model learns its samples by heart")


def read_log(file):
    """The lines of a log.jsonl, but for those that a full disk has cut."""
    lines = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


class Log:
    """Progress bar, and log.jsonl with the means since its last line."""

    def __init__(self, name, run, machine, start):
        self.name, self.config, self.machine = name, getattr(run, name), machine
        self.path, self.values = Path(run.out) / name / "log.jsonl", defaultdict(list)
        self.written, self.started = start, time.perf_counter()
        hidden = machine.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.config.steps, initial=start, desc=name, disable=hidden)
        if machine.rank == 0:  # what came after the checkpoint happens again
            lines = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= start]
            self.path.write_text("".join(lines))

    def add(self, **values):
        """Note numbers or scalar tensors for the next line's means."""
        for key, value in values.items():
            self.values[key].append(value)

    def mean(self, key):
        return sum(map(float, self.values[key])) / len(self.values[key])

    def write(self, step):
        """Write the line of `step`; loss and gradient must be finite."""
        means = {key: self.mean(key) for key in self.values}
        means["loss"] = self.machine.average(torch.tensor(means["loss"], device=self.machine.device)).item()
        require(math.isfinite(sum(means.values())),
                f"{self.name}: loss {means['loss']}, gradient norm {means['grad_norm']} by step {step}: "
                f"delete {self.path.parent} and start again with a lower --{self.name}.lr")
        rate = (step - self.written) * self.config.global_batch / (time.perf_counter() - self.started)
        words = f"loss {means['loss']:.4f}, {rate:.0f} samples/s"
        self.bar.update(step - self.written)
        self.bar.set_postfix_str(words)
        self.values.clear()
        self.written, self.started = step, time.perf_counter()
        if "held_out" in means:
            self.machine.say(f"{self.name}: step {step}, {words}, held-out loss {means['held_out']:.4f}")
        if self.machine.rank == 0:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"step": step, **means, "samples_per_s": rate}) + "\n")
            except OSError as error:  # a full disk must not end the run
                self.machine.say(f"{self.path}: {error}")


# --- Checkpoints and records ---


def save_checkpoint(folder, stage, optimizers, step, best, machine):
    """Write state.pt, to go on from `step`. On a full disk the one before stays."""
    if machine.rank > 0:
        return
    state = {"step": step, "best": best, "stage": stage.state_dict(),
             "optimizers": [o.state_dict() for o in (*optimizers, *stage.own_optimizers)]}
    try:
        write_atomically(folder / "state.pt", lambda path: torch.save(state, path))
    except OSError as error:
        machine.say(f"{error}: going on without a checkpoint of step {step}")


def load_checkpoint(folder, stage, optimizers):
    """Restore state.pt: the step to go on from and the best weights."""
    file = folder / "state.pt"
    if not file.is_file():
        return 0, {"loss": math.inf, "step": 0}
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        stage.load_state_dict(state["stage"])
        for optimizer, saved in zip((*optimizers, *stage.own_optimizers), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"], state["best"]
    except Exception as error:  # whatever the damage suggests
        error = shorten(str(error), 70)
        raise ValueError(f"{file} cannot be read ({error}): delete it to start again") from None


# may change in a used folder; micro_batch alters collages
FREE = ("out", "stage", "data", "device", "dtype", "workers", "save_every", "micro_batch", "train_scale",
        "checkpoint", "compile", "model.sampling.")


def stage_record(name, run, source, text_tokenizer):
    """All that determines a stage's result."""
    free = FREE + tuple(f"{stage}." for stage in STAGES if stage != name)
    free += ("model.", "prefix_drop") if name == "tokenizer" else ("vqgan.",)
    record = {key: value for key, value in flatten(run).items() if not key.startswith(free)}
    for stage in STAGES[name]:
        weights = Path(run.out) / stage / "model.safetensors"
        require(weights.is_file(), f"{weights} is missing: train the stage {stage} first")
        record[f"weights of {stage}"] = file_hash(weights)
        made = json.loads(weights.with_name("stage.json").read_text()).get("weights of tokenizer")
        require(made in (None, record["weights of tokenizer"]), f"{weights}: other weights of tokenizer")
    if name != "tokenizer":
        record["text tokenizer"] = text_tokenizer.digest
    return json.loads(json.dumps(record | {"data": source.digest}))


# --- The command line ---


def parse_mix(mix):
    """"task:share,task:share" -> {task: share}."""
    try:
        shares = {task: float(share) for task, share in (part.split(":") for part in mix.split(","))}
    except ValueError:
        shares = {}
    legal = set(shares) <= set(TASKS) and all(0 <= share < math.inf for share in shares.values())
    require(legal and any(shares.values()),
            f"mix={mix}: must be like text_to_image:3,segmentation:1, of the tasks {', '.join(TASKS)}")
    return {task: share for task, share in shares.items() if share}


def parse(arguments):
    """Command line -> RunConfig."""
    preset, *arguments = arguments
    require(preset in PRESETS, f"{preset}: the first argument must be a preset: {', '.join(PRESETS)}")
    known = flatten(PRESETS[preset])
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if key not in known or not argument.startswith("--"):
            near = get_close_matches(key, known, n=1, cutoff=0)[0]
            raise ValueError(f"{argument}: no such key; the nearest is --{near}={known[near]}")
        known[key] = read_value(key, text if equals else "true", known[key])
    run = rebuild(PRESETS[preset], known)
    for stage in STAGES:
        parse_mix(getattr(run, stage).mix)
    require(run.stage in ("all", *STAGES), f"--stage={run.stage}: must be all, {', '.join(STAGES)}")
    require(run.dtype in ("", "float32", "bfloat16"), f"--dtype={run.dtype}: must be float32 or bfloat16")
    known |= {f"{s}.steps": max(1, round(getattr(run, s).steps * run.train_scale)) for s in STAGES}
    known |= {f"model.decoder.{key}": getattr(run.vqgan, key) for key in ("grid_size", "codebook_size")}
    known |= {"out": os.path.expanduser(run.out or f"out/{preset}"), "data": os.path.expanduser(run.data)}
    return rebuild(run, known)


def read_value(key, text, default):
    """A key's value, of its default's type."""
    try:
        if isinstance(default, tuple):
            return tuple(map(int, text.split(",")))
        if isinstance(default, bool):
            return {"true": True, "false": False}[text]
        value = type(default)(text)
    except (ValueError, KeyError):
        raise ValueError(f"--{key}={text}: must be a {type(default).__name__}, like {default!r}") from None
    require(isinstance(value, str) or 0 <= value < math.inf, f"--{key}={text}: must not be negative")
    return value


def print_help():
    """Print this file's usage and the keys' source."""
    print(__doc__, f"\npython train.py PRESET [--key=value ...]   PRESET: {', '.join(PRESETS)}\n")
    for config in (RunConfig, StageConfig, MentorStageConfig, TokenizerStageConfig, TokenizerConfig,
                   MentorConfig, VisionConfig, TextConfig, DecoderConfig, SamplingConfig):
        print(getsource(config).partition("    @property")[0].partition("    def ")[0])


def open_source(run):
    """Where samples come from."""
    return Folder(run.data, run.vqgan.image_size) if run.data else Shapes(run.vqgan.image_size)


def check_mixes(run, defaults, source, machine):
    """Tasks that the data lacks are refused in the user's mixes, told of in the preset's."""
    lacks = {stage: parse_mix(getattr(run, stage).mix).keys() - source.tasks for stage in STAGES}
    missing = ", ".join(sorted(set().union(*lacks.values())))
    wrong = [f"--{stage}.mix" for stage, tasks in lacks.items()
             if tasks and getattr(run, stage).mix != getattr(defaults, stage).mix]
    require(not wrong, f"the data has nothing for {missing}, in {', '.join(wrong)}")
    if missing:
        machine.say(f"data: has nothing for {missing}, left out of the mixes")


def find_words(run, source):
    """The text tokenizer in the run's folder, or a new one."""
    spiece, size = Path(run.out) / "spiece.model", run.model.text.vocab_size
    words = TextTokenizer(spiece.read_bytes()) if spiece.is_file() else source.text_tokenizer()
    require(words.vocab_size <= size, f"--model.text.vocab_size={size}: the data needs {words.vocab_size}")
    return words


def start_run(run, machine, source):
    """Write what stages share, print what the data is, return the text tokenizer."""
    words, out, contents = find_words(run, source), Path(run.out), getattr(source, "contents", {})
    data = out / "data.json"
    if contents:
        before = json.loads(data.read_text()) if data.is_file() else contents
        changed = [name for name in contents if before.get(name) != contents[name]]
        machine.say(f"data: {source.notes}; changed since the last run: {', '.join(changed) or 'nothing'}")
        unknown = words.unknown_words(" ".join(source.prompts()))
        require(not unknown, f"{out}/spiece.model lacks {', '.join(unknown)}: choose another --out")
        collate = Collate(words, run.model, 0)
        for prompt in source.prompts():
            collate.encode(prompt, 1)  # fits?
    if machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "spiece.model", lambda path: path.write_bytes(words.proto))
        write_json(data, contents)
    return words


def main(arguments, open_source=open_source):
    """Train and show the result. open_source(run): like Shapes or Folder."""
    if not arguments or {"-h", "--help"} & set(arguments):
        return print_help()
    run, started = parse(arguments), time.perf_counter()
    machine = start_machine(run)
    stages = STAGES if run.stage == "all" else [run.stage]
    for stage in stages:
        micro_batches(getattr(run, stage), run, machine)
    source = open_source(run)
    check_mixes(run, PRESETS[arguments[0]], source, machine)
    text_tokenizer = start_run(run, machine, source)
    for stage in stages:
        train_stage(stage, run, machine, source, text_tokenizer)
        machine.say(f"{stage}: finished after {time.perf_counter() - started:.0f} s in all")
    if machine.world_size > 1:
        dist.destroy_process_group()
    if machine.rank == 0:
        show_result(stage, run, machine, source)


def show_result(name, run, machine, source):
    """Draw curves and a stage's pictures; print what to try next."""
    out, samples, seen = Path(run.out), {}, set()
    draw_curves(out)
    if name == "encoder":
        return machine.say(f"look at {out}/curves.png")
    for title, held_out in (("training samples", False), ("held-out samples", True)):
        dataset = make_dataset(name, run, source, held_out)
        some = {s.prompt: s for s in (dataset[i] for i in range(min(64, dataset.count)))}
        samples[title] = [s for prompt, s in some.items() if prompt not in seen][:8]
        seen |= some.keys()
    if name == "tokenizer":
        vqgan = load_model(VQGAN, run.vqgan, out / name).to(machine.device)
        sheet, hint = out / "tokenizer.png", ""
        draw = lambda part: sample.through_codes(vqgan, [s.target for s in part])
    else:
        pipeline, sheet = sample.Pipeline(out / name, machine.device), out / "sheet.png"
        draw, prompt = pipeline.draw, min(seen, key=lambda prompt: prompt.count("<image>"))
        hint = f", then try\n    python sample.py {out} {prompt!r}"
    if type(source) is Shapes and name == "instruct":
        sample.score(pipeline, out)
    else:
        sample.save_sheet({title: (part, draw(part)) for title, part in samples.items() if part}, sheet)
    machine.say(f"look at {sheet} and {out}/curves.png{hint}")


def draw_curves(out, width=400, height=220):
    """Draw curves.png, a panel for each stage: its loss as a line, its held-out loss as dots, by step."""
    logs = {name: lines for name in STAGES if (lines := read_log(out / name / "log.jsonl"))}
    sheet = Image.new("RGB", (width * max(1, len(logs)), height), "white")
    pen = ImageDraw.Draw(sheet)
    for left, (name, lines) in zip(range(0, sheet.width, width), logs.items()):
        last = lines[-1]["step"]
        later = [line for line in lines if 20 * line["step"] > last]  # the first fall would flatten the rest
        losses = [line[key] for line in later for key in ("loss", "held_out") if key in line]
        low, high = min(losses), max(losses) + 1e-9
        place = lambda x, y: (left + 10 + (width - 50) * x / last,
                              height - 36 - (height - 60) * (min(y, high) - low) / (high - low))
        pen.line([place(line["step"], line["loss"]) for line in lines], fill="#2060c0", width=2)
        for line in lines:
            if "held_out" in line:
                pen.circle(place(line["step"], line["held_out"]), 3, fill="#c03020")
        pen.text((left + 10, 4), f"{name}: loss (line), held-out loss (dots)", fill="black")
        for k in range(4):
            pen.text(place(0, low + k * (high - low) / 3), f"{low + k * (high - low) / 3:.3g}", fill="black")
            pen.text(place(k * last / 3, low), f"\n{k * last // 3}", fill="black")
    sheet.save(out / "curves.png")


if __name__ == "__main__":
    sample.cli(main, "train.py")
