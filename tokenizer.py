"""The two tokenizers. The image tokenizer, a VQGAN, turns pixels into codes and codes into pixels:

    image (B, 3, S, S) in [-1, 1] --Encoder--> z --VectorQuantizer--> codes (B, N) --PixelDecoder--> image

It is LlamaGen's VQ-16 (arXiv 2406.06525), name for name: encoder and decoder of taming-transformers (arXiv
2012.09841) around a codebook of many vectors with few dimensions. The text tokenizer turns words into ids.
Last comes what all files share: user errors, configurations as flat keys, a model as a folder.
"""

import hashlib
import io
import json
import os
import random
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from textwrap import shorten

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the VQGAN; the defaults are the published VQ-16."""

    image_size: int = 512  # pixels per side
    ch: int = 128  # channels at full resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)  # channels of each level, in units of ch; all but one halve the image
    num_res_blocks: int = 2  # ResNet blocks per level (the decoder has one more)
    norm_groups: int = 32  # groups of every GroupNorm
    z_channels: int = 256  # channels at the grid, before the codebook's projection
    codebook_size: int = 16384
    codebook_dim: int = 8  # few dimensions keep every code in use (LlamaGen, table 2)
    beta: float = 0.25     # weight of the commitment loss, the pull of z towards its code

    def __post_init__(self):
        require(self.image_size % self.cell == 0,
                f"vqgan.image_size={self.image_size}: must be a multiple of {self.cell}")
        require(all(self.ch * m % self.norm_groups == 0 for m in self.ch_mult),
                f"vqgan.norm_groups={self.norm_groups}: must divide {self.ch} times each of {self.ch_mult}")

    @property
    def cell(self):
        """Pixels per side of a code's cell."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid_size(self):
        """Codes per side: an image is N = grid_size**2 codes in raster order."""
        return self.image_size // self.cell


def group_norm(channels, groups):
    """GroupNorm with VQGAN's eps."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def start_silent(conv):
    """Zero the last layer of a residual branch. A new VQGAN is then almost local, so that a code tells of its
    own cell; training adds norms and attention over the image where they help."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


class ResnetBlock(nn.Module):
    """Two convolutions with GroupNorm and swish, and a residual path. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        start_silent(self.conv2)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, for the lowest resolution. (B, C, H, W) -> same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        start_silent(self.proj_out)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)         # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the image by a strided convolution, padded on the right and below only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image by nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNet blocks of one resolution, at the lowest one each followed by attention; then resampling."""

    def __init__(self, in_channels, out_channels, blocks, groups, attention=nn.Identity,
                 downsample=nn.Identity, upsample=nn.Identity):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.res = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        # nn.Identity takes any arguments
        self.attn = nn.ModuleList(attention(out_channels, groups) for _ in self.res)
        self.downsample, self.upsample = downsample(out_channels), upsample(out_channels)

    def forward(self, x):
        for block, attention in zip(self.res, self.attn):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


def middle(channels, groups):
    """ResNet block, attention, ResNet block, at the lowest resolution."""
    return nn.ModuleList([ResnetBlock(channels, channels, groups), AttnBlock(channels, groups),
                          ResnetBlock(channels, channels, groups)])


