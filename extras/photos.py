"""A tokenizer for photographs: LPIPS, a distance of pictures as people see them, besides the squared error.

    python -m extras.photos small --data=pets --lpips=weights

The squared error alone turns hair, leaves and grass grey, the mean of all that they could be. LPIPS compares
features of VGG16 (arXiv 1801.03924), and the discriminator, which `small` and `full` have anyway, sharpens.

The folder --lpips holds torchvision's `vgg16-397923af.pth` and `vgg.pth`, the LPIPS project's heads (v0.1).
The rest is train.py's command line, which may itself train the later stages.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from sample import cli
from tokenizer import TokenizerStage, TokenizerStageConfig, file_hash, require


class LPIPS(nn.Module):
    """How different pictures look: (B, 3, S, S) twice, in [-1, 1] -> their mean distance, scalar. Parameters
    have the names that they have in the two files."""

    FILES = {"vgg16-397923af.pth": "features.", "vgg.pth": "lin"}  # and with what their names begin
    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max-pool

    def __init__(self, folder):
        super().__init__()
        self.features, before = nn.Sequential(), 3
        for width in self.WIDTHS:
            layers = [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            self.features.extend(layers)
            before = width or before
        for i, width in enumerate((64, 128, 256, 512, 512)):  # a weight for each channel before a max-pool
            head = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))
        for file, prefix in self.FILES.items():
            self.read(Path(folder) / file, prefix)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def read(self, file, prefix):
        """Take the parameters of this prefix from a file. Raises ValueError if it does not hold them all."""
        where = f"--lpips={file.parent}: {file.name}"
        require(file.is_file(), f"{where} is missing; the folder must hold {' and '.join(self.FILES)}")
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            own = {name: loaded[name] for name in self.state_dict() if name.startswith(prefix)}
            self.load_state_dict(own, strict=False)
            broken = [name for name, tensor in own.items() if not tensor.isfinite().all()]
        except Exception as error:  # torch.load raises whatever the damage suggests
            broken = [" ".join(str(error).split())[:200]]
        require(not broken, f"{where} is broken or of another network ({broken[:1]})")

    def forward(self, a, b):
        x, distance, block = (torch.cat([a, b]) - self.shift) / self.scale, 0.0, 0
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                fa, fb = F.normalize(x, dim=1, eps=1e-10).chunk(2)
                head = self.get_submodule(f"lin{block}.model.1")
                distance, block = distance + head((fa - fb).square()).mean(), block + 1
            x = layer(x)
        return distance


@dataclass(frozen=True)
class PhotosStageConfig(TokenizerStageConfig):
    """Training of a tokenizer for photographs."""

    lpips: str = ""                 # hashes of LPIPS' files: a run goes on only with the same


class PhotosStage(TokenizerStage):
    """The tokenizer's stage, with LPIPS added to the squared error."""

    def __init__(self, lpips, run, machine, image):
        super().__init__(run, machine, image)
        self.lpips = [lpips.to(machine.device)]     # in a list: no part of what is trained and saved

    def reconstruction_loss(self, made, images):
        return super().reconstruction_loss(made, images) + self.lpips[0](made, images)


def main(arguments):
    """Run the command line."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return train.main(["--help"])
    folders = [Path(a.partition("=")[2]).expanduser() for a in arguments if a.startswith("--lpips=")]
    require(len(folders) == 1, f"give one --lpips=FOLDER with {' and '.join(LPIPS.FILES)}")
    train.STAGE_MODULES["tokenizer"] = functools.partial(PhotosStage, LPIPS(folders[0]))
    for name, run in train.PRESETS.items():
        train.PRESETS[name] = replace(run, tokenizer=PhotosStageConfig(**vars(run.tokenizer)))
    hashes = ",".join(file_hash(folders[0] / file) for file in LPIPS.FILES)
    train.main([*(a for a in arguments if not a.startswith("--lpips=")), f"--tokenizer.lpips={hashes}"])


if __name__ == "__main__":
    cli(main, "extras.photos")
