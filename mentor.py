"""The model of MENTOR (arXiv 2507.09574): a prompt of words and pictures becomes a prefix, the prefix an
image.

    pixels --VisionEncoder--> patches --Connector--> image tokens ┐
                                                                  ├ splice --TextEncoder--> hidden states
    text ids ------------------------> word embeddings -----------┘
    hidden states --Projector--> prefix --ImageDecoder--> image codes, one after the other (eqs. 1 and 2)

One sequence, no cross-attention: the decoder sees [prefix | codes] and predicts the next code. The file
follows the data, from configuration to Mentor.

Shapes: B samples, M images in all prompts together, L text positions, P prefix positions, N = grid_size**2
codes, D the module's width, V codebook_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import require

# --- Configuration (default: the published model) ---


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's vision transformer; by default ViT-L/14."""

    image_size: int = 224  # pixels per side
    patch_size: int = 14
    width: int = 1024  # of a patch
    n_layer: int = 24  # blocks; features are taken before the last one
    n_head: int = 16
    mlp_width: int = 4096  # of a block's MLP

    @property
    def n_patch(self):
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """T5's encoder; by default Flan-T5-XL's."""

    vocab_size: int = 32128  # rows of the word table; at least the text tokenizer's ids
    width: int = 2048        # of a token
    n_layer: int = 24
    n_head: int = 32
    head_width: int = 64     # of each head, whatever the width
    mlp_width: int = 5120    # of a block's gated MLP
    n_bucket: int = 32       # of relative distances, each with a bias per head
    max_distance: int = 128  # from here on all distances share a bucket
    dropout: float = 0.1     # on embeddings, in every block, and at the end


@dataclass(frozen=True)
class DecoderConfig:
    """The image decoder; by default LlamaGen-XL, for 512-pixel images."""

    codebook_size: int = 16384  # the tokenizer's (train.py sets it)
    grid_size: int = 32         # codes per side, likewise
    width: int = 1280           # of a position
    n_layer: int = 36
    n_head: int = 20
    multiple_of: int = 256  # the MLP is 8/3 as wide, rounded up to a multiple of this
    dropout: float = 0.1    # on embeddings, attention output and MLP output
    rope_scale: float = 1.0     # radians by which a row or column turns the fastest pair of channels
    rope_base: float = 10000.0  # the slowest pair turns about this much slower

    @property
    def n_code(self):
        """Codes per image."""
        return self.grid_size**2


@dataclass(frozen=True)
class SamplingConfig:
    """Default sampling, stored with the weights."""

    cfg_scale: float = 7.5    # guidance: 1 is the conditional model alone, 0 the unconditional one
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0            # keep the k best codes; 0 keeps all
    top_p: float = 1.0        # keep the best codes up to this total probability; 1 keeps all

    def __post_init__(self):
        require(all(0 <= value < math.inf for value in vars(self).values()) and self.top_p <= 1,
                f"{self}: must not be negative, and top_p at most 1")


