"""Train Mentor, all stages or one, on a built-in world or on your own pictures. Also: import, plan, claims, benchmark.

    python train.py tiny                                    # everything, on the built-in world
    python train.py tiny --stage=align --align.lr=0.001     # one stage, one key changed
    python train.py tiny --stage=claims                     # what each stage and task is worth: the paper's ablation, small
    torchrun --nproc_per_node=8 train.py full --stage=align # the same on 8 GPUs

Four stages, each starting from the weights of the one before:

    tokenizer   VQGAN: pixels to codes and back
    pretrain    in place of the paper's downloads, three losses: the next code, from captions; which caption belongs to
                which picture (contrastive); a caption's hidden words, from the picture and the other words
    align       the paper's stage 1: reconstruction, segmentation and text-to-image teach what an image prompt means
    instruct    the paper's stage 2: subject-driven generation and recovery teach what to keep and what to change

Read in order: the configuration and its presets, processes and devices, the stages (what they train, with which loss),
where their samples come from, the optimizer, the loop, checkpoints. That is all of training. Then the command line, checks
before a run starts, released weights, the plan of a run (--dry_run), the paper's claims, speed (--bench), the report, main.
"""

import json
import math
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import cache, partial
from inspect import getsource
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mentor
import sample
import tokenizer
from data import (CLIP_MEAN, CLIP_STD, TASKS, WORLDS, Batch, Collate, Manifest, ManifestDataset, TextTokenizer, WorldDataset,
                  entry_prompt, manifest_of_folder, open_world, rules, tokenizer_pixels)
from mentor import Mentor, MentorConfig
from tokenizer import (VQGAN, WEIGHT_LIMIT, CodebookUsage, LPIPS, PatchDiscriminator, TokenizerConfig, adaptive_weight, collages,
                       consistency_loss, hinge_d_loss, spread_codes)

# --- Configuration -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerStageConfig:
    """Training of the tokenizer."""

    steps: int = 100000            # optimizer steps, before --train_scale
    global_batch: int = 128        # images per step, over all processes and micro-batches
    lr: float = 1e-4               # AdamW's peak learning rate
    final_lr: float = 0.1          # final learning rate, as a fraction of the peak
    disc_start: float = 0.3        # fraction of the steps after which the discriminator joins; 1: never
    disc_weight: float = 0.5       # of the discriminator's part of the loss, times the adaptive weight
    codebook_weight: float = 1.0   # of the quantizer's loss, relative to the reconstruction's
    codebook_start: float = 0.0    # fraction of the steps after which features are rounded to codes
    consistency: float = 0.0       # weight of the loss that makes a cell's code independent of its surroundings; 0: without
    lpips: str = ""                # folder with VGG16 and LPIPS weights; empty: no perceptual loss
    restart_every: int = 2000      # steps per usage window, after which all codes are placed again


@dataclass(frozen=True)
class StageConfig:
    """Training of one of Mentor's stages."""

    steps: int = 20000             # optimizer steps, before --train_scale
    global_batch: int = 128        # samples per step, over all processes and micro-batches
    lr: float = 5e-4               # AdamW's peak learning rate
    muon_lr: float = 0.0           # Muon's peak, for the matrices of hidden layers; 0: AdamW for all
    final_lr: float = 0.1          # final learning rate, as a fraction of the peak
    mix: str = "text_to_image:1"   # tasks and their shares


@dataclass(frozen=True)
class ReleasedConfig:
    """Files of released weights: --stage=import reads them, --stage=export writes `mentor` and `vq`."""

    clip: str = ""                 # CLIP, whole or its vision tower: a Hub folder or a file
    t5: str = ""                   # T5, whole or its encoder: a Hub folder with spiece.model in it
    connector: str = ""            # LLaVA's mm_projector.bin
    generator: str = ""            # LlamaGen's or MENTOR's generator checkpoint
    mentor: str = ""               # MENTOR's checkpoint of stage 1 or 2, which has everything but the VQ
    vq: str = ""                   # LlamaGen's vq_ds16_t2i.pt
    spiece: str = ""               # T5's spiece.model, if --released.t5 is not given
    into: str = "pretrain"         # stage to import into: pretrain for parts, align or instruct for MENTOR's own weights
    fresh: str = ""                # parts to initialise instead of reading, comma-separated: connector, projector, ...


TOKENIZER_MIX = {"text_to_image": 3.0, "segmentation": 2.0}  # every kind of target, scenes and cut-outs
ALIGN_MIX = "text_to_image:700,reconstruction:180,segmentation:1600"                       # thousands of samples,
INSTRUCT_MIX = "text_to_image:600,segmentation:150,recovery:150,subject_driven:400"        # as published
# 29 thousand samples, not 2.6 million: a larger share of the hardest task
TINY_INSTRUCT_MIX = "text_to_image:300,segmentation:100,recovery:100,subject_driven:800"


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Nested keys are written with dots: --align.lr=0.001 --model.decoder.n_layer=6."""

    out: str = ""                  # folder to write
    stage: str = "all"             # all, tokenizer, pretrain, align, instruct, claims (the paper's), import or export (released weights)
    world: str = "shapes"          # built-in world: shapes or emoji
    emoji_font: str = ""           # colour emoji font file; empty: the system's
    data: str = ""                 # your own pictures instead of a world: a manifest (.jsonl) or a folder
    data_root: str = ""            # folder that the manifest's file names are relative to; empty: the manifest's own
    backgrounds: str = ""          # manifest or folder of pictures to put behind recovery's objects; empty: data's
    cache_codes: bool = False      # keep the codes of data's targets in OUT/codes, to encode each only once
    skip_bad: bool = False         # skip and list wrong lines of a manifest, instead of stopping at the first
    seed: int = 0                  # of everything random in training
    train_scale: float = 1.0       # multiplies the steps of every stage
    recipe: str = "scratch"        # which parts train in which stage (TRAINED): scratch, paper or released
    micro_batch: int = 0           # samples in one pass of one process; 0: its whole share of global_batch
    weight_decay: float = 0.05     # AdamW's and Muon's, on matrices
    grad_clip: float = 1.0         # larger gradients are scaled down to this norm
    warmup: float = 0.05           # fraction of a stage's steps with a rising learning rate
    prefix_drop: float = 0.1       # share of samples trained without their prompt, for guidance
    device: str = "auto"           # auto (cuda, then mps, then cpu) or a torch device
    dtype: str = "auto"            # of autocast: auto (bfloat16 on a GPU that supports it), bfloat16 or float32
    workers: int = 0               # processes that prepare samples; 0: the training process does
    save_every: int = 1000         # steps between checkpoints
    score_every: int = 0           # steps between scores (CP, PF) in the logs of align and instruct; 0: never
    claims_seeds: int = 1          # seeds of --stage=claims, for the full run and the rows that one seed cannot tell from it
    checkpoint: bool = False       # keep less for the backward pass and compute it again: less memory, a third slower
    compile: str = "auto"          # torch.compile the blocks of text encoder and decoder: true, false, or auto (on CUDA)
    dry_run: bool = False          # train nothing: check the run, print parameters, FLOPs, memory and hours
    bench: bool = False            # train nothing: measure steps of instruct (of --stage=align), with and without each optimisation
    keep: int = 2                  # newest checkpoints of a stage to keep
    released: ReleasedConfig = field(default_factory=ReleasedConfig)
    vqgan: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: MentorConfig = field(default_factory=MentorConfig)
    tokenizer: TokenizerStageConfig = field(default_factory=TokenizerStageConfig)
    pretrain: StageConfig = field(default_factory=StageConfig)
    align: StageConfig = field(default_factory=lambda: StageConfig(steps=19375, lr=5e-4, mix=ALIGN_MIX))
    instruct: StageConfig = field(default_factory=lambda: StageConfig(steps=20312, lr=1e-4, mix=INSTRUCT_MIX))


PRESETS = {
    "tiny": RunConfig(
        weight_decay=0.1,
        tokenizer=TokenizerStageConfig(steps=2000, global_batch=8, lr=1.5e-3, final_lr=0.0, disc_start=1.0, codebook_weight=0.2,
                                       codebook_start=0.4, consistency=0.2, restart_every=400),
        pretrain=StageConfig(steps=850, global_batch=24, lr=1e-2, muon_lr=0.02, final_lr=0.3),
        align=StageConfig(steps=850, global_batch=24, lr=4e-3, muon_lr=0.01, final_lr=0.6, mix=ALIGN_MIX),
        instruct=StageConfig(steps=1200, global_batch=24, lr=3e-3, muon_lr=0.008, final_lr=0.0, mix=TINY_INSTRUCT_MIX)),
    "small": RunConfig(
        weight_decay=0.01, world="emoji", workers=4,
        tokenizer=TokenizerStageConfig(steps=8000, global_batch=32, lr=5e-4, disc_start=0.5, codebook_start=0.2, consistency=0.2,
                                       restart_every=1600),
        pretrain=StageConfig(steps=8000, global_batch=64, lr=1e-3, muon_lr=0.02),
        align=StageConfig(steps=8000, global_batch=64, lr=1e-3, muon_lr=0.02, mix=ALIGN_MIX),
        instruct=StageConfig(steps=16000, global_batch=64, lr=1e-3, muon_lr=0.02, mix=INSTRUCT_MIX)),
    "base": RunConfig(workers=8),
    "full": RunConfig(workers=8, recipe="paper"),
    # stage 2's samples again, with 1.5M of several images, from the weights of stage 2 (imported as align)
    "multi": RunConfig(workers=8, recipe="paper", instruct=StageConfig(steps=21875, lr=5e-5, mix=INSTRUCT_MIX + ",multi_image:1500")),
}
PRESETS = {name: replace(run, out=f"out/{name}", vqgan=tokenizer.PRESETS[name], model=mentor.PRESETS[name])
           for name, run in PRESETS.items()}


STARTS_FROM = {  # stage -> the earlier stages whose weights it needs
    "tokenizer": (), "pretrain": ("tokenizer",), "align": ("tokenizer", "pretrain"), "instruct": ("tokenizer", "align")}
STAGES = tuple(STARTS_FROM)

EVERYTHING_BUT_VISION = ("encoder.connector", "encoder.text", "projector", "decoder")
EVERYTHING = ("encoder", "projector", "decoder")
TRAINED = {  # recipe -> stage -> parts of Mentor that train, as prefixes of parameter names; the rest is frozen
    # a connector pretrained for minutes, not LLaVA's of days, still has to learn in alignment
    "scratch": {"pretrain": EVERYTHING, "align": EVERYTHING_BUT_VISION, "instruct": EVERYTHING_BUT_VISION},
    # section 3.2: alignment trains projector and generator
    "paper": {"pretrain": EVERYTHING, "align": ("projector", "decoder"), "instruct": EVERYTHING_BUT_VISION},
    # the released script for stage 1
    "released": {"pretrain": EVERYTHING, "align": ("encoder.text", "encoder.connector", "decoder.code_embedding", "decoder.output"),
                 "instruct": EVERYTHING_BUT_VISION},
}

# --- Processes and devices ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """This process's place in a run: its device, and its exchange with the other processes."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self):
        """Whether this process writes and prints."""
        return self.rank == 0

    def autocast(self):
        """Autocast to the run's dtype; off for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def wrap(self, module):
        """The module, made to average gradients over the processes if there are several."""
        if self.world_size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, devices, broadcast_buffers=False)  # buffers are constant tables

    def barrier(self):
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def average(self, tensor):
        """Turn a tensor into the mean of all processes' ones, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.div_(self.world_size)

    def gather(self, tensor):
        """Concatenate all processes' tensors along the first dimension, in rank order; gradients flow back."""
        return tensor if self.world_size == 1 else torch.cat(all_gather(tensor.contiguous()))

    def max(self, number):
        """The largest of all processes' integers, so that all decide alike. Does not wait for a GPU."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def mean(self, values):
        """{key: number}, averaged over the processes that have the key."""
        if self.world_size == 1:
            return values
        everyone = [None] * self.world_size
        dist.all_gather_object(everyone, values)
        found = {}
        for key, number in (item for other in everyone for item in other.items()):
            found.setdefault(key, []).append(number)
        return {key: sum(numbers) / len(numbers) for key, numbers in found.items()}

    def say(self, *words):
        """Print, in the first process only."""
        if self.main:
            tqdm.write(" ".join(str(w) for w in words), file=sys.stdout)


def start_machine(run):
    """Read torchrun's environment, choose device and dtype, and print why."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = sample.best_device() if run.device == "auto" else run.device
    device = sample.usable_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        # when a process dies, torchrun stops the others at once; the timeout is for one that hangs, and longer than writing the
        # largest checkpoint takes
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    if run.dtype != "auto":
        dtype, why = getattr(torch, run.dtype), "asked for"
    elif device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = torch.bfloat16, "the GPU supports it"
    else:
        dtype, why = torch.float32, f"{device.type} gains nothing from bfloat16 here, and float16 is never chosen: T5 overflows in it"
    machine = Machine(rank, world_size, device, dtype)
    machine.say(f"device {device}, {world_size} process{'es' * (world_size > 1)}, {str(dtype)[6:]} ({why}), torch {torch.__version__}")
    return machine


# --- The stages: what they train, on which samples, with which loss ----------------------------------------------


class Stage(nn.Module):
    """Base of the stages. A subclass has `model`, forward(batch, step) -> (loss, logs) and validation_loss(batch) -> loss."""

    own_optimizers = ()  # optimizers that it steps itself

    def trained(self):
        """Named parameters to train."""
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]

    def after_step(self, step):
        """Called when the optimizers have stepped; returns logs."""
        return {}


