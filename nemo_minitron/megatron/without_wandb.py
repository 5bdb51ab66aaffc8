"""wandb, kept out of Megatron-Core, which imports it wherever it is installed and uses it in its inference server.

Importing wandb takes half a second and makes two folders in the system's temporary folder, which a killed process
leaves there. Whoever asks for it (Lightning's logger) gets it as always.
"""

import sys
from types import FrameType
from typing import Any

_LIBRARY = "wandb"
_MEGATRON = "megatron.core"


class _NotForMegatron:
    """An import hook that finds nothing; it refuses one library to the modules of Megatron-Core."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called by Python's import system for every module that is not loaded.

        Raises:
            ModuleNotFoundError: Megatron-Core imports wandb. It goes on without, as on a machine that lacks it.
        """
        if name == _LIBRARY and _importer(sys._getframe(1)).startswith(_MEGATRON):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide_wandb() -> None:
    """Have Megatron-Core's imports of wandb fail from now on, unless somebody has imported it already."""
    if not any(isinstance(hook, _NotForMegatron) for hook in sys.meta_path):
        sys.meta_path.insert(0, _NotForMegatron())


def _importer(frame: FrameType | None) -> str:
    """The module whose import statement this is: the first outside of Python's import system."""
    while frame is not None and (name := str(frame.f_globals.get("__name__"))).startswith("importlib."):
        frame = frame.f_back
    return "" if frame is None else name
