"""How a command ends: one message and the right exit status, whatever happened.

0    done
1    a defect of ours (with its traceback), or another rank was lost (a message)
2    something the user can mend (a message)
75   a scheduler's signal (SIGTERM, SIGUSR1) stopped the run after it had saved: queue the same command again
130  Ctrl-C stopped it, likewise
137  and others above 128: `--nproc` lost a rank to signal 9 (or status - 128)
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from nemo_minitron.errors import LostRankError, MinitronError, denied
from nemo_minitron.stages.processes import environment_rank, is_reported
from nemo_minitron.stages.signals import Stopped

FAILED = 1
USER = 2


@contextmanager
def reported(*, debug: bool = False) -> Iterator[None]:
    """Turn what escapes from a command into its message and exit status.

    With `debug` errors of users have their traceback too.
    """
    rank, prefix = _rank()
    try:
        yield
    except MinitronError as error:
        if debug:
            traceback.print_exc()
        elif not is_reported(error):
            _say(f"{prefix}{_styled('error:', '1;31')} {error}")
        raise typer.Exit(FAILED if isinstance(error, LostRankError) else USER) from None
    except Stopped as stopped:
        if rank == 0:
            _say(f"stopped by {stopped.signal.name}; the same command goes on where this one stopped")
        raise typer.Exit(stopped.exit_status) from None
    except BrokenPipeError:
        # Who read our output has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if is_reported(error):
            raise typer.Exit(FAILED) from None
        refused = denied(error)
        if refused is None or debug:
            traceback.print_exc()
        if refused is not None:
            _say(f"{prefix}{_styled('error:', '1;31')} {refused}")
            raise typer.Exit(USER) from None
        _say(f"\n{prefix}this is a defect of nemo_minitron or of a library under it; please report it with these lines")
        raise typer.Exit(FAILED) from None


def _rank() -> tuple[int, str]:
    """This process's rank, and what its messages begin with. Variables that make no sense are refused elsewhere."""
    try:
        rank, size = environment_rank()
    except MinitronError:
        return 0, ""
    return rank, f"rank {rank}: " if size > 1 and rank > 0 else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _styled(text: str, code: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
