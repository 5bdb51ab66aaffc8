"""A transformers model's weights in Megatron's packing, put together here without the package's own packing code."""

import torch

from nemo_minitron.arch.axes import Packing
from nemo_minitron.arch.families import Family
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights


def canonical_weights(state: dict[str, torch.Tensor], spec: ModelSpec, family: Family) -> dict[str, torch.Tensor]:
    """Canonical name to tensor, for every row of the weight table."""
    names = family.hf_names
    packed = {}
    for weight in weights(spec):
        parts = [state[name.format(i=weight.layer)] for name in names[weight.row.name]]
        if weight.row.packing is Packing.QKV:
            layer = spec.layers[weight.layer]
            groups = layer.attention.num_query_groups
            if len(parts) == 1:
                keys = groups * spec.head_dim
                parts = parts[0].split([layer.attention.num_attention_heads * spec.head_dim, keys, keys])
            parts = [torch.cat([part.chunk(groups)[group] for part in parts]) for group in range(groups)]
        packed[weight.name] = torch.cat(parts)
    return packed
