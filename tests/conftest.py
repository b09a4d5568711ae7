"""Small models and batches that the tests share. Everything runs on the CPU, without network; where there is a GPU, drawing and
benchmarks run on it as well."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from data import TASKS, Collate, Shapes, WorldDataset  # noqa: E402
from mentor import ConnectorConfig, DecoderConfig, Mentor, MentorConfig, TextConfig, VisionConfig, check_fit, released_parameters  # noqa: E402

SMALL = ["--vqgan.ch=8", "--vqgan.ch_mult=1,1,1", "--vqgan.num_res_blocks=1", "--vqgan.norm_groups=4", "--vqgan.z_channels=8", "--vqgan.codebook_size=32",
         "--model.vision.width=16", "--model.vision.n_head=2", "--model.vision.n_layer=2", "--model.vision.mlp_width=32", "--model.text.width=16", "--model.text.n_head=2",
         "--model.text.mlp_width=32", "--model.decoder.width=32", "--model.decoder.n_layer=2", "--model.decoder.codebook_size=32", "--device=cpu"]


def few_steps(**keys):
    """These keys of every stage: few_steps(steps=2) is --tokenizer.steps=2, --pretrain.steps=2, ..."""
    return [f"--{stage}.{key}={value}" for stage in train.STAGES for key, value in keys.items()]


torch.set_num_threads(1)  # tensors this small are slower on two, and much slower where other work runs
train.VALIDATION = 8


@pytest.fixture(params=[1, 2])
def threads(request):
    """torch's threads, between which matrices and attention are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world():
    return Shapes(32)


@pytest.fixture(scope="session")
def text_tokenizer(world):
    return world.text_tokenizer()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """All four stages, six steps each, without the scoring. Tests link to it and leave it as it is."""
    from test_train import SHORT
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.sample, "score", lambda *arguments: None)
        train.main(["tiny", *SHORT, f"--out={out}"])
    return out


def small_config(text_tokenizer, kind="mlp"):
    return MentorConfig(
        vision=VisionConfig(image_size=32, patch_size=16, width=32, n_layer=2, n_head=2, mlp_width=64),
        connector=ConnectorConfig(kind=kind, n_query=4, width=32, n_layer=2, n_head=2),
        text=TextConfig(vocab_size=text_tokenizer.vocab_size, width=32, n_layer=2, n_head=2, head_width=16, mlp_width=64, dropout=0.0),
        decoder=DecoderConfig(codebook_size=64, grid_size=8, width=64, n_layer=2, n_head=4, dropout=0.0),
        context=64)


def randomize(model, std=0.2):
    """Give every weight a random value, the zero output head too, so that no test passes on zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def load_released(model, tensors, fresh=()):
    """Copy tensors with released names into a Mentor; names that start with one of `fresh` may be missing."""
    parameters = released_parameters(model)
    check_fit(parameters, tensors, fresh)
    with torch.no_grad():
        for n, tensor in tensors.items():
            parameters[n].copy_(tensor)


@pytest.fixture(params=["mlp", "query"])
def model(request, text_tokenizer):
    torch.manual_seed(0)
    return randomize(Mentor(small_config(text_tokenizer, request.param))).eval()


@pytest.fixture
def make_batch(world, text_tokenizer):
    """make_batch(config, count, **mix) -> a Batch of that many samples."""

    def make(config, count, seed=0, **mix):
        dataset = WorldDataset(world, mix or dict.fromkeys(TASKS, 1.0), seed)
        collate = Collate(text_tokenizer, config.vision.image_size, config.image_tokens, config.context, 32)
        return collate([dataset[i] for i in range(count)])

    return make


def only(batch, i):
    """Sample i of a batch, alone and without padding."""
    images = [t == i for t in image_owner(batch)]
    length = int(batch.lengths[i])
    slots = batch.image_slots[batch.image_slots // batch.text_ids.shape[1] == i] - i * batch.text_ids.shape[1]
    return replace(batch, text_ids=batch.text_ids[i : i + 1, :length], lengths=batch.lengths[i : i + 1], pixels=batch.pixels[images],
                   image_slots=slots, name_ids=batch.name_ids[images], name_mask=batch.name_mask[images],
                   targets=batch.targets[i : i + 1], drop=batch.drop[i : i + 1], tasks=batch.tasks[i : i + 1])


def image_owner(batch):
    """For every image of the batch, the sample it belongs to."""
    per_image = len(batch.image_slots) // max(len(batch.pixels), 1)
    return (batch.image_slots[::per_image] // batch.text_ids.shape[1]).tolist() if len(batch.pixels) else []
