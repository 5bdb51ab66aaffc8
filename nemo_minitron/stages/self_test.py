"""What a GPU does when it is asked to: a matrix product, an all-reduce, attention and the fused loss, in ten seconds.

`python -m nemo_minitron.stages.self_test [DEVICE]` prints a line of JSON for each. Every test compares with float64, so
that a card that computes quickly and wrongly is found out. The device is an argument; a CPU runs the same tests.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.estimate.compute import peak_flops_of


def run(device: torch.device) -> Iterator[dict[str, Any]]:
    """Each test's `name`, whether it is `ok`, and what it `found`; none stops the others."""
    for name, test in TESTS.items():
        try:
            ok, found = test(device)
        except Exception as error:  # whatever a driver or a library raises is what the user wants to know
            ok, found = False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        yield {"name": name, "ok": ok, "found": found}


def matrix_product(device: torch.device) -> tuple[bool, str]:
    """A bf16 product against float64, and the rate of a large one."""
    on_gpu = device.type == "cuda"
    small = _relative(*_product(256, device))
    size = 8192 if on_gpu else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * size**3 / _seconds(lambda: a @ b, device)
    peak = peak_flops_of(torch.cuda.get_device_name(device)) if on_gpu else None
    of_peak = "" if peak is None else f" ({rate / peak:.0%} of the data sheet)"
    slow = peak is not None and rate < 0.4 * peak
    found = f"{rate / 1e12:.3g} TFLOP/s in bf16{of_peak}, relative error {small:.1e}"
    return small < 1e-2 and not slow, found + ("; slower than it should be" if slow else "")


def _product(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return a @ b, a.double() @ b.double()


def all_reduce(device: torch.device) -> tuple[bool, str]:
    """One rank's sum over the backend that a run takes."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    began = time.perf_counter()
    made = not dist.is_initialized()
    if made:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        x = torch.arange(4.0, device=device)
        dist.all_reduce(x)
        same = x.tolist() == [0.0, 1.0, 2.0, 3.0]
    finally:
        if made:
            dist.destroy_process_group()
    return same, f"{backend}, one rank, {time.perf_counter() - began:.1f} s with its start"


def attention(device: torch.device) -> tuple[bool, str]:
    """Causal attention in bf16 against float64, and whether a fused kernel takes it."""
    q, k, v = (torch.randn(1, 4, 256, 128, device=device, dtype=torch.bfloat16) for _ in range(3))
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q.double() @ k.double().mT / 128**0.5
    behind = torch.ones(256, 256, dtype=torch.bool, device=device).triu(1)
    error = _relative(found, scores.masked_fill(behind, -torch.inf).softmax(-1) @ v.double())
    kernels = _attention_kernels(q, k, v) if device.type == "cuda" else ["CPU"]
    return error < 2e-2 and bool(kernels), f"kernels: {', '.join(kernels) or 'none fused'}; relative error {error:.1e}"


def _attention_kernels(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Fused kernels that can take these."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    able = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        except RuntimeError:
            continue
        able.append(backend.name.partition("_")[0].lower())
    return able


def fused_loss(device: torch.device) -> tuple[bool, str]:
    """The distillation loss with both output layers inside, and its gradient, against float64."""
    from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd

    tokens, vocabulary, width = 256, 4000, 128
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    states, teacher = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(2))
    weights = [(torch.randn(vocabulary, width, device=device) * 2 * width**-0.5).to(dtype) for _ in range(2)]
    states.requires_grad_()
    result = fused_linear_kd(states, weights[0], teacher, weights[1], vocab_size=vocabulary)
    result.loss_sum.backward()  # type: ignore[no-untyped-call]
    wide = states.detach().double().requires_grad_()
    student = (wide @ weights[0].double().T).log_softmax(-1)
    target = (teacher.double() @ weights[1].double().T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(student, target, reduction="sum", log_target=True)
    expected.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert wide.grad is not None
    value = abs(float(result.loss_sum.detach()) / float(expected.detach()) - 1)
    gradient = _relative(states.grad, wide.grad)
    found = f"relative error {value:.1e}, of the gradient {gradient:.1e}"
    return value < 1e-2 and gradient < 5e-2, found


TESTS: dict[str, Callable[[torch.device], tuple[bool, str]]] = {
    "matrix product": matrix_product,
    "all-reduce": all_reduce,
    "attention": attention,
    "fused loss": fused_loss,
}
"""By the name that `doctor` shows."""


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of five rounds after one."""
    times = []
    for _ in range(6):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    for line in run(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")):
        print(json.dumps(line), flush=True)