class Encoder(nn.Module):
    """Pixels to features at the grid: (B, 3, S, S) -> (B, z_channels, grid_size, grid_size)."""

    def __init__(self, config):
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise([config.ch, *widths]), 1):
            kind = dict(attention=AttnBlock) if level == len(widths) else dict(downsample=Downsample)
            self.conv_blocks.append(Level(before, width, config.num_res_blocks, groups, **kind))
        self.mid = middle(width, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """Replace every vector by the nearest of the codebook, all of length 1 (LlamaGen 2.1), so that no code
    wins by being long."""

    def __init__(self, config):
        super().__init__()
        self.beta = config.beta
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight)  # uniform on the sphere once normalised

    def codebook(self):
        """The normalised codebook, (codebook_size, codebook_dim) float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, z):
        """z (B, C, h, w) -> the codes' vectors (B, C, h, w) float32 with a straight-through gradient, the
        loss (scalar), and codes (B, h, w) int64."""
        with torch.autocast(z.device.type, enabled=False):          # half precision merges close codes
            z = F.normalize(z.float().permute(0, 2, 3, 1), dim=-1)  # (B, h, w, C)
            codes = nearest(z.detach().flatten(0, 2), self.codebook()).view(z.shape[:3])
            z_q = F.embedding(codes, self.codebook())  # (B, h, w, C)
            # the codebook loss moves codes to outputs, the commitment loss outputs to codes
            loss = F.mse_loss(z_q, z.detach()) + self.beta * F.mse_loss(z, z_q.detach())
            z_q = z + (z_q - z).detach()  # the gradient skips the argmax
            return z_q.permute(0, 3, 1, 2), loss, codes

    def lookup(self, codes):
        """codes (B, h, w) int64 -> vectors (B, C, h, w) float32."""
        return F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)


def nearest(z, codebook):
    """z (M, C), codebook (V, C), all of length 1 -> nearest (M,) int64."""
    return torch.cat([(rows @ codebook.T).argmax(1) for rows in z.split(65536)])  # to save memory


class PixelDecoder(nn.Module):
    """Features at the grid to pixels, the encoder's mirror: (B, z_channels, h, w) -> (B, 3, S, S)."""

    def __init__(self, config):
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in reversed(config.ch_mult)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], groups)
        self.conv_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise([widths[0], *widths]), 1):
            attention = AttnBlock if level == 1 else nn.Identity
            upsample = Upsample if level < len(widths) else nn.Identity
            blocks = config.num_res_blocks + 1
            self.conv_blocks.append(Level(before, width, blocks, groups, attention, upsample=upsample))
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """The whole image tokenizer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantize = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = PixelDecoder(config)
        self.at_once = max(1, 2**21 // config.image_size**2)  # images; one of 512 pixels takes 0.6 GiB

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, S, S) in [-1, 1] -> codes (B, N) int64 in raster order."""
        codes = [self.quantize(self.quant_conv(self.encoder(part)))[2] for part in images.split(self.at_once)]
        return torch.cat(codes).flatten(1)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, N) int64 -> images (B, 3, S, S), about in [-1, 1] (not clamped)."""
        side = round(codes.shape[1] ** 0.5)
        parts = self.quantize.lookup(codes.view(-1, side, side)).split(self.at_once)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])


# --- Training it ---


@dataclass(frozen=True)
class StageConfig:
    """Training of any stage."""

    steps: int = 20000            # optimizer steps, before --train_scale
    global_batch: int = 128       # samples per step, of all processes
    lr: float = 5e-4              # AdamW's peak learning rate
    muon_lr: float = 0.0          # Muon's peak, for the matrices of hidden layers; 0: AdamW for all
    final_lr: float = 0.1         # final learning rate, as a fraction of the peak
    mix: str = "text_to_image:1"  # tasks and their shares


@dataclass(frozen=True)
class TokenizerStageConfig(StageConfig):
    """Training of the tokenizer, on the targets of its tasks."""

    steps: int = 100000
    lr: float = 1e-4
    mix: str = "text_to_image:3,segmentation:2"  # scenes and cut-outs
    codebook_weight: float = 1.0  # of the quantizer's loss, relative to the reconstruction's
    codebook_start: float = 0.0  # fraction of the steps after which features are rounded to codes
    consistency: float = 0.0  # weight of the loss that makes a code independent of its surroundings
    restart_every: int = 2000  # steps after which all codes are placed again
    disc_start: float = 0.5  # fraction of the steps without the discriminator; 1: there is none
    disc_weight: float = 0.5  # of the discriminator's loss


def collages(images, cells, step):
    """Roll each even image (B, 3, S, S) by `shift` cells and paste cells of it into the odd image after it:
    those in `same`, a window or all around one. Returns images, `same` (cells, cells) bool and shift (down,
    right); both depend on `step` alone."""
    rng = random.Random(step)
    top, bottom = sorted(rng.sample(range(cells + 1), 2))
    left, right = sorted(rng.sample(range(cells + 1), 2))
    same = torch.full((cells, cells), rng.random() < 0.5, device=images.device)
    same[top:bottom, left:right] ^= True
    shift, cell = (rng.randrange(cells), rng.randrange(cells)), images.shape[-1] // cells
    pixels = same.repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (S, S)
    images = images.clone()
    before, own = images[::2], images[1::2]
    moved = before[: len(own)].roll([cell * n for n in shift], (2, 3))
    own.copy_(torch.where(pixels, moved, own))
    return images, same, shift


def consistency_loss(z, same, shift):
    """Mean squared change of the same cells' features z (B, C, h, w) between images and their collages, over
    a pair's variance: a code then says what its cell shows, not what is around it, or where."""
    pairs = F.normalize(z.float(), dim=1)[: len(z) // 2 * 2].unflatten(0, (-1, 2))  # (K, 2, C, h, w)
    change = (pairs[:, 0].roll(shift, (2, 3)) - pairs[:, 1]).square().mean(1)       # (K, h, w)
    spread = (pairs - pairs.mean((1, 3, 4), keepdim=True)).square().mean((1, 2, 3, 4))  # (K,)
    return ((change * same).sum((1, 2)) / spread).sum() / (same.sum() * len(pairs)).clamp(min=1)


def spread_codes(z, size, generator):
    """Codes (size, C) for features z (M, C): k-means++, which draws each centre far from those before, then
    one step of k-means. The 16th power of the distance, not the square, gives rare content a code before
    common content gets two, between which a model could only guess."""
    z = F.normalize(z.float(), dim=-1)
    centers, squared = z[:1], torch.full_like(z[:, 0], torch.inf)
    while len(centers) < size:
        squared = torch.minimum(squared, (z - centers[-1]).square().sum(-1))
        weights = (squared / squared.max().clamp(min=1e-9)) ** 8 + 1e-30
        centers = torch.cat([centers, z[torch.multinomial(weights, 1, generator=generator)]])
    sums = torch.zeros_like(centers).index_add_(0, nearest(z, centers), z)
    return F.normalize(torch.where(sums.any(-1, keepdim=True), sums, centers), dim=-1)


class PatchDiscriminator(nn.Module):
    """Says of each patch whether it looks real: (B, 3, S, S) -> logits (B, 1, h, w). PatchGAN (arXiv
    1611.07004) with GroupNorm, not BatchNorm."""

    def __init__(self, ch=64):
        super().__init__()
        blocks = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            blocks += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.GroupNorm(16, width),
                       nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images):
        return self.net(images)


