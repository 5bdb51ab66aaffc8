"""The bridge over CUDA-only lines: what it changes, that it takes everything back, and what it refuses."""

import importlib
from typing import Any

import megatron.core
import pytest
import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.megatron import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge is for machines without a GPU")

PATCHED = [f"megatron.core.{name}" for name in (*cpu._MODULES, "tensor_parallel.random", *cpu._TYPE_CHECKING)]


@pytest.fixture(autouse=True)
def _start_without() -> None:
    cpu.uninstall()


def snapshot() -> dict[tuple[str, str], Any]:
    """Every attribute of the modules and classes that the bridge touches, and the code of every function."""
    seen: dict[tuple[str, str], Any] = {}
    for module_name in {*PATCHED, *(f"megatron.core.{name}" for name, _, _ in cpu._MOVING)}:
        module = importlib.import_module(module_name)
        owners = [module, *(item for item in vars(module).values() if isinstance(item, type))]
        for owner in owners:
            for name, value in vars(owner).items():
                function = cpu._plain_function(value)
                seen[owner.__name__, name] = (value, function and function.__code__)
    return seen


def test_uninstall_restores_every_attribute() -> None:
    before = snapshot()
    assert cpu.install()
    assert cpu.installed()
    during = snapshot()
    changed = [key for key in before if before[key] != during[key]]
    assert len(changed) > len(cpu._MODULES)
    cpu.uninstall()
    assert not cpu.installed()
    assert snapshot() == before


def test_installing_twice_is_installing_once() -> None:
    cpu.install()
    once = snapshot()
    cpu.install()
    assert snapshot() == once
    cpu.uninstall()
    assert not cpu.installed()


def test_bridged_leaves_what_was_there() -> None:
    with cpu.bridged() as active:
        assert active
        assert cpu.installed()
    assert not cpu.installed()
    cpu.install()
    with cpu.bridged():
        pass
    assert cpu.installed()
    cpu.uninstall()


def test_cuda_tensors_are_made_on_the_cpu_inside_megatron_only() -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.utils import get_default_causal_mask

    with cpu.bridged():
        assert get_default_causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False] * 3]
        assert schedules.torch.zeros([], device="cuda").device.type == "cpu"
        assert schedules.torch.cuda.current_device() == torch.device("cpu")
        assert schedules.torch.Tensor is torch.Tensor
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros([], device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        get_default_causal_mask(4)


def test_clipping_accepts_cpu_gradients() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(AssertionError):
        clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    with cpu.bridged():
        clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_the_random_state_tracker_switches_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(5)
    outside = torch.rand(2)
    torch.manual_seed(9)
    inside = torch.rand(1)
    with cpu.bridged():
        torch.manual_seed(5)
        tracker = CudaRNGStatesTracker()
        tracker.add("other", 9)
        first = torch.rand(1)
        with tracker.fork("other"):
            drawn = torch.rand(1)
        second = torch.rand(1)
    torch.testing.assert_close(torch.cat([first, second]), outside)
    torch.testing.assert_close(drawn, inside)


@pytest.mark.parametrize("version", ["0.14.2", "0.20.0", "1.0"])
def test_unknown_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", version)
    with pytest.raises(MinitronError, match=version) as caught:
        cpu.install()
    assert "at least 0.15 and below 0.20" in str(caught.value)
    assert not cpu.installed()


def test_never_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.install()
    assert not cpu.installed()
