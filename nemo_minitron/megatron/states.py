"""States after chosen norms of a model, at any layout: read as they pass, and sent to where another model's are.

State `k` is what enters layer `k`, after that layer's first norm; state `num_layers` is what the final norm returns.
All are `[s, b, h]` with this rank's positions: under sequence parallelism `s` is a tensor-parallel rank's share, under
context parallelism a context-parallel rank's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.arch.layer import Mamba
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.hooks import fused_norm
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops import autograd

Take = Callable[[int, Tensor], Tensor | None]
"""`take(state, its value)`; a scalar that comes back is a loss whose gradient joins the model's at that place."""


@contextmanager
def watched(chunks: Sequence[nn.Module], states: Collection[int], take: Take) -> Iterator[None]:
    """Inside the block, `take` sees those of the states that this rank's chunks compute, in every forward pass.

    Under activation recomputation a layer runs twice, first without a graph, then, in the backward pass, with one.
    """
    handles: list[RemovableHandle] = []
    for chunk in map(unwrap, chunks):
        for layer in chunk.decoder.layers:
            if (state := layer.layer_number - 1) in states:
                handles.append(_watch_first_norm(layer, state, take))
        if chunk.post_process and chunk.spec.num_layers in states:
            handles.append(_watch_output(chunk.decoder.final_layernorm, chunk.spec.num_layers, take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_first_norm(layer: Any, state: int, take: Take) -> RemovableHandle:
    """A layer's first norm; where it is fused into the linear that follows, it is computed once more."""
    has_mixer = layer.sizes.mixer is not None
    norm = layer.input_layernorm if has_mixer else layer.pre_mlp_layernorm
    if not isinstance(norm, IdentityOp):
        return _watch_output(norm, state, take)
    linear: nn.Module
    if isinstance(layer.sizes.mixer, Mamba):
        linear = layer.self_attention.in_proj
    else:
        linear = layer.self_attention.linear_qkv if has_mixer else layer.mlp.linear_fc1

    def look(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        return with_loss(x, take(state, fused_norm(linear, x))), *rest

    return linear.register_forward_pre_hook(look)


def _watch_output(norm: nn.Module, state: int, take: Take) -> RemovableHandle:
    def look(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return with_loss(output, take(state, output))

    return norm.register_forward_hook(look)


def with_loss(x: Tensor, loss: Tensor | None) -> Tensor:
    """`x`, with a loss that takes part in every backward pass through it."""
    if loss is None:
        return x
    joined: Tensor = autograd.apply(_WithLoss, x, loss)
    return joined


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grads[0], torch.ones((), dtype=dtype, device=device)


def local_keep(micro_batch: MicroBatch, runtime: Runtime) -> Tensor:
    """Which of this rank's positions of a state count, `[s, b]`, on the host if the micro-batch is there, too."""
    parallel = runtime.parallel
    keep_SB = micro_batch.on_host.on_context_rank(runtime.cp_rank, parallel.context).keep.t()
    return keep_SB.chunk(parallel.tensor)[runtime.tp_rank] if parallel.sequence_parallel else keep_SB


def connect(runtime: Runtime) -> None:
    """Let the ranks of a pipeline reach each other, before some of them `send`. Every rank of a pipeline calls it.

    NCCL connects a group when it is first used, by all of its ranks together, and messages sent in a batch count as a
    use; but a route has two ends, and under the interleaved schedule nothing else has used the group before.
    """
    if runtime.parallel.pipeline > 1:
        dist.all_reduce(torch.zeros(1, device=runtime.device), group=runtime.groups.pp)


def send(
    own: Mapping[int, Sequence[Tensor]],
    routes: Collection[tuple[int, int, int]],
    *,
    like: Tensor,
    count: int,
    runtime: Runtime,
) -> dict[int, Sequence[Tensor]]:
    """Move states between pipeline ranks, after `connect`; every rank of a pipeline calls it.

    Args:
        own: States of this rank, a tensor a micro-batch.
        routes: State, the pipeline rank that has it, and the one that wants it; in the same order on all ranks, none
            twice.
        like: A tensor of the shape, dtype and device that states have.
        count: Micro-batches.
        runtime: The running layout.

    Returns:
        The states that this rank wants, by state.
    """
    group = runtime.groups.pp
    arrived: dict[int, Sequence[Tensor]] = {}
    operations: list[dist.P2POp] = []
    for state, source, target in routes:
        peers = [dist.get_global_rank(group, rank) for rank in (source, target)]
        if runtime.pp_rank == target:
            arrived[state] = own[state] if source == target else [torch.empty_like(like) for _ in range(count)]
        if source == target:
            continue
        if runtime.pp_rank == source:
            operations += [dist.P2POp(dist.isend, value.contiguous(), peers[1], group) for value in own[state]]
        elif runtime.pp_rank == target:
            operations += [dist.P2POp(dist.irecv, value, peers[0], group) for value in arrived[state]]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    return arrived
