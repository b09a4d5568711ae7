"""The image tokenizer: a VQGAN that turns pixels into codes and codes into pixels.

    image (B, 3, S, S) in [-1, 1] --Encoder--> z --VectorQuantizer--> codes (B, N) --PixelDecoder--> image

This is LlamaGen's VQ-16 (arXiv 2406.06525, section 2.1), as MENTOR uses it: taming-transformers' convolutional
encoder and decoder (arXiv 2012.09841) around a codebook of many vectors of few dimensions and length 1. Only a new
one's start differs (start_silent). Parameters have their released names, so `vq_ds16_t2i.pt` loads name for name.

Read in order: TokenizerConfig and PRESETS, the blocks, Encoder, VectorQuantizer, PixelDecoder, VQGAN; then
what only its training needs: PatchDiscriminator, LPIPS, the losses, collages, spread_codes and CodebookUsage.
"""

import pickle
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from mentor import check_fields, check_fit, first_line, load_folder, save_folder


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the VQGAN; the defaults are the published VQ-16."""

    image_size: int = 512                 # pixels per side; a multiple of `downsample`
    ch: int = 128                         # channels at full resolution
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, in units of `ch`; each level halves the image
    num_res_blocks: int = 2               # ResNet blocks per level (the decoder has one more)
    norm_groups: int = 32                 # groups of every GroupNorm; must divide every level's channels
    z_channels: int = 256                 # channels at the grid, before the codebook's projection
    codebook_size: int = 16384            # codes; the image decoder must have as many
    codebook_dim: int = 8                 # few dimensions keep every code in use (LlamaGen, table 2)
    beta: float = 0.25                    # weight of the commitment loss, the pull of z towards its code

    def __post_init__(self):
        check_fields(self)
        if self.image_size % self.downsample:
            legal = ", ".join(str(self.downsample * g) for g in (8, 16, 24, 32))
            raise ValueError(f"image_size={self.image_size} is no multiple of the downsampling factor {self.downsample}; "
                             f"legal sizes are for example {legal}")
        for multiple in self.ch_mult:
            if self.ch * multiple % self.norm_groups:
                raise ValueError(f"norm_groups={self.norm_groups} does not divide {self.ch * multiple} channels "
                                 f"(ch={self.ch}, ch_mult={self.ch_mult})")

    @property
    def downsample(self):
        """Pixels per side of one code's cell."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid_size(self):
        """Codes per side: an image is grid_size**2 codes in raster order."""
        return self.image_size // self.downsample


PRESETS = {
    "tiny": TokenizerConfig(image_size=32, ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, norm_groups=1, z_channels=64, codebook_size=256),
    "small": TokenizerConfig(image_size=64, ch=64, ch_mult=(1, 2, 2), z_channels=128, codebook_size=2048),
    "base": TokenizerConfig(image_size=256, codebook_size=8192),
    "full": TokenizerConfig(),
    "multi": TokenizerConfig(),
}


def group_norm(channels, groups):
    """The GroupNorm used everywhere in the VQGAN (eps 1e-6, not PyTorch's 1e-5)."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def start_silent(conv):
    """Zero the last layer of a residual branch. A new VQGAN is then purely local; normalisation over the picture and attention
    come in only where training wants them, so a code says more about its own cell."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and swish, and a residual path (VQGAN). (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        start_silent(self.conv2)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions (VQGAN). Used only where the grid is smallest: its cost is
    quadratic in the number of positions. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        start_silent(self.proj_out)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # each (B, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)         # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the image with a strided convolution, padded on the right and below only, as VQGAN does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the image: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The ResNet blocks of one resolution, each followed by attention at the lowest one, then down- or upsampling."""

    def __init__(self, in_channels, out_channels, blocks, groups, attention, resize=None):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) if attention else nn.Identity() for _ in range(blocks))
        self.downsample = Downsample(out_channels) if resize is Downsample else nn.Identity()
        self.upsample = Upsample(out_channels) if resize is Upsample else nn.Identity()

    def forward(self, x):
        for block, attention in zip(self.res, self.attn):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


