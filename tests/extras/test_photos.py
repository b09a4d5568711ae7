"""LPIPS, and a tokenizer that trains with it."""

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import CPU, SMALL
from extras import photos
from extras.photos import LPIPS

CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512,
                26: 512, 28: 512}  # {number: width} as torchvision has them
MEAN, STD = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
HEADS = {f"lin{i}.model.1.weight": torch.rand(1, 64 << min(i, 3), 1, 1) for i in range(5)}

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights under the published names, and VGG16's."""
    folder, vgg, before = tmp_path_factory.mktemp("lpips"), {"classifier.0.bias": torch.zeros(3)}, 3
    for number, width in CONVOLUTIONS.items():
        vgg[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) * (2 / 9 / before) ** 0.5
        vgg[f"features.{number}.bias"], before = torch.randn(width) / 10, width
    torch.save(vgg, folder / "vgg16-397923af.pth")
    torch.save(HEADS, folder / "vgg.pth")
    return folder, vgg

def test_distance_is_that_of_vgg16s_features(weights):
    def features(x):
        x = (x - MEAN) / STD
        for number in CONVOLUTIONS:
            if number in (5, 10, 17, 24):  # after a max-pool
                yield x / x.norm(dim=1, keepdim=True)
                x = F.max_pool2d(x, 2)
            weight, bias = vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"]
            x = F.conv2d(x, weight, bias, padding=1).relu()
        yield x / x.norm(dim=1, keepdim=True)
    folder, vgg = weights
    lpips, a, b = LPIPS(folder), *(torch.rand(2, 2, 3, 32, 32) * 2 - 1)
    pairs = zip(HEADS.values(), features(a), features(b.requires_grad_()))
    torch.testing.assert_close(lpips(a, b), sum((head * (p - q) ** 2).sum(1).mean() for head, p, q in pairs))
    assert lpips(a, a) == 0 < lpips(a, b)
    lpips(a, b).backward()
    assert b.grad.any() and all(p.grad is None and not p.requires_grad for p in lpips.parameters())

def test_weights_that_are_broken_or_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "WIDTHS", ())  # and so without VGG's 60 MB
    torch.save({}, tmp_path / "vgg16-397923af.pth")
    file, name = tmp_path / "vgg.pth", "lin2.model.1.weight"
    for wrong, problem in (({}, "0.model.1"), (HEADS | {name: torch.rand(1, 9, 1, 1)}, "size mismatch"),
                           (HEADS | {name: HEADS[name] / 0}, "not finite"), (5, "")):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=f"vgg.pth is broken or of another network.*{problem}"):
            LPIPS(tmp_path)
    torch.save(HEADS, file)
    LPIPS(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="vgg.pth is broken"):
        LPIPS(tmp_path)

def test_the_tokenizer_trains_with_it_and_goes_on_only_with_the_same(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGE_MODULES", {**train.STAGE_MODULES})
    monkeypatch.setattr(train, "PRESETS", {**train.PRESETS})
    calls = []  # VGG16 itself would take long
    monkeypatch.setattr(LPIPS, "forward", lambda self, a, b: calls.append(1) or 7 * (a - b).abs().mean())
    keys = ["tiny", *SMALL, "--stage=tokenizer", "--tokenizer.steps=2", "--tokenizer.global_batch=2"]
    photos.main([*keys, f"--out={tmp_path}", f"--lpips={weights[0]}"])
    assert len(calls) > 2
    stage, (a, b) = photos.PhotosStage(weights[0], train.parse(keys), CPU, None), torch.rand(2, 2, 3)
    torch.testing.assert_close(stage.reconstruction_loss(a, b), F.mse_loss(a, b) + 7 * (a - b).abs().mean())
    assert not any("lpips" in name for name in stage.state_dict())  # VGG16 is not saved
    monkeypatch.undo()  # another process
    with pytest.raises(ValueError, match=r"tokenizer.lpips=\w{16},\w{16}"):
        train.main([*keys, f"--out={tmp_path}"])
