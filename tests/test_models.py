"""Models on real batches: what crosses the chapters on models and data."""

import threading
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepkmeans.data import Loader, load, loaders
from deepkmeans.models import MODELS, build, lenet5, load_weights
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


def bytes_of(model):
    return [t.numpy().tobytes() for t in model.state_dict().values()]


def test_four_threads_that_build_at_once_get_the_weights_of_their_seeds_and_leave_the_global_generator_alone():
    jobs = [
        (name, seed)
        for seed in range(4)
        for name in ("lenet5", "tt_conv_cnn", "freshnet_cnn", "torchvision:squeezenet1_1")
    ]
    alone, found, before = {job: bytes_of(build(job[0], seed=job[1])) for job in jobs}, {}, torch.get_rng_state()

    def work(mine):
        for name, seed in mine:
            found[name, seed] = bytes_of(build(name, seed=seed))
            torch.rand(1, generator=torch.Generator().manual_seed(seed))

    threads = [threading.Thread(target=work, args=(jobs[i:] + jobs[:i],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone and torch.equal(before, torch.get_rng_state())


def test_a_seed_gives_the_weights_that_the_global_generator_gives_after_that_seed():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        by_hand = nn.Conv2d(3, 32, 5, padding=2)
    assert torch.equal(build("freshnet_cnn", seed=5).conv1.weight, by_hand.weight)
    with torch.random.fork_rng():
        import torchvision

        torch.manual_seed(5)
        by_hand = torchvision.models.mobilenet_v3_small(num_classes=7)
    assert bytes_of(build("torchvision:mobilenet_v3_small", 7, seed=5)) == bytes_of(by_hand)


@pytest.mark.parametrize(
    "name",
    [
        "regnet_y_400mf",
        "regnet_x_400mf",
        "mnasnet0_5",
        "swin_t",
        "swin_v2_t",
        "maxvit_t",
        "vit_b_16",
        "efficientnet_b0",
        "convnext_tiny",
        "inception_v3",
    ],
)
def test_a_network_of_shapes_alone_has_the_names_and_shapes_of_the_real_one(name):
    import torchvision

    with torch.device("meta") if not name.startswith("regnet") else torch.device("cpu"):
        real = torchvision.models.get_model(name, weights=None, num_classes=7)
    shapes = build(f"torchvision:{name}", 7, seed=None)
    assert all(t.is_meta for t in (*shapes.parameters(), *shapes.buffers()))
    assert {k: v.shape for k, v in shapes.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def small():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


STATE = small().state_dict()
SPARSE = STATE | {"fc.weight": STATE["fc.weight"].to_sparse()}


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "'conv.weight' is no such tensor"),
        ({0: torch.ones(2), 1: torch.ones(3)}, "'conv.weight' is no such tensor"),
        (torch.ones(3), "no such tensor"),
        ([1, 2], "no such tensor"),
        (STATE | {"fc.weight": STATE["fc.weight"].to("meta")}, "'fc.weight' is without values in the file"),
        (SPARSE, "'fc.weight' is sparse in the file"),
        (STATE | {"fc.weight": STATE["fc.weight"] + 1j}, "'fc.weight' is complex in the file"),
        (STATE | {"fc.weight": torch.ones(2, 5)}, "2×5 in the file"),
        (STATE | {"more": torch.ones(1)}, "'more' is 1 in the file"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_and_leaves_the_network_as_it_was(content, message, tmp_path):
    net = small().double()
    before = bytes_of(net)
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(net, tmp_path / "net.pt")
    assert "\n" not in str(error.value) and bytes_of(net) == before


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "neither torch nor safetensors wrote it"),
        (b"conv.weight 1 2 3", "neither torch nor safetensors wrote it"),
        (b"PK\x03\x04 nonsense", "damaged"),
        (b"\x80\x02 nonsense", "damaged"),
        (b"\xff" * 8 + b"{", "damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_plain_line(content, message, tmp_path):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"neither safetensors nor a state dict that loads with weights_only: .*{message}"
    ) as error:
        load_weights(small(), tmp_path / "net.pt")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_pickled_network_is_told_from_a_state_dict(tmp_path):
    torch.save(small(), tmp_path / "net.pt")
    with pytest.raises(
        ValueError, match="weights_only: it holds Python objects, such as a whole network; save its state_dict()"
    ):
        load_weights(small(), tmp_path / "net.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}, "epoch": 3},
        lambda s: {"net": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "acc": 1.0},
        lambda s: {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(4)},
    ],
)
def test_checkpoints_as_trainings_leave_them_are_read(wrap, tmp_path):
    source, net = small(), small()
    for t in source.state_dict().values():
        t.add_(1)
    torch.save(wrap(source.state_dict()), tmp_path / "net.pt")
    assert bytes_of(load_weights(net, tmp_path / "net.pt")) == bytes_of(source)


class Versioned(nn.Linear):
    _version = 3

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") not in (2, 3):
            raise ValueError(f"version {metadata.get('version')} is not known")
        self.loaded = metadata["version"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_the_versions_that_modules_note_beside_their_weights_are_kept(wrapper, tmp_path):
    net = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=Versioned(2, 2)))
    state = nn.Sequential(OrderedDict(module=net)).state_dict() if wrapper else net.state_dict()
    for version in (2, 3, 1):
        state._metadata[f"{wrapper}second"]["version"] = version
        torch.save(state, tmp_path / "net.pt")
        if version == 1:
            net.first.weight.data += 1
            before = bytes_of(net)
            with pytest.raises(ValueError, match="does not fit the architecture: version 1 is not known"):
                load_weights(net, tmp_path / "net.pt")
            assert bytes_of(net) == before
        else:
            assert load_weights(net, tmp_path / "net.pt").second.loaded == version


@pytest.mark.parametrize("write", ["safetensors", "torch"])
def test_mnasnet_is_loaded(write, tmp_path):
    from safetensors.torch import save_file

    net, other = (build("torchvision:mnasnet0_5", 7, seed=seed) for seed in (1, 2))
    (torch.save if write == "torch" else save_file)(net.state_dict(), tmp_path / "net")
    assert bytes_of(load_weights(other, tmp_path / "net")) == bytes_of(net)


def test_a_network_without_memory_takes_no_weights(tmp_path):
    torch.save(build("lenet5").state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="dense in the file and without values in the network"):
        load_weights(build("lenet5", seed=None), tmp_path / "net.pt")
