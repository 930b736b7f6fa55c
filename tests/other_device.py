"""A second device without a GPU: tensors on it hold values, and an operation on tensors of both devices is refused.

Stands in for CUDA under the name of torch's `meta` device, which autograd knows and every machine has. Inside
`OtherDevice()` whatever is made on or moved to `meta` keeps its values on the CPU, hidden: code that forgets a
`.to(device)` fails here as it would on a GPU. What CUDA lets pass, passes: numbers (0-dim tensors), copies, and indices
from the CPU. What it cannot show: kernels, captured graphs, autocast, speed.
"""

from unittest import mock

import torch
from torch import Tensor
from torch.utils import _device, _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
_COPIES = ("aten::_to_copy", "aten::copy_")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class There(Tensor):
    """A tensor on the other device; `held` are its values."""

    @staticmethod
    def __new__(cls, held: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Inside: `meta` is a device with values. Random numbers are those of the CPU."""

    def __enter__(self):
        _device._device_constructors()  # remembered from its first call on, which must not see what is patched here
        supported = [*_foreach_utils._get_fused_kernels_supported_devices(), DEVICE.type]
        self._patches = [
            mock.patch.object(torch, "Generator", _Generator),
            mock.patch.object(torch, "tensor", _tensor),
            mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: supported),
        ]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *details):
        for patch in self._patches:
            patch.stop()
        return super().__exit__(*details)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator that says it is there."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


_made = torch.tensor


def _tensor(data, *, device=None, **options) -> Tensor:
    if device is None:  # the context decides: by this the library finds out where it is building
        return _made(data, **options)
    # Made on `meta` directly it would have no values, and no dispatch would see it.
    return _made(data, device="cpu", **options).to(device)


def _run(func, args: tuple, kwargs: dict):
    name, wanted = func._schema.name, kwargs.get("device")
    here = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, There)]
    there = any(isinstance(t, There) for t in tree_leaves((args, kwargs)))
    if there and name in _INDEXED:
        here = [t for t in tree_leaves((args[0], *args[2:])) if isinstance(t, Tensor) and not isinstance(t, There)]
    if there and name not in _COPIES and any(t.dim() for t in here):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    if wanted is not None:
        there = torch.device(wanted) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name == "aten::copy_":
        there = isinstance(args[0], There)
    if name == "aten::_to_copy":
        made = func(*tree_map_only(There, lambda t: t.held, args), **kwargs)
        return There(made) if there else made
    inner_args, inner_kwargs = tree_map_only(There, lambda t: t.held, (args, kwargs))
    made = func(*inner_args, **inner_kwargs)
    if not there:
        return made
    made = tree_map_only(Tensor, There, made)
    return return_and_correct_aliasing(func, args, kwargs, made)
