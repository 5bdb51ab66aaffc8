"""Searches over the tiny model, for tests: module-level functions that any rank can run."""

from pathlib import Path
from typing import Any

from tests.chain_jobs import merged, run_to

NO_SIZES = dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"))
SEARCH = {
    "space": {"num_layers": [2, 3, 4], "hidden_size": [32, 48, 64], "ffn_hidden_size": [32, 64, 96]},
    "tolerance": 0.2,
    "candidates": 5,
    "samples": 4,
    "rungs": [{"candidates": 3, "tokens": 512}, {"candidates": 2, "tokens": 1024}],
    "seeds": 2,
    "baselines": True,
}


def settings(**search: Any) -> dict[str, Any]:
    """Sections of the recipe."""
    return {"target": {**NO_SIZES, "ratio": 0.6}, "search": {**SEARCH, **search}}


class CutOff(BaseException):
    """A run that ends where no one asked it to."""


def run_with_failures(folder: Path, inputs: Path, last: str, changes: dict[str, Any], trainings: int | None):
    """A chain in which candidates of hidden size 48 and 3 layers cannot be trained.

    Args:
        folder: The run folder.
        inputs: The tiny model and its corpus.
        last: Stage to stop after.
        changes: Sections of the recipe.
        trainings: Trainings after which the run is cut off; None for none.

    Returns:
        The stages' results; None for a run that was cut off.
    """
    from nemo_minitron.errors import TrainingError
    from nemo_minitron.stages import search

    trained = search.trained_loss_of
    left = [trainings]

    def failing(source: Any, *arguments: Any, **named: Any) -> float:
        if left[0] is not None:
            if left[0] == 0:
                raise CutOff
            left[0] -= 1
        if source.spec.hidden_size == 48 and source.spec.num_layers == 3:
            raise TrainingError("this one cannot be trained")
        return trained(source, *arguments, **named)

    search.trained_loss_of = failing
    try:
        return run_to(folder, inputs, last, **changes)
    except CutOff:
        return None
    finally:
        search.trained_loss_of = trained


def run_where_layers_win(folder: Path, inputs: Path, last: str, changes: dict[str, Any]):
    """A chain in which every trained candidate but the one whose layers differ comes out badly."""
    from nemo_minitron.stages import search

    measure = search._Search.measure

    def biased(self: Any, name: str, rung: int, seed: int) -> float:
        return measure(self, name, rung, seed) + (99.0 if rung > 0 and name != "layerwise" else 0.0)

    search._Search.measure = biased
    try:
        return run_to(folder, inputs, last, **changes)
    finally:
        search._Search.measure = measure


def losses_of_cuts(
    run: Path, inputs: Path, changes: dict[str, Any], cuts: list[tuple[int, dict[str, Any]]]
) -> list[float]:
    """Losses of the teacher with one layer really cut, each alone.

    Args:
        run: A run with scores.
        inputs: The tiny model and its corpus.
        changes: Sections of the recipe.
        cuts: A layer, and its form as `block_losses.json` tells it.
    """
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.megatron import runtime
    from nemo_minitron.pruning.apply import PrunedSource
    from nemo_minitron.pruning.build import build_plan_by_layer
    from nemo_minitron.pruning.scores import Scores
    from nemo_minitron.stages.engine import join_processes
    from nemo_minitron.stages.race import loss_of
    from nemo_minitron.stages.run_folder import RunFolder

    config = merged(inputs, **changes)
    teacher = open_checkpoint(run / "stages/import/teacher")
    scores = Scores.load(run / "stages/score/scores.safetensors")
    join_processes(config, RunFolder(run))
    found = []
    try:
        for layer, form in cuts:
            sizes = dict(enumerate(teacher.spec.layers))
            before = sizes.pop(layer)
            if not form.get("dropped"):
                left = before.without(*form.get("without", ()))
                sizes[layer] = left.with_sizes(**{name: size for name, size in form.items() if name != "without"})
            plan = build_plan_by_layer(scores, config.target, sizes, provenance={})
            found.append(loss_of(PrunedSource(teacher, plan), config, run / "stages/data"))
    finally:
        runtime.stop()
    return found