class TokenizerStage(Stage):
    """VQGAN: reconstruction, codebook and commitment losses; LPIPS and a discriminator if the config has them."""

    OUTPUTS_PER_CODE = 64  # encoder outputs per code, from which the codes are placed

    def __init__(self, run, machine, pictures=None):
        """pictures: a dataset whose first targets place the codes."""
        super().__init__()
        self.config, self.machine, self.pictures = run.tokenizer, machine, pictures
        self.model = VQGAN(run.vqgan)
        self.usage = CodebookUsage(run.vqgan.codebook_size, machine.device)
        self.register_buffer("counts", self.usage.counts)  # so that checkpoints include them
        self.perceptual = self.disc = None
        self.d_weight, self.warned = 0.0, False
        self.seen = []  # of each micro-batch of a step: reconstructions and pictures, for the discriminator
        if self.config.lpips:
            with machine.device:  # not .to(), which fails on tensors without memory (Rehearsal)
                self.perceptual = LPIPS(self.config.lpips).forward  # the bound method, so that its weights are not registered here
        else:
            machine.say("tokenizer: no LPIPS weights given (--tokenizer.lpips=FOLDER), so no perceptual loss")
        self.disc_start = round(self.config.disc_start * self.config.steps)
        self.codebook_start = round(self.config.codebook_start * self.config.steps)
        if self.config.disc_start < 1:
            self.disc = PatchDiscriminator().requires_grad_(False)  # except in its own step
            self.own_optimizers = [torch.optim.AdamW(self.disc.parameters(), self.config.lr, betas=(0.5, 0.9))]

    def reconstruct(self, targets, step):
        """What the tokenizer makes of targets (B, 3, S, S): the loss = reconstruction + codebook_weight * quantizer, the images
        (B, 3, S, S), the encoder's outputs z (B, C, h, w) and codes (B, h, w). Before codebook_start, features are not rounded to
        codes: the encoder first learns what to tell apart."""
        z = self.model.quant_conv(self.model.encoder(targets))
        z_q, quantizer_loss, codes = self.model.quantize(z)
        if step < self.codebook_start:
            z_q, quantizer_loss = F.normalize(z.float(), dim=1), 0 * quantizer_loss
        images = self.model.decoder(self.model.post_quant_conv(z_q.to(z.dtype))).float()
        reconstruction = F.mse_loss(images, targets)
        if self.perceptual:
            reconstruction = reconstruction + self.perceptual(images, targets)
        return SimpleNamespace(loss=reconstruction + self.config.codebook_weight * quantizer_loss, reconstruction=reconstruction,
                               quantizer=quantizer_loss, images=images, z=z, codes=codes)

    def validation_loss(self, batch):
        """Mean loss of a batch's samples, without discriminator and collages."""
        return self.reconstruct(batch.targets, self.config.steps).loss

    def forward(self, batch, step):
        """(loss, logs) of a batch. Keeps its images for after_step. Each micro-batch has an adaptive weight of its own."""
        targets = batch.targets
        if self.config.consistency:
            targets, kept = collages(targets, self.model.config.grid_size, step)
        made = self.reconstruct(targets, step)
        loss, logs = made.loss, {"reconstruction": made.reconstruction.detach(), "quantizer": made.quantizer.detach()}
        if self.config.consistency:
            consistency = consistency_loss(made.z, kept)
            loss, logs["consistency"] = loss + self.config.consistency * consistency, consistency.detach()
        if self.disc and step >= self.disc_start * 1.05:  # the discriminator learns a little first
            generator_loss, last_layer = -self.disc(made.images).mean(), self.model.decoder.conv_out.weight
            weight = adaptive_weight(made.reconstruction, generator_loss, last_layer, self.machine.average)
            loss = loss + self.config.disc_weight * weight * generator_loss
            self.d_weight = logs["d_weight"] = weight
        self.usage.add(self.machine.gather(made.codes))
        if self.disc and step >= self.disc_start:
            self.seen.append((made.images.detach(), targets))
        return loss, logs

    def after_step(self, step):
        """The discriminator's step, and at the end of a usage window new places for the codes."""
        logs, done = {}, step + 1 - self.codebook_start
        if self.seen:
            logs["disc"], self.seen = self.discriminator_step(self.seen), []
        if done >= 0 and done % self.config.restart_every == 0:
            logs["usage"], logs["perplexity"] = self.usage.usage(), self.usage.perplexity()
            if done:  # until now the codes lay where they were drawn
                self.describe_window(step, logs["usage"], logs["perplexity"])
            if not done or step + 1 <= 0.8 * self.config.steps:  # codes placed again later would have no time to settle
                logs["restarted"] = self.place_codes(step)
            self.usage.reset()
        return logs

    def describe_window(self, step, usage, perplexity):
        """Print the codebook's usage in a window, with a warning where it is low or the discriminator has nothing to say."""
        say = self.machine.say
        say(f"tokenizer: up to step {step + 1} {usage:.0%} of {len(self.usage.counts)} codes in use, perplexity {perplexity:.0f}")
        if usage < 0.1:
            say("tokenizer: warning: so few codes tell little apart; lower --vqgan.codebook_size (and --model.decoder.codebook_size), or "
                f"--tokenizer.restart_every={self.config.restart_every}, to place dead codes again more often")
        if not self.warned and self.d_weight >= WEIGHT_LIMIT:
            say(f"tokenizer: warning: d_weight is at its limit {WEIGHT_LIMIT:g}: the discriminator gives next to no gradient; lower "
                "--tokenizer.lr, or start it later (--tokenizer.disc_start)")
            self.warned = True

    def discriminator_step(self, seen):
        """Train the discriminator to tell reconstructed images (B, 3, S, S) from their targets, a pair per micro-batch. Returns its
        mean loss."""
        losses = []
        self.disc.requires_grad_(True)
        for images, targets in seen:
            with self.machine.autocast():
                losses.append(hinge_d_loss(self.disc(targets).float(), self.disc(images).float()))
            (losses[-1] / len(seen)).backward()
        for p in self.disc.parameters():
            self.machine.average(p.grad)
        for optimizer in self.own_optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.disc.requires_grad_(False)
        return torch.stack(losses).detach().mean()

    @torch.no_grad()
    def place_codes(self, step):
        """Place all codes on the encoder's current outputs for the first pictures; returns how many codes were dead."""
        config, weight = self.model.config, self.model.quantize.embedding.weight
        dead, few = int((self.usage.counts == 0).sum()), max(1, self.OUTPUTS_PER_CODE * len(weight) // config.grid_size**2)
        z = []
        for first in range(0, few, 16):
            pictures = [self.pictures[i].target for i in range(first, min(first + 16, few))]
            targets = torch.stack([tokenizer_pixels(p, config.image_size) for p in pictures]).to(self.machine.device)
            z.append(self.model.quant_conv(self.model.encoder(targets)).permute(0, 2, 3, 1).flatten(0, 2))
        weight.copy_(spread_codes(torch.cat(z), len(weight), torch.Generator(weight.device).manual_seed(step)))
        if self.machine.world_size > 1:
            dist.broadcast(weight, 0)
        return dead


class ContrastiveHead(nn.Module):
    """CLIP's loss (arXiv 2103.00020): each image should be nearest to its own caption, and each caption to its image, among
    those of the micro-batch on all processes."""

    def __init__(self, config, machine, width=128):
        super().__init__()
        self.machine = machine
        self.image = nn.Linear(config.vision.width, width, bias=False)
        self.text = nn.Linear(config.text.width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image, text):
        """Pooled features (B, Dv) and (B, Dt) -> scalar loss."""
        image, text = (self.machine.gather(F.normalize(x.float(), dim=-1)) for x in (self.image(image), self.text(text)))
        with torch.autocast(image.device.type, enabled=False):  # bfloat16 would round scores of up to 100 to halves
            logits = self.log_scale.clamp(max=math.log(100)).exp() * image @ text.T
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def masked_token_loss(model, batch, patches):
    """Masked language modelling (as BERT, arXiv 1810.04805) with a picture: predict the masked tokens of `<image>{caption}`.

    About half of the caption's tokens, </s> too, are replaced by <unk>; the loss is their cross entropy, read off the word
    embedding table and scaled as in T5. It stands in for T5's pretraining and LLaVA's connector training. patches (B, n_patch,
    Dv): the pictures' vision features. Returns a scalar, the mean over samples of their own means.
    """
    encoder, n, (B, L), device = model.encoder, model.config.image_tokens, batch.text_ids.shape, batch.text_ids.device
    ids = F.pad(batch.text_ids.masked_fill(batch.masked, TextTokenizer.UNKNOWN), (n, 0))  # (B, n + L)
    slots = (torch.arange(B, device=device)[:, None] * (n + L) + torch.arange(n, device=device)).flatten()
    nameless = torch.full((B, 1), TextTokenizer.EOS, device=device)
    tokens = encoder.connector(patches, encoder.text.embedding(nameless), nameless > 0)   # (B, n, Dt)
    embeddings = mentor.splice(encoder.text.embedding(ids), slots, tokens)               # (B, n + L, Dt)
    states = encoder.text(embeddings, mentor.length_mask(batch.lengths + n, n + L))[:, n:] * model.config.text.width**-0.5
    logits = F.linear(states, encoder.text.embedding.weight).float()                     # (B, L, vocabulary)
    losses = F.cross_entropy(logits.transpose(1, 2), batch.text_ids, reduction="none") * batch.masked
    return (losses.sum(1) / batch.masked.sum(1).clamp(min=1)).mean()                     # each sample counts alike


def save_zeros(dtype, shape, path):
    """Write an .npy file of zeros that takes all its space: with a sparse one a full disk would end the process without a word."""
    with open(path, "wb") as file:
        np.save(file, np.zeros(shape, dtype))


class CodeCache:
    """The codes of a manifest's targets on disk: each target is encoded when first needed and read from then on. There is one file
    per tokenizer and manifest, with their hashes in its name."""

    def __init__(self, run, machine, manifest):
        tokenizer_hash = sample.weights_hash(Path(run.out) / "tokenizer")
        path = Path(run.out) / "codes" / f"{tokenizer_hash}-{manifest.digest}{manifest.times}.npy"
        shape, dtype = (len(manifest), run.vqgan.grid_size**2), np.min_scalar_type(run.vqgan.codebook_size)
        if machine.main and not path.is_file():
            path.parent.mkdir(exist_ok=True)
            mentor.write_atomically(path, partial(save_zeros, dtype, shape))
        machine.barrier()
        try:
            self.rows = np.lib.format.open_memmap(path, "r+")                            # code + 1; 0 where there is none yet
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}): delete it, and its codes are made again") from None

    def encode(self, vqgan, batch):
        """The codes (B, N) of a batch's targets."""
        rows = self.rows[batch.lines]
        new = (rows == 0).any(1)
        if new.any():
            rows[new] = vqgan.encode(batch.targets[torch.from_numpy(new)]).cpu().numpy() + 1
            self.rows[np.array(batch.lines)[new]] = rows[new]
        codes = torch.from_numpy(rows.astype(np.int64) - 1)
        return (codes.pin_memory() if batch.targets.is_cuda else codes).to(batch.targets.device, non_blocking=True)


class MentorStage(Stage):
    """Pretraining, alignment and instruction tuning: the next-code loss (equation 3) on the stage's mix of tasks."""

    def __init__(self, name, run, machine, model, vqgan):
        super().__init__()
        self.machine, self.model = machine, model
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.startswith(TRAINED[run.recipe][name]))
        self.contrastive = ContrastiveHead(model.config, machine) if name == "pretrain" else None
        if run.compile == "true" or run.compile == "auto" and machine.device.type == "cuda":
            compile_blocks(model.to(machine.device), machine)
        if run.checkpoint:
            recompute_activations(model)
        self.vqgan = (vqgan.requires_grad_(False),)  # in a tuple: not a submodule, never trained or saved
        self.cache = None                            # a CodeCache if codes are kept

    @torch.no_grad()
    def encode_targets(self, batch):
        """The codes (B, N) of a batch's targets, from the cache if there is one; always in float32."""
        with torch.autocast(batch.targets.device.type, enabled=False):
            return self.cache.encode(self.vqgan[0], batch) if self.cache else self.vqgan[0].encode(batch.targets)

    def code_losses(self, batch, codes):
        """Each sample's mean next-code loss (B,), given codes (B, N), and the text encoder's hidden states (B, P, Dt)."""
        states = self.model.encoder(batch)
        prefix = self.model.projector(states, batch.lengths, batch.drop)
        hidden = self.model.next_code_hidden(prefix, batch.lengths, codes)               # (B, N, D)
        return next_code_losses(self.model.decoder.output, hidden, codes), states

    def pretraining_losses(self, batch, states):
        """The two losses that pretraining adds, {name: loss}, given the text encoder's hidden states (B, P, Dt)."""
        pixels = as_vision_pixels(batch.targets, self.model.config.vision.image_size)
        features = self.model.encoder.vision.before_last(pixels)                         # (B, 1 + n_patch, Dv)
        real = mentor.length_mask(batch.lengths, states.shape[1])[..., None]
        text = (states * real).sum(1) / batch.lengths[:, None]                           # (B, Dt), mean over real positions
        return {"contrastive": self.contrastive(self.model.encoder.vision.pool(features), text),
                "fill_in": masked_token_loss(self.model, batch, features[:, 1:])}

    def validation_loss(self, batch):
        """Mean next-code loss of a batch's samples. (The contrastive loss depends on what else is in the batch.)"""
        return self.code_losses(batch, self.encode_targets(batch))[0].mean()

    def forward(self, batch, step):
        """(loss, logs) of a batch. Logs the loss of each task, and in pretraining two more."""
        losses, states = self.code_losses(batch, self.encode_targets(batch))
        loss, logs = losses.mean(), {"tokens": batch.lengths.float().mean(), "images": len(batch.pixels) / len(batch)}
        for task in set(batch.tasks):  # one by one: a mask would wait for the GPU
            logs[task] = torch.stack([loss for loss, t in zip(losses.detach(), batch.tasks) if t == task]).mean()
        if self.contrastive:
            more = self.pretraining_losses(batch, states)
            loss = loss + sum(more.values())
            logs.update({name: value.detach() for name, value in more.items()})
        return loss, logs


