"""wandb stays out of Megatron-Core, and out of nobody else."""

import sys

import pytest

from nemo_minitron.megatron.without_wandb import hide_wandb


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """A wandb that is installed and not imported yet."""
    (tmp_path / "wandb.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)  # the fixture takes back what a test imports
    monkeypatch.delitem(sys.modules, "wandb")
    hide_wandb()


def imported_by(module: str) -> bool:
    scope = {"__name__": module}
    exec("try:\n    import wandb\nexcept ImportError:\n    wandb = None", scope)
    return scope["wandb"] is not None


def test_megatron_goes_on_without():
    assert not imported_by("megatron.core.timers")
    assert not imported_by("megatron.core.inference.contexts.dynamic_context")
    assert "wandb" not in sys.modules


def test_who_asks_for_it_gets_it_and_then_it_is_there_for_all():
    assert imported_by("lightning.pytorch.loggers.wandb")
    assert imported_by("megatron.core.timers")


def test_the_hook_is_there_once():
    before = list(sys.meta_path)
    hide_wandb()
    assert sys.meta_path == before
