"""The depth metrics of the score stage: what the model loses without some of its layers, on a little calibration text.

No Lightning is needed: a loop over global batches, which saves what it has every half minute, so that a run that was
cut off goes on from there, at any layout.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile, SafetensorsWriter
from nemo_minitron.config.depth import DepthConfig
from nemo_minitron.config.run import ScoreConfig
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.data import WindowDataset, loader
from nemo_minitron.megatron.depth_metrics import DepthCollector, DepthMetric
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.depth import DepthScores, candidate_blocks

SAVE_SECONDS = 30.0


def measure_depth(
    chunks: Sequence[nn.Module],
    runtime: Runtime,
    spec: ModelSpec,
    data: Path,
    settings: ScoreConfig,
    *,
    tokenizer_files: Mapping[str, bytes],
    own: Mapping[str, DepthMetric] | None = None,
    partial: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DepthScores:
    """Measure what `settings.depth` asks for. Collective: every rank calls it, with the same arguments.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        spec: Architecture of the complete model.
        data: Token files; their calibration split is used.
        settings: The recipe's `score`.
        tokenizer_files: The model's tokenizer, for metrics that bring their own texts.
        own: Metrics of one's own by name; those of the recipe are imported unless given.
        partial: Where to leave what is done, and to find it again; on a disk that all ranks see. None keeps nothing.
        progress: Called with samples done and samples wanted.

    Raises:
        ConfigError: A metric of the recipe cannot be imported.
        ScoresError: A state or a loss was NaN or infinite; names the layer.
    """
    metrics = own if own is not None else load_metrics(settings.depth)
    tokenizer = load_tokenizer(dict(tokenizer_files)) if metrics else None
    texts = {name: metric.batches(tokenizer) for name, metric in metrics.items()}
    on_calibration = [name for name, batches in texts.items() if batches is None]
    blocks = candidate_blocks(spec.num_layers, settings.depth.lengths(spec.num_layers))

    def collector(names: Sequence[str]) -> DepthCollector:
        chosen = {name: metrics[name] for name in names if name in metrics}
        return DepthCollector(chunks, runtime, spec, blocks=blocks, metrics=names, own=chosen)

    parts: list[DepthScores] = []
    if names := [name for name in settings.depth.names if texts.get(name) is None]:
        run = _Calibration(collector(names), runtime, spec, partial, progress)
        parts.append(run.over(data, settings, on_calibration))
    for name, batches in texts.items():
        if batches is not None:
            one = collector([name])
            one.add_own(name, batches)
            parts.append(one.result())
    return parts[0].joined(parts[1:])


def load_metrics(settings: DepthConfig) -> dict[str, DepthMetric]:
    """The metrics of one's own that a recipe names, by name. A class is called without arguments.

    Raises:
        ConfigError: With every one that cannot be had.
    """
    found: dict[str, DepthMetric] = {}
    problems: list[str] = []
    for path, name in zip(settings.metrics, settings.names, strict=True):
        module, colon, _ = path.partition(":")
        if not colon:
            continue
        try:
            thing = getattr(import_module(module), name)
            found[name] = thing() if isinstance(thing, type) else thing
        except (ImportError, AttributeError) as error:
            problems.append(f"{path}: {error}; is its folder on PYTHONPATH?")
            continue
        if not all(callable(getattr(found[name], method, None)) for method in ("batches", "measure")):
            problems.append(f"{path}: has no methods batches(tokenizer) and measure(batch, nats, correct)")
    if problems:
        raise ConfigError("score.depth.metrics", problems)
    return found


class _Calibration:
    """The loop over calibration text, with what an earlier attempt has left."""

    def __init__(
        self,
        collector: DepthCollector,
        runtime: Runtime,
        spec: ModelSpec,
        partial: Path | None,
        progress: Callable[[int, int], None],
    ) -> None:
        self._collector = collector
        self._runtime = runtime
        self._spec = spec
        self._partial = partial
        self._progress = progress
        self._before: DepthScores | None = None
        self._consumed = 0

    def over(self, data: Path, settings: ScoreConfig, own: Sequence[str]) -> DepthScores:
        """Measure on the first calibration samples."""
        self._resume()
        windows = WindowDataset(
            data,
            "calibration",
            settings.sequence_length,
            min(settings.depth.samples, settings.samples),
            first_window=settings.first_sample,
        )
        size = settings.micro_batch_size * self._runtime.dp_size
        batches = loader(
            windows,
            global_batch_size=size,
            dp_rank=self._runtime.dp_rank,
            dp_size=self._runtime.dp_size,
            consumed_samples=min(self._consumed, len(windows)),
        )
        saved = time.monotonic()
        micro_batch: MicroBatch
        for micro_batch in batches:
            self._collector.add(micro_batch, own)
            self._consumed = min(self._consumed + size, len(windows))
            self._progress(self._consumed, len(windows))
            left = self._consumed < len(windows)
            if left and megatron_runtime.broadcast_object(time.monotonic() - saved > SAVE_SECONDS):
                self._save()
                saved = time.monotonic()
        return self._so_far()

    def _so_far(self) -> DepthScores:
        # A resumed run whose samples were all measured before has nothing of its own.
        if self._before is not None and not self._collector.measured:
            return self._before
        mine = self._collector.result()
        return mine if self._before is None else self._before.merge(mine)

    def _save(self) -> None:
        scores = self._so_far()
        if self._partial is None or self._runtime.rank:
            return
        entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in scores.tensors.items()}
        metadata = {"consumed": json.dumps(self._consumed)}
        with staged_file(self._partial) as path, SafetensorsWriter(path, entries, metadata) as writer:
            for name, tensor in scores.tensors.items():
                writer.write(name, tensor)

    def _resume(self) -> None:
        """Take up what an earlier attempt left; a file that cannot be read is as good as none."""
        found: tuple[int, dict[str, torch.Tensor]] | None = None
        if self._partial is not None and self._runtime.rank == 0 and self._partial.is_file():
            try:
                file = SafetensorsFile(self._partial)
                found = json.loads(file.metadata["consumed"]), {name: file.get(name) for name in file.entries}
            except (MinitronError, KeyError, ValueError):
                found = None
        found = megatron_runtime.broadcast_object(found)
        if found is not None:
            self._consumed, self._before = found[0], DepthScores(self._spec, found[1])
