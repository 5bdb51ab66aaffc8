"""The state-space scan, the causal convolution and the gated norm against loops over time in float64."""

import math

import pytest
import torch
from torch import Tensor

from nemo_minitron.ops.state_space import causal_convolution, gated_group_norm, state_space_scan

BATCH, LENGTH, HEADS, CHANNELS, GROUPS, WIDTH = 2, 13, 4, 3, 2, 5


def inputs(dtype: torch.dtype = torch.float64, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x_BSHP": random(BATCH, length, HEADS, CHANNELS),
        "dt_BSH": random(BATCH, length, HEADS).abs() + 0.05,
        "a_H": -random(HEADS).abs() - 0.1,
        "b_BSGN": random(BATCH, length, GROUPS, WIDTH),
        "c_BSGN": random(BATCH, length, GROUPS, WIDTH),
        "state_BHPN": random(BATCH, HEADS, CHANNELS, WIDTH),
    }


def scan_by_loop(
    *, x_BSHP: Tensor, dt_BSH: Tensor, a_H: Tensor, b_BSGN: Tensor, c_BSGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One sample, head and position after the other, by the recurrence."""
    outputs = []
    states = []
    for sample in range(x_BSHP.shape[0]):
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            state, found = state_BHPN[sample, head], []
            for at in range(x_BSHP.shape[1]):
                dt = dt_BSH[sample, at, head]
                entering = torch.outer(dt * x_BSHP[sample, at, head], b_BSGN[sample, at, group])
                state = torch.exp(dt * a_H[head]) * state + entering
                found.append(state @ c_BSGN[sample, at, group])
            heads.append(torch.stack(found))
            states.append(state)
        outputs.append(torch.stack(heads, 1))
    return torch.stack(outputs), torch.stack(states).view(BATCH, HEADS, CHANNELS, WIDTH)


@pytest.mark.parametrize("chunk", [1, 4, 13, 128])
def test_scan_and_its_gradients_are_those_of_a_loop_over_time(chunk: int) -> None:
    given = {name: value.requires_grad_() for name, value in inputs().items()}
    expected, last = scan_by_loop(**given)
    wanted = torch.autograd.grad((expected * expected.detach()).sum() + last.sin().sum(), list(given.values()))
    found = state_space_scan(**given, chunk=chunk)
    torch.testing.assert_close(found.output, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.state, last, rtol=1e-11, atol=1e-12)
    got = torch.autograd.grad((found.output * expected.detach()).sum() + found.state.sin().sum(), list(given.values()))
    for name, mine, theirs in zip(given, got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_gradcheck() -> None:
    given = {name: value.requires_grad_() for name, value in inputs(length=5).items()}
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda *values: state_space_scan(**dict(zip(names, values, strict=True)), chunk=3), tuple(given.values())
    )
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 6, 3), (3, 4), (3,)))
    assert torch.autograd.gradcheck(causal_convolution, tuple(each.requires_grad_() for each in (x, weight, bias)))
    y, gate, scale = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 6), (2, 6), (6,)))
    assert torch.autograd.gradcheck(lambda *of: gated_group_norm(*of, groups=2, eps=1e-5), (y, gate, scale))


def test_a_sequence_in_two_pieces_is_the_sequence() -> None:
    given = inputs()
    whole = state_space_scan(**given, chunk=4)
    by_position = {name for name in given if "S" in name.partition("_")[2]}
    first = {name: value[:, :6] if name in by_position else value for name, value in given.items()}
    then = {name: value[:, 6:] if name in by_position else value for name, value in given.items()}
    one = state_space_scan(**first, chunk=4)
    two = state_space_scan(**then | {"state_BHPN": one.state}, chunk=4)
    torch.testing.assert_close(torch.cat([one.output, two.output], 1), whole.output)
    torch.testing.assert_close(two.state, whole.state)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_near_float64(dtype: torch.dtype, bound: float) -> None:
    """Strong decay too: `dt a` sums up to thousands in a chunk, where differences of fp32 sums are off by 1e-4."""
    given = inputs(length=300)
    given["dt_BSH"] = given["dt_BSH"] * torch.linspace(0.2, 12, 300)[None, :, None]
    given["a_H"] = given["a_H"] * 3
    low = {name: value.to(dtype) for name, value in given.items()}
    expected, _ = scan_by_loop(**{name: value.double() for name, value in low.items()})
    found = state_space_scan(**low, chunk=128).output
    assert found.dtype == dtype
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < bound, error


def test_convolution_looks_back_only_and_ends_with_the_position_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 3), (3, 4), (3,))
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    found = causal_convolution(x, weight, bias)
    for sample in range(2):
        for at in range(7):
            for channel in range(3):
                total = float(bias[channel]) + sum(
                    float(weight[channel, 3 - back]) * float(x[sample, at - back, channel])
                    for back in range(4)
                    if at - back >= 0
                )
                assert float(found[sample, at, channel]) == pytest.approx(total / (1 + math.exp(-total)), rel=1e-12)


def test_gated_norm_by_hand() -> None:
    y, gate = torch.tensor([[1.0, 2.0, 3.0, -4.0]]), torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    gated = [a * g / (1 + math.exp(-g)) for a, g in zip(y[0].tolist(), gate[0].tolist(), strict=True)]
    roots = [math.sqrt((gated[at] ** 2 + gated[at + 1] ** 2) / 2 + 1e-3) for at in (0, 2)]
    expected = [gated[at] / roots[at // 2] * float(weight[at]) for at in range(4)]
    found = gated_group_norm(y, gate, weight, groups=2, eps=1e-3)
    torch.testing.assert_close(found, torch.tensor([expected]))
