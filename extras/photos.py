"""A tokenizer for photographs: LPIPS, a distance of pictures as people see them, besides the squared error.

    python -m extras.photos small --data=pets --lpips=weights    # and any other arguments of train.py

The squared error alone turns hair, leaves and grass grey, the mean of all that they could be. LPIPS compares
features of VGG16 (arXiv 1801.03924), and the discriminator, which `small` and `full` have anyway, sharpens.
The folder --lpips holds torchvision's `vgg16-397923af.pth` and `vgg.pth`, the LPIPS project's heads (v0.1).
"""

import argparse
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from sample import cli
from tokenizer import TokenizerStage, TokenizerStageConfig, file_hash, require

FILES = {"vgg16-397923af.pth": "features.", "vgg.pth": "lin"}  # and with what their tensors' names begin
BLOCKS = {64: (0, 2), 128: (5, 7), 256: (10, 12, 14), 512: (17, 19, 21), 512.0: ()}


class LPIPS:
    pass
