"""What a network meets on its way to production: odd modes, copies, devices, other people's files and full disks."""

import copy
import errno
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from pretended_cuda import pretended_cuda
from safetensors import SafetensorError
from torch.nn.utils import parametrize

import deepkmeans as dk
from deepkmeans import codec
from deepkmeans.baselines.hashing import hashed_net
from deepkmeans.cli import main
from deepkmeans.files import replacing


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


def shared(net=None, **how):
    net = net or small()
    dk.share(net, dk.make_plan(net, k=8, **how))
    return net


def batches(n=2):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(n)]


IMAGES = batches(1)[0][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "relu", nn.Tanh()),
        lambda net: setattr(net.conv1, "stride", (2, 2)),
        lambda net: setattr(net.conv2, "padding", (1, 1)),
        lambda net: net.add_module("softmax", nn.Softmax(1)),
    ],
)
def test_a_file_does_not_name_an_architecture_whose_network_was_changed_where_it_has_no_tensor(change, tmp_path):
    net = dk.build("lenet5")
    change(net)
    with pytest.warns(UserWarning, match="no longer what build"):
        dk.save_compressed(net, tmp_path / "net.dkm")
    assert dk.inspect(tmp_path / "net.dkm").architecture is None


class Powers(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x.abs() ** self.p

    def extra_repr(self):
        return f"p={self.p}"


def test_only_a_dropout_may_have_another_p():
    assert codec._makeup(nn.Sequential(nn.Dropout(0.1))) == codec._makeup(nn.Sequential(nn.Dropout(0.5)))
    assert codec._makeup(nn.Sequential(Powers(2))) != codec._makeup(nn.Sequential(Powers(3)))


def test_what_only_training_uses_is_no_change_of_the_architecture(tmp_path):
    net = dk.build("wide_resnet", depth=10, widen=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    net.train()
    shared(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.save_compressed(net, tmp_path / "net.dkm")
    assert dk.inspect(tmp_path / "net.dkm").architecture["name"] == "wide_resnet"


class Positive(nn.Module):
    def forward(self, bias):
        return bias.abs()


@pytest.mark.parametrize("change", [shared, lambda net: hashed_net(net, 2.0)])
def test_copies_of_a_layer_whose_bias_is_computed_are_left_alone(change):
    net = small()
    parametrize.register_parametrization(net[0], "bias", Positive())
    teacher, expected = copy.deepcopy(net), net(IMAGES)
    change(net)
    assert torch.equal(teacher(IMAGES), expected) and net(IMAGES).shape == expected.shape
    dk.compress(teacher, 1.05, progress=False)
    assert teacher(IMAGES).isfinite().all()


def test_centres_that_are_not_zero_are_not_loaded_where_the_first_is_pinned_there():
    free, pinned = shared(), shared(sparsity=0.3)
    with pytest.raises(RuntimeError, match="first centre that is not zero"):
        pinned.load_state_dict(free.state_dict())
    twin = shared(sparsity=0.3)
    twin.load_state_dict(shared(sparsity=0.3).state_dict())
    assert torch.equal(twin(IMAGES), shared(sparsity=0.3)(IMAGES))


def test_a_skeleton_on_the_meta_device_is_given_codes_with_its_weights():
    net = shared()
    skeleton = copy.deepcopy(net).to("meta")
    skeleton.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(skeleton(IMAGES), net(IMAGES))


def loaded_state(net, folder):
    net = shared(net)
    net.load_state_dict(shared().state_dict())
    return net


def loaded_file(net, folder):
    dk.save_compressed(shared(), folder / "net.dkm")
    return dk.load_compressed(folder / "net.dkm", net)


@pytest.mark.parametrize("made", [lambda net, _: shared(net), loaded_state, loaded_file])
def test_what_is_shared_in_inference_mode_can_be_trained(made, tmp_path):
    net = small()
    with torch.inference_mode():
        net = made(net, tmp_path)
    net(IMAGES).sum().backward()
    assert net[0].parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_wherever_it_is_called(mode):
    net, data = small(), batches()
    with mode():
        regularizer = dk.Regularizer(net, dk.make_plan(net, k=8))
        before = regularizer.codes()["0"], net[0].weight.clone()
        dk.train(net, data, epochs=1, lr=0.1, regularizer=regularizer, progress=False)
        assert not torch.is_grad_enabled()
    assert not torch.equal(net[0].weight, before[1])
    regularizer.step(1.0)


@pytest.fixture
def on_cuda():
    data, net = dk.load("digits"), small()
    with pretended_cuda(), torch.device("cuda"):  # what torch.set_default_device("cuda") does
        yield data, net.to("cuda")


def test_data_are_the_same_under_another_default_device(on_cuda):
    data, _ = on_cuda
    again = dk.load("digits")
    assert (again.mean, again.std) == (data.mean, data.std)
    assert len(dk.subset(data, 100).train) == 100
    train, _ = dk.loaders(data, 64, augment="crop-flip")
    assert next(iter(train))[0].shape == (64, 1, 8, 8)


def test_re_training_goes_on_under_another_default_device(on_cuda):
    _, net = on_cuda
    regularizer = dk.Regularizer(net, dk.make_plan(net, k=8))
    regularizer.load_state_dict(regularizer.state_dict())
    regularizer.step(0.5)


def test_onnx_keeps_its_type_under_autocast(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = shared()
    with torch.autocast("cpu", torch.bfloat16):
        dk.to_onnx(net, tmp_path / "amp.onnx", (3, 8, 8))
    session = onnxruntime.InferenceSession(tmp_path / "amp.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(IMAGES), atol=1e-5)


class Scaled(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.codebook = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return super().forward(x) * self.codebook


def test_onnx_has_names_beside_those_of_the_network(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = shared(nn.Sequential(Scaled(3, 8, 3)).eval())
    dk.to_onnx(net, tmp_path / "net.onnx", (3, 8, 8))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(IMAGES), atol=1e-5)


def test_a_network_that_is_spread_over_processes_is_not_saved(tmp_path):
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = shared()
        fully_shard(net)
        with pytest.raises(ValueError, match="spread over processes"):
            dk.save_compressed(net, tmp_path / "net.dkm")
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "net.dkm").exists()


class Versioned(nn.Module):
    def __init__(self, refuse):
        super().__init__()
        self.conv, self.norm, self.refuse = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), refuse

    def forward(self, x):
        return self.norm(self.conv(x))

    def get_extra_state(self):
        return torch.tensor(1)

    def set_extra_state(self, version):
        if self.refuse:
            raise ValueError("another version")


def test_a_network_that_refuses_a_file_is_as_it_was(tmp_path):
    dk.save_compressed(shared(Versioned(refuse=False)), tmp_path / "net.dkm")
    net = Versioned(refuse=True).eval()
    before, weight = net(IMAGES), net.conv.weight
    with pytest.raises(dk.CompressedFileError, match="another version"):
        dk.load_compressed(tmp_path / "net.dkm", net)
    assert torch.equal(net(IMAGES), before) and net.conv.weight is weight and type(net.conv) is nn.Conv2d


def test_a_full_disk_is_an_error_of_the_system_with_the_name_that_was_asked_for(tmp_path):
    with pytest.raises(OSError, match="No space left") as refused, replacing(tmp_path / "net.safetensors"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert refused.value.filename == str(tmp_path / "net.safetensors") and not list(tmp_path.iterdir())


def test_a_folder_that_nothing_can_be_written_to_is_named_by_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError) as refused, replacing(tmp_path / "net.dkm") as part:
        part.write_bytes(b"")
    assert refused.value.filename == str(tmp_path / "net.dkm")


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    try:
        dk.save_compressed(shared(), tmp_path / "loop")
    except ValueError as error:
        assert "leads to itself" in str(error)
    else:  # newer versions of Python put the file in its place
        assert (tmp_path / "loop").is_file()


def test_an_option_of_one_value_takes_no_list_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(dk.build("lenet5").state_dict(), "net.pt")
    Path("plan.yaml").write_text("arch: lenet5\nK: [4, 64]\n")
    with pytest.raises(SystemExit):
        main(["compress", "net.pt", "--config", "plan.yaml", "-o", "net.dkm"])
    assert "K=[4, 64] must be one value" in capsys.readouterr().err
    Path("plan.yaml").write_text("arch: lenet5\nK: 4\nexclude: [conv1]\n")
    assert main(["compress", "net.pt", "--config", "plan.yaml", "-o", "net.dkm"]) == 0
