"""How fast models write, timed in turn on one machine: the ratio of two models is taken round by round."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.config.evaluation import SpeedConfig
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.generate import generate
from nemo_minitron.megatron.kv_cache import can_cache
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime, barrier

REPORTED = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token")


@dataclass(frozen=True, slots=True)
class Timing:
    """One round of one model."""

    first_token: float
    """Seconds from the prompts to the first new token of each."""
    per_token: float
    """Seconds of each later step, which adds a token to every sample."""


def measure(
    models: Mapping[str, Sequence[nn.Module]],
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    settings: SpeedConfig,
) -> dict[str, Any]:
    """Time greedy generation by each model, `rounds` times in turn after a round that does not count.

    Every rank calls it with equal arguments; times are those of this rank.

    Args:
        models: Chunks of each model by name; the first one is what the others are compared with.
        runtime: The running layout.
        prompts: `batch_size` prompts of equal length.
        settings: How much to generate, and how often.

    Returns:
        `ranks` that a model is divided over.

        By model, medians over rounds: `prefill_tokens_per_second`, `decode_tokens_per_second`, `time_to_first_token`
        in seconds; `weights_bytes` and `cache_bytes` of this rank; `peak_bytes` of tensors on this rank's GPU above
        those of the other models, if there is one. `ratio` by model and quantity: median, least and most over rounds
        of the model's figure over the first one's. `kv_cache`: whether keys and values were kept.

    Raises:
        DataError: Prompts and new tokens do not fit into a model's context.
    """
    length = len(prompts[0]) + settings.new_tokens
    for name, chunks in models.items():
        limit = unwrap(chunks[0]).spec.max_position_embeddings
        if length > limit:
            raise DataError(
                f"evaluate.speed: {length} tokens",
                rule=f"prompt_tokens + new_tokens are at most {limit}, the context of the {name} model",
            )
    peaks = {name: 0 for name in models}
    rounds: dict[str, list[Timing]] = {name: [] for name in models}
    for number in range(settings.rounds + 1):
        for name, chunks in models.items():
            before = _allocated()
            timing = _time(chunks, runtime, prompts, settings.new_tokens)
            peaks[name] = max(peaks[name], _peak() - before)
            if number:
                rounds[name].append(timing)
    found: dict[str, Any] = {
        "ranks": runtime.parallel.ranks,
        "prompt_tokens": len(prompts[0]),
        "new_tokens": settings.new_tokens,
        "batch_size": len(prompts),
        "rounds": settings.rounds,
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "kv_cache": all(can_cache(chunks) for chunks in models.values()),
    }
    per_round = {name: [_rates(timing, prompts) for timing in timings] for name, timings in rounds.items()}
    base = next(iter(models))
    found["models"] = {
        name: {key: statistics.median(row[key] for row in rows) for key in REPORTED}
        | _memory(models[name], len(prompts), length, peaks[name])
        for name, rows in per_round.items()
    }
    found["ratio"] = {
        name: {
            key: _spread([row[key] / other[key] for row, other in zip(rows, per_round[base], strict=True)])
            for key in REPORTED
        }
        for name, rows in per_round.items()
        if name != base
    }
    return found


def _time(chunks: Sequence[nn.Module], runtime: Runtime, prompts: Sequence[Sequence[int]], count: int) -> Timing:
    stamps: list[float] = []

    def stamp(sample: int, new: list[int]) -> bool:
        if sample == 0:
            stamps.append(time.perf_counter())
        return False

    barrier()
    start = time.perf_counter()
    generate(chunks, runtime, prompts, count, finished=stamp)
    later = len(stamps) - 1
    return Timing(stamps[0] - start, (stamps[-1] - stamps[0]) / later if later else 0.0)


def _rates(timing: Timing, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    tokens = sum(map(len, prompts))
    return {
        "prefill_tokens_per_second": tokens / timing.first_token,
        "decode_tokens_per_second": len(prompts) / timing.per_token if timing.per_token else 0.0,
        "time_to_first_token": timing.first_token,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _memory(chunks: Sequence[nn.Module], samples: int, length: int, above: int) -> dict[str, int]:
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = sum(parameter.nbytes for parameter in parameters)
    width = state = 0
    element = parameters[0].element_size()
    if can_cache(chunks):
        numbers = [layer.layer_number - 1 for chunk in chunks for layer in unwrap(chunk).decoder.layers]
        spec, ranks = unwrap(chunks[0]).spec, unwrap(chunks[0]).tp_group.size()
        width = sum(spec.layers[number].on_rank(ranks).groups for number in numbers) * spec.head_dim
        state = sum(_state_bytes(spec.layers[number], element) for number in numbers) // ranks
    cache = 2 * width * samples * length * element + samples * state
    return {"weights_bytes": weights, "cache_bytes": cache} | ({"peak_bytes": weights + above} if above else {})


def _state_bytes(layer: LayerSpec, element: int) -> int:
    """Bytes of a sample's state in fp32 and the last inputs of the convolution, before and after the latest token."""
    if not isinstance(layer.mixer, Mamba):
        return 0
    mamba = layer.mixer
    window = (mamba.conv_kernel - 1) * (mamba.inner_size + 2 * mamba.map_size)
    return 2 * (4 * mamba.inner_size * mamba.mamba_state_dim + element * window)


def _allocated() -> int:
    """Bytes of tensors on this process's GPU; the peak counts from here on."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
