"""Models on real batches: what crosses the chapters on models and data."""
import pytest
import torch
import torch.nn.functional as F

from deepkmeans.data import Loader, load, loaders
from deepkmeans.models import MODELS, build, lenet5
from deepkmeans.rows import to_rows


def accuracy(model, loader):
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) == y for x, y in loader]).float().mean().item()


def test_lenet_with_its_true_shapes_learns_digits():
    train, test = loaders(load(), 64)
    model = lenet5().to(memory_format=torch.channels_last)
    assert [len(to_rows(m.weight)) for m in (model.conv1, model.conv2)] == [100, 5000]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    before = accuracy(model.eval(), test)
    for epoch in range(3):
        train.set_epoch(epoch)
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert accuracy(model, test) > 0.8 > 0.3 > before


@pytest.mark.parametrize("name", ["lenet5", "tt_conv_cnn", "freshnet_cnn", "wide_resnet"])
def test_every_small_network_takes_digits_and_all_parameters_get_a_gradient(name):
    x, y = next(iter(Loader(load().train, 8)))
    model = build(name, in_channels=1)
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in model.parameters()) > len(list(model.parameters())) // 2


@pytest.mark.parametrize("name", MODELS)
def test_number_of_classes(name):
    last = list(build(name, num_classes=7).modules())[-1]
    assert isinstance(last, torch.nn.Linear) and last.out_features == 7


def test_googlenet_has_a_single_output_in_training_mode():
    assert build("googlenet", 5).train()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_the_default_device_of_the_caller_does_not_matter():
    with torch.device("meta"):
        model = build("lenet5")
    assert torch.equal(model.conv1.weight, build("lenet5").conv1.weight)


def test_a_failing_builder_restores_the_generator():
    before = torch.get_rng_state()
    with pytest.raises(TypeError):
        build("lenet5", num_classes="ten")
    assert torch.equal(before, torch.get_rng_state())
