"""Norm, gate and attention of the local layer, against float64 references written with loops or by torch."""

import itertools
import math

import pytest
import torch

from nemo_minitron.megatron import functional
from nemo_minitron.megatron.functional import causal_attention, rms_norm, rotary_tables, swiglu
from nemo_minitron.megatron.hooks import fused_norm
from tests.support.emulation import gpu_branches
from tests.tolerances import TOL

GROUPS, HEADS, DIM = 2, 3, 8  # KV groups, query heads of a group, channels of a head


def angles(length: int, rotated: int = DIM) -> torch.Tensor:
    frequencies = 100.0 ** (-torch.arange(0, rotated, 2) / rotated)
    half = torch.outer(torch.arange(length).double(), frequencies.double())
    return torch.cat([half, half], dim=-1)[:, None, None]


def reference_attention(
    qkv: torch.Tensor, rotated: int, scale: float = 1 / math.sqrt(DIM), window: int = 10_000
) -> torch.Tensor:
    """One query at a time, pairs of channels turned as complex numbers."""
    length, batch, _ = qkv.shape
    x = qkv.reshape(length, batch, GROUPS, HEADS + 2, DIM)
    half = rotated // 2
    turns = torch.polar(torch.ones(length, half, dtype=torch.float64), angles(length, rotated)[:, 0, 0, :half])

    def turn(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(vector[..., :half], vector[..., half:rotated]) * turns[position]
        return torch.cat([pairs.real, pairs.imag, vector[..., rotated:]], dim=-1)

    rows = []
    for position in range(length):
        heads = []
        first = max(0, position - window + 1)
        for group in range(GROUPS):
            keys = torch.stack([turn(x[p, :, group, HEADS], p) for p in range(first, position + 1)])
            for head in range(HEADS):
                query = turn(x[position, :, group, head], position)
                weights = torch.softmax((keys * query).sum(-1) * scale, dim=0)
                heads.append((weights[..., None] * x[first : position + 1, :, group, HEADS + 1]).sum(0))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows)


