"""What shapes cost under a deployment: one function for each budget, over arrays of sizes."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.config.budget import BudgetConfig, DeploymentConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.axes import GROUPS, LAYERS
from nemo_minitron.search.counts import (
    Multilinear,
    active_parameters,
    cached_positions,
    matrix_parameters,
    non_embedding_parameters,
    query_channels,
)

Measure = Callable[[Sequence[Any]], Any]
"""From one integer or integer array for each axis to what the shapes cost."""


class Latency(Protocol):
    """What a latency table answers."""

    def prefill_ms(self, sizes: Sequence[Any]) -> Any:
        """Milliseconds for a batch of prompts."""

    def decode_ms(self, sizes: Sequence[Any]) -> Any:
        """Milliseconds for one token of each sequence of a batch."""


def measures(
    teacher: ModelSpec, deployment: DeploymentConfig, names: Sequence[str], latency: Latency | None = None
) -> dict[str, Measure]:
    """The measures that budgets of these names limit. All are exact but for latency.

    Args:
        teacher: What a shape has besides its sizes.
        deployment: Conditions.
        names: Of budgets, as in `BudgetConfig`.
        latency: For `prefill_ms` and `decode_ms`.

    Raises:
        SearchError: Latency is limited for a model with experts.
    """
    if teacher.has_experts and (timed := [name for name in names if name.endswith("_ms")]):
        raise SearchError(
            f"target.{timed[0]} for a model with experts",
            rule="latency tables hold layers without experts",
            remedy="limit active_params or flops_per_token",
        )
    params = Multilinear(parameter_count, teacher)
    if "params" in names or "ratio" in names:
        names = [name for name in dict.fromkeys(("params", *names)) if name != "ratio"]
    known: dict[str, Callable[[], Measure]] = {
        "params": lambda: params,
        "active_params": lambda: Multilinear(active_parameters, teacher),
        "non_embedding_params": lambda: Multilinear(non_embedding_parameters, teacher),
        "weight_memory": lambda: lambda sizes: -(-params(sizes) * deployment.dtype.bits // 8),
        "kv_cache": lambda: _kv_cache(teacher, deployment),
        "flops_per_token": lambda: _flops(teacher, deployment),
    }
    if latency is not None:
        found = latency
        known |= {"prefill_ms": lambda: found.prefill_ms, "decode_ms": lambda: found.decode_ms}
    return {name: known[name]() for name in names}


def limits(target: BudgetConfig, teacher: ModelSpec) -> dict[str, float]:
    """The budgets as numbers for `measures`; a ratio becomes parameters, and the smaller of both counts."""
    found = target.budgets
    if "ratio" in found:
        share = int(Fraction(str(found.pop("ratio"))) * parameter_count(teacher))
        found = {"params": min(share, found.get("params", share)), **{k: v for k, v in found.items() if k != "params"}}
    return found


def _kv_cache(teacher: ModelSpec, deployment: DeploymentConfig) -> Measure:
    bits = 2 * deployment.batch_size * teacher.head_dim * deployment.cache_bits

    def measure(sizes: Sequence[Any]) -> Any:
        whole, windowed = cached_positions(sizes[LAYERS], teacher, deployment.sequence_length)
        return (whole + windowed) * sizes[GROUPS] * bits // 8

    return measure


def _flops(teacher: ModelSpec, deployment: DeploymentConfig) -> Measure:
    """Two operations for every multiplied weight, four for every channel of a query and position attended to.

    Those are two for the score and two for the weighted sum. Local layers are counted as if they saw all positions.
    """
    matrices, channels = Multilinear(matrix_parameters, teacher), Multilinear(query_channels, teacher)
    return lambda sizes: 2 * matrices(sizes) + 4 * deployment.sequence_length * channels(sizes)


def describe(name: str, value: float) -> str:
    """A measure's value for people."""
    if name in ("weight_memory", "kv_cache"):
        return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))
    if name.endswith("_ms"):
        return f"{value:.3g} ms"
    return _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")))


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{value / size:.4g} {unit}".rstrip()


def table_row(found: Mapping[str, Measure], sizes: Sequence[int]) -> dict[str, float]:
    """All measures of one shape, as plain numbers."""
    values = {name: measure(sizes) for name, measure in found.items()}
    return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
