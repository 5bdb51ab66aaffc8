import pytest
import torch

from nemo_minitron.megatron.functional import linear_layer
from nemo_minitron.ops import linear as linear_module
from nemo_minitron.ops.linear import linear, linear_input_gradient

IS_INTEL = linear_module.is_intel
SHAPES = {"matrix": (5, 7), "sequence first": (3, 2, 7), "no rows": (0, 7)}


@pytest.fixture(params=[False, True], ids=["other library", "torch's own"], autouse=True)
def processor(request, monkeypatch):
    monkeypatch.setattr(linear_module, "is_intel", lambda: request.param)
    monkeypatch.setattr(linear_module, "has_avx512", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_products_are_those_of_float64(shape, dtype):
    x, weight, grad = (torch.randn(size, dtype=dtype) for size in (shape, (11, 7), (*shape[:-1], 11)))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    expected = torch.einsum("...h,nh->...n", x.double(), weight.double()).to(dtype)
    for wide in (False, True):
        torch.testing.assert_close(linear(x, weight, wide=wide), expected, **tolerance)
    expected = torch.einsum("...n,nh->...h", grad.double(), weight.double()).to(dtype)
    torch.testing.assert_close(linear_input_gradient(grad, weight), expected, **tolerance)
    if len(shape) == 2:
        out = torch.full(shape, torch.nan, dtype=dtype)
        linear_input_gradient(grad, weight, out=out)
        torch.testing.assert_close(out, expected, **tolerance)


def test_the_layers_gradients_are_those_of_finite_differences():
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(linear_layer, (x.requires_grad_(), weight.requires_grad_()))


def test_the_weights_gradient_is_added_to_its_buffer():
    x, weight, grad = torch.randn(3, 2, 5), torch.randn(4, 5, requires_grad=True), torch.randn(3, 2, 4)
    linear_layer(x, weight).backward(grad)
    alone = weight.grad.clone()
    torch.testing.assert_close(alone, torch.einsum("sbn,sbh->nh", grad.double(), x.double()).float())
    weight.grad, weight.main_grad = None, torch.ones_like(weight)
    linear_layer(x, weight).backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + alone)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    weight.main_grad = torch.zeros(4, 5)
    linear_layer(x, weight).sum().backward()
    assert not weight.main_grad.any()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 5))


@pytest.mark.parametrize(
    ("facts", "intel"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", False),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", True),
        ("CPU implementer\t: 0x41\n", True),
        (None, True),
    ],
)
def test_whose_processor_it_is(facts, intel, monkeypatch, tmp_path):
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(linear_module, "_CPU_FACTS", tmp_path / "cpuinfo")
    assert IS_INTEL.__wrapped__() is intel
