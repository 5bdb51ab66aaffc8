"""Fixtures of several test modules."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_minitron.megatron.runtime import Runtime


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that another user reaches, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def here() -> Iterator["Runtime"]:
    """Megatron on one rank."""
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.megatron import runtime

    yield runtime.start(ParallelConfig(), seed=0)
    runtime.stop()
