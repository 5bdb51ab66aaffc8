"""What a check is, and the list of them in the order of their value."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

MODULES = (
    "benchmarks.gpu.checks.training",
    "benchmarks.gpu.checks.losses",
    "benchmarks.gpu.checks.attention",
    "benchmarks.gpu.checks.formulas",
    "benchmarks.gpu.checks.scoring",
    "benchmarks.gpu.checks.memory",
    "benchmarks.gpu.checks.engine",
    "benchmarks.gpu.checks.mamba",
    "benchmarks.gpu.checks.generation",
    "benchmarks.gpu.checks.loss_speed",
    "benchmarks.gpu.checks.step_speed",
    "benchmarks.gpu.checks.chains",
    "benchmarks.gpu.checks.demo",
)


class Kind(StrEnum):
    """What a check is for."""

    CORRECTNESS = "correctness"
    SPEED = "speed"


class UnavailableError(Exception):
    """This machine lacks what the check needs; the message says what. The check counts as skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A figure that is wanted, and the one that was found."""

    name: str
    wanted: str
    found: float
    met: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a check found.

    Attributes:
        figure: One short line, or several, for a person.
        ok: Whether what was computed is right. A missed target is not an error.
        figures: The same and more as plain numbers, for the JSON.
        targets: Wanted figures.
    """

    figure: str
    ok: bool = True
    figures: dict[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: How it is called on the command line.
        title: What it shows, in one line.
        kind: Correctness or speed.
        order: Lower runs earlier.
        seconds: What it takes on an H100, generously. It is skipped when less time is left.
        limit: When it is given up.
        needs: Modules without which it is skipped.
        run: Does it.
    """

    name: str
    title: str
    kind: Kind
    order: int
    seconds: float
    limit: float
    needs: tuple[str, ...]
    run: Callable[["Bench"], Outcome]

    def described(self) -> dict[str, Any]:
        """Everything but the function, as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "run"}

    def missing(self) -> list[str]:
        """Modules that it needs and that are not here."""
        return [module for module in self.needs if not is_installed(module)]


_CHECKS: dict[str, Check] = {}


def check(
    *,
    order: int,
    seconds: float,
    limit: float | None = None,
    kind: Kind = Kind.CORRECTNESS,
    needs: Iterable[str] = (),
) -> Callable[[Callable[["Bench"], Outcome]], Callable[["Bench"], Outcome]]:
    """Register a function as a check, under its own name and the first line of its docstring.

    Args:
        order: Lower runs earlier: the most valuable first.
        seconds: Estimated time on an H100.
        limit: Seconds after which it is given up; None for four times the estimate, and 20 at the least.
        kind: What it is for.
        needs: Modules it needs besides torch.
    """

    def register(run: Callable[["Bench"], Outcome]) -> Callable[["Bench"], Outcome]:
        _CHECKS[run.__name__] = Check(
            name=run.__name__,
            title=(run.__doc__ or "").strip().splitlines()[0].rstrip("."),
            kind=kind,
            order=order,
            seconds=seconds,
            limit=max(20.0, 4 * seconds) if limit is None else limit,
            needs=tuple(needs),
            run=run,
        )
        return run

    return register


def load(modules: Iterable[str] = ()) -> list[Check]:
    """All checks of this package and of further modules, most valuable first.

    In the place of a module whose imports fail for want of a library stands one check, under the module's name, that
    is skipped for that reason.
    """
    for module in (*MODULES, *modules):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            _stand_in(module, error)
    return sorted(_CHECKS.values(), key=lambda each: each.order)


def _stand_in(module: str, error: ModuleNotFoundError) -> None:
    name = module.rpartition(".")[2]

    def unavailable(bench: "Bench") -> Outcome:
        raise UnavailableError(f"needs {error.name}")

    _CHECKS[name] = Check(
        name=name,
        title=f"Everything in {name}",
        kind=Kind.CORRECTNESS,
        order=100,
        seconds=1.0,
        limit=20.0,
        needs=(),
        run=unavailable,
    )


def is_installed(module: str) -> bool:
    """Whether a module can be found; its parents are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
