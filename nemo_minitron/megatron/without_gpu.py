"""Libraries of GPU kernels, kept out of Megatron-Core where there is no GPU to run them.

Megatron-Core takes its optimizer, its sums over many tensors and parts of its blocks from Transformer Engine or Apex
wherever they can be imported, without asking for a GPU. In a container that has them, on a node without a card (or with
CUDA_VISIBLE_DEVICES empty), building a model or an optimizer then ends with "Found no NVIDIA driver".
"""

import sys
from typing import Any

KERNEL_LIBRARIES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
_MEGATRON = "megatron.core"


class _BeforeMegatron:
    """An import hook that finds nothing; when Megatron-Core is looked for it loads torch, and hides the libraries."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Called by Python's import system for every module that is not loaded."""
        if name == _MEGATRON:
            sys.meta_path.remove(self)
            _hide()


def hide_kernel_libraries() -> None:
    """Have imports of these libraries fail, as on a machine that lacks them, from when Megatron-Core is imported.

    Nothing changes where CUDA is available then, or where Megatron-Core has been imported already and has made its
    choice. A library that somebody has imported stays.
    """
    if _MEGATRON not in sys.modules and not any(isinstance(hook, _BeforeMegatron) for hook in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMegatron())


def _hide() -> None:
    import torch

    if torch.cuda.is_available():
        return
    for name in KERNEL_LIBRARIES:
        if sys.modules.get(name) is None:
            # Python's own mark of a module that cannot be imported.
            sys.modules[name] = None  # type: ignore[assignment]
