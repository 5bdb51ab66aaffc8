"""`precision: auto`: what is measured decides, the run keeps it, ranks agree, and what is slow is said."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.config.load import check
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.errors import ConfigError, LayoutError, RunFolderError
from nemo_minitron.stages import precision
from nemo_minitron.stages.base import Stage
from nemo_minitron.stages.engine import Request, run_chain
from nemo_minitron.stages.precision import PrecisionChoice, agreed
from nemo_minitron.stages.run_folder import RunFolder
from tests.jobs import config_for


def config(asked: str) -> RunConfig:
    return config_for(Path("hf"), Path("corpus"), precision=asked)


@pytest.fixture
def device(monkeypatch):
    """Sets how much faster bf16 is; counts measurements."""
    state = {"ratio": 2.0, "measured": 0}

    def speedup(*_):
        state["measured"] += 1
        return state["ratio"]

    monkeypatch.setattr("nemo_minitron.ops.product_speed.product_speedup", speedup)
    return state


class Lines(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def go(run: RunFolder, asked: str) -> tuple[Precision, list[str]]:
    """The precision that a stage sees, and what the user reads."""
    seen = []
    stage = Stage(
        name="score", run=lambda context: {"precision": seen.append(context.config.precision)}, sections=("precision",)
    )
    reporter = Lines()
    run_chain([stage], Request(config=config(asked), run=run), reporter=reporter)
    return (seen[0] if seen else None), reporter.lines


@pytest.mark.parametrize(("ratio", "chosen"), [(8.0, "bf16"), (1.3, "bf16"), (1.1, "fp32"), (0.2, "fp32")])
def test_what_is_faster_here_is_chosen_and_written_down(device, tmp_path, ratio, chosen):
    device["ratio"] = ratio
    run = RunFolder(tmp_path / "run")
    seen, lines = go(run, "auto")
    assert seen == chosen
    assert f"precision: {chosen}" in (run.path / "config.resolved.yaml").read_text()
    kept = json.loads((run.path / "manifest.json").read_text())["precision"]
    assert (kept["asked"], kept["chosen"], kept["bf16_over_fp32"]) == ("auto", chosen, ratio)
    assert any(f"precision {chosen} (auto: bf16 products are {ratio:.2g} x" in line for line in lines)


def test_a_run_keeps_what_it_chose_on_another_machine(device, tmp_path):
    run = RunFolder(tmp_path / "run")
    assert go(run, "auto")[0] == "bf16"
    device["ratio"] = 0.2
    later = Stage(name="later", run=lambda context: {"precision": context.config.precision}, sections=("precision",))
    run_chain([later], Request(config=config("auto"), run=run), reporter=Lines())
    assert run.result("later")["precision"] == "bf16"
    assert device["measured"] == 1


def test_another_precision_by_name_is_a_conflict_with_what_was_made(device, tmp_path):
    run = RunFolder(tmp_path / "run")
    go(run, "auto")
    with pytest.raises(RunFolderError, match="precision: stage score was made with bf16, now fp32"):
        go(run, "fp32")


def test_an_explicit_bf16_that_is_emulated_is_warned_of_once_with_the_measured_ratio(device, tmp_path):
    device["ratio"] = 0.2
    run = RunFolder(tmp_path / "run")
    seen, lines = go(run, "bf16")
    assert seen == "bf16"
    [warning] = [line for line in lines if "warning" in line]
    assert "5.0 x the time of fp32" in warning
    assert "precision=fp32" in warning
    assert not any("warning" in line for line in go(run, "bf16")[1])


def test_fp32_and_a_fast_bf16_are_not_remarked_upon(device, tmp_path):
    assert not any("precision" in line for line in go(RunFolder(tmp_path / "a"), "fp32")[1])
    assert device["measured"] == 0
    assert not any("warning" in line for line in go(RunFolder(tmp_path / "b"), "bf16")[1])


def choice(chosen: str, device: str, ratio: float) -> PrecisionChoice:
    return PrecisionChoice(asked=Precision.AUTO, chosen=Precision(chosen), device=device, bf16_over_fp32=ratio)


def test_ranks_on_one_kind_of_device_share_the_first_ones_measurement():
    noisy = [choice("bf16", "EPYC", 1.26), choice("fp32", "EPYC", 1.24)]
    assert agreed(noisy).chosen == "bf16"


def test_ranks_on_devices_that_choose_differently_are_named():
    mixed = [choice("bf16", "Xeon", 6.0), choice("bf16", "Xeon", 6.0), choice("fp32", "Core i5", 0.2)]
    with pytest.raises(LayoutError) as caught:
        agreed(mixed)
    text = str(caught.value)
    assert "bf16 on rank 0 (Xeon) and fp32 on rank 2 (Core i5)" in text
    assert "precision=bf16 or precision=fp32" in text


def test_a_teacher_has_a_precision_of_its_own_or_none():
    with pytest.raises(ConfigError, match=r"teacher_precision.*fp32 or bf16"):
        check(DistillConfig, {"teacher_precision": "auto"}, source="recipe")


def test_a_dry_run_says_what_auto_will_be_and_measures_here(device, tmp_path, monkeypatch):
    from nemo_minitron.cli.dry_run import _precision

    assert _precision(config("auto"), RunFolder(tmp_path / "new")) == (
        Precision.BF16,
        f" (auto: bf16 products are 2 x as fast as fp32 on {precision.processor_name()})",
    )
    assert _precision(config("fp32"), RunFolder(tmp_path / "new")) == (Precision.FP32, "")
    on_gpus = config_for(Path("hf"), Path("corpus"), precision="auto", cluster={"nodes": 2})
    device["ratio"] = 0.1
    assert _precision(on_gpus, RunFolder(tmp_path / "new"))[0] is Precision.BF16


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the limits are names of x86 extensions")
def test_a_processor_without_bf16_instructions_is_recognised_by_measurement():
    """oneDNN and MKL limited to AVX2, as on most laptops, emulate bf16."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    code = (
        "from nemo_minitron.config.parallel import Precision; from nemo_minitron.stages.precision import measure; "
        "found = measure(Precision.AUTO); print(found.chosen, found.bf16_over_fp32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    chosen, ratio = done.stdout.split()
    assert chosen == "fp32"
    assert float(ratio) < 1
