"""One plan that suits every tiny family."""

from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.pruning.plan import PruningPlan
from tests.support.plans import layer_plan

HIDDEN, FFN, HEADS, SIZE = 64, 96, 8, 16


def plan_for(source: TensorSource) -> PruningPlan:
    """Hidden 48, 3 groups of 2 heads, other ones in each layer, FFN 50, and all layers but the second."""
    layers = []
    for index in (0, 2, 3):
        groups = ((0, 1, 3), (), (1, 2, 3), (0, 2, 3))[index]
        heads = tuple(head for group in groups for head in (2 * group, 2 * group + 1))
        layers.append(layer_plan(source=index, kv_groups=groups, heads=heads, ffn=tuple(range(index, 50 + index))))
    hidden = tuple(channel for channel in range(HIDDEN) if channel % 4 != 1)
    return PruningPlan(spec=source.spec, hidden=hidden, layers=tuple(layers))
