"""What families share whose configuration has one size for all layers of a kind, while layers are of several kinds."""

from nemo_minitron.arch.layer import Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError


def shared_sizes(spec: ModelSpec, config: str) -> dict[str, int]:
    """Sizes by name that all layers of a kind share.

    Args:
        spec: The model.
        config: The class that has one size for each kind, for messages.

    Raises:
        SpecError: Layers of one kind differ.
    """
    found: dict[str, set[int]] = {}
    for layer in spec.layers:
        for name, size in layer.sizes.items():
            found.setdefault(name, set()).add(size)
    kinds = {mixer for layer in spec.layers if isinstance(mixer := layer.mixer, Mamba)}
    if differing := sorted(name for name, sizes in found.items() if len(sizes) > 1):
        raise SpecError(
            f"the model's layers differ in {', '.join(differing)}", rule=f"{config} has one size for each kind"
        )
    if len(kinds) > 1:
        raise SpecError("the model's Mamba layers differ", rule=f"{config} has one kind of Mamba layer")
    return {name: sizes.pop() for name, sizes in found.items()}


def first_mamba(spec: ModelSpec) -> Mamba | None:
    """The mixer of the first layer that has Mamba; None where none has."""
    return next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, Mamba)), None)