def hinge_d_loss(real, fake):
    """The discriminator's hinge loss, of its logits for real and made images."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction, adversarial, last_layer, average):
    """VQGAN's balance of two losses (arXiv 2012.09841, eq. 7): the ratio of their gradients' lengths at the
    last layer."""
    norms = [average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
             for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


class TokenizerStage(nn.Module):
    """A VQGAN with its losses (extras/photos.py adds LPIPS)."""

    def __init__(self, run, machine, image):
        """run, machine: train.py's; image(i): training image i, (3, S, S); the first ones place the codes."""
        super().__init__()
        self.config, self.machine, self.image = run.tokenizer, machine, image
        self.model = VQGAN(run.vqgan)
        self.register_buffer("counts", torch.zeros(run.vqgan.codebook_size).long())  # uses of each code
        self.codebook_start = round(self.config.codebook_start * self.config.steps)
        self.disc_start = round(self.config.disc_start * self.config.steps)
        self.own_optimizers = []  # beside those of the training loop
        self.seen = []  # a step's made pictures and images, for the discriminator
        if self.config.disc_start < 1:
            self.disc = PatchDiscriminator().requires_grad_(False)  # but in its own step
            optimizer = torch.optim.AdamW(self.disc.parameters(), self.config.lr, betas=(0.5, 0.9))
            self.own_optimizers.append(optimizer)

    def reconstruction_loss(self, made, images):
        """How far the made pictures are from the images, both (B, 3, S, S): scalar."""
        return F.mse_loss(made, images)

    def reconstruct(self, images, step):
        """(made pictures, reconstruction loss, quantizer's loss, features z, codes) of images. Before
        codebook_start z is not rounded to codes: the encoder first learns what to tell apart."""
        z = self.model.quant_conv(self.model.encoder(images))
        z_q, quantizer_loss, codes = self.model.quantize(z)
        if step < self.codebook_start:
            z_q, quantizer_loss = F.normalize(z.float(), dim=1), 0 * quantizer_loss  # grad 0, not None
        made = self.model.decoder(self.model.post_quant_conv(z_q.to(z.dtype))).float()
        return made, self.reconstruction_loss(made, images), quantizer_loss, z, codes

    def validation_loss(self, batch):
        """The loss without collages and discriminator: scalar."""
        _, reconstruction, quantizer_loss, _, _ = self.reconstruct(batch.targets, self.config.steps)
        return reconstruction + self.config.codebook_weight * quantizer_loss

    def forward(self, batch, step):
        """(loss, logs) of a batch."""
        config, images = self.config, batch.targets
        if config.consistency:
            images, same, shift = collages(images, self.model.config.grid_size, step)
        made, reconstruction, quantizer_loss, z, codes = self.reconstruct(images, step)
        loss = reconstruction + config.codebook_weight * quantizer_loss
        logs = {"reconstruction": reconstruction.detach()}
        if config.consistency:
            change = consistency_loss(z, same, shift)
            loss, logs["consistency"] = loss + config.consistency * change, change.detach()
        # the discriminator learns a little before it judges
        if step >= self.disc_start:
            self.seen.append((made.detach(), images))
        if step >= 1.05 * self.disc_start:
            adversarial, last_layer = -self.disc(made).mean(), self.model.decoder.conv_out.weight
            weight = adaptive_weight(reconstruction, adversarial, last_layer, self.machine.average)
            loss, logs["d_weight"] = loss + config.disc_weight * weight * adversarial, weight
        codes = codes.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(codes)).float()
        self.counts += (self.machine.average(counts) * self.machine.world_size).round().long()
        return loss, logs

    def after_step(self, step):
        """The discriminator's step. At codebook_start, then every restart_every steps, place all codes."""
        if self.seen:
            self.discriminator_step()
        done = step + 1 - self.codebook_start
        if done < 0 or done % self.config.restart_every:
            return
        share = self.counts / self.counts.sum()
        used, perplexity = (share > 0).float().mean(), torch.special.entr(share).sum().exp()
        self.machine.say(f"tokenizer: {used:.0%} of the codes in use, perplexity {perplexity:.0f}")
        self.counts.zero_()
        if not done or step + 1 <= 0.8 * self.config.steps:  # later ones would have no time to settle
            self.place_codes(step)

    def discriminator_step(self):
        """Train the discriminator to tell the step's pictures from the images."""
        self.disc.requires_grad_(True)
        for made, images in self.seen:
            with self.machine.autocast():
                loss = hinge_d_loss(self.disc(images).float(), self.disc(made).float())
            (loss / len(self.seen)).backward()
        for p in self.disc.parameters():
            self.machine.average(p.grad)
        optimizer, = self.own_optimizers
        optimizer.step()
        optimizer.zero_grad()
        self.disc.requires_grad_(False)
        self.seen = []

    @torch.no_grad()
    def place_codes(self, step):
        """Place all codes on features of the first images, 64 features per code."""
        model, weight = self.model, self.model.quantize.embedding.weight
        few = max(1, 64 * len(weight) // model.config.grid_size**2)
        images = torch.stack([self.image(i) for i in range(few)]).to(weight.device)
        z = torch.cat([model.quant_conv(model.encoder(part)) for part in images.split(model.at_once)])
        z = z.permute(0, 2, 3, 1).flatten(0, 2)  # (few * N, C)
        weight.copy_(spread_codes(z, len(weight), torch.Generator(weight.device).manual_seed(step)))
        if self.machine.world_size > 1:
            torch.distributed.broadcast(weight, 0)


# --- The text tokenizer ---

# Thai to Khmer, Japanese, Chinese: scripts without spaces between words
SPACELESS = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
             "\U00020000-\U0003ffff")


