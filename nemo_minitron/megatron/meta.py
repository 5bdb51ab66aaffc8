"""A rank's part of a model on torch's `meta` device: every parameter with its shape, and no memory behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime

_META = torch.device("meta")


class _Stay(TorchFunctionMode):
    """Tensors that are sent to a device stay on `meta`; Megatron sends both copies of a tied embedding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (torch.Tensor.cpu, torch.Tensor.cuda) else func(*args, **(kwargs or {}))


def build_on_meta(spec: ModelSpec, parallel: ParallelConfig, stage: int, precision: Precision) -> list[MinitronGPT]:
    """The chunks that the first tensor-parallel rank of a pipeline stage would hold, in a process that is alone.

    Context parallelism splits no parameter, and is left out.

    Raises:
        LayoutError: The model cannot be split so, or a layout is running in this process.
    """
    layout = parallel.model_copy(update={"context": 1})
    # Ranks of a pipeline stage follow one another.
    with _pretended(layout, rank=stage * parallel.tensor * parallel.expert) as here, _META, _Stay():
        return build_chunks(spec, replace(here, device=_META), precision)


@contextmanager
def _pretended(parallel: ParallelConfig, *, rank: int) -> Iterator[Runtime]:
    """This process as one of a copy of the model whose other ranks do not exist; nothing can be sent to them."""
    # Registers the backend "fake". It is torch's own for such uses and has no public home.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.ranks)
    try:
        yield runtime.start(parallel, seed=0)
    finally:
        runtime.stop()
        dist.destroy_process_group()
