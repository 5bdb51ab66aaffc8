"""Libraries of GPU kernels, kept out of Megatron-Core where there is no GPU to run them.

Megatron-Core takes its optimizer, its sums over many tensors and parts of its blocks from Transformer Engine or Apex
wherever they can be imported, without asking for a GPU. In a container that has them, on a node without a card (or with
CUDA_VISIBLE_DEVICES empty), building a model or an optimizer then ends with "Found no NVIDIA driver".
"""

import sys

import torch

KERNEL_LIBRARIES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")


def hide_kernel_libraries() -> tuple[str, ...]:
    """Make imports of these libraries fail from now on, as on a machine that lacks them.

    Nothing changes where CUDA is available, or where Megatron-Core has been imported already and has made its choice. A
    library that somebody has imported stays.

    Returns:
        The libraries that are hidden now.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return ()
    absent = tuple(name for name in KERNEL_LIBRARIES if sys.modules.get(name) is None)
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of a module that cannot be imported
    return absent