def words_apart(text):
    """A text with spaces around its punctuation and around each character of a script without spaces."""
    return re.sub(rf"([^\w\s]|[{SPACELESS}])", r" \1 ", text)


class TextTokenizer:
    """SentencePiece with T5's ids: 0 pad, 1 </s>, 2 unknown, the pieces, <extra_id_99> .. <extra_id_0>,
    <image>. The text after such a token starts with a space again, as in transformers' T5."""

    PAD, EOS, UNKNOWN = 0, 1, 2

    def __init__(self, proto):
        """proto: the bytes of a SentencePiece model (`spiece.model`)."""
        self.proto, self.digest = proto, hashlib.sha256(proto).hexdigest()[:16]
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ValueError(f"spiece.model cannot be read: {error}") from None
        self.whole_words = len(self.pieces.encode("a.b")) == 1  # our own; T5 has parts of words
        first = self.pieces.vocab_size()
        self.added = {"<pad>": self.PAD, "</s>": self.EOS, "<unk>": self.UNKNOWN}
        self.added |= {f"<extra_id_{99 - i}>": first + i for i in range(100)}
        self.image_id = self.added["<image>"] = first + 100
        self.vocab_size = first + 101
        self.split = re.compile("(" + "|".join(map(re.escape, self.added)) + ")")

    def encode(self, text, image_tokens=1):
        """The text's ids and </s>; each <image> becomes `image_tokens` ids."""
        ids = []
        for part in self.split.split(text):
            if part in self.added:
                ids += [self.added[part]] * (image_tokens if part == "<image>" else 1)
            else:
                ids += self.pieces.encode(words_apart(part) if self.whole_words else part)
        return ids + [self.EOS]

    def unknown_words(self, text):
        """The words of a text that the model lacks, each once."""
        words = dict.fromkeys(words_apart(text.replace("<image>", " ")).split())
        return [word for word in words if self.UNKNOWN in self.pieces.encode(word)]

    def known_words(self):
        """All words of a model of whole words."""
        return [self.pieces.id_to_piece(i).removeprefix("▁") for i in range(3, self.pieces.vocab_size())]

    @classmethod
    def train(cls, sentences):
        """A new one of the sentences' 32,000 most frequent words and punctuation marks, in lower case."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(words_apart, sentences), model_writer=model, model_type="word",
            vocab_size=32_000, hard_vocab_limit=False, max_sentence_length=2**30, character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf", minloglevel=2,
            pad_id=cls.PAD, eos_id=cls.EOS, unk_id=cls.UNKNOWN, bos_id=-1)
        return cls(model.getvalue())


# --- Shared by all files ---


def require(right, message):
    """Unless `right`, raise a ValueError: a user's mistake, which the command line prints as one line."""
    if not right:
        raise ValueError(message)


