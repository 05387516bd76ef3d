"""Hard assignments in the loops that users write: any optimizer, frozen layers, dtypes, devices, interrupted runs."""

import copy
import importlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pretended_cuda import pretended_cuda
from torch.utils._python_dispatch import TorchDispatchMode

import deepkmeans as dk
from deepkmeans.rows import to_rows
from deepkmeans.plan import LayerPlan
from deepkmeans.sharing import shared_layers


def small_net():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4))
    for p in net.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return net


def batch(i, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(i)
    x, y = torch.randn(16, 1, 8, 8, generator=g), torch.randint(4, (16,), generator=g)
    return x.to(device, dtype), y.to(device)


def a_step(net, optimizer, i, parts=1):
    optimizer.zero_grad()
    for part in range(parts):
        p = next(net.parameters())
        x, y = batch(parts * i + part, p.device, p.dtype)
        (F.cross_entropy(net(x).float(), y) / parts).backward()
    optimizer.step()


def distinct_rows(net, name):
    return len(torch.unique(to_rows(net.get_submodule(name).weight.detach()), dim=0))


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("parts", [1, 3])
def test_rows_lie_on_their_centres_after_each_step_of_any_optimizer_and_codes_move(name, parts):
    net = small_net()
    plan = dk.make_plan(net, k=4)
    regularizer, optimizer = dk.Regularizer(net, plan), OPTIMIZERS[name](net.parameters())
    first = regularizer.codes()
    for i in range(60):
        a_step(net, optimizer, i, parts)
        regularizer.step((i + 1) / 60)
        assert all(distinct_rows(net, layer) <= 4 for layer in plan)
    assert any((first[layer] != codes).any() for layer, codes in regularizer.codes().items())
    written = copy.deepcopy(net)
    dk.share(written, plan, codes=regularizer.codes())
    assert all(torch.equal(written.get_submodule(layer).weight, net.get_submodule(layer).weight) for layer in plan)


def test_share_writes_down_pinned_rows_as_re_training_left_them():
    net = small_net()
    plan = dk.make_plan(net, k=4, sparsity=0.4)
    regularizer, optimizer = dk.Regularizer(net, plan), OPTIMIZERS["momentum"](net.parameters())
    for i in range(40):
        a_step(net, optimizer, i)
        regularizer.step((i + 1) / 40)
    dense = {name: net.get_submodule(name).weight.detach().clone() for name in plan}
    dk.share(net, plan, codes=regularizer.codes())
    for name, layer in shared_layers(net).items():
        rows = to_rows(net.get_submodule(name).weight)
        assert torch.equal(net.get_submodule(name).weight, dense[name])
        zero = (rows == 0).all(1)
        assert torch.equal(zero, layer.codes.long() == 0) and abs(float(zero.float().mean()) - 0.4) < 0.05


def test_a_frozen_layer_is_shared_and_then_stays_as_it_is():
    net = small_net()
    net[0].weight.requires_grad_(False)
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=4))
    frozen, codes = net[0].weight.detach().clone(), regularizer.codes()["0"]
    optimizer = OPTIMIZERS["momentum"]([p for p in net.parameters() if p.requires_grad])
    for i in range(30):
        a_step(net, optimizer, i)
        regularizer.step((i + 1) / 30)
    assert (
        torch.equal(net[0].weight, frozen)
        and torch.equal(regularizer.codes()["0"], codes)
        and distinct_rows(net, "2") == 4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_may_change_its_dtype_after_the_regularizer_was_made(dtype):
    net = small_net()
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=4))
    net.to(dtype)
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    for i in range(20):
        a_step(net, optimizer, i)
        regularizer.step((i + 1) / 20)
    assert net[2].weight.dtype == dtype and distinct_rows(net, "2") <= 4
    dk.share(net, regularizer.plan, codes=regularizer.codes())


def test_small_steps_are_not_lost_in_a_network_of_16_bits():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False)).bfloat16()
    net[0].weight.data = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.bfloat16).view(4, 1, 1, 1)
    regularizer = dk.Regularizer(net, {"0": LayerPlan(k=2)})
    for _ in range(8):
        with torch.no_grad():
            last_bit = torch.tensor([2**-7, 2**-7, 0, 0], dtype=torch.bfloat16)  # at 1
            net[0].weight += last_bit.view(4, 1, 1, 1)
        regularizer.step(0.9)
    assert net[0].weight.flatten().tolist() == [1 + 8 * 2**-7] * 2 + [3, 3]


def test_a_network_may_be_moved_to_another_device_after_the_regularizer_was_made():
    if torch.cuda.is_available():
        return run_on_the_device()
    with pretended_cuda():
        run_on_the_device()


