"""Ranks of a test that connect as under a launcher: by the runtime, through a store that it keeps."""

import os
import socket
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def connecting_themselves(port: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """On each rank of `run_on_ranks`: give up the process groups that were made for it, and call a function."""
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return function(*arguments)
