"""Silence what libraries say that a user can do nothing about. The one place for it.

A message goes when it is (1) told to everyone on every run, and (2) no sign that something is wrong with this run.
Everything else stays: warnings of ours, of unknown origin, and errors of anybody. `--debug` brings all of it back.
"""

import logging
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

WARNINGS: tuple[tuple[str, str], ...] = (
    # Optional GPU kernels that are absent: `nemo-minitron doctor` says it once, with what it costs.
    (r"Transformer Engine and Apex are not installed", "megatron"),
    (r"Apex is not installed", "megatron"),
    (r"Transformer Engine is not installed", "megatron"),
    (r"(Couldn't|Could not) (find|import) ", "nemo"),
    # Deprecations between other people's libraries.
    (r".*isinstance\(treespec, LeafSpec\)", "lightning"),
    (r".*pkg_resources is deprecated", ""),
    (r".*torch\.cpu\.amp", ""),
    (r".*has been deprecated.*torch", "megatron"),
    (r".*`?torch\.distributed\._(all_gather|reduce_scatter)_base", ""),
    (r".*FSDP\.state_dict_type", ""),
    (r".*invalid escape sequence", ""),
    # Lightning's advice that does not hold for how we drive it.
    (r".*does not have many workers", "lightning"),
    (r".*`?training_step`? returned `?None", "lightning"),
    (r".*no `?val_dataloader", "lightning"),
    (r".*sequential order, dataloader is not resumable|.*your dataloader is not resumable", "lightning"),
    (r".*Checkpoint directory .* exists and is not empty", "lightning"),
    (r".*You called `self\.log\(", "lightning"),
    (r".*It is recommended to use `self\.log\(.*sync_dist=True", "lightning"),  # what we log is reduced already
    # Checkpoints of one process, which are wanted.
    (r".*torch\.distributed is disabled, unavailable or uninitialized", "torch"),
    (r".*No device id is provided via `?init_process_group", "torch"),
    (r".*barrier\(\): using the device under current context", "torch"),
    (r".*Profiler (function|clears)", "torch"),
)
"""Pattern of the text, and the package that says it ("" for any)."""

LOGGERS: tuple[tuple[str, int], ...] = (
    ("lightning", logging.WARNING),
    ("lightning.pytorch", logging.WARNING),
    ("lightning.fabric", logging.WARNING),
    ("pytorch_lightning", logging.WARNING),
    ("nemo_logger", logging.ERROR),
    ("megatron", logging.ERROR),
    ("nv_one_logger", logging.CRITICAL),
    ("torch.distributed", logging.ERROR),
    ("torch.utils", logging.ERROR),
    ("transformers", logging.ERROR),
    ("matplotlib", logging.WARNING),
    ("numexpr", logging.WARNING),
    ("filelock", logging.WARNING),
)
"""Loggers by prefix, and the lowest level that still comes through."""

MESSAGES: tuple[str, ...] = (
    r"OneLogger: Setting error_handling_strategy",
    r"No exporters were provided",
)
"""Log messages to drop whoever's logger they come by."""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "NVTE_DEBUG": "0",
}
"""Set where the user has not."""


def install() -> None:
    """Silence the list above, in this process and in those it starts. Call it before the libraries are imported.

    Both hooks wrap what they find, at the one place that everything passes: libraries reset filter lists and levels,
    and NeMo turns Python's warnings into log records of its own.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not getattr(warnings.showwarning, "quiet", False):
        warnings.showwarning = _quiet_warnings(warnings.showwarning)
    if not getattr(logging.Logger.handle, "quiet", False):
        logging.Logger.handle = _quiet_records(logging.Logger.handle)  # type: ignore[method-assign]


def is_known_warning(text: str, filename: str) -> bool:
    """Whether a Python warning is on the list."""
    return any(re.match(pattern, text, re.DOTALL) and package in filename for pattern, package in WARNINGS)


def is_known_record(name: str, level: int, text: str) -> bool:
    """Whether a log record is on the list."""
    forwarded = _FORWARDED_WARNING.match(text) if name == "nemo_logger" else None
    if forwarded:
        return is_known_warning(forwarded["text"], forwarded["file"])
    if any(re.match(pattern, text) for pattern in MESSAGES):
        return True
    return any((name == prefix or name.startswith(prefix + ".")) and level < lowest for prefix, lowest in LOGGERS)


_FORWARDED_WARNING = re.compile(r"(?P<file>[^\n]*?):\d+: (\w*Warning: )?(?P<text>.*)", re.DOTALL)


def _quiet_warnings(show: Callable[..., None]) -> Callable[..., None]:
    def quiet(message: Warning | str, category: type[Warning], filename: str, *more: Any, **named: Any) -> None:
        if not is_known_warning(str(message), filename):
            show(message, category, filename, *more, **named)

    quiet.quiet = True  # type: ignore[attr-defined]
    return quiet


def _quiet_records(handle: Callable[..., None]) -> Callable[..., None]:
    def quiet(self: logging.Logger, record: logging.LogRecord) -> None:
        if not is_known_record(record.name, record.levelno, record.getMessage()):
            handle(self, record)

    quiet.quiet = True  # type: ignore[attr-defined]
    return quiet
