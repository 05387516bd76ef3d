"""Energy reports against PyTorch's own counter, on hostile networks, and against nn-dataflow where it is installed."""

import copy
import re
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune

import deepkmeans as dk
from deepkmeans.hardware import LEVELS, eyeriss_accesses, reuse_operations


def on_meta(name, **options):
    import torchvision

    with torch.device("meta"):
        return getattr(torchvision.models, name)(**options)


def test_resnet50_takes_less_than_two_seconds():
    net = on_meta("resnet50")
    dk.energy(net, (3, 64, 64))  # what PyTorch imports at its first use
    start = time.process_time()
    report = dk.energy(net, (3, 224, 224))
    assert time.process_time() - start < 2 and report.macs == 4_089_184_256


def test_a_network_of_a_terabyte_costs_no_memory():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2**19, 2**19))
    assert dk.energy(net, (2**19,)).total == 7 * 2**38


def test_the_network_is_left_as_it_was():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 64, 10)
    ).train()
    net[2].eval()
    prune.l1_unstructured(net[3], "weight", 0.5)
    before, modes, random = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_rng_state()
    for image in ((3, 12, 12), torch.zeros(2, 3, 12, 12)):
        report = dk.energy(net, image)
        assert report.layers.density.tolist() == [1, 0.5, 1]
    with pytest.raises(ValueError, match=r"input_shape=\(4, 12, 12\)"):
        dk.energy(net, (4, 12, 12))
    assert modes == [m.training for m in net.modules()] and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net[3].weight.is_meta and not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(access_cost=-3), "access_cost=-3 must be a finite number"),
        (dict(access_cost=float("inf")), "access_cost=inf must be a finite number"),
        (dict(access_cost="6"), "access_cost='6' must be a finite number"),
        (dict(plan={"conv1": 3}), "plan\\['conv1'\\]=3 must be a LayerPlan"),
    ],
)
def test_what_is_no_cost_and_no_plan_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        dk.energy(dk.build("lenet5"), (1, 28, 28), **wrong)


def test_a_layer_used_twice_counts_twice_and_an_unused_one_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spare, self.attention = (
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Linear(3, 3),
                nn.MultiheadAttention(4, 1, batch_first=True),
            )

        def forward(self, x):
            y = self.conv(self.conv(input=x)).flatten(2).mT
            return y @ y.mT

    once, report = dk.energy(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), (4, 6, 6)), dk.energy(Net(), (4, 6, 6))
    assert report.macs == 2 * once.macs and report.total == 2 * once.total and report.outside_macs == 36 * 36 * 4
    assert report.skipped["spare"].startswith("its module is not called") and "neither" in report.skipped["attention"]
    assert "not counted: 3 layers, 5,184 MACs" in str(report)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
        self.right, self.both, self.mask = self.left, nn.ModuleList([self.left[0], self.left]), None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(4, 4)
        return nn.functional.dropout(self.left(x) + self.right(x)) * self.mask


@pytest.mark.parametrize("image", [(2, 4, 4), torch.zeros(1, 2, 4, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_module_of_several_names_is_left_as_it_was(image, shared):
    net = Siamese()
    if shared:
        dk.share(net, dk.make_plan(net, k=3))
    before, random = dict(net.state_dict(keep_vars=True)), torch.get_rng_state()
    report = dk.energy(net, image)
    assert report.macs == 2 * 2 * 4 * 4 * 18 and len(report.lines) == 1 and not report.outside_macs
    after = net.state_dict(keep_vars=True)
    held = [name for name in before if not name.endswith((".codes", ".counts"))]
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in held)
    assert torch.equal(random, torch.get_rng_state()) and net.mask is None and all(m.training for m in net.modules())
    assert net(torch.zeros(1, 2, 4, 4)).device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("image", [(1, 8, 8), torch.zeros(1, 1, 8, 8)])
def test_a_part_in_torchscript_is_left_as_it_was(image):
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), scripted)
    assert dk.energy(net, image).outside_macs == 6 * 6 * 16
    assert net.training and scripted.training and net(torch.zeros(1, 1, 8, 8)).device.type == "cpu"


def test_a_lazy_network_is_made_by_its_first_run():
    net = nn.Sequential(nn.LazyConv2d(3, 3))
    assert dk.energy(net, torch.zeros(1, 2, 8, 8)).macs == 6 * 6 * 3 * 18 and net[0].in_channels == 2


def test_attention_is_counted_whether_it_runs_or_not():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    shape, run = (dk.energy(net, image) for image in ((5, 8), torch.zeros(1, 5, 8)))
    assert shape.outside_macs == run.outside_macs == 5 * 4 * 64 + 2 * 5 * 5 * 8
    assert shape.skipped == run.skipped and "is in outside_macs" in run.skipped["0.self_attn.out_proj"]


class Particular(nn.Sequential):
    def forward(self, x):
        assert x.shape[-1] == 7, "Wrong image height!"
        return {"logits": super().forward(x)}[self.key]


@pytest.mark.parametrize("key, side, said", [("logits", 6, "Wrong image height!"), ("boxes", 7, "'boxes'")])
def test_whatever_a_network_says_to_an_image_is_a_value_error(key, side, said):
    net = Particular(nn.Conv2d(1, 1, 3))
    net.key = key
    for image in ((1, side, side), torch.zeros(1, 1, side, side)):
        with pytest.raises(ValueError, match=re.escape(f"the network does not run on it ({said})")):
            dk.energy(net, image)


