"""Sizes that differ from layer to layer: the choice with the least sum of block losses within the budgets.

A block loss is what the complete model loses when one layer alone takes a smaller form. Losses of several layers are
taken to add up, as Puzzle does (arXiv:2411.19146, section 4); the choice is then a linear program over zeros and ones.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from math import ceil, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.arch.axes import LAYER_AXES, PrunableAxis, outer_axis
from nemo_minitron.arch.layer import PARTS, LayerSpec
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sizes import LayerwiseConfig, TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.measures import Measure, describe
from nemo_minitron.search.space import Space

Variant = LayerSpec | None
"""The sizes that a layer may take; None for a layer that goes."""


def layer_variants(
    layerwise: LayerwiseConfig, target: TargetConfig, layer: LayerSpec, parallel: ParallelConfig
) -> list[Variant]:
    """The forms of a layer, the unchanged one first.

    Sizes are rounded to what divides by the tensor-parallel sizes and by `target.multiple_of`.
    """
    shared = lcm(parallel.tensor, target.deployment.tensor_parallel)
    chosen = [row for row in reversed(LAYER_AXES) if hasattr(layerwise, row.size)]

    def wanted(row: PrunableAxis) -> list[int]:
        multiple = lcm(shared, getattr(target.multiple_of, row.size))
        return _sizes(getattr(layerwise, row.size), layer.size(row), multiple)

    sized = {layer: None}
    for counts in product(*map(wanted, chosen)):
        sizes = {row.size: count for row, count in zip(chosen, counts, strict=True)}
        for row in LAYER_AXES:
            if (outer := outer_axis(row)) is not None and outer.size in sizes:  # as many in each as before
                sizes[row.size] = sizes[outer.size] * (layer.size(row) // layer.size(outer))
        sized[layer.with_sizes(**sizes)] = None
    parts = {form.without(part): None for form in sized for part in PARTS} if layerwise.drop_parts else {}
    return [*sized, *parts, *([None] if layerwise.drop else [])]


def _sizes(wanted: Sequence[int | float], size: int, multiple: int) -> list[int]:
    sizes = [ceil(each * size / multiple - 0.5) * multiple if isinstance(each, float) else each for each in wanted]
    return [min(max(each, multiple), size) for each in sizes]


def layer_costs(
    space: Space, variants: Sequence[Variant], measured: Mapping[str, Measure], limits: Mapping[str, float]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """What each layer adds to every budget's measure in each form `[layers, forms]`, and what a model has besides.

    A part that a form lacks counts as one of size 0, which still has its norm. Measures count the teacher's global
    layers first and then the local ones, which hold fewer positions in the KV cache: a layer costs what one of its kind
    adds.

    Args:
        space: The teacher's; its hidden size stays.
        variants: Forms of a layer.
        measured: By name of the budget; linear in the numbers of global and of local layers.
        limits: Which of them count.
    """
    is_local = [layer.local for layer in space.teacher.layers]
    before = {local: is_local.count(False) if local else 0 for local in set(is_local)}
    unchanged = next(form for form in variants if form is not None)
    costs: dict[str, NDArray[np.float64]] = {}
    fixed: dict[str, float] = {}
    for name in limits:

        def cost(form: Variant, layers: int, name: str = name) -> float:
            if form is None:
                return 0.0
            less, more = (float(measured[name](_shape(space, layers + count, form))) for count in (0, 1))
            return more - less

        by_kind = {local: [cost(form, layers) for form in variants] for local, layers in before.items()}
        costs[name] = np.array([by_kind[local] for local in is_local])
        fixed[name] = float(measured[name](_shape(space, 0, unchanged)))
    return costs, fixed


def _shape(space: Space, layers: int, form: LayerSpec) -> tuple[int, ...]:
    sizes = {**form.sizes, "num_layers": layers, "hidden_size": space.teacher.hidden_size}
    return tuple(sizes.get(axis.key, 0) for axis in space.axes)


def choose_layers(
    losses: NDArray[np.float64],
    costs: Mapping[str, NDArray[np.float64]],
    limits: Mapping[str, float],
    *,
    dropped: int | None = None,
    least_layers: int = 1,
) -> list[int]:
    """Which form each layer takes.

    Args:
        losses: Block losses `[layers, forms]`, nats per token.
        costs: For each budget, what each layer costs in each form `[layers, forms]`; `[forms]` if layers are alike.
        limits: For each budget, what all layers together may cost.
        dropped: The form that stands for a layer that goes; None if there is none.
        least_layers: Layers that must stay.

    Raises:
        SearchError: Even the cheapest forms exceed a budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    layers, forms = losses.shape
    one_each = kron(eye_array(layers), np.ones((1, forms)))
    constraints: list[Any] = [LinearConstraint(csr_array(one_each), 1, 1)]
    by_layer = {name: np.broadcast_to(cost, losses.shape) for name, cost in costs.items()}
    for name, cost in by_layer.items():
        # Scaled to the limit, so that bytes and parameters are numbers of one size.
        scale = max(limits[name], 1.0)
        constraints.append(LinearConstraint(cost.ravel()[None] / scale, -np.inf, limits[name] / scale))
    if dropped is not None:
        is_dropped = np.tile(np.arange(forms) == dropped, layers).astype(float)
        constraints.append(LinearConstraint(is_dropped[None], 0, layers - least_layers))
    found = milp(
        losses.ravel(),
        constraints=constraints,
        integrality=np.ones(layers * forms),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        smallest = {name: float(cost.min(axis=1).sum()) for name, cost in by_layer.items()}
        told = "; ".join(
            f"{name}: at least {describe(name, smallest[name])} of {describe(name, limits[name])}" for name in costs
        )
        raise SearchError(
            f"no choice of layers fits the budgets ({told}, embeddings left aside)",
            rule="the cheapest form of every layer stays within each of them",
            remedy="allow smaller forms in search.layerwise",
        )
    return [int(form) for form in found.x.reshape(layers, forms).argmax(axis=1)]
