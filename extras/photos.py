"""A tokenizer for photographs: LPIPS, a distance of pictures as people see them, besides the squared error.

    python -m extras.photos small --data=pets --lpips=weights    # with any arguments of train.py

The squared error alone turns hair, leaves and grass grey, the mean of all that they could be. LPIPS (arXiv
1801.03924) compares features of VGG16. Its folder holds torchvision's `vgg16-397923af.pth` and the LPIPS
project's `vgg.pth` (v0.1).
"""

import argparse
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from sample import cli
from tokenizer import TokenizerStage, TokenizerStageConfig, file_hash, require

FILES = {"vgg16-397923af.pth": "features.", "vgg.pth": "lin"}  # and how their tensors' names begin
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max-pool


class LPIPS(nn.Module):
    """How different pictures look: (B, 3, S, S) twice, in [-1, 1] -> their mean distance, scalar."""

    def __init__(self, folder):
        super().__init__()
        layers, before = [], 3
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            before = width or before
        self.features = nn.Sequential(*layers)
        heads = (nn.Conv2d(width, 1, 1, bias=False) for width in (64, 128, 256, 512, 512))
        self.heads = nn.ModuleList(nn.ModuleDict({"model": nn.Sequential(nn.Identity(), h)}) for h in heads)
        for part, (file, prefix) in zip((self.features, self.heads), FILES.items()):
            try:
                loaded = torch.load(folder / file, map_location="cpu", weights_only=True)
                own = {k.removeprefix(prefix): v for k, v in loaded.items() if k.startswith(prefix)}
                part.load_state_dict(own)
                require(all(tensor.isfinite().all() for tensor in own.values()), "not finite")
            except Exception as error:  # torch.load raises whatever the damage suggests
                error = shorten(str(error), 200)
                raise ValueError(f"{folder / file} is broken or of another network ({error})") from None
        self.requires_grad_(False)

    def forward(self, a, b):
        shift, scale = a.new_tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
        x, distance, heads = (torch.cat([a, b]) - shift) / scale, 0.0, iter(self.heads)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                fa, fb = F.normalize(x, dim=1, eps=1e-10).chunk(2)
                distance = distance + next(heads)["model"]((fa - fb).square()).mean()
            x = layer(x)
        return distance


@dataclass(frozen=True)
class PhotosStageConfig(TokenizerStageConfig):
    """With the hashes of LPIPS' files, so that a run goes on only with the same."""

    lpips: str = ""


class PhotosStage(TokenizerStage):
    """The tokenizer's stage, with LPIPS added to the squared error."""

    def __init__(self, folder, run, machine, image):
        super().__init__(run, machine, image)
        self.lpips = [LPIPS(folder).to(machine.device)]  # in a list: no part of what is trained and saved

    def reconstruction_loss(self, made, images):
        return super().reconstruction_loss(made, images) + self.lpips[0](made, images)


def main(arguments):
    """Run the command line."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--lpips", required=True)
    options, rest = parser.parse_known_args(arguments)
    folder = Path(options.lpips).expanduser()
    hashes = ",".join(file_hash(folder / file) for file in FILES)
    for name, run in train.PRESETS.items():
        train.PRESETS[name] = replace(run, tokenizer=PhotosStageConfig(**vars(run.tokenizer), lpips=hashes))
    train.STAGE_MODULES["tokenizer"] = functools.partial(PhotosStage, folder)
    train.main(rest)


if __name__ == "__main__":
    cli(main, "extras.photos")
