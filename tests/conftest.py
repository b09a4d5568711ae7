"""Small models, batches and runs that the tests share. Everything runs on the CPU, without network."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Collate, Shapes, Samples  # noqa: E402
from mentor import DecoderConfig, Mentor, MentorConfig, TextConfig, VisionConfig  # noqa: E402
from sample import Pipeline  # noqa: E402

torch.set_num_threads(1)  # tensors this small are slower on two, and much slower where other work runs

# The smallest models, as keys of train.py after a preset that draws 32 pixels.
FIVE = tuple(train.TASKS)  # before extras add theirs
SMALL = ["--vqgan.ch=8", "--vqgan.ch_mult=1,1,1", "--vqgan.num_res_blocks=1", "--vqgan.norm_groups=4",
         "--vqgan.z_channels=8", "--vqgan.codebook_size=32", "--model.vision.width=16",
         "--model.vision.n_head=2", "--model.vision.n_layer=2", "--model.vision.mlp_width=32",
         "--model.text.width=16", "--model.text.n_head=2", "--model.text.mlp_width=32",
         "--model.decoder.width=32", "--model.decoder.n_layer=2", "--device=cpu"]
CPU = train.Machine(0, 1, torch.device("cpu"), torch.float32)

def few_steps(**keys):
    """These keys of every stage: few_steps(steps=2) is --tokenizer.steps=2, --pretrain.steps=2, ..."""
    return [f"--{stage}.{key}={value}" for stage in train.STAGES for key, value in keys.items()]

def small_config(text_tokenizer, **changes):
    """A MentorConfig of 64 codes, and 4 tokens for an image, without dropout."""
    return MentorConfig(
        vision=VisionConfig(image_size=32, patch_size=16, width=32, n_layer=2, n_head=2, mlp_width=64),
        text=TextConfig(vocab_size=text_tokenizer.vocab_size, width=32, n_layer=2, n_head=2, head_width=16,
                        mlp_width=64, dropout=0.0),
        decoder=DecoderConfig(codebook_size=64, grid_size=8, width=64, n_layer=2, n_head=4, dropout=0.0),
        **{"context": 64, **changes})

def randomize(model, std=0.2):
    """Give every weight a random value, the zero output head too, so that no test passes on zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model

def same_weights(a, b):
    """Whether two models, or dictionaries of tensors, hold the same bits under the same names."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

def contents(folder):
    """{relative path: bytes} of all files in a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def only(batch, i):
    """Sample i of a batch, alone and without padding."""
    n, width = int(batch.lengths[i]), batch.text_ids.shape[1]
    mine, per_image = batch.image_slots // width == i, len(batch.image_slots) // max(1, len(batch.pixels))
    return replace(batch, text_ids=batch.text_ids[i : i + 1, :n], lengths=batch.lengths[i : i + 1],
                   pixels=batch.pixels[mine[:: per_image or 1]],
                   image_slots=batch.image_slots[mine] - i * width,
                   targets=batch.targets[i : i + 1], drop=batch.drop[i : i + 1],
                   masked=batch.masked[i : i + 1, :n], tasks=batch.tasks[i : i + 1])

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

@pytest.fixture(scope="session")
def world():
    return Shapes(32)

@pytest.fixture(scope="session")
def text_tokenizer(world):
    return world.text_tokenizer()

@pytest.fixture(scope="session")
def pipeline():
    """The trained model that comes with the repository. Tests leave it as it is."""
    return Pipeline(ROOT / "trained" / "tiny", "cpu")

@pytest.fixture
def model(text_tokenizer):
    return randomize(Mentor(small_config(text_tokenizer))).eval()

@pytest.fixture
def make_batch(world, text_tokenizer):
    """make_batch(config, count, task=share, ...) -> a Batch of that many samples; without tasks, of all."""
    def make(config, count, seed=0, **mix):
        dataset = Samples(world, mix or dict.fromkeys(FIVE, 1.0), seed)
        return Collate(text_tokenizer, config, world.image_size)([dataset[i] for i in range(count)])
    return make
