"""The account of a data stage: every file and every document that was given is used, or named with the reason."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_minitron.data.documents import fault_place
from nemo_minitron.data.survey import LeftOut, SourceFile, Survey
from nemo_minitron.data.tally import Fault, Tally

_NAMES = 3
"""Files that are named for each reason in the table; `sources.json` names all."""

Account = dict[str, Any]


def account(survey: Survey, parts: Iterable[dict[str, Any]]) -> tuple[Account, Tally]:
    """What became of some sources.

    Args:
        survey: Their files.
        parts: Counts of all parts of all files, in order, as `shards.make_shard` returns them.

    Returns:
        JSON data: `rows` (by source and kind: files, documents, tokens, skipped), `skipped` (by reason) and `left_out`
        (files, by reason), with sums in `files`, `documents`, `tokens` and `documents_skipped`; and the tally of
        documents.
    """
    tally = Tally()
    rows: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for file in survey.files:
        rows[file.source, file.label]["files"] += 1
    lines: Counter[int] = Counter()
    for part in parts:
        file = survey.files[part["file"]]
        skipped = sum(row["count"] for row in part["skipped"].values())
        rows[file.source, file.label].update(documents=part["documents"], tokens=part["tokens"], skipped=skipped)
        _tally(tally, part, file, lines[part["file"]])
        lines[part["file"]] += part["length"]
    sums: Counter[str] = sum(rows.values(), Counter())
    found = {
        "files": {"used": len(survey.files), "left_out": len(survey.left_out)},
        "documents": sums["documents"],
        "tokens": sums["tokens"],
        "documents_skipped": sums["skipped"],
        "rows": [
            {"source": source, "kind": kind, **{key: row[key] for key in ("files", "documents", "tokens", "skipped")}}
            for (source, kind), row in rows.items()
        ],
        "skipped": [item.to_dict() for item in tally.skipped],
        "left_out": _reasons(survey.left_out),
    }
    return found, tally


def _tally(tally: Tally, part: dict[str, Any], file: SourceFile, base: int) -> None:
    tally.documents += part["documents"]
    for reason, row in part["skipped"].items():
        for number, label, detail in row["first"]:
            where = fault_place(file, label, number + base if number else 0)
            tally.skip(Fault(reason, detail, row["bad"]), where)
        left = row["count"] - len(row["first"])
        if left:
            tally.skip(Fault(reason, bad=row["bad"]), "", left)


def _reasons(left_out: Sequence[LeftOut]) -> list[dict[str, Any]]:
    paths: dict[str, list[str]] = defaultdict(list)
    for item in left_out:
        paths[item.reason].append(item.path)
    return [
        {"reason": reason, "files": len(names), "first": names[:_NAMES]}
        for reason, names in sorted(paths.items(), key=lambda row: (-len(row[1]), row[0]))
    ]


def table(found: Account, sources: Sequence[str]) -> list[str]:
    """The account as lines for a terminal.

    Args:
        found: What `account` returned.
        sources: Names of the sources, in order.
    """
    body = [
        (
            f"{_short(sources[row['source']])} ({row['kind']})",
            *(f"{row[key]:,}" for key in ("files", "documents", "tokens", "skipped")),
        )
        for row in found["rows"]
    ]
    if len(body) > 1:
        sums = (found["files"]["used"], found["documents"], found["tokens"], found["documents_skipped"])
        body.append(("all", *(f"{number:,}" for number in sums)))
    lines = aligned([("source", "files", "documents", "tokens", "skipped"), *body])
    for row in found["skipped"]:
        first = f": {row['first'][0]}" if row["bad"] and row["first"] else ""
        lines.append(f"skipped {row['documents']:,}: {row['reason']}{first}")
    for row in found["left_out"]:
        more = ", ..." if row["files"] > len(row["first"]) else ""
        lines.append(f"not used {row['files']:,}: {row['reason']}: {', '.join(row['first'])}{more}")
    return lines


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of text with the first column left and the others right aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _short(source: str) -> str:
    last = source.split("#", 1)[0].rstrip("/")
    return last if len(last) <= 48 else f"...{last[-45:]}"
