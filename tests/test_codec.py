"""The compressed file: round trips, a second reader, saves that die, damage and forgery."""
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from second_reader import read_dense
from torch.nn.utils.parametrizations import weight_norm

from deepkmeans import CompressedFileError, build, compression, decompress, inspect, load_compressed, make_plan, save_compressed, share, unshare
from deepkmeans.codec import file_bytes
from deepkmeans.kmeans import Clustering
from deepkmeans.rows import row_length
from deepkmeans.sharing import CONVOLUTIONS, share_layer, shared_layers


class Odd(nn.Module):
    """Grouped, dilated, transposed and 1×1 convolutions, a layer used twice, a tied weight, a parametrized layer, odd buffers."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped, self.dilated = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, dilation=2)
        self.up, self.point, self.normed = nn.ConvTranspose2d(8, 6, 3, stride=2), nn.Conv2d(6, 8, 1), weight_norm(nn.Conv2d(8, 8, 1))
        self.again, self.first, self.last = self.dilated, nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("brain", torch.arange(3).to(torch.bfloat16))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        x = self.again(self.dilated(self.grouped(self.stem(x)).relu()))
        x = self.normed(self.point(self.up(x)).relu()).mean((2, 3))
        return self.last(self.first(x)) * self.scale.float()


def shared_odd():
    torch.manual_seed(0)
    net = Odd()
    share(net, make_plan(net, k=5, sparsity=0.2, include=(*CONVOLUTIONS, nn.ConvTranspose2d), exclude=["normed"]))
    return net


def share_at_random(net, plan): # skewed cluster sizes, and the fraction `sparsity` of rows at zero; k-means would take its time
    rng = np.random.default_rng(0)
    for name, layer in plan.items():
        module = net.get_submodule(name)
        d = row_length(module.weight.shape, layer.layout)
        p = rng.dirichlet(np.full(layer.k, 5.0))
        if layer.sparsity:
            p = np.array([layer.sparsity, *(1 - layer.sparsity) * p[1:] / p[1:].sum()])
        codes = torch.from_numpy(rng.choice(layer.k, module.weight.numel() // d, p=p))
        share_layer(module, Clustering(torch.from_numpy(rng.normal(size=(layer.k, d))) * (torch.arange(layer.k) >= (layer.sparsity > 0))[:, None], codes, 0.0, 0), layer)
    return net


def same(a, b, x):
    return torch.equal(a.eval()(x), b.eval()(x)) and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


CASES = {"lenet5": (1, 28), "tt_conv_cnn": (3, 32), "freshnet_cnn": (3, 32), "wide_resnet": (3, 32), "torchvision:resnet18": (3, 64), "torchvision:mobilenet_v3_small": (3, 64)}


@pytest.mark.parametrize("name", CASES)
def test_what_comes_back_is_what_was_saved(name, tmp_path):
    (channels, side), path = CASES[name], tmp_path / "net.dkm"
    net = build(name, 10)
    plan = make_plan(net, k=[2 + i % 9 for i in range(len(make_plan(net, k=1)))], sparsity=0.3, layout="kernel" if "torchvision" in name else "row")
    share_at_random(net, plan)
    size = save_compressed(net, path)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    assert same(net, load_compressed(path), x) and same(net, load_compressed(path, build(name, 10, seed=3)), x)
    assert size == path.stat().st_size == inspect(path).bytes == compression(net, coding="file").bits / 8
    ours, theirs, dense = decompress(path), read_dense(path), unshare(net).state_dict()
    assert ours.keys() == theirs.keys() == dense.keys()
    assert all(torch.equal(ours[k], v) and np.array_equal(theirs[k], v.numpy()) for k, v in dense.items())


def test_odd_networks_come_back(tmp_path):
    net, path, x = shared_odd(), tmp_path / "odd.dkm", torch.randn(2, 3, 20, 20)
    save_compressed(net, path)
    back = load_compressed(path, Odd())
    assert same(net, back, x) and back.again is back.dilated and back.last.weight is back.first.weight and list(shared_layers(back)) == list(shared_layers(net))
    assert back.none.shape == (0, 3) and back.brain.dtype == torch.bfloat16
    theirs, dense = read_dense(path), unshare(net).state_dict()
    assert theirs.keys() == dense.keys() and all(np.array_equal(theirs[k], v.to(torch.float64 if v.dtype == torch.bfloat16 else v.dtype).numpy()) for k, v in dense.items())


@pytest.mark.parametrize("layout", ["scalar", "row", "kernel", "filter"])
def test_every_layout_and_a_network_that_is_one_layer(layout, tmp_path):
    net = nn.Conv2d(4, 30, 3)
    share(nn.Sequential(net), make_plan(nn.Sequential(net), k=7, layout=layout))
    save_compressed(net, tmp_path / "one.dkm")
    assert same(net, load_compressed(tmp_path / "one.dkm", nn.Conv2d(4, 30, 3)), torch.randn(1, 4, 5, 5))
    assert np.array_equal(read_dense(tmp_path / "one.dkm")["weight"], net.weight.detach().numpy())


def test_codebooks_of_half_the_size(tmp_path):
    net = build("lenet5")
    share(net, make_plan(net, k=32))
    whole = save_compressed(net, tmp_path / "whole.dkm")
    half = save_compressed(net, tmp_path / "half.dkm", codebook_dtype="float16")
    assert whole - half == 2 * sum(m.parametrizations.weight.original.numel() for m in (net.conv1, net.conv2))
    back = load_compressed(tmp_path / "half.dkm")
    assert back.conv2.weight.dtype == torch.float32 and torch.equal(back.conv2.weight, net.conv2.weight.half().float())
    assert np.array_equal(read_dense(tmp_path / "half.dkm")["conv2.weight"], back.conv2.weight.detach().numpy())
    with torch.no_grad():
        net.conv2.parametrizations.weight.original[3] = 1e5
    with pytest.raises(ValueError, match="'conv2' is not finite in torch.float16"):
        save_compressed(net, tmp_path / "half.dkm", codebook_dtype="float16")
    assert same(back, load_compressed(tmp_path / "half.dkm"), torch.zeros(1, 1, 28, 28))


def test_networks_of_other_types_keep_them(tmp_path):
    net = build("lenet5").double()
    share(net, make_plan(net, k=9))
    save_compressed(net, tmp_path / "double.dkm")
    assert same(net, load_compressed(tmp_path / "double.dkm"), torch.randn(1, 1, 28, 28, dtype=torch.float64))


def test_the_file_is_within_a_percent_of_its_bound(tmp_path):
    net = build("wide_resnet")
    share_at_random(net, make_plan(net, k=[144, 90, 80, 50, 30, 30, 100, 50, 10, 50, 50, 30, 7, 12, 7, 7],
                                   sparsity=[0, .3, .4, .5, .4, .4, .5, .5, .5, .5, .5, .62, .9, .5, .75, .9]))
    buffers = sum(b.nbytes for name, b in net.named_buffers() if "parametrizations" not in name)
    bound = compression(net, batchnorm=True).bits / 8 + buffers
    assert bound < save_compressed(net, tmp_path / "wrn.dkm") <= 1.01 * bound + 4096


def test_the_same_network_gives_the_same_bytes():
    assert file_bytes(shared_odd()) == file_bytes(shared_odd())


# What a file cannot hold, and networks that a file does not fit


def test_a_network_that_was_changed_is_saved_without_its_name(tmp_path):
    net = build("lenet5")
    net.fc2 = nn.Linear(500, 3)
    with pytest.warns(UserWarning, match="no longer what build\\('lenet5'\\) makes"):
        save_compressed(net, tmp_path / "net.dkm")
    with pytest.raises(CompressedFileError, match="names no architecture"):
        load_compressed(tmp_path / "net.dkm")
    with pytest.raises(ValueError, match="is not this network"):
        save_compressed(net, tmp_path / "net.dkm", architecture={"name": "lenet5", "num_classes": 4})
    save_compressed(net, tmp_path / "net.dkm", architecture={"name": "lenet5", "num_classes": 3})
    assert load_compressed(tmp_path / "net.dkm").fc2.out_features == 3


def test_a_file_does_not_enter_another_network(tmp_path):
    save_compressed(shared_odd(), tmp_path / "odd.dkm")
    untied, wider, shared = Odd(), Odd(), shared_odd()
    untied.last.weight = nn.Parameter(untied.last.weight.clone())
    wider.stem = nn.Conv2d(3, 8, 5)
    for net, problem in ((untied, "stand for one tensor"), (wider, "'stem.weight' has shape"), (shared, "call unshare"), (build("lenet5"), "has no 'conv1")):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(CompressedFileError, match=problem):
            load_compressed(tmp_path / "odd.dkm", net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("path, problem", [("missing.dkm", "is no file"), (".", "is no file"), ("empty.dkm", "does not fit"), ("text.dkm", "does not fit"), ("other.dkm", "no deepkmeans file")])
def test_other_files_are_refused_in_one_line(path, problem, tmp_path):
    from safetensors.torch import save_file
    (tmp_path / "empty.dkm").touch(), (tmp_path / "text.dkm").write_text("not a network at all")
    save_file({"tensors.F32": torch.zeros(3)}, tmp_path / "other.dkm")
    for reader in (load_compressed, inspect, decompress):
        with pytest.raises(CompressedFileError, match=problem) as error:
            reader(tmp_path / path)
        assert "\n" not in str(error.value)


def test_every_single_byte_matters(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False))
    share(net, make_plan(net, k=3))
    data, path = file_bytes(net), tmp_path / "bad.dkm"
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1:])
        with pytest.raises(CompressedFileError):
            load_compressed(path, nn.Sequential(nn.Conv2d(1, 4, 3, bias=False)))


def test_mutated_files_neither_crash_nor_hang_nor_pass(root, tmp_path):
    record = tmp_path / "record.json"
    subprocess.run([sys.executable, root / "tests" / "fuzz_codec.py", "2000", record], check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = json.loads(record.read_text())
    assert record["files"] >= 2000 and record["slowest_seconds"] < 1
    assert all(record["kinds"][kind]["read"] <= 2 for kind in ("flip", "cut", "splice", "length"))  # where a random change changed nothing


# Saves that die

SAVE = """
import sys, time
from deepkmeans import build, codec, make_plan, save_compressed, share
net = build("lenet5", seed=int(sys.argv[2]))
share(net, make_plan(net, k=8))
print("ready", flush=True)
while True:
    save_compressed(net, sys.argv[1])
    if len(sys.argv) == 3: break
