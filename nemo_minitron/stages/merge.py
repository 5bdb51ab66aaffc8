"""The pass over calibration text that dropped layers are merged by (`target.merge_layers`); part of stage `score`.

No Lightning is needed. It is short, and a run that is cut off in it begins it again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nemo_minitron.config.run import ScoreConfig
from nemo_minitron.megatron.data import WindowDataset, loader
from nemo_minitron.megatron.forward import cut
from nemo_minitron.megatron.merge_sums import MergeCollector
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.merge import MergeSums, mergeable_gaps
from nemo_minitron.pruning.plan import PruningPlan


def measure_merge(
    chunks: Sequence[nn.Module],
    runtime: Runtime,
    plan: PruningPlan,
    data: Path,
    settings: ScoreConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> MergeSums:
    """Pass over calibration text for `target.merge_layers`. Collective: every rank calls it, with the same arguments.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        plan: What will go.
        data: Token files; their calibration split is used.
        settings: The recipe's `score`.
        provenance: JSON data for the file.
    """
    gaps = mergeable_gaps(plan)
    collector = MergeCollector(chunks, runtime, plan.spec, gaps)
    windows = WindowDataset(
        data,
        "calibration",
        settings.sequence_length,
        min(settings.merge_samples, settings.samples),
        first_window=settings.first_sample,
    )
    # The interleaved schedule wants as many micro-batches as there are stages.
    together = runtime.parallel.pipeline if runtime.parallel.virtual_pipeline else 1
    batches = loader(
        windows,
        global_batch_size=settings.micro_batch_size * together * runtime.dp_size,
        dp_rank=runtime.dp_rank,
        dp_size=runtime.dp_size,
    )
    for batch in batches if gaps else ():
        collector.add(cut(batch, settings.micro_batch_size, chunks))
    return MergeSums(plan.digest(), collector.result(), dict(provenance or {}))
