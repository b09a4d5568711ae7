"""What training costs, from the sizes alone: FLOPs, memory, hours. Nothing is run and no memory is taken.

`python train.py full --stage=align --dry_run=true` prints it for a stage before anything is spent; training itself uses the
same FLOPs to say which share of the GPU's peak it reaches.

Two rules give nearly everything. A weight of a matrix costs a multiplication and an addition at every position that goes
through it, the same again for the gradient of what went in, and the same again for its own gradient, if it is trained. And
the backward pass needs what the forward pass multiplied: those tensors are the activations that fill the memory.
"""

from functools import cache

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mentor import Mentor
from tokenizer import VQGAN

PARTS = ("encoder.vision", "encoder.connector", "encoder.text", "projector", "decoder")  # in the order of the forward pass
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L4": 121, "4090": 165}           # dense bfloat16, without sparsity
CARDS = (24, 40, 80, 141)          # GiB
SPARE = 0.06                       # of a card: what CUDA itself takes, and holes between tensors
NAME_TOKENS = 4                    # of a subject's name, which the query connector reads


def peak_tflops(device_name):
    """The peak of a card in TFLOPS, by what the driver calls it; None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in words), None)


def meta_mentor(config, trained):
    """A Mentor without memory for its weights, of which the parts train whose names start so."""
    with torch.device("meta"):
        model = Mentor(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


# ---------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------


def positions(config, tokens, images, pooled):
    """{start of a matrix's name: how many positions of one sample go through it}; the longest start counts."""
    vision, n_code = config.vision, config.decoder.n_code
    table = {
        "encoder.vision": (images + pooled) * (1 + vision.n_patch),
        "encoder.vision.patch_embedding": (images + pooled) * vision.n_patch,
        f"encoder.vision.blocks.{vision.n_layer - 1}": pooled * (1 + vision.n_patch),    # features leave before it
        "encoder.connector": images * vision.n_patch,
        "encoder.text": tokens,
        "projector": tokens,
        "decoder": tokens + n_code - 1,                                                  # the last code is never read
        "decoder.output": n_code,
    }
    if config.connector.kind == "query":
        queries = config.connector.n_query
        table.update({"encoder.connector": images * (queries + NAME_TOKENS), "encoder.connector.word_in": images * NAME_TOKENS, "encoder.connector.out": images * queries})
        for i in range(config.connector.n_layer):
            cross = f"encoder.connector.blocks.{i}.cross_attention."
            table.update({cross: images * queries, cross + "k": images * vision.n_patch, cross + "v": images * vision.n_patch})
    return table


def attention_flops(config, tokens, images, pooled):
    """{part: FLOPs of scores and weighted sums in one sample's forward pass}: 4 per query, key and channel."""
    vision, connector, text, decoder = config.vision, config.connector, config.text, config.decoder
    flops = {
        "encoder.vision": 4 * (images * (vision.n_layer - 1) + pooled * vision.n_layer) * (1 + vision.n_patch) ** 2 * vision.width,
        "encoder.text": 4 * text.n_layer * tokens**2 * text.n_head * text.head_width,
        "decoder": 2 * decoder.n_layer * (tokens + decoder.n_code - 1) ** 2 * decoder.width,  # causal: half of it
    }
    if connector.kind == "query":
        n = connector.n_query
        flops["encoder.connector"] = 4 * images * connector.n_layer * connector.width * ((n + NAME_TOKENS) ** 2 + n * vision.n_patch)
    return flops


def training_flops(model, tokens, images, pooled=0):
    """{part: FLOPs} of one sample's forward and backward pass; which weights are trained is read off the model.

    tokens: of the prompt, those of its images included; images: in the prompt; pooled: images that the contrastive loss
    reads. Plain numbers, or tensors. Frozen parts before the first trained one run forward only.
    """
    rows, attention = positions(model.config, tokens, images, pooled), attention_flops(model.config, tokens, images, pooled)
    flops, reached = dict.fromkeys(PARTS, 0), False
    for part in PARTS:
        module = model.get_submodule(part)
        reached = reached or any(p.requires_grad for p in module.parameters())           # gradients flow from here on
        for name, layer in module.named_modules(prefix=part):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                count = rows[max((start for start in rows if name.startswith(start)), key=len)]
                flops[part] += 2 * layer.weight.numel() * count * (1 + reached + layer.weight.requires_grad)
        flops[part] += attention.get(part, 0) * (3 if reached else 1)                    # four products backward for two forward
    return flops


@cache
def vqgan_flops(config, encode_only):
    """FLOPs of one image's forward pass through the tokenizer, or through its encoder; torch counts the convolutions."""
    with torch.device("meta"):
        model, image = VQGAN(config), torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model.encode(image) if encode_only else model.decoder(model.post_quant_conv(model.quant_conv(model.encoder(image))))
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------


def saved_bytes(function, module):
    """(what function() returns, bytes that autograd holds for its backward pass), each storage once, the module's own left out."""
    own, storages = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}, {}

    def note(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    return result, sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def vision_block_bytes(config, size):
    """Bytes that one position leaves in one block of the vision encoder, where that trains. size: bytes a number in autocast."""
    w, m = config.width, config.mlp_width
    casts = 2 if size == 4 else 4                                  # autocast casts what enters q, k, v and fc1 once for each
    return 2 * 4 * w + size * (casts * w + 4 * w + 3 * m)          # what is normed; those; q, k, v, output; three of the MLP


def decoder_block_bytes(config, size, trained):
    """The same for one decoder block. trained: whether its own weights train, or only gradients pass through."""
    d, h = config.width, (config.width * 8 // 3 + config.multiple_of - 1) // config.multiple_of * config.multiple_of
    casts = 1 if size == 4 else 2                                  # autocast casts what enters w1 and w3 once for each
    norms = 2 * (4 * d + trained * size * d)                       # x in float32, and normed
    attention = size * d * (6 + trained)                           # qkv, q and k turned, output; what went in
    mlp = size * (trained * casts * d + (3 + trained) * h)         # what went in; w1 x, its silu, w3 x; what enters w2
    return norms + attention + mlp + 2 * d * (config.dropout > 0)  # a byte for each number that dropout may take


def text_block_bytes(config, size, length):
    """The same for one position of a text block, all of it trained, in a prompt of this length."""
    d, inner, m = config.width, config.n_head * config.head_width, config.mlp_width
    casts = 2 if size == 4 else 5                                  # what enters q, k, v and wi_0, wi_1
    norms = 4 * 4 * d                                              # the residual stream is float32 here
    attention = size * (4 * inner + config.n_head * length)        # the last: a row of weights, or of the position bias
    return norms + attention + size * (casts * d + 4 * m) + (2 * d + m) * (config.dropout > 0)


def activation_bytes(model, tokens, images, size, checkpoint=False, pooled=0):
    """Bytes that one sample's forward pass leaves for the backward pass, the loss apart.

    With checkpoint a block leaves only what entered it, and while its backward pass runs, what it computes again.
    """
    vision, text, decoder = model.config.vision, model.config.text, model.config.decoder
    learns = {part: any(p.requires_grad for p in model.get_submodule(part).parameters()) for part in PARTS}
    decoder_block = decoder_block_bytes(decoder, size, next(model.decoder.blocks.parameters()).requires_grad)
    length = tokens + decoder.n_code - 1

    def stack(n_layer, block, entering):
        return block + n_layer * entering if checkpoint else n_layer * block

    total = stack(decoder.n_layer, length * decoder_block, length * size * decoder.width)
    total += length * (4 * decoder.width // decoder.n_head + 2 * (4 + size) * decoder.width)  # rotations, the last norm, both gathers
    total += decoder.n_code * size * decoder.width                                       # what enters the output head
    total += tokens * size * (text.width + 2 * decoder.width)                            # the projector
    if learns["encoder.connector"] or learns["encoder.text"]:
        total += stack(text.n_layer, tokens * text_block_bytes(text, size, tokens), tokens * 4 * text.width)
        total += tokens * 8 * text.width                                                 # the last norm
        total += images * vision.n_patch * size * (vision.width + 2 * text.width)        # the connector
    if learns["encoder.vision"]:
        total += pooled * vision.n_layer * (1 + vision.n_patch) * vision_block_bytes(vision, size)
    return total


def fixed_bytes(model, frozen, size, processes):
    """{what: bytes} that a GPU holds whatever the micro-batch. frozen: numbers in the tokenizer's weights.

    Weights, gradients and AdamW's two moments are float32; autocast keeps a bfloat16 copy of every matrix that gradients
    flow through; several processes put gradients into buckets to send them. Muon's one moment is counted as AdamW's two.
    """
    counts = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in PARTS}
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = min((i for i, part in enumerate(PARTS) if any(p.requires_grad for p in model.get_submodule(part).parameters())), default=len(PARTS))
    copies = sum(counts[part] for part in PARTS[first:]) if size < 4 else 0
    return {"weights": 4 * (sum(counts.values()) + frozen) + size * copies,
            "gradients": (8 if processes > 1 else 4) * learning, "optimizer": 8 * learning}
