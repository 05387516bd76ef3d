"""Shared networks in other runtimes: the same outputs, a small file, nothing baked in."""

import copy

import pytest
import torch
import torch.nn as nn

import deepkmeans as dk

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator


def odd():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 1), dilation=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, padding=1),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


NETWORKS = {"wide_resnet": lambda: dk.build("wide_resnet", depth=10, widen=2).eval(), "odd": odd}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", ["row", "kernel"])
def test_onnxruntime_computes_what_torch_does(name, layout, tmp_path):
    net = NETWORKS[name]()
    dense = dk.to_onnx(net, tmp_path / "dense.onnx", (3, 32, 32)).stat().st_size
    dk.share(net, dk.make_plan(net, k=7, sparsity=0.4, layout=layout, include=(nn.Conv2d, nn.Linear)))
    before = copy.deepcopy(net.state_dict())
    path = dk.to_onnx(net, tmp_path / "shared.onnx", (3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    session = onnxruntime.InferenceSession(str(path))
    for images in (1, 5):
        x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(images))
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(y), net(x), atol=1e-4, rtol=1e-4)
    graph = onnx.load(path).graph
    floats = max(i.ByteSize() for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT)
    assert floats < 1200 and (name == "odd" or path.stat().st_size < dense / 8), "a dense weight was baked in"
    assert b"/" + b"deepkmeans/" not in path.read_bytes() and not any(node.metadata_props for node in graph.node)


def test_torch_export_and_compile_take_a_shared_network(tmp_path):
    net = odd()
    dk.share(net, dk.make_plan(net, k=5, sparsity=0.2))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(torch.export.export(net, (x,)).module()(x), y)
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(net, backend=backend)(x), y)


def test_training_through_compile_moves_the_codebook_as_plainly():
    x, nets = torch.randn(2, 3, 16, 16), [odd() for _ in range(2)]
    for net in nets:
        dk.share(net, dk.make_plan(net, k=5))
    torch.compile(nets[1], backend="aot_eager")(x).square().sum().backward()
    nets[0](x).square().sum().backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(8, 5),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        y = self.body(x)
        return (
            {"logits": self.head(y), "aux": self.aux(y)} if self.training else {"logits": self.head(y), "features": y}
        )


def test_dictionaries_are_exported_and_shared_heads_that_do_not_run_are_left_out(tmp_path):
    net, x = Packed().eval(), torch.randn(4, 3, 9, 9)
    dk.share(net, dk.make_plan(net, k=4, include=(nn.Conv2d, nn.Linear)))
    session = onnxruntime.InferenceSession(str(dk.to_onnx(net, tmp_path / "net.onnx", (3, 9, 9))))
    logits, features = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(
            [torch.from_numpy(logits), torch.from_numpy(features)], [*net(x).values()], rtol=1e-4, atol=1e-5
        )
    assert b"aux" not in (tmp_path / "net.onnx").read_bytes()


def test_a_weight_that_is_used_without_its_layer_being_called_is_exported_shared(tmp_path):
    torch.manual_seed(0)  # attention multiplies by the weight of out_proj itself
    net = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    report = dk.share(net, dk.make_plan(net, k=4, include=nn.Linear))
    path = dk.to_onnx(net, tmp_path / "net.onnx", (8, 4, 4))
    names = {i.name for i in onnx.load(path).graph.initializer}
    assert {f"{line['layer']}.codebook" for line in report.lines} <= names and len(report.lines) == 3
    assert "1.self_attn.out_proj.weight" not in names
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(runs(path, x), net(x), rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_is_exported_shared(tmp_path):
    net, x = nn.Sequential(nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3)).eval(), torch.randn(3, 3, 8, 8)
    dk.share(net, dk.make_plan(net, k=4))
    session = onnxruntime.InferenceSession(str(dk.to_onnx(net, tmp_path / "net.onnx", (3, 8, 8))))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]),
            net(x),
            rtol=1e-4,
            atol=1e-5,
        )


def runs(path, x):
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_a_free_height_and_width_take_images_of_any_size(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 3),
        nn.Upsample(None, 2),
    ).eval()
    dk.share(net, dk.make_plan(net, k=4))
    path = dk.to_onnx(net, tmp_path / "net.onnx", (3, None, None))
    for size in ((40, 56), (33, 128), (200, 24)):
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(runs(path, x), net(x), rtol=1e-4, atol=1e-5)


def test_a_network_for_one_size_cannot_have_it_free(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 126 * 126, 3))  # takes 128 x 128
    with pytest.raises(ValueError, match=r"input_shape=\(3, 96, 96\): the network does not run on it"):
        dk.to_onnx(net, tmp_path / "net.onnx", (3, None, None))
    assert not list(tmp_path.iterdir())


def test_networks_keep_their_floating_type_and_bfloat16_is_refused(tmp_path):
    net, x = odd(), torch.randn(3, 3, 16, 16)
    dk.share(net, dk.make_plan(net, k=4))
    half = copy.deepcopy(net).half()
    with torch.no_grad():
        torch.testing.assert_close(
            runs(dk.to_onnx(half, tmp_path / "half.onnx", (3, 16, 16)), x.half()), half(x.half()), rtol=1e-2, atol=1e-3
        )
    double = copy.deepcopy(net).double()
    model = onnx.load(dk.to_onnx(double, tmp_path / "double.onnx", (3, 16, 16)))
    computed = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.double().numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(computed), double(x.double()), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="bfloat16.*half"):
        dk.to_onnx(net.bfloat16(), tmp_path / "net.onnx", (3, 16, 16))


class Torn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y


def test_a_network_that_torch_cannot_export_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="torch cannot export the network") as error:
        dk.to_onnx(Torn(), tmp_path / "net.onnx", (3, 8, 8))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(None, 32, 32), (1, 3, 32, 32), (4, 32, 32), (3, 1, 1), (), (3, 0, 32)])
def test_a_shape_that_is_no_image_of_the_network_is_one_line(shape, tmp_path):
    with pytest.raises(ValueError, match=r"input_shape=\(.*") as error:
        dk.to_onnx(odd(), tmp_path / "net.onnx", shape)
    assert "\n" not in str(error.value) and "of one image" in str(error.value) and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        dk.to_onnx(odd(), path, (3, 16, 16))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("looks", ["int", "loop"])
def test_a_network_that_fixes_the_number_of_images_is_refused(looks, tmp_path):
    pytest.importorskip("onnxscript")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

        def forward(self, x):
            if looks == "loop":
                x = torch.stack([self.conv(image[None])[0] for image in x])
                return self.fc(x.flatten(1))
            return self.fc(self.conv(x).view(int(x.shape[0]), -1))

    net = Net()
    dk.share(net, dk.make_plan(net, k=3))
    with pytest.raises(ValueError, match="fixes the number of images|cannot export the network"):
        dk.to_onnx(net, tmp_path / "net.onnx", (1, 8, 8))
    assert not (tmp_path / "net.onnx").exists()