@dataclass(frozen=True)
class MentorConfig:
    """The whole model."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    decoder: DecoderConfig = DecoderConfig()
    sampling: SamplingConfig = SamplingConfig()
    connector: str = "mlp"  # one of CONNECTORS
    n_query: int = 0        # tokens per image; mlp: 0, one a patch
    context: int = 512      # longest prefix

    def __post_init__(self):
        vision, text, decoder = self.vision, self.text, self.decoder
        for key, size, unit, n in (
                ("vision.image_size", vision.image_size, "vision.patch_size", vision.patch_size),
                ("vision.width", vision.width, "vision.n_head", vision.n_head),
                # a head's pairs of channels turn by rows and columns
                ("decoder.width", decoder.width, "4 * decoder.n_head", 4 * decoder.n_head)):
            require(size % n == 0, f"{key}={size}: must be a multiple of {unit}={n}")
        require(text.max_distance > text.n_bucket // 4 > 0,
                f"text.n_bucket={text.n_bucket}: must be 4 or more, and less than 4 * max_distance")
        require(self.context > self.image_tokens,
                f"context={self.context}: must be above {self.image_tokens}, the tokens of an image")
        require(self.connector in CONNECTORS and (self.connector != "mlp" or not self.n_query),
                f"connector={self.connector}, n_query={self.n_query}: must be {', '.join(CONNECTORS)} "
                "(mlp with 0); extras/multi.py has more")

    @property
    def image_tokens(self):
        """Tokens per <image> in the prompt."""
        return self.n_query or self.vision.n_patch


# --- Vision encoder ---


def split_heads(x, n_head):
    """(B, L, H * hd) -> (B, H, L, hd)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with biases. (B, L, D) -> (B, L, D)."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (split_heads(linear(x), self.n_head) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, D / H)
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
    """CLIP's vision transformer (arXiv 2103.00020), from pixels (M, 3, S, S), CLIP-normalised."""

    def __init__(self, config):
        super().__init__()
        scale = config.width**-0.5
        self.class_embedding = nn.Parameter(torch.randn(config.width) * scale)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.randn(1 + config.n_patch, config.width) * scale)
        self.pre_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layer))
        self.post_norm = nn.LayerNorm(config.width)  # like the last block only for released weights

    def forward(self, pixels):
        """Features for the connector: what the last block would read of the patches, (M, n_patch, D)."""
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype))  # (M, D, S/p, S/p)
        patches = patches.flatten(2).transpose(1, 2)                           # (M, n_patch, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.pre_norm(torch.cat([first, patches], dim=1) + self.position_embedding)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, 1:]


# --- Connectors ---


class MLPConnector(nn.Module):
    """LLaVA's two layers with GELU (section 3.1), on each patch: (M, n_patch, Dv) -> (M, n_patch, Dt)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.vision.width, config.text.width)
        self.fc2 = nn.Linear(config.text.width, config.text.width)

    def forward(self, patches, words, mask):
        """words (M, L, Dt), mask (M, L): each image's prompt, which this connector ignores."""
        return self.fc2(F.gelu(self.fc1(patches)))


CONNECTORS = {"mlp": MLPConnector}  # by MentorConfig.connector; extras/multi.py adds another


# --- Text encoder ---


def relative_position_bucket(distance, n_bucket, max_distance):
    """T5's buckets (arXiv 1910.10683, section 2.1): signed distances (key - query) -> int64 in [0, n_bucket).
    Half are for keys to the right. Of each half, half hold one distance each; the rest grow logarithmically
    to max_distance."""
    half = n_bucket // 2
    side = (distance > 0).long() * half
    distance = distance.abs()
    exact = half // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return side + torch.where(distance < exact, distance, far)


class TextBlock(nn.Module):
    """T5's encoder block: attention without score scaling, then a GELU-gated MLP, both without biases and
    after an RMSNorm, x / rms(x) * weight."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.width, config.n_head * config.head_width
        self.n_head = config.n_head
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.wi_0, self.wi_1 = (nn.Linear(width, config.mlp_width, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.mlp_width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias):
        h = self.norm1(x)
        q, k, v = (split_heads(linear(h), self.n_head) for linear in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, H, L, head_width)
        x = x + self.dropout(self.o(h.transpose(1, 2).flatten(2)))
        h = self.norm2(x)
        h = F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h)
        return x + self.dropout(self.wo(self.dropout(h)))


class TextEncoder(nn.Module):
    """T5's encoder, on embeddings of words and image tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.relative_bias = nn.Embedding(config.n_bucket, config.n_head)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def attention_bias(self, mask):
        """Relative position bias with padding masked, for all blocks: mask (B, L) bool -> (B, H, L, L)."""
        position = torch.arange(mask.shape[1], device=mask.device)
        distance = position[None] - position[:, None]  # (L, L), key - query
        bucket = relative_position_bucket(distance, self.config.n_bucket, self.config.max_distance)
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]  # (1, H, L, L)
        return bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)

    def forward(self, embeddings, mask):
        """embeddings (B, L, D), mask (B, L) bool, False at padding -> hidden states (B, L, D)."""
        x, bias, device = self.dropout(embeddings), self.attention_bias(mask), embeddings.device.type
        if torch.is_autocast_enabled(device):  # else each block keeps a converted copy for the backward pass
            bias = bias.to(torch.get_autocast_dtype(device))
        for block in self.blocks:
            x = block(x, bias)
        return self.dropout(self.norm(x))


