"""nemo_minitron: make large language models small by structured pruning and distillation, on NeMo and Megatron.

Importing the package loads neither torch, NeMo nor Megatron; the public names below load on first use.
"""

from importlib import import_module
from typing import Any

from nemo_minitron.version import __version__

_PUBLIC = {
    "MegatronGPTModel": "nemo_minitron.models.gpt",
    "MegatronGPTDistillationModel": "nemo_minitron.models.distillation",
    "MegatronStrategy": "nemo_minitron.models.strategy",
    "ImportanceCallback": "nemo_minitron.callbacks.importance",
    "PruningCallback": "nemo_minitron.callbacks.pruning",
    "DistillationMonitor": "nemo_minitron.callbacks.distillation",
    "Scores": "nemo_minitron.pruning.scores",
    "PruningPlan": "nemo_minitron.pruning.plan",
    "ModelSpec": "nemo_minitron.arch.spec",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nemo_minitron' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
