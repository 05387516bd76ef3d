"""A device named cuda in the memory of the CPU: where tensors of two devices would meet on a GPU and fail, they do too.

It shows where tensors lie. Its kernels, numbers and speed are a CPU's, so that it says nothing about CUDA itself.
"""

import threading
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnDevice(torch.Tensor):
    """A tensor that says it lies on cuda:0; `held` is what it holds."""

    device, is_cuda, is_cpu = (
        property(lambda self, value=value: value) for value in (torch.device("cuda:0"), True, False)
    )
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        self.held = held
        return self

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _on(tensor):
    return isinstance(tensor, OnDevice)


# Scalars may come from anywhere; so may the indices into a tensor of the device, and what is copied.
def _check(func, args, tensors):
    off = [t for t in tensors if not _on(t) and t.ndim]
    if func in INDEXING:
        off = [t for t in (args[0], *args[2:3]) if not _on(t) and (t.ndim or t is args[0])]
    if off and func is not aten.copy_.default and any(map(_on, tensors)):
        found = [(type(t).__name__, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}, {found}")


def _result_on(func, tensors, device):
    # autograd, which goes by the real device, asks for what is like a tensor of this one
    if device is not None and device.type == "cpu":
        return torch._C._current_graph_task_id() != -1 or (func is aten._to_copy.default and _on(tensors[0]))
    if device is not None:
        return device.type == "cuda"
    return _on(tensors[0]) if func is aten.copy_.default else any(map(_on, tensors))


def _held(t):
    return t.held if _on(t) else t


def _run(func, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    _check(func, args, tensors)
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    on = _result_on(func, tensors, device)
    if on and device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    # else autograd makes a gradient of the weights' layout by itself, on the real device
    if func is aten.convolution_backward.default:
        out = tuple(t if t is None else t.contiguous() for t in out)
    known = {id(t.held): t for t in tensors if _on(t)}  # what is changed in place comes back as itself

    def returned(t):
        if id(t) in known:
            return known[id(t)]
        return OnDevice(t) if on and isinstance(t, torch.Tensor) else t

    return tree_map(returned, out)


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.held.clone()

    @staticmethod
    def backward(ctx, gradient):
        return OnDevice(gradient)


def _to(tensor, *args, copy=False, **kwargs):
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    if _on(tensor) and device is not None and device.type == "cpu":
        tensor = _Fetch.apply(tensor)
    where = (
        {}
        if device is None or (_on(tensor) and device.type == "cuda")
        else {"device": torch.device(device.type, 0) if device.type == "cuda" else device}
    )
    return tensor.to(dtype=dtype or tensor.dtype, copy=copy, memory_format=layout or torch.preserve_format, **where)


class _Moves(TorchFunctionMode):  # what PyTorch decides by the real device, before any dispatch
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return _to(func(*args, **kwargs | {"device": None}), "cuda")
        if func is torch.Tensor.new_tensor and _on(args[0]):
            return _to(torch.tensor(*args[1:], **kwargs), "cuda")
        if func is torch.Tensor.cpu and _on(args[0]):
            return _Fetch.apply(args[0])
        return _to(*args, **kwargs) if func is torch.Tensor.to else func(*args, **kwargs)


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def pretended_cuda():
    """Within it torch.device("cuda") is the pretended device, in other threads as well."""
    run = threading.Thread.run

    def run_within(thread):
        with _Device(), _Moves():
            run(thread)

    with pytest.MonkeyPatch.context() as patch:
        for name, does in dict(
            is_available=lambda: True,
            _lazy_init=lambda: None,
            get_device_name=lambda *_: "pretended",
            synchronize=lambda *_: None,
        ).items():
            patch.setattr(torch.cuda, name, does)
        # its name in older and newer releases
        for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
            patch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
        engine = import_module("deepkmeans.clustering")
        patch.setattr(engine, "_compiles_for", lambda rows: False)  # Triton: it is no real device
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(threading.Thread, "run", run_within)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with _Device(), _Moves():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
