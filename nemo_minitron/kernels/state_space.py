"""The convolution and the scan of `ops.state_space` by causal-conv1d's and mamba-ssm's kernels, where they are."""

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from nemo_minitron.kernels.available import SWITCH
from nemo_minitron.ops.state_space import Scan

_log = logging.getLogger(__name__)
_LIBRARIES = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}

_DTYPES = (torch.bfloat16, torch.float16)
TAPS = range(2, 5)
"""Taps of a convolution that causal-conv1d has a kernel for."""


def run(device: torch.device, dtype: torch.dtype, *, taps: int) -> bool:
    """Whether a mixer on a device takes these forms: it is a GPU, and both libraries are there and have kernels.

    In fp32 plain torch computes, since the kernels would multiply in TF32. Where a library is missing, a process says
    so once, and plain torch computes the same.
    """
    able = device.type == "cuda" and dtype in _DTYPES and taps in TAPS
    return able and os.environ.get(SWITCH) != "0" and _are_installed()


def causal_convolution(x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """As `ops.state_space.causal_convolution`."""
    kernel = import_module("causal_conv1d").causal_conv1d_fn
    found: Tensor = kernel(x_BSC.transpose(1, 2).contiguous(), weight_CK, bias_C, activation="silu")
    return found.transpose(1, 2)


def scan(x_BSHP: Tensor, dt_BSH: Tensor, a_H: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, *, chunk: int = 128) -> Scan:
    """As `ops.state_space.state_space_scan`, from a state of zero."""
    kernel = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    output, state = kernel(x_BSHP, dt_BSH, a_H, b_BSGN, c_BSGN, chunk_size=chunk, return_final_states=True)
    return Scan(output, state)


@cache
def _are_installed() -> bool:
    missing = [package for module, package in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        _log.warning("Mamba's scan and convolution run in plain torch: %s not installed", " and ".join(missing))
    return not missing
