"""GPU memory and the use of its peak rate, as stages report them; a card is not needed to count."""

import pytest
import torch

from nemo_minitron.estimate.compute import peak_flops_of
from nemo_minitron.stages import engine, speed
from nemo_minitron.stages.team import Alone


class Card:
    """What is asked of `torch.cuda`."""

    def __init__(self, monkeypatch, name="NVIDIA H100 80GB HBM3"):
        self.resets = 0
        for attribute, value in {
            "is_initialized": True,
            "max_memory_allocated": 12_345_678_901,
            "max_memory_reserved": 20_000_000_000,
            "get_device_name": name,
        }.items():
            monkeypatch.setattr(torch.cuda, attribute, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)

    def _reset(self):
        self.resets += 1


def test_without_a_gpu_nothing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    speed.reset_gpu_memory()
    assert speed.peak_gpu_memory() == {}
    assert speed.gpu_name() is None
    assert engine._gpu_memory(Alone()) == {}


def test_peak_memory_is_that_of_the_fullest_rank(monkeypatch):
    card = Card(monkeypatch)
    speed.reset_gpu_memory()
    assert card.resets == 1
    assert speed.peak_gpu_memory() == {"allocated": 12.346, "reserved": 20.0}

    class Three(Alone):
        def gather(self, value):
            return [value, {"allocated": 30.0, "reserved": 31.0}, {}]

    assert engine._gpu_memory(Three()) == {"peak_gpu_memory_gb": {"allocated": 30.0, "reserved": 31.0}}


def test_mfu_counts_operations_against_the_data_sheet(monkeypatch):
    Card(monkeypatch)
    # 4 GPUs of 989 TFLOP/s; 1978 tokens/s of 10^12 operations each are half of one GPU's peak too many by 4.
    assert speed.mfu(1978.0, 1e12, devices=4, gpu=speed.gpu_name()) == 0.5
    assert speed.mfu(None, 1e12, devices=4, gpu=speed.gpu_name()) is None
    assert speed.mfu(1978.0, 1e12, devices=4, gpu=None) is None
    assert speed.mfu(1978.0, 1e12, devices=4, gpu="NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_found_by_the_driver_s_name(name, peak):
    assert peak_flops_of(name) == peak
