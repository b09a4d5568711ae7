"""Against `transformers`: its CLIP, T5, tokenizer and image processor at small random sizes, saved by it, read by our import."""

import random

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import train
from conftest import randomize
from data import TextTokenizer, vision_pixels
from sample import Pipeline
from tokenizer import VQGAN

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

KEYS = ["--vqgan.ch=8", "--vqgan.ch_mult=1,1,1", "--vqgan.num_res_blocks=1", "--vqgan.norm_groups=4", "--vqgan.z_channels=8", "--vqgan.codebook_size=32",
        "--model.vision.width=32", "--model.vision.n_layer=3", "--model.vision.n_head=4", "--model.vision.mlp_width=48",
        "--model.text.vocab_size=320", "--model.text.width=32", "--model.text.n_layer=3", "--model.text.n_head=4", "--model.text.head_width=12", "--model.text.mlp_width=40",
        "--model.decoder.width=32", "--model.decoder.n_layer=1", "--model.decoder.codebook_size=32", "--released.fresh=connector,projector,decoder", "--device=cpu"]
CLIP_VISION = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
CLIP_TEXT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
T5 = dict(vocab_size=320, d_model=32, d_kv=12, d_ff=40, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
WORDS = "the cat sat on a red mat and saw one big star at night".split()


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A SentencePiece model like T5's: unigram, ids 0 pad, 1 </s>, 2 unknown."""
    prefix, rng = tmp_path_factory.mktemp("spiece") / "spiece", random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(500)), model_prefix=str(prefix), vocab_size=100, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return prefix.with_suffix(".model")


def imported(tmp_path, clip, t5, spiece, **options):
    """Save a CLIP and a T5 as Hub folders, import them, open the model."""
    for name, module in (("clip", clip), ("t5", t5)):
        module.save_pretrained(tmp_path / name, **options)
    torch.save({"model": VQGAN(train.parse(["tiny", *KEYS])[1].vqgan).state_dict()}, tmp_path / "vq.pt")
    train.main(["tiny", *KEYS, "--stage=import", f"--out={tmp_path}/out", f"--released.clip={tmp_path}/clip", f"--released.t5={tmp_path}/t5", f"--released.spiece={spiece}", f"--released.vq={tmp_path}/vq.pt"])
    return Pipeline.open(tmp_path / "out", "cpu").model.encoder


@pytest.mark.parametrize("whole, shards", [(False, False), (True, False), (True, True)])
def test_clip_and_t5_give_the_same_features(whole, shards, tmp_path, spiece):
    """Vision tower and encoder alone, or the whole CLIP and the whole encoder-decoder; one file, or many shards."""
    vision = transformers.CLIPVisionConfig(**CLIP_VISION)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=16)) if whole else transformers.CLIPVisionModel(vision)
    t5 = (transformers.T5ForConditionalGeneration if whole else transformers.T5EncoderModel)(transformers.T5Config(**T5))
    clip, t5 = randomize(clip).eval(), randomize(t5).eval()
    ours = imported(tmp_path, clip, t5, spiece, **({"max_shard_size": "10KB"} if shards else {}))
    assert len(list((tmp_path / "t5").glob("model*.safetensors"))) > (4 if shards else 0)
    torch.manual_seed(0)
    pixels, ids, mask = torch.randn(2, 3, 32, 32), torch.randint(320, (3, 300)), torch.arange(300) < torch.tensor([300, 217, 3])[:, None]
    with torch.no_grad():  # 300 tokens: distances far beyond the last bucket
        theirs = (clip.vision_model if whole else clip)(pixels, output_hidden_states=True)
        torch.testing.assert_close(ours.vision(pixels), theirs.hidden_states[-2][:, 1:], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours.vision.pool(ours.vision.before_last(pixels)), theirs.pooler_output, atol=2e-5, rtol=1e-5)
        theirs = (t5.encoder if whole else t5)(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(ours.text(ours.text.embedding(ids), mask)[mask], theirs[mask], atol=2e-5, rtol=1e-5)


def test_texts_get_the_same_ids(spiece):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))] + [(f"<extra_id_{99 - i}>", 0.0) for i in range(100)]
    theirs, ours = transformers.T5Tokenizer(vocab=vocabulary), TextTokenizer.from_file(spiece)
    theirs.add_tokens(["<image>"], special_tokens=True)
    assert theirs.convert_tokens_to_ids("<image>") == ours.image_id
    for text in ("the cat sat on a mat.", "The cat in <image>.\nthe cat on the mat", "<image><image> and <image>", "", "  one   big\n\nstar ", "zebra, 123!", "a <extra_id_3> star</s> red",
                 "<image>.", "The image is <image>\na red star at night."):
        assert ours.encode(text) == theirs(text).input_ids, text


@pytest.mark.parametrize("size", [(28, 28), (40, 28), (57, 91), (300, 201), (29, 640), (15, 20)])
def test_images_get_the_same_pixels(size):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # newer versions have another on torchvision beside it
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = processor(size={"shortest_edge": 28}, crop_size=28)(Image.fromarray(picture), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(vision_pixels(picture, 28), theirs, atol=1e-5, rtol=0)

