"""Model families: how each one names its weights and writes its config on the Hugging Face side."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.bamba import BAMBA
from nemo_minitron.arch.families.base import Family
from nemo_minitron.arch.families.dots1 import DOTS1
from nemo_minitron.arch.families.gemma import GEMMA, GEMMA3
from nemo_minitron.arch.families.llama import LLAMA
from nemo_minitron.arch.families.mistral import MISTRAL
from nemo_minitron.arch.families.mixtral import MIXTRAL
from nemo_minitron.arch.families.nemotron import NEMOTRON
from nemo_minitron.arch.families.nemotron_h import NEMOTRON_H
from nemo_minitron.arch.families.olmoe import OLMOE
from nemo_minitron.arch.families.phi3 import PHI3
from nemo_minitron.arch.families.qwen2 import QWEN2
from nemo_minitron.arch.families.qwen2_moe import QWEN2_MOE
from nemo_minitron.arch.families.qwen3 import QWEN3
from nemo_minitron.arch.families.qwen3_moe import QWEN3_MOE
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON, PHI3, GEMMA, GEMMA3),
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, DOTS1, OLMOE, NEMOTRON_H, BAMBA),
    )
}

_REASONS = {
    "gemma2": "it caps its final logits (final_logit_softcapping), which the losses fused with the output layer do not",
    "gemma3": "only the texts-only models (gemma3_text) are read, and this one sees pictures",
}


def family_named(name: str) -> Family:
    """The family with a name.

    Raises:
        SpecError: There is none.
    """
    if name not in FAMILIES:
        raise SpecError(f"model family {name!r} is not known", rule=f"one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def family_of_hf_config(config: dict[str, object]) -> Family:
    """The family a Hugging Face `config.json` belongs to.

    Raises:
        SpecError: No family claims its `model_type`.
    """
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind == family.hf_model_type:
            return family
    known = ", ".join(sorted(family.hf_model_type for family in FAMILIES.values()))
    why = f": {_REASONS[kind]}" if isinstance(kind, str) and kind in _REASONS else ""
    raise SpecError(f"config.json: model_type = {kind!r} is not supported{why}", rule=f"one of {known}")


def nearest_family(spec: ModelSpec) -> str:
    """The name of the first family that computes a model, for formats that do not name one.

    Where none does, the nearest: the model can be pruned, trained and saved, and export to Hugging Face says what
    stands in the way.
    """
    return min(FAMILIES.values(), key=lambda family: len(family.objections(spec))).name


def recorded_family(ours: Mapping[str, Any], spec: ModelSpec) -> str:
    """The family that our own section of a checkpoint names, as older ones did inside `spec`; else the nearest.

    Args:
        ours: The section: `minitron` of a NeMo-1 configuration, or `minitron.json`.
        spec: The architecture.

    Raises:
        SpecError: There is no family of that name.
    """
    older = ours.get("spec")
    found = ours.get("family") or (older.get("family") if isinstance(older, Mapping) else None)
    return family_named(str(found)).name if found else nearest_family(spec)


__all__ = ["FAMILIES", "Family", "family_named", "family_of_hf_config", "nearest_family", "recorded_family"]
