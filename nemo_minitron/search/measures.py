"""What shapes cost under a deployment: one function for each budget, over arrays of sizes."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from nemo_minitron.arch.mixing import convolution_inputs, query_channels, state_size
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import matrix_count, parameter_count
from nemo_minitron.config.budget import BudgetConfig, DeploymentConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.counts import (
    ShapeCount,
    active_parameters,
    cached_keys,
    non_embedding_parameters,
)

Measure = Callable[[Sequence[Any]], Any]
"""From one integer or integer array for each axis to what the shapes cost."""


class Latency(Protocol):
    """What a latency table answers."""

    def model_ms(self, phase: str, teacher: ModelSpec, sizes: Sequence[Any]) -> Any:
        """Milliseconds of shapes of a teacher: for a batch of prompts, or one token of each sequence of a batch."""


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
    params = ShapeCount(parameter_count, teacher)
    if "params" in names or "ratio" in names:
        names = [name for name in dict.fromkeys(("params", *names)) if name != "ratio"]

    def weight_memory(sizes: Sequence[Any]) -> Any:
        return -(-params(sizes) * deployment.dtype.bits // 8)

    known: dict[str, Callable[[], Measure]] = {
        "params": lambda: params,
        "active_params": lambda: ShapeCount(active_parameters, teacher),
        "non_embedding_params": lambda: ShapeCount(non_embedding_parameters, teacher),
        "weight_memory": lambda: weight_memory,
        "kv_cache": lambda: _kv_cache(teacher, deployment),
        "ssm_state": lambda: _ssm_state(teacher, deployment),
        "memory": lambda: _sum(weight_memory, _kv_cache(teacher, deployment), _ssm_state(teacher, deployment)),
        "flops_per_token": lambda: _flops(teacher, deployment),
    }
    if latency is not None:
        found = latency
        known |= {
            "prefill_ms": lambda: lambda sizes: found.model_ms("prefill", teacher, sizes),
            "decode_ms": lambda: lambda sizes: found.model_ms("decode", teacher, sizes),
        }
    return {name: known[name]() for name in names}


def limits(target: BudgetConfig, teacher: ModelSpec) -> dict[str, float]:
    """The budgets as numbers for `measures`; a ratio becomes parameters, and the smaller of both counts."""
    found = target.budgets
    if "ratio" in found:
        share = int(Fraction(str(found.pop("ratio"))) * parameter_count(teacher))
        found = {"params": min(share, found.get("params", share)), **{k: v for k, v in found.items() if k != "params"}}
    return found


def _kv_cache(teacher: ModelSpec, deployment: DeploymentConfig) -> Measure:
    """Keys and values of layers with attention."""
    bits = 2 * deployment.batch_size * deployment.cache_bits
    keys = cached_keys(teacher, deployment.sequence_length)
    return lambda sizes: keys(sizes) * bits // 8


def _ssm_state(teacher: ModelSpec, deployment: DeploymentConfig) -> Measure:
    """What Mamba layers remember, however long the sequences are (arXiv:2405.21060, section 2)."""
    states, inputs = ShapeCount(state_size, teacher), ShapeCount(convolution_inputs, teacher)
    bits = deployment.state_dtype.bits, deployment.cache_bits
    return lambda sizes: deployment.batch_size * (states(sizes) * bits[0] + inputs(sizes) * bits[1]) // 8


def _sum(*parts: Measure) -> Measure:
    return lambda sizes: sum(part(sizes) for part in parts)


def _flops(teacher: ModelSpec, deployment: DeploymentConfig) -> Measure:
    """Two operations for every multiplied weight, four for every channel of a query and position attended to.

    Those are two for the score and two for the weighted sum. Local layers are counted as if they saw all positions.
    A number of a Mamba state takes four, two when the token enters it and two when it is read.
    """
    matrices, channels, states = (ShapeCount(count, teacher) for count in (matrix_count, query_channels, state_size))
    length = deployment.sequence_length
    return lambda sizes: 2 * matrices(sizes) + 4 * (length * channels(sizes) + states(sizes))


def describe(name: str, value: float) -> str:
    """A measure's value for people."""
    if name in ("weight_memory", "kv_cache", "ssm_state", "memory"):
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
