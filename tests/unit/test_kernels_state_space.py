"""The branch of a GPU with mamba-ssm and causal-conv1d, taken with stand-ins of their signatures."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.kernels import state_space as kernels
from nemo_minitron.megatron import mamba, runtime
from nemo_minitron.megatron.build import build_chunks

SPEC = ModelSpec(
    vocab_size=32,
    hidden_size=16,
    head_dim=8,
    layers=(
        LayerSpec(
            mixer=Mamba(mamba_num_heads=4, mamba_head_dim=6, mamba_state_dim=5, mamba_num_groups=2, chunk_size=4),
            feed_forward=None,
        ),
    ),
    max_position_embeddings=32,
    rotary_percent=0.0,
)
CALLS: list[str] = []


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


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = {"causal_conv1d": "causal_conv1d_fn", "mamba_ssm.ops.triton.ssd_combined": "mamba_chunk_scan_combined"}
    for path, name in names.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            module.__spec__ = ModuleSpec(module.__name__, None)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(sys.modules[path], name, globals()[name])
    kernels._are_installed.cache_clear()
    CALLS.clear()
    yield
    kernels._are_installed.cache_clear()


def test_kernels_run_on_a_gpu_that_has_both_libraries(
    libraries: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernels.run(torch.device("cuda"), taps=4)
    assert not kernels.run(torch.device("cuda"), taps=5)
    assert not kernels.run(torch.device("cpu"), taps=4)
    monkeypatch.setenv("NEMO_MINITRON_TRITON", "0")
    assert not kernels.run(torch.device("cuda"), taps=4)
    monkeypatch.delenv("NEMO_MINITRON_TRITON")
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    kernels._are_installed.cache_clear()
    caplog.clear()
    for _ in range(2):
        assert not kernels.run(torch.device("cuda"), taps=4)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["Mamba's scan and convolution run in plain torch: causal-conv1d not installed"]


def test_a_mixer_is_the_same_with_them(libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = runtime.start(ParallelConfig(), seed=0)
    try:
        (chunk,) = build_chunks(SPEC, here, Precision.FP32, seed=0)
        mixer = chunk.decoder.layers[0].self_attention
        x = torch.randn(11, 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        expected = mixer(x)[0]
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        monkeypatch.setattr(mamba.kernels, "run", lambda device, *, taps: True)
        found = mixer(x)[0]
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    finally:
        runtime.stop()
    assert CALLS == ["convolution", "scan by 4"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
