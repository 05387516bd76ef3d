"""`compress`: the size of the file on disk, the accuracy, and its parts, each against what was reckoned apart."""

import copy

import pytest
import torch
from torch import nn

import deepkmeans as dk
from deepkmeans.pipeline import bits_for_ratio


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    )


@pytest.fixture(scope="module")
def batches():
    train_loader, test_loader = dk.loaders(dk.subset(dk.load("digits"), train=640), 64)
    return list(train_loader), list(test_loader)


@pytest.fixture(scope="module")
def dense(batches):
    net = network()
    dk.train(net, batches[0], epochs=6, lr=0.05, progress=False)
    return net.eval()


def right(net, batches):  # percent, by hand
    with torch.no_grad():
        hits = torch.cat([net(x).argmax(1) == y for x, y in batches])
    return 100 * hits.double().mean().item()


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("how", ["weights alone", "with data", "re-trained"])
@pytest.mark.parametrize("ratio", [3, 6])
def test_the_file_is_as_much_smaller_as_wanted_and_as_good_as_said(dense, batches, tmp_path, how, ratio):
    net, (train, test) = copy.deepcopy(dense), batches
    given = {"weights alone": {}, "with data": dict(loader=train), "re-trained": dict(loader=train, epochs=3, lr=0.05)}[
        how
    ]
    outcome = dk.compress(net, ratio, **given, test_loader=test, progress=False)
    dk.save_compressed(net, tmp_path / "net.dkm")
    bytes_on_disk, dense_bytes = (
        (tmp_path / "net.dkm").stat().st_size,
        sum(t.nbytes for t in dense.state_dict().values()),
    )
    assert abs(dense_bytes / bytes_on_disk / ratio - 1) < 0.01
    assert outcome.bytes_on_disk == bytes_on_disk and outcome.ratio == pytest.approx(dense_bytes / bytes_on_disk)
    assert outcome.before.top1 == pytest.approx(right(dense, test))
    assert outcome.after.top1 == pytest.approx(right(dk.load_compressed(tmp_path / "net.dkm", network()).eval(), test))
    assert len(outcome.history) == given.get("epochs", 0) and f"{bytes_on_disk:,} bytes" in str(outcome)
    assert f"top-1 {right(dense, test):.2f} → {outcome.after.top1:.2f} %" in str(outcome)


def test_it_is_allocate_retrain_and_share_in_this_order(dense, batches):
    whole, parts = copy.deepcopy(dense), copy.deepcopy(dense)
    outcome = dk.compress(whole, 5, batches[0], epochs=2, lr=0.05, seed=3, progress=False)
    plan = dk.allocate(parts, 5, batches[0], seed=3)
    as_planned = copy.deepcopy(parts)
    dk.share(as_planned, plan, seed=3)
    regularizer = dk.Regularizer(parts, plan, bits=bits_for_ratio(as_planned, 5), seed=3)
    history = dk.train(parts, batches[0], epochs=2, lr=0.05, regularizer=regularizer, seed=3, progress=False)
    dk.share(parts, plan, codes=regularizer.codes())
    assert (
        same(whole, parts)
        and outcome.plan == plan
        and [row["loss"] for row in outcome.history] == [row["loss"] for row in history]
    )
    assert outcome.before is outcome.after is None and "top-1" not in str(outcome)


def test_retraining_is_worth_its_epochs_where_the_file_is_small():
    train_loader, test_loader = dk.loaders(dk.subset(dk.load("digits"), train=640), 64)
    torch.manual_seed(0)
    trained = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
    )
    dk.train(trained, train_loader, epochs=6, lr=0.05, progress=False)
    after = {}
    for epochs in (0, 12):
        after[epochs] = dk.compress(
            copy.deepcopy(trained), 16, train_loader, epochs, test_loader=test_loader, progress=False
        ).after
    assert after[12].top1 > after[0].top1 + 2


def test_what_stays_dense_is_said_and_modes_stay(dense):
    net = copy.deepcopy(dense)
    net[3].train()
    outcome = dk.compress(net, 1.5, exclude=["6"], progress=False)
    assert set(outcome.skipped) == {"6"} and "not shared: 6 (" in str(outcome)
    assert torch.equal(net[6].weight, dense[6].weight) and isinstance(
        net[2].parametrizations.weight[0], dk.SharedWeight
    )
    assert net[3].training and not net[2].training and set(outcome.layers.index) == {"0", "2"}


