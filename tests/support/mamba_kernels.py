"""mamba-ssm's and causal-conv1d's kernels in plain torch, under their names and signatures."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

CALLS: list[str] = []
"""What has been called."""


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """`[batch, channels, positions]`, weight `[channels, taps]`, as the library's page says."""
    CALLS.append("convolution")
    assert activation == "silu"
    channels, taps = weight.shape
    assert x.is_contiguous()
    assert 2 <= taps <= 4
    found = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=channels)
    return torch.nn.functional.silu(found[..., : x.shape[-1]])


def mamba_chunk_scan_combined(  # noqa: PLR0917 - the library's signature
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    return_final_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """`x [b, s, h, p]`, `dt [b, s, h]`, `A [h]`, `B` and `C [b, s, g, n]`; a position after the other."""
    CALLS.append(f"scan by {chunk_size}")
    assert return_final_states
    each = x.shape[2] // B.shape[2]
    b, c = (maps.repeat_interleave(each, dim=2) for maps in (B, C))
    state, found = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]), []
    for at in range(x.shape[1]):
        decay = torch.exp(dt[:, at] * A)[..., None, None]
        state = decay * state + (dt[:, at, :, None] * x[:, at])[..., None] * b[:, at, :, None]
        found.append((state * c[:, at, :, None]).sum(-1))
    return torch.stack(found, 1), state


def modules() -> dict[str, ModuleType]:
    """The libraries' modules, by name, with these kernels."""
    found: dict[str, ModuleType] = {}
    kernels = {"causal_conv1d": causal_conv1d_fn, "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined}
    for path, kernel in kernels.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            module.__spec__ = ModuleSpec(module.__name__, None)
            module.__path__ = []
            found[module.__name__] = module
        setattr(found[path], kernel.__name__, kernel)
    return found


def install() -> None:
    """Let this process import them, to stay so."""
    sys.modules.update(modules())
    CALLS.clear()
