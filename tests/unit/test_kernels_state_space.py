"""The branch of a GPU with mamba-ssm and causal-conv1d, taken with stand-ins of their signatures."""

import sys
from collections.abc import Iterator

import pytest
import torch

from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.kernels import state_space as kernels
from nemo_minitron.megatron import mamba, runtime
from nemo_minitron.megatron.build import build_chunks
from tests.support import mamba_kernels
from tests.support.mamba_kernels import CALLS

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


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, module in mamba_kernels.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    kernels._are_installed.cache_clear()
    CALLS.clear()
    yield
    kernels._are_installed.cache_clear()


def test_kernels_run_on_a_gpu_that_has_both_libraries(
    libraries: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernels.run(torch.device("cuda"), torch.bfloat16, taps=4)
    assert not kernels.run(torch.device("cuda"), torch.float32, taps=4), "their products would be TF32"
    assert not kernels.run(torch.device("cuda"), torch.bfloat16, taps=5)
    assert not kernels.run(torch.device("cpu"), torch.bfloat16, taps=4)
    monkeypatch.setenv("NEMO_MINITRON_TRITON", "0")
    assert not kernels.run(torch.device("cuda"), torch.bfloat16, taps=4)
    monkeypatch.delenv("NEMO_MINITRON_TRITON")
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    kernels._are_installed.cache_clear()
    caplog.clear()
    for _ in range(2):
        assert not kernels.run(torch.device("cuda"), torch.bfloat16, taps=4)
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
        monkeypatch.setattr(mamba.kernels, "run", lambda device, dtype, *, taps: True)
        found = mixer(x)[0]
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
    finally:
        runtime.stop()
    assert CALLS == ["convolution", "scan by 4"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
