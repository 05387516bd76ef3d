"""The compressed file: round trips, a second reader, saves that die, damage and forgery."""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from fuzz_codec import joined, split
from second_reader import read_dense
from torch.nn.utils.parametrizations import weight_norm
from torchvision import models

from deepkmeans import (
    CompressedFileError,
    build,
    codec,
    compression,
    decompress,
    inspect,
    load_compressed,
    make_plan,
    save_compressed,
    share,
    unshare,
)
from deepkmeans.codec import MAX_HEADER, MAX_NAMES, decoded_bytes, file_bytes, _read
from deepkmeans.files import write_file
from deepkmeans.clustering import Clustering
from deepkmeans.models import _seeded
from deepkmeans.rows import row_length
from deepkmeans.plan import CONVOLUTIONS
from deepkmeans.sharing import share_layer, shared_layers


class Odd(nn.Module):
    """All kinds of convolutions, a layer used twice, a tied weight, a parametrized layer, odd buffers."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped, self.dilated = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=4),
            nn.Conv2d(8, 8, 3, dilation=2),
        )
        self.up, self.point, self.normed = (
            nn.ConvTranspose2d(8, 6, 3, stride=2),
            nn.Conv2d(6, 8, 1),
            weight_norm(nn.Conv2d(8, 8, 1)),
        )
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


# Skewed cluster sizes, and the fraction `sparsity` of rows at zero; k-means would take its time.
def share_at_random(net, plan):
    rng = np.random.default_rng(0)
    for name, layer in plan.items():
        module = net.get_submodule(name)
        d = row_length(module.weight.shape, layer.layout)
        p = rng.dirichlet(np.full(layer.k, 5.0))
        if layer.sparsity:
            p = np.array([layer.sparsity, *(1 - layer.sparsity) * p[1:] / p[1:].sum()])
        codes = torch.from_numpy(rng.choice(layer.k, module.weight.numel() // d, p=p))
        share_layer(
            module,
            Clustering(
                torch.from_numpy(rng.normal(size=(layer.k, d)))
                * (torch.arange(layer.k) >= (layer.sparsity > 0))[:, None],
                codes,
                0.0,
                0,
            ),
            layer,
        )
    return net


def same(a, b, x):
    return torch.equal(a.eval()(x), b.eval()(x)) and all(
        torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()
    )


CASES = {
    "lenet5": (1, 28),
    "tt_conv_cnn": (3, 32),
    "freshnet_cnn": (3, 32),
    "wide_resnet": (3, 32),
    "torchvision:resnet18": (3, 64),
    "torchvision:mobilenet_v3_small": (3, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_what_comes_back_is_what_was_saved(name, tmp_path):
    (channels, side), path = CASES[name], tmp_path / "net.dkm"
    net = build(name, 10)
    plan = make_plan(
        net,
        k=[2 + i % 9 for i in range(len(make_plan(net, k=1)))],
        sparsity=0.3,
        layout="kernel" if "torchvision" in name else "row",
    )
    share_at_random(net, plan)
    size = save_compressed(net, path)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    assert same(net, load_compressed(path), x) and same(net, load_compressed(path, build(name, 10, seed=3)), x)
    assert size == path.stat().st_size == inspect(path).bytes == compression(net, coding="file").bits / 8
    ours, theirs, dense = decompress(path), read_dense(path), unshare(net).state_dict()
    assert ours.keys() == theirs.keys() == dense.keys()
    assert all(torch.equal(ours[k], v) and np.array_equal(theirs[k], v.numpy()) for k, v in dense.items())


BUILDERS, QUICK = models.list_models(module=models), ("mnasnet0_5", "regnet_y_400mf", "swin_t")
all_of_them = pytest.mark.skipif(
    "DEEPKMEANS_ALL" not in os.environ,
    reason="minutes of a free core and 10 GB of memory: DEEPKMEANS_ALL=1 pytest tests/test_codec.py -k torchvision",
)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else all_of_them) for name in BUILDERS])
def test_every_classifier_of_torchvision_comes_back_bit_for_bit(name, tmp_path):
    net = build(f"torchvision:{name}", 3)
    share_at_random(net, dict(list(make_plan(net, k=5, sparsity=0.3).items())[:4]))
    save_compressed(net, tmp_path / "net.dkm")
    back = load_compressed(tmp_path / "net.dkm", max_bytes=2**33)
    before, after = net.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items()
    )
    if sum(map(torch.numel, net.parameters())) < 1e8:
        with torch.no_grad():
            assert torch.equal(net.eval()(torch.ones(1, 3, 224, 224)), back(torch.ones(1, 3, 224, 224)))


OTHERS = [name for name in models.list_models() if name not in BUILDERS]  # detection, segmentation, video, flow …
QUICK += ("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "quantized_mobilenet_v2")


def theirs(name):  # without what it was trained with, every tensor filled with numbers that differ
    builder = models.get_model_builder(name)
    backbone = {"weights_backbone": None} if "weights_backbone" in signature(builder).parameters else {}
    with _seeded(None):
        net = builder(weights=None, **backbone)
    net = net.to_empty(device="cpu")
    for i, tensor in enumerate(net.state_dict().values()):
        tensor.copy_((torch.arange(tensor.numel()) % 97 + i).reshape(tensor.shape))
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else all_of_them) for name in OTHERS])
def test_every_other_network_of_torchvision_goes_into_a_file_and_back_into_its_like(name, tmp_path):
    with pytest.raises(ValueError, match="or a classifier that torchvision.models.list_models") as error:
        build(f"torchvision:{name}")
    assert "\n" not in str(error.value)
    net, path = theirs(name), tmp_path / "net.dkm"
    share_at_random(net, dict(list(make_plan(net, k=5, sparsity=0.3).items())[:4]))
    save_compressed(net, path)
    with pytest.raises(CompressedFileError, match="names no architecture"):
        load_compressed(path)
    like = theirs(name)
    for tensor in like.state_dict().values():
        tensor.zero_()
    before, after = net.state_dict(), load_compressed(path, like, max_bytes=2**33).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def test_odd_networks_come_back(tmp_path):
    net, path, x = shared_odd(), tmp_path / "odd.dkm", torch.randn(2, 3, 20, 20)
    save_compressed(net, path)
    back = load_compressed(path, Odd())
    assert (
        same(net, back, x)
        and back.again is back.dilated
        and back.last.weight is back.first.weight
        and list(shared_layers(back)) == list(shared_layers(net))
    )
    assert back.none.shape == (0, 3) and back.brain.dtype == torch.bfloat16
    theirs, dense = read_dense(path), unshare(net).state_dict()
    assert theirs.keys() == dense.keys() and all(
        np.array_equal(theirs[k], v.to(torch.float64 if v.dtype == torch.bfloat16 else v.dtype).numpy())
        for k, v in dense.items()
    )


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
    codebook = net.conv2.parametrizations.weight.original.data
    kept = codebook.clone()
    for change, problem in (
        (lambda: codebook[3].fill_(1e5), "is not finite in torch.float16"),
        (lambda: codebook.mul_(1e-9), "is too small for torch.float16: its largest number is"),
        (lambda: codebook.mul_(1e-6), "is too small"),  # half the digits would be left
    ):
        change()
        with pytest.raises(ValueError, match=f"'conv2' {problem}"):
            save_compressed(net, tmp_path / "half.dkm", codebook_dtype="float16")
        codebook.copy_(kept)
    codebook[3] = 0
    codebook[3, 0] = 1e-9  # nothing beside the others: any network has such numbers
    save_compressed(net, tmp_path / "zero.dkm", codebook_dtype="float16")
    assert same(back, load_compressed(tmp_path / "half.dkm"), torch.zeros(1, 1, 28, 28))


def test_networks_of_other_types_keep_them(tmp_path):
    net = build("lenet5").double()
    share(net, make_plan(net, k=9))
    save_compressed(net, tmp_path / "double.dkm")
    assert same(net, load_compressed(tmp_path / "double.dkm"), torch.randn(1, 1, 28, 28, dtype=torch.float64))


def test_the_file_is_within_a_percent_of_its_bound(tmp_path):
    net = build("wide_resnet")
    share_at_random(
        net,
        make_plan(
            net,
            k=[144, 90, 80, 50, 30, 30, 100, 50, 10, 50, 50, 30, 7, 12, 7, 7],
            sparsity=[0, 0.3, 0.4, 0.5, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.62, 0.9, 0.5, 0.75, 0.9],
        ),
    )
    buffers = sum(b.nbytes for name, b in net.named_buffers() if "parametrizations" not in name)
    bound = compression(net, coding="entropy", batchnorm=True).bits / 8 + buffers
    assert bound < save_compressed(net, tmp_path / "wrn.dkm") <= 1.01 * bound + 4096


def test_the_same_network_gives_the_same_bytes():
    assert file_bytes(shared_odd()) == file_bytes(shared_odd())


# What a file cannot hold, and networks that a file does not fit


def test_a_card_travels_with_the_file_and_changes_nothing_else(tmp_path):
    net, told = shared_small(), {"data": "mnist, 10,000 images", "top-1": 99.1, "licence": "MIT", "tried": True}
    told |= {"delta": -1, "rows": 3_000_000_000, "least": -(2**63), "most": 2**63 - 1}
    save_compressed(net, tmp_path / "told.dkm", card=told)
    save_compressed(net, tmp_path / "bare.dkm")
    assert inspect(tmp_path / "told.dkm").card == told and inspect(tmp_path / "bare.dkm").card is None
    assert "\ntop-1: 99.1\n" in str(inspect(tmp_path / "told.dkm"))
    one, other = (load_compressed(tmp_path / name, small()).state_dict() for name in ("told.dkm", "bare.dkm"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for bad in ("two\nlines", 2**63, float("nan")):
        with pytest.raises(
            ValueError, match="card=.* must be a dict of printable texts and numbers.* of at most 64 bits"
        ):
            save_compressed(net, tmp_path / "bare.dkm", card={"data": bad})
    assert inspect(tmp_path / "bare.dkm").card is None


def test_a_network_that_is_built_from_its_file_is_in_eval_mode_with_all_its_parts(tmp_path):
    net = build("lenet5").train()
    share(net, make_plan(net, k=4))
    assert all(module.training for module in net.modules())
    save_compressed(net, tmp_path / "net.dkm")
    assert not any(module.training for module in load_compressed(tmp_path / "net.dkm").modules())


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
    for net, problem in (
        (untied, "stand for one tensor"),
        (wider, "'stem.weight' has shape"),
        (shared, "call unshare"),
        (build("lenet5"), "has no 'conv1"),
    ):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(CompressedFileError, match=problem):
            load_compressed(tmp_path / "odd.dkm", net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "path, problem",
    [
        ("missing.dkm", "is no file"),
        (".", "is no file"),
        ("empty.dkm", "does not fit"),
        ("text.dkm", "does not fit"),
        ("other.dkm", "no deepkmeans file"),
    ],
)
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
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(CompressedFileError):
            load_compressed(path, nn.Sequential(nn.Conv2d(1, 4, 3, bias=False)))


# Files that somebody forged, their checksums made right


def small():  # the smallest network whose file has every array
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 64, (9, 1)), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 2))
    net.register_buffer("mask", torch.tensor([True, False]))
    return net


def shared_small():  # with a histogram
    net = small()
    share_at_random(net, make_plan(net, k=4, sparsity=0.7))
    return net


def forged(change, net=None):  # change(metadata, header, body as a bytearray)
    header, body = split(file_bytes(net or shared_small()))
    body = bytearray(body)
    change(header["__metadata__"], header, body)
    return joined(header, bytes(body))


def filled(array, byte):
    def change(metadata, header, body):
        a, b = header[array]["data_offsets"]
        body[a:b] = bytes([byte]) * (b - a)

    return change


def layer_field(column, value):
    def change(metadata, header, body):
        metadata["layers"][1][metadata["layers"][0].index(column)] = value

    return change


def architecture(value):
    return lambda metadata, header, body: metadata.update(architecture=value)


def card(value):
    return lambda metadata, header, body: metadata.update(card=value)


def named(table, name):  # a layer, a tensor, a tie or an architecture of that name
    def change(metadata, header, body):
        if table == "layers":
            metadata["layers"][1][0] = name
        elif table == "tensors":
            metadata["tensors"]["F32"][0][0] = name
        else:
            metadata[table] = {name: "3.weight"} if table == "ties" else {"name": name}

    return change


FORGED = {
    "a histogram without a used cluster": filled("histograms", 0),
    "a codebook of NaN": filled("codebooks.F32", 255),
    "truth values that are neither": filled("tensors.BOOL", 7),
    "words of 4,300 digits": layer_field("words", 10**4299),
    "clusters of 4,300 digits": layer_field("k", 10**4299),
    "words that are a truth value": layer_field("words", True),
    "a layout that is a list": layer_field("layout", []),
    "a type that is an object": layer_field("dtype", {}),
    "an architecture without a name": architecture({"num_classes": 2}),
    "one whose name is a number": architecture({"name": 7}),
    "one with a seed": architecture({"name": "lenet5", "seed": 1}),
    "one with text": architecture({"name": "lenet5", "num_classes": "2"}),
    "one with NaN": architecture({"name": "freshnet_cnn", "dropout": float("nan")}),
    "one with infinity": architecture({"name": "freshnet_cnn", "dropout": float("inf")}),
    "a card that is a list": card(["data"]),
    "a card that holds a list": card({"data": ["mnist"]}),
    "a card of NaN": card({"top-1": float("nan")}),
    "a card of more than 64 bits": card({"top-1": 2**63}),
    "a card of a hundred digits": card({"top-1": -(10**100)}),
    "a card with an escape sequence": card({"data": "\x1b[2J\x1b[31m"}),
    "a card with a line as a name": card({"a\nb": 1}),
    "one of 4,300 digits": architecture({"name": "lenet5", "num_classes": 10**4299}),
    **{
        f"{what} as the name in {table}": named(table, name)
        for table in ("layers", "tensors", "ties", "architecture")
        for what, name in {
            "half a surrogate pair": "\ud800",
            "an escape sequence": "\x1b[2J\x1b[31m",
            "a line": "a\nb",
            "a turn of direction": "\u202eabc",
            "a text of 70,000 characters": "x" * 70_000,
        }.items()
    },
}


@pytest.mark.parametrize("what", FORGED)
def test_every_reader_refuses_a_file_with(what, tmp_path):
    path = tmp_path / "forged.dkm"
    path.write_bytes(forged(FORGED[what]))
    for reader in (lambda path: load_compressed(path, small()), lambda path: str(inspect(path)), decompress):
        with pytest.raises(CompressedFileError) as error:
            reader(path)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.uint8, torch.int64, torch.float64, torch.float16])
def test_weights_of_another_type_do_not_enter_a_network(kind, tmp_path):
    net, path = shared_small(), tmp_path / "net.dkm"
    del net[3].bias
    net[3].register_buffer("bias", torch.zeros(2, dtype=kind))
    save_compressed(net, path)
    target = small()
    with pytest.raises(
        CompressedFileError, match=f"'3.bias' has type {kind} in the file and torch.float32 in the network"
    ):
        load_compressed(path, target)
    assert not shared_layers(target)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", [lambda net: net.fc2, lambda net: net.conv2, lambda net: net])
def test_a_network_is_read_in_one_floating_type_or_not_at_all(kind, part, tmp_path):
    net, path = build("lenet5", 2), tmp_path / "net.dkm"
    part(net).to(kind)
    share_at_random(net, make_plan(net, k=4))
    if part(net) is net:  # all of it: saved and built again as it is
        save_compressed(net, path)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in load_compressed(path).state_dict().items())
    else:  # a writer does not name it, since it cannot run
        with pytest.warns(UserWarning, match="no longer what build"):
            save_compressed(net, path)
        header, body = split(path.read_bytes())
        header["__metadata__"]["architecture"] = net.architecture
        path.write_bytes(joined(header, body))
        with pytest.raises(CompressedFileError, match="has type"):
            load_compressed(path)
    with pytest.raises(CompressedFileError, match="has type"):  # nothing is rounded on the way into a given network
        load_compressed(path, build("lenet5", 2))


def test_a_name_that_stands_twice_in_the_header_is_refused(tmp_path):
    header, body = split(file_bytes(shared_small()))
    text = json.dumps(
        {k: header[k] for k in header if k != "__metadata__"}
        | {
            "__metadata__": {
                k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in header["__metadata__"].items()
            }
        }
    )
    text = (text[:-1] + ', "codes": 1}').encode()
    (tmp_path / "twice.dkm").write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(CompressedFileError, match="twice"):
        inspect(tmp_path / "twice.dkm")


def test_names_that_no_reader_takes_are_not_written(tmp_path):
    net = nn.Sequential()
    net.add_module("a\x1b[31m", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot be printed"):
        save_compressed(net, tmp_path / "net.dkm")
    crowd = nn.ParameterList([nn.Parameter(torch.zeros(0))] * (MAX_NAMES + 1))
    with pytest.raises(ValueError, match=f"at most {MAX_NAMES:,}"):
        save_compressed(crowd, tmp_path / "net.dkm")
    with pytest.raises(ValueError, match="x.* has more than 256 characters"):
        save_compressed(nn.ParameterDict({"x" * 257: nn.Parameter(torch.zeros(0))}), tmp_path / "net.dkm")
    wide = nn.ParameterDict({f"{i:0256}": nn.Parameter(torch.zeros(0)) for i in range(MAX_NAMES)})
    with pytest.raises(ValueError, match=f"at most {MAX_HEADER:,}"):
        save_compressed(wide, tmp_path / "net.dkm")
    assert not list(tmp_path.iterdir())


# Files that unpack to more than they seem


# n weights of one cluster in half precision: a few bytes, and `ballast` that a rule on the ratio would count
def bomb(n, ballast):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False))
    net.register_buffer("ballast", torch.zeros(ballast, dtype=torch.uint8))
    share_layer(
        net[0],
        Clustering(torch.ones(1, 1), torch.zeros(36, dtype=torch.int64), 0.0, 0),
        make_plan(net, k=1, layout="scalar")["0"],
    )

    def change(metadata, header, body):
        name, _, *rest = metadata["layers"][1]
        metadata["layers"][1] = [name, [n, 1], "scalar", n, 1, 0, "F16", "F16", 0, 0]

    return forged(change, net.half())


def test_a_file_that_unpacks_to_gigabytes_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.dkm"
    path.write_bytes(bomb(2**29, 2**20))  # 1 GiB of weights and 2 GiB of codes from a megabyte
    with pytest.raises(CompressedFileError, match="at most 1024 times"):
        decompress(path)
    path.write_bytes(bomb(2**24, 2**17))
    for reader in (decompress, inspect, load_compressed):
        with pytest.raises(CompressedFileError, match="more than max_bytes=1,000,000"):
            reader(path, max_bytes=10**6)
    assert decompress(path, max_bytes=6 * 2**24 + 2**17)["0.weight"].shape == (2**24, 1)
    assert decoded_bytes(_read(path, 2**30).tables) == 6 * 2**24 + 2**17


def test_ties_count_as_often_as_they_stand(tmp_path):
    net = nn.ParameterDict({"w": nn.Parameter(torch.zeros(10**5))})

    def change(metadata, header, body):
        metadata["ties"] = {str(i): "w" for i in range(1000)}

    (tmp_path / "ties.dkm").write_bytes(forged(change, net))
    assert len(decompress(tmp_path / "ties.dkm")) == 1001
    with pytest.raises(CompressedFileError, match="max_bytes"):
        decompress(tmp_path / "ties.dkm", max_bytes=10**8)


def test_a_large_file_is_not_read_for_nothing(tmp_path):
    with open(tmp_path / "sparse.dkm", "wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    with pytest.raises(CompressedFileError, match="more than max_bytes"):
        inspect(tmp_path / "sparse.dkm")


def test_names_cost_time_in_proportion_and_have_a_bound(tmp_path):
    seconds, path = [], tmp_path / "names.dkm"

    def crowd(n):  # n empty tensors and n ties
        def change(metadata, header, body):
            metadata["tensors"]["F32"] += [[f"t{i}", [0]] for i in range(n)]
            metadata["ties"] = {f"u{i}": f"t{i}" for i in range(n)}

        return forged(change)

    def once():
        start = time.process_time()
        decompress(path)
        return time.process_time() - start

    for n in (MAX_NAMES // 8, MAX_NAMES // 2 - 8):
        path.write_bytes(crowd(n))
        seconds.append(min(once() for _ in range(3)))  # one of them without a collection of garbage
    assert seconds[1] < 12 * seconds[0] and seconds[1] < 2
    path.write_bytes(crowd(MAX_NAMES // 2))
    with pytest.raises(CompressedFileError, match=f"at most {MAX_NAMES:,}"):
        decompress(path)
    path.write_bytes(crowd(16 * MAX_NAMES))
    with pytest.raises(CompressedFileError, match="a header of"):
        decompress(path)


SCARCE = """
import resource, numpy as np
from deepkmeans.codec import unpack_codes
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
try:
    unpack_codes(np.array([255, 1], np.uint8), np.array([1], np.uint32), 2**27, 2)
