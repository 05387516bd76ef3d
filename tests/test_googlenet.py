"""GoogLeNet with weights in torchvision's format, on images in the folders of ILSVRC12.

This is the path of table 4 that needs data nobody ships.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import GoogLeNet

from deepkmeans.data import load, loaders
from deepkmeans.retrain import evaluate


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 4)):
        for wnid in ("n01440764", "n01443537", "n01484850"):
            (tmp_path / "imagenet" / part / wnid).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(
                    tmp_path / "imagenet" / part / wnid / f"{i}.JPEG"
                )
    return tmp_path


def test_released_weights_are_evaluated_as_torchvision_does(images, papermill, tmp_path):
    torch.manual_seed(0)
    source = GoogLeNet(num_classes=3, aux_logits=False, transform_input=True, init_weights=False)
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        # statistics of its own: with the initial ones nothing of the image reaches the output
        source(torch.randn(8, 3, 64, 64))
        source.eval().fc.weight.mul_(20)
    save_file({k: v.clone() for k, v in source.state_dict().items()}, tmp_path / "googlenet.safetensors")
    done = papermill(
        "nbs/retrain.ipynb",
        model="googlenet",
        data="imagenet",
        data_root=images,
        checkpoint=tmp_path / "googlenet.safetensors",
        K=2,
        kind="none",
        epochs=0,
        finetune_epochs=0,
        device="cpu",
        out=tmp_path / "runs",
        progress=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = (tmp_path / "runs").glob("*/record.json")
    stages = json.loads(record.read_text())["stages"]
    _, test = loaders(load("imagenet", images), 8)
    assert stages["baseline"]["loss"] == pytest.approx(evaluate(source, test).loss, rel=1e-4)
    assert stages["wr"]["ratio"]["conv"]["log2"] > 20
