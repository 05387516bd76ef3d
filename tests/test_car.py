"""CAR on the networks of the paper: a filter that is out computes what a silenced channel computes."""

import copy

import pytest
import torch

from deepkmeans.baselines.car import remove_filters
from deepkmeans.models import build


@pytest.mark.parametrize(
    "name, layer, consumers",
    [
        ("lenet5", "conv2", ["fc1"]),
        ("tt_conv_cnn", "conv1_1", ["bn1_1", "conv1_2"]),
        ("freshnet_cnn", "conv2", ["conv3"]),
        ("wide_resnet", "stage1.b1.conv1", ["stage1.b1.bn2", "stage1.b1.conv2"]),
    ],
)
def test_removal_equals_silence(name, layer, consumers):
    net = build(name, in_channels=1).eval()
    names = dict(net.named_modules())
    assert layer in names and all(c in names for c in consumers), list(names)
    small, silent, n = copy.deepcopy(net), copy.deepcopy(net), names[layer].out_channels
    remove_filters(small, layer, consumers, [0, n - 1])
    weight = silent.get_submodule(consumers[-1]).weight.data
    weight.view(len(weight), n, -1)[:, [0, n - 1]] = 0
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(x), silent(x), rtol=1e-4, atol=1e-5)
    assert small.get_submodule(layer).weight.shape[0] == n - 2