def test_a_pinned_zero_cluster_counts_as_pruned():
    net = dk.build("lenet5", seed=0)
    dk.share(net, {"conv2": dk.LayerPlan(k=8, sparsity=0.5)})
    dense, sparse = (dk.energy(n, (1, 28, 28)).layers.loc["conv2"] for n in (dk.build("lenet5", seed=0), net))
    assert (
        sparse.density == 0.5
        and sparse.activations == dense.activations / 2
        and sparse.full_adders == dense.full_adders / 2
    )
    assert sparse.stored_bits == 16 * 8 * 5 + 3 * 5000


@pytest.mark.parametrize("layout", dk.rows.LAYOUTS)
@pytest.mark.parametrize("sparse_at", ["zero", "mean"])
def test_a_plan_counts_as_the_network_that_is_shared_by_it(layout, sparse_at):
    net = dk.build("lenet5", seed=0)
    plan = {"conv2": dk.LayerPlan(k=8, sparsity=0.3, sparse_at=sparse_at, layout=layout)}
    planned = dk.energy(net, (1, 28, 28), plan=plan, computation="reuse")
    dk.share(net, plan)
    assert planned.lines == dk.energy(net, (1, 28, 28), computation="reuse").lines


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_macs_are_those_of_pytorch_counter(c, m, s, stride, padding, dilation, groups, axes, transposed):
    from torch.utils.flop_counter import FlopCounterMode

    kind = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")
    net = nn.Sequential(
        kind(
            c * groups,
            m * groups,
            s,
            stride=stride,
            padding=padding * (not transposed),
            dilation=dilation,
            groups=groups,
        )
    )
    image = torch.zeros(2, c * groups, *(9, 8, 7)[:axes])
    with FlopCounterMode(display=False) as counter:
        net(image)
    assert dk.energy(net, image).macs == counter.get_total_flops() // 2


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(2, 5),
    st.integers(1, 3),
    st.sampled_from(["scalar", "row", "kernel", "filter"]),
)
def test_reuse_with_a_centre_for_each_row_saves_nothing(c, m, s, stride, layout):
    layer = nn.Conv2d(c, m, s, stride=stride)
    output = layer(torch.zeros(1, c, 11, 12)).shape
    rows = len(dk.to_rows(layer.weight, layout))
    one, all_rows = reuse_operations(layer, output, 1, layout), reuse_operations(layer, output, rows, layout)
    assert all_rows[0] >= output.numel() * c * s * s  # each product of the dense layer is among them
    assert all_rows[0] == rows * one[0]


@pytest.fixture(scope="module")
def reference(root):
    return pd.read_csv(root / "figures" / "energy_reference_nn_dataflow.csv", comment="#")


def test_the_table_is_that_of_the_layers(reference):
    assert (
        reference.macs == reference.groups * reference.c * reference.m * reference.kernel**2 * reference.side**2
    ).all()
    assert (abs(reference["RF W"] / (reference.batch * reference.macs) - 1) < 1e-6).all()  # a MAC reads one weight


def test_nn_dataflow_gives_the_committed_accesses(reference):
    pytest.importorskip(
        "nn_dataflow",
        reason="optional: pip install 'deepkmeans[energy-ref]', then pip install --no-deps nn-dataflow==2.1",
    )
    for network, layer in (("AlexNet", "3"), ("GoogLeNet", "inception3a.branch3.1.conv")):
        row = reference[(reference.network == network) & (reference.layer == layer) & (reference.batch == 4)].iloc[0]
        found = eyeriss_accesses(*(int(row[k]) for k in ("c", "m", "side", "kernel", "stride", "batch")))
        assert set(found) == {f"{level} {t}" for level in LEVELS for t in "WIO"}
        assert all(abs(row.groups * n - row[key]) <= 1e-8 * max(1, row[key]) for key, n in found.items())


def test_the_conclusion_stands_in_the_committed_tables(root):
    grid = pd.read_csv(root / "figures" / "energy_verification_grid.csv")
    plain = grid[grid.metric == "codebook"]
    assert (abs(plain.rates - plain.rate_alone) < 1e-4).all()  # the control is as good
    savings = pd.read_csv(root / "figures" / "energy_verification_savings.csv")
    assert (savings.metric > 2 * savings["nn-dataflow"]).all() and (
        savings["nn-dataflow, decoded before the registers"] < 0.1
    ).all()


def test_a_network_of_zeros_has_a_summary():
    net = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.zeros_(net.weight)
    assert "0 MAC units" in str(dk.energy(nn.Sequential(net), (1, 4, 4), stored="codebook"))


def test_bits_may_be_numpy_s_and_a_computed_weight_of_another_kind_is_left_out_by_name():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(9, 4)), nn.Linear(4, 4))
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    report = dk.energy(net, tokens, weight_bits=np.int64(8))
    assert report.skipped == {"0": "Embedding is neither convolution nor linear layer"}
    assert report.skipped.keys() == dk.make_plan(net, k=2, include=(nn.Linear,)).skipped.keys()
    assert report.lines == dk.energy(net, tokens, weight_bits=8).lines


def test_a_batch_without_images_has_no_energy():
    with pytest.raises(ValueError, match=r"input_shape=a tensor \(0, 1, 8, 8\) leaves a layer without activations"):
        dk.energy(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.zeros(0, 1, 8, 8))


def test_a_shared_layer_of_another_kind_is_still_said_to_be_left_out():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.linear = nn.Embedding(50, 8), nn.Linear(8, 10)

        def forward(self, tokens):
            return self.linear(self.words(tokens).mean(1))

    net, tokens = Words(), torch.randint(50, (4, 7))
    before = dk.energy(net, tokens).skipped
    dk.share(net, dk.make_plan(net, k=4, include=(nn.Embedding,)))
    assert dk.energy(net, tokens).skipped == before == {"words": "Embedding is neither convolution nor linear layer"}