def middle(channels, groups):
    """ResNet block, attention, ResNet block at the lowest resolution."""
    return nn.ModuleList([ResnetBlock(channels, channels, groups), AttnBlock(channels, groups), ResnetBlock(channels, channels, groups)])


class Encoder(nn.Module):
    """Pixels to features at the grid: (B, 3, S, S) -> (B, z_channels, S/downsample, S/downsample)."""

    def __init__(self, config):
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise([config.ch, *widths])):
            lowest = level == len(widths) - 1
            self.conv_blocks.append(Level(before, width, config.num_res_blocks, groups, lowest, None if lowest else Downsample))
        self.mid = middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """Replace every vector by the nearest of `codebook_size` learned ones, both L2-normalised (LlamaGen 2.1). On the unit sphere
    "nearest" is "largest cosine", so a code cannot win by being long, and 8 dimensions are enough to keep 16,384 codes in use."""

    def __init__(self, config):
        super().__init__()
        self.beta = config.beta
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.normal_(self.embedding.weight)  # uniform on the sphere once normalised

    def codebook(self):
        """The normalised codebook, (codebook_size, codebook_dim) float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, z):
        """Quantize z (B, C, h, w) of any dtype.

        Returns the codes' vectors (B, C, h, w) float32 with a straight-through gradient, the loss (codebook + beta *
        commitment, scalar), and codes (B, h, w) int64. Autocast is off: half precision merges close codes.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float().permute(0, 2, 3, 1), dim=-1)    # (B, h, w, C)
            codebook = self.codebook()
            with torch.no_grad():
                codes = self.nearest(z.flatten(0, 2), codebook).view(z.shape[:3])
            z_q = F.embedding(codes, codebook)                        # (B, h, w, C)
            # The codebook loss moves codes to the encoder's outputs; the commitment loss keeps outputs near their codes.
            loss = F.mse_loss(z_q, z.detach()) + self.beta * F.mse_loss(z, z_q.detach())
            z_q = z + (z_q - z).detach()                              # straight-through: the gradient skips the argmin
            return z_q.permute(0, 3, 1, 2), loss, codes

    @staticmethod
    def nearest(z, codebook):
        """Index of the nearest code for each row of z (M, C): (M,) int64. |z - e|^2 = 2 - 2 z.e on the sphere."""
        return torch.cat([(chunk @ codebook.T).argmax(1) for chunk in z.split(65536)])

    def lookup(self, codes):
        """codes (B, h, w) int64 -> vectors (B, C, h, w) float32."""
        return F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)


class PixelDecoder(nn.Module):
    """Features at the grid to pixels, the encoder's mirror: (B, z_channels, h, w) -> (B, 3, S, S)."""

    def __init__(self, config):
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult][::-1]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], groups)
        self.conv_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
            highest = level == len(widths) - 1
            self.conv_blocks.append(Level(before, width, config.num_res_blocks + 1, groups, level == 0, None if highest else Upsample))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


PIXELS_AT_ONCE = 2**21  # to encode or decode: a picture of 512 x 512 takes 0.6 GiB on the way


