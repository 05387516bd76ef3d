"""What may befall a shared network and one that is to be shared: averaging, casting, 16 bits, pruning, ties."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import deepkmeans as dk
from deepkmeans.baselines.dkm import deep_compression, harden, soften
from deepkmeans.sharing import SharedWeight, share_layers, shared_layers


@cache
def shared_once(k):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64))
    dk.share(net, dk.make_plan(net, k=k))
    return net


def shared(k=64):
    return copy.deepcopy(shared_once(k))


def codes(net):
    return {name: layer.codes.clone() for name, layer in shared_layers(net).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "averaging",
    [dict(avg_fn=lambda a, b, n: 0.9999 * a + 0.0001 * b), dict(multi_avg_fn=get_ema_multi_avg_fn(0.9999)), {}],
)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_codes_and_counts_survive_a_moving_average(averaging, use_buffers):
    net = shared()
    average = AveragedModel(net, use_buffers=use_buffers, **averaging)
    for _ in range(50):
        average.update_parameters(net)
    assert same(codes(net), codes(average.module))
    assert torch.equal(shared_layers(average.module)["0"].counts, torch.bincount(codes(net)["0"], minlength=64))
    torch.testing.assert_close(average.module[0].weight, net[0].weight)


def test_an_average_of_state_dicts_made_in_place_leaves_the_codes_alone():
    net, average = shared(), shared()
    for _ in range(50):
        for mean, new in zip(average.state_dict().values(), net.state_dict().values()):
            mean.copy_(0.9999 * mean + 0.0001 * new)
    assert same(codes(net), codes(average))


def test_a_state_dict_that_was_averaged_elsewhere_is_rounded_or_refused():
    net = shared()
    state = net.state_dict()
    mean = {name: 0.9999 * t + 0.0001 * t for name, t in state.items()}
    net.load_state_dict(mean)
    assert same(codes(net), codes(shared()))
    other = copy.deepcopy(net)
    shared_layers(other)["0"].codes.copy_(63 - codes(net)["0"])
    for wrong, reason in (
        ({name: t.to(state[name]) for name, t in mean.items()}, "counts"),
        (
            {name: (t + u) / 2 for (name, t), u in zip(state.items(), other.state_dict().values())},
            "whole numbers|counts",
        ),
        (state | {"0.parametrizations.weight.0.codes": state["0.parametrizations.weight.0.codes"][1:]}, "3071"),
        (
            state | {"0.parametrizations.weight.0.codes": state["0.parametrizations.weight.0.codes"] - 1},
            "whole numbers",
        ),
    ):
        with pytest.raises(RuntimeError, match=reason):
            net.load_state_dict(wrong)
        assert same(codes(net), codes(shared()))


@pytest.mark.parametrize(
    "cast",
    [
        lambda n: n.half(),
        lambda n: n.bfloat16(),
        lambda n: n.double(),
        lambda n: n.type(torch.float64),
        lambda n: n.to(torch.float16),
    ],
)
def test_a_cast_network_keeps_its_codes_and_computes_with_them(cast):
    net, many = shared(), shared(k=2200)
    for one in (net, many):
        before, whole = one[0].weight.detach().clone(), codes(one)
        cast(one)
        assert (
            same(codes(one), whole)
            and torch.equal(one[0].weight, before.to(one[0].weight.dtype))
            and one[0].weight.dtype != torch.float32
        )


def test_a_file_of_half_a_state_dict_loads_and_one_that_lost_codes_does_not():
    few, many = shared(), shared(k=2200)  # half has no odd numbers above 2,048
    few.load_state_dict({name: t.half() for name, t in few.state_dict().items()})
    assert same(codes(few), codes(shared()))
    with pytest.raises(RuntimeError, match="averaged or rounded"):
        many.load_state_dict({name: t.half() for name, t in many.state_dict().items()})


def test_the_state_dict_names_what_it_always_named_and_is_complete():
    net = shared()
    assert {
        "0.parametrizations.weight.original",
        "0.parametrizations.weight.0.codes",
        "0.parametrizations.weight.0.counts",
    } <= set(net.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*codes"):
        net.load_state_dict({name: t for name, t in net.state_dict().items() if not name.endswith("codes")})
    with pytest.raises(RuntimeError, match="rows"):
        net.load_state_dict(shared(k=8).state_dict())
    for copied in (copy.deepcopy(net), net.to("cpu")):
        assert same(codes(copied), codes(net))
    assert shared_layers(copy.deepcopy(net).to("meta"))["0"].codes.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5])
def test_the_codebook_s_gradient_is_the_mean_of_its_rows_in_every_precision(dtype, k):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(128, 300, 1, bias=False)).to(dtype)
    dk.share(net, dk.make_plan(net, k=k))
    factor = torch.rand(300, 128, 1, 1)
    (net[0].weight.float() * factor).sum().backward()
    layer, gradient = shared_layers(net)["0"], net[0].parametrizations.weight.original.grad
    rows = factor.to(dtype).double().view(-1, 1)
    means = torch.stack([rows[layer.codes == j].mean(0) for j in range(k)])
    torch.testing.assert_close(
        gradient.double(), means, rtol=2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5, atol=0
    )


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def parametrized(layer):
    parametrizations.weight_norm(layer)


def complex_(layer):
    layer.weight = nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.complex64))


def nan(layer):
    layer.weight.data[0, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            "weight_orig, weight_mask before each call; call prune.remove",
        ),
        (lambda layer: weight_norm(layer), "weight_g, weight_v before"),
        (lambda layer: spectral_norm(layer), "weight_orig"),
        (parametrized, "WeightNorm computes; call parametrize.remove_parametrizations"),
        (complex_, "complex64"),
        (nan, "NaN"),
        (lambda layer: layer.to("meta"), "without values"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_that_cannot_be_shared_leaves_all_others_dense(damage, reason):
    net = two()
    damage(net[2])
    plan, names = dk.make_plan(net, k=4), list(net.state_dict())
    for call in (lambda: dk.share(net, plan), lambda: dk.Regularizer(net, plan)):
        with pytest.raises(ValueError, match=f"layer '2'.*{reason}"):
            call()
        assert not shared_layers(net) and list(net.state_dict()) == names
    dk.share(net, dk.make_plan(net, k=4, exclude="2"))


@pytest.mark.parametrize("soft", [False, True])
def test_the_codebooks_of_the_baselines_come_to_all_layers_or_to_none(soft, monkeypatch):
    net = nn.Sequential(*two(), nn.Linear(8, 2))
    plan = dk.make_plan(net, k=4, layout="scalar")
    if soft:
        soften(net, plan)
    before, attach = copy.deepcopy(net.state_dict()), SharedWeight.attach.__func__

    def interrupted(cls, module, *parts):
        if module is net[2]:
            raise KeyboardInterrupt
        attach(cls, module, *parts)

    monkeypatch.setattr(SharedWeight, "attach", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        harden(net) if soft else deep_compression(net, plan)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    monkeypatch.undo()
    report = harden(net) if soft else deep_compression(net, plan)
    assert set(shared_layers(net)) == {"0", "2"} and report.skipped.keys() == {"3"}


def test_a_lazy_layer_is_refused_and_may_be_left_out():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3))
    with pytest.raises(ValueError, match="'1.weight' has no values: .* of a lazy layer"):
        dk.compression(net)
    with pytest.raises(ValueError, match="layer '1' has a weight without values"):
        dk.share(net, dk.make_plan(net, k=4))
    assert dk.share(net, dk.make_plan(net, k=4, exclude="1")).skipped == {"1": "excluded by '1'"}


def test_an_error_half_way_gives_the_dense_weights_and_gradients_back():
    class Breaks(SharedWeight):
        def forward(self, codebook):
            return super().forward(codebook) if self.shape[1] == 3 else None

    net, x = two(), torch.randn(1, 3, 9, 9)
    net(x).sum().backward()
    before = [(p, p.detach().clone(), p.grad.clone()) for p in net.parameters()]
    plan, y = dk.make_plan(net, k=4), net(x)
    layers = {name: net.get_submodule(name) for name in plan}
    with pytest.raises(Exception):
        share_layers(
            layers, {name: dk.kmeans(dk.to_rows(m.weight.detach()), 4) for name, m in layers.items()}, plan, Breaks
        )
    assert torch.equal(net(x), y) and all(
        a is p and torch.equal(p, v) and torch.equal(p.grad, g) for a, (p, v, g) in zip(net.parameters(), before)
    )


def test_sharing_drops_gradients_of_the_old_shape():
    net, x = two(), torch.randn(1, 3, 9, 9)
    net(x).sum().backward()
    dk.share(net, dk.make_plan(net, k=4))
    assert net[0].parametrizations.weight.original.grad is None
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def tied(how):
    net = nn.ModuleDict(dict(embedding=nn.Embedding(50, 8), head=nn.Linear(8, 50, bias=False)))
    net["head"].weight = (
        net["embedding"].weight if how == "one parameter" else nn.Parameter(net["embedding"].weight.data)
    )
    return net


@pytest.mark.parametrize("how", ["one parameter", "one memory"])
def test_a_weight_that_another_layer_uses_is_refused_though_that_layer_is_not_planned(how):
    net = tied(how)
    with pytest.raises(ValueError, match="the weight of layer 'head' is 'embedding.weight' too"):
        dk.share(net, dk.make_plan(net, k=4, include=nn.Linear))
    assert not shared_layers(net)


def test_a_layer_that_is_called_by_two_names_is_no_tie():
    layer = nn.Conv2d(3, 3, 3)
    net = nn.ModuleDict(dict(first=layer, again=layer))
    dk.share(net, dk.make_plan(net, k=4))
    assert net["first"].weight.flatten().unique().numel() <= 12


def test_every_weight_that_stays_dense_is_told_with_its_reason():
    net = nn.ModuleDict(
        dict(
            conv=nn.Conv2d(3, 8, 3),
            up=nn.ConvTranspose2d(8, 4, 3),
            words=nn.Embedding(10, 8),
            attention=nn.MultiheadAttention(8, 2),
            norm=nn.LayerNorm(8),
            fc=nn.Linear(8, 4),
        )
    )
    plan = dk.make_plan(net, k=4, exclude="con*")
    assert list(plan) == ["up"] and plan.skipped == {
        "conv": "excluded by 'con*'",
        "words": "Embedding is not included",
        "attention": "MultiheadAttention is not included",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not included",
        "fc": "Linear is not included",
    }
    report = dk.share(net, plan)
    assert report.skipped == plan.skipped and "not shared: conv (excluded by 'con*')" in str(report)
    assert set(dk.share(net, {}).skipped) == {"conv", "words", "attention", "attention.out_proj", "fc"}


def test_an_empty_plan_is_reported_and_printed():
    net = two()
    report = dk.share(net, {})
    assert (
        str(report).startswith("no layer was shared\nnot shared: 0 (not in the plan)")
        and len(report.layers) == 0
        and report.capped == []
    )


@pytest.mark.parametrize("layout", ["scalar", "row", "kernel", "filter"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_shared_in_every_layout(layout, groups):
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(8, 6, (3, 2), stride=2, groups=groups))
    dense = net[0].weight.detach().clone()
    dk.share(net, dk.make_plan(net, k=5, layout=layout))
    rows = {
        "scalar": dense.reshape(-1, 1),
        "row": dense.reshape(-1, 2),
        "kernel": dense.reshape(-1, 6),
        "filter": dense.reshape(8, -1),
    }[layout]
    layer = shared_layers(net)["0"]
    centres = torch.stack([rows[layer.codes == j].mean(0) for j in range(5)])
    torch.testing.assert_close(net[0].weight, centres[layer.codes.long()].reshape(dense.shape))
    assert dk.compression(net, coding="fixed").layers.k.tolist() == [5] and net(torch.randn(1, 8, 4, 4)).shape == (
        1,
        6,
        9,
        8,
    )


@pytest.mark.parametrize(
    "overrides, wanted",
    [({"*": 7}, [7, 7]), ({"2": 5}, [4, 5]), ({"2": 5, "*": 7}, [7, 5]), ({"*": 7, "[2-9]": 6}, [7, 6])],
)
def test_overrides_take_names_and_patterns(overrides, wanted):
    plan = dk.make_plan(two(), k=4, overrides={name: dk.LayerPlan(k=k) for name, k in overrides.items()})
    assert [p.k for p in plan.values()] == wanted


@pytest.mark.parametrize("overrides", ["conv*", "1", ""])
def test_an_override_that_matches_nothing_is_an_error(overrides):
    with pytest.raises(ValueError, match=f"no layer is called '{overrides.replace('*', '.')}"):
        dk.make_plan(two(), k=4, overrides={overrides: dk.LayerPlan(k=2)})


def test_a_float64_layer_is_clustered_as_float64():
    net = nn.Sequential(nn.Linear(50, 3)).double()
    net[0].weight.data = (
        1.7e9 + torch.arange(3).repeat_interleave(50).view(3, 50).double() * 30 + torch.rand(3, 50, dtype=torch.float64)
    )
    dk.share(net, dk.make_plan(net, k=3, include=nn.Linear))
    assert sorted(shared_layers(net)["0"].counts.tolist()) == [50, 50, 50]


@pytest.mark.parametrize("sparse_at", ["zero", "mean"])
def test_a_share_of_less_than_one_row_pins_one(sparse_at):
    """1 % of 24 rows once pinned none, and then put a centre that had rows at zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3))
    dense = net[0].weight.detach().clone()
    plan = dk.make_plan(net, overrides={"0": dk.LayerPlan(k=4, sparsity=0.01, sparse_at=sparse_at)})
    report = dk.share(net, plan)
    shared = net[0].weight.detach()
    lost = float((dense - shared).square().sum() / dense.square().sum())
    assert report.lines[0]["distortion"] == pytest.approx(lost, rel=1e-5)
    rows, pinned = dense.reshape(-1, 3), shared.reshape(-1, 3)
    at_zero = (pinned == 0).all(1)
    if sparse_at == "zero":
        assert at_zero.nonzero().tolist() == [[int(rows.norm(dim=1).argmin())]]


def test_hard_retraining_with_a_share_of_less_than_one_row_is_only_written_down():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3))
    plan = dk.make_plan(net, k=4, sparsity=0.01)
    regularizer = dk.Regularizer(net, plan)
    held = net[0].weight.detach().clone()
    dk.share(net, plan, codes=regularizer.codes())
    assert torch.equal(net[0].weight, held)


@pytest.mark.parametrize("first", [np.float32(0.5), np.float64(0.5), np.int64(4)])
def test_the_first_layer_s_number_may_be_numpy_s(first):
    net = nn.Sequential(nn.Conv2d(1, 2, 4), nn.Conv2d(2, 2, 4))
    assert dk.make_plan(net, k=3, first=first)["0"].clusters(8) == 4
