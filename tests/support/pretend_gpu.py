"""A GPU that is not there: tensors keep their values on the CPU and carry a mark that says on which device they are.

After `install` the process sees one GPU. What is made with `device="cuda"` or moved there is marked, what operators
make of marked tensors is marked too, and an operator that gets a marked and an unmarked tensor fails, as CUDA's do.
PyTorch's own fake tensors do this without values, but cannot run a backward pass where CUDA is not compiled in.
"""

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "tensor", "zeros", "zeros_like"),
)
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
_MAY_MIX = {torch.ops.aten.copy_.default, torch.ops.aten.set_.source_Tensor, torch.ops.aten.detach.default}


class PlacementError(AssertionError):
    """A tensor of the CPU among tensors of the GPU."""


class _Placement(TorchDispatchMode):
    """Watches every operator, those of the backward pass too; knows the storages that lie on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self._clean_at = 1000
        self.watching = True

    def on_gpu(self, x: Tensor) -> bool:
        if isinstance(x, ShardedTensor):
            return True  # what a checkpoint's tensor is described by; all of the model's are there
        return StorageWeakRef(_storage(x)).cdata in self._storages

    def put(self, x: Tensor) -> Tensor:
        """Mark a tensor as one of the GPU's."""
        reference = StorageWeakRef(_storage(x))
        # The reference keeps the storage's address from being used again.
        self._storages[reference.cdata] = reference
        if len(self._storages) > self._clean_at:
            self._storages = {key: other for key, other in self._storages.items() if not other.expired()}
            self._clean_at = 2 * len(self._storages) + 1000
        return x

    def take(self, x: Tensor) -> Tensor:
        """Mark a tensor as one of the CPU's."""
        self._storages.pop(StorageWeakRef(_storage(x)).cdata, None)
        return x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [self.on_gpu(x) for x in given]
        if any(there) and not func.name().startswith("c10d::") and func not in _MAY_MIX:
            strange = [x for x, gpu in zip(given, there, strict=True) if not gpu and x.dim() > 0]
            if strange:
                shapes = [list(x.shape) for x in strange]
                raise PlacementError(f"{func}: of {len(given)} tensors those of shapes {shapes} are on the CPU")
        result = func(*args, **(kwargs or {}))
        if any(there) and func not in _MAY_MIX:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self.put(x)
        elif func is torch.ops.aten.detach.default and there[0]:
            self.put(result)
        return result


placement = _Placement()


def install() -> None:
    """Let this process see a GPU, for good."""
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in _METHODS:
        setattr(Tensor, name, _factory(getattr(Tensor, name)))
    real_device, real_type, real_numpy, real_to = Tensor.device, Tensor.type, Tensor.numpy, Tensor.to

    def device(x: Tensor) -> torch.device:
        return GPU if placement.on_gpu(x) else real_device.__get__(x)

    def of_type(x: Tensor, dtype: Any = None, **how: Any) -> Any:
        if dtype is not None:
            return real_type(x, dtype, **how)
        name = real_type(x)
        return name.replace("torch.", "torch.cuda.") if placement.on_gpu(x) else name

    def numpy(x: Tensor, **how: Any) -> Any:
        if placement.on_gpu(x):
            raise TypeError("can't convert a CUDA tensor to numpy")
        return real_numpy(x, **how)

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, target = _parsed(args, kwargs)
        if target is None:
            return real_to(x, *args, **kwargs)
        if target.type not in ("cpu", "cuda"):
            return real_to(x, target, *args, **kwargs)
        if placement.on_gpu(x) == (target.type == "cuda"):
            return real_to(x, CPU, *args, **kwargs)
        kwargs["copy"] = True
        moved = real_to(x, CPU, *args, **kwargs)
        return placement.put(moved) if target.type == "cuda" else placement.take(moved)

    Tensor.device, Tensor.type, Tensor.numpy, Tensor.to = property(device), of_type, numpy, to
    Tensor.is_cuda = property(placement.on_gpu)
    Tensor.cuda = lambda x, *unused, **also: to(x, GPU)
    Tensor.cpu = lambda x, *unused, **also: to(x, "cpu")
    Tensor.pin_memory = lambda x, *unused: x
    Tensor.record_stream = lambda x, stream: None
    _see_gpu()
    placement.__enter__()


def _see_gpu() -> None:
    """What `torch.cuda` answers."""
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None, wait_event=lambda event: None)
    event = SimpleNamespace(record=lambda *unused: None, synchronize=lambda: None, wait=lambda *unused: None)
    properties = SimpleNamespace(name="pretended", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Callable[..., Any]] = {
        "Event": lambda *args, **kwargs: event,
        "Stream": lambda *args, **kwargs: stream,
        "current_device": lambda: GPU,
        "current_stream": lambda *unused: stream,
        "default_stream": lambda *unused: stream,
        "device": lambda *unused: contextlib.nullcontext(),
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda *unused: (9, 0),
        "get_device_name": lambda *unused: "pretended",
        "get_device_properties": lambda *unused: properties,
        "get_rng_state": lambda *unused: torch.get_rng_state(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "manual_seed": lambda seed: None,
        "max_memory_allocated": lambda *unused: 0,
        "memory_allocated": lambda *unused: 0,
        "reset_peak_memory_stats": lambda *unused: None,
        "set_device": lambda device: None,
        "set_rng_state": lambda state, *unused: torch.set_rng_state(state),
        "stream": lambda *unused: contextlib.nullcontext(),
        "synchronize": lambda *unused: None,
    }
    torch.cuda.default_generators = {GPU: torch.default_generator, 0: torch.default_generator}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        target = None if device is None else _device(device)
        if target is None:
            return make(*args, **kwargs)
        if target.type not in ("cpu", "cuda"):
            return make(*args, device=target, **kwargs)
        result = make(*args, device="cpu", **kwargs)
        if target.type == "cuda":
            return placement.put(result)
        if placement.on_gpu(result) and args and isinstance(args[0], Tensor):
            return placement.take(result.clone() if _storage(result) is _storage(args[0]) else result)
        return result

    return made


def _device(value: Any) -> torch.device:
    return GPU if isinstance(value, int) else torch.device(value)


def _parsed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], torch.device | None]:
    """The arguments of `Tensor.to` without the device, and the device."""
    if (named := kwargs.pop("device", None)) is not None:
        return args, _device(named)
    if args and isinstance(args[0], Tensor):
        return (args[0].dtype, *args[1:]), args[0].device
    if args and isinstance(args[0], str | int | torch.device):
        return args[1:], _device(args[0])
    return args, None


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()
