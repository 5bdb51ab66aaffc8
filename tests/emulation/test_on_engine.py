"""What needs Transformer Engine, and some of the parallel tests, in a process where Megatron finds the stand-in."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PARALLEL = "tests/parallel"
GROUPS = {
    "tests.emulation.engine_checks": ["tests/emulation/engine_checks.py"],
    "tests.emulation.mixture_checks": ["tests/emulation/mixture_checks.py"],
    "tests.parallel.test_megatron_layouts": [
        f"{PARALLEL}/test_megatron_layouts.py::test_training_is_the_same_at_every_layout[{layout}]"
        for layout in (
            *("TP2 uneven layers", "TP2 qwen3", "TP2 nemotron", "PP2 untied", "PP2 VPP2 tied"),
            *("TP2 sublayers", "PP2 sublayers"),
        )
    ],
    "tests.parallel.test_megatron_hooks": [
        *(
            f"{PARALLEL}/test_megatron_hooks.py::test_scores_are_the_same_at_every_layout_and_on_every_rank[{layout}]"
            for layout in ("TP2 uneven layers", "PP2", "DP2", "TP2 parts apart")
        ),
        f"{PARALLEL}/test_megatron_hooks.py::test_scores_are_the_papers_on_transformers_activations",
    ],
    "tests.parallel.test_hidden_states": [
        f"{PARALLEL}/test_hidden_states.py::test_value_and_gradients_are_those_of_transformers[mse]",
        f"{PARALLEL}/test_hidden_states.py::test_steps_are_those_of_one_rank_at_every_layout[pp2]",
    ],
    "tests.parallel.test_models_checkpoints": [
        f"{PARALLEL}/test_models_checkpoints.py::test_nemo_gives_the_logits_of_transformers_at_every_layout"
        f"[tied-folder-{layout}]"
        for layout in ("one", "pp2")
    ],
}
"""Modules of the report, and what is run of each."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Name and failure, if any, of each test by module; and what was printed."""
    report = tmp_path_factory.mktemp("engine") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.emulated", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, f"--junitxml={report}", *(test for tests in GROUPS.values() for test in tests)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), ran.stdout + ran.stderr
    found: dict[str, list[tuple[str, str]]] = {module: [] for module in GROUPS}
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [part.text or "" for part in case if part.tag in ("failure", "error", "skipped")]
        found.setdefault(case.get("classname", ""), []).append((case.get("name", ""), "\n".join(failures)))
    return found, ran.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("module", GROUPS)
def test_it_holds_on_the_engine_s_layers(module, outcomes):
    found, printed = outcomes
    assert len(found[module]) >= len(GROUPS[module]), printed
    failed = {name: failure for name, failure in found[module] if failure}
    assert not failed, "\n".join(f"--- {name} ---\n{failure}" for name, failure in failed.items())