def test_the_smallest_file_can_be_retrained_too(dense, batches):
    with pytest.raises(ValueError, match="must be above 1 and at most (.*), which") as error:
        dk.compress(copy.deepcopy(dense), 1e6, progress=False)
    most = float(str(error.value).split("at most ")[1].split(",")[0])
    outcome = dk.compress(copy.deepcopy(dense), most, batches[0], epochs=1, progress=False)
    assert abs(outcome.ratio / most - 1) < 0.01


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(ratio=1), "ratio=1 must be above 1"),
        (dict(ratio="4"), "ratio='4' must be above 1"),
        (dict(ratio=float("nan")), "ratio=nan must be above 1"),
        (dict(ratio=10**6), "must be above 1 and at most"),
        (dict(epochs=1), "epochs=1 needs a loader"),
        (dict(epochs=-1), "epochs=-1 must be at least 0"),
        (dict(epochs=1.5), "epochs=1.5 must be a whole number"),
        (dict(epochs=1, loader=[]), "loader holds no batches"),
        (dict(epochs=1, loader="train", lr=-0.1), "lr=-0.1 must be at least 0"),
        (dict(epochs=1, loader="train", schedule="linear"), "schedule='linear' must be one of"),
        (dict(momentum=-5), "momentum=-5 must be at least 0"),
        (dict(epochs=1, loader="train", weight_decay="high"), "weight_decay='high' must be at least 0"),
        (dict(test_loader=[]), "loader holds no images"),
        (dict(exclude=["conv9"]), "no layer is called 'conv9'"),
        (dict(layout="column"), "layout='column' must be one of"),
    ],
)
def test_nonsense_is_refused_and_nothing_is_changed(dense, batches, given, message):
    net = copy.deepcopy(dense)
    if given.get("loader") == "train":
        given = given | dict(loader=batches[0])
    with pytest.raises(ValueError, match=message):
        dk.compress(net, **dict(ratio=4) | given, progress=False)
    assert same(net, dense) and not net.training


def test_settings_of_training_are_looked_at_before_anything_is_measured(dense, batches, monkeypatch):
    monkeypatch.setattr("deepkmeans.pipeline.allocate", None)
    for wrong in (dict(momentum=-5), dict(weight_decay=float("nan")), dict(lr=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be at least 0 and finite"):
            dk.compress(dense, 4, batches[0], epochs=1, **wrong)


def test_a_shared_network_is_refused(dense):
    net = copy.deepcopy(dense)
    dk.compress(net, 3, progress=False)
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match="is shared already; call unshare"):
        dk.compress(net, 4, progress=False)
    assert same(net, before)


class Dies(list):  # a loader that is interrupted in its last pass
    passes = 0

    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(super().__iter__()):
            if self.passes == 4 and i == 5:  # the first pass is the allocator's
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_call_leaves_the_network_and_goes_on_from_its_checkpoint(dense, batches, tmp_path):
    net, straight = copy.deepcopy(dense), copy.deepcopy(dense)
    call = dict(ratio=5, epochs=3, lr=0.05, progress=False)
    with pytest.raises(KeyboardInterrupt):
        dk.compress(net, loader=Dies(batches[0]), checkpoint=tmp_path / "checkpoint", **call)
    assert same(net, dense) and not net.training and (tmp_path / "checkpoint").exists()
    dk.compress(net, loader=batches[0], checkpoint=tmp_path / "checkpoint", **call)
    dk.compress(straight, loader=batches[0], **call)
    assert same(net, straight)


def test_a_training_that_diverges_leaves_the_network(dense, batches):
    net = copy.deepcopy(dense)
    with pytest.raises(FloatingPointError):
        dk.compress(net, 5, batches[0], epochs=2, lr=1e12, progress=False)
    assert same(net, dense)


@pytest.mark.parametrize("wrong", ["Data", "Split", "Dataset", "name", "one image"])
def test_data_that_are_in_no_batches_are_refused_wherever_a_loader_is_wanted(wrong):
    data = dk.load("digits")
    image, label = data.train.images[0].float(), data.train.labels[0]
    loader = {
        "Data": data,
        "Split": data.train,
        "Dataset": torch.utils.data.TensorDataset(data.train.images, data.train.labels),
        "name": "digits",
        "one image": (image, label),
    }[wrong]
    net = dk.build("lenet5")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calls = [
        lambda: dk.evaluate(net, loader),
        lambda: dk.train(net, loader, epochs=1, lr=0.1),
        lambda: dk.allocate(net, 5, loader),
        lambda: dk.compress(net, 5, loader, epochs=1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"loader is a {type(loader).__name__}, must give batches"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_test_images_that_run_out_leave_the_network_as_it_was(dense, batches):
    net = copy.deepcopy(dense)
    with pytest.raises(ValueError, match="no images"):
        dk.compress(net, 4, test_loader=iter(batches[1]), progress=False)
    held, before = net.state_dict(), dense.state_dict()
    assert held.keys() == before.keys() and all(torch.equal(held[name], before[name]) for name in before)