except MemoryError:
    print("noticed")
"""


def test_too_little_memory_is_an_error_and_not_the_end_of_the_process():
    done = subprocess.run(
        [sys.executable, "-c", SCARCE], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stdout) == (0, "noticed\n"), done.stderr


def test_mutated_files_neither_crash_nor_hang_nor_pass(root, tmp_path):
    record = tmp_path / "record.json"
    subprocess.run(
        [sys.executable, root / "tests" / "fuzz_codec.py", "3000", record],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    record = json.loads(record.read_text())
    assert record["attacks"] == 3000 and record["files"] >= 2000 and record["slowest_seconds"] < 1
    for kind in ("flip", "cut", "splice", "length"):
        assert record["kinds"][kind]["read"] <= 2  # where a random change changed nothing


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
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(path), str(seed), *forever],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
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
    with pytest.raises(OSError, match="No space left on device: .*net.dkm"):
        save_compressed(build("lenet5", seed=1), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def strange(kind, folder):  # something at a path that is no regular file
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":  # the null device by another name, in a scratch folder
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    return path


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_only_regular_files_are_replaced_and_that_is_seen_before_any_work(kind, linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = strange(kind, Path("."))
    before = os.lstat(path)
    if linked:
        Path("link").symlink_to(kind)
        path = Path("link")
    monkeypatch.setattr(codec, "file_bytes", lambda *_, **__: pytest.fail("worked for nothing"))
    with pytest.raises(ValueError, match="is no regular file"):
        save_compressed(build("lenet5"), path)
    with pytest.raises(ValueError, match="is no regular file"):
        write_file(path, b"x")
    after = os.lstat(kind)
    assert (after.st_mode, after.st_ino, after.st_size) == (before.st_mode, before.st_ino, before.st_size) and {
        p.name for p in Path(".").iterdir()
    } == {kind, path.name}


@pytest.mark.parametrize("path", ["missing/net.dkm", "file/net.dkm", "link"])
def test_a_missing_folder_is_seen_before_any_work(path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("missing/net.dkm")
    monkeypatch.setattr(codec, "file_bytes", lambda *_, **__: pytest.fail("worked for nothing"))
    with pytest.raises(ValueError, match="in a folder that does not exist"):
        save_compressed(build("lenet5"), tmp_path / path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_replaced_file_keeps_its_mode_and_the_links_to_it(tmp_path):
    (tmp_path / "net.dkm").write_bytes(b"old")
    (tmp_path / "net.dkm").chmod(0o600)
    (tmp_path / "link").symlink_to("net.dkm")
    write_file(tmp_path / "link", b"new")
    assert (
        (tmp_path / "link").is_symlink()
        and (tmp_path / "net.dkm").read_bytes() == b"new"
        and stat.S_IMODE((tmp_path / "net.dkm").stat().st_mode) == 0o600
    )


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    write_file(tmp_path / ("x" * 255), b"new")
    with pytest.raises(OSError, match="x" * 200) as error:
        write_file(tmp_path / ("x" * 256), b"new")
    assert ".part" not in str(error.value) and len(list(tmp_path.iterdir())) == 1


def test_threads_may_save_to_one_path(tmp_path):
    nets = [build("lenet5", seed=seed) for seed in range(4)]
    threads = [threading.Thread(target=save_compressed, args=(net, tmp_path / "net.dkm")) for net in nets]
    [t.start() for t in threads], [t.join() for t in threads]
    assert (tmp_path / "net.dkm").read_bytes() in [file_bytes(net) for net in nets] and len(
        list(tmp_path.iterdir())
    ) == 1


def test_a_dense_network_from_a_file_computes_the_same(tmp_path):
    net = build("lenet5", seed=0)
    share(net, make_plan(net, k=8))
    save_compressed(net, tmp_path / "net.dkm")
    dense, x = load_compressed(tmp_path / "net.dkm", dense=True), torch.randn(2, 1, 28, 28)
    assert torch.equal(dense(x), load_compressed(tmp_path / "net.dkm")(x))
    assert dense.state_dict().keys() == build("lenet5").state_dict().keys()


@pytest.mark.parametrize("dense", [False, True])
def test_a_network_on_the_meta_device_is_refused_and_one_with_memory_filled(dense, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    share(net, make_plan(net, k=3))
    save_compressed(net, tmp_path / "net.dkm")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CompressedFileError, match="on the meta device; call model.to_empty"):
        load_compressed(tmp_path / "net.dkm", empty, dense=dense)
    assert not shared_layers(empty)
    back = load_compressed(tmp_path / "net.dkm", empty.to_empty(device="cpu"), dense=dense)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(back(x), net(x))
