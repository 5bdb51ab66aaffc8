"""Where the Triton forms run. Importing this module loads no Triton; the others are imported only where it says yes."""

import os
from functools import cache
from importlib.util import find_spec

import torch

SWITCH = "NEMO_MINITRON_TRITON"
"""Environment variable; 0 takes the torch operations on a GPU, too (for a machine whose Triton does not work)."""


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether logits of this dtype on this device take the Triton form.

    They do on a GPU that has Triton, and on a CPU under Triton's interpreter (`TRITON_INTERPRET=1`), which exists for
    tests. `meta` stands for a GPU, so that launches can be counted without one. The kernels sum in float32: float64
    logits take torch's operations everywhere.
    """
    if dtype == torch.float64 or os.environ.get(SWITCH) == "0" or not _has_triton():
        return False
    return device.type in {"cuda", "meta"} or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
