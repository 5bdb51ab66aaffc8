"""The one bridge over Megatron-Core's CUDA-only lines, for machines without a GPU.

Megatron-Core writes `device="cuda"` and `torch.cuda.current_device()` into code that would otherwise run anywhere.
While the bridge is installed,

- the modules of `_MODULES` see a `torch` whose factories put "cuda" tensors on the CPU and whose `torch.cuda` answers
  for the CPU; nothing outside of them, `torch` itself least of all, is changed;
- the few functions that compare tensor types or call `Tensor.cuda()`, which no stand-in for `torch` can reach, run code
  in which those words name the CPU;
- the CUDA generator that Megatron's random-state tracker switches is the CPU generator.

It is never installed where CUDA is available, refuses versions it was not written for, and `uninstall` restores every
attribute.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import MinitronError

SUPPORTED = ((0, 15), (0, 20))
"""Versions of Megatron-Core, from the first up to but without the second."""

# Modules whose `torch` is replaced.
_MODULES = (
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.embeddings.yarn_rotary_pos_embedding",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "transformer.utils",
    "utils",
)

# Modules with functions that compare `tensor.type()` to "torch.cuda.FloatTensor" and its like.
_TYPE_CHECKING = ("optimizer.clip_grads", "optimizer.distrib_optimizer", "optimizer.optimizer")

# Functions that call `tensor.cuda()`.
_MOVING = (
    ("models.common.language_module.language_module", "LanguageModule", "setup_embeddings_and_output_layer"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer", "get_parameter_state_dp_zero"),
)

_CUDA_TYPES = ("torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor")
_FACTORIES = frozenset({"arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"})

_undo: list[Callable[[], None]] = []


def install() -> bool:
    """Put the bridge in place; does nothing where it already is, or where CUDA is available.

    Returns:
        Whether the bridge is in place now.

    Raises:
        MinitronError: Megatron-Core is of a version the bridge does not know.
    """
    if _undo:
        return True
    if torch.cuda.is_available():
        return False
    check_version()
    stand_in = _TorchOnCpu()
    for name in _MODULES:
        if (module := _optional_module(name)) is not None and getattr(module, "torch", None) is torch:
            _replace(module, "torch", stand_in)
    for function in _functions_naming_cuda():
        _replace(function, "__code__", _reword(function.__code__))
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda new_state, *args, **kwargs: torch.set_rng_state(new_state))
    return True


def uninstall() -> None:
    """Restore everything `install` changed; does nothing where it is not in place."""
    while _undo:
        _undo.pop()()


def installed() -> bool:
    """Whether the bridge is in place."""
    return bool(_undo)


@contextmanager
def bridged() -> Iterator[bool]:
    """The bridge for the length of a `with` block; one that was in place before stays afterwards."""
    before = installed()
    try:
        yield install()
    finally:
        if not before:
            uninstall()


@contextmanager
def local_objects() -> Iterator[None]:
    """Where there is only one rank, exchange Python objects with oneself by handing them over.

    Gloo copies large ones in threads of its own, each of which keeps an OpenMP team from then on. OpenMP then counts
    more threads than cores and lets idle ones sleep at once instead of waiting a moment for the next operation: after
    a checkpoint, training went on at two thirds of its speed.
    """
    if dist.get_world_size() > 1:
        yield
        return

    def all_gather_object(object_list: list[Any], obj: Any, *unused: Any, **also_unused: Any) -> None:
        object_list[0] = obj

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *unused: Any, **also_unused: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[0] = obj

    def scatter_object_list(
        scatter_object_output_list: list[Any], scatter_object_input_list: list[Any], *unused: Any, **also_unused: Any
    ) -> None:
        scatter_object_output_list[0] = scatter_object_input_list[0]

    replaced = {
        "all_gather_object": all_gather_object,
        "broadcast_object_list": lambda *unused, **also_unused: None,
        "gather_object": gather_object,
        "scatter_object_list": scatter_object_list,
    }
    before = {name: getattr(dist, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(dist, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def check_version() -> None:
    """Make sure that Megatron-Core is of a version this package was written for.

    Raises:
        MinitronError: It is not.
    """
    import megatron.core

    version = megatron.core.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= (major, minor) < SUPPORTED[1]:
        low, high = ("{}.{}".format(*bound) for bound in SUPPORTED)
        raise MinitronError(
            f"megatron-core {version} is not supported",
            rule=f"at least {low} and below {high}",
            remedy=f"pip install 'megatron-core>={low},<{high}'",
        )


class _CudaOnCpu:
    """What `torch.cuda` answers inside Megatron's modules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @property
    def random(self) -> "_CudaOnCpu":
        return self

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_stream(self, device: Any = None) -> Any:
        return torch.cpu.current_stream()

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)


class _TorchOnCpu(types.ModuleType):
    """`torch` as Megatron's modules see it: "cuda" tensors are made on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch", "torch, with the CPU in place of CUDA")
        self.cuda = _CudaOnCpu()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in _FACTORIES:
            return value

        @functools.wraps(value)
        def factory(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if device is not None and torch.device(device).type == "cuda":
                device = torch.device("cpu")
            made: torch.Tensor = value(*args, device=device, **kwargs)
            return made

        setattr(self, name, factory)
        return factory


def _optional_module(name: str) -> types.ModuleType | None:
    """A module of Megatron-Core, or None in versions that lack it."""
    full_name = f"megatron.core.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name is not None and full_name.startswith(error.name):
            return None
        raise


def _functions_naming_cuda() -> Iterator[types.FunctionType]:
    for name in _TYPE_CHECKING:
        module = importlib.import_module(f"megatron.core.{name}")
        classes = [
            item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__
        ]
        for item in chain(vars(module).values(), *(vars(owner).values() for owner in classes)):
            function = _plain_function(item)
            if function is not None and function.__module__ == module.__name__ and _names_cuda_type(function.__code__):
                yield function
    for name, owner, method in _MOVING:
        found = getattr(getattr(_optional_module(name), owner, None), method, None)
        if (function := _plain_function(found)) is not None:
            yield function


def _plain_function(item: Any) -> types.FunctionType | None:
    """The function under class-method and decorator wrappings, or None for anything else."""
    item = inspect.unwrap(getattr(item, "__func__", item)) if callable(item) or hasattr(item, "__func__") else item
    return item if isinstance(item, types.FunctionType) else None


def _names_cuda_type(code: types.CodeType) -> bool:
    return any(name in repr(constant) for constant in code.co_consts[1:] for name in _CUDA_TYPES)


def _reword(code: types.CodeType) -> types.CodeType:
    """The same code in which "torch.cuda.FloatTensor" reads "torch.FloatTensor", and `.cuda()` reads `.cpu()`."""

    def constant(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(constant(item) for item in value)
        return value.replace("torch.cuda.", "torch.") if isinstance(value, str) else value

    moves = code.co_name in {method for _, _, method in _MOVING}
    return code.replace(
        co_consts=tuple(constant(value) for value in code.co_consts),
        co_names=tuple("cpu" if moves and name == "cuda" else name for name in code.co_names),
    )


def _replace(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(functools.partial(setattr, owner, name, before))
