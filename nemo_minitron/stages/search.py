"""Search: shapes within the budgets, pruned, measured, and the best of them trained a little; leaves the best plan."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.load import to_yaml
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.data.tokenizer import digest_of_files
from nemo_minitron.megatron.placement import check_layout
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.report.pareto import pareto
from nemo_minitron.search import results
from nemo_minitron.search.problem import SearchProblem, sized_target, target_by_layer
from nemo_minitron.search.race import RaceResult, Record, Rung, Standing, Task, run_race
from nemo_minitron.stages import cache, layerwise, rungs
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.distill import order_seed
from nemo_minitron.stages.files import write_json, write_text
from nemo_minitron.stages.prune import check_export
from nemo_minitron.stages.race import CachedText, loss_of, trained_loss_of
from nemo_minitron.stages.students import posed

RESULT, TABLE, PICTURE, PLAN, RECIPE = "candidates.json", "candidates.csv", "pareto.svg", "plan.json", "recipe.yaml"


def run(context: StageContext) -> dict[str, Any]:
    """Write every candidate, the picture, and the winner's plan and recipe; returns what won."""
    teacher = open_checkpoint(context.input("model"))
    problem = posed(context.config, teacher.spec)
    if context.config.search.layerwise is not None:
        layerwise.check_forms(context, teacher.spec)
    found = problem.found
    context.reporter.line(
        f"          {len(found.shapes):,} of {found.total:,} shapes fit; {len(problem.candidates)} candidates"
    )
    search = _Search(context, teacher, problem)
    record = rungs.read_record(context)
    race = run_race(
        [candidate.name for candidate in problem.candidates],
        _rungs(context.config.search),
        rungs.Settling(context, search, record),
        record=record,
        comparing=lambda first: _extra(problem, first),
    )
    plan, rows = search.plan(race.winner), _rows(search, race, record)
    if context.rank == 0:
        _leave(context, search, race, rows)
        rungs.clear(context)
    return {
        "spec": plan.student.to_dict(),
        "winner": race.winner,
        "loss": race.standings[-1].losses[race.winner],
        "candidates": len(problem.candidates),
        "rows": rows,
        "rungs": len(race.standings),
        "budget": next(iter(problem.limits)),
        "failed": record.failures,
        "rank_correlations": race.correlations,
        "summary": f"{race.winner} is the best of {len(rows)}: "
        f"{race.standings[-1].losses[race.winner]:.3f} nats per token",
    }