class VQGAN(nn.Module):
    """The whole tokenizer. Only its own training (train.TokenizerStage) uses more than `encode`, `decode` and the codebook."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantize = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = PixelDecoder(config)

    def forward(self, images):
        """Images (B, 3, S, S) in [-1, 1] -> reconstruction (same shape), quantizer loss (scalar), codes (B, h, w)."""
        z_q, loss, codes = self.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(z_q)), loss, codes

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, S, S) in [-1, 1] -> codes (B, N) int64 in raster order."""
        parts = images.split(self.at_once())
        return torch.cat([self.quantize(self.quant_conv(self.encoder(part)))[2] for part in parts]).flatten(1)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, N) int64 of a square grid -> images (B, 3, S, S), about in [-1, 1] (not clamped)."""
        side = round(codes.shape[1] ** 0.5)
        if side * side != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes are no square grid; expected {self.config.grid_size ** 2}")
        parts = self.quantize.lookup(codes.view(-1, side, side)).split(self.at_once())
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    def at_once(self):
        """How many pictures to encode or decode together."""
        return max(1, PIXELS_AT_ONCE // self.config.image_size**2)

    def save_pretrained(self, folder):
        """Write `config.json` and `model.safetensors` into the folder."""
        save_folder(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder):
        """Read what save_pretrained wrote. Raises ValueError naming the file when one is missing."""
        return load_folder(cls, TokenizerConfig, folder, "python train.py PRESET --stage=tokenizer")


# --- For training only -------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """Judges whether each patch looks real (PatchGAN, arXiv 1611.07004): (B, 3, S, S) -> (B, 1, h, w) logits. GroupNorm instead of
    pix2pix's BatchNorm, so that a sample's score does not depend on its batch or its GPU."""

    def __init__(self, ch=64):
        super().__init__()
        blocks = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width, stride in ((ch, 2 * ch, 2), (2 * ch, 4 * ch, 2), (4 * ch, 8 * ch, 1)):
            blocks += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.GroupNorm(16, width), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images):
        return self.net(images)


class LPIPS(nn.Module):
    """Perceptual distance in VGG16's features (arXiv 1801.03924), from two local files. `folder` holds torchvision's
    `vgg16-397923af.pth` and LPIPS v0.1's linear heads `vgg.pth`. There is no random fallback: without them train.py runs without
    this loss and prints that. Raises ValueError naming a missing or broken file."""

    LAYERS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's five convolution blocks

    def __init__(self, folder):
        super().__init__()
        self.blocks, index, before, vgg, heads = nn.ModuleList(), 0, 3, {}, {}           # the last two: {name in its file: tensor here}
        for i, widths in enumerate(self.LAYERS):
            block = nn.Sequential()
            for width in widths:
                conv = nn.Conv2d(before, width, 3, padding=1)
                vgg.update({f"features.{index}.{name}": p.data for name, p in conv.named_parameters()})
                block.extend([conv, nn.ReLU()])
                index, before = index + 2, width
            self.blocks.append(block)
            index += 1  # the max-pool after each block
            self.register_buffer(f"head{i}", torch.empty(1, before, 1, 1))
            heads[f"lin{i}.model.1.weight"] = getattr(self, f"head{i}")
        for file, tensors in ((Path(folder) / "vgg16-397923af.pth", vgg), (Path(folder) / "vgg.pth", heads)):
            if not file.is_file():
                raise ValueError(f"lpips={folder}: {file} is missing; give a folder with torchvision's vgg16-397923af.pth and "
                                 "LPIPS v0.1's vgg.pth, or leave lpips empty")
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                loaded = {name: loaded[name] for name in tensors if name in loaded}      # VGG16 has a classifier, too
                check_fit(tensors, loaded)
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, pickle.UnpicklingError, EOFError) as error:
                raise ValueError(f"lpips={folder}: {file} is broken, or of another network ({first_line(error)}): "
                                 "download it again") from None
            for name, tensor in tensors.items():
                tensor.copy_(loaded[name])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, a, b):
        """Mean distance between two image batches (B, 3, S, S) in [-1, 1]: scalar."""
        x, total = (torch.cat([a, b]) - self.shift) / self.scale, 0.0
        for i, block in enumerate(self.blocks):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            fa, fb = F.normalize(x, dim=1, eps=1e-10).chunk(2)
            total = total + F.conv2d((fa - fb).square(), getattr(self, f"head{i}")).mean()
        return total


def hinge_d_loss(real, fake):
    """The discriminator's hinge loss on its logits for real and generated patches: scalar."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


WEIGHT_LIMIT = 1e4  # of the adaptive weight


