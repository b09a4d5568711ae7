"""The model of MENTOR (arXiv 2507.09574): a prompt of words and pictures becomes a prefix, the prefix becomes an image.

    pixels --VisionEncoder--> patches --Connector--> image tokens ┐
                                                                  ├ splice --TextEncoder--> hidden states
    text ids ------------------------> word embeddings -----------┘
    hidden states --Projector--> prefix --ImageDecoder--> image codes, one after the other (eqs. 1 and 2)

One sequence, no cross-attention: the decoder sees [prefix | codes] and predicts the next code. The file follows the
data: configs and PRESETS, vision encoder (CLIP), connectors, text encoder (T5), the three as one, projector, decoder
(Llama with LlamaGen's 2-D rotary embedding), Mentor, which puts them together, and last files and the names that released
weights go by. Nothing here knows about training: see `sample.py` for drawing and `train.py` for training.

Shapes: B samples, M images in all prompts together, L text positions, P prefix positions, N = grid_size**2 codes,
D the width of the module in question, V codebook_size.
"""

import argparse
import json
import math
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# --- Configuration: the defaults are the published model, PRESETS holds what differs -----------------------------


LIMITS = {  # smallest and largest legal value of a number, by its name; others: whole 1 to 2**20, fractions from 0 up
    "image_size": (1, 2**14), "patch_size": (1, 2**10), "grid_size": (1, 2**10), "n_layer": (1, 1000), "num_res_blocks": (1, 100),
    "dropout": (0, 1), "cfg_scale": (0, 10**6), "temperature": (0, 10**6), "top_k": (0, 2**20), "top_p": (0, 1)}