def flatten(config, prefix=""):
    """{dotted key: value} of a nested config."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return flat


def rebuild(config, flat, prefix=""):
    """The nested config with flat's values, all at once, so that it is checked as a whole."""
    values = {}
    for f in fields(config):
        value, key = getattr(config, f.name), prefix + f.name
        value = rebuild(value, flat, key + ".") if is_dataclass(value) else flat[key]
        values[f.name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    return replace(config, **values)


def write_atomically(path, write):
    """Call write(temporary path), then rename that file: a kill leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask, which safetensors ignores
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, for Python, torch, safetensors
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error


def write_json(path, values):
    """Write a JSON file."""
    write_atomically(path, lambda file: file.write_text(json.dumps(values, indent=2) + "\n"))


def save_model(model, folder):
    """Write config.json, then model.safetensors, which completes the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", flatten(model.config))
    write_atomically(folder / "model.safetensors", lambda file: save_file(model.state_dict(), file))


def load_model(cls, config, folder):
    """Load what save_model wrote. config: any of its class."""
    file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    require(weights.is_file(), f"{weights} is missing: train the stage {weights.parent.name} first")
    with open(weights, "rb") as start:
        require(start.read(7) != b"version", f"{weights} is a Git LFS pointer: run `git lfs pull`")
    try:
        flat = json.loads(file.read_text())
        wrong = set(flat) ^ set(flatten(config))
        require(not wrong, f"unknown or missing keys {', '.join(wrong)}")
        with torch.device("meta"):  # the weights are read, not initialised
            model = cls(rebuild(config, flat))
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
        model.load_state_dict(tensors, assign=True)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        error = shorten(str(error), 300)
        raise ValueError(f"{folder} holds no {cls.__name__} that can be read: {error}") from None
    for name, tensor in tensors.items():
        require(tensor.isfinite().all(), f"{weights}: {name} is not finite")
    return model.eval()


def file_hash(path):
    """The first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