def adaptive_weight(reconstruction_loss, generator_loss, last_layer, average=lambda gradient: gradient):
    """VQGAN's balance of its two losses (eq. 7): the ratio of their gradients at the decoder's last layer, in [0, WEIGHT_LIMIT].
    `average` turns the gradient of one process's loss into that of all."""
    losses = reconstruction_loss, generator_loss
    norms = [average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm() for loss in losses]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, WEIGHT_LIMIT).detach()


def collages(targets, cells, step):
    """Turn every second of the targets (B, 3, S, S) into a collage: the cells in `kept`, of `cells` per side, show the picture
    before it, the others its own content. Which ones (a window, or all but one) depends only on `step`. Returns the new targets and
    `kept` (cells, cells) bool."""
    rng = random.Random(step)
    top, bottom = sorted(rng.sample(range(cells + 1), 2))
    left, right = sorted(rng.sample(range(cells + 1), 2))
    kept = torch.full((cells, cells), rng.random() < 0.5)
    kept[top:bottom, left:right] ^= True
    kept = kept.to(targets.device)
    cell, paired = targets.shape[-1] // cells, len(targets) // 2 * 2  # pixels per side; all but an odd last one
    pixels = kept.repeat_interleave(cell, 0).repeat_interleave(cell, 1)                  # (S, S)
    targets = targets.clone()
    targets[1:paired:2] = torch.where(pixels, targets[:paired:2], targets[1:paired:2])
    return targets, kept


def consistency_loss(z, kept):
    """Mean squared change of a kept cell's encoder output, z (B, C, h, w), between a picture and its collage, where its
    surroundings differ, on the unit sphere on which codes are chosen."""
    z = F.normalize(z.float(), dim=1)
    before, after = z[: len(z) // 2 * 2 : 2], z[1::2]
    return ((before - after).square().mean(1) * kept).sum() / (kept.sum() * len(after)).clamp(min=1)


def spread_codes(z, size, generator):
    """`size` codes (size, C) for encoder outputs z (M, C): k-means++ (Arthur and Vassilvitskii, 2007), then one step of k-means.
    Each next centre is drawn from z, and outputs far from all centres so far are likelier. k-means++ weights them by the squared
    distance; the 16th power here prefers rare content to one more shade of common content. Two codes with one meaning are a choice
    that nothing in the picture explains, and the image decoder would have to guess it."""
    z = F.normalize(z.float(), dim=-1)
    centers, distance = z[:1], torch.full_like(z[:, 0], torch.inf)
    while len(centers) < size:
        distance = torch.minimum(distance, (z - centers[-1]).square().sum(-1))
        weights = (distance / distance.max().clamp(min=1e-9)) ** 8 + 1e-30               # 1e-30: all outputs may be centres
        centers = torch.cat([centers, z[torch.multinomial(weights, 1, generator=generator)]])
    nearest = VectorQuantizer.nearest(z, centers)
    means = torch.zeros_like(centers).index_add_(0, nearest, z)
    return F.normalize(torch.where(means.any(-1, keepdim=True), means, centers), dim=-1)  # a centre drawn twice has outputs once


class CodebookUsage:
    """How often each code was chosen since the codes were last placed. Counted over a window of steps: one batch's perplexity
    depends more on the batch than on the codebook."""

    def __init__(self, codebook_size, device):
        self.counts = torch.zeros(codebook_size, dtype=torch.long, device=device)

    def add(self, codes):
        """Count a batch of codes, any shape, int64."""
        self.counts.index_add_(0, codes.flatten(), self.counts.new_ones(codes.numel()))  # bincount would wait for the GPU

    def usage(self):
        """Share of the codes chosen at least once in the window, in [0, 1]."""
        return (self.counts > 0).float().mean().item()

    def perplexity(self):
        """exp(entropy) of the window's code distribution, in [1, codebook_size]."""
        p = self.counts / self.counts.sum().clamp(min=1)
        return torch.exp(-(p * (p + 1e-10).log()).sum()).item()

    def reset(self):
        """Start a new window."""
        self.counts.zero_()
