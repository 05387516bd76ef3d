"""The allocator on whole networks: it reaches what it is asked for, repeats itself, and what it left is worse."""

import copy
import random

import pytest
import torch
import torch.nn as nn

import deepkmeans as dk
from deepkmeans import sharing
from deepkmeans.allocation import fisher, layer_curves
from deepkmeans.sharing import shared_layers


def vgg_like():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 40),
        nn.Linear(40, 10),
    )


NETWORKS = {
    "lenet5": lambda: dk.build("lenet5", image_size=16),
    "vgg-like": vgg_like,
    "wide_resnet": lambda: dk.build("wide_resnet", depth=10, widen=1),
}


@pytest.fixture(scope="module", params=NETWORKS)
def measured(request):
    net = NETWORKS[request.param]()
    return net, layer_curves(net)


def dense_bytes(net):
    return sum(t.nbytes for t in net.state_dict().values())


@pytest.mark.parametrize("target", [1.3, 4, 9])
def test_the_file_has_the_wanted_ratio_with_its_header_and_normalisation(measured, target, tmp_path):
    net, curves = measured
    state = copy.deepcopy(net.state_dict())
    plan = dk.allocate(net, target, curves=curves)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    shared = copy.deepcopy(net)
    dk.share(shared, plan)
    assert dense_bytes(net) / dk.save_compressed(shared, tmp_path / "net.dkm") == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("coding", ["fixed", "log2", "entropy", "huffman"])
@pytest.mark.parametrize("target", [1.3, 4, 9])
def test_every_other_coding_reaches_the_ratio_as_it_counts(measured, target, coding):
    net, curves = measured
    shared = copy.deepcopy(net)
    dk.share(shared, dk.allocate(net, target, curves=curves, coding=coding))
    assert dk.compression(shared, coding=coding).ratio == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("target", [30, 60])
def test_whole_digits_reach_high_ratios_too(target):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3), nn.Conv2d(48, 48, 3), nn.Conv2d(48, 64, 1))
    shared = copy.deepcopy(net)
    dk.share(shared, dk.allocate(net, target, coding="fixed"))
    assert dk.compression(shared, coding="fixed").ratio == pytest.approx(target, rel=0.01)


def test_a_half_network_is_sized_by_its_own_bytes(tmp_path):
    net = vgg_like().half()
    shared = copy.deepcopy(net)
    dk.share(shared, dk.allocate(net, 5))
    assert dense_bytes(net) / dk.save_compressed(shared, tmp_path / "net.dkm") == pytest.approx(5, rel=0.01)


def test_transposed_convolutions_are_allocated_and_what_stays_dense_is_named():
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ConvTranspose2d(32, 60, 3), nn.BatchNorm2d(60))
    plan = dk.allocate(net, 8)
    assert "1" in plan and plan.skipped == {name: "better left dense" for name in {"0", "1"} - plan.keys()}
    with pytest.raises(ValueError, match="at most .*; 1 stay dense, which include= and exclude= decide"):
        dk.allocate(net, 8, include=nn.Conv2d)


class Residual(nn.Module):
    """A branch that begins at zero, as networks with `zero_init_residual` do."""

    def __init__(self, width=32):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return x + self.norm(self.b(self.a(x).relu()))


@pytest.mark.parametrize("ratio", [2, 16])
def test_layers_without_an_effect_take_the_bits_that_are_left(ratio):
    net = nn.Sequential(nn.Conv2d(1, 32, 3), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    plan = dk.allocate(net, ratio, dk.loaders(dk.load("digits"), 64)[0])
    dk.share(net, plan, codes=plan.codes)
    assert dk.compression(net).ratio == pytest.approx(ratio, rel=0.01)


def test_a_single_logit_says_yes_or_no():
    torch.manual_seed(0)
    two = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    one = copy.deepcopy(two)
    one[2] = nn.Linear(144, 1)
    with torch.no_grad():
        one[2].weight.copy_(two[2].weight[1] - two[2].weight[0])
        one[2].bias.copy_(two[2].bias[1] - two[2].bias[0])
    images = [(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)), None)]
    torch.testing.assert_close(fisher(one, images, ["0"]), fisher(two, images, ["0"]))


def test_a_network_that_makes_nan_of_images_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        dk.allocate(net, 2, [(torch.full((4, 1, 8, 8), torch.nan), None)])


def auxiliary(name):
    import torchvision

    net = torchvision.models.get_model(name, weights=None, num_classes=5, init_weights=False, aux_logits=True)
    return net, [(torch.randn(4, 3, 80, 80, generator=torch.Generator().manual_seed(0)), None)]


