"""Updated weights that are gathered while the next forward pass goes on.

With the distributed optimizer each data-parallel rank updates a shard of the weights and gathers the others'. Under
`overlap_param_gather` it does not wait for them: Megatron puts a hook before every module, which waits for the bucket
that holds the module's weights and sends the next bucket off. The first one is on its way as soon as the step is done,
so that a teacher's pass hides it.

Whoever reads weights otherwise has to wait by itself. Layers that read those of the modules inside them, which nobody
calls, wait for all of theirs (`_READERS`). The fused losses do so for the output weight (`finish_for`).
Validations, scores and checkpoints read a model as a whole and wait for all of it (`finish`), as Megatron-LM's training
loop does. Both are collective: every data-parallel rank gets there at the same point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.megatron.experts import LocalMoe
from nemo_minitron.megatron.mamba import LocalMamba
from nemo_minitron.megatron.model import MinitronGPT, unwrap

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

_READERS = (LocalMoe, LocalMamba)
_GROUP = "minitron_bucket_group"
_PENDING = "minitron_param_gather"


@dataclass(frozen=True, slots=True)
class _Gathering:
    """What a chunk knows of its data-parallel wrapper.

    Attributes:
        groups: Megatron's bucket groups, in the order in which a forward pass reads them.
        remove_hooks: Takes Megatron's hooks off the chunk's modules.
        readers: Further hooks.
        config: The wrapper's settings, which the optimizer reads too.
    """

    groups: "Sequence[_ParamAndGradBucketGroup]"
    remove_hooks: Callable[[], None]
    readers: Sequence[RemovableHandle]
    config: "DistributedDataParallelConfig"


def connect(wrapped: "Sequence[DistributedDataParallel]") -> None:
    """Tell models and losses about wrapped chunks whose weights are gathered during the forward pass.

    Their weights are complete now. Megatron would gather them before the first step all the same, and spread what one
    rank has read wrongly.
    """
    for chunk in wrapped:
        model, groups = unwrap(chunk), _groups(chunk)
        for group in groups:
            group.param_gather_dispatched = True

        remove_hooks = partial(chunk.disable_forward_pre_hook, param_sync=False)
        readers = [
            module.register_forward_pre_hook(partial(_wait_for_all, chunk))
            for module in model.modules()
            if isinstance(module, _READERS)
        ]
        setattr(model, _PENDING, _Gathering(groups, remove_hooks, readers, chunk.ddp_config))
        if model.post_process and (weight := model.output_weight()).requires_grad:
            setattr(weight, _GROUP, chunk.param_to_bucket_group[weight])


def begin(chunks: Sequence[nn.Module]) -> None:
    """After an optimizer step: what the other ranks have updated is out of date here; send the first bucket off."""
    for gathering in _of(chunks):
        for group in gathering.groups:
            group.param_gather_dispatched = False
        if gathering.groups:
            gathering.groups[0].start_param_sync()


def finish(chunks: Sequence[nn.Module]) -> None:
    """Wait until the weights of chunks, wrapped or not, are those of the latest step on every rank.

    Every data-parallel rank calls it. Nothing happens where they are already, or where the optimizer waits itself.
    """
    groups = [group for gathering in _of(chunks) for group in gathering.groups]
    for group in groups:
        if not group.param_gather_dispatched:
            group.start_param_sync()
    for group in groups:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _wait_for_all(chunk: "DistributedDataParallel", reader: nn.Module, args: object) -> None:
    for parameter in reader.parameters():
        if (group := chunk.param_to_bucket_group.get(parameter)) is not None:
            group.finish_param_sync()


def finish_for(weight: Tensor) -> None:
    """Wait for an output weight that is read outside of its module."""
    if (group := getattr(weight, _GROUP, None)) is not None:
        group.finish_param_sync()


def disconnect(chunks: Sequence[nn.Module]) -> None:
    """The end of a training: weights are complete, modules have no hooks, and another wrapper may follow.

    Every data-parallel rank calls it. An optimizer that takes further steps gathers by itself, and waits.
    """
    finish(chunks)
    for model in map(unwrap, chunks):
        gathering: _Gathering | None = getattr(model, _PENDING, None)
        if gathering is None:
            continue
        gathering.remove_hooks()
        for handle in gathering.readers:
            handle.remove()
        gathering.config.overlap_param_gather = False
        delattr(model, _PENDING)
        _forget_weight(model)


def _forget_weight(model: MinitronGPT) -> None:
    weight = model.output_weight() if model.post_process else None
    if hasattr(weight, _GROUP):
        delattr(weight, _GROUP)


def _of(chunks: Sequence[nn.Module]) -> list[_Gathering]:
    found = (getattr(unwrap(chunk), _PENDING, None) for chunk in chunks)
    return [gathering for gathering in found if gathering is not None]


def _groups(chunk: "DistributedDataParallel") -> "list[_ParamAndGradBucketGroup]":
    """Buckets are filled from the last parameter to the first."""
    return [*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups)]