LOSS_VALUES = 2**26  # most logits that the loss computes at once


def next_code_losses(head, hidden, codes):
    """Mean cross entropy of each sample's codes, (B,), from hidden states (B, N, D) and codes (B, N). Large logits are never all
    in memory: they are computed a few positions at a time, and again in the backward pass."""
    def losses(hidden, codes):
        return F.cross_entropy(head(hidden).float().transpose(1, 2), codes, reduction="none")

    positions = max(1, LOSS_VALUES // (len(codes) * head.out_features))
    if positions >= codes.shape[1]:
        return losses(hidden, codes).mean(1)
    pieces = zip(hidden.split(positions, 1), codes.split(positions, 1))
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces], 1).mean(1)


def recompute_activations(model):
    """Make every block of decoder and text encoder keep only its input and run again in the backward pass. Without gradients, and
    so with a KV cache, nothing changes. Names and weights of the model stay the same."""
    for block in (*model.decoder.blocks, *model.encoder.text.blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model, machine):
    """torch.compile one program for all blocks of the text encoder and one for the decoder's, for any lengths. Returns whether
    that worked. If not (there may be no compiler), prints why and leaves the blocks unchanged."""
    text, decoder, started = model.encoder.text, model.decoder, time.perf_counter()
    try:
        if machine.world_size > 1:
            torch._dynamo.config.optimize_ddp = False  # it would split programs at the ends of DDP's buckets; a block is small enough
        for part in (text, decoder):
            program = torch.compile(type(part.blocks[0]).forward, dynamic=True)
            for block in part.blocks:
                block.forward = partial(program, block)
        model.train()  # as in a step: a program is for one mode, and for inputs with or without gradients
        ids = torch.zeros(7, 11, dtype=torch.long, device=machine.device)                # sizes that nothing else has
        x = torch.randn(7, 11, decoder.config.width, device=machine.device, requires_grad=True)
        with machine.autocast():
            states = text(text.embedding(ids), ids == 0).sum() + decoder(x, ids).sum()
        states.backward()                                                                # now, not in the middle of a step
        machine.say(f"blocks compiled in {time.perf_counter() - started:.0f} s")
    except (RuntimeError, OSError, ImportError, TypeError) as error:                     # no compiler, no Triton, no torch.compile
        for block in (*text.blocks, *decoder.blocks):
            vars(block).pop("forward", None)
        cause = getattr(error, "inner_exception", error)  # torch._dynamo's own first line names only the backend
        machine.say(f"blocks not compiled: torch.compile fails here ({mentor.first_line(cause)[:150]})")
    model.zero_grad()
    return "forward" in vars(decoder.blocks[0])


def as_vision_pixels(targets, size):
    """Targets (B, 3, S, S) in [-1, 1] as the vision encoder's input: (B, 3, size, size), CLIP-normalised."""
    if targets.shape[-1] != size:
        targets = F.interpolate(targets, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    channels = zip(((targets + 1) / 2).unbind(1), CLIP_MEAN, CLIP_STD)
    return torch.stack([(x - float(mean)) / float(std) for x, mean, std in channels], 1)


# --- Where the samples come from: a built-in world, or your own pictures -----------------------------------------


def open_source(run, machine):
    """Open the World of --world or the Manifest of --data, and the text tokenizer. Raises ValueError if that has more words than
    the model, or if the data does not fit the run."""
    if run.data:
        backgrounds = open_manifest("backgrounds", run, machine) if run.backgrounds else None
        source = open_manifest("data", run, machine, backgrounds)
    else:
        source = open_world(run.world, run.vqgan.image_size, run.emoji_font)
        machine.say(f"world: {run.world}, built in; --data=FOLDER_OR_MANIFEST trains on your pictures")
    spiece = Path(run.out) / "spiece.model"
    text_tokenizer = TextTokenizer.from_file(spiece) if spiece.is_file() else source.text_tokenizer()
    check_vocabulary(text_tokenizer, run)
    if run.data:
        check_data(run, source, text_tokenizer, machine)
    return source, text_tokenizer


def open_manifest(name, run, machine, backgrounds=None):
    """Open the Manifest of --data or --backgrounds. A folder's is written as run.out's NAME.jsonl once the run starts."""
    path, root, content = getattr(run, name), run.data_root if name == "data" else "", None
    if Path(path).is_dir():
        if Path(run.out).resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(f"--{name}={path}: --out={run.out} lies in it, so the pictures that a run writes would become data; choose an "
                             "--out elsewhere")
        root, content, path = path, manifest_of_folder(path), Path(run.out) / f"{name}.jsonl"
    return Manifest(path, root, backgrounds, run.skip_bad, run.workers, not machine.main, content)


def check_data(run, source, text_tokenizer, machine):
    """Print which lines of a manifest are left out, and what the others are. Raises ValueError naming a prompt that is too long,
    or the tasks of a stage for which there are no lines."""
    if run.stage != "tokenizer":
        source.check_prompts(make_collate(run, text_tokenizer))
    manifests = dict.fromkeys((source.backgrounds, source))
    for manifest in manifests if run.skip_bad else ():
        manifest.check_files(run.vqgan.image_size, run.workers)
    for manifest in manifests:
        for message in manifest.bad:
            machine.say(f"left out: {message}")
        if manifest.bad:
            machine.say(f"left out {len(manifest.bad)} of {len(manifest.bad) + manifest.usable.sum()} lines of {manifest.path}")
    counts = ", ".join(f"{task} {len(lines)}" for task, lines in source.lines().items())
    held = f"{source.held.sum()} more are held out" if source.held.any() else "too few pictures to hold any out"
    machine.say(f"data: {counts} lines of {run.data}; {held} for validation")
    check_tasks(run, source)


def check_tasks(run, source):
    """Raise ValueError naming a stage's tasks that the data has no lines for, one that would never be drawn, or recovery's line
    that has no background."""
    there = source.lines()
    for stage in (s for s in STAGES[1:] if run.bench or run.stage in ("all", s)):
        mix = getattr(run, stage).mix
        tasks = [task for task, share in parse_mix(stage, mix).items() if share]
        lacking = [task for task in tasks if task not in there]
        if lacking:
            raise ValueError(f"--{stage}.mix={mix}: {run.data} has nothing for {', '.join(lacking)}; it has {', '.join(there)}, "
                             f"so give for example --{stage}.mix={','.join(f'{task}:1' for task in there)}")
        edges = make_dataset(stage, run, source).edges
        if never := [task for task, first, end in zip(tasks, edges, edges[1:]) if first == end]:
            raise ValueError(f"--{stage}.mix={mix}: {never[0]} has too small a share of it to be drawn even once in "
                             f"{ManifestDataset.BLOCK} samples: give it more, or leave it out")
        if "recovery" in tasks:
            source.check_backgrounds()


def check_world_prompts(stage, run, text_tokenizer):
    """Raise ValueError naming a task of a stage's mix whose prompts are longer than the context."""
    world = open_world(run.world, 32, run.emoji_font)  # the same prompts, with pictures that are drawn sooner
    for task in (task for task, share in parse_mix(stage, getattr(run, stage).mix).items() if share):
        dataset = WorldDataset(world, {task: 1.0}, "fits")
        longest = max(len(text_tokenizer.encode(dataset[i].prompt, run.model.image_tokens)) for i in range(16))
        if longest > run.model.context:
            raise ValueError(f"--{stage}.mix: prompts of {task} take {longest} tokens, but --model.context={run.model.context}: leave "
                             "that task out, raise --model.context, or take --model.connector.kind=query")


def check_vocabulary(text_tokenizer, run):
    """Raise ValueError if the model has fewer word embeddings than the text tokenizer has ids; more are fine, as in T5."""
    rows, words = run.model.text.vocab_size, text_tokenizer.vocab_size
    if words > rows:
        raise ValueError(f"--model.text.vocab_size={rows}: the text tokenizer has {words} ids; give at least as many")


def check_text_tokenizer(text_tokenizer, run, source, machine):
    """Raise ValueError naming the first word that the text tokenizer does not know, for a world, or for data if more than half
    of its lines have such words; fewer, due to rare characters, are only counted and printed."""
    lines = [" ".join((e.text, *e.labels)) for e in source.some(10_000)] if run.data else source.sentences()
    unknown = [word for word in map(text_tokenizer.unknown_word, lines) if word]
    if len(unknown) > len(lines) * (0.5 if run.data else 0):
        raise ValueError(f"{run.out}/spiece.model: this text model does not know {unknown[0]!r} and other words of "
                         f"{run.data or 'the world ' + run.world}, so it was made for something else; choose another --out, or put "
                         "the right spiece.model there")
    if unknown:
        machine.say(f"data: {len(unknown) / len(lines):.2%} of the lines have words that the text model does not know and reads as "
                    f"<unk>; the first is {unknown[0]!r}")


def make_collate(run, text_tokenizer):
    """The Collate for the run's model."""
    return Collate(text_tokenizer, run.model.vision.image_size, run.model.image_tokens, run.model.context, run.vqgan.image_size)


def make_dataset(name, run, source, held_out=False):
    """A stage's training samples; or with held_out its validation samples, the same for every seed."""
    seed, prefix_drop = ("validation", 0.0) if held_out else (f"{run.seed} {name}", run.prefix_drop)
    alone = name == "tokenizer"  # which needs no prompts, and takes all lines of a manifest alike
    mix = TOKENIZER_MIX if alone else parse_mix(name, getattr(run, name).mix)
    if not isinstance(source, Manifest):
        return WorldDataset(source, mix, seed, held_out, prefix_drop)
    return ManifestDataset(source, None if alone else mix, seed, run.vqgan.image_size, prefix_drop, alone, held_out)


# --- The optimizer -----------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, so that all directions of a matrix learn at one rate (Keller Jordan, 2024). The same
    update as torch.optim.Muon, but matrices of one shape go through the Newton-Schulz iteration together, and in float32 on a CPU,
    where torch's bfloat16 is 50 times slower."""

    MOMENTUM, ITERATIONS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def orthogonalize(self, x):
        """Push the singular values of each matrix in x (K, rows, columns) towards 1."""
        a, b, c = self.COEFFICIENTS
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(self.ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self):
        """One update of every matrix; all must have a gradient."""
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.MOMENTUM)
                shapes.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, self.MOMENTUM)))
            for shape, pairs in shapes.items():
                updates = torch.stack([update for _, update in pairs])
                updates = self.orthogonalize(updates.bfloat16() if updates.is_cuda else updates).to(updates.dtype)
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


TABLES = re.compile("embedding|relative_bias|unconditional|queries|decoder.output|contrastive")  # matrices whose rows are independent