def check_fields(config, prefix="", limits=LIMITS):
    """Raise ValueError naming the first field of a (nested) config whose value has the wrong type or is out of its limits."""
    for f in fields(config):
        name, value = prefix + f.name, getattr(config, f.name)
        if is_dataclass(value):
            check_fields(value, name + ".", limits)
            continue
        if f.type in (int, float):
            low, high = limits.get(f.name, (1, 2**20) if f.type is int else (0, math.inf))
            is_number = isinstance(value, (int, f.type)) and not isinstance(value, bool)
            fine = is_number and low <= value <= high and value != math.inf
            legal = f"a {'whole ' if f.type is int else ''}number from {low} " + (f"to {high}" if high != math.inf else "up")
        elif f.type in (str, bool):
            fine, legal = isinstance(value, f.type), "text" if f.type is str else "true or false"
        else:
            fine = isinstance(value, tuple) and 0 < len(value) <= 10 and all(type(v) is int and 0 < v <= 1024 for v in value)
            legal = "1 to 10 whole numbers from 1 to 1024"
        if not fine:
            raise ValueError(f"{name}={value!r:.80} is not legal: it must be {legal}")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's vision transformer; by default ViT-L/14."""

    image_size: int = 224   # pixels per side
    patch_size: int = 14    # pixels per side
    width: int = 1024       # channels of a patch's features
    n_layer: int = 24       # blocks; features are taken before the last one
    n_head: int = 16        # attention heads; must divide the width
    mlp_width: int = 4096   # hidden width of a block's MLP

    @property
    def n_patch(self):
        """Patches per image, and so features."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ConnectorConfig:
    """The part that turns patches into tokens of the text encoder."""

    kind: str = "mlp"       # mlp: one token per patch; query: n_query learned queries that read patches and words
    n_query: int = 32       # tokens per image with kind=query
    width: int = 768        # of the query connector; the MLP uses the text encoder's
    n_layer: int = 6        # of the query connector
    n_head: int = 12        # of the query connector


@dataclass(frozen=True)
class TextConfig:
    """T5's encoder; by default Flan-T5-XL's."""

    vocab_size: int = 32128 # rows of the word table; at least the text tokenizer's ids
    width: int = 2048       # of a token
    n_layer: int = 24       # blocks
    n_head: int = 32        # attention heads
    head_width: int = 64    # of each head, whatever the width
    mlp_width: int = 5120   # hidden width of a block's gated MLP
    n_bucket: int = 32      # relative distances are sorted into this many buckets, each with a bias per head
    max_distance: int = 128 # from this many positions on, all distances share a bucket
    dropout: float = 0.1    # on embeddings, in every block, and at the end


@dataclass(frozen=True)
class DecoderConfig:
    """The image decoder; by default LlamaGen-XL, for 512-pixel images."""

    codebook_size: int = 16384  # codes; as many as the tokenizer has
    grid_size: int = 32     # codes per side
    width: int = 1280       # of a position; a multiple of 4 * n_head
    n_layer: int = 36       # blocks
    n_head: int = 20        # attention heads
    prefix_rotation: str = "identity"  # the prefix is not rotated; zero: its queries and keys are erased, for LlamaGen's own weights
    multiple_of: int = 256  # the MLP's hidden width is 8/3 of the width, rounded up to a multiple of this
    dropout: float = 0.1    # on embeddings, attention output and MLP output

    @property
    def n_code(self):
        """Codes per image."""
        return self.grid_size**2


@dataclass(frozen=True)
class SamplingConfig:
    """Default sampling, stored with the weights."""

    cfg_scale: float = 7.5      # guidance: 1 is the conditional model alone, 0 the unconditional one
    temperature: float = 1.0    # 0 is greedy
    top_k: int = 0              # keep the k best codes; 0 keeps all
    top_p: float = 1.0          # keep the best codes up to this total probability; 1 keeps all


@dataclass(frozen=True)
class MentorConfig:
    """The whole model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    context: int = 512          # longest prefix, and rows of the unconditional table

    def __post_init__(self):
        check_fields(self)
        vision, connector, text, decoder = self.vision, self.connector, self.text, self.decoder
        for key, fine, legal in (
            ("vision.image_size", vision.image_size % vision.patch_size == 0, f"a multiple of vision.patch_size={vision.patch_size}"),
            ("vision.width", vision.width % vision.n_head == 0, f"a multiple of vision.n_head={vision.n_head}"),
            ("text.n_bucket", text.n_bucket >= 4, "at least 4"),
            ("text.max_distance", text.max_distance > text.n_bucket // 4, f"more than text.n_bucket // 4 = {text.n_bucket // 4}"),
            ("connector.kind", connector.kind in ("mlp", "query"), "mlp or query"),
            ("connector.width", connector.width % connector.n_head == 0, f"a multiple of connector.n_head={connector.n_head}"),
            ("decoder.width", decoder.width % (4 * decoder.n_head) == 0,
             f"a multiple of 4 * decoder.n_head={4 * decoder.n_head}, so that rotary pairs split into rows and columns"),
            ("decoder.prefix_rotation", decoder.prefix_rotation in ("identity", "zero"), "identity or zero"),
            ("context", self.context > self.image_tokens, f"more than the {self.image_tokens} tokens of one image"),
        ):
            if not fine:
                raise ValueError(f"{key}={attrgetter(key)(self)} is not legal: it must be {legal}")

    @property
    def image_tokens(self):
        """Tokens per <image> in the prompt."""
        return self.connector.n_query if self.connector.kind == "query" else self.vision.n_patch


def from_dict(cls, values):
    """Build a (nested) config dataclass from what json.loads returned. Raises ValueError naming an unknown key or an illegal value."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} needs keys and values, not {str(values)[:80]}")
    types, arguments = {f.name: f.type for f in fields(cls)}, {}
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"{cls.__name__} has no key {key!r}; it has {', '.join(types)}")
        if is_dataclass(types[key]):
            value = from_dict(types[key], value)
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


PRESETS = {
    # 32-pixel worlds: trains in minutes on two CPU cores
    "tiny": MentorConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=128, n_layer=2, n_head=4, mlp_width=256),
        connector=ConnectorConfig(n_query=8, width=96, n_layer=2, n_head=4),
        text=TextConfig(vocab_size=2048, width=128, n_layer=2, n_head=4, head_width=32, mlp_width=256, dropout=0.0),
        decoder=DecoderConfig(codebook_size=256, grid_size=8, width=96, n_layer=4, n_head=4, multiple_of=32, dropout=0.0),
        sampling=SamplingConfig(cfg_scale=2.0, temperature=0.6),
        context=96),
    # 64-pixel worlds: for one GPU
    "small": MentorConfig(
        vision=VisionConfig(image_size=64, patch_size=8, width=256, n_layer=6, n_head=4, mlp_width=1024),
        connector=ConnectorConfig(n_query=16, width=256, n_layer=2, n_head=4),
        text=TextConfig(vocab_size=2048, width=256, n_layer=4, n_head=4, head_width=64, mlp_width=512, dropout=0.0),
        decoder=DecoderConfig(codebook_size=2048, grid_size=16, width=384, n_layer=8, n_head=6, dropout=0.05),
        sampling=SamplingConfig(cfg_scale=3.0),
        context=192),
    # 256-pixel photographs: for a few GPUs
    "base": MentorConfig(
        text=TextConfig(width=768, n_layer=12, n_head=12, mlp_width=2048),
        decoder=DecoderConfig(codebook_size=8192, grid_size=16, width=768, n_layer=12, n_head=12)),
    # the published model, and the same with context for four images
    "full": MentorConfig(),
    "multi": MentorConfig(context=1280),
}

# --- Vision encoder ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with biases, from x to `context` (itself by default). (B, L, D) -> (B, L, D)."""

    def __init__(self, width, n_head, context_width=None):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width or width, width)
        self.v = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (linear(y).unflatten(-1, (self.n_head, -1)).transpose(1, 2)             # (B, H, L, D/H)
                   for linear, y in ((self.q, x), (self.k, context), (self.v, context)))
        if len(x) == 0:  # no images in the batch: torch before 2.10 refuses this on CUDA; the sum keeps all weights in the graph
            y = q + k.sum(2, keepdim=True) + v.sum(2, keepdim=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                  # (B, H, L, D/H)
        return self.out(y.transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    """A pre-norm transformer block with quick-GELU (CLIP)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.n_head)
        self.norm2 = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))  # quick-GELU


class VisionEncoder(nn.Module):
    """CLIP's vision transformer (arXiv 2103.00020): pixels (M, 3, S, S), CLIP-normalised, to patch features."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.randn(1 + config.n_patch, config.width))
        self.pre_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layer))
        self.post_norm = nn.LayerNorm(config.width)

    def before_last(self, pixels):
        """The input of the last block, class token and patches with their positions: (M, 1 + n_patch, D)."""
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)  # (M, n_patch, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.pre_norm(torch.cat([first, patches], dim=1) + self.position_embedding)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, pixels):
        """Features for the connector, (M, n_patch, D): the input of the last block, without norm and class token."""
        return self.before_last(pixels)[:, 1:].contiguous()  # else the connector's sums round differently for one image and for many

    def pool(self, features):
        """before_last's output -> the class token after the last block and norm, (M, D); for contrastive pretraining alone."""
        return self.post_norm(self.blocks[-1](features)[:, 0])