class _Search:
    """Measures candidates of one stage."""

    def __init__(self, context: StageContext, teacher: TensorSource, problem: SearchProblem) -> None:
        self._context, self._teacher, self.problem = context, teacher, problem
        self._scores = Scores.load(context.input("scores"))
        self._scores.check_made_for(teacher.spec, tokenizer_digest=digest_of_files(teacher.tokenizer_files()))
        self._candidates = {candidate.name: candidate for candidate in problem.candidates}
        self._text: CachedText | None = None
        self._by_layer: PruningPlan | Exception | None = None

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Make what the candidates of a rung share. Collective over all ranks, which work apart afterwards."""
        if self._text is None and any(task.rung for task in tasks):
            self._text = self._cached_text()
        if any(task.candidate == layerwise.NAME for task in tasks):
            self._choose_layers()

    def plan(self, name: str) -> PruningPlan:
        """What stays of the teacher in a candidate, by the scores. Collective.

        Raises:
            MinitronError: There is no such plan.
        """
        if name == layerwise.NAME:
            if isinstance(found := self._choose_layers(), Exception):
                raise found
            return found
        return build_plan(self._scores, self.target(name), self._teacher.spec)

    def target(self, name: str) -> TargetConfig:
        """The sizes that a recipe asks for to get a candidate."""
        target = self._context.config.target
        if name == layerwise.NAME:
            plan = self.plan(name)
            layers = {layer.source: sizes for layer, sizes in zip(plan.layers, plan.student.layers, strict=True)}
            return target_by_layer(target, plan.spec, layers)
        return sized_target(target, self.problem.space.named(self._candidates[name].sizes))

    def measure(self, name: str, rung: int, seed: int) -> float:
        """See `search.race.Measurement`.

        Raises:
            MinitronError: The candidate cannot be pruned, split over the ranks, exported, or trained.
        """
        context, config = self._context, self._context.config
        plan = self.plan(name)
        check_layout(plan.student, config.parallel)
        check_export(config, plan.student, self._teacher.family)
        source = PrunedSource(self._teacher, plan)
        if rung == 0:
            loss = loss_of(source, config, context.input("data"))
        else:
            training = self.problem.trainings[rung - 1]
            assert self._text is not None, "prepared"
            loss = trained_loss_of(source, config, training, self._text, seed=seed)
        return loss

    def _choose_layers(self) -> PruningPlan | Exception:
        """The plan whose layers differ, made once, or why there is none. Collective over all ranks the first time."""
        if self._by_layer is None:
            try:
                self._by_layer = layerwise.layerwise_plan(self._context, self.problem, self._scores)
            except rungs.failures(self._context.world_size) as error:
                self._by_layer = error.with_traceback(None)  # whose frames hold the teacher
        return self._by_layer

    def _cached_text(self) -> CachedText:
        """The teacher's targets of the longest rung's samples, made once."""
        context = self._context
        longest = max(self.problem.trainings, key=lambda training: training.steps)
        config = context.config.model_copy(update={"cache": context.config.search.cache, "distill": longest})
        cache.run(replace(context, config=config))
        return CachedText(
            folder=context.input("data"),
            targets=context.out / "targets",
            samples=longest.steps * longest.batch.global_batch_size,
            order_seed=order_seed(context),
        )


def _rungs(search: SearchConfig) -> list[Rung]:
    last = len(search.rungs) - 1
    return [
        Rung(candidates=rung.candidates, seeds=search.seeds if number == last else 1)
        for number, rung in enumerate(search.rungs)
    ]


def _extra(problem: SearchProblem, first: Standing) -> Sequence[str]:
    """What runs in the last rung in any case.

    The baselines are uniform scaling, depth alone, and the median candidate of the first trained rung.
    """
    search = problem.config.search
    extra: list[str] = []
    if search.baselines:
        order = list(first.losses)
        labelled = [candidate.name for candidate in problem.candidates if candidate.label]
        extra = [*labelled, order[len(order) // 2]]
    if search.layerwise is not None:
        extra.append(layerwise.NAME)
    return list(dict.fromkeys(extra))


def _rows(search: "_Search", race: RaceResult, record: Record) -> list[results.Row]:
    """Every candidate, the one whose layers differ last."""
    rows = results.candidate_rows(search.problem, race, record)
    if search.problem.config.search.layerwise is not None:
        spec = search.plan(layerwise.NAME).student if layerwise.NAME in race.standings[-1].losses else None
        rows.append(results.layerwise_row(layerwise.NAME, spec, race, record))
    return rows


def _leave(context: StageContext, search: "_Search", race: RaceResult, rows: list[results.Row]) -> None:
    problem = search.problem
    write_json(context.out / RESULT, results.to_json(problem, race, rows))
    write_text(context.out / TABLE, results.to_csv(rows))
    budget = next(iter(problem.limits))
    write_text(context.out / PICTURE, pareto(rows, budget, rungs=len(race.standings)).wide)
    search.plan(race.winner).save(context.out / PLAN)
    write_text(context.out / RECIPE, _recipe(context.config, race.winner, search.target(race.winner)))


def _recipe(config: RunConfig, winner: str, target: TargetConfig) -> str:
    """The recipe that trains the winner without a search."""
    changed = config.model_copy(update={"target": target, "search": SearchConfig()})
    return f"# {winner}: what `nemo-minitron search` found within {_told(config)}\n" + to_yaml(changed)


def _told(config: RunConfig) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in config.target.budgets.items())