"""


def saver(path, seed, *forever):
    process = subprocess.Popen([sys.executable, "-c", SAVE, str(path), str(seed), *forever], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_savers_that_are_killed_leave_one_whole_file(tmp_path):
    path = tmp_path / "net.dkm"
    processes = [saver(path, seed, "forever") for seed in (1, 2)]
    whole, until = set(), time.monotonic() + 2
    while time.monotonic() < until or len(whole) < 2:
        if path.exists():
            whole.add(float(load_compressed(path).fc1.weight[0, 0].detach()))  # each look finds a whole file
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert float(load_compressed(path).fc1.weight[0, 0].detach()) in whole and len(whole) == 2
    assert {p.suffix for p in tmp_path.iterdir()} <= {".dkm", ".part"}


@pytest.mark.parametrize("limit", [0, 1, 4096, 100_000])
def test_a_full_disk_leaves_the_old_file(limit, tmp_path):
    path, net = tmp_path / "net.dkm", build("lenet5", seed=1)
    save_compressed(build("lenet5", seed=0), path)
    old, size = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, size[1]))  # every write beyond so many bytes fails
    try:
        with pytest.raises(OSError):
            save_compressed(net, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_late_leaves_the_old_file(step, tmp_path, monkeypatch):
    path = tmp_path / "net.dkm"
    save_compressed(build("lenet5", seed=0), path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save_compressed(build("lenet5", seed=1), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_threads_may_save_to_one_path(tmp_path):
    nets = [build("lenet5", seed=seed) for seed in range(4)]
    threads = [threading.Thread(target=save_compressed, args=(net, tmp_path / "net.dkm")) for net in nets]
    [t.start() for t in threads], [t.join() for t in threads]
    assert (tmp_path / "net.dkm").read_bytes() in [file_bytes(net) for net in nets] and len(list(tmp_path.iterdir())) == 1
