"""`train` and `evaluate` on what users bring: loaders, labels, losses, checkpoints; and what an error leaves behind."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

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


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(zip(*images_and_labels()))


@pytest.mark.parametrize("make", [lambda: DataLoader(Streamed(), 8), lambda: (batch for batch in batches())])
def test_a_loader_without_a_length_is_measured_on_but_not_trained_on(make):
    assert dk.evaluate(network(), make()) == dk.evaluate(network(), batches())
    with pytest.raises(ValueError, match=f"loader is a {type(make()).__name__} without a length, must have one"):
        quick(network(), make())


def test_a_loader_that_says_four_batches_and_gives_none_is_refused():
    with pytest.raises(ValueError, match="loader gives no batches, though its length is 4"):
        quick(network(), Counted([], 4))


def test_a_loader_that_is_longer_than_it_says_ends_where_training_does():
    net, rates = network(), []
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=3))

    class Watched(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    quick(net, Counted(batches(), 2), regularizer=regularizer, optimizer=Watched)
    assert rates == pytest.approx([0.1, 0.05, 0.0, 0.0])  # the cosine of two steps, and its end


def test_no_loader_is_needed_where_nothing_is_trained():
    net = network()
    before = state(net)
    assert quick(net, None, epochs=0) == [] and same(state(net), before)


# Settings


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(epochs=1.5), "epochs=1.5 must be at least 0, a whole number"),
        (dict(epochs="3"), "epochs='3' must be at least 0, a whole number"),
        (dict(lr="0.1"), "lr='0.1' must be at least 0 and finite"),
        (dict(lr=math.inf), "lr=inf must be at least 0 and finite"),
        (dict(momentum="high"), "momentum='high' must be at least 0 and finite"),
        (dict(weight_decay=-1), "weight_decay=-1 must be at least 0 and finite"),
        (dict(optimizer=torch.optim.SGD(network().parameters(), lr=0.1)), "optimizer is a SGD, must make one of"),
    ],
)
def test_settings_of_another_kind_are_named(how, message):
    with pytest.raises(ValueError, match=message):
        quick(network(), batches(), **how)


def test_a_network_with_nothing_to_train_is_named():
    for net in (network().requires_grad_(False), nn.Flatten()):
        with pytest.raises(ValueError, match="model has no parameter to train"):
            quick(net, batches())


@pytest.mark.parametrize("loss", [lambda output, y: F.cross_entropy(output, y)[None], lambda output, y: 1.0])
def test_a_loss_that_is_no_scalar_is_refused_before_the_first_step(loss):
    net = network()
    before = state(net)
    with pytest.raises(ValueError, match="loss gives .*, must give a scalar tensor"):
        quick(net, batches(), loss=loss)
    assert same(state(net), before)


def test_mixed_labels_train_like_those_that_they_stand_for():
    one, two = network(), network()
    (row,) = quick(one, [(x, F.one_hot(y, 10).float()) for x, y in batches()])
    quick(two, batches())
    assert math.isnan(row["top1"])
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name])


def test_compiled_training_ends_where_plain_training_does(tmp_path, monkeypatch):
    nets, compiled, compiler = (network(), network()), [], torch.compile

    def compile_quickly(model):
        compiled.append(model)
        return compiler(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    for net, compile in zip(nets, (False, True)):
        regularizer = dk.Regularizer(net, dk.make_plan(net, k=4))
        how = dict(epochs=3, lr=0.05, regularizer=regularizer, progress=False)
        dk.train(net, batches(), **how, compile=compile, checkpoint=tmp_path / f"{compile}")
    assert compiled == [nets[1]]
    for name, value in nets[0].state_dict().items():
        assert torch.allclose(value, nets[1].state_dict()[name], atol=1e-5), name
    with pytest.raises(ValueError, match="other settings: compile=True, not False"):
        dk.train(nets[1], batches(), **how, checkpoint=tmp_path / "True")


def test_an_optimizer_of_ones_own_does_what_a_plain_loop_does():
    net, plain = network(), network()
    quick(net, batches(), lr=0.01, schedule="constant", optimizer=partial(torch.optim.AdamW, weight_decay=0.3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.3)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert same(net.state_dict(), plain.state_dict())


# Checkpoints


class Noisy(TensorDataset):
    """Images with noise from a generator of the data."""

    def __init__(self):
        super().__init__(*images_and_labels())
        self.generator = torch.Generator().manual_seed(7)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(x.shape, generator=self.generator), y


def with_sampler():
    data = TensorDataset(*images_and_labels())
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(6))
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))


LOADERS = {
    "list": batches,
    "global generator": shuffled,
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    "workers": lambda: shuffled(generator=torch.Generator().manual_seed(5), num_workers=1),
    "sampler": with_sampler,
    "data": lambda: DataLoader(Noisy(), 8),
    "shorter": lambda: Counted(batches(), 6),
    "longer": lambda: Counted(batches(), 3),
}


class Dies:
    """A loss under which a training is interrupted after some steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self, output, labels):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return F.cross_entropy(output, labels)