def run_on_the_device():
    net = small_net()
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=4, sparsity=0.2))
    net.to("cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for i in range(12):
        a_step(net, optimizer, i)
        regularizer.step((i + 1) / 12)
    assert net[2].weight.is_cuda and all(codes.is_cuda for codes in regularizer.codes().values())


@pytest.mark.parametrize("kind", ["indicator", "spectral"])
def test_a_penalty_follows_the_network_to_another_device(kind):
    with nullcontext() if torch.cuda.is_available() else pretended_cuda():
        net = small_net()
        regularizer = dk.Regularizer(net, dk.make_plan(net, k=4, sparsity=0.2), kind, strength=1.0)
        here, state = regularizer.penalty().item(), regularizer.state_dict()
        net.to("cuda")
        assert regularizer.penalty().item() == pytest.approx(here)
        regularizer.load_state_dict(state)  # of the CPU
        assert regularizer.penalty().item() == pytest.approx(here)
        regularizer.refresh()


@pytest.mark.parametrize("bits, order", [(None, 1), (1700.0, 1), (1700.0, -1)])
def test_an_interrupted_loop_goes_on_to_the_same_bits(bits, order):  # order: weights first, or the regularizer
    def begin():
        net = small_net()
        plan = dk.make_plan(net, k=5, sparsity=0.2 if order > 0 else 0.0)
        return net, OPTIMIZERS["momentum"](net.parameters()), dk.Regularizer(net, plan, bits=bits)

    def go_on(net, optimizer, regularizer, steps):
        for i in steps:
            a_step(net, optimizer, i)
            regularizer.step((i + 1) / 50)

    straight = begin()
    go_on(*straight, range(50))
    net, optimizer, regularizer = begin()
    go_on(net, optimizer, regularizer, range(23))
    states = copy.deepcopy([net.state_dict(), optimizer.state_dict(), regularizer.state_dict()])
    resumed = begin()
    for part, state in [*zip(resumed, states)][::order]:
        part.load_state_dict(state)
    go_on(*resumed, range(23, 50))
    assert all(torch.equal(a, b) for a, b in zip(straight[0].state_dict().values(), resumed[0].state_dict().values()))
    ends = [r.state_dict() for _, _, r in (straight, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


OTHERS = {
    "fewer clusters": dict(k=4),
    "more clusters": dict(k=12),
    "pinned": dict(k=8, sparsity=0.2),
    "another layout": dict(k=8, layout="kernel"),
}


@pytest.mark.parametrize("kind", ["hard", "indicator", "spectral"])
@pytest.mark.parametrize("given", OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_plan_is_refused(kind, given):
    net = small_net()
    one = dk.Regularizer(net, dk.make_plan(net, k=8), kind)
    other = dk.Regularizer(net, dk.make_plan(net, **given), kind)
    with pytest.raises(ValueError, match="with this plan"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="with this plan"):
        other.load_state_dict({})


@pytest.mark.parametrize("kind", ["hard", "indicator", "spectral"])
def test_the_state_of_another_network_is_refused(kind):
    nets = [nn.Sequential(nn.Conv2d(1, c, 3)) for c in (8, 9)]
    one, other = (dk.Regularizer(net, dk.make_plan(net, k=4), kind) for net in nets)
    with pytest.raises(ValueError, match="0"):
        other.load_state_dict(one.state_dict())


def test_the_state_of_another_wanted_size_is_refused():
    net = small_net()
    plan = dk.make_plan(net, k=8)
    plain, sized = dk.Regularizer(net, plan), dk.Regularizer(net, plan, bits=9000.0)
    for taker, giver in ((plain, sized), (sized, plain)):
        with pytest.raises(ValueError, match="bits="):
            taker.load_state_dict(giver.state_dict())


@pytest.mark.parametrize("kind", ["indicator", "spectral"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_penalty_on_half_precision_is_computed_in_float32(kind, dtype):
    net = small_net()
    for parameter in net.parameters():
        parameter.data.mul_(1e-3)
    net.to(dtype)
    wide = copy.deepcopy(net).double()
    plan = dk.make_plan(net, k=4)
    half, double = (dk.Regularizer(model, plan, kind, strength=0.5) for model in (net, wide))
    assert half.distortion() == pytest.approx(double.distortion(), rel=1e-4)
    assert float(half.penalty()) == pytest.approx(float(double.penalty()), rel=1e-4, abs=1e-9)


def test_train_refuses_a_regularizer_of_another_network_and_a_checkpoint_of_another_plan(tmp_path):
    loader = dk.loaders(dk.subset(dk.load("digits"), 128), 64)[0]
    nets = [dk.build("lenet5", seed=0) for _ in range(2)]
    regularizer = dk.Regularizer(nets[0], dk.make_plan(nets[0], k=8))
    with pytest.raises(ValueError, match="made for another network"):
        dk.train(nets[1], loader, epochs=1, lr=0.01, regularizer=regularizer, progress=False)
    dk.train(nets[0], loader, epochs=1, lr=0.01, regularizer=regularizer, checkpoint=tmp_path / "c", progress=False)
    fewer = dk.Regularizer(nets[1], dk.make_plan(nets[1], k=4))
    with pytest.raises(ValueError, match="written with other settings: regularizer="):
        dk.train(nets[1], loader, epochs=1, lr=0.01, regularizer=fewer, checkpoint=tmp_path / "c", progress=False)


def test_numbers_of_numpy_train_and_resume_like_those_of_python(tmp_path):
    batches = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4)] * 50

    def trained(epochs, seed, small, k):  # 3 · 50 steps are more than an int8 holds
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4))
        how = dict(regularizer=dk.Regularizer(net, dk.make_plan(net, k=k, sparsity=small)), seed=seed, lr=small)
        more = dict(momentum=small, weight_decay=small / 64, checkpoint=tmp_path / str(type(k)), progress=False)
        return [row["loss"] for row in dk.train(net, batches, epochs=epochs, **how, **more)]

    plain = trained(3, 5, 0.125, 4)
    of_numpy = np.int8(3), np.int8(5), np.float32(0.125), np.int64(4)
    assert trained(*of_numpy) == plain and trained(*of_numpy) == plain  # the second is read from its checkpoint


def test_all_codes_together_keep_to_a_wanted_number_of_bits():
    net = small_net()
    plan = dk.make_plan(net, k=8, sparsity=0.3)
    wr = copy.deepcopy(net)
    dk.share(wr, plan)
    start = sum(row["index_bits"] + row["codebook_bits"] for row in dk.compression(wr, coding="entropy").lines)
    for wanted in (0.9 * start, 1.0 * start):
        trained = copy.deepcopy(net)
        regularizer, optimizer = (
            dk.Regularizer(trained, plan, bits=wanted),
            OPTIMIZERS["momentum"](trained.parameters()),
        )
        for i in range(60):
            a_step(trained, optimizer, i)
            regularizer.step((i + 1) / 60)
        dk.share(trained, plan, codes=regularizer.codes())
        spent = sum(row["index_bits"] + row["codebook_bits"] for row in dk.compression(trained, coding="entropy").lines)
        assert spent == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("share", [0.08, 0.15, 0.3])
def test_a_wanted_size_is_met_where_most_rows_lie_between_zero_and_the_centres(share):
    """A large layer of few clusters: a little more a bit sends all its rows to zero, a little less none."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Flatten(), nn.Linear(400, 200))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g).clamp(-3, 3))
    of_layer = {"0": dk.LayerPlan(k=12), "2": dk.LayerPlan(k=3, sparsity=0.98, layout="scalar")}
    plan = dk.make_plan(net, include=(nn.Conv2d, nn.Linear), overrides=of_layer)
    wanted = share * 80_000
    regularizer = dk.Regularizer(net, plan, bits=wanted)
    dk.share(net, plan, codes=regularizer.codes())
    spent = sum(line["index_bits"] + line["codebook_bits"] for line in dk.compression(net, coding="entropy").lines)
    assert spent == pytest.approx(wanted, rel=0.01)


class Count(TorchDispatchMode):
    """Operations that compute: what would be launches on a GPU, views and bookkeeping left out."""

    VIEWS = (
        "view",
        "detach",
        "alias",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "squeeze",
        "t.",
        "transpose",
        "split",
        "reshape",
        "as_strided",
    )

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.operations += not str(op).startswith(tuple(f"aten.{view}" for view in self.VIEWS))
        return op(*args, **(kwargs or {}))


def test_a_step_on_a_deep_network_takes_tens_of_operations():
    net = dk.build("wide_resnet", widen=1, seed=0)
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=4))
    with Count() as count:
        regularizer.step(0.9)
    assert count.operations <= 60, count.operations


def test_a_wanted_size_begins_with_the_shares_at_zero_that_the_plan_has(monkeypatch):
    # what a bit is worth differs between layers of 98 % and of 50 % zeros: read off the plan, not off the mean residual
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) ** 3)
    plan = {"0": LayerPlan(k=4, sparsity=0.98), "1": LayerPlan(k=16, sparsity=0.5)}
    shared = copy.deepcopy(net)
    dk.share(shared, plan)
    rows = dk.compression(shared, coding="entropy").lines
    bits = sum(row["index_bits"] + row["codebook_bits"] for row in rows)
    monkeypatch.setattr(importlib.import_module("deepkmeans.regularizer"), "SETTLING", 1)  # one assignment with prices
    codes = dk.Regularizer(net, plan, bits=bits).codes()
    for name, layer in plan.items():
        assert abs(float((codes[name] == 0).double().mean()) - layer.sparsity) < 0.01, name


def test_a_state_does_not_change_while_training_goes_on():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=3))
    state = regularizer.state_dict()
    copied = {name: value.clone() for name, value in state.items()}
    for step in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        regularizer.step((step + 1) / 12)
    assert all(torch.equal(value, copied[name]) for name, value in state.items())
    assert any(not torch.equal(value, copied[name]) for name, value in regularizer.state_dict().items())


def test_a_wanted_number_of_bits_needs_layers():
    with pytest.raises(ValueError, match="bits=100.0 need a plan with layers"):
        dk.Regularizer(nn.Sequential(nn.Conv2d(1, 4, 3)), {}, bits=100.0)
