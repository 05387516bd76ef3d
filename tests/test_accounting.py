"""What is counted is what lies on the disk, unless another coding is named."""

import pytest
import torch
import torch.nn as nn

import deepkmeans as dk


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 10)
    )
    dk.share(net, dk.make_plan(net, k=5))
    return net


def test_without_a_coding_the_bytes_on_disk_are_counted(tmp_path):
    net = network()
    size = dk.save_compressed(net, tmp_path / "net.dkm")
    report = dk.compression(net)
    assert (
        report.coding == "file"
        and report.bits == 8 * size
        and report.dense_bits == 8 * sum(t.nbytes for t in dk.unshare(net).state_dict().values())
    )
    assert str(report).endswith("(bytes on disk, scope network)")


def test_the_layers_of_a_file_and_its_header_add_up():
    net = network()
    parts = [dk.compression(net, scope=name).bits for name in ("0", "1", "2", "4")]
    assert sum(parts) + dk.compression(net).lines[-1]["bits"] == dk.compression(net).bits
    assert dk.compression(net, scope="conv").bits == parts[0] + parts[2]


def test_a_layer_called_header_is_no_header():
    net, same = (nn.ModuleDict({name: nn.Linear(4, 4)}) for name in ("header", "middle"))
    for coding in ("file", "fixed"):
        assert dk.compression(net, coding=coding, scope="header").bits == 32 * 20
    assert [line["bits"] for line in dk.compression(net).lines] == [line["bits"] for line in dk.compression(same).lines]
    assert dk.compression(net).layers.index.tolist() == ["header", "header"]


def test_a_weight_that_is_computed_from_others_lies_where_its_layer_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 3))
    torch.nn.utils.parametrizations.weight_norm(net[0])
    assert dk.compression(net, scope="conv").bits == dk.compression(net, scope="0").bits == 32 * (4 * 3 * 9 + 4 + 4)


@pytest.mark.parametrize(
    "wrong", [dict(biases=False), dict(batchnorm=False), dict(scope="3"), dict(coding="zip"), dict(scope="nowhere")]
)
def test_what_a_file_cannot_leave_out_is_an_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dk.compression(network(), **wrong)


@pytest.mark.parametrize("coding", ["file", "fixed", "entropy"])
def test_tied_weights_are_counted_once(coding):
    net = nn.ModuleDict(dict(embedding=nn.Embedding(50, 8), head=nn.Linear(8, 50, bias=False)))
    apart = dk.compression(net, coding=coding).dense_bits
    net["head"].weight = net["embedding"].weight
    assert dk.compression(net, coding=coding).dense_bits == apart / 2 == 32 * 400
    if coding != "file":  # in a file it lies with the first
        assert dk.compression(net, coding=coding, scope="head").dense_bits == 32 * 400


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.stage1 = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
        self.stage10 = nn.Conv2d(8, 8, 3)


@pytest.mark.parametrize("coding", ["file", "fixed", "entropy"])
def test_a_scope_is_a_module_with_all_that_is_in_it(coding):
    def dense(scope):
        return dk.compression(Blocks(), coding=coding, scope=scope).dense_bits

    assert dense("stage1") == dense("stage1.0") + (dense("stage1.1") if coding == "file" else 0)
    assert dense("conv") == 32 * (4 * 3 * 9 + 4)  # the layer of that name, and not all convolutions


@pytest.mark.parametrize("net", [nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(1, 4, 3))])
def test_an_unknown_coding_is_refused_where_nothing_is_shared(net):
    with pytest.raises(ValueError, match="coding='zip' must be one of file, fixed"):
        dk.compression(net, coding="zip")


def test_a_network_that_is_one_layer_has_one_name():
    net = nn.Conv2d(1, 4, 3)
    for shared in (False, True):
        if shared:
            dk.share(net, dk.make_plan(net, k=2))
        reports = dk.compression(net), dk.compression(net, coding="log2"), dk.energy(net, (1, 8, 8))
        assert {report.lines[0]["layer"] for report in reports} == {"Conv2d"}
        assert dk.compression(net, scope="").bits == dk.compression(net).lines[0]["bits"]
