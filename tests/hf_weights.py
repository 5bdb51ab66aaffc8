"""A transformers model's weights in Megatron's packing, put together here without the package's own packing code."""

import torch

from nemo_minitron.arch.families import family_named
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights


def canonical_weights(state: dict[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Canonical name to tensor, for every row of the weight table."""
    names = family_named(spec.family).hf_names
    packed = {}
    for weight in weights(spec):
        parts = [state[name.format(i=weight.layer)] for name in names[weight.row.name]]
        if len(parts) == 3:
            groups = spec.layers[weight.layer].num_query_groups
            parts = [torch.cat([part.chunk(groups)[group] for part in parts]) for group in range(groups)]
        packed[weight.name] = torch.cat(parts)
    return packed
