import pytest
import torch

from nemo_minitron.megatron.functional import linear_layer
from nemo_minitron.ops import linear as linear_module
from nemo_minitron.ops.linear import linear, linear_input_gradient

SHAPES = {"matrix": (5, 7), "sequence first": (3, 2, 7), "no rows": (0, 7)}


@pytest.fixture(params=[True, False], ids=["other library", "torch's own"])
def mkl_is_slow(request, monkeypatch):
    monkeypatch.setattr(linear_module, "mkl_is_slow", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_products_are_those_of_float64(shape, dtype, mkl_is_slow):
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


def test_the_weights_gradient_is_added_to_its_buffer(mkl_is_slow):
    x, weight, grad = torch.randn(3, 2, 5), torch.randn(4, 5, requires_grad=True), torch.randn(3, 2, 4)
    linear_layer(x, weight).backward(grad)
    alone = weight.grad.clone()
    torch.testing.assert_close(alone, torch.einsum("sbn,sbh->nh", grad.double(), x.double()).float())
    weight.grad, weight.main_grad = None, torch.ones_like(weight)
    linear_layer(x, weight).backward(grad)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + alone)


def test_a_frozen_weight_gets_no_gradient(mkl_is_slow):
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    weight.main_grad = torch.zeros(4, 5)
    linear_layer(x, weight).sum().backward()
    assert not weight.main_grad.any()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 5))


@pytest.mark.parametrize(
    ("capability", "vendor", "slow"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_which_processors_mkl_is_slow_on(capability, vendor, slow, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(linear_module, "_CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear_module.mkl_is_slow.__wrapped__() is slow
