"""Time the parts of a model on the device at hand, for a latency table."""

import random
import time
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nemo_minitron.arch.axes import size_divisor
from nemo_minitron.kernels import state_space as kernels
from nemo_minitron.ops.state_space import causal_convolution, gated_group_norm, state_space_scan
from nemo_minitron.processor import processor_name
from nemo_minitron.search.axes import place_of, sizes_of
from nemo_minitron.search.latency import (
    PART_AXES,
    PHASES,
    Conditions,
    LatencyTable,
    parts_of,
)
from nemo_minitron.search.space import Space

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIMED = tuple(_DTYPES)
_SECONDS = 0.25
"""Of repetitions of one point, after the first; the shortest counts, which other work disturbs least."""
_LEAST, _MOST = 3, 200
_SCAN_CHUNK = 128
_MULTIPLES = {"hidden": 16, "ffn": 16}


def device_name() -> str:
    """The device that this process computes on: the GPU's name, or the processor's with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} thread(s)"


def grid_of(space: Space, points: int = 4) -> dict[str, list[int]]:
    """Points that a space is timed at: evenly many from the smallest to the teacher's size."""
    ends = sizes_of(space.teacher)
    low, high = ([values[end] for values in space.values] for end in (0, -1))
    found = {}
    for place, axis in enumerate(space.axes):
        if axis.row.timed and (outer := size_divisor(axis.row)) is None:
            found[axis.row.timed] = _between(low[place], ends[place], points)
        elif axis.row.timed and outer is not None and (other := place_of(space.axes, outer.axis)) is not None:
            most = ends[place] // ends[other]
            found[axis.row.timed] = _between(max(1, min(low[place] // high[other], most)), most, points)
    return found


def _between(low: int, high: int, points: int) -> list[int]:
    step = (high - low) / (points - 1)
    return sorted({round(low + step * index) for index in range(points)} | {low, high})


def time_table(
    conditions: Conditions,
    grid: dict[str, list[int]],
    *,
    heldout: int = 12,
    timed: Callable[[], None] = lambda: None,
) -> LatencyTable:
    """Time every point of the grid, then shapes between them to see how far interpolation is off.

    Args:
        conditions: What for; the device is this one.
        grid: See `LatencyTable`.
        heldout: Shapes of each part and phase that the error is measured on.
        timed: Called after each of `points_of(grid)`.
    """
    bench = _Bench(conditions)
    found: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
    for phase, part, point in points_of(grid):
        found[phase].setdefault(part, []).append(bench.milliseconds(phase, part, point))
        timed()
    for phase, part in product(PHASES, parts_of(grid)):
        shape = [len(points) for points in _axes(part, grid).values()]
        found[phase][part] = torch.tensor(found[phase][part], dtype=torch.float64).view(shape).tolist()
    table = LatencyTable(conditions=conditions, grid=grid, milliseconds=found, error={})
    return LatencyTable(
        conditions=conditions, grid=grid, milliseconds=found, error=heldout_error(table, bench.milliseconds, heldout)
    )


def points_of(grid: dict[str, list[int]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Everything that a table times: phase, part, and sizes."""
    return [
        (phase, part, point)
        for phase in PHASES
        for part in parts_of(grid)
        for point in product(*_axes(part, grid).values())
    ]


def heldout_error(
    table: LatencyTable, milliseconds: Callable[[str, str, Sequence[int]], float], count: int
) -> dict[str, float]:
    """Relative error of interpolated layers on shapes between the table's points.

    Args:
        table: What is checked.
        milliseconds: Times one part; see `time_table`.
        count: Shapes of each phase; each is one of every part but the output layer.
    """
    rng = random.Random(0)
    errors = []
    for phase in PHASES:
        for _ in range(count):
            shape = {name: _inside(rng, table.grid[name], _MULTIPLES.get(name, 1)) for name in table.grid}
            names = {part: PART_AXES[part] for part in parts_of(table.grid) if part != "head"}
            parts = {part: [shape[name] for name in axes] for part, axes in names.items()}
            timed = sum(milliseconds(phase, part, point) for part, point in parts.items())
            expected = sum(float(table.part_ms(phase, part, point)) for part, point in parts.items())
            errors.append(abs(expected - timed) / timed)
    return {"median": median(errors), "max": max(errors), "shapes": float(len(errors))}


def _inside(rng: random.Random, points: list[int], multiple: int) -> int:
    """A size between two points of a grid, as far from both as it may be."""
    index = rng.randrange(max(len(points) - 1, 1))
    low, high = points[index], points[min(index + 1, len(points) - 1)]
    middle = round((low + high) / 2 / multiple) * multiple
    return min(max(middle, low), high)


def _axes(part: str, grid: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: grid[name] for name in PART_AXES[part]}


class _Bench:
    """Runs one part of a layer with random weights."""

    def __init__(self, conditions: Conditions) -> None:
        self._told = conditions
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = _DTYPES[conditions.dtype]

    @torch.no_grad()
    def milliseconds(self, phase: str, part: str, point: Sequence[int]) -> float:
        """The shortest of several runs."""
        tokens = self._told.sequence_length if phase == "prefill" else 1
        builders: dict[str, Callable[..., Callable[[], Tensor]]] = {
            "attention": self._attention,
            "mlp": self._mlp,
            "mamba": self._mamba,
            "head": self._head,
        }
        work = builders[part](tokens, *point)
        self._once(work)
        best, spent, runs = float("inf"), 0.0, 0
        while runs < _LEAST or (spent < _SECONDS and runs < _MOST):
            seconds = self._once(work)
            best, spent, runs = min(best, seconds), spent + seconds, runs + 1
        return 1e3 * best

    def _once(self, work: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def _tensor(self, *shape: int) -> Tensor:
        scale: float = shape[-1] ** -0.5
        return torch.randn(shape, device=self._device, dtype=self._dtype) * scale

    def _mlp(self, tokens: int, hidden: int, ffn: int) -> Callable[[], Tensor]:
        gated = self._told.gated
        x, norm = self._tensor(self._told.batch_size, tokens, hidden), self._tensor(hidden)
        first, second = self._tensor((1 + gated) * ffn, hidden), self._tensor(hidden, ffn)

        def work() -> Tensor:
            inner = F.linear(F.rms_norm(x, (hidden,), norm), first)
            if gated:
                gate, up = inner.chunk(2, dim=-1)
                inner = F.silu(gate) * up
            else:
                inner = F.relu(inner).square()
            return x + F.linear(inner, second)

        return work

    def _attention(self, tokens: int, hidden: int, groups: int, ratio: int) -> Callable[[], Tensor]:
        batch, width, length = self._told.batch_size, self._told.head_dim, self._told.sequence_length
        heads = groups * ratio
        x, norm = self._tensor(batch, tokens, hidden), self._tensor(hidden)
        qkv, out = self._tensor((heads + 2 * groups) * width, hidden), self._tensor(hidden, heads * width)
        cache = [self._tensor(batch, groups, length, width) for _ in range(2)]

        def work() -> Tensor:
            fused = F.linear(F.rms_norm(x, (hidden,), norm), qkv).view(batch, tokens, heads + 2 * groups, width)
            query, key, value = torch.split(fused.transpose(1, 2), [heads, groups, groups], dim=1)
            for place, new in zip(cache, (key, value), strict=True):
                place[:, :, -tokens:] = new
            key, value = cache
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, enable_gqa=ratio > 1)
            return x + F.linear(mixed.transpose(1, 2).reshape(batch, tokens, heads * width), out)

        return work

    def _mamba(self, tokens: int, hidden: int, groups: int, ratio: int, channels: int) -> Callable[[], Tensor]:
        """A mixer in the form of `ops.state_space`, or of mamba-ssm's kernels; one token goes on from a state."""
        batch, width, taps = self._told.batch_size, self._told.state_size, self._told.conv_kernel
        heads = groups * ratio
        inner, maps = heads * channels, groups * width
        x, norm, inner_norm = self._tensor(batch, tokens, hidden), self._tensor(hidden), self._tensor(inner)
        first, second = self._tensor(2 * inner + 2 * maps + heads, hidden), self._tensor(hidden, inner)
        convolution, bias = self._tensor(inner + 2 * maps, taps), self._tensor(inner + 2 * maps)
        window, decay = self._tensor(batch, taps - 1, inner + 2 * maps), -self._tensor(heads).abs().float()
        before = self._tensor(batch, heads, channels, width).float()
        fast = tokens > 1 and kernels.run(self._device, x.dtype, taps=taps)
        convolve = kernels.causal_convolution if fast else causal_convolution

        def work() -> Tensor:
            projected = F.linear(F.rms_norm(x, (hidden,), norm), first)
            gate, seen, steps = torch.split(projected, [inner, inner + 2 * maps, heads], dim=-1)
            seen = seen if tokens > 1 else torch.cat([window, seen], dim=1)
            convolved = convolve(seen, convolution, bias)[:, -tokens:]
            values, b, c = torch.split(convolved, [inner, maps, maps], dim=-1)
            values, steps = values.reshape(batch, tokens, heads, channels), F.softplus(steps.float())
            b, c = (each.reshape(batch, tokens, groups, width) for each in (b, c))
            if fast:
                scanned = kernels.scan(values, steps, decay, b, c, chunk=_SCAN_CHUNK).output
            else:
                state = None if tokens > 1 else before
                scanned = state_space_scan(values, steps, decay, b, c, chunk=_SCAN_CHUNK, state_BHPN=state).output
            mixed = gated_group_norm(scanned.flatten(2), gate, inner_norm, groups=groups, eps=1e-5)
            return x + F.linear(mixed.to(x.dtype), second)

        return work

    def _head(self, tokens: int, hidden: int) -> Callable[[], Tensor]:
        """The output layer of the last position, which is the one that a new token follows from."""
        x, weight = self._tensor(self._told.batch_size, hidden), self._tensor(self._told.vocab_size, hidden)
        return lambda: F.linear(x, weight)
