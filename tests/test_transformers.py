"""Against `transformers`: its CLIP, T5, T5 tokenizer and image processor, at small random sizes."""

import random
import re
from functools import partial

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from conftest import randomize
from data import vision_pixels
from mentor import TextConfig, TextEncoder, VisionConfig, VisionEncoder, length_mask
from tokenizer import TextTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)
CLIP_NAMES = {r"^vision_model\.|embeddings\.|mlp\.|encoder\.": "", "layers": "blocks",
              "layer_?norm|layrnorm": "norm", r"(position_embedding)\.weight": r"\1",
              r"self_attn\.(.*)_proj": r"attention.\1"}
T5_NAMES = {r"^encoder\.": "", "embed_tokens|shared": "embedding", "final_layer_norm": "norm",
            r"block\.0\..*(relative)_attention(_bias)": r"\1\2", r"block\.(\d+)\.": r"blocks.\1.",
            r"layer\.0\.layer_norm": "norm1", r"layer\.1\.layer_norm": "norm2", r"layer\.\d\.\w+\.": ""}


def renamed(module, names):
    """A module's weights under our names."""
    tensors = {name: tensor for name, tensor in module.state_dict().items() if "position_ids" not in name}
    for old, new in names.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


@torch.no_grad()
def test_clip_gives_the_same_features():
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3,
                                           num_attention_heads=4, intermediate_size=48)
    theirs = randomize(transformers.CLIPVisionModel(config)).eval()
    ours = VisionEncoder(VisionConfig(32, 8, width=32, n_layer=3, n_head=4, mlp_width=48))
    ours.load_state_dict(renamed(theirs, CLIP_NAMES))
    pixels = torch.randn(2, 3, 32, 32)
    out = theirs(pixels, output_hidden_states=True)
    close(ours(pixels), out.hidden_states[-2][:, 1:])
    close(ours.pool(ours.before_last(pixels)), out.pooler_output)


@torch.no_grad()
def test_t5_gives_the_same_states():
    """300 tokens: distances far beyond the last bucket."""
    config = transformers.T5Config(vocab_size=320, d_model=32, d_kv=12, d_ff=40, num_layers=3, num_heads=4,
                                   feed_forward_proj="gated-gelu")
    theirs = randomize(transformers.T5EncoderModel(config)).eval()
    ours = TextEncoder(TextConfig(320, width=32, n_layer=3, n_head=4, head_width=12, mlp_width=40)).eval()
    ours.load_state_dict(renamed(theirs, T5_NAMES))
    ids, mask = torch.randint(320, (3, 300)), length_mask(torch.tensor([300, 217, 3]), 300)
    expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    close(ours(ours.embedding(ids), mask)[mask], expected[mask])


def test_texts_get_the_same_ids(tmp_path):
    """With a SentencePiece model like T5's: unigram, ids 0 pad, 1 </s>, 2 unknown."""
    words, rng = "the cat sat on a red mat and saw one big star at night".split(), random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words, k=8)) + "." for _ in range(500)),
        model_prefix=str(tmp_path / "spiece"), vocab_size=100, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2)
    ours = TextTokenizer((tmp_path / "spiece.model").read_bytes())
    pieces = [(ours.pieces.id_to_piece(i), ours.pieces.get_score(i)) for i in range(len(ours.pieces))]
    theirs = transformers.T5Tokenizer(vocab=pieces + [(f"<extra_id_{99 - i}>", 0.0) for i in range(100)])
    theirs.add_tokens(["<image>"], special_tokens=True)
    assert theirs.convert_tokens_to_ids("<image>") == ours.image_id == ours.vocab_size - 1
    for text in ("the cat sat on a mat.", "The cat in <image>.\nthe cat", "<image><image> and <image>.", "",
                 "  one   big\n\nstar ", "zebra, 123!", "a <extra_id_3> star</s> red", "<image>."):
        assert ours.encode(text) == theirs(text).input_ids, text


@pytest.mark.parametrize("size", [(28, 28), (40, 28), (57, 91), (300, 201), (29, 640), (15, 20)])
def test_images_get_the_same_pixels(size):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    process = processor(size={"shortest_edge": 28}, crop_size=28)
    close(vision_pixels(picture, 28), process(Image.fromarray(picture), return_tensors="pt").pixel_values[0])
