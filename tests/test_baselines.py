"""The baselines on networks that are not the paper's: types, names and modes of layers, and what is kept of them."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune

import deepkmeans as dk
from deepkmeans.baselines import car, dkm, hashing, lowrank, sws, tensor_train
from deepkmeans.sharing import SharedWeight


def convolutions(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


class Twice(nn.Module):
    """One convolution under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


class Standardised(nn.Conv2d):
    """Weight standardisation, which computes with another weight than it holds."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


FACTORIZATIONS = {
    "tucker": lambda net: lowrank.tucker(net, {"a": (4, 4)}),
    "separable": lambda net: lowrank.separable(net, ranks={"a": 2}),
}


@pytest.mark.parametrize("factor", FACTORIZATIONS.values(), ids=FACTORIZATIONS)
def test_a_layer_of_two_names_is_replaced_under_both(factor):
    net = Twice()
    report = factor(net)
    assert net.a is net.b and not isinstance(net.a, nn.Conv2d)
    assert sum(p.numel() for p in net.parameters() if p.ndim > 1) == report.lines[0]["factors"] < 8 * 8 * 9


def test_a_layer_that_computes_in_its_own_way_or_is_looked_at_stays_and_a_frozen_one_stays_frozen():
    net = nn.Sequential(Standardised(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3).requires_grad_(False))
    net[1].register_forward_hook(lambda *_: None)
    x = torch.randn(1, 8, 9, 9)
    before = net(x)
    report = lowrank.tucker(net, {name: (8, 8) for name in "012"})
    assert report.skipped == {"0": "Standardised computes in its own way", "1": "hooks look at it"}
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)  # of full rank
    assert isinstance(net[2], nn.Sequential) and not any(p.requires_grad for p in net[2].parameters())


def test_factors_of_zeros_have_no_error():
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    nn.init.zeros_(net[0].weight)
    assert lowrank.tucker(net, {"0": (2, 2)}).lines[0]["error"] == 0


HASHED = {"hashed_net": hashing.hashed_net, "fresh_net": hashing.fresh_net}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", HASHED.values(), ids=HASHED)
def test_networks_of_other_types_are_hashed_as_in_float32(make, dtype):
    net, wide = convolutions().to(dtype), convolutions()
    wide.load_state_dict({name: value.to(dtype).float() for name, value in wide.state_dict().items()})
    make(net, 4, scratch=False)
    make(wide, 4, scratch=False)
    for layer, other in zip(net[::2], wide[::2]):
        assert layer.weight.dtype == dtype and layer.weight.requires_grad
        scale = other.weight.abs().max()
        assert (layer.weight.float() - other.weight).abs().max() < 4 * torch.finfo(dtype).eps * scale + 1e-6 * scale


SEEDED = HASHED | {"random_dictionary": lowrank.random_dictionary}


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED)
@pytest.mark.parametrize("way", ["state dict", "file"])
def test_what_was_drawn_from_a_seed_comes_back_in_a_network_of_another(make, way, tmp_path):
    one, other = convolutions(), convolutions(seed=1)
    make(one, 4, seed=1)
    make(other, 4, seed=2)
    if way == "file":
        dk.save_compressed(one, tmp_path / "net.dkm")
        dk.load_compressed(tmp_path / "net.dkm", other)
    else:
        other.load_state_dict(one.state_dict())
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("make", HASHED.values(), ids=HASHED)
def test_a_negative_seed_of_hashes_is_refused(make):
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        make(convolutions(), 4, seed=-1)


def test_all_that_a_network_holds_beside_the_prior_is_counted_but_normalisation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            self.lstm = nn.LSTM(4, 8)
            self.norm = nn.LayerNorm(4)
            self.own = nn.Parameter(torch.zeros(1000))

    net = Net()
    others = sum(p.numel() for p in net.lstm.parameters()) + 1000
    assert sws.soft_bits(net, [torch.zeros(16, dtype=torch.int64)]) == 32 * others  # no weight is left, no codebook


def test_the_prior_refuses_weights_that_are_tied_or_computed():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for net in (tied, nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))):
        with pytest.raises(ValueError, match="weight|parametri"):
            sws.prior_weights(net)


def test_deep_compression_pins_as_many_weights_as_k_means():
    net = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.001, 1.0, 2.0, 3.0]).view(1, 1, 2, 2))
    dkm.deep_compression(net, dk.make_plan(net, k=4, layout="scalar", sparsity=0.1))  # of four weights one is pinned
    assert sorted(net[0].weight.flatten().tolist()) == [0.0, 1.0, 2.0, 3.0]


LOOKS = {
    "energy": lambda net: dk.energy(net, torch.randn(1, 4, 8, 8)),
    "compression": lambda net: dk.compression(net, coding="log2"),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_network_that_trains_by_dkm_moves_no_centre(look):
    net = convolutions().train()
    dkm.soften(net, dk.make_plan(net, k=4))
    with torch.no_grad():
        net[0].parametrizations.weight.original.add_(0.3)
    before = copy.deepcopy(net.state_dict())
    look(net)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_filters_are_taken_out_of_ordinary_layers_and_each_consumer_once():
    net = convolutions()
    with pytest.raises(ValueError, match="must name each once"):
        car.remove_filters(net, "0", ["2", "2"], [0])
    dk.share(net, dk.make_plan(net, k=4))
    assert isinstance(net[0].parametrizations.weight[0], SharedWeight)
    with pytest.raises(ValueError, match="'0' has a weight that is computed"):
        car.remove_filters(net, "0", ["2"], [0])
    assert net[0](torch.randn(1, 4, 9, 9)).shape[1] == net[0].out_channels == 8  # nothing was taken out
    pruned = convolutions()
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match="'0' has a weight that is computed"):
        car.remove_filters(pruned, "0", ["2"], [0])


NETS_OF_FEWER_NUMBERS = {
    "hashed": lambda net: hashing.hashed_net(net, 4),
    "fresh": lambda net: hashing.fresh_net(net, 4),
    "tensor train": lambda net: tensor_train.tensorize(net, (4, 4)),
    "DKM": lambda net: dkm.soften(net, dk.make_plan(net, k=4)),
}


@pytest.mark.parametrize("change", NETS_OF_FEWER_NUMBERS.values(), ids=NETS_OF_FEWER_NUMBERS)
def test_the_energy_of_each_baseline_is_told_by_a_shape_and_by_images(change):
    net = convolutions()
    change(net)
    assert dk.energy(net, (4, 8, 8)).macs == dk.energy(net, torch.zeros(1, 4, 8, 8)).macs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dkm_of_16_bits_mixes_in_32(dtype):
    net = convolutions().to(dtype).train()
    dkm.soften(net, dk.make_plan(net, k=4))
    with torch.no_grad():
        net[0].parametrizations.weight.original.add_(3)  # far from every centre
    assert net[0].weight.dtype == dtype and net[0].weight.isfinite().all()


def test_iterations_are_whole_and_a_ratio_that_leaves_too_few_buckets_names_the_layer():
    with pytest.raises(ValueError, match="iterations=2.5 must be a whole number"):
        dkm.soften(convolutions(), dk.make_plan(convolutions(), k=4), iterations=2.5)
    with pytest.raises(ValueError, match="ratio=30 leaves layer '0' 4 buckets: budget=4 must be from 5"):
        hashing.fresh_net(convolutions(), 30)


def test_soft_weight_sharing_refuses_what_training_does():
    net, mixture = convolutions(), sws.Mixture(3)
    with pytest.raises(ValueError, match="loader holds no batches"):
        sws.train_soft(net, [], mixture, epochs=1, images=10)
    with pytest.raises(ValueError, match="lr=nan must be at least 0"):
        sws.train_soft(net, [(torch.zeros(1, 4, 8, 8), torch.zeros(1))], mixture, epochs=1, images=10, lr=float("nan"))
