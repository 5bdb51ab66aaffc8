"""Model families: how each one names its weights and writes its config on the Hugging Face side."""

from nemo_minitron.arch.families.base import Family
from nemo_minitron.arch.families.llama import LLAMA
from nemo_minitron.arch.families.mistral import MISTRAL
from nemo_minitron.arch.families.qwen2 import QWEN2
from nemo_minitron.errors import SpecError

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2)}


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
    for family in FAMILIES.values():
        if config.get("model_type") == family.hf_model_type:
            return family
    known = ", ".join(sorted(family.hf_model_type for family in FAMILIES.values()))
    raise SpecError(f"config.json: model_type = {config.get('model_type')!r} is not supported", rule=f"one of {known}")


__all__ = ["FAMILIES", "Family", "family_named", "family_of_hf_config"]
