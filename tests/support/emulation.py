"""Take the branches of a GPU machine on a CPU: Transformer Engine's layers, and Lightning under NCCL.

See `tests/support/README.md` for what this shows and what it cannot show.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENGINE = Path(__file__).parent / "engine"
"""Holds the package `transformer_engine`."""


def install() -> None:
    """Let Megatron find the stand-in, build models of it, and tell Lightning that the backend is NCCL; to stay so.

    Raises:
        RuntimeError: Megatron has been imported before, and has noted that there is no Transformer Engine.
    """
    if any(name.startswith(("megatron", "nemo_minitron.megatron")) for name in sys.modules):
        raise RuntimeError("Megatron was imported before its Transformer Engine")
    sys.path.insert(0, str(ENGINE))
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's fusions, which come with the engine, are compiled

    import megatron.core  # noqa: F401 - before ours, which hides Transformer Engine from it where there is no GPU
    import torch

    torch.cuda.current_device = lambda: torch.device("cpu")  # where Megatron's wrappers make their weights
    _build_of_engine()
    _context_parallel()
    _dispatch_experts()
    nccl = lightning_sees_nccl()
    nccl.__enter__()
    _kept.append(nccl)


_kept: list[Any] = []


@contextmanager
def lightning_sees_nccl() -> Iterator[None]:
    """A block in which Lightning chooses between `no_grad` and inference mode as it does on GPUs."""
    from lightning.pytorch.loops import utilities

    before = utilities.dist
    utilities.dist = SimpleNamespace(get_backend=lambda group=None: "nccl")
    try:
        yield
    finally:
        utilities.dist = before


@contextmanager
def gpu_branches() -> Iterator[None]:
    """A block in which every tensor says that it is on a GPU; its device and its kernels stay those of the CPU."""
    import torch

    torch.Tensor.is_cuda = True
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


def _build_of_engine() -> None:
    """Models of a CPU come from the engine, where its layers carry them, and are initialised as on a GPU."""
    from nemo_minitron.megatron import build

    original = build.transformer_config

    def carries(spec: Any, device: Any, precision: Any) -> bool:
        return device.type != "meta" and not spec.needs_own_layers

    def config(spec: Any, parallel: Any, precision: Any, *, device: Any, **options: Any) -> Any:
        made = original(spec, parallel, precision, device=device, **options)
        made.use_cpu_initialization = not carries(spec, device, precision)
        return made

    build.use_transformer_engine = lambda: True
    build.engine_carries = carries
    build.transformer_config = config


def _context_parallel() -> None:
    """Without the CUDA stream and the pinned memory that Megatron uses under context parallelism."""
    import torch
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    def on_this_rank(angles: Any, dim: int, group: Any) -> Any:
        pieces = angles.chunk(2 * group.size(), dim=dim)
        return torch.cat([pieces[group.rank()], pieces[2 * group.size() - 1 - group.rank()]], dim=dim)

    TEDotProductAttention.cp_stream = object()
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = on_this_rank


def _dispatch_experts() -> None:
    """Without the CUDA stream that brings counts to the host, and over Gloo, which takes no parts of unequal sizes."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def to_host(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                if torch.is_tensor(counts := getattr(self, name)):
                    setattr(self, name, counts.numpy())
        return tokens_per_expert

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_unequal(x: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, output_split_sizes, use_global_buffer)
        padded = x.new_zeros(max(output_split_sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter_unequal(x: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(x, group, input_split_sizes, use_global_buffer)
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = to_host
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_unequal, scatter_unequal
