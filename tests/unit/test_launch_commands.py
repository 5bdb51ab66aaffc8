"""The command line for a recipe: what a user would type on that machine."""

import shlex
from pathlib import Path

import pytest

from nemo_minitron.config.run import RunConfig
from nemo_minitron.launchers.commands import run_command


def _config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "model": {"source": "m"}, "data": {"sources": ["d"]}} | sections)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "nemo-minitron run my.yaml seed=1 --run-dir out"),
        (
            {"parallel": {"tensor": 2, "pipeline": 2}},
            "nemo-minitron run my.yaml seed=1 --run-dir out --nproc 4",
        ),
        (
            {"cluster": {"gpus_per_node": 4}},
            "torchrun --standalone --nproc-per-node 4 -m nemo_minitron run my.yaml seed=1 --run-dir out",
        ),
        ({"cluster": {"nodes": 2}}, "nemo-minitron submit my.yaml seed=1 --run-dir out"),
    ],
)
def test_command_follows_from_where_the_recipe_is_meant_to_run(sections: dict, expected: str) -> None:
    assert run_command("my.yaml", ["seed=1"], Path("out"), _config(**sections)) == expected


def test_command_survives_a_shell() -> None:
    command = run_command("my recipe.yaml", ["name=$(rm x)"], None, _config())

    assert shlex.split(command) == ["nemo-minitron", "run", "my recipe.yaml", "name=$(rm x)"]
