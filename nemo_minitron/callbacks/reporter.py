"""What a run says while it works: stages, progress and plain lines, to a terminal or to a log.

On a terminal a progress bar with loss, tokens/s and ETA lives in the last line. Elsewhere (a file, a pipe, Slurm) one
plain line appears every few seconds, so that a log of hours stays small and can be searched.
Only rank 0's reporter speaks. Standard library until the first bar on a terminal.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

LOG_INTERVAL = 5.0
"""Seconds between two plain progress lines."""


class Progress:
    """How far a countable piece of work is. Yielded by `Reporter.progress`."""

    def __init__(self, show: Callable[["Progress"], None], *, label: str, total: int, unit: str, done: int) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = self.first = done
        self.fields: dict[str, str] = {}
        self.seconds_ahead = 0.0
        """Of work that is not counted and is still to come, such as validations between steps."""
        self._show = show
        self._cold_from = self._paced_from = (time.monotonic(), done)
        self._is_warm = False

    def advance(self, amount: int = 1, fields: Mapping[str, str] | None = None) -> None:
        """Count work done; `fields` (name to text, as `{"loss": "1.21"}`) replace those shown."""
        self.done += amount
        # The first piece makes buffers and chooses kernels: it says little about the others.
        if amount and not self._is_warm:
            self._cold_from, self._paced_from = self._paced_from, (time.monotonic(), self.done)
            self._is_warm = True
        if fields is not None:
            self.fields = dict(fields)
        self._show(self)

    def pause(self, seconds: float) -> None:
        """Leave out of the pace what something else took between two pieces."""
        start, done = self._paced_from
        self._paced_from = (start + seconds, done)

    @property
    def seconds_left(self) -> float | None:
        """At the pace since the first piece, with `seconds_ahead`; None before the first piece is done."""
        if not self._is_warm:
            return None
        start, done = self._paced_from if self.done > self._paced_from[1] else self._cold_from
        return (time.monotonic() - start) / (self.done - done) * (self.total - self.done) + self.seconds_ahead

    def line(self) -> str:
        """The state as one line, as in `distill 60/200 steps · loss 1.21 · 3.1k tokens/s · ETA 00:12`."""
        parts = [f"{self.label} {self.done}/{self.total} {self.unit}".rstrip()]
        parts += [f"{name} {text}".strip() for name, text in self.fields.items()]
        left = self.seconds_left
        if left is not None and self.done < self.total:
            parts.append(f"ETA {clock(left)}")
        return " · ".join(parts)


class Reporter:
    """Speaks for a run.

    Ranks above 0 are silent. It goes to standard output, and bars are drawn on a terminal, unless told otherwise.
    """

    def __init__(self, *, silent: bool = False, stream: TextIO | None = None, terminal: bool | None = None) -> None:
        self.silent = silent
        self._stream = stream
        self._terminal = terminal
        self._live: Any = None
        self._status: Any = None

    @property
    def terminal(self) -> bool:
        """Whether the output is a terminal that can redraw a line."""
        return self._out.isatty() if self._terminal is None else self._terminal

    @property
    def _out(self) -> TextIO:
        return sys.stdout if self._stream is None else self._stream

    def line(self, text: str) -> None:
        """One line for the user, above a bar if there is one."""
        if self.silent:
            return
        shown = self._live or self._status
        if shown is not None:
            shown.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    def stage_started(
        self, name: str, position: int, count: int, *, resumed: bool = False, left: float | None = None
    ) -> None:
        """A stage begins: a line in a log; a spinner on a terminal, where its line appears when it ends.

        `left` is in seconds until the run ends, where that is known.
        """
        ends = "" if left is None else f" · the run ends in about {duration(round(left))}"
        if resumed or not self.terminal:
            self.line(f"{position}/{count} {name:<9} {'goes on where it stopped' if resumed else 'starts'}{ends}")
        if self.terminal and not self.silent:
            from rich.console import Console

            self._status = Console(file=self._out, force_terminal=True).status(f"{position}/{count} {name}{ends}")
            self._status.start()

    def rest(self) -> None:
        """Take the spinner away; a stage has ended, however it did."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def stage_skipped(self, name: str, position: int, count: int) -> None:
        """A stage was complete already."""
        self.line(f"{position}/{count} {name:<9} already done")

    def stage_finished(self, name: str, position: int, count: int, *, seconds: float, summary: str = "") -> None:
        """A stage is complete."""
        self.rest()
        self.line(f"{position}/{count} {name:<9} {duration(seconds):>8}  {summary}".rstrip())

    @contextmanager
    def progress(self, label: str, total: int, *, unit: str = "", done: int = 0) -> Iterator[Progress]:
        """Show work of `total` pieces, `done` of which were done before."""
        if self.silent:
            yield Progress(lambda progress: None, label=label, total=total, unit=unit, done=done)
        elif self.terminal:
            self.rest()
            with _Bar(self, label, total, unit, done) as progress:
                yield progress
        else:
            yield Progress(_Log(self), label=label, total=total, unit=unit, done=done)


class _Log:
    """Shows the first, the last, and in between one state every `LOG_INTERVAL` seconds."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self._next or progress.done >= progress.total:
            self._next = time.monotonic() + LOG_INTERVAL
            self._reporter.line(progress.line())


class _Bar:
    """A rich progress bar for one piece of work; gone when that is done."""

    def __init__(self, reporter: Reporter, label: str, total: int, unit: str, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        columns = (
            TextColumn("    {task.description:<9}", style="bold"),
            BarColumn(bar_width=12),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
            TextColumn("{task.fields[shown]}", style="cyan", table_column=Column()),  # wraps on a narrow terminal
        )
        console = Console(file=reporter._out, force_terminal=True)
        self._reporter = reporter
        self._bar = RichProgress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(label, total=total, completed=done, unit=unit, shown="")
        self._progress = Progress(self._update, label=label, total=total, unit=unit, done=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        self._reporter._live = self._bar
        return self._progress

    def __exit__(self, *unused: object) -> None:
        self._reporter._live = None
        self._bar.stop()

    def _update(self, progress: Progress) -> None:
        shown = " · ".join(progress.line().split(" · ")[1:])
        self._bar.update(self._task, completed=progress.done, shown=shown)


def compact(number: float) -> str:
    """Three figures: `431`, `3.1k`, `12.4k`, `1.2M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """`02:05`, or `1:02:05` from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def duration(seconds: float) -> str:
    """`4.2 s` below a minute, `3 min 20 s` below an hour, `2 h 05 min` above."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes} min {second:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