# --- Connectors: from patch features to tokens of the text encoder -----------------------------------------------


class MLPConnector(nn.Module):
    """Two layers with GELU, as LLaVA's (section 3.1): one token per patch. (M, n_patch, Dv) -> (M, n_patch, Dt)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.vision.width, config.text.width)
        self.fc2 = nn.Linear(config.text.width, config.text.width)

    def forward(self, patches, words, words_mask):
        """words and words_mask are what the query connector reads; it is called alike."""
        return self.fc2(F.gelu(self.fc1(patches)))


class QueryBlock(nn.Module):
    """Queries and words attend to each other; then the queries alone attend to the patches (BLIP-2, 2301.12597)."""

    def __init__(self, width, n_head, vision_width):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, n_head)
        self.cross_attention = Attention(width, n_head, vision_width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, patches, mask, n_query):
        x = x + self.attention(self.norm1(x), mask=mask)
        queries, words = x[:, :n_query], x[:, n_query:]
        x = torch.cat([queries + self.cross_attention(self.norm2(queries), patches), words], dim=1)
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))


class QueryConnector(nn.Module):
    """A small Q-Former (section 3.1): learned queries gather from the patches what the words, a subject's name, ask for.
    (M, n_patch, Dv) -> (M, n_query, Dt): few tokens for an image of any size."""

    def __init__(self, config):
        super().__init__()
        c = config.connector
        self.n_query = c.n_query
        self.queries = nn.Parameter(torch.randn(c.n_query, c.width) * 0.02)
        self.word_in = nn.Linear(config.text.width, c.width)
        self.patch_norm = nn.LayerNorm(config.vision.width)
        self.blocks = nn.ModuleList(QueryBlock(c.width, c.n_head, config.vision.width) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, config.text.width)

    def forward(self, patches, words, words_mask):
        """words (M, Q, Dt): embeddings of the names; words_mask (M, Q) bool: True at real words."""
        queries = self.queries.expand(len(patches), -1, -1)
        x = torch.cat([queries, self.word_in(words)], dim=1)                             # (M, n_query + Q, D)
        mask = F.pad(words_mask, (self.n_query, 0), value=True)[:, None, None]           # (M, 1, 1, n_query + Q)
        patches = self.patch_norm(patches)
        for block in self.blocks:
            x = block(x, patches, mask, self.n_query)
        return self.out(self.norm(x[:, : self.n_query]))


# --- Text encoder ------------------------------------------------------------------------------------------------


def relative_position_bucket(distance, n_bucket, max_distance):
    """T5's buckets for signed distances (key - query), any shape int64 -> int64 in [0, n_bucket). Half the buckets are for keys to
    the right. In each half, the first half holds one distance each and the rest grow logarithmically up to max_distance (T5, arXiv
    1910.10683, section 2.1)."""
    half = n_bucket // 2
    side = (distance > 0).long() * half
    distance = distance.abs()
    exact = half // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return side + torch.where(distance < exact, distance, far)


class TextBlock(nn.Module):
    """T5's encoder block: attention without score scaling or biases, then a GELU-gated MLP. Before each an RMSNorm, x / rms(x) *
    weight: no mean, no bias."""

    def __init__(self, config):
        super().__init__()
        inner = config.n_head * config.head_width
        self.n_head = config.n_head
        self.norm1 = nn.RMSNorm(config.width, eps=1e-6)
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-6)
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias):
        h = self.norm1(x)
        q, k, v = (linear(h).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, head_width)
        x = x + self.dropout(self.o(h.transpose(1, 2).flatten(2)))
        h = self.norm2(x)
        h = F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h)
        return x + self.dropout(self.wo(self.dropout(h)))


class TextEncoder(nn.Module):
    """T5's encoder, on embeddings (B, L, D) of words and image tokens alike."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.relative_bias = nn.Embedding(config.n_bucket, config.n_head)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def attention_bias(self, mask):
        """Relative position bias with padded keys masked: mask (B, L) bool -> (B, H, L, L), shared by all blocks."""
        position = torch.arange(mask.shape[1], device=mask.device)
        bucket = relative_position_bucket(position[None] - position[:, None], self.config.n_bucket, self.config.max_distance)
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]                         # (1, H, L, L)
        return bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)

    def forward(self, embeddings, mask):
        """embeddings (B, L, D), mask (B, L) bool, True at real positions -> hidden states (B, L, D)."""
        x, bias, device = self.dropout(embeddings), self.attention_bias(mask), embeddings.device.type
        if torch.is_autocast_enabled(device):  # once: each block would keep a copy for the backward pass
            bias = bias.to(torch.get_autocast_dtype(device))
        for block in self.blocks:
            x = block(x, bias)
        return self.dropout(self.norm(x))