class Outputs(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.net, self.aux, self.pack = vgg_like(), nn.Linear(3, 2), pack

    def forward(self, x):
        return self.pack(self.net(x), x.mean())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_have_an_information_and_the_heads_none(name):
    net, data = auxiliary(name)
    layers = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    information = fisher(net.train(), data, layers, images=4)
    assert net.training and {name for name, f in information.items() if not f.any()} == {
        name for name in layers if name.lower().startswith("aux")
    }


@pytest.mark.parametrize(
    "pack",
    [lambda y, z: dict(loss=z, logits=y), lambda y, z: dict(out=y, aux=z), lambda y, z: (y, z)],
    ids=["logits", "out", "tuple"],
)
def test_logits_are_found_in_dictionaries_and_tuples_frozen_or_not_and_without_gradients(pack):
    data = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), None)]
    plain, net = fisher(vgg_like(), data, ["0", "8"], images=8), Outputs(pack).requires_grad_(False)
    net.net[1].eval()
    for surrounding in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with surrounding:
            copied = [(data[0][0].clone(), None)]  # under inference_mode a tensor that knows no gradients
            information = fisher(net, copied, ["net.0", "net.8", "aux"], images=8)
        assert (
            torch.equal(information["net.0"], plain["0"])
            and torch.equal(information["net.8"], plain["8"])
            and not information["aux"].any()
        )
    assert not net.net[1].training and net.training and not any(p.requires_grad for p in net.parameters())


def test_a_frozen_network_with_a_dead_head_is_allocated_without_gradients():
    data = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), None)]
    net = Outputs(lambda y, z: (y, z)).requires_grad_(False)
    with torch.no_grad():
        plan = dk.allocate(net, 5, data, images=8)
    assert plan["aux"].k <= 2  # what bits are left


def test_a_network_that_fails_keeps_its_mode_and_what_is_frozen():
    net = vgg_like().train()
    net[0].weight.requires_grad_(False)
    for data, message in (([(torch.randn(2, 4, 8, 8), None)], None), ([], "loader gives no images")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            fisher(net, data, ["0"])
        assert all(m.training for m in net.modules()) and not net[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"returned shape \(2, 16, 6, 6\), must return logits"):
        fisher(net[:1], [(torch.randn(2, 3, 8, 8), None)], ["0"])


def test_the_same_call_gives_the_same_plan():
    data = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), None)]
    plans = [dk.allocate(vgg_like(), 9, data) for _ in range(2)]
    assert plans[0] == plans[1] and plans[0] != dk.allocate(vgg_like(), 9)


def relative_loss(net, plan):
    shared = copy.deepcopy(net)
    dk.share(shared, plan)
    weights = [(net.get_submodule(name).weight.detach(), shared.get_submodule(name).weight.detach()) for name in plan]
    left = torch.tensor([1 - float((a - b).square().sum() / a.square().sum()) for a, b in weights])
    return float(-left.clamp(min=1e-9).log().sum()), dk.compression(shared).bits  # of the file


def test_no_list_of_k_that_is_as_small_loses_less(measured):
    net, curves = measured
    plan = dk.allocate(net, 6, curves=curves)
    loss, bits = relative_loss(net, plan)
    draw, smaller = random.Random(0), 0
    for _ in range(12):
        other = {
            name: dk.LayerPlan(k=max(2, round(p.k * draw.uniform(0.6, 1.3))), sparsity=p.sparsity)
            for name, p in plan.items()
        }
        its_loss, its_bits = relative_loss(net, other)
        if its_bits <= bits:
            smaller += 1
            assert its_loss > 0.97 * loss, (other, its_loss, loss)
    assert smaller >= 2


def test_floors_and_layers_left_out_are_kept(measured):
    net, curves = measured
    names = list(curves)
    plan = dk.allocate(net, 5, curves=curves, first=9, last=0.5)
    for name, least in ((names[0], 9), (names[-1], round(0.5 * curves[names[-1]].n))):
        assert name not in plan or plan[name].k >= least and plan[name].sparsity == 0
    small = vgg_like()
    assert "3" not in dk.allocate(small, 2, exclude=["3"]) and "3" in dk.allocate(small, 4)


