"""A teacher's targets of the training samples, written to a cache at any TP x PP x CP x EP x DP layout.

Shards are dealt out to the data-parallel ranks, which work on their own: more of them write faster, not differently.
Those that share experts exchange tokens in every pass; they work on one shard together, and the first of them writes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.cache.folder import CacheManifest, CacheWriter
from nemo_minitron.cache.tensors import sampled_rows, top_k_rows
from nemo_minitron.config.cache import TargetKind
from nemo_minitron.megatron.forward import MicroBatch, collect_hidden, context_places, cut
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime, agree, barrier, broadcast_object
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.collectives import split_group
from nemo_minitron.parallel.sparse_targets import sample_targets, top_k_targets


class Samples(Protocol):
    """Samples in training order; an item has `tokens`, `labels`, `loss_mask` and `position_ids`, each `[s]`."""

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class TargetWriter:
    """Runs a frozen teacher over samples and writes what is missing of a cache.

    Args:
        chunks: This rank's chunks of the teacher.
        runtime: The running layout.
        writer: The cache, made by rank 0 before.
        samples: The training samples; every rank sees the same.
        micro_batch_size: Samples of one forward pass.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        runtime: Runtime,
        writer: CacheWriter,
        samples: Samples,
        *,
        micro_batch_size: int,
    ) -> None:
        self._chunks = chunks
        self._runtime = runtime
        self._writer = writer
        self._samples = samples
        self._micro_batch_size = micro_batch_size

    @property
    def _manifest(self) -> CacheManifest:
        return self._writer.manifest

    def run(self, *, stopped: Callable[[], bool], progress: Callable[[int], None]) -> bool:
        """Write every missing shard; returns whether all are there. Collective.

        Args:
            stopped: Asked after each round of shards; True ends it early, on all ranks if on any.
            progress: Told of every so many shards that are there, those from before first.
        """
        runtime = self._runtime
        missing = broadcast_object(list(self._writer.missing()) if runtime.rank == 0 else None)
        progress(self._manifest.shards - len(missing))
        workers, worker = runtime.dp_size // runtime.expert_peers, runtime.dp_rank // runtime.expert_peers
        for start in range(0, len(missing), workers):
            if not agree(not stopped()):
                return False
            own = missing[start : start + workers]
            if worker < len(own):
                self._shard(own[worker])
            barrier()
            progress(len(own))
        return True

    def _shard(self, number: int) -> None:
        """One shard, by the ranks of one copy of the teacher, or of several that share experts."""
        indices = self._manifest.shard_samples(number)
        targets: list[SampleTargets] = []
        tokens: list[Any] = []
        for group in self._groups(indices):
            items = [self._samples[index] for index in group]
            found = self._targets(group, items)
            own = min(len(group), indices.stop - group[0])
            targets += found[:own]
            tokens += [item["tokens"].numpy() for item in items[:own]]
        runtime = self._runtime
        first = runtime.tp_rank == 0 and runtime.cp_rank == 0 and runtime.dp_rank % runtime.expert_peers == 0
        if runtime.is_last_stage and first:
            self._writer.write(number, targets, tokens)

    def _groups(self, indices: range) -> Iterator[list[int]]:
        """Samples of one pass: a micro-batch for each pipeline stage, so that all stages work and schedules divide.

        The last group is filled up with its last sample, whose further targets are dropped.
        """
        size = self._micro_batch_size * self._runtime.parallel.pipeline
        for start in range(indices.start, indices.stop, size):
            yield [min(index, indices.stop - 1) for index in range(start, start + size)]

    def _targets(self, group: list[int], items: list[dict[str, Tensor]]) -> list[SampleTargets]:
        """Targets of a group's samples, on the last stage's first rank; elsewhere an empty list."""
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        whole = MicroBatch(stacked["tokens"], stacked["labels"], stacked["loss_mask"].bool(), stacked["position_ids"])
        batches = cut(whole, self._micro_batch_size, self._chunks)
        length, size = whole.tokens.shape[1], len(batches[0].tokens)
        places = context_places(length, self._runtime.cp_rank, self._runtime.parallel.context)
        states = collect_hidden(self._chunks, batches, self._runtime)
        found: list[SampleTargets] = []
        for index in range(len(batches) if self._runtime.is_last_stage else 0):
            own = group[index * size : (index + 1) * size]
            counters = torch.tensor(own)[:, None] * length + places
            rows = self._rows(states[index], counters.to(states[index].device))
            found += self._gathered(rows, places.expand(size, -1))
        return found

    def _rows(self, states_SBH: Tensor, counters_BS: Tensor) -> list[SampleTargets]:
        """Targets of this rank's tokens, sample by sample."""
        manifest, runtime = self._manifest, self._runtime
        weight = unwrap(self._chunks[-1]).output_weight()
        how: dict[str, Any] = {
            "vocab_size": manifest.vocab_size,
            "temperature": manifest.temperature,
            "tp": split_group(runtime.groups.tp),
        }
        hidden, samples = states_SBH.flatten(0, 1), states_SBH.shape[1]
        if manifest.kind is TargetKind.TOP_K:
            top: SparseTargets = top_k_targets(hidden, weight, k=manifest.width, **how)
            return top_k_rows(top, samples)
        counters = counters_BS.t().flatten()
        drawn = sample_targets(hidden, weight, counters, draws=manifest.width, seed=manifest.seed, **how)
        return sampled_rows(*drawn, samples)

    def _gathered(self, rows: list[SampleTargets], positions_BS: Tensor) -> list[SampleTargets]:
        """Sequences put together from the context-parallel ranks' tokens, on their first rank."""
        runtime = self._runtime
        if runtime.parallel.context == 1:
            return rows if runtime.tp_rank == 0 else []
        held = (rows, positions_BS.tolist())
        parts: list[Any] | None = [None] * runtime.parallel.context if runtime.cp_rank == 0 else None
        dist.gather_object(held, parts, dst=dist.get_global_rank(runtime.groups.cp, 0), group=runtime.groups.cp)
        if parts is None or runtime.tp_rank:
            return []
        return [joined([(own[index], places[index]) for own, places in parts]) for index in range(len(rows))]


def joined(parts: list[tuple[SampleTargets, list[int]]]) -> SampleTargets:
    """One sample's targets from parts, each with the positions of its tokens."""
    tokens = [
        (place, sample, start, length, index)
        for sample, places in parts
        for index, (place, start, length) in enumerate(
            zip(places, np.cumsum(sample.lengths) - sample.lengths, sample.lengths, strict=True)
        )
    ]
    tokens.sort(key=lambda token: token[0])
    cut = [(sample, slice(start, start + length), index) for _, sample, start, length, index in tokens]
    tails = [sample.tail[index] for sample, _, index in cut if sample.tail is not None]
    return SampleTargets(
        np.array([piece.stop - piece.start for _, piece, _ in cut]),
        np.concatenate([sample.ids[piece] for sample, piece, _ in cut]),
        np.concatenate([sample.values[piece] for sample, piece, _ in cut]),
        np.array(tails, np.float32) if tails else None,
    )
