"""Updated weights that are gathered while the next forward pass goes on.

With the distributed optimizer each data-parallel rank updates a shard of the weights and gathers the others'. Under
`overlap_param_gather` it does not wait for them: Megatron puts a hook before every module, which waits for the bucket
that holds the module's weights and sends the next bucket off. The first one is on its way as soon as the step is done,
so that a teacher's pass hides it. Experts have buckets of their own, and with them a second first one.

Whoever reads weights otherwise has to wait by itself. The fused losses do so for the output weight (`finish_for`). Our
own mixture of experts reads the weights of its experts without calling their modules, so it waits for all of them when
it begins (`_waiting_for_experts`); Transformer Engine's calls its modules, which wait like any other.
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
from nemo_minitron.megatron.model import MinitronGPT, unwrap

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

_GROUP = "minitron_bucket_group"
_PENDING = "minitron_param_gather"


@dataclass(frozen=True, slots=True)
class _Gathering:
    """What a chunk knows of its data-parallel wrapper.

    Attributes:
        chains: Megatron's bucket groups, those of experts apart, in the order in which a forward pass reads them; each
            group sends the next one of its chain off.
        remove_hooks: Takes the hooks off the chunk's modules.
        config: The wrapper's settings, which the optimizer reads too.
    """

    chains: "Sequence[Sequence[_ParamAndGradBucketGroup]]"
    remove_hooks: Callable[[], None]
    config: "DistributedDataParallelConfig"

    @property
    def groups(self) -> "list[_ParamAndGradBucketGroup]":
        """All of them."""
        return [group for chain in self.chains for group in chain]


def connect(wrapped: "Sequence[DistributedDataParallel]") -> None:
    """Tell models and losses about wrapped chunks whose weights are gathered during the forward pass.

    Their weights are complete now. Megatron would gather them before the first step all the same, and spread what one
    rank has read wrongly.
    """
    for chunk in wrapped:
        model = unwrap(chunk)
        waiting = [_waiting_for_experts(module, chunk) for module in model.modules() if isinstance(module, LocalMoe)]
        gathering = _Gathering(_chains(chunk), partial(_remove_hooks, chunk, waiting), chunk.ddp_config)
        for group in gathering.groups:
            group.param_gather_dispatched = True
        setattr(model, _PENDING, gathering)
        if model.post_process and (weight := model.output_weight()).requires_grad:
            setattr(weight, _GROUP, chunk.param_to_bucket_group[weight])


def begin(chunks: Sequence[nn.Module]) -> None:
    """After an optimizer step: what the other ranks have updated is out of date here; send the first buckets off."""
    for gathering in _of(chunks):
        for group in gathering.groups:
            group.param_gather_dispatched = False
        for chain in gathering.chains:
            chain[0].start_param_sync()


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


def _chains(chunk: "DistributedDataParallel") -> "list[list[_ParamAndGradBucketGroup]]":
    """Buckets are filled from the last parameter to the first."""
    return [[*reversed(chain)] for chain in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups) if chain]


def _waiting_for_experts(moe: LocalMoe, chunk: "DistributedDataParallel") -> RemovableHandle:
    """Make our own mixture wait for the weights of its experts, in their order, before it begins."""
    found = (chunk.param_to_bucket_group.get(weight) for weight in moe.experts.parameters())
    groups = list(dict.fromkeys(group for group in found if group is not None))  # none for frozen weights

    def wait(moe: nn.Module, args: object) -> None:
        for group in groups:
            group.finish_param_sync()

    return moe.register_forward_pre_hook(wait)


def _remove_hooks(chunk: "DistributedDataParallel", waiting: Sequence[RemovableHandle]) -> None:
    chunk.disable_forward_pre_hook(param_sync=False)
    for handle in waiting:
        handle.remove()