def test_the_sensitive_layer_gets_more_with_data_than_without():
    net = vgg_like().eval()
    data = [(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), None)]
    information = fisher(net, data, ["0", "8"])
    assert all(f.shape == net.get_submodule(name).weight.shape and (f >= 0).all() for name, f in information.items())
    with torch.no_grad():  # scaling the last layer up scales the information of all before it
        net[9].weight *= 5
    louder = fisher(net, data, ["0", "8"])
    assert louder["0"].sum() > information["0"].sum()


def test_a_layer_is_worth_the_root_of_its_fisher_energy_and_without_data_as_much_as_any_other():
    net = vgg_like().eval()
    data = [(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), None)]
    curves, alike = layer_curves(net, data), layer_curves(net)
    for name, f in fisher(net, data, list(curves)).items():
        energy = (f * net.get_submodule(name).weight.double() ** 2).sum().item() / 2
        assert curves[name].zero[-1] == pytest.approx(energy**0.5) and alike[name].zero[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(ratio=0.9), "ratio=0.9 must be above 1"),
        (dict(ratio=1e5), "ratio=100000.0 must be above 1 and at most"),
        (dict(ratio="4"), "ratio='4' must be above 1"),
        (dict(ratio=4, exclude=["conv"]), "no layer is called 'conv'"),
        (dict(ratio=4, loader=[]), "loader gives no images"),
        (dict(ratio=4, layout="rows"), "layout='rows' must be one of"),
    ],
)
def test_errors_name_argument_value_and_bound(wrong, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        dk.allocate(vgg_like(), **wrong)


def test_an_unknown_coding_is_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match="coding='zip' must be one of file, fixed"):
        dk.allocate(vgg_like(), 4, loader=Untouched(), coding="zip")


class Untouched(list):
    def __iter__(self):
        raise AssertionError("the loader was read")


def test_the_paper_s_lists_fit_its_network_only():
    for name in dk.NAMED_PLANS:
        net = dk.build("wide_resnet")
        plan = dk.named_plan(name, net)
        assert len(plan) == 16 and plan["stage3.b2.conv2"] == dk.LayerPlan(k=7, sparsity=0.9)
    said = "name='wrn-45' is a plan for the 16 convolutions of a Wide ResNet 16-4, but"
    for net, count in ((dk.build("wide_resnet", depth=10), 10), (dk.build("lenet5"), 2), (nn.Linear(2, 2), 0)):
        with pytest.raises(ValueError, match=f"{said} {type(net).__name__} has {count}$"):
            dk.named_plan("wrn-45", net)
    with pytest.raises(ValueError, match="wrn-46"):
        dk.named_plan("wrn-46", dk.build("wide_resnet"))


def test_a_layer_that_was_excluded_says_by_what():
    plan = dk.allocate(dk.build("lenet5"), 20, exclude="conv1")
    assert plan.skipped["conv1"] == "excluded by 'conv1'" and "conv1" not in plan


def test_what_the_allocator_clustered_is_not_clustered_again(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
    plan = dk.allocate(net, 6)
    again, once = copy.deepcopy(net), copy.deepcopy(net)
    dk.share(again, plan)
    monkeypatch.setattr(sharing, "cluster", None)  # nobody asks for it
    dk.share(once, plan, codes=plan.codes)
    for name, shared in shared_layers(again).items():
        assert torch.equal(shared_layers(once)[name].codes, shared.codes), name
    for a, b in zip(again.parameters(), once.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("coding", ["entropy", "log2", "fixed", "huffman"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_types_reach_the_ratio_as_each_coding_counts(coding, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(16, 10)).to(dtype)
    dk.share(net, dk.allocate(net, 4, coding=coding))
    assert dk.compression(net, coding=coding).ratio == pytest.approx(4, rel=0.01)


def test_a_floor_is_no_more_than_there_are_different_rows():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(8, 64)[torch.arange(64) % 8])
    plan = dk.allocate(net, 5, first=16, layout="filter")
    assert plan["0"].k == 8


def test_a_ratio_that_plans_jump_over_names_each_that_they_reach_once():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in net:
        nn.init.constant_(layer.weight, 0.5)
    with pytest.raises(ValueError, match="the plans tried reach") as refused:
        dk.allocate(net, 2.5)
    reached = str(refused.value).partition("reach ")[2].split(", ")
    assert len(reached) == len(set(reached)) and list(map(float, reached)) == sorted(map(float, reached))


def test_a_network_that_cannot_be_copied_is_named():
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 64), nn.Linear(64, 64))
    net(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="model cannot be copied, which tells its size.*parametrizations has norms"):
        dk.allocate(net, 3, exclude="0")
