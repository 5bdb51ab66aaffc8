"""Where the parameters of experts, as classes of transformers hold them, lie in a Hugging Face folder.

A class has all experts of a layer in two parameters, `[experts, rows, columns]`; a folder has a tensor for each
projection of each expert, Mixtral's under other names. Nemotron's experts have no gate.
"""

import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor

_EXPERTS = re.compile(
    r"(?P<layer>.+)\.(?P<block>mlp|mixer)\.(?P<what>gate\.weight|experts\.(?:gate_up_proj|up_proj|down_proj))"
)
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "mlp": {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)},
    "mixer": {"experts.up_proj": ("up_proj",), "experts.down_proj": ("down_proj",)},
    "block_sparse_moe": {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)},
}


def parameter(name: str, stored: Collection[str], read: Callable[[str], Tensor]) -> Tensor:
    """A parameter of a class of transformers, from the tensors of a folder.

    Args:
        name: Of the parameter.
        stored: Names of the folder's tensors.
        read: Reads one of those.

    Raises:
        KeyError: The folder does not have it.
    """
    found = _EXPERTS.fullmatch(name)
    if name in stored or found is None:
        return read(name)
    block = "block_sparse_moe" if f"{found['layer']}.block_sparse_moe.gate.weight" in stored else found["block"]
    prefix = f"{found['layer']}.{block}"
    if found["what"] == "gate.weight":
        return read(f"{prefix}.gate.weight")
    parts = _NAMES[block][found["what"]]
    experts: list[Tensor] = []
    while f"{prefix}.experts.{len(experts)}.{parts[0]}.weight" in stored:
        at = f"{prefix}.experts.{len(experts)}"
        experts.append(torch.cat([read(f"{at}.{part}.weight") for part in parts]))
    if not experts:
        raise KeyError(name)
    return torch.stack(experts)