def make_optimizers(stage, config, run):
    """AdamW (betas 0.9, 0.95, decay on matrices) for everything; or with muon_lr Muon for hidden layers' matrices, AdamW for the rest."""
    muon_lr, named = getattr(config, "muon_lr", 0.0), stage.trained()
    matrices = {n: p for n, p in named if muon_lr and p.ndim == 2 and not TABLES.search(n)}
    rest = [p for n, p in named if n not in matrices]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": run.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices.values(), muon_lr, weight_decay=run.weight_decay))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def schedule(step, config, run):
    """Factor on the peak learning rate: linear warm-up, then a cosine down to final_lr."""
    warmup = max(1, round(run.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


# --- The loop, after its log (Log) and the signals that stop it (StopSignals) ------------------------------------


def read_log(file):
    """The lines of a log.jsonl as dictionaries, without one that a kill has cut short."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Log:
    """Progress bar and log.jsonl, with means since the last line. Finds the first step whose loss is not finite. Values stay on
    the device until a line is written; on a CPU, where reading them costs nothing, every step is checked."""

    def __init__(self, folder, name, run, start, machine):
        self.folder, self.name, self.run, self.config, self.machine = folder, name, run, getattr(run, name), machine
        self.every, self.flops, self.lost = max(1, self.config.steps // 200), 0, False
        self.values, self.since, self.started = {}, start, time.perf_counter()
        self.recent = []  # of each step since the last check: (step, loss and gradient norm, learning rate, tasks)
        if machine.main:
            done = [json.dumps(line) + "\n" for line in read_log(folder / "log.jsonl") if line["step"] <= start] if start else []
            mentor.write_atomically(folder / "log.jsonl", lambda file: file.write_text("".join(done)))
        self.bar = tqdm(total=self.config.steps, initial=start, desc=name.ljust(9), dynamic_ncols=True, smoothing=0.05,
                        disable=not machine.main)

    def add(self, values):
        """Record values, each a number or a scalar tensor."""
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)

    def step(self, step, loss, grad_norm, lr, tasks, due=False):
        """Count a step; write a line at intervals and if `due`. Raises ValueError when the loss or gradient is not finite."""
        self.recent.append((step, torch.stack([loss.float(), grad_norm.float()]), lr, tasks))
        self.bar.update()
        due = due or (step + 1) % self.every == 0
        if due or self.machine.device.type == "cpu":
            self.check()
        if due:
            self.write(step, float(grad_norm), lr)

    def check(self):
        """Raise ValueError naming the first step since the last check whose loss or gradient is not finite."""
        numbers = torch.stack([numbers for _, numbers, _, _ in self.recent]).tolist() if self.recent else []
        for (step, _, lr, tasks), (loss, grad_norm) in zip(self.recent, numbers):
            if not math.isfinite(loss + grad_norm):
                raise ValueError(f"{self.name}: loss {loss:g}, gradient norm {grad_norm:g} at step {step + 1}, learning rate {lr:.2e}, "
                                 f"tasks {', '.join(sorted(tasks))}: lower --{self.name}.lr and start the stage again (delete "
                                 f"{self.folder}); {last_checkpoint(self.folder)}")
        self.recent = []

    def write(self, step, grad_norm, lr):
        """Write a line with the means since the last, over all processes. On a full disk it is lost; that is printed once."""
        means = {k: float(torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in vs]).mean()) for k, vs in self.values.items()}
        means, now = self.machine.mean(means), time.perf_counter()
        rate = (step + 1 - self.since) * self.config.global_batch / (now - self.started)
        self.values, self.since, self.started = {}, step + 1, now
        if not self.machine.main:
            return
        line = {"stage": self.name, "step": step + 1, **means, "grad_norm": grad_norm, "lr": lr, "samples_per_s": rate}
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.0f} samples/s{self.speed(means, rate)}")
        path = self.folder / "log.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open(path, "a") as file:
                file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)  # else the next line would go on where this one was cut
            if not self.lost:
                self.machine.say(f"{self.name}: log.jsonl could not be written ({error.strerror}): going on; make room on the disk")
            self.lost = True

    def speed(self, means, rate):
        """Codes/s as text; on a GPU also the share of its peak, if PEAK_TFLOPS lists it, and the most memory used."""
        device, words = self.machine.device, f", {rate * self.run.vqgan.grid_size**2:.0f} codes/s"
        if device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device))
            if peak and self.machine.dtype == torch.bfloat16:
                prompts = [(means.get("tokens", 1), means.get("images", 0))] * 64
                self.flops = self.flops or Rehearsal(self.name, self.run, self.machine.dtype).flops(prompts)
                words += f", {self.flops * rate / self.machine.world_size / peak / 1e12:.0%} of the peak"
            words += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        return words


class StopSignals:
    """Context in which Ctrl-C and SIGTERM only set `received`, for the loop to see after the step. A second Ctrl-C stops at once,
    a second SIGTERM does not: a cluster may send one to every training process, and torchrun another."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        """The signal handler."""
        self.received = number
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_group(worker):
    """For data processes: Ctrl-C goes to the terminal's whole process group, but the current step still needs their samples."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def legal_micro_batches(config, share):
    """Divisors of a process's share of a step; even ones where the consistency loss pairs neighbours (tokenizer.collages)."""
    least = 2 if getattr(config, "consistency", 0) else 1
    return [micro for micro in range(least, share + 1, least) if share % micro == 0]


def micro_batches(config, run, machine):
    """(micro-batch, micro-batches per step) of one process. Raises ValueError with the arithmetic if it does not divide.

    The split changes the result by rounding only, except for dropout and two losses that see one micro-batch: the contrastive
    loss, which has so many fewer pairs to compare, and the discriminator's, through its adaptive weight.
    """
    share, rest = divmod(config.global_batch, machine.world_size)
    micro = run.micro_batch or max(1, share)
    if rest or share % micro:
        times = config.global_batch / machine.world_size / micro
        raise ValueError(f"global_batch={config.global_batch} is not processes x micro_batch x a whole number: "
                         f"{machine.world_size} x {micro} x {times:.2f}; change micro_batch or global_batch")
    if micro not in legal_micro_batches(config, share):
        raise ValueError(f"micro_batch={micro}: --tokenizer.consistency pairs the pictures of a micro-batch, and one would be left over; "
                         "make --micro_batch even (it must divide global_batch / processes), or set --tokenizer.consistency=0")
    return micro, share // micro


def index_batches(start, steps, global_batch, micro, accumulate, rank):
    """Yield each micro-batch's sample indices from step `start` on; all ranks together take each index once, in order."""
    for step in range(start, steps):
        for m in range(accumulate):
            first = step * global_batch + (rank * accumulate + m) * micro
            yield list(range(first, first + micro))


def build_stage(name, run, machine, source):
    """Build a stage's module with the weights it starts from."""
    torch.manual_seed(run.seed)
    if name == "tokenizer":
        return TokenizerStage(run, machine, make_dataset(name, run, source)).to(machine.device)
    vqgan = VQGAN.from_pretrained(Path(run.out) / "tokenizer").to(machine.device)
    if name == "pretrain":
        model = Mentor(run.model).to(machine.device)
        mentor.start_from_codebook(model.decoder, vqgan.quantize.codebook())
    else:
        model = Mentor.from_pretrained(Path(run.out) / STARTS_FROM[name][-1], run.model)
    stage = MentorStage(name, run, machine, model, vqgan).to(machine.device)
    stage.cache = CodeCache(run, machine, source) if run.cache_codes else None
    return stage


def train_stage(name, run, machine, source, text_tokenizer):
    """Train one stage, from its last checkpoint or else from the stage before, and save its weights."""
    folder, config = Path(run.out) / name, getattr(run, name)
    record = stage_record(name, run, source, text_tokenizer)
    check_record(folder, record)
    if (folder / "model.safetensors").is_file():
        machine.say(f"{name}: done already, {folder} holds its weights")
        remove_checkpoints(folder, machine)  # if a kill came before
        if machine.main and name != "tokenizer":
            set_sampling(folder, run.model.sampling, machine)
        return
    stage = build_stage(name, run, machine, source)
    optimizers = make_optimizers(stage, config, run)
    start = load_state(folder, stage, [*optimizers, *stage.own_optimizers], machine)
    if machine.main:
        folder.mkdir(parents=True, exist_ok=True)
        mentor.write_json(folder / "stage.json", record)
        if not start:
            (folder / "best.safetensors").unlink(missing_ok=True)  # of a run that left no checkpoint
    describe_stage(name, stage, config, machine, *micro_batches(config, run, machine), start)
    step, stop = train_steps(name, run, machine, source, text_tokenizer, stage, optimizers, start)
    if step == config.steps:
        save_weights(folder, stage, machine)
    if stop:
        machine.say(f"{name}: stopped by {signal.Signals(stop).name} after step {step}; the same command goes on from there")
        raise SystemExit(128 + stop)


def set_sampling(folder, sampling, machine):
    """Make the run's default sampling, which its weights do not hang on, that of a finished stage."""
    config = mentor.read_json(folder / "config.json")
    if config["sampling"] != asdict(sampling):
        mentor.write_json(folder / "config.json", {**config, "sampling": asdict(sampling)})
        machine.say(f"{folder.name}: draws from now on with {', '.join(f'{k}={v}' for k, v in asdict(sampling).items())}")


def train_steps(name, run, machine, source, text_tokenizer, stage, optimizers, start):
    """Train a stage from step `start` on, with log, validation and checkpoints. Returns the number of steps done and the signal
    that stopped it, 0 if none did."""
    folder, config = Path(run.out) / name, getattr(run, name)
    micro, accumulate = micro_batches(config, run, machine)
    collate, validation = make_collate(run, text_tokenizer), make_dataset(name, run, source, held_out=True)
    indices = index_batches(start, config.steps, config.global_batch, micro, accumulate, machine.rank)
    batches = iter(torch.utils.data.DataLoader(
        make_dataset(name, run, source), batch_sampler=indices, collate_fn=collate, num_workers=run.workers,
        worker_init_fn=leave_group, pin_memory=machine.device.type == "cuda"))
    wrapped = machine.wrap(stage.train())
    log = Log(folder, name, run, start, machine)
    with StopSignals() as signals, closing(log.bar), explain_out_of_memory(name, run, machine):
        for step in range(start, config.steps):
            torch.manual_seed(run.seed * 1_000_003 + step * machine.world_size + machine.rank)  # dropout is a function of the step
            last = step + 1 == config.steps
            due = last or (step + 1) % run.save_every == 0                               # validation and a checkpoint
            lr_factor = schedule(step, config, run)
            loss, tasks = add_gradients(step, wrapped, batches, accumulate, log)
            grad_norm = update_weights(stage, optimizers, lr_factor, run.grad_clip)
            log.add(stage.after_step(step))

            paused = time.perf_counter()                                                 # scoring does not count in samples/s
            scored = run.score_every and name in STAGES[2:] and (step + 1) % run.score_every == 0
            if scored and machine.main:
                log.add(score_now(stage, run, source, text_tokenizer, machine))
            validation_loss = held_out_loss(stage, validation, collate, micro, machine) if due else None
            if validation_loss is not None:
                log.add({"validation": validation_loss})
            log.started += time.perf_counter() - paused
            log.step(step, loss, grad_norm, config.lr * lr_factor, tasks, due or scored)

            if validation_loss is not None and machine.main:
                # before the checkpoint: if the run is killed in between, this step is done again
                keep_best(folder, stage, step + 1, validation_loss, last, machine)
            stop = machine.max(signals.received)
            if not last and (stop or due):
                log.check()
                save_state(folder, stage, [*optimizers, *stage.own_optimizers], step + 1, run.keep, machine)
            if stop:
                break
    return step + 1, stop


def add_gradients(step, wrapped, batches, accumulate, log):
    """Forward and backward through the step's micro-batches. Returns their mean loss, on the device, and their tasks."""
    losses, tasks, machine = [], set(), log.machine
    for m in range(accumulate):
        batch = next(batches).to(machine.device)
        tasks.update(batch.tasks)
        unfinished = machine.world_size > 1 and m < accumulate - 1  # gradients are exchanged once per step
        with wrapped.no_sync() if unfinished else nullcontext():
            with machine.autocast():
                loss, logs = wrapped(batch, step)
            (loss / accumulate).backward()
        losses.append(loss.detach())
        log.add({"loss": losses[-1], **logs})
    return torch.stack(losses).mean(), tasks


def update_weights(stage, optimizers, lr_factor, grad_clip):
    """Clip the gradients, take a step at lr_factor of the peak learning rates, clear the gradients. Returns their norm."""
    grad_norm = nn.utils.clip_grad_norm_([p for _, p in stage.trained()], grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        optimizer.step()
        optimizer.zero_grad()
    return grad_norm


@contextmanager
def explain_out_of_memory(name, run, machine):
    """When memory runs out, raise ValueError naming the largest micro-batch that divides the share and is at most half of this one."""
    micro, accumulate = micro_batches(getattr(run, name), run, machine)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        what = f"{name}: out of memory on {machine.device} with micro_batch={micro} ({mentor.first_line(error)[:120]})"
        share = micro * accumulate
        less = max((m for m in legal_micro_batches(getattr(run, name), share) if m <= micro // 2), default=0)
        if less:
            raise ValueError(f"{what}; set --micro_batch={less}: global_batch stays {share * machine.world_size}, a step takes "
                             f"{share // less} micro-batches instead of {accumulate}") from None
        recompute = "set --checkpoint=true, or " * (name != "tokenizer" and not run.checkpoint)
        raise ValueError(f"{what}, the smallest there is: {recompute}choose a smaller preset or model, or a device with more "
                         "memory") from None


VALIDATION = 128  # most samples


@torch.no_grad()
def held_out_loss(stage, dataset, collate, micro, machine):
    """Mean loss of the first VALIDATION samples of a held-out dataset, None if it is empty; the processes share the samples.
    Nothing here is random or changes the stage."""
    count = min(VALIDATION, dataset.count)
    if not count:
        return None
    stage.eval()
    total, mine = torch.zeros((), device=machine.device), range(machine.rank, count, machine.world_size)
    for first in range(0, len(mine), micro):
        batch = collate([dataset[i] for i in mine[first : first + micro]]).to(machine.device)
        with machine.autocast():
            total += stage.validation_loss(batch) * len(batch)
    stage.train()
    return float(machine.average(total)) * machine.world_size / count


def score_now(stage, run, world, text_tokenizer, machine):
    """CP, PF and CP*PF of a stage in training, on FEWER_PROMPTS held-out prompts."""
    model, vqgan = Mentor(run.model), VQGAN.from_pretrained(Path(run.out) / "tokenizer")
    model.load_state_dict(stage.model.state_dict())  # a copy: drawing may convert or pack the weights
    pipeline = sample.Pipeline(model, vqgan, text_tokenizer, asdict(run), machine.device)
    prompts = sample.held_out_samples(world, "subject_driven", sample.FEWER_PROMPTS)
    scores = sample.judge_pictures(sample.JUDGES[world.name](world), pipeline.draw(prompts)[0], prompts)
    return {key: scores[key] for key in sample.MEASURES}


def describe_stage(name, stage, config, machine, micro, accumulate, start):
    """Print what will be trained, on how much, and what the first loss should be."""
    parts, counts = {"vqgan": stage.model}, []
    if name != "tokenizer":
        parts = {**dict(stage.model.encoder.named_children()), "projector": stage.model.projector, "decoder": stage.model.decoder,
                 "vqgan": stage.vqgan[0]}
    for part, module in parts.items():
        total = sum(p.numel() for p in module.parameters())
        learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
        state = " frozen" if not learning else "" if learning == total else f" ({learning / 1e6:.2f}M trained)"
        counts.append(f"{part} {total / 1e6:.2f}M{state}")
    machine.say(f"{name}: {', '.join(counts)}")
    machine.say(f"{name}: {config.steps} steps of {config.global_batch} = {machine.world_size} processes x {accumulate} micro-batches "
                f"x {micro}" + f", from step {start}" * (start > 0))
    if name == "pretrain":
        codes = stage.model.config.decoder.codebook_size
        machine.say(f"{name}: guessing codes costs ln({codes}) = {math.log(codes):.2f}; contrastive and fill-in losses are added to that")


# --- Checkpoints, in a folder that has its stage's name ----------------------------------------------------------


def checkpoints(folder):
    """The stage's checkpoints, state-STEP.pt, oldest first."""
    return sorted((f for f in folder.glob("state-*.pt") if f.stem[6:].isdecimal()), key=lambda f: int(f.stem[6:]))


def last_checkpoint(folder):
    """Where the same command would go on, in words."""
    found = checkpoints(folder)
    return f"the last good checkpoint is {found[-1]}" if found else f"{folder} holds no checkpoint yet"


def check_finite(state, step, folder):
    """Raise ValueError naming the first tensor that is not finite in nested dictionaries and lists: such a state is never saved."""
    for path, value in tree_flatten_with_path(state)[0]:
        if torch.is_tensor(value) and not value.isfinite().all():
            tensor = re.sub(r"\W+", ".", keystr(path)).strip(".")
            raise ValueError(f"{folder.name}: after step {step} {tensor} is not finite, so nothing was saved: "
                             f"lower --{folder.name}.lr; {last_checkpoint(folder)}")


def write_if_room(path, write, machine):
    """write_atomically, but print a failure (a full disk) instead of raising it. Returns whether the file was written."""
    try:
        mentor.write_atomically(path, write)
    except OSError as error:
        machine.say(f"{path.parent.name}: {error}: going on without it, {last_checkpoint(path.parent)}; make room on the disk")
        return False
    return True


def save_pickle(values, path):
    """torch.save, which given a path hides the system's error and keeps the disk's space taken."""
    with open(path, "wb") as file:
        torch.save(values, file)


def save_state(folder, stage, optimizers, step, keep, machine):
    """Write state-STEP.pt, with everything to go on from `step`, and remove all checkpoints but the last `keep`."""
    if not machine.main:
        return
    state = {"step": step, "processes": machine.world_size, "stage": stage.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    check_finite(state, step, folder)
    if write_if_room(folder / f"state-{step}.pt", partial(save_pickle, state), machine):
        for file in checkpoints(folder)[:-keep]:
            file.unlink()


def newest_state(folder, machine):
    """Load the newest intact checkpoint, {"step": 0} if there is none. Damaged ones are renamed, which is printed."""
    for file in reversed(checkpoints(folder)):
        try:
            state = mentor.read_pickle(file)
            if not isinstance(state, dict) or not {"step", "processes", "stage", "optimizers"} <= state.keys():
                raise ValueError(f"{file}: not a checkpoint of a stage")
            return state
        except ValueError as error:
            torn = file.replace(file.with_suffix(".torn"))
            machine.say(f"{folder.name}: {error}: renamed to {torn.name}, going on from the one before")
    return {"step": 0}


def load_state(folder, stage, optimizers, machine):
    """Restore what save_state wrote last; returns the step to go on from, 0 without a checkpoint."""
    state = newest_state(folder, machine) if machine.main else {"step": 0}
    step = machine.max(state["step"])  # the first process chooses
    if not step:
        return 0
    if not machine.main:
        state = mentor.read_pickle(folder / f"state-{step}.pt")
    if state["processes"] != machine.world_size:
        machine.say(f"{folder.name}: the checkpoint is from {state['processes']} processes, going on with {machine.world_size}: "
                    "the same samples in the same order, but other rounding and dropout")
    stage.load_state_dict(state["stage"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return step


def best_so_far(folder, step):
    """(validation loss, step) of best.safetensors, (infinity, 0) if there is none from `step` or before."""
    try:
        with safe_open(folder / "best.safetensors", "pt") as file:
            best = json.loads(file.metadata()["validation"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return math.inf, 0
    return tuple(best) if best[1] <= step else (math.inf, 0)


def keep_best(folder, stage, step, loss, last, machine):
    """Save the weights as best.safetensors if their validation loss is the lowest so far; if the last are the best, no file stays.
    The stage's result is its last weights all the same: by then the learning rate has come down, and the scores are on the same
    held-out subjects, so choosing by these would flatter them."""
    file, (best, best_step) = folder / "best.safetensors", best_so_far(folder, step - 1)
    message = f"{folder.name}: validation loss {loss:.4f} after step {step}, the best so far"
    if not loss < best:
        machine.say(f"{message}: {best:.4f} after step {best_step}" + f"; those weights are in {file}" * last)
        return
    machine.say(message)
    if last:
        file.unlink(missing_ok=True)
    else:
        weights = stage.model.state_dict()
        check_finite(weights, step, folder)
        write_if_room(file, lambda path: save_file(weights, path, {"validation": json.dumps([loss, step])}), machine)


def save_weights(folder, stage, machine):
    """Save the stage's weights and remove its checkpoints. Raises ValueError if that fails; then the checkpoints stay."""
    if machine.main:
        check_finite(stage.model.state_dict(), "the last", folder)
        try:
            stage.model.save_pretrained(folder)
        except OSError as error:
            raise ValueError(f"{folder.name}: {error}: make room on the disk, then run the same command again; "
                             f"{last_checkpoint(folder)}") from None
    remove_checkpoints(folder, machine)
    machine.barrier()


def remove_checkpoints(folder, machine):
    """Remove what a finished stage needs no more."""
    for file in folder.glob("state-*") if machine.main else ():
        file.unlink()


# --- Command line ------------------------------------------------------------------------------------------------


@cache
def comments(config_class):
    """{field: the comment after it} of a dataclass."""
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", getsource(config_class), re.M))


def flatten(config, prefix=""):
    """{dotted key: (value, meaning)} of a nested config."""
    keys = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            keys.update(flatten(value, f"{prefix}{f.name}."))
        else:
            keys[prefix + f.name] = (value, comments(type(config)).get(f.name, ""))
    return keys


def read_value(key, text, default):
    """Parse a key's value, by the type of its default."""
    readers = {tuple: lambda text: tuple(int(part) for part in text.strip("()").split(",") if part),
               bool: lambda text: {"true": True, "false": False}[text.lower()]}
    try:
        return readers.get(type(default), type(default))(text)
    except (ValueError, KeyError):
        legal = "a list of int" if isinstance(default, tuple) else f"of type {type(default).__name__}"
        raise ValueError(f"--{key}={text}: not {legal}; the default is {default!r}") from None


def with_values(config, values):
    """The config with {dotted key: value} set, all at once: so it is checked with all of them, in any order."""
    parts = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        parts.setdefault(head, {})[rest] = value
    return replace(config, **{head: part[""] if "" in part else with_values(getattr(config, head), part)
                              for head, part in parts.items()})


def parse(arguments):
    """Command line -> (preset name, RunConfig). Raises ValueError naming the argument and the nearest legal one."""
    preset, *arguments = arguments or ["nothing"]
    if preset not in PRESETS:
        raise ValueError(f"the first argument must be a preset, one of {', '.join(PRESETS)}; got {preset!r}")
    known, values = flatten(PRESETS[preset]), {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals and known.get(key, ("",))[0] is False:
            equals, text = "=", "true"
        if not argument.startswith("--") or not equals or key not in known:
            if key == "resume":
                raise ValueError(f"{argument}: no such key; a run goes on from its last checkpoint by itself: give the same command again")
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{argument}: {'no such key' if equals else 'write --key=value'}; the nearest is --{near}={known[near][0]}. "
                             "`python train.py --help` lists all")
        values[key] = read_value(key, text, known[key][0])
    return preset, validate(with_values(PRESETS[preset], values))


LIMITS = {  # of this file's numbers, as mentor.LIMITS
    "steps": (1, 2**30), "seed": (0, 2**32), "micro_batch": (0, 2**20), "workers": (0, 1024), "save_every": (1, 2**30),
    "score_every": (0, 2**30), "restart_every": (1, 2**30),
    "final_lr": (0, 1), "disc_start": (0, 1), "codebook_start": (0, 1), "warmup": (0, 1), "prefix_drop": (0, 1)}
CHOICES = {"stage": ("all", *STAGES, "claims", "import", "export"), "world": tuple(WORLDS), "recipe": tuple(TRAINED),
           "dtype": ("auto", "bfloat16", "float32"), "compile": ("auto", "true", "false"), "released.into": STAGES[1:]}


def validate(run):
    """Return the run if its keys are legal, each and together. Raises ValueError naming those that are not."""
    mentor.check_fields(run, "--", {**mentor.LIMITS, **LIMITS})
    for key, legal in CHOICES.items():
        value = attrgetter(key)(run)
        if value not in legal:
            raise ValueError(f"--{key}={value}: must be one of {', '.join(legal)}" + "; T5 overflows in float16" * (value == "float16"))
    for stage in STAGES[1:]:
        parse_mix(stage, getattr(run, stage).mix)
    no_folder = next((p for p in (Path(run.out), *Path(run.out).parents) if os.path.lexists(p) and not p.is_dir()), "")
    no_stage = run.stage if run.stage in ("claims", "import", "export") else ""
    vqgan, decoder = run.vqgan, run.model.decoder
    for wrong, message in (
        (not run.out, "--out=: name the folder to write, or leave out the key"),
        (no_folder, f"--out={run.out}: {no_folder} is no folder; name a folder, which may be new"),
        (run.backgrounds and not run.data, f"--backgrounds={run.backgrounds}: a built-in world draws its own; use it with --data"),
        (run.data_root and (not run.data or Path(run.data).is_dir()),
         f"--data_root={run.data_root}: only a manifest has file names relative to it; use it with --data=FILE"),
        (run.skip_bad and not run.data, "--skip_bad=true: a built-in world has no bad lines; use it with --data"),
        (run.emoji_font and (run.data or run.world != "emoji"),
         f"--emoji_font={run.emoji_font}: only the world emoji has a font; give --world=emoji and no --data"),
        (run.cache_codes and not run.data,
         "--cache_codes=true: a built-in world never draws a sample twice, so there is nothing to keep; use it with --data"),
        (run.data and run.score_every, f"--score_every={run.score_every}: only a built-in world can be scored; leave out this or --data"),
        (run.stage == "claims" and (run.data or run.world != "shapes"),
         "--stage=claims: the claims are tested with shapes; give --world=shapes and no --data"),
        (run.dry_run and no_stage,
         f"--dry_run=true plans the training of stages; it has nothing for --stage={no_stage}: leave out one of them"),
        (run.bench and (run.dry_run or no_stage), "--bench=true measures steps of instruct or align; leave it out, or leave out "
         + ("--dry_run" if run.dry_run else f"--stage={no_stage}")),
        ((vqgan.grid_size, vqgan.codebook_size) != (decoder.grid_size, decoder.codebook_size),
         f"the tokenizer gives {vqgan.grid_size}x{vqgan.grid_size} codes of {vqgan.codebook_size}, but model.decoder.grid_size="
         f"{decoder.grid_size} and model.decoder.codebook_size={decoder.codebook_size}: make them equal"),
    ):
        if wrong:
            raise ValueError(message)
    for name, row in ROWS.items() if run.stage == "claims" else ():
        try:
            validate(with_values(replace(run, stage="all"), row.keys(run)))
        except ValueError as error:
            raise ValueError(f"--stage=claims: its row {name!r} could not be trained ({error}): change that key") from None
    return run


def parse_mix(stage, mix):
    """"task:share,task:share" -> {task: share}. Raises ValueError naming the part that is wrong."""
    shares = {}
    for part in mix.split(","):
        task, _, share = part.partition(":")
        try:
            shares[task] = float(share)
        except ValueError:
            raise ValueError(f"--{stage}.mix: {part!r} is not task:share") from None
        if task not in TASKS or not 0 <= shares[task] < math.inf:
            raise ValueError(f"--{stage}.mix: {part!r}: the task must be one of {', '.join(TASKS)} and the share at least 0")
    if not sum(shares.values()):
        raise ValueError(f"--{stage}.mix={mix}: all shares are 0")
    return shares


def print_help(preset="full"):
    """Print how to call this file, and every key with its default in a preset and its meaning."""
    print(f"""python train.py PRESET [--key=value ...]                  PRESET: {', '.join(PRESETS)}

    python train.py tiny                                  all stages, on the built-in world, into out/tiny
    python train.py tiny --stage=align --align.lr=0.001   one stage, one key changed
    python train.py small --data=FOLDER                   your own pictures; the README says which mixes to give
    python train.py full --stage=align --dry_run          check and plan, train nothing
    torchrun --nproc_per_node=8 train.py base             on 8 GPUs

The same command again goes on where a stopped run ended. A key that is false may be written alone to make it true.

Keys, with the defaults of {preset} (`python train.py PRESET --help` shows those of PRESET):
""")
    for key, (value, meaning) in flatten(PRESETS[preset]).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
        print(f"  --{key}={text}".ljust(44), meaning)


# --- Before a run starts: check that everything it needs is there, fits and belongs to it. Nothing is written before that. 

NOT_OF_THE_RESULT = (  # keys that may change between runs in one folder
    "out", "stage", "device", "dtype", "workers", "save_every", "score_every", "claims_seeds", "keep", "micro_batch", "train_scale",
    "data_root", "skip_bad", "cache_codes", "checkpoint", "compile", "dry_run", "bench", "released.", "model.sampling.")
CHANGED = {  # what a changed hash means
    "text model": " (spiece.model is another)",
    "contents of data": " (lines, or sizes of files, have changed: bring the old ones back, or give --stage for those that shall see the new)"}


def stage_record(name, run, source, text_tokenizer):
    """Everything that determines a stage's result, stored beside its weights: its keys, and hashes of its data, its text model
    and the weights it starts from."""
    others = (*NOT_OF_THE_RESULT, *(s + "." for s in STAGES if s != name), *(("model.",) if name == "tokenizer" else ()))
    keys = {k: v for k, (v, _) in flatten(run).items() if not k.startswith(others)}
    keys.update({f"weights of {s}": sample.weights_hash(Path(run.out) / s) for s in STARTS_FROM[name]})
    if name != "tokenizer":
        keys["text model"] = text_tokenizer.digest
    if run.data:
        keys["contents of data"] = source.digest + source.backgrounds.digest * (source.backgrounds is not source)
    return json.loads(json.dumps(keys))


def check_record(folder, record):
    """Raise ValueError if the folder holds the same stage of another run, naming the first key that differs."""
    file = folder / "stage.json"
    if not file.is_file() or not ((folder / "model.safetensors").is_file() or checkpoints(folder)):
        return
    old = mentor.read_json(file)
    for key in sorted(record.keys() | old.keys()) if "imported from" not in old else ():
        if record.get(key) != old.get(key):
            raise ValueError(f"{folder} was trained with {key}={old.get(key)}, this run has {record.get(key)}{CHANGED.get(key, '')}; "
                             f"choose another --out, or delete {folder}")


def check_shapes(run, folder, text_tokenizer):
    """Raise ValueError if the stage in a folder has another model, text model or tokenizer than the run; dropout and sampling may differ.
    Reads only its config and its tensors' names and shapes."""
    key, config, module = ("vqgan", run.vqgan, VQGAN) if folder.name == "tokenizer" else ("model", run.model, Mentor)
    stored = flatten(mentor.from_dict(type(config), mentor.read_json(folder / "config.json")))
    for name, (value, _) in flatten(config).items():
        if value != stored[name][0] and not name.startswith("sampling.") and not name.endswith(".dropout"):
            raise ValueError(f"--{key}.{name}={value}, but {folder} was trained with {stored[name][0]}: leave out the key, or choose "
                             "another --out")
    if folder.name != "tokenizer":
        sample.check_text_model(folder, text_tokenizer)
        sample.check_tokenizer(folder)
    with torch.device("meta"):
        model = module(config)
    try:
        mentor.check_fit(model.state_dict(), mentor.read_weights(folder / "model.safetensors"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; make the stage {folder.name} again") from None


def start_problems(name, run, machine, source, text_tokenizer):
    """What keeps a stage from starting, as a list of sentences; stages that the run trains before it count as present."""
    out, problems, before = Path(run.out), [], STARTS_FROM[name]
    absent = [str(out / s / file) for s in before for file in ("config.json", "model.safetensors") if not (out / s / file).is_file()]
    if absent and run.stage in STAGES:
        problems.append(f"{name} needs {', '.join(absent)}: {' and '.join(f'--stage={s}' for s in before)} make them from scratch, "
                        "--stage=import from released weights")
    checks = [lambda: micro_batches(getattr(run, name), run, machine)]
    if name != "tokenizer" and not run.data:
        checks.append(lambda: check_world_prompts(name, run, text_tokenizer))
    if name == "tokenizer" and run.tokenizer.lpips:
        checks.append(lambda: LPIPS(run.tokenizer.lpips))
    if not absent:
        checks += [partial(check_shapes, run, out / s, text_tokenizer) for s in before]
        checks.append(lambda: check_record(out / name, stage_record(name, run, source, text_tokenizer)))
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


# --- Released weights --------------------------------------------------------------------------------------------


def import_released(run, machine):
    """Convert released files into stages of run.out that train.py and sample.py can open, every tensor unchanged, without loading
    them whole. Raises ValueError if one does not fit."""
    released, folders = run.released, {"tokenizer": Path(run.out) / "tokenizer", "model": Path(run.out) / run.released.into}
    spiece = released.spiece or released.t5 and str(Path(released.t5) / "spiece.model")
    if not spiece or not released.vq:
        raise ValueError("--stage=import needs --released.vq=vq_ds16_t2i.pt and T5's spiece.model (in the folder of --released.t5, or "
                         "--released.spiece=FILE)")
    text_tokenizer = TextTokenizer.from_file(spiece)
    check_vocabulary(text_tokenizer, run)
    with torch.device("meta"):
        model, vqgan = Mentor(run.model), VQGAN(run.vqgan)
    say = partial(machine.say, "import:")
    codes = mentor.released_tensors("vq", released.vq, say)
    mentor.check_fit(vqgan.state_dict(), codes)
    sources = {s: getattr(released, s) for s in ("clip", "t5", "connector", "generator", "mentor") if getattr(released, s)}
    tensors = {}
    for source, path in sources.items():
        own = mentor.released_tensors(source, path, say)
        if twice := sorted(tensors.keys() & own.keys()):
            raise ValueError(f"--released.{source}={path} holds {twice[0]}, which another file had already")
        tensors.update(own)
    tensors, change = mentor.fit_unconditional(model, tensors)
    names, new = {mentor.released_name(n): n for n, _ in model.named_parameters()}, []
    for part in filter(None, released.fresh.split(",")):
        found = [r for r, n in names.items() if n.startswith((part, f"encoder.{part}"))]
        if not found:
            raise ValueError(f"--released.fresh={released.fresh}: the model has no part {part!r}; give vision, connector, text, projector or "
                             "decoder, or names of tensors in them")
        new += found
    mentor.check_fit(mentor.released_parameters(model), tensors, new)
    for line in filter(None, (change, new and f"new, as asked: {released.fresh}")):
        say(line)
    for record in (folder / "stage.json" for folder in folders.values()):
        if record.is_file() and "imported from" not in mentor.read_json(record):
            raise ValueError(f"{record.parent} holds a stage that was trained: choose another --out, or delete it")
    parameters = {**(Mentor(run.model).state_dict() if new else {}), **{names[r]: tensor for r, tensor in tensors.items()}}
    mentor.save_folder(folders["tokenizer"], run.vqgan, codes)
    mentor.save_folder(folders["model"], run.model, parameters)
    origin = {"imported from": {**sources, "vq": released.vq}}
    mentor.write_json(folders["tokenizer"] / "stage.json", origin)
    mentor.write_json(folders["model"] / "stage.json",
                      {**origin, "weights of tokenizer": sample.weights_hash(folders["tokenizer"]), "text model": text_tokenizer.digest})
    write_run(run, text_tokenizer)
    say(f"wrote {folders['tokenizer']} and {folders['model']}")


def export_released(run, machine):
    """Write the newest stage of run.out under the names that the released code reads, every tensor unchanged. Raises ValueError if
    a file exists already, or its folder does not."""
    targets = run.released.mentor, run.released.vq
    if "" in targets or len(set(map(os.path.realpath, targets))) < 2:
        raise ValueError("--stage=export needs --released.mentor=FILE.pt and --released.vq=FILE.pt, the files to write")
    for path in map(Path, targets):
        if path.exists() or not path.parent.is_dir():
            problem = f"{path} exists already: give another name, or delete it" if path.exists() else f"{path}: make its folder first"
            raise ValueError(f"--stage=export: {problem}")
    root, folder = sample.newest_stage(run.out)
    tensors = {mentor.released_name(n): t for n, t in mentor.read_weights(folder / "model.safetensors").items()}
    words = "multimodal_encoder.language_model.{}.weight"  # stored twice
    tensors[words.format("encoder.embed_tokens")] = tensors[words.format("shared")]
    codes = mentor.read_weights(root / "tokenizer" / "model.safetensors")
    codes["quantize.codebook_used"] = torch.zeros(65536)
    for path, weights in zip(targets, (tensors, codes)):
        mentor.write_atomically(path, partial(save_pickle, {"model": weights}))
    machine.say(f"export: wrote {' and '.join(targets)}")


# --- What a stage will cost (--dry_run=true): run its own code on tensors that have shapes but no memory ---------

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L4": 121, "4090": 165}           # dense bfloat16, without sparsity
UTILISATION = 0.4                  # of a card's peak
CARDS = (24, 40, 80, 141)          # GiB
SPARE = 0.06                       # of a card: for CUDA itself and for fragmentation
PROBES = (1, 8, 16)                # micro-batches to rehearse; between and beyond them memory grows linearly
NAME_TOKENS = 4                    # in a subject's name, which the query connector reads


def peak_tflops(device_name):
    """A card's peak in TFLOPS, by the driver's name for it; None if it is not in the table."""
    words = device_name.replace("-", " ").split()
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in words), None)


class PeakMemory(TorchDispatchMode):
    """Context that counts the bytes of all living tensors that operations made: `now`, and at most so far, `most`."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.living = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.prim.device.default:                                   # called on every tensor, makes none
            return result
        given, made = ({t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)}
                       for tree in ((args, kwargs), result))
        for key in made.keys() - given.keys() - self.living:                             # not views, nothing changed in place
            self.living.add(key)
            self.now += made[key].nbytes()
            weakref.finalize(made[key], self.free, key, made[key].nbytes())
        self.most = max(self.most, self.now)
        return result

    def free(self, key, size):
        """Called when a storage is freed."""
        self.living.discard(key)
        self.now -= size


def attention_flops(query, key, value, dropout=0.0, causal=False, **options):
    """FLOPs of a fused attention, from shapes (B, H, T, hd): 4 for each query, key and channel, half of that if causal."""
    return 4 * math.prod(query) * key[2] // (1 + causal)


FUSED_FLOPS = {  # torch counts only plain products; attention has two in its forward pass, four in its backward pass
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, query, key, value, out, sums, dropout, causal, **options: 2 * attention_flops(query, key, value, dropout, causal)}


class Rehearsal:
    """A stage whose tensors have no memory (torch's FakeTensorMode), to count what a forward and backward pass takes."""

    def __init__(self, name, run, dtype):
        self.name, self.run, self.fake = name, replace(run, checkpoint=False, compile="false"), FakeTensorMode(allow_non_fake_inputs=True)
        machine = Machine(-1, 1, torch.device("cpu"), dtype)                             # not the first process: prints nothing
        with self.fake:
            stage = TokenizerStage(self.run, machine) if name == "tokenizer" else MentorStage(
                name, self.run, machine, Mentor(run.model), VQGAN(run.vqgan))
        self.stage = stage.train()
        for _, parameter in stage.trained():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(self, observer, count, tokens, images):
        """Forward and backward inside `observer`, a context: `count` samples of `tokens` tokens each, `images` images in all."""
        model, zeros, side, target = self.run.model, torch.zeros, self.run.model.vision.image_size, self.run.vqgan.image_size
        with self.fake:
            ids = zeros(count, tokens, dtype=torch.long)
            batch = Batch(text_ids=ids, lengths=ids[:, 0] + tokens, masked=ids == 0, drop=zeros(count) == 1,
                          pixels=zeros(images, 3, side, side), image_slots=torch.arange(images * model.image_tokens),
                          name_ids=zeros(images, NAME_TOKENS, dtype=torch.long), name_mask=zeros(images, NAME_TOKENS) == 0,
                          targets=zeros(count, 3, target, target), tasks=["text_to_image"] * count)
            with observer:
                with self.stage.machine.autocast():
                    loss, _ = self.stage(batch, 0)
                loss.backward()

    def flops(self, prompts):
        """FLOPs per sample, for the mean of prompts given as (tokens, images). Causal attention counts half of its square, codes
        from a cache cost nothing, and the discriminator is left out."""
        if self.run.cache_codes and self.name != "tokenizer":
            codes = self.run.model.decoder.n_code
            self.stage.cache = SimpleNamespace(encode=lambda vqgan, batch: torch.zeros(len(batch), codes, dtype=torch.long))
        counter, (tokens, images) = FlopCounterMode(display=False, custom_mapping=FUSED_FLOPS), map(sum, zip(*prompts))
        self.step(counter, len(prompts), round(tokens / len(prompts)), round(images))
        self.stage.cache = None
        return counter.get_total_flops() / len(prompts)

    def memory(self, count, tokens, images):
        """Most bytes of tensors that a pass makes: activations, autocast's copies of weights, codes; no weights or gradients."""
        peak = PeakMemory()
        self.step(peak, count, tokens, count * images)
        return peak.most


def memory_plan(rehearsal, machine, prompt):
    """Bytes that a GPU needs for a stage with prompts all as long as this one, (tokens, images): {what: bytes} the same for every
    micro-batch, and a function from a micro-batch to the bytes of its pass. Weights, gradients and AdamW's two moments are
    float32, and several processes also copy gradients into buckets to send them."""
    learning = sum(p.numel() for _, p in rehearsal.stage.trained())
    every = sum(p.numel() for module in (rehearsal.stage, *getattr(rehearsal.stage, "vqgan", ())) for p in module.parameters())
    fixed = {"weights": 4 * every, "gradients": (4 if machine.world_size == 1 else 8) * learning, "optimizer": 8 * learning}
    probed = [rehearsal.memory(micro, *prompt) for micro in PROBES]
    slope = (probed[-1] - probed[-2]) / (PROBES[-1] - PROBES[-2])
    return fixed, lambda micro: float(np.interp(micro, PROBES, probed)) + slope * max(0, micro - PROBES[-1])


def first_prompts(name, run, source, text_tokenizer, count=64):
    """(tokens, images) of a stage's first prompts; the tokenizer has none."""
    if name == "tokenizer":
        return [(1, 0)]
    dataset, collate = make_dataset(name, run, source), make_collate(run, text_tokenizer)
    if run.data:
        prompts = [(entry_prompt(entry), entry.n_image) for entry in (source[dataset.line(i)] for i in range(count))]
    else:
        prompts = [(s.prompt, len(s.images)) for s in map(dataset.__getitem__, range(count))]
    return [(len(collate.encode(prompt, images)), images) for prompt, images in prompts]


def plan_stage(name, run, machine, dtype, prompts):
    """Print a stage's parameters, steps, FLOPs, hours and memory, given (tokens, images) of some of its prompts."""
    rehearsal, config = Rehearsal(name, run, dtype), getattr(run, name)
    share = max(1, config.global_batch // machine.world_size)
    micro = run.micro_batch or share
    describe_stage(name, rehearsal.stage, config, machine, micro, share // micro, 0)
    flops, samples = rehearsal.flops(prompts), config.steps * config.global_batch
    tokens, images = np.mean(prompts, 0)
    prompt = f"{tokens:.0f} prompt tokens, including those of {images:.2f} images (at most {max(prompts)[0]}), and "
    machine.say(f"{name}: a sample is {prompt * (name != 'tokenizer')}{run.vqgan.grid_size**2} codes, {flops / 1e12:.4g} TFLOPs; "
                f"{samples / 1e6:.4g}M samples are {samples * flops:.3g} FLOPs")
    for card in ("A100", "H200"):
        hours = samples * flops / (UTILISATION * PEAK_TFLOPS[card] * 1e12) / 3600
        on = ", ".join(f"{hours / count:.3g} h on {'one' if count == 1 else count}" for count in sorted({1, 8, machine.world_size}))
        machine.say(f"{name}: at {UTILISATION:.0%} of an {card}'s {PEAK_TFLOPS[card]} TFLOPS: {on}")
    for recompute in (False,) if name == "tokenizer" else (False, True):
        if recompute:
            recompute_activations(rehearsal.stage.model)
        fixed, activations = memory_plan(rehearsal, machine, max(prompts))
        if recompute == run.checkpoint or name == "tokenizer":
            amounts = {**fixed, f"activations of {micro}": activations(micro)}
            parts = " + ".join(f"{size / 2**30:.1f} {what}" for what, size in amounts.items())
            machine.say(f"{name}: memory per GPU, micro-batch {micro}: {sum(amounts.values()) / 2**30:.1f} GiB = {parts}")
        fits = []
        for card in CARDS:
            room = card * 2**30 * (1 - SPARE) - sum(fixed.values())
            largest = max((m for m in legal_micro_batches(config, share) if activations(m) <= room), default=0)
            fits.append(f"{largest} in {card} GiB" if largest else f"none fits {card} GiB")
        machine.say(f"{name}: largest micro_batch{' with --checkpoint=true' * recompute}: {', '.join(fits)}")


def dry_run(run, machine, source, text_tokenizer, stages, problems):
    """Print what the stages would cost. Raises ValueError listing everything that keeps the run from starting."""
    dtype = machine.dtype if machine.device.type == "cuda" or run.dtype != "auto" else torch.bfloat16
    machine.say(f"a plan, nothing is trained: for {machine.world_size} GPUs (torchrun sets how many) in {str(dtype)[6:]}")
    for name in stages:
        plan_stage(name, run, machine, dtype, first_prompts(name, run, source, text_tokenizer))
    if run.data and not run.skip_bad:  # which has looked already
        for manifest in dict.fromkeys((source.backgrounds, source)):
            problems += manifest.check_files(run.vqgan.image_size, run.workers)
    if problems:
        raise ValueError("this run could not start: " + "; ".join(problems))
    machine.say("everything needed is there")


# --- The paper's claims (--stage=claims): the same run with one thing changed at a time, and the effect on the scores 


@dataclass(frozen=True)
class Row:
    """A run that shares its first stages with the full one and changes the rest."""

    start: str                                   # the full run's stage that it starts from
    stages: tuple[str, ...] = ("instruct",)      # the stages that it trains itself
    keys: Callable = lambda run: {}              # the keys that it changes
    paper: tuple[float, ...] = ()                # CP, PF and CP*PF in the paper


def without(stage, task):
    """Leave a task out of a stage; the others keep their proportions."""
    return lambda run: {f"{stage}.mix": f"{getattr(run, stage).mix},{task}:0"}


def tuning(task, share):
    """After stage 2, train one task for a share of its steps at half its learning rates (the paper's 5e-5 against 1e-4)."""
    return lambda run: {"instruct.mix": f"{task}:1", "instruct.steps": max(1, round(run.instruct.steps * share)),
                        "instruct.lr": run.instruct.lr / 2, "instruct.muon_lr": run.instruct.muon_lr / 2}


ROWS = {  # all with the same number of samples: without stage 1 its steps go to stage 2
    "full": Row("instruct", (), paper=(0.555, 0.839, 0.466)),
    "stage 1 alone": Row("align", ()),
    "without stage 1": Row("pretrain", keys=lambda run: {"instruct.steps": samples_of(run, STAGES[2:]) // run.instruct.global_batch},
                           paper=(0.179, 0.673, 0.120)),
    "without segmentation in stage 1": Row("pretrain", ("align", "instruct"), without("align", "segmentation"), (0.252, 0.479, 0.121)),
    "without recovery": Row("align", keys=without("instruct", "recovery"), paper=(0.661, 0.284, 0.188)),
    "without segmentation in stage 2": Row("align", keys=without("instruct", "segmentation"), paper=(0.412, 0.918, 0.378)),
    "without subject-driven": Row("align", keys=without("instruct", "subject_driven"), paper=(0.407, 0.910, 0.370)),
    "query connector": Row("tokenizer", STAGES[1:], lambda run: {"model.connector.kind": "query"}, (0.421, 0.882, 0.371)),
    "with multi-image": Row("align", keys=lambda run: {"instruct.mix": f"{run.instruct.mix},multi_image:1500"},
                            paper=(0.586, 0.829, 0.486)),
    "reconstruction tuning": Row("instruct", keys=tuning("reconstruction", 0.25)),
    "in-context tuning": Row("instruct", keys=tuning("in_context", 0.5)),
}


def branch(run, out, before, machine, source, text_tokenizer, stages):
    """Train some stages of a run into another folder, in which earlier ones are links, `before`: {stage: the folder it links to}."""
    run = replace(run, out=str(out), score_every=0)
    for stage, folder in before.items() if machine.main else ():
        Path(out).mkdir(parents=True, exist_ok=True)
        if not (Path(out) / stage).exists():
            (Path(out) / stage).symlink_to(os.path.relpath(folder, out), target_is_directory=True)
    machine.barrier()
    train_stages(stages, run, machine, source, text_tokenizer)
    return run


def remembered(file, folder, compute, machine):
    """compute(Pipeline) for the stage in a folder, read from the file if it was computed for the same weights and sampling before."""
    old = mentor.read_json(file) if file.is_file() else {}
    made_with = {"weights": sample.weights_hash(folder), "sampling": mentor.read_json(folder / "config.json")["sampling"]}
    if old.get("made_with") != made_with:
        machine.say(f"claims: scoring {file.stem}")
        file.parent.mkdir(parents=True, exist_ok=True)
        old = {"made_with": made_with, "scores": compute(sample.Pipeline.open(folder, machine.device))}
        mentor.write_json(file, old)
    return old["scores"]


def samples_of(run, stages):
    """Samples in those of `stages` that are the paper's stage 1 or 2."""
    return sum(getattr(run, stage).steps * getattr(run, stage).global_batch for stage in STAGES[2:] if stage in stages)


def train_rows(run, machine, world, text_tokenizer, names=tuple(ROWS)):
    """Train and score rows beside the full run, those named and those that have scores there already. Returns {row: scores} and
    {row: folder of its weights}."""
    full, scores, folders = Path(run.out), {}, {}
    for name, row in ROWS.items():
        out, own = full / "claims" / name.replace(" ", "_"), run
        if name not in names and not out.with_suffix(".json").is_file():
            continue
        if row.stages:
            machine.say(f"claims: {name}, in {out}")
            before = {"tokenizer": full / "tokenizer", STARTS_FROM[row.stages[0]][-1]: full / row.start}
            own = branch(with_values(run, row.keys(run)), out, before, machine, world, text_tokenizer, row.stages)
        folders[name] = folder = out / row.stages[-1] if row.stages else full / row.start
        if machine.main:
            rates = [line["samples_per_s"] for line in read_log(folder / "log.jsonl")]
            scores[name] = {**remembered(out.with_suffix(".json"), folder, sample.claim_scores, machine),
                            "samples": samples_of(run, STAGES[: STAGES.index(row.start) + 1]) + samples_of(own, row.stages),
                            "image_tokens": own.model.image_tokens, "samples_per_s": float(np.median(rates or [0]))}
    return scores, folders


def claims(run, machine, world, text_tokenizer):
    """Train and score the table's rows and write claims.json, claims.md and claims.png into run.out. Nothing is done twice."""
    run, out = replace(run, stage="all", score_every=run.score_every or max(1, run.instruct.steps // 10)), Path(run.out)
    for row in ROWS.values():  # before hours of training
        for stage in row.stages:
            check_world_prompts(stage, with_values(run, row.keys(run)), text_tokenizer)
    train_stages(STAGES, run, machine, world, text_tokenizer)
    scores, folders = train_rows(run, machine, world, text_tokenizer)
    rows, before = [scores], {stage: out / stage for stage in STAGES[:2]}
    close = machine.mean({name: 0 for name in scores if difference(scores, name, "cp_pf")[2]})  # the first process knows
    for seed in range(run.seed + 1, run.seed + run.claims_seeds):  # for stages 1 and 2; tokenizer and pretraining are shared
        other = branch(replace(run, seed=seed), out / "claims" / f"seed_{seed}", before, machine, world, text_tokenizer, STAGES[2:])
        rows.append(train_rows(other, machine, world, text_tokenizer, close)[0])
    if not machine.main:
        return
    curve = [[samples_of(run, STAGES[:i]) + line["step"] * getattr(run, STAGES[i]).global_batch, *(line[key] for key in sample.MEASURES)]
             for i in (2, 3) for line in read_log(out / STAGES[i] / "log.jsonl") if "cp" in line]
    balance = remembered(out / "claims" / "balance.json", folders["full"], sample.balance_scores, machine)
    by_seed = {name: [scores[name] for scores in rows if name in scores] for name in ROWS}
    means = {name: {**averaged(each), "seeds": len(each)} for name, each in by_seed.items()}
    result = {"rows": means, "balance": balance, "efficiency": curve}
    text = claims_text(result)
    mentor.write_json(out / "claims.json", result)
    mentor.write_atomically(out / "claims.md", lambda file: file.write_text(text, encoding="utf-8"))
    prompts = sample.held_out_samples(world, "subject_driven", 8)
    drawn = {name: sample.Pipeline.open(folder, machine.device).draw(prompts)[0] for name, folder in folders.items()}
    pictures = {"reference": [s.images[0] for s in prompts], **drawn, "ideal": [s.target for s in prompts]}
    Image.fromarray(sample.titled_rows(pictures, [s.prompt.replace("\n", " ") for s in prompts])).save(out / "claims.png")
    machine.say(f"{text}\nthis is also in {out}/claims.md and claims.json; look at {out}/claims.png")


def averaged(scores):
    """Average nested scores over seeds. Standard errors include the prompts' and, with several seeds, the seeds' variance."""
    if not isinstance(scores[0], dict):
        return scores[0] if scores.count(scores[0]) == len(scores) else sum(scores) / len(scores)
    mean = {key: averaged([s[key] for s in scores]) for key in scores[0]}
    for key in mean.keys() & {f"{measure}_se" for measure in sample.MEASURES}:
        mean[key] = math.sqrt(np.mean([s[key] ** 2 for s in scores]) + np.var([s[key[:-3]] for s in scores]) / max(1, len(scores) - 1))
    return mean


def difference(rows, name, key):
    """How much a row's score differs from the full run's, its standard error, and whether that is within two standard errors."""
    row, full = rows[name], rows["full"]
    here, error = row[key] - full[key], math.hypot(row[f"{key}_se"], full[f"{key}_se"])
    return here, error, abs(here) <= 2 * error


def against_full(name, rows):
    """How a row differs from the full run, here and in the paper, and whether in the same direction if by two standard errors."""
    parts = []
    for (key, label), paper in zip(sample.MEASURES.items(), np.subtract(ROWS[name].paper, ROWS["full"].paper)):
        here, error, close = difference(rows, name, key)
        verdict = "no clear difference" if close else "the same direction" if here * paper > 0 else "the other direction"
        parts.append(f"{label} {here:+.3f} ± {error:.3f}, in the paper {paper:+.3f} ({verdict})")
    return f"- {name}: {'; '.join(parts)}."


def marks(row):
    """A row's CP, PF and CP*PF with their standard errors."""
    return [f"{row[key]:.3f} ± {row[f'{key}_se']:.3f}" for key in sample.MEASURES]


def table_of_rows(rows):
    """The scores of all runs beside the paper's."""
    labels = sample.MEASURES.values()
    cells = [[name, row["samples"], row["seeds"], *marks(row), *(ROWS[name].paper or ("", "", "")), f"{row['segmentation_iou']:.2f}"]
             for name, row in rows.items()]
    return sample.table(["row", "samples", "seeds", *labels, *(f"the paper's {label}" for label in labels), "segm. IoU"], cells)


def efficiency_text(curve):
    """Claim 7: samples until the scores come near the last ones; curve: [samples, CP, PF, CP*PF] in order."""
    if not curve:
        return "**7. Training efficiency.** The full run was trained without --score_every, so its logs have no scores."
    half, most = (next(line[0] for line in curve if line[3] >= share * curve[-1][3]) for share in (0.5, 0.9))
    return (f"**7. Training efficiency.** Half of the last CP*PF after {half} samples, nine tenths after {most}.\n\n"
            + sample.table(["samples", *sample.MEASURES.values()], curve))


def claims_text(result):
    """The claims in markdown: the table of runs, then the numbers for each claim."""
    rows = result["rows"]
    full, one, multi, query = (rows[name] for name in ("full", "stage 1 alone", "with multi-image", "query connector"))
    rebuilt, tuned = rows["reconstruction tuning"], rows["in-context tuning"]
    errors = [*(row["reconstruction_l2"] for row in (one, full, rebuilt)), full["tokenizer_l2"]]
    balance = [[case, row["loss"], *marks(row)] for case, row in result["balance"].items()]
    learnt = [[when, *(row[kind][part] for kind in ("known_rules", "new_rules") for part in ("whole", "parts"))]
              for when, row in (("before", full), ("after", tuned))]
    return "\n\n".join([
        f"± is one standard error over {sample.PROMPTS} prompts and the row's seeds.",
        table_of_rows(rows),
        "**1. Both stages matter, and each task has its role.** Against the full run:",
        "\n".join(against_full(name, rows) for name in ROWS if name.startswith("without")),
        f"**2. MLP or query connector.** {full['image_tokens']} tokens per image at {full['samples_per_s']:.0f} samples/s with the MLP, "
        f"{query['image_tokens']} at {query['samples_per_s']:.0f} with the queries.",
        against_full("query connector", rows),
        "**3. Multi-image training.** Two subjects from two images: CP {cp:.3f}, PF {pf:.3f} with it, ".format(**multi["two subjects"])
        + "{cp:.3f} and {pf:.3f} without.".format(**full["two subjects"]),
        against_full("with multi-image", rows),
        "**4. Deterministic control.** The same prompt and seed drew the same picture twice: " + ("yes" if full["repeats"] == 1 else "no")
        + ". Reconstruction L2 (the paper: 0.1008 on COCO after tuning):",
        sample.table(["after stage 1", "after stage 2", "after reconstruction tuning", "the tokenizer alone"], [errors]),
        f"**5. Balance.** The full run on {sample.FEWER_PROMPTS} prompts; the loss is that of the true picture's codes.",
        sample.table(["full run", "loss", *sample.MEASURES.values()], balance),
        f"**6. Versatile without new parts.** Segmentation straight after stage 1: IoU {one['segmentation_iou']:.3f}; of two subjects, "
        f"{one['named_iou']:.3f} with the one that is named and {one['other_iou']:.3f} with the other. In context, from two examples, "
        f"the rule (paint, move, cut out) whose outcome is nearest of all {len(rules('shapes') + rules('shapes', True)) + 1}:",
        sample.table(["tuned in context", "known rules", "their parts", "new combinations", "their parts"], learnt),
        efficiency_text(result["efficiency"])]) + "\n"


# --- Speed of a training step (--bench=true) ---------------------------------------------------------------------


def widen(batch, width):
    """The batch with its prompts padded to `width` tokens."""
    slots, more = batch.image_slots, width - batch.text_ids.shape[1]
    return replace(batch, text_ids=F.pad(batch.text_ids, (0, more)), masked=F.pad(batch.masked, (0, more)),
                   image_slots=slots + slots // batch.text_ids.shape[1] * more)


def straightforward_losses(model, batch, codes, everywhere=True):
    """The losses (B,) of MentorStage, computed as in the released code: prefixes moved to the right end of their window, a dense
    mask over the padding before them, and with `everywhere` the output head at all positions though only N are needed."""
    (B, T), N = batch.text_ids.shape, codes.shape[1]
    padding = T - batch.lengths[:, None]                                                 # (B, 1)
    prefix = model.projector(model.encoder(batch), batch.lengths, batch.drop)
    prefix = prefix.gather(1, ((torch.arange(T, device=codes.device) - padding) % T)[..., None].expand_as(prefix))
    x = torch.cat([prefix, model.decoder.code_embedding(codes[:, :-1]).to(prefix.dtype)], dim=1)
    at = torch.arange(T + N - 1, device=codes.device)
    mask = (at <= at[:, None]) & (at >= padding)[:, None] | (at == at[:, None])          # (B, S, S); padding sees only itself
    dense = SimpleNamespace(append=lambda layer, k, v: (k, v, mask[:, None]))            # takes a KV cache's place
    hidden = model.decoder(x, (at - T + 1).clamp(min=0).expand(B, -1), dense)
    logits = model.decoder.output(hidden if everywhere else hidden[:, -N:])[:, -N:].float()
    return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").mean(1)


def step_pairs(name, run, machine, batch):
    """{(variant, baseline): a function for each that takes a whole step on the batch}, all of one stage with new weights."""
    torch.manual_seed(run.seed)
    vqgan = VQGAN(run.vqgan).to(machine.device)
    plain = MentorStage(name, replace(run, compile="false"), machine, Mentor(run.model), vqgan).to(machine.device).train()
    compiled = deepcopy(plain, {id(x): x for x in (vqgan, *plain.parameters(), *plain.buffers())})  # other blocks, the same weights
    optimizers = make_optimizers(plain, getattr(run, name), run)

    def stepping(losses, dtype=machine.dtype):
        """A function that takes one step on the mean of losses()."""
        def step():
            with replace(machine, dtype=dtype).autocast():
                loss = losses().mean()
            loss.backward()
            update_weights(plain, optimizers, 1.0, run.grad_clip)

        return step

    wide, codes = widen(batch, run.model.context), vqgan.encode(batch.targets)
    lean = stepping(lambda: plain.code_losses(batch, codes)[0])
    pairs = {
        ("all of it", "dense mask, left padding, whole window, head everywhere"):
            (lean, stepping(lambda: straightforward_losses(plain.model, wide, codes))),
        ("no mask", "dense mask, left padding"):
            (lean, stepping(lambda: straightforward_losses(plain.model, batch, codes, everywhere=False))),
        ("prefixes as long as the batch's longest", "as long as the window"): (lean, stepping(lambda: plain.code_losses(wide, codes)[0])),
        ("cached codes", "encoding the targets"): (lean, stepping(lambda: plain.code_losses(batch, plain.encode_targets(batch))[0])),
        ("autocast to bfloat16", "float32"):
            [stepping(lambda: plain.code_losses(batch, codes)[0], dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]}
    if compile_blocks(compiled.model, machine):
        if run.checkpoint:
            recompute_activations(compiled.model)
        pairs["compiled blocks", "as they are"] = stepping(lambda: compiled.code_losses(batch, codes)[0]), lean
    return pairs


def bench(name, run, machine, source, text_tokenizer):
    """Print samples/s of whole steps of a stage with new weights: each optimisation beside the plain way, in turns."""
    device, (micro, _) = machine.device, micro_batches(getattr(run, name), run, machine)
    dataset, collate = make_dataset(name, run, source), make_collate(run, text_tokenizer)
    batch = collate([dataset[i] for i in range(micro)]).to(device)
    pairs = step_pairs(name, run, machine, batch)
    copied, multiplied = sample.measure_limits(device, machine.dtype)
    tokens, images = batch.lengths.float().mean().item(), len(batch.pixels) / micro
    flops = Rehearsal(name, replace(run, cache_codes=True), machine.dtype).flops([(tokens, images)] * 8)
    print(f"{name}: steps of {micro} samples: {tokens:.0f} prompt tokens (longest {batch.text_ids.shape[1]}, window {run.model.context}), "
          f"{run.model.decoder.n_code} codes, {flops / 1e9:.3g} GFLOPs each; {torch.get_num_threads()} threads; "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else device} copies {copied / 1e9:.3g} GB/s and multiplies "
          f"{multiplied / 1e12:.3g} TFLOPS")
    rows = []
    for (variant, baseline), both in pairs.items():
        try:
            fast, slow = (micro / seconds for seconds in sample.median_seconds(dict(zip((variant, baseline), both)), device).values())
            rows.append([variant, fast, f"{fast * flops / multiplied:.0%}", baseline, slow, fast / slow])
        except torch.OutOfMemoryError:  # baselines need more memory
            rows.append([variant, "", "", baseline, "out of memory", ""])
    sample.print_table(["a training step with", "samples/s", "of the matrix rate", "against", "samples/s", "ratio"], rows)


# --- The report and main -----------------------------------------------------------------------------------------


def draw_curves(out, path):
    """Draw the loss of every stage that has a log, side by side; dots are the validation loss. The fall in the first twentieth of
    the steps is cut off at the top, since it would flatten the rest."""
    logs = [(name, lines) for name in STAGES if (lines := read_log(Path(out) / name / "log.jsonl"))]
    width, height, pad = 300, 200, 36
    canvas = Image.new("RGB", (width * max(1, len(logs)), height), "white")              # without logs, where all was imported, empty
    pen = ImageDraw.Draw(canvas)
    for i, (name, lines) in enumerate(logs):
        left, right, top, bottom = i * width + pad, (i + 1) * width - 12, 24, height - 24
        losses, dots = ([(line["step"], line[key]) for line in lines if key in line] for key in ("loss", "validation"))
        last = lines[-1]["step"]
        low, high = (f(loss for step, loss in losses + dots if step > last / 20) for f in (min, max))
        x = partial(np.interp, xp=(0, last), fp=(left, right))
        y = partial(np.interp, xp=(low, max(high, low + 1e-9)), fp=(bottom, top))
        pen.rectangle((left, top, right, bottom), outline="#bbbbbb")
        pen.line([(x(step), y(loss)) for step, loss in losses], fill="#2060c0", width=2)
        for step, loss in dots:
            pen.circle((x(step), y(loss)), 3, fill="#c03020")
        pen.text((left, 6), f"{name}: loss {losses[0][1]:.3g} to {losses[-1][1]:.3g}", fill="black")
        pen.text((left, bottom + 6), f"0 to {last} steps", fill="#666666")
    canvas.save(path)


def write_run(run, text_tokenizer, manifests=()):
    """Write what a run's folder has beside its stages: text model, keys, manifests that were made of folders."""
    Path(run.out).mkdir(parents=True, exist_ok=True)
    if run.stage != "tokenizer":  # before the first stage that reads words, captions may still be added
        mentor.write_atomically(Path(run.out) / "spiece.model", lambda file: file.write_bytes(text_tokenizer.proto))
    mentor.write_json(Path(run.out) / "run.json", asdict(run))
    for manifest in (m for m in manifests if m.content is not None):
        mentor.write_atomically(manifest.path, lambda file: file.write_bytes(manifest.content))
        manifest.content = None


def show_held_out(name, run, source, machine):
    """Draw up to 8 held-out samples of a stage's mix, or of those trained on where none are held out, which is said."""
    dataset = make_dataset(name, run, source, held_out=True)
    if not dataset.count:
        machine.say("none of these pictures is held out, so those to be drawn have been trained on")
        dataset = make_dataset(name, replace(run, prefix_drop=0.0), source)
    pipeline = sample.Pipeline.open(Path(run.out) / name, machine.device)
    sample.show_pictures(pipeline, [dataset[i] for i in range(min(8, dataset.count))], Path(run.out))


@contextmanager
def only_run_in(out):
    """Context in which no other run trains into a folder. Raises ValueError if one does. (When a process dies, its lock goes, too.)"""
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / ".lock", "a") as file:
        with suppress(ImportError, OSError):  # Windows and some network disks have no such locks
            from fcntl import LOCK_EX, LOCK_NB, lockf
            try:
                lockf(file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out={out}: another run is training there; choose another --out, or wait for its end") from None
        yield


def train_stages(names, run, machine, source, text_tokenizer):
    """Train some stages into run.out."""
    started = time.perf_counter()
    with only_run_in(run.out) if machine.main else nullcontext():
        if machine.main:
            write_run(run, text_tokenizer, [source, source.backgrounds] if run.data else [])
        for name in names:
            train_stage(name, run, machine, source, text_tokenizer)
            machine.say(f"{name}: finished after {time.perf_counter() - started:.0f} s in all")


def main(arguments):
    """Run the command line: train, then score and show the result."""
    if not arguments or {"-h", "--help"} & set(arguments):
        return print_help(*(preset for preset in arguments[:1] if preset in PRESETS))
    run, started = parse(arguments)[1], time.perf_counter()
    run = with_values(run, {f"{s}.steps": max(1, round(getattr(run, s).steps * run.train_scale)) for s in STAGES})
    machine = start_machine(run)
    if run.stage in ("import", "export"):
        if machine.main:  # the work of one process
            import_released(run, machine) if run.stage == "import" else export_released(run, machine)
        return
    source, text_tokenizer = open_source(run, machine)
    check_text_tokenizer(text_tokenizer, run, source, machine)
    if run.bench:
        name = "align" if run.stage == "align" else "instruct"
        with explain_out_of_memory(name, run, machine):
            return bench(name, run, machine, source, text_tokenizer)
    stages = (run.stage,) if run.stage in STAGES else STAGES
    problems = [problem for name in stages for problem in start_problems(name, run, machine, source, text_tokenizer)]
    if run.dry_run:
        return dry_run(run, machine, source, text_tokenizer, stages, problems)
    if problems:  # nothing has been written so far
        raise ValueError(problems[0])
    if run.stage == "claims":
        claims(run, machine, source, text_tokenizer)
    else:
        train_stages(stages, run, machine, source, text_tokenizer)
    if machine.world_size > 1:
        dist.destroy_process_group()  # the others need not wait for the scores
    if machine.main and run.stage != "claims":
        draw_curves(run.out, Path(run.out) / "curves.png")
        if not run.data and "instruct" in stages:
            sample.score(sample.Pipeline.open(run.out, machine.device), Path(run.out))
            prompt = "A big red star at the top left on a green striped background"
            machine.say(f'look at {run.out}/sheet.png, then try\n    python sample.py {run.out} "{prompt}"')
        elif run.data and stages[-1] in STAGES[2:]:
            show_held_out(stages[-1], run, source, machine)
        machine.say(f"everything took {time.perf_counter() - started:.0f} s; the losses are drawn in {run.out}/curves.png"
                    + "; there are no scores, which need a built-in world" * bool(run.data))


def cli():
    """main, with errors that a user can fix as one line and exit code 2."""
    who = f"train.py: process {os.environ['RANK']}: " if "RANK" in os.environ else "train.py: "
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # an error of a data process comes with its traceback before it
        message, code = re.split(r"\nOriginal Traceback (?s:.*)\n[\w.]+: ", str(error))[-1].strip(), 2
    except torch.OutOfMemoryError as error:
        message, code = f"the device has too little memory for the model ({mentor.first_line(error)}): choose a smaller preset or model", 2
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on from the last checkpoint", 130
    else:
        return
    print(who + message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    cli()
