"""Logits of a model that is spread over ranks, put together on every rank.

For tests, checks of exports and text generation; training never gathers a vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from nemo_minitron.megatron import forward
from nemo_minitron.megatron.forward import LossResult, MicroBatch, context_places
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.parallel.collectives import gather, sum_over


def gather_logits(
    chunks: Sequence[nn.Module],
    tokens_BS: Tensor,
    runtime: Runtime,
    vocab_size: int,
    *,
    positions: Sequence[int] | None = None,
    position_ids_BS: Tensor | None = None,
) -> Tensor:
    """Logits `[b, positions, vocab_size]` in fp32, the same on every rank.

    Every rank calls it with the same tokens; data-parallel ranks compute the same thing.

    Args:
        chunks: This rank's model chunks.
        tokens_BS: Token ids `[b, s]`.
        runtime: The running layout.
        vocab_size: Without padding.
        positions: Places in the samples wanted; None for all. Only theirs are gathered.
        position_ids_BS: Place of each token in its document; None for one document a sample.
    """
    samples, length = tokens_BS.shape
    wanted = torch.arange(length) if positions is None else torch.tensor(positions)
    filled = nn.functional.pad(tokens_BS, (0, -length % length_step(runtime)))  # causal: what follows is not seen
    batch = MicroBatch.of(filled, filled, torch.ones_like(filled, dtype=torch.bool))
    if position_ids_BS is not None:
        behind = position_ids_BS[:, -1:] + torch.arange(1, filled.shape[1] - length + 1)
        batch = replace(batch, position_ids=torch.cat([position_ids_BS, behind], dim=1))
    # The interleaved schedule takes micro-batches by the pipeline size.
    copies = runtime.parallel.pipeline if runtime.parallel.virtual_pipeline is not None else 1
    with returning(chunks, "logits"):
        reports = forward.run(chunks, [batch] * copies, _keep, runtime=runtime, forward_only=True)
    places = context_places(filled.shape[1], runtime.cp_rank, runtime.parallel.context)
    result = torch.zeros(samples, len(wanted), vocab_size, device=runtime.device)
    if reports:
        rows, columns = torch.nonzero(
            places[:, None].to(runtime.device) == wanted.to(runtime.device), as_tuple=True
        )  # this context-parallel rank's share of the positions
        shards = gather(reports[0]["logits"][:, rows].float(), runtime.groups.tp)
        result[:, columns] = torch.cat(list(shards), dim=-1)[..., :vocab_size]
    # Zero on all ranks but the one that has it, so these sums are copies.
    return sum_over(sum_over(result, runtime.groups.cp), runtime.groups.pp)


def _keep(output_BSV: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
    nothing = output_BSV.new_zeros(())
    kept = {"logits": output_BSV} if index == 0 else {}
    return LossResult(total=nothing, tokens=torch.ones_like(nothing), report=kept)


def length_step(runtime: Runtime) -> int:
    """What sequence lengths must be a multiple of."""
    parallel = runtime.parallel
    step = 2 * parallel.context if parallel.context > 1 else 1
    return step * parallel.tensor if parallel.sequence_parallel else step


@contextmanager
def returning(chunks: Sequence[nn.Module], output: Literal["logits", "hidden"]) -> Iterator[None]:
    """A block in which the last stage returns logits, or hidden states after the final norm."""
    models = [unwrap(chunk) for chunk in chunks]
    before = [model.output for model in models]
    for model in models:
        model.output = output
    try:
        yield
    finally:
        for model, value in zip(models, before, strict=True):
            model.output = value
