"""Which units a kept unit is the sum of, as exact integer coefficients: data of a plan, composed without rounding.

Muralidharan et al., arXiv:2407.14679, section 2.3: when L heads are pruned to K, ranked by importance, the new i-th is

    head_i + (head_i - head_{2K-i+1})    for i in [K - (L - K), K]

so that the least of the kept takes on the residual to the best of the dropped, and so on. Where 2K-i+1 exceeds L there
is no such head (the lower end of the paper's interval), and head_i stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_minitron.errors import PlanError

Terms = tuple[tuple[int, int], ...]
"""Unit and its coefficient, ascending by unit."""
Mixes = tuple[tuple[int, Terms], ...]
"""Kept unit and what it becomes, ascending; units that are not listed stay as they are."""


def residual_mixes(order: Sequence[int], *, keep: int) -> Mixes:
    """The paper's merging of the dropped units' residuals.

    Args:
        order: Units, the most important first.
        keep: How many of them stay.
    """
    mixes = []
    for rank, unit in enumerate(order[:keep], 1):
        partner = 2 * keep - rank + 1
        if keep < partner <= len(order):
            mixes.append((unit, _terms({unit: 2, order[partner - 1]: -1})))
    return tuple(sorted(mixes))


def composed(first: Mixes, first_kept: Sequence[int], then: Mixes, then_kept: Sequence[int]) -> Mixes:
    """What units are made of after two prunings, in units of the first one's teacher.

    Args:
        first: Mixes of the first pruning.
        first_kept: Units that it keeps; `then` counts them from 0.
        then: Mixes of the second pruning.
        then_kept: Units that the second pruning keeps.
    """
    once, twice = dict(first), dict(then)
    found = []
    for unit in then_kept:
        total: dict[int, int] = {}
        for middle, outer in twice.get(unit, ((unit, 1),)):
            for origin, inner in once.get(first_kept[middle], ((first_kept[middle], 1),)):
                total[origin] = total.get(origin, 0) + outer * inner
        terms = _terms(total)
        if terms != ((first_kept[unit], 1),):
            found.append((first_kept[unit], terms))
    return tuple(found)


def problems_of(mixes: Mixes, *, kept: Sequence[int], size: int) -> Iterator[str]:
    """What is wrong with mixes of an axis of `size` units, of which `kept` stay."""
    units = [unit for unit, _ in mixes]
    if units != sorted(set(units)):
        yield "not ascending, or one unit occurs twice"
    for unit in sorted(set(units) - set(kept)):
        yield f"unit {unit} does not stay"
    for unit, terms in mixes:
        origins = [origin for origin, _ in terms]
        if origins != sorted(set(origins)) or not all(0 <= origin < size for origin in origins):
            yield f"unit {unit} is made of {origins}, which are not ascending units of {size}"
        if any(coefficient == 0 for _, coefficient in terms):
            yield f"unit {unit} has a coefficient of 0"


def to_json(mixes: Mixes) -> dict[str, dict[str, int]]:
    """`{kept: {unit: coefficient}}`; `from_json` is the inverse."""
    return {str(unit): {str(origin): coefficient for origin, coefficient in terms} for unit, terms in mixes}


def from_json(data: Mapping[str, Any], *, what: str) -> Mixes:
    """Read back what `to_json` wrote.

    Raises:
        PlanError: A key is no index, or a coefficient no integer.
    """
    return tuple(
        (_index(unit, what), tuple(_term(item, what) for item in terms.items())) for unit, terms in data.items()
    )


def _term(item: tuple[str, Any], what: str) -> tuple[int, int]:
    if type(item[1]) is not int:
        raise PlanError(f"{what}: coefficient {item[1]!r}", rule="an integer")
    return _index(item[0], what), item[1]


def _index(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise PlanError(f"{what}: {text!r} is not an index")
    return int(text)


def _terms(coefficients: Mapping[int, int]) -> Terms:
    return tuple(sorted((unit, coefficient) for unit, coefficient in coefficients.items() if coefficient))
