"""`train` and `evaluate` on what users bring: loaders, labels, losses, checkpoints; and what an error leaves behind."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import deepkmeans as dk


def network(width=8):
    torch.manual_seed(0)
    features = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, width, 3), nn.ReLU()
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(36 * width, 10))


def images_and_labels(n=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def batches():
    return list(zip(*(part.split(8) for part in images_and_labels())))


def shuffled(**how):
    return DataLoader(TensorDataset(*images_and_labels()), 8, shuffle=True, **how)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


def quick(net, loader, **how):
    return dk.train(net, loader, **dict(epochs=1, lr=0.1, progress=False) | how)


# Errors: what they leave behind


def test_an_error_leaves_each_module_in_its_mode():
    net = network().train()
    net[0].eval()
    wrong = [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]  # three channels
    with pytest.raises(RuntimeError):
        dk.evaluate(net, wrong)
    with pytest.raises(RuntimeError):
        quick(network(), wrong, teacher=net)
    assert net.training and not net[0].training and net[2].training


# Loaders


class Counted:
    """Batches whose number is another than their length says."""

    def __init__(self, given, length):
        self.given, self.length = given, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.given)


UNFIT = {
    "dictionary": ([dict(image=torch.zeros(2, 1, 8, 8), label=torch.zeros(2).long())], "must give batches"),
    "three": ([(*batches()[0], torch.ones(8))], r"loader gives \(Tensor, Tensor, Tensor\), must give batches"),
    "images alone": (Counted([batches()[0][0]], 1), r"loader gives \(Tensor\), must give batches"),
    "labels in a list": ([(batches()[0][0], [0] * 8)], "loader gives labels that are a list, must be a tensor"),
}


@pytest.mark.parametrize("given", UNFIT)
def test_batches_of_another_form_are_refused(given):
    loader, message = UNFIT[given]
    net = network()
    before = state(net)
    for call in (dk.evaluate, quick):
        with pytest.raises(ValueError, match=message):
            call(net, loader)
    assert same(state(net), before)


def test_fisher_needs_no_labels_but_pairs():
    x, _ = batches()[0]
    assert dk.allocate(network(), 4, [(x, None)]) == dk.allocate(network(), 4, [(x, ["a"] * 8)])
    with pytest.raises(ValueError, match=r"loader gives \(dict\), must give batches"):
        dk.allocate(network(), 4, Counted([dict(image=x)], 1))


@pytest.mark.parametrize("images", [0, -5, 1.5])
def test_the_allocator_looks_at_one_image_or_more(images):
    for loader in (batches(), None):
        with pytest.raises(ValueError, match=f"images={images} must be a whole number of at least 1"):
            dk.allocate(network(), 4, loader, images=images)


# Randomness


def test_the_global_generator_neither_decides_what_is_measured_nor_moves():
    plans, scores = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        net, before = network(), torch.manual_seed(seed).get_state()
        plans.append(dk.allocate(net, 4, shuffled(), images=8))
        first = []  # the labels of the first batch tell the order
        dk.evaluate(net, shuffled(), metric=lambda output, labels: first.append(labels.tolist()) or 0.0)
        scores.append(first)
        assert torch.equal(torch.get_rng_state(), before)
    assert plans[0] == plans[1] and scores[0] == scores[1]


# Labels


def test_labels_that_are_no_classes_are_refused_unless_a_metric_takes_them():
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 5), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    for wrong in (F.one_hot(y, 5).float(), F.one_hot(y, 5), y.float(), y[:, None]):
        with pytest.raises(ValueError, match="must give whole numbers"):
            dk.evaluate(net, [(x, wrong)])
    by_hand = 100 * float((net(x).argmax(1) == y).double().mean())
    assert dk.evaluate(net, [(x, y.int())]).top1 == dk.evaluate(net, [(x, y)]).top1 == pytest.approx(by_hand)
    soft = dk.evaluate(net, [(x, F.one_hot(y, 5).float())], metric=lambda out, y: (out.argmax(1) == y.argmax(1)).sum())
    assert soft == pytest.approx(by_hand / 100)


def test_a_network_without_parameters_is_measured():
    x = torch.eye(4)
    assert dk.evaluate(nn.Identity(), [(x, torch.tensor([0, 1, 2, 0]))]).top1 == 75
