"""What the model loses without the mixer, or without the feed-forward, of each of its layers: sums for a score file."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from nemo_minitron.arch.layer import PARTS
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.depth import LM_LOSS
from nemo_minitron.config.run import ScoreConfig
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.megatron.replace import BlockLossCollector, Replacement
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.scores import LOSSES, two_part_layers


def sublayer_losses(
    chunks: Sequence[nn.Module], runtime: Runtime, spec: ModelSpec, data: Path, settings: ScoreConfig
) -> dict[str, Tensor]:
    """Sums of the next-token loss without each part of a layer that has both, by name, on every rank. Collective.

    Args:
        chunks: This rank's chunks of the model.
        runtime: The running layout.
        spec: Architecture of the complete model.
        data: Folder of token files.
        settings: Which calibration samples; `depth.samples` of them are used.
    """
    places = [(layer, part) for layer in two_part_layers(spec) for part in PARTS]
    if not places:
        return {}
    replacements = [Replacement(layer=layer, without=(part,)) for layer, part in places]
    collector = BlockLossCollector(chunks, runtime, spec, replacements)
    samples = min(settings.depth.samples, settings.samples)
    windows = WindowDataset(data, "calibration", settings.sequence_length, samples, first_window=settings.first_sample)
    collector.add_all(windows, micro_batch_size=settings.micro_batch_size)
    count, (base, *values) = collector.sums()
    found = {f"layers.{layer}.{LM_LOSS}.{part}.sum": value for (layer, part), value in zip(places, values, strict=True)}
    found |= {f"{LOSSES}.base": base, f"{LOSSES}.count": count}
    return {name: value.cpu().clone() for name, value in found.items()}
