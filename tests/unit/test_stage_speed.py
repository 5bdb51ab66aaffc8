"""GPU memory and the use of its peak rate, as stages report them; a card is not needed to count."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from nemo_minitron.cli import dry_run
from nemo_minitron.estimate.compute import peak_flops_of
from nemo_minitron.estimate.memory import GPU_BYTES, USABLE
from nemo_minitron.report import tables
from nemo_minitron.stages import engine, manifest, speed
from nemo_minitron.stages.processes import SingleProcess
from tests.unit import report_sample


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
    assert engine._gpu_memory(SingleProcess()) == {}


def test_peak_memory_is_that_of_the_fullest_rank(monkeypatch):
    card = Card(monkeypatch)
    speed.reset_gpu_memory()
    assert card.resets == 1
    assert speed.peak_gpu_memory() == {"allocated": 12.346, "reserved": 20.0}

    class Three(SingleProcess):
        def collect(self, value):
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


def test_the_report_has_columns_for_the_gpu_where_there_was_one():
    on_gpu = {
        "peak_memory_gb": 4.0,
        "peak_gpu_memory_gb": {"allocated": 61.25, "reserved": 70.5},
        "tokens_per_second": 5210.0,
        "mfu": 0.4321,
        "seconds": 60.0,
    }
    machine = {"hardware": {"cores": 16, "gpus": ["NVIDIA H100 80GB HBM3"] * 8}}
    records = {"data": {"ranks": 8}, "distill": {"ranks": 8}}
    results = {"data": {"seconds": 2.0}, "distill": on_gpu}
    table = tables.pipeline(report_sample.content(results=results, manifest=machine, records=records))
    assert [len(row) for row in table["rows"]] == [len(table["headings"])] * 2 == [8, 8]
    assert table["rows"][1][2:4] == ("97%", "0.133")  # 60 of 62 seconds; 8 GPUs for a sixtieth of an hour
    assert table["rows"][1][5:] == ("5.2k tokens/s", "61.25 of 70.50 GB", "43.2%")
    assert table["headings"][3] == "GPU-hours"
    alone = {"hardware": {"cores": 2, "gpus": []}}
    plain = tables.pipeline(report_sample.content(results={"data": {"seconds": 360.0}}, manifest=alone))
    assert plain["rows"] == [("data", "6 min 00 s", "100%", "0.200", "", "")]
    assert plain["headings"][3] == "core-hours"


def test_a_dry_run_judges_by_the_card_where_no_cluster_is_named(monkeypatch):
    here, there = SimpleNamespace(cluster=None), SimpleNamespace(cluster=SimpleNamespace(gpu="h100"))
    monkeypatch.setattr(dry_run, "gpu_memory", lambda: [80e9, 40e9])
    assert dry_run._memory(here, 1) == (USABLE * 80e9, "this machine's GPU")
    assert dry_run._memory(here, 2) == (USABLE * 40e9, "a GPU; this machine has 2 for 2 ranks")
    assert dry_run._memory(there, 1)[0] == USABLE * GPU_BYTES["h100"]
    monkeypatch.setattr(dry_run, "gpu_memory", list)
    assert dry_run._memory(here, 2)[0] == USABLE * psutil.virtual_memory().total / 2


def test_the_driver_s_answer_is_read_as_bytes(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '81559\\n40960\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    manifest.gpu_memory.cache_clear()
    assert manifest.gpu_memory() == [81559 * 2**20, 40960 * 2**20]
    manifest.gpu_memory.cache_clear()