class MultimodalEncoder(nn.Module):
    """phi of equation 1: encodes a prompt's words and images as one sequence."""

    def __init__(self, config):
        super().__init__()
        self.vision = VisionEncoder(config.vision)
        self.connector = {"mlp": MLPConnector, "query": QueryConnector}[config.connector.kind](config)
        self.text = TextEncoder(config.text)

    def encode_images(self, batch):
        """All images of the batch, in order, as tokens for the text encoder: (M, image_tokens, D)."""
        return self.connector(self.vision(batch.pixels), self.text.embedding(batch.name_ids), batch.name_mask)

    def forward(self, batch):
        """batch: a data.Batch (text_ids, lengths, pixels, image_slots, name_ids, name_mask) -> (B, L, D)."""
        embeddings = splice(self.text.embedding(batch.text_ids), batch.image_slots, self.encode_images(batch))
        return self.text(embeddings, length_mask(batch.lengths, batch.text_ids.shape[1]))


def splice(embeddings, slots, tokens):
    """Put image tokens (M, n, D) into embeddings (B, L, D) at the flat positions slots (M * n,), batch-major. Raises ValueError
    unless there are exactly as many placeholders as tokens: nothing is cut off or left over."""
    if len(slots) != tokens.shape[0] * tokens.shape[1]:
        raise ValueError(f"{len(slots)} image placeholders in the text, but {tokens.shape[0]} images of {tokens.shape[1]} tokens each")
    flat = embeddings.flatten(0, 1)
    return flat.index_copy(0, slots, tokens.flatten(0, 1).to(flat.dtype)).view_as(embeddings)


