"""The record of a race as plain data: every candidate with its sizes, costs, and losses at each rung."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from nemo_minitron.arch.sizes import layer_axes
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.search.measures import table_row
from nemo_minitron.search.problem import SearchProblem
from nemo_minitron.search.race import RaceResult, Record

Row = dict[str, Any]


def candidate_rows(problem: SearchProblem, race: RaceResult, record: Record) -> list[Row]:
    """One row a candidate, in the order in which they were chosen."""
    failures = record.failures
    rows = []
    for candidate in problem.candidates:
        name = candidate.name
        rows.append(
            {
                "name": name,
                "label": candidate.label,
                **problem.space.named(candidate.sizes),
                **table_row(problem.measured, candidate.sizes),
                **losses(name, race),
                "failed": failures.get(name, ""),
            }
        )
    return rows


def layerwise_row(name: str, spec: ModelSpec | None, race: RaceResult, record: Record) -> Row:
    """The row of the candidate whose layers differ in size; its FFN and KV groups are means over layers.

    Args:
        name: Its name in the race.
        spec: Its architecture; None if there is none.
        race: The standings.
        record: What was measured.
    """
    row: Row = {"name": name, "label": "layers that differ"}
    if spec is not None:
        count = spec.num_layers
        row |= {
            "num_layers": count,
            "hidden_size": spec.hidden_size,
            **{row.size: sum(layer.size(row) for layer in spec.layers) / count for row in layer_axes(spec)},
            "params": parameter_count(spec),
            "non_embedding_params": parameter_count(spec, embeddings=False),
        }
    return row | losses(name, race) | {"failed": record.failures.get(name, "")}


def losses(name: str, race: RaceResult) -> Row:
    """A candidate's loss at each rung, in nats per token, and the standard deviation over seeds of the last one."""
    found: Row = {}
    for rung, standing in enumerate(race.standings):
        if name not in standing.losses:
            continue
        found[loss_key(rung)] = standing.losses[name]
        seeds = standing.by_seed[name]
        if len(seeds) > 1:
            mean = sum(seeds) / len(seeds)
            found[f"{loss_key(rung)}_deviation"] = (sum((x - mean) ** 2 for x in seeds) / (len(seeds) - 1)) ** 0.5
    return found


def loss_key(rung: int) -> str:
    """What a rung's loss is called."""
    return "loss_pruned" if rung == 0 else f"loss_rung{rung}"


def to_json(problem: SearchProblem, race: RaceResult, rows: Sequence[Row]) -> dict[str, Any]:
    """All of it."""
    trainings = problem.trainings
    return {
        "budgets": dict(problem.limits),
        "shapes": {
            "in_space": problem.found.total,
            "ruled_out": problem.found.ruled_out,
            "above": dict(problem.found.above),
            "below": problem.found.below,
            "passing": len(problem.found.shapes),
        },
        "winner": race.winner,
        "rungs": [
            {
                "tokens": 0 if rung == 0 else trainings[rung - 1].tokens,
                "order": list(standing.losses),
                "compared": list(standing.compared),
                "losses": standing.losses,
                "by_seed": standing.by_seed,
            }
            for rung, standing in enumerate(race.standings)
        ],
        "rank_correlations": race.correlations,
        "candidates": list(rows),
    }


def to_csv(rows: Sequence[Row]) -> str:
    """A table for a spreadsheet; a cell is empty where a candidate did not come so far."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda key: key == "failed")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
