"""Mamba's convolution and scan on the card: plain torch, and the kernels of mamba-ssm and causal-conv1d."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import dense
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, UnavailableError, check
from nemo_minitron.kernels import state_space as kernels
from nemo_minitron.ops.state_space import Scan, causal_convolution, state_space_scan

KERNELS = ("mamba_ssm", "causal_conv1d")
EXACT, ROUNDED = 1e-4, 2e-2
"""Of plain torch in fp32, whose products may be TF32's where that is on; and of the kernels, which multiply in bf16 or
TF32."""

Form = tuple[Callable[..., Tensor], Callable[..., Scan]]
PLAIN: Form = (causal_convolution, state_space_scan)


def _inputs(bench: Bench, dtype: torch.dtype, *, samples: int = 2, length: int = 300) -> dict[str, Tensor]:
    """Of a mixer of 8 heads of 64 channels in 2 groups, with 64 states, after its input projection."""
    torch.manual_seed(0)
    inner, maps, heads = 512, 128, 8
    made = {
        "x": torch.randn(samples, length, inner + 2 * maps),
        "weight": torch.rand(inner + 2 * maps, 4) - 0.5,
        "bias": 0.1 * torch.randn(inner + 2 * maps),
        "steps": torch.rand(samples, length, heads) * 0.1,
        "decay": -torch.rand(heads) * 8 - 0.5,
    }
    return {
        name: value.to(bench.device, torch.float32 if name in {"steps", "decay"} else dtype).requires_grad_()
        for name, value in made.items()
    }


def _mixed(form: Form, given: dict[str, Tensor]) -> Tensor:
    """Convolution and scan, as between the projections of a mixer."""
    convolve, scan = form
    x, b, c = torch.split(convolve(given["x"], given["weight"], given["bias"]), [512, 128, 128], dim=-1)
    by_head, maps = x.unflatten(-1, (8, 64)), (each.unflatten(-1, (2, 64)) for each in (b, c))
    return scan(by_head, given["steps"], given["decay"], *maps, chunk=64).output


def _reference(given: dict[str, Tensor]) -> Tensor:
    """Position after position in float64."""
    wide = {name: value.double() for name, value in given.items()}
    padded = torch.nn.functional.pad(wide["x"], (0, 0, 3, 0))
    length = wide["x"].shape[1]
    mixed = wide["bias"] + sum(padded[:, tap : tap + length] * wide["weight"][:, tap] for tap in range(4))
    x, b, c = torch.split(mixed * torch.sigmoid(mixed), [512, 128, 128], dim=-1)
    x = x.unflatten(-1, (8, 64))
    b, c = (each.unflatten(-1, (2, 64)).repeat_interleave(4, dim=2) for each in (b, c))
    state, found = x.new_zeros(len(x), 8, 64, 64), []
    for at in range(length):
        step = wide["steps"][:, at, :, None, None]
        state = (step * wide["decay"][:, None, None]).exp() * state + step * x[:, at, :, :, None] * b[:, at, :, None]
        found.append((state * c[:, at, :, None]).sum(-1))
    return torch.stack(found, 1)


def _apart(form: Form, bench: Bench, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the value and of every gradient, against the float64 loop."""
    given = _inputs(bench, dtype, length=40 if bench.tiny else 300)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    expected, found = _reference(exact), _mixed(form, given)
    ones = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
    wanted = torch.autograd.grad((expected * ones.double()).sum(), list(exact.values()))
    gradients = torch.autograd.grad((found.float() * ones).sum(), list(given.values()))
    errors = {"value": dense.relative_error(found, expected)}
    return errors | {
        name: dense.relative_error(mine, theirs) for name, mine, theirs in zip(given, gradients, wanted, strict=True)
    }


def _told(errors: dict[str, float], limit: float) -> Outcome:
    name = max(errors, key=lambda each: errors[each])
    told = f"value apart by {errors['value']:.1e}, gradients by at most {errors[name]:.1e} ({name})"
    return Outcome(figure=told, ok=errors[name] <= limit, figures=errors)


@check(order=22, seconds=10)
def mamba_scan_right(bench: Bench) -> Outcome:
    """Plain torch's convolution and scan, value and gradients, against a float64 loop over positions."""
    return _told(_apart(PLAIN, bench, torch.float32), EXACT)


def _kernels(bench: Bench) -> Form:
    if not kernels.run(bench.device, bench.dtype, taps=4):
        raise UnavailableError("mamba-ssm and causal-conv1d need a GPU")
    return kernels.causal_convolution, kernels.scan


@check(order=23, seconds=20, limit=90, needs=KERNELS)
def mamba_kernels_right(bench: Bench) -> Outcome:
    """mamba-ssm's and causal-conv1d's kernels in bf16, value and gradients, against a float64 loop over positions."""
    return _told(_apart(_kernels(bench), bench, bench.dtype), ROUNDED)


@check(order=76, seconds=20, limit=90, kind=Kind.SPEED)
def mamba_speed(bench: Bench) -> Outcome:
    """A mixer's convolution and scan with gradients, 2 samples of 8,192 positions: time and memory of each form."""
    given = _inputs(bench, bench.dtype, length=64 if bench.tiny else 8192)
    forms = {"plain torch": PLAIN}
    if kernels.run(bench.device, bench.dtype, taps=4):
        forms["kernels"] = (kernels.causal_convolution, kernels.scan)
    figures: dict[str, float] = {}
    for name, form in forms.items():

        def once(form: Form = form) -> None:
            _mixed(form, given).float().sum().backward()

        figures |= {f"{name} s": bench.seconds(once, rounds=3), f"{name} GB": bench.peak_gb(once)}
    told = "; ".join(f"{name} {figures[f'{name} s'] * 1e3:.1f} ms, {figures[f'{name} GB']:.2f} GB" for name in forms)
    return Outcome(figure=told, figures=figures)
