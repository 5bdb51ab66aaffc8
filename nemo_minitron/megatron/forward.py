"""One global batch through a model: Megatron's schedules (no pipeline, 1F1B, interleaved), and the sums they report.

Losses come as sums over tokens with a count. Gradients are divided once, by the number of tokens of the complete global
batch, so the way it is cut into micro-batches and ranks does not matter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.errors import LayoutError, TrainingError
from nemo_minitron.megatron import param_gather
from nemo_minitron.megatron.documents import attention_documents, document_starts, uses_engine
from nemo_minitron.megatron.model import outside_inference_mode, unwrap
from nemo_minitron.megatron.runtime import Runtime, current


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one forward pass on one data-parallel rank; every tensor is `[b, s]`."""

    tokens: Tensor
    labels: Tensor
    """The token that follows each token."""
    keep: Tensor
    """Boolean: which positions count in the loss."""
    position_ids: Tensor
    """Place of each token in its document. Where a position does not follow the one before it, a document begins, and
    attention does not look behind it; nothing else is done with positions."""
    host: "MicroBatch | None" = None
    """The same on the host, if this is on a GPU and came from there."""

    TENSORS: ClassVar[tuple[str, ...]] = ("tokens", "labels", "keep", "position_ids")

    @property
    def on_host(self) -> "MicroBatch":
        """What can be read without waiting for a GPU: the copy on the host, or itself where there is none."""
        return self if self.host is None else self.host

    @classmethod
    def of(cls, tokens: Tensor, labels: Tensor, keep: Tensor) -> "MicroBatch":
        """A micro-batch whose samples are one document each."""
        return cls(tokens, labels, keep, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device. What leaves the host goes along as `host`."""
        leaves = self.tokens.device.type == "cpu" != torch.device(device).type
        return self._each(lambda x: x.to(device, non_blocking=True), host=self if leaves else self.host)

    def pin_memory(self) -> "MicroBatch":
        """The same in memory that copies to a GPU need not wait for; a `DataLoader` calls it."""
        return self._each(Tensor.pin_memory)

    def split(self, size: int) -> "list[MicroBatch]":
        """Consecutive micro-batches of `size` samples.

        Raises:
            LayoutError: The number of samples is not a multiple of `size`.
        """
        samples = self.tokens.shape[0]
        if samples % size:
            raise LayoutError(
                f"{samples} samples on this rank and micro_batch_size = {size}",
                rule="global_batch_size is a multiple of micro_batch_size times the data-parallel size",
            )
        places = [slice(start, start + size) for start in range(0, samples, size)]
        hosts: Sequence[MicroBatch | None] = [None] * len(places) if self.host is None else self.host.split(size)
        return [self._each(itemgetter(place), host) for place, host in zip(places, hosts, strict=True)]

    def on_context_rank(self, rank: int, size: int) -> "MicroBatch":
        """This context-parallel rank's positions.

        The sequence is cut into `2 * size` pieces and each rank takes one from either end, so that causal attention
        costs every rank the same (Transformer Engine's order).
        """
        if size == 1:
            return self

        def ends(x: Tensor) -> Tensor:
            shards = x.chunk(2 * size, dim=1)
            return torch.cat([shards[rank], shards[2 * size - 1 - rank]], dim=1)

        return self._each(ends, None if self.host is None else self.host.on_context_rank(rank, size))

    def _each(self, change: Callable[[Tensor], Tensor], host: "MicroBatch | None" = None) -> "MicroBatch":
        """A micro-batch of changed tensors."""
        tokens, labels, keep, positions = (change(getattr(self, name)) for name in self.TENSORS)
        return MicroBatch(tokens, labels, keep, positions, host)


def context_places(length: int, rank: int, size: int) -> Tensor:
    """Places in a sample of what `MicroBatch.on_context_rank` leaves to a rank, `[length / size]`."""
    pieces = torch.arange(length).chunk(2 * size)
    return torch.arange(length) if size == 1 else torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def cut(batch: MicroBatch, size: int, chunks: Sequence[nn.Module]) -> list[MicroBatch]:
    """Consecutive micro-batches of `size` samples; of one, where Transformer Engine is to keep documents apart.

    Ranks that share experts cut alike, since they pass their micro-batches together: collective over them.

    Raises:
        LayoutError: The number of samples is not a multiple of `size`.
    """
    parts = batch.split(size)
    if size == 1 or not uses_engine(chunks):
        return parts
    has_documents = document_starts(batch.on_host.position_ids) is not None
    return batch.split(1) if _on_any_peer(has_documents, chunks) else parts


def _on_any_peer(answer: bool, chunks: Sequence[nn.Module]) -> bool:
    """Whether a rank that shares experts with this one, or itself, says yes."""
    if unwrap(chunks[0]).config.expert_model_parallel_size == 1:
        return answer
    here = current()
    yes = torch.tensor(int(answer), device=here.device)
    dist.all_reduce(yes, op=dist.ReduceOp.MAX, group=here.groups.ep)
    return bool(yes)


@dataclass(frozen=True, slots=True)
class LossResult:
    """What a loss says about one micro-batch."""

    total: Tensor
    """Sum over kept tokens, with a graph; scalar."""
    tokens: Tensor
    """Number of kept tokens."""
    report: dict[str, Tensor] = field(default_factory=dict)
    """Further scalar sums to log, without a graph."""


Loss = Callable[[Tensor, MicroBatch, int], LossResult]
"""`loss(output of the last stage, micro-batch, its index)`."""


def run(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss: Loss,
    *,
    runtime: Runtime,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Pass a global batch through the model, and back unless `forward_only`.

    Afterwards the parameters' `main_grad` hold gradients of the mean over the global batch's kept tokens, added up over
    data-parallel ranks. For that the chunks must be wrapped by `optim.wrap`, and their gradients zeroed before.

    Args:
        chunks: This rank's model chunks.
        micro_batches: This data-parallel rank's share, in order; all ranks pass equally many, of one shape.
        loss: Called on the last stage only.
        runtime: The running layout.
        forward_only: Leave out the backward pass, and keep no graph.

    Returns:
        On the last stage, one report a micro-batch with `total` and `tokens` added; elsewhere an empty list.

    Raises:
        LayoutError: The number of micro-batches does not suit the interleaved schedule.
        TrainingError: Micro-batches differ in shape, or there are none.
    """

    def finish(output: Tensor, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result = loss(output, micro_batch, index)
        tokens = result.tokens.detach()
        report = {name: value.detach() for name, value in result.report.items()}
        return result.total, tokens.int(), {"total": result.total.detach(), "tokens": tokens, **report}

    return _schedule(chunks, micro_batches, finish, runtime=runtime, forward_only=forward_only)


def collect_hidden(chunks: Sequence[nn.Module], micro_batches: Sequence[MicroBatch], runtime: Runtime) -> list[Tensor]:
    """The last stage's states after the final norm, `[s, b, h]` for each micro-batch; an empty list on other stages."""
    return _collect(chunks, micro_batches, runtime, output="hidden")


def collect_logits(chunks: Sequence[nn.Module], micro_batches: Sequence[MicroBatch], runtime: Runtime) -> list[Tensor]:
    """The last stage's logits, `[b, s, V/tp]` for each micro-batch; an empty list on other stages."""
    return _collect(chunks, micro_batches, runtime, output="logits")


def _collect(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    runtime: Runtime,
    *,
    output: Literal["hidden", "logits"],
) -> list[Tensor]:
    def keep(states: Tensor, micro_batch: MicroBatch, index: int, non_loss_data: bool) -> Tensor:
        return states

    models = [unwrap(chunk) for chunk in chunks]
    before = [model.output for model in models]
    for model in models:
        model.output = output
    try:
        return _schedule(chunks, micro_batches, keep, runtime=runtime, forward_only=True, collect_non_loss_data=True)
    finally:
        for model, value in zip(models, before, strict=True):
            model.output = value


def reduce_report(reports: Sequence[dict[str, Tensor]], runtime: Runtime) -> dict[str, float]:
    """Sums of what `run` returned, over micro-batches and data-parallel ranks, on every rank.

    Every rank calls it, with what `run` gave it. Sums are taken in float64.
    """
    names: list[Any] = [sorted({name for report in reports for name in report})]
    values = torch.zeros(len(names[0]), dtype=torch.float64, device=runtime.device)
    for report in reports:
        values += torch.stack([report[name].double() for name in names[0]])
    if runtime.is_last_stage:
        dist.all_reduce(values, group=runtime.groups.dp_cp)
    last = dist.get_global_rank(runtime.groups.pp, runtime.parallel.pipeline - 1)
    if runtime.parallel.pipeline > 1:
        dist.broadcast_object_list(names, src=last, group=runtime.groups.pp, device=runtime.device)
        if not runtime.is_last_stage:
            values = values.new_zeros(len(names[0]))
        dist.broadcast(values, src=last, group=runtime.groups.pp)
    return dict(zip(names[0], values.tolist(), strict=True))


def _schedule(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    finish: Callable[..., Any],
    *,
    runtime: Runtime,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Megatron's schedule, outside of inference mode, in which Lightning validates on NCCL."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    shape = _common_shape(micro_batches, runtime)

    size, rank = runtime.parallel.context, runtime.cp_rank
    documents = [
        attention_documents(batch.on_host.position_ids, chunks, runtime.device, context=size) for batch in micro_batches
    ]

    def step(batches: Iterator[tuple[int, MicroBatch]], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index, micro_batch = next(batches)
        packed = {} if documents[index] is None else {"packed_seq_params": documents[index]}
        output = model(micro_batch.tokens, micro_batch.position_ids, None, **packed)
        return output, partial(finish, micro_batch=micro_batch, index=index)

    local = [micro_batch.to(runtime.device).on_context_rank(rank, size) for micro_batch in micro_batches]
    iterators = [iter(enumerate(local)) for _ in chunks]
    interleaved = runtime.parallel.virtual_pipeline is not None
    with outside_inference_mode(), torch.set_grad_enabled(not forward_only):
        if forward_only:  # a validation, or scores, which may read weights outside of their modules
            param_gather.finish(chunks)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if interleaved else iterators[0],
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )


def _common_shape(micro_batches: Sequence[MicroBatch], runtime: Runtime) -> tuple[int, int]:
    shapes = {tuple(micro_batch.tokens.shape) for micro_batch in micro_batches}
    if len(shapes) != 1:
        raise TrainingError(
            f"micro-batches of shapes {sorted(shapes)}", rule="at least one, and all of one shape [samples, sequence]"
        )
    parallel = runtime.parallel
    if parallel.virtual_pipeline is not None and len(micro_batches) % parallel.pipeline:
        raise LayoutError(
            f"{len(micro_batches)} micro-batches under parallel.virtual_pipeline",
            rule=f"the interleaved schedule needs a multiple of parallel.pipeline = {parallel.pipeline}",
            remedy="change global_batch_size or micro_batch_size, or leave parallel.virtual_pipeline unset",
        )
    ((samples, length),) = shapes
    if length % (2 * parallel.context) and parallel.context > 1:
        raise LayoutError(
            f"sequence_length = {length} under parallel.context = {parallel.context}",
            rule=f"the sequence is a multiple of {2 * parallel.context}",
        )
    return samples, length