def interrupted(loader, path, kind=None, **how):  # after two of four epochs; → weights of the resumed, of another
    nets = []
    for steps, checkpoint in ((10, path), (100, path), (100, None)):
        net = network()
        regularizer = kind and dk.Regularizer(net, dk.make_plan(net, k=3), kind, refresh_every=1)
        how |= dict(epochs=4, regularizer=regularizer, loss=Dies(steps), checkpoint=checkpoint)
        try:
            history = quick(net, loader(), **how)
        except KeyboardInterrupt:
            assert steps == 10 and path.exists()
        else:
            nets.append((state(net), [{**row, "seconds": 0} for row in history]))
    return nets


@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_training_ends_at_the_same_bits_with_any_loader(loader, tmp_path):
    (resumed, one), (straight, two) = interrupted(LOADERS[loader], tmp_path / "c")
    assert same(resumed, straight) and one == two


@pytest.mark.parametrize("kind", ["none", "indicator", "spectral", "hard"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_a_resumed_training_ends_at_the_same_bits_under_any_regularizer(kind, optimizer, tmp_path):
    (resumed, one), (straight, two) = interrupted(batches, tmp_path / "c", kind, optimizer=optimizer, lr=0.01)
    assert same(resumed, straight) and one == two


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


def changed(path, **tensors):  # a checkpoint with other tensors
    with safe_open(path, "pt") as file:
        head = file.metadata()
    save_file(load_file(path) | tensors, path, metadata=head)


UNUSABLE = {
    "foreign": (foreign, "not one that `train` wrote"),
    "another head": (
        lambda path: save_file({"a": torch.zeros(1)}, path, metadata={"history": "1", "settings": "2"}),
        "not one that `train` wrote",
    ),
    "garbage": (lambda path: path.write_bytes(b"garbage" * 100), "not one that `train` wrote"),
    "empty": (lambda path: path.write_bytes(b""), "not one that `train` wrote"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "not one that `train` wrote"),
    "more": (lambda path: changed(path, **{"model.9.weight": torch.ones(1)}), "model 9.weight is .*must be missing"),
    "double": (
        lambda path: changed(path, **{"model.0.bias": torch.ones(8).double()}),
        r"model 0.bias is torch.float64 \(8,\), must be torch.float32 \(8,\)",
    ),
    "another momentum": (
        lambda path: changed(path, **{"optimizer.0.momentum_buffer": torch.ones(3)}),
        "optimizer 0.momentum_buffer is of no parameter",
    ),
    "another parameter": (
        lambda path: changed(path, **{"optimizer.6.momentum_buffer": torch.ones(3)}),
        "optimizer 6.momentum_buffer is of no parameter",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_unusable_checkpoint_is_named_and_nothing_is_loaded(what, tmp_path):
    path, net = tmp_path / "run", network()
    make, message = UNUSABLE[what]
    quick(network(), batches(), checkpoint=path)
    make(path)
    before = state(net)
    with pytest.raises(ValueError, match=f"checkpoint='{path}' .*{message}"):
        quick(net, batches(), checkpoint=path)
    assert same(state(net), before)


def test_the_checkpoint_of_another_run_is_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "run"
    quick(network(), shuffled(), checkpoint=path)
    generator = torch.Generator().manual_seed(5)
    for net, loader, how, message in (
        (network(7), shuffled(), {}, r"model 2.weight is torch.float32 \(8, 8, 3, 3\), must be .*\(7, 8, 3, 3\)"),
        (network(), shuffled(generator=generator), {}, "loader 0 is missing, must be"),
        (network(), shuffled(), dict(loss=F.cross_entropy), "loss='classification_loss', not 'cross_entropy'"),
        (network(), shuffled(), dict(optimizer=torch.optim.AdamW), "optimizer=None, not 'AdamW'"),
    ):
        before = state(net)
        with pytest.raises(ValueError, match=f"checkpoint='{path}' .*{message}"):
            quick(net, loader, checkpoint=path, **how)
        assert same(state(net), before)


def test_a_checkpoint_that_knows_no_loss_and_no_optimizer_is_taken_up(tmp_path):
    path, net = tmp_path / "run", network()
    history = quick(net, batches(), checkpoint=path)
    with safe_open(path, "pt") as file:
        head = file.metadata()
    settings = json.loads(head["settings"])
    del settings["loss"], settings["optimizer"]
    save_file(load_file(path), path, metadata=head | {"settings": json.dumps(settings)})
    again = network()
    assert quick(again, batches(), checkpoint=path) == history and same(again.state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="optimizer=None, not 'AdamW'"):
        quick(network(), batches(), checkpoint=path, optimizer=torch.optim.AdamW)


class Remembering(nn.Linear):
    def __init__(self, *sizes, extra):
        super().__init__(*sizes)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra


def test_an_extra_state_is_kept_where_it_is_a_tensor_and_refused_otherwise(tmp_path):
    def make(extra):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), Remembering(64, 10, extra=extra))

    quick(make(torch.tensor([3.0])), batches(), checkpoint=tmp_path / "one")
    net = make(torch.tensor([4.0]))
    quick(net, batches(), checkpoint=tmp_path / "one")
    assert net[1].extra == 3
    with pytest.raises(ValueError, match="checkpoint= .* its '1._extra_state' is a dict"):
        quick(make(dict(steps=3)), batches(), checkpoint=tmp_path / "two")
    assert not (tmp_path / "two").exists() and quick(make(dict(steps=3)), batches())


# Randomness


def test_the_global_generator_neither_decides_what_is_measured_nor_moves():
    plans, scores = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        net, before = network(), torch.manual_seed(seed).get_state()
        plans.append(dk.allocate(net, 4, shuffled(), images=8))
        first = []  # the labels of the first batch tell the order
        dk.mean_score(net, shuffled(), lambda output, labels: first.append(labels.tolist()) or 0.0)
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
    soft = dk.mean_score(net, [(x, F.one_hot(y, 5).float())], lambda out, y: (out.argmax(1) == y.argmax(1)).sum())
    assert soft == pytest.approx(by_hand / 100)


def test_a_network_without_parameters_is_measured():
    x = torch.eye(4)
    assert dk.evaluate(nn.Identity(), [(x, torch.tensor([0, 1, 2, 0]))]).top1 == 75


@pytest.mark.parametrize("teacher", ["the model", "a part of it"])
def test_a_teacher_that_is_a_part_of_the_model_is_refused(teacher):
    net = network().train()
    with pytest.raises(ValueError, match="teacher shares modules with the model"):
        dk.train(net, batches(), epochs=1, lr=0.01, teacher=net if teacher == "the model" else net[:2], progress=False)
    assert net.training


def test_a_teacher_of_other_classes_is_refused():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(ValueError, match=r"teacher gives outputs of shape \(8, 1\), must give \(8, 10\)"):
        dk.train(network(), batches(), epochs=1, lr=0.01, teacher=teacher, progress=False)


def test_a_parameter_that_the_last_step_made_nan_is_an_error():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return Broken.apply(self.inner(x))

    with pytest.raises(FloatingPointError, match="inner.*is NaN or infinite after 1 steps; lr=0.01 is too high"):
        dk.train(Net(), batches()[:1], epochs=1, lr=0.01, progress=False)


def test_an_infinite_parameter_that_is_not_trained_is_no_error():
    net = network()
    net.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
    assert dk.train(net, batches(), epochs=1, lr=0.01, progress=False)[0]["epoch"] == 1


def test_labels_of_any_whole_type_train_alike():
    nets = network(), network()
    for net, dtype in zip(nets, (torch.int64, torch.int32)):
        dk.train(net, [(x, y.to(dtype)) for x, y in batches()], epochs=1, lr=0.01, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


class Averaging(nn.Module):
    """Keeps a moving average that decides what it computes, and leaves it out of its state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(10), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.mean


def test_a_resumed_training_has_the_buffers_that_no_state_dict_holds(tmp_path):
    whole, parts = (network().append(Averaging()) for _ in range(2))
    dk.train(whole, batches(), epochs=2, lr=0.01, progress=False)

    class Killed(Exception):
        pass

    def dies_in_the_second_epoch():
        for epoch in range(2):
            if epoch:
                raise Killed
            yield

    class Loader(list):
        epochs = dies_in_the_second_epoch()

        def set_epoch(self, epoch):
            next(self.epochs)

    file = tmp_path / "train.safetensors"
    with pytest.raises(Killed):
        dk.train(parts, Loader(batches()), epochs=2, lr=0.01, checkpoint=file, progress=False)
    again = network().append(Averaging())
    dk.train(again, batches(), epochs=2, lr=0.01, checkpoint=file, progress=False)
    assert torch.equal(again[-1].mean, whole[-1].mean)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))


def test_images_that_are_nan_are_not_the_learning_rate_s_fault():
    with pytest.raises(FloatingPointError, match="NaN before any step: images, labels or weights"):
        dk.train(network(), [(x * math.nan, y) for x, y in batches()], epochs=1, lr=0.01, progress=False)