class MultimodalEncoder(nn.Module):
    """phi of equation 1: words and images of a prompt, encoded as one sequence."""

    def __init__(self, config):
        super().__init__()
        self.vision = VisionEncoder(config.vision)
        self.connector = CONNECTORS[config.connector](config)
        self.text = TextEncoder(config.text)
        self.image_tokens = config.image_tokens

    def forward(self, batch):
        """batch: a data.Batch (text_ids, lengths, pixels, image_slots) -> (B, L, D)."""
        words, mask = self.text.embedding(batch.text_ids), length_mask(batch.lengths, batch.text_ids.shape[1])
        owner = batch.image_slots[:: self.image_tokens] // mask.shape[1]               # (M,): their samples
        tokens = self.connector(self.vision(batch.pixels), words[owner], mask[owner])  # (M, image_tokens, D)
        return self.text(splice(words, batch.image_slots, tokens), mask)


def splice(words, slots, tokens):
    """Put image tokens (M, n, D) into word embeddings (B, L, D), at the flat positions slots (M * n,)."""
    images, n, _ = tokens.shape
    require(len(slots) == images * n,
            f"{len(slots)} places for image tokens in the prompts, but {images} images of {n} tokens")
    return words.flatten(0, 1).index_copy(0, slots, tokens.flatten(0, 1).to(words.dtype)).view_as(words)


def length_mask(lengths, size):
    """lengths (B,) -> (B, size) bool, True at the first lengths[b] positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


# --- Projector ---


class Projector(nn.Module):
    """The MLP of equation 1, to the decoder's width, and the learned unconditional prefix of guidance."""

    def __init__(self, config):
        super().__init__()
        width, out = config.text.width, config.decoder.width
        self.fc1 = nn.Linear(width, out, bias=False)
        self.fc2 = nn.Linear(out, out, bias=False)
        # in the released code this table is a buffer and stays random
        self.unconditional = nn.Parameter(torch.randn(config.context, width) * width**-0.5)

    def forward(self, hidden, lengths, drop):
        """hidden (B, P, Dt), lengths (B,) int64, drop (B,) bool -> prefix (B, P, D). A dropped sample of
        length n gets the *last* n rows of the table, as in the released code, which pads in front."""
        size = len(self.unconditional)
        rows = size - lengths[:, None] + torch.arange(hidden.shape[1], device=hidden.device)  # (B, P)
        # not table[rows], whose gradient CPU threads add up in any order
        unconditional = F.embedding(rows.clamp(max=size - 1), self.unconditional)  # (B, P, Dt)
        hidden = torch.where(drop[:, None, None], unconditional.to(hidden.dtype), hidden)
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


# --- Image decoder ---


