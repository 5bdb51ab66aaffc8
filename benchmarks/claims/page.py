"""Tables of the claims out of a results file, and the pages that hold them."""

import math
from collections.abc import Iterable, Sized
from pathlib import Path

from benchmarks.claims.results import Difference, Results
from benchmarks.claims.table import CLAIMS, OBJECTIVES, Claim, Finding, Measure, Row, When, trials

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/claims.md"
OBJECTIVES_PAGE = ROOT / "docs/objectives.md"
END = "<!-- end -->"
SURE = 2.0
"""Standard errors from which on a difference counts."""
WIDE = 0.05
"""Nats per token: an error of half of it or more tells no difference from none."""
NOT_RUN = "not run yet"
NO_SEEDS = "none"
VERDICTS = ("agrees", "disagrees", "undecided", NOT_RUN)
ON_THE_PAGE = tuple(claim for claim in CLAIMS if claim is not OBJECTIVES)


def newest_results() -> Path:
    """The results file that the pages are written from."""
    return sorted((ROOT / "benchmarks").glob("*-claims.jsonl"))[-1]


def begin(name: str) -> str:
    """What stands before a part of a page that a command writes."""
    return f"<!-- {name}: written by python -m benchmarks.claims --write -->"


def write(path: Path) -> None:
    """Put the tables of a results file into both pages."""
    for target, parts in pages(Results.load(path), path.name).items():
        text = target.read_text(encoding="utf-8")
        for name, part in parts.items():
            before, mark, rest = text.partition(begin(name))
            text = f"{before}{mark}\n\n{part}\n\n{END}{rest.partition(END)[2]}"
        target.write_text(text, encoding="utf-8")


def pages(results: Results, file: str) -> dict[Path, dict[str, str]]:
    """What the pages hold between their marks, by page and name of the part."""
    parts = {claim.name: section(claim, results) for claim in ON_THE_PAGE}
    objectives = {OBJECTIVES.name: section(OBJECTIVES, results)}
    return {PAGE: {"summary": summary(results, file), **parts}, OBJECTIVES_PAGE: objectives}


def summary(results: Results, file: str) -> str:
    """Every claim with what came out of it, and how long it took."""
    rows = []
    for claim in ON_THE_PAGE:
        verdicts = [verdict(finding, claim, results) for finding in claim.findings]
        told = ", ".join(f"{word}: {verdicts.count(word)}" for word in VERDICTS if word in verdicts)
        rows.append((f"[{claim.title}](#{_anchor(claim.title)})", told, *_took(claim, results)))
    table = _markdown(["claim", "the papers' findings here", "seeds", "minutes", "CPU minutes"], rows)
    return f"{table}\n\n<sub>{_about(results)} `benchmarks/{file}`.</sub>"


def section(claim: Claim, results: Results) -> str:
    """A claim's table, what the papers found beside what was found here, and its time."""
    parts = [_markdown(_HEADINGS, (_row(row, results) for row in claim.rows), numbers=True)]
    if claim.findings:
        headings = ["the papers", "here", "seeds", ""]
        parts.append(_markdown(headings, (_compared(finding, claim, results) for finding in claim.findings)))
    seeds, minutes, cpu = _took(claim, results)
    told = NOT_RUN if seeds == NO_SEEDS else f"{minutes} min, {cpu} CPU min"
    parts.append(f"`python -m benchmarks.claims --claim {claim.name}`: {told}; seeds {seeds}.")
    return "\n\n".join(parts)


def verdict(finding: Finding, claim: Claim, results: Results) -> str:
    """What the results say to a finding: agrees, disagrees, undecided, or not run yet."""
    found = _difference(finding, claim, results)
    if found is None:
        return NOT_RUN
    sure = SURE * found.error
    if finding.equal:
        if abs(found.mean) > max(sure, finding.within):
            return "disagrees"
        return "agrees" if sure <= WIDE else "undecided"
    if abs(found.mean) <= sure:
        return "undecided"
    return "agrees" if found.mean > 0 else "disagrees"


_HEADINGS = ["", "M parameters", "pruned", "distilled", "KL, pruned", "KL, distilled", "seeds"]


def _row(row: Row, results: Results) -> tuple[str, ...]:
    before, after = row.trial(When.BEFORE), row.trial(When.AFTER)
    lines = [*results.of(before).values(), *results.of(after).values()]
    if not lines:
        return (row.label, *[""] * 5, NOT_RUN)
    losses = [results.mean(trial, Measure.LOSS.value) for trial in (before, after)]
    kls = [results.mean(trial, Measure.KL.value) for trial in (before, after)]
    return (
        row.label,
        f"{lines[0]['parameters'] / 1e6:.1f}",
        *("" if loss is None else f"{math.exp(loss):,.2f}" for loss in losses),
        *("" if kl is None else f"{kl:.3f}" for kl in kls),
        _count(results.of(before), results.of(after)),
    )


def _count(before: Sized, after: Sized) -> str:
    return f"{len(after)}" if len(before) == len(after) else f"{len(before)}, {len(after)}"


def _compared(finding: Finding, claim: Claim, results: Results) -> tuple[str, ...]:
    found = _difference(finding, claim, results)
    pair = f"{finding.other} minus {finding.better}, {finding.when}"
    if found is None:
        return f"{finding.text}", pair, "0", NOT_RUN
    unit = "KL" if finding.measure is Measure.KL else "loss"
    here = f"{pair}: {unit} {found.mean:+.3f} ± {found.error:.3f}"
    return finding.text, here, f"{len(found.seeds)}", f"**{verdict(finding, claim, results)}**"


def _difference(finding: Finding, claim: Claim, results: Results) -> Difference | None:
    rows = {row.label: row for row in claim.rows}
    other, better = (rows[label].trial(finding.when) for label in (finding.other, finding.better))
    return results.difference(other, better, finding.measure)


def _took(claim: Claim, results: Results) -> tuple[str, str, str]:
    """Seeds, minutes and CPU minutes; what claims share counts in each."""
    wanted = trials((claim,))
    seeds = sorted({seed for trial in wanted for seed in results.of(trial)})
    minutes, cpu = (f"{results.seconds(wanted, clock) / 60:.0f}" for clock in ("seconds", "cpu_seconds"))
    return ", ".join(map(str, seeds)) or NO_SEEDS, minutes, cpu


def _about(results: Results) -> str:
    rows = results.every()
    if not rows:
        return "No results."
    tokens = ", ".join(f"{count:,}" for count in sorted({row["tokens"] for row in rows}))
    teacher = [value for row in rows for value in row["teacher_nats"]]
    values = {name: ", ".join(sorted({str(row[name]) for row in rows})) for name in ("commit", "precision", "seed")}
    return (
        f"{tokens} tokens a distillation; the teacher's perplexity is {math.exp(sum(teacher) / len(teacher)):.2f}; "
        f"seeds {values['seed']}; {values['precision']}; commit {values['commit']};"
    )


def _anchor(title: str) -> str:
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def _markdown(headings: list[str], rows: Iterable[tuple[str, ...]], *, numbers: bool = False) -> str:
    """A table; with `numbers`, all columns but the first are aligned at the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(headings) - 1))]
    lines = [headings, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