def random_qkv(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(length, batch, GROUPS * (HEADS + 2) * DIM, generator=generator, dtype=torch.float64)
    return qkv.to(dtype).requires_grad_()


@pytest.mark.parametrize("rotated", [DIM, DIM // 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_and_its_gradient(dtype: torch.dtype, rotated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "QUERY_BLOCK", 4)  # several blocks, the last one shorter
    qkv = random_qkv(11, dtype=dtype)
    exact = qkv.detach().double().requires_grad_()
    tables = rotary_tables(angles(11, rotated), dtype)
    out = causal_attention(qkv, tables, groups=GROUPS, head_dim=DIM)
    expected = reference_attention(exact, rotated)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out.backward(grad.to(dtype))
    expected.backward(grad)
    # bf16 rounds the products inside the gradient twice more.
    loose = {"rtol": 3e-2, "atol": 3e-2} if dtype is torch.bfloat16 else TOL[dtype]
    torch.testing.assert_close(out.double(), expected, **loose)
    torch.testing.assert_close(qkv.grad.double(), exact.grad, **loose)


@pytest.mark.parametrize("window", [1, 3, 6, 10, 11, 12])
def test_attention_in_a_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows shorter and longer than a block of queries, and than the sequence; another scale besides."""
    monkeypatch.setattr(functional, "QUERY_BLOCK", 4)
    qkv = random_qkv(11)
    exact = qkv.detach().clone().requires_grad_()
    how = {"groups": GROUPS, "head_dim": DIM, "scale": 0.7, "window": window}
    out = causal_attention(qkv, rotary_tables(angles(11), torch.float64), **how)
    expected = reference_attention(exact, DIM, scale=0.7, window=window)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, **TOL[torch.float64])
    torch.testing.assert_close(qkv.grad, exact.grad, **TOL[torch.float64])


STARTS = ((0, 4, 5, 10), (0, 7))
"""Where documents begin in two samples of 13; blocks of 4 queries."""


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_stops_at_the_borders_of_documents(dtype, window, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the reference does on each document alone, gradients too; without a graph and in its GPU form besides."""
    monkeypatch.setattr(functional, "QUERY_BLOCK", 4)
    qkv = random_qkv(13, dtype=dtype)
    exact = qkv.detach().double().requires_grad_()
    cos, sin = rotary_tables(angles(13), dtype)
    positions = torch.zeros(2, 13, dtype=torch.long)
    expected = torch.zeros(13, 2, GROUPS * HEADS * DIM, dtype=torch.float64)
    for sample, starts in enumerate(STARTS):
        for first, stop in itertools.pairwise((*starts, 13)):
            positions[sample, first:stop] = torch.arange(stop - first)
            alone = reference_attention(exact[first:stop, sample : sample + 1], DIM, window=window or 99)
            expected[first:stop, sample : sample + 1] = alone
    how = {"groups": GROUPS, "head_dim": DIM, "window": window, "starts": STARTS}
    tables = cos[positions], sin[positions]
    out = causal_attention(qkv, tables, **how)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out.backward(grad.to(dtype))
    expected.backward(grad)
    loose = {"rtol": 3e-2, "atol": 3e-2} if dtype is torch.bfloat16 else TOL[dtype]
    torch.testing.assert_close(out.double(), expected, **loose)
    torch.testing.assert_close(qkv.grad.double(), exact.grad, **loose)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(qkv, tables, **how).double(), expected, **loose)
    fresh = qkv.detach().requires_grad_()
    with gpu_branches():
        forked = causal_attention(fresh, tables, **how)
    forked.backward(grad.to(dtype))
    torch.testing.assert_close(forked.double(), expected, **loose)
    torch.testing.assert_close(fresh.grad.double(), exact.grad, **loose)


def test_attention_without_a_graph_is_the_same() -> None:
    qkv = random_qkv(9)
    tables = rotary_tables(angles(9), torch.float64)
    with torch.no_grad():
        silent = causal_attention(qkv, tables, groups=GROUPS, head_dim=DIM)
    torch.testing.assert_close(silent, causal_attention(qkv, tables, groups=GROUPS, head_dim=DIM), **TOL[torch.float64])


def test_gradients_by_finite_differences() -> None:
    tables = rotary_tables(angles(5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda qkv: causal_attention(qkv, tables, groups=GROUPS, head_dim=DIM), random_qkv(5, batch=1)
    )
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(swiglu, x)


def test_norm_of_a_known_vector() -> None:
    # Mean square of (3, 4, 0, 0) is 25 / 4; with eps 6.0 the root is 3.5.
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    normed = rms_norm(x, torch.tensor([1.0, 2.0, 1.0, 1.0]), 6.0)
    torch.testing.assert_close(normed, torch.tensor([[3.0, 8.0, 0.0, 0.0]]) / 3.5)


def test_activations_of_known_numbers() -> None:
    """GELU by its definition with the error function, and by the tanh of Hendrycks and Gimpel, arXiv:1606.08415."""
    gate, up = torch.tensor([-1.5, 0.5], dtype=torch.float64), torch.tensor([2.0, -3.0], dtype=torch.float64)
    both = torch.cat([gate, up])
    exact = [g / 2 * (1 + math.erf(g / math.sqrt(2))) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    cube = [math.sqrt(2 / math.pi) * (g + 0.044715 * g**3) for g in gate.tolist()]
    by_tanh = [g / 2 * (1 + math.tanh(c)) * u for g, c, u in zip(gate.tolist(), cube, up.tolist(), strict=True)]
    torch.testing.assert_close(functional.geglu(both).tolist(), exact)
    torch.testing.assert_close(functional.geglu_tanh(both).tolist(), by_tanh)
    assert functional.squared_relu(both).tolist() == [0.0, 0.25, 4.0, 0.0]


def test_inputs_are_left_alone() -> None:
    x, weight = torch.randn(4, 2, 6), torch.randn(6)
    copies = x.clone(), weight.clone()
    rms_norm(x, weight, 1e-5)
    swiglu(x)
    qkv = random_qkv(4, dtype=torch.float32).detach()
    before = qkv.clone()
    causal_attention(qkv, rotary_tables(angles(4), torch.float32), groups=GROUPS, head_dim=DIM)
    assert torch.equal(x, copies[0])
    assert torch.equal(weight, copies[1])
    assert torch.equal(qkv, before)


def test_a_token_does_not_see_later_ones() -> None:
    qkv = random_qkv(8).detach()
    changed = qkv.clone()
    changed[5:] += 1.0
    tables = rotary_tables(angles(8), torch.float64)
    outs = [causal_attention(x, tables, groups=GROUPS, head_dim=DIM) for x in (qkv, changed)]
    assert torch.equal(outs[0][:5], outs[1][:5])
    assert not torch.allclose(outs[0][5:], outs[1][5:])


@pytest.mark.parametrize("window", [1, 3, 4, 6, 10])
def test_attention_in_a_window_as_gpus_do_it(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, or where those are no less work with one mask; a mask never has heads, and its kernel no groups."""
    asked = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask: torch.Tensor, **how: object
    ) -> torch.Tensor:
        assert q.shape[1] == k.shape[1] == GROUPS * HEADS
        assert "enable_gqa" not in how
        asked.append(attn_mask)
        return kernel(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    qkv = random_qkv(11)
    exact = qkv.detach().clone().requires_grad_()
    how = {"groups": GROUPS, "head_dim": DIM, "scale": 0.7, "window": window}
    with gpu_branches():
        out = causal_attention(qkv, rotary_tables(angles(11), torch.float64), **how)
        again = causal_attention(qkv, rotary_tables(angles(11), torch.float64), **how)
    expected = reference_attention(exact, DIM, scale=0.7, window=window)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, **TOL[torch.float64])
    torch.testing.assert_close(qkv.grad, exact.grad, **TOL[torch.float64])
    torch.testing.assert_close(again, expected, **TOL[torch.float64])
    samples = 2 if asked[0].dim() == 4 else 1
    assert asked[0].numel() <= samples * min(11 * 11, math.ceil(11 / window) * window * 2 * window)
    assert asked[0] is asked[1], "every layer of a model asks for the same mask"


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_a_zero_centred_norm_is_not_rounded_before_it_is_used(norm: str) -> None:
    """In bf16 every channel's error averages out over tokens; a factor rounded to bf16 would move complete channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator).bfloat16()
    linear = torch.nn.Module()
    linear.normalization, linear.zero_centered_gamma, linear.eps = norm, True, 1e-6
    linear.layer_norm_weight = (torch.rand(256, generator=generator) * 2 - 0.5).bfloat16()
    linear.layer_norm_bias = torch.zeros(256).bfloat16()
    exact = x.double() - (0 if norm == "RMSNorm" else x.double().mean(-1, keepdim=True))
    exact *= torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * (linear.layer_norm_weight.double() + 1)
    with gpu_branches():
        out = fused_norm(linear, x)
    assert out.dtype == torch.bfloat16
    error = (out.double() - exact).mul(exact.sign()).sum(0) / exact.abs().sum(0)
    # Half a unit in the last place of bf16 is 2e-3 of a value at most, and of a mean over 512 values 1e-4.
    assert error.abs().max() < 5e-4