def rotary_table(config):
    """Rotations as unit complex numbers, (1 + N, hd / 2): row 0 for the prefix, which is not rotated, row
    1 + k for code k. Half of a head's pairs rotate with the code's row in the grid, half with its column
    (LlamaGen 2.2)."""
    pairs = config.width // config.n_head // 4  # of each half
    frequency = config.rope_scale * config.rope_base ** (-torch.arange(pairs) / pairs)  # (hd / 4,)
    k = torch.arange(config.n_code)[:, None]
    angles = torch.cat([k // config.grid_size * frequency, k % config.grid_size * frequency], 1)
    return torch.polar(torch.tensor(1.0), F.pad(angles, (0, 0, 1, 0)))  # (1 + N, hd / 2)


def rotate(x, rotations):
    """Rotate the pairs (2i, 2i + 1) of x (..., hd), as complex numbers, by rotations (..., hd / 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., hd / 2, 2)
    if torch.compiler.is_compiling():         # torch.compile makes no kernels of complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rotations).unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return pairs.flatten(-2).to(x.dtype)


class KVCache:
    """Keys and values of all that the decoder has read, [prefix, padded to P | codes], allocated once.
    Padding in between does no harm: `mask` hides it, and a code's position is its place in the image, not its
    slot. So all samples write to one slot, and a step needs nothing from the CPU."""

    def __init__(self, config, lengths, n_prefix, dtype):
        """lengths (B,): of the prefixes; n_prefix: what they are padded to."""
        size, device = -(-(n_prefix + config.n_code) // 64) * 64, lengths.device  # rounded up: few sizes
        shape = (len(lengths), config.n_head, size, config.width // config.n_head)
        # one for each layer: a compiled step would copy the whole to write a part
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.mask = length_mask(lengths, size)[:, None, None]  # (B, 1, 1, size): may be read
        self.slot = torch.full((1,), n_prefix - 1, device=device)  # last written
        self.position = torch.zeros(1, 1, device=device, dtype=torch.long)  # 1 + k after code k
        if lengths.is_cuda:  # a CUDA graph writes only to tensors that stay where they are
            from torch._dynamo import mark_static_address  # takes seconds
            for tensor in (*self.k, *self.v, self.mask, self.slot, self.position):
                mark_static_address(tensor)

    def prefill(self, layer, k, v):
        """Store the keys and values (B, H, P, hd) of the prefix."""
        self.k[layer][:, :, : k.shape[2]], self.v[layer][:, :, : k.shape[2]] = k, v

    def advance(self):
        """Make room for one more code. Returns its position."""
        self.mask.index_fill_(3, self.slot.add_(1), True)
        return self.position.add_(1)

    def append(self, layer, k, v):
        """Store the keys and values (B, H, 1, hd) of a code. Returns all keys and values, and the mask."""
        k, v = self.k[layer].index_copy_(2, self.slot, k), self.v[layer].index_copy_(2, self.slot, v)
        return k, v, self.mask


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions (Llama). Only decode steps need a mask; training batches
    and prefixes run in the flash kernel."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rotations, layer, cache):
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).transpose(1, 3).unbind(2)  # (B, H, T, hd)
        q, k, mask = rotate(q, rotations), rotate(k, rotations), None
        if cache is not None and x.shape[1] > 1:  # a prefix
            cache.prefill(layer, k, v)
        elif cache is not None:  # a code
            k, v, mask = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(y.transpose(1, 2).flatten(2))


class DecoderMLP(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Three matrices of width 8/3 cost as much as two of width 4."""

    def __init__(self, config):
        super().__init__()
        width = -(-int(8 * config.width / 3) // config.multiple_of) * config.multiple_of  # rounded up
        self.w1, self.w3 = (nn.Linear(config.width, width, bias=False) for _ in range(2))
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
    """The causal decoder of equation 2 (LlamaGen, arXiv 2406.06525)."""

    def __init__(self, config):
        super().__init__()
        # not the tokenizer's codebook: its 8 dimensions carry too little
        self.code_embedding = nn.Embedding(config.codebook_size, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        with torch.device("cpu"):  # load_model builds on the meta device, and no file holds this table
            rotary = rotary_table(config)
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(self, x, positions, cache=None):
        """x (B, T, D), positions (B, T): 0 in the prefix, 1 + k at code k -> hidden states (B, T, D)."""
        x, rotations = self.dropout(x), self.rotary[positions][:, None]  # (B, 1, T, hd / 2)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotations, layer, cache)
        return self.norm(x)


def sequence_order(lengths, n_prefix, n_code):
    """Indices (B, n_prefix + n_code) that turn [padded prefix | codes] into [prefix | codes | padding]:

        p p p . . a b c      0 1 2 5 6 7 3 4      p p p a b c . .
        p p p p p a b c      0 1 2 3 4 5 6 7      p p p p p a b c

    With the padding last, plain causal attention is exact: no code sees it. (The released code pads in front
    and needs a dense mask.)
    """
    t, n = torch.arange(n_prefix + n_code, device=lengths.device)[None], lengths[:, None]
    code, padding = n_prefix + t - n, t - n_code
    return torch.where(t < n, t, torch.where(t < n + n_code, code, padding))


# --- The whole model ---


class Mentor(nn.Module):
    """Multimodal encoder, projector and image decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = MultimodalEncoder(config)
        self.projector = Projector(config)
        self.decoder = ImageDecoder(config.decoder)
        init_weights(self)

    def forward(self, batch, codes, drop):
        """batch (a data.Batch), codes (B, N) int64, drop (B,) bool, samples that get no prompt -> logits of
        every code given prompt and codes before, (B, N, V) float32."""
        prefix = self.projector(self.encoder(batch), batch.lengths, drop)
        return self.next_code_logits(prefix, batch.lengths, codes)

    def next_code_logits(self, prefix, lengths, codes):
        """prefix (B, P, D), lengths (B,), codes (B, N) -> logits of the codes, (B, N, V) float32."""
        P, N = prefix.shape[1], codes.shape[1]
        order = sequence_order(lengths, P, N - 1)  # the last code is never read
        x = torch.cat([prefix, self.decoder.code_embedding(codes[:, :-1])], dim=1)
        x = x.gather(1, order[..., None].expand_as(x))  # (B, P + N - 1, D): [prefix | codes | padding]
        positions = (order - P + 1).clamp(min=0)        # 0 in the prefix, 1 + k at code k
        hidden = self.decoder(x, positions)
        predicts = lengths[:, None] - 1 + torch.arange(N, device=codes.device)  # from the prefix's last on
        hidden = hidden.gather(1, predicts[..., None].expand(-1, -1, x.shape[-1]))
        return self.decoder.output(hidden).float()

    def prefill(self, prefix, lengths):
        """Read the prefix (B, P, D) of lengths (B,) -> logits of the first code (B, V) float32, a KVCache."""
        B, P, _ = prefix.shape
        cache = KVCache(self.config.decoder, lengths, P, prefix.dtype)
        hidden = self.decoder(prefix, torch.zeros(B, P, dtype=torch.long, device=prefix.device), cache)
        last = hidden.take_along_dim(lengths[:, None, None] - 1, 1)[:, 0]  # (B, D)
        return self.decoder.output(last).float(), cache

    def decode_step(self, codes, cache):
        """Read one more code per sample, (B,) int64 -> logits of the next one (B, V) float32."""
        hidden = self.decoder(self.decoder.code_embedding(codes)[:, None], cache.advance(), cache)
        return self.decoder.output(hidden[:, 0]).float()


def init_weights(model):
    """Initialise a new model.

    projector, decoder   N(0, 0.02), as LlamaGen; output head zero, until start_from_codebook
    text encoder         T5's: 1 / sqrt(fan in); queries also / sqrt(head_width), as scores are not scaled
    vision, connector    PyTorch's; class and position embeddings N(0, 1 / width), as CLIP
    """
    for module in (*model.projector.modules(), *model.decoder.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(model.decoder.output.weight)
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
    """Initialise code embeddings and output head from the tokenizer's codebook (V, C). Similar codes
    start close, so that what is learnt about one holds for its neighbours."""
    for weight, std in ((decoder.code_embedding.weight, 0.1), (decoder.output.weight, 0.05)):
        weight.copy_(std * codebook @ torch.randn(codebook.shape[1], weight.shape[1], device=codebook.device))