def length_mask(lengths, size):
    """lengths (B,) -> (B, size) bool, True at the first lengths[b] positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


# --- Projector ---------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    """The MLP of equation 1, to the decoder's width, and the learned unconditional prefix for classifier-free guidance."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.text.width, config.decoder.width, bias=False)
        self.fc2 = nn.Linear(config.decoder.width, config.decoder.width, bias=False)
        # differs from the released code, where this table is a buffer and stays random
        self.unconditional = nn.Parameter(torch.randn(config.context, config.text.width) * config.text.width**-0.5)

    def forward(self, hidden, lengths, drop):
        """hidden (B, P, Dt), lengths (B,) int64, drop (B,) bool -> prefix (B, P, D). A dropped sample keeps its length n and takes
        the *last* n rows of the unconditional table, as the released code's right-aligned prefix does."""
        rows = len(self.unconditional) - lengths[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
        # not table[rows], whose gradient several CPU threads add up in any order
        unconditional = F.embedding(rows.clamp(max=len(self.unconditional) - 1), self.unconditional)  # (B, P, Dt)
        hidden = torch.where(drop[:, None, None], unconditional.to(hidden.dtype), hidden)
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


# --- Image decoder -----------------------------------------------------------------------------------------------


def rotary_table(grid_size, head_width, prefix_rotation="identity", base=10000.0):
    """Rotations as unit complex numbers, (1 + N, head_width / 2): row 0 for the prefix, row 1 + k for code k. Half of a head's
    pairs rotate with the code's row in the grid, half with its column (LlamaGen 2.2). The prefix is not rotated: row 0 is the
    identity. LlamaGen's own code has zeros there ("zero"), which erases the prefix's queries and keys."""
    quarter = head_width // 4
    frequency = base ** (-torch.arange(quarter).float() / quarter)                       # (quarter,)
    cell = torch.arange(grid_size).float()[:, None] * frequency                          # (grid, quarter)
    rows = cell[:, None].expand(-1, grid_size, -1)
    columns = cell[None].expand(grid_size, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)                            # (N, head_width / 2)
    codes = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([torch.full_like(codes[:1], {"identity": 1, "zero": 0}[prefix_rotation]), codes])


def apply_rotary(x, rotations):
    """Rotate the interleaved pairs (2i, 2i + 1) of x (..., hd), as complex numbers, by rotations (..., hd / 2) complex."""
    pairs = x.float().unflatten(-1, (-1, 2))                                             # (..., hd / 2, 2)
    if torch.compiler.is_compiling():  # torch.compile generates code for real numbers only
        (a, b), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rotations).unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Keys and values of everything read so far: each sample's row is [prefix | codes | unused], allocated once.

    Attention reads the used slots rounded up to a multiple of BUCKET; `mask` hides the unused ones. So shapes change only
    every BUCKET steps, and a sample's result does not depend on the others' lengths. The last slot and position are kept in
    tensors, so that a step needs nothing from the CPU.
    """

    BUCKET = 64

    def __init__(self, config, n_sample, n_prefix, device, dtype):
        """n_prefix: the longest prefix to make room for."""
        size = self.whole_buckets(n_prefix + config.n_code - 1)                          # the last code is never read
        shape = (config.n_layer, n_sample, config.n_head, size, config.width // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.mask = torch.empty(n_sample, 1, 1, size, device=device, dtype=dtype)        # added to the scores: 0 or -inf
        self.slot = torch.empty(n_sample, 1, 1, 1, device=device, dtype=torch.long)      # where the last code went
        self.position = torch.empty(n_sample, 1, device=device, dtype=torch.long)        # the last code's row in the rotary table
        self.used = 0                                                                    # slots used: the padded prefix and the codes so far

    def whole_buckets(self, slots):
        """A number of slots rounded up to whole buckets."""
        return -(-slots // self.BUCKET) * self.BUCKET

    def start(self, lengths):
        """Start again with prefixes of these lengths (B,)."""
        self.used = 0
        self.slot.copy_(lengths.view_as(self.slot) - 1)
        self.position.zero_()
        self.mask.fill_(-torch.inf).masked_fill_(length_mask(lengths, self.mask.shape[-1])[:, None, None], 0)

    def advance(self):
        """Make room for the next code: its slot may be read from now on. Returns its position (B, 1)."""
        self.used += 1
        self.mask.scatter_(3, self.slot.add_(1), 0)
        return self.position.add_(1)

    def append(self, layer, k, v):
        """Store k and v (B, H, T, hd) in a layer: the prefix, or the code that advance() made room for. Returns keys, values and
        mask for attention; the mask is None for the prefix, where attention is causal."""
        if self.used == 0:
            self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : k.shape[2]] = k, v
            return k, v, None
        keys, values, slot, read = self.k[layer], self.v[layer], self.slot.expand_as(k), self.whole_buckets(self.used)
        keys.scatter_(2, slot, k)
        values.scatter_(2, slot, v)
        return keys[:, :, :read], values[:, :, :read], self.mask[..., :read]


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions (Llama)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rotations, layer, cache):
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).transpose(1, 3).unbind(2)  # (B, H, T, hd) each
        q, k, mask = apply_rotary(q, rotations), apply_rotary(k, rotations), None
        if cache is not None:
            k, v, mask = cache.append(layer, k, v)
        return self.wo(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, mask):
        """Softmax attention. Without a cache, and when it reads the prefix, there is no mask: it is causal, so the flash kernel runs."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class DecoderMLP(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Three matrices of width 8/3 cost as much as two of width 4."""

    def __init__(self, config):
        super().__init__()
        width = -(-int(8 * config.width / 3) // config.multiple_of) * config.multiple_of  # rounded up
        self.w1 = nn.Linear(config.width, width, bias=False)
        self.w3 = nn.Linear(config.width, width, bias=False)
        self.w2 = nn.Linear(width, config.width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderBlock(nn.Module):
    """Pre-norm attention and MLP; Llama's norm is T5's with a larger eps."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = DecoderAttention(config)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = DecoderMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotations, layer, cache):
        x = x + self.dropout(self.attention(self.norm1(x), rotations, layer, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ImageDecoder(nn.Module):
    """The causal decoder of equation 2 (LlamaGen-XL at full size, arXiv 2406.06525)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Not the tokenizer's codebook: its 8 dimensions, chosen for pixels, carry too little.
        self.code_embedding = nn.Embedding(config.codebook_size, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        with torch.device("cpu"):  # real even where the weights are only planned, since no file holds it
            rotary = rotary_table(config.grid_size, config.width // config.n_head, config.prefix_rotation)
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(self, x, positions, cache=None):
        """Embeddings x (B, T, D) and positions (B, T) int64 (0: prefix, 1 + k: code k) -> hidden states (B, T, D). With a cache, x
        follows what the cache holds and is added to it: first the whole prefix, then code by code."""
        x, rotations = self.dropout(x), self.rotary[positions][:, None]                  # (B, 1, T, hd / 2)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotations, layer, cache)
        return self.norm(x)


def sequence_order(lengths, n_prefix, n_code):
    """Indices that reorder [padded prefix | codes] into [prefix | codes | padding], (B, n_prefix + n_code) int64. With the padding
    last, plain causal attention is exact: no code ever sees it. The released code pads in front instead, which needs a dense mask.
    Prefix tokens have no position, so both compute the same function."""
    t, n = torch.arange(n_prefix + n_code, device=lengths.device)[None], lengths[:, None]
    code, padding = n_prefix + t - n, t - n_code
    return torch.where(t < n, t, torch.where(t < n + n_code, code, padding))


# --- The whole model ---------------------------------------------------------------------------------------------


class Mentor(nn.Module):
    """Multimodal encoder, projector and image decoder; trained on the next-code loss alone (equation 3)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = MultimodalEncoder(config)
        self.projector = Projector(config)
        self.decoder = ImageDecoder(config.decoder)
        init_weights(self)

    def prefix(self, batch, drop):
        """The prefix of a batch's prompts, (B, P, D); drop (B,) bool: samples that get the unconditional one."""
        return self.projector(self.encoder(batch), batch.lengths, drop)

    def forward(self, batch, codes, drop):
        """Logits for every code given the prompt and the codes before it: teacher forcing in one pass.

        batch: a data.Batch; codes (B, N) int64; drop (B,) bool: samples that get no prompt. Returns (B, N, V) float32.
        Training stops at next_code_hidden: see train.next_code_losses.
        """
        hidden = self.next_code_hidden(self.prefix(batch, drop), batch.lengths, codes)
        return self.decoder.output(hidden).float()

    def next_code_hidden(self, prefix, lengths, codes):
        """prefix (B, P, D) with lengths (B,), codes (B, N) -> the hidden states that predict the codes, (B, N, D)."""
        (_, P, D), N = prefix.shape, codes.shape[1]
        order = sequence_order(lengths, P, N - 1)                                        # the last code is never read
        x = torch.cat([prefix, self.decoder.code_embedding(codes[:, :-1])], dim=1)       # in autocast float32, as between the blocks
        x = x.gather(1, order[..., None].expand(-1, -1, D))                              # [prefix | codes | padding]
        positions = (order - P + 1).clamp(min=0)                                         # 0 in the prefix, 1 + k at code k
        hidden = self.decoder(x, positions)
        predicts = lengths[:, None] - 1 + torch.arange(N, device=codes.device)           # from the last prefix position on
        return hidden.gather(1, predicts[..., None].expand(-1, -1, D))                   # only these go through the head

    def prefill(self, prefix, lengths, cache=None):
        """Read the prefix (B, P, D) of lengths (B,) into the cache, a new one by default. Returns the logits of the first code (B,
        V) float32 and the cache."""
        B, P, _ = prefix.shape
        cache = cache or KVCache(self.config.decoder, B, P, prefix.device, prefix.dtype)
        cache.start(lengths)
        hidden = self.decoder(prefix, torch.zeros(B, P, dtype=torch.long, device=prefix.device), cache)
        cache.used = P
        last = hidden[torch.arange(B, device=hidden.device), lengths - 1]                # (B, D)
        return self.decoder.output(last).float(), cache

    def decode_step(self, codes, cache):
        """Read one more code per sample, codes (B,) int64; returns the logits of the next one (B, V) float32."""
        positions = cache.advance()
        hidden = self.decoder(self.decoder.code_embedding(codes)[:, None], positions, cache)
        return self.decoder.output(hidden[:, 0]).float()

    def save_pretrained(self, folder):
        """Write `config.json` and `model.safetensors` into the folder."""
        save_folder(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder, config=None):
        """Load what save_pretrained wrote; `config` replaces the stored one. Raises ValueError naming a missing file."""
        return load_folder(cls, MentorConfig, folder, "python train.py PRESET", config)


def init_weights(model):
    """Initialise the weights of a new model.

    projector, decoder     N(0, 0.02) as LlamaGen; output head zero, so that the first loss is ln(V)
    text encoder           T5's: 1/sqrt(fan in), queries also / sqrt(head_width), since attention does not scale its scores
    vision, connectors     PyTorch's defaults; queries N(0, 0.02). The short contrastive training must not erase position and
                           pixels from the features, so vision positions are N(0, 1), as large as the patches they are
                           added to, and the norm before the blocks scales by 4, well above what the blocks add
    """
    for module in (*model.projector.modules(), *model.decoder.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(model.decoder.output.weight)
    nn.init.constant_(model.encoder.vision.pre_norm.weight, 4.0)
    text = model.encoder.text
    nn.init.normal_(text.embedding.weight, std=1.0)
    nn.init.normal_(text.relative_bias.weight, std=text.config.width**-0.5)
    for block in text.blocks:
        for name, linear in block.named_children():
            if isinstance(linear, nn.Linear):
                scale = text.config.head_width**-0.5 if name == "q" else 1.0
                nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)


@torch.no_grad()
def start_from_codebook(decoder, codebook):
    """Initialise a new decoder's code embeddings and output head from the tokenizer's codebook (V, C), whose rows have length 1:
    codes that look alike start alike, so what is learnt about one holds for its neighbours."""
    for weight, std in ((decoder.code_embedding.weight, 0.1), (decoder.output.weight, 0.05)):
        weight.copy_(std * codebook @ torch.randn(codebook.shape[1], weight.shape[1], device=codebook.device))


# --- Files: a model is a folder with config.json and model.safetensors -------------------------------------------


def first_line(error):
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_atomically(path, write):
    """Call write(temporary file), then rename that to `path`: a kill or a full disk leaves the old file, never half a new one.
    Raises OSError naming the file if it cannot be written; the temporary file is removed then."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, from Python, torch, safetensors
        temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} could not be written ({first_line(reason)})") from error


def write_json(path, values):
    """Write values as JSON, atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(values, indent=2) + "\n"))


def read_json(path):
    """Read the dictionary in a JSON file. Raises ValueError naming the file if it is missing or holds anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {str(values)[:80]}, not a JSON object of keys and values")
    return values


def save_folder(folder, config, tensors):
    """Write a config, then a model's {name: tensor}: once `model.safetensors` exists, the folder is complete."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "config.json", asdict(config))
    write_atomically(Path(folder) / "model.safetensors", lambda file: save_file(tensors, file))


def load_folder(cls, config_class, folder, command, config=None):
    """Load the module, a `cls`, that save_folder wrote; `config` replaces the stored one. Raises ValueError naming a file that is
    missing (and the command that makes it), cannot be read or does not fit the other."""
    file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    for path in (file, weights):
        if not path.is_file():
            raise ValueError(f"{path} is missing; `{command}` makes it")
    stored = read_json(file)
    try:
        config = config or from_dict(config_class, stored)
        tensors = read_weights(weights)
        with torch.device("meta"):  # neither allocated nor initialised: a wrong config may ask for a lot
            model = cls(config)
        check_fit(model.state_dict(), tensors)
    except ValueError as error:
        raise ValueError(str(error) if str(weights) in str(error) else f"{file if config is None else weights}: {error}") from None
    model.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


# --- Released weights: every parameter's name in MENTOR's checkpoints --------------------------------------------

RELEASED_NAMES = [  # ours -> the released checkpoint's, applied in order; \1 is a block's number
    (r"^decoder\.code_embedding", "tok_embeddings"),
    (r"^decoder\.(norm|output)", r"\1"),
    (r"^decoder\.blocks\.(\d+)\.norm1", r"layers.\1.attention_norm"),
    (r"^decoder\.blocks\.(\d+)\.norm2", r"layers.\1.ffn_norm"),
    (r"^decoder\.blocks\.(\d+)\.attention", r"layers.\1.attention"),
    (r"^decoder\.blocks\.(\d+)\.mlp", r"layers.\1.feed_forward"),
    (r"^projector\.(fc\d)", r"cls_embedding.cap_proj.\1"),
    (r"^projector\.unconditional", "cls_embedding.uncond_embedding"),
    (r"^encoder\.connector\.fc1", "multimodal_encoder.language_projection.0"),
    (r"^encoder\.connector\.fc2", "multimodal_encoder.language_projection.2"),
    (r"^encoder\.connector", "multimodal_encoder.query_connector"),  # trained from scratch, no released counterpart
    (r"^encoder\.vision\.", "multimodal_encoder.vision_model.vision_tower.vision_model."),
    (r"vision_model\.(class|patch)_embedding", r"vision_model.embeddings.\1_embedding"),
    (r"vision_model\.position_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"vision_model\.pre_norm", "vision_model.pre_layrnorm"),  # spelled so there
    (r"vision_model\.post_norm", "vision_model.post_layernorm"),
    (r"vision_model\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"vision_model\.blocks\.(\d+)\.attention\.([qkv])\.", r"vision_model.encoder.layers.\1.self_attn.\2_proj."),
    (r"vision_model\.blocks\.(\d+)\.attention\.out", r"vision_model.encoder.layers.\1.self_attn.out_proj"),
    (r"vision_model\.blocks\.(\d+)\.fc", r"vision_model.encoder.layers.\1.mlp.fc"),
    (r"^encoder\.text\.embedding", "multimodal_encoder.language_model.shared"),
    (r"^encoder\.text\.relative_bias", "multimodal_encoder.language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    (r"^encoder\.text\.norm", "multimodal_encoder.language_model.encoder.final_layer_norm"),
    (r"^encoder\.text\.blocks\.(\d+)\.norm1", r"multimodal_encoder.language_model.encoder.block.\1.layer.0.layer_norm"),
    (r"^encoder\.text\.blocks\.(\d+)\.norm2", r"multimodal_encoder.language_model.encoder.block.\1.layer.1.layer_norm"),
    (r"^encoder\.text\.blocks\.(\d+)\.([qkvo])\.", r"multimodal_encoder.language_model.encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^encoder\.text\.blocks\.(\d+)\.(wi_0|wi_1|wo)", r"multimodal_encoder.language_model.encoder.block.\1.layer.1.DenseReluDense.\2"),
]


def released_name(name):
    """A parameter's name in MENTOR's released checkpoints (which hold CLIP's, T5's and LlamaGen's own names)."""
    for pattern, replacement in RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def check_fit(parameters, tensors, fresh=()):
    """Raise ValueError listing the names that are missing, unexpected or of another shape in tensors as compared with parameters,
    both {name: tensor}. Names that start with one of `fresh` may be missing."""
    missing = [n for n in parameters if n not in tensors and not n.startswith(tuple(fresh))]
    unexpected = [n for n in tensors if n not in parameters]
    shapes = [f"{n} {tuple(t.shape)} where the model has {tuple(parameters[n].shape)}"
              for n, t in tensors.items() if n in parameters and t.shape != parameters[n].shape]
    problems = [f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]
    if problems:
        raise ValueError("the weights do not fit the model; " + "; ".join(problems))


def released_parameters(model):
    """{released name: parameter} of a Mentor."""
    return {released_name(name): p for name, p in model.named_parameters()}


def fit_unconditional(model, tensors):
    """Cut or grow the unconditional table to the model's rows, the one change allowed to released tensors. Prefixes use its last
    rows, so rows are removed, or random ones added, at its front. Returns the tensors and a sentence about the change, empty if
    there was none."""
    name, (rows, width) = released_name("projector.unconditional"), model.projector.unconditional.shape
    table = tensors.get(name)
    if table is None or table.shape == (rows, width) or table.shape[1:] != (width,):
        return tensors, ""
    new = torch.randn(max(0, rows - len(table)), width) * width**-0.5
    change = f"the unconditional table {'grew' if len(new) else 'was cut'} from {len(table)} to {rows} rows"
    return {**tensors, name: torch.cat([new.to(table.dtype), table[-rows:]])}, change


def read_pickle(path, **options):
    """Load what torch.save wrote, with weights_only, so that it cannot run code: of classes it may hold only argparse's Namespace,
    the options beside LlamaGen's weights. Checks the checksums first, which torch.load does not. Raises ValueError naming a file
    that is damaged or was not written by torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"{broken} in it is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, weights_only=True, map_location="cpu", **options)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError,
            pickle.UnpicklingError, zipfile.BadZipFile) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # in the middle of advice on how to load it all the same
        reason = f"it asks for {refused[1]}, which may run code: save its tensors alone" if refused else first_line(error)
        raise ValueError(f"{path}: not a readable file of torch.save ({reason})") from None


def read_weights(path):
    """Read {name: tensor} from a .safetensors, .pt or .bin file, or from a Hub folder with one file or shards. Pickles are opened
    with weights_only, so that they cannot run code; safetensors are mapped, not copied. Weights under a `model` key are unwrapped.
    Raises ValueError naming a file that is missing or of another kind."""
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")
        first = next((path / name for name in names if (path / name).is_file()), None)
        if first is None:
            raise ValueError(f"{path}: no model.safetensors, pytorch_model.bin or index of shards in this folder")
        if first.suffix != ".json":
            return read_weights(first)
        shards = read_json(first).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{first}: holds no weight_map from tensors to files")
        return {n: t for shard in sorted(set(shards.values())) for n, t in read_weights(path / shard).items()}
    if not path.is_file():
        raise ValueError(f"{path}: there is no such weights file")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickle(path, mmap=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable weights file ({first_line(error)})") from None
    tensors = tensors.get("model", tensors) if isinstance(tensors, dict) else None
    if not tensors or not all(torch.is_tensor(t) for t in tensors.values()):
        raise ValueError(f"{path}: holds no dictionary of tensors")
    return tensors


SOURCES = {  # of each source: names to leave out, and what must be replaced in the others for those of the released checkpoint
    "clip": (r"^(text_model\.|text_projection|visual_projection|logit_scale)|position_ids$",
             r"^(vision_model\.)?", "multimodal_encoder.vision_model.vision_tower.vision_model."),
    "t5": (r"^(decoder\.|lm_head\.|encoder\.embed_tokens\.)", r"^", "multimodal_encoder.language_model."),
    "connector": (r"^(?!model\.mm_projector\.)", r"^model\.mm_projector\.", "multimodal_encoder.language_projection."),
    "generator": (r"^(freqs_cis|multimodal_encoder\.)", r"^", ""),
    "mentor": (r"language_model\.encoder\.embed_tokens|position_ids$|freqs_cis", r"^", ""),  # embed_tokens: `shared` once more
    "vq": (r"codebook_used", r"^", ""),
}


def released_tensors(source, path, say=lambda words: None):
    """Read one of SOURCES as {name in the released checkpoint: tensor}. Says what else its file holds, which is left aside. Raises
    ValueError if there is nothing but that."""
    left_out, pattern, replacement = SOURCES[source]
    tensors = read_weights(path)
    others = [name for name in tensors if re.search(left_out, name)]
    names = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    if len(others) == len(tensors):
        raise ValueError(f"--released.{source}={path}: none of its {len(tensors)} tensors is of that part ({names}); give another file")
    say(f"{len(tensors) - len(others)} tensors from {path}" + f", {len(others)} of other parts left aside ({names})" * bool(others))
    return {re.sub(pattern, replacement, name, count=1): tensor.contiguous() for name, tensor in tensors.items() if name not in others}
