"""Names and tensors as classes of transformers 5 hold them in memory, in the place of those of published models.

`model.layers.{i}.mlp.experts.gate_up_proj` is `[experts, 2 * neurons, hidden]`, gate rows before up rows, and
`...mlp.experts.down_proj` `[experts, hidden, neurons]`; Nemotron 3 has `mixer.experts.up_proj`, `[experts, neurons,
hidden]`, in the place of the first. transformers writes them so with `save_original_format=False`; by default it writes
one tensor for each projection of each expert, and reads both.
"""

import re
from dataclasses import replace

from nemo_minitron.arch.families import Family
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.checkpoints.hf_weights import Place

_FUSED = re.compile(r"^\w+\.layers\.(\d+)\.(?:mlp|mixer)\.experts\.(gate_up_proj|up_proj|down_proj)$")
_GATE = re.compile(r"^model\.layers\.(\d+)\.mlp\.gate\.weight$")
_ROUTER = LAYER_PREFIX + "mlp.router.weight"
_EXPERT = LAYER_PREFIX + "mlp.experts.local_experts.{e}."
_EMBEDDING = "embedding.word_embeddings.weight"
_INNER = "model."
"""What names of decoders begin with inside classes."""


def use_published_prefix(places: dict[str, Place], family: Family) -> None:
    """Put the beginning that a family's published names have in the place of `model.`, where none begins so.

    Args:
        places: Tensors by their names; changed.
        family: How published names are.
    """
    prefix = family.hf_names[_EMBEDDING][0].partition(".")[0] + "."
    if prefix == _INNER or any(name.startswith(prefix) for name in places):
        return
    for name in [name for name in places if name.startswith(_INNER)]:
        places[prefix + name.removeprefix(_INNER)] = places.pop(name)


def split_fused_experts(places: dict[str, Place], family: Family, spec: ModelSpec) -> None:
    """Put one name for each projection of each expert in the place of fused tensors, each a part of what is stored.

    Tensors whose shape does not fit are left as they are; the check of names and shapes tells of them.

    Args:
        places: Tensors by their names; changed.
        family: How the names without fusion are.
        spec: The architecture.
    """
    for name in list(places):
        if (found := _FUSED.match(name)) and _fits(places[name], spec, int(found[1]), found[2]):
            _split(places, name, int(found[1]), found[2], family)
        elif (found := _GATE.match(name)) and (own := family.hf_names[_ROUTER][0].format(i=found[1])) not in places:
            places[own] = places.pop(name)


def _fits(place: Place, spec: ModelSpec, layer: int, kind: str) -> bool:
    if layer >= spec.num_layers or not spec.layers[layer].has_experts:
        return False
    experts = spec.layers[layer].moe
    neurons = experts.expert_ffn_hidden_size
    rows = {"gate_up_proj": 2 * neurons, "up_proj": neurons}
    inner = (rows[kind], spec.hidden_size) if kind in rows else (spec.hidden_size, neurons)
    return tuple(place.entry.shape) == (experts.num_experts, *inner)


def _split(places: dict[str, Place], name: str, layer: int, kind: str, family: Family) -> None:
    fused = places.pop(name)
    experts, rows, _ = fused.entry.shape
    row = _EXPERT + ("linear_fc2.weight" if kind == "down_proj" else "linear_fc1.weight")
    parts = family.hf_names[row]
    height = rows // len(parts)
    for expert in range(experts):
        for number, part in enumerate(parts):
            place = replace(fused, part=(expert, number * height, (number + 1) * height))
            places[part.format(i=layer, e=expert)] = place
