"""What a user says arrives where it counts: settings of training, seeds, images, augmentation, a teacher."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import deepkmeans as dk
from deepkmeans import pipeline
from deepkmeans.allocation import layer_curves, named_plan
from deepkmeans.data import Loader
from deepkmeans.retrain import distillation_loss


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def batches(n=32):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return list(zip(x.split(8), y.split(8)))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


ONE_EPOCH = dict(epochs=1, lr=0.1, schedule="constant", progress=False)


def test_training_is_that_of_the_optimizer_of_torch():
    net, plain = network(), network()
    dk.train(net, batches(), momentum=0.8, weight_decay=0.3, **ONE_EPOCH)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.8, weight_decay=0.3)
    for x, y in batches():
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()
    assert same(net, plain)


def test_a_student_learns_half_from_labels_and_half_from_a_teacher_in_eval_mode():
    teacher = nn.Sequential(*network(), nn.Dropout(0.9)).train()
    net, plain = network(), network()
    dk.train(net, batches(), teacher=teacher, **ONE_EPOCH)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in batches():
        sgd.zero_grad()
        taught = teacher[:-1](x).detach()  # without the dropout
        output = plain(x)
        (0.5 * F.cross_entropy(output, y) + 0.5 * distillation_loss(output, taught)).backward()
        sgd.step()
    assert same(net, plain)


def test_a_checkpoint_knows_of_the_teacher(tmp_path):
    how = dict(checkpoint=tmp_path / "run", **ONE_EPOCH)
    dk.train(network(), batches(), **how, teacher=network())
    with pytest.raises(ValueError, match="teacher=True, not False"):
        dk.train(network(), batches(), **how)


def test_the_seed_decides_over_dropout():
    def trained(seed):
        net = nn.Sequential(*network()[:3], nn.Dropout(), network()[3])
        dk.train(net, batches(), seed=seed, **ONE_EPOCH)
        return net

    assert same(trained(0), trained(0)) and not same(trained(0), trained(1))


def test_amp_trains_in_bfloat16():
    def types(amp):
        net, seen = network(), set()
        net[3].register_forward_hook(lambda module, images, output: seen.add(output.dtype))
        dk.train(net, batches(), amp=amp, **ONE_EPOCH)
        return seen

    assert types(True) == {torch.bfloat16} and types(False) == {torch.float32}


def test_a_penalty_is_refreshed_every_so_many_epochs(monkeypatch):
    net = network()
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=4), "indicator", refresh_every=2)
    refreshed = []
    monkeypatch.setattr(regularizer, "refresh", lambda: refreshed.append(1))
    dk.train(net, batches(), regularizer=regularizer, **{**ONE_EPOCH, "epochs": 5})
    assert len(refreshed) == 2  # before the third and the fifth


def test_the_codes_of_a_penalty_are_those_of_the_present_weights():
    net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False))
    net[0].weight.data = torch.tensor([0.0, 1.0, 10.0, 11.0]).view(4, 1, 1, 1)
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=2), "indicator")
    net[0].weight.data = torch.tensor([0.0, 10.0, 11.0, 1.0]).view(4, 1, 1, 1)
    codes = regularizer.codes()["0"]
    assert codes[0] == codes[3] != codes[1] == codes[2]


def test_the_seed_of_a_regularizer_and_of_share_is_that_of_the_clustering():
    plan = dk.make_plan(network(), k=4)
    codes = [dk.Regularizer(network(), plan, seed=seed).codes()["0"] for seed in (0, 1)]
    assert not torch.equal(*codes)
    nets = [network() for _ in range(3)]
    for net, seed in zip(nets, (0, 1, 1)):
        dk.share(net, plan, seed=seed)
    assert same(nets[1], nets[2]) and not same(nets[0], nets[1])


def test_what_compress_is_told_reaches_its_parts(monkeypatch):
    told = {}

    def listening(name, call):
        def heard(*args, **how):
            told.setdefault(name, inspect.signature(call).bind(*args, **how).arguments)
            return call(*args, **how)

        return heard

    for name in ("allocate", "train", "Regularizer", "evaluate"):
        monkeypatch.setattr(pipeline, name, listening(name, getattr(pipeline, name)))
    training = dict(lr=0.01, schedule="step", momentum=0.5, weight_decay=1e-3, loss=nn.CrossEntropyLoss(), amp=True)
    planning = dict(first=5, last=6, layout="kernel", sparsity=False, images=7, seed=3)
    how = dict(test_loader=batches(), distill=True, progress=False)
    dk.compress(network(), 2, batches(), 1, **how, **training, **planning)
    assert told["train"]["teacher"] is not None and told["train"]["seed"] == told["Regularizer"]["seed"] == 3
    assert {name: told["train"].get(name) for name in training} == training and told["evaluate"]["amp"]
    assert {name: told["allocate"].get(name) for name in planning} == planning


def test_the_allocator_looks_at_as_many_images_as_it_is_told():
    net, seen = network(), []
    net.register_forward_hook(lambda module, images, output: seen.append(len(output)))
    layer_curves(net, batches(), images=10)
    assert sum(seen) == 10


def test_the_seed_of_the_allocator_is_that_of_its_clusterings():
    one, other = (layer_curves(network(), seed=seed)["0"].loss for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_a_named_plan_gathers_rows_where_it_is_told():
    plan = named_plan("wrn-45", dk.build("wide_resnet"), sparse_at="mean")
    assert {layer.sparse_at for layer in plan.values()} == {"mean"}


def test_numbers_of_numpy_make_the_same_plan_and_take_the_same_state():
    net = network()
    python, numpy = dk.make_plan(net, k=4, sparsity=0.25), dk.make_plan(net, k=np.int64(4), sparsity=np.float32(0.25))
    state = dk.Regularizer(network(), numpy).state_dict()
    dk.Regularizer(net, python).load_state_dict(state)


def test_a_set_has_its_own_augmentation_and_the_seed_its_own_order():
    data = dk.load("digits")
    assert [loader.augment for loader in dk.loaders(data._replace(augment="crop-flip"), 64)] == ["crop-flip", "none"]
    orders = [torch.cat([y for _, y in dk.loaders(data, 64, seed=seed)[0]]) for seed in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_a_streamed_image_is_cropped_anew_in_each_epoch(tmp_path):
    draw = np.random.default_rng(0)
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
    split = dk.load(tmp_path, size=8, stream=True).train
    loader = Loader(split, 3, augment="resized-crop-flip", workers=0)  # which does not shuffle

    def images(epoch):
        loader.set_epoch(epoch)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(images(1), images(1))
    assert all(not torch.equal(a, b) for a, b in zip(images(1), images(2)))
