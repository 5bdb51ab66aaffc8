"""The model after each round, as far as it is known: from the recipe, from a finished search, or foreseen."""

from pathlib import Path

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.run import RunConfig
from nemo_minitron.pruning.rounds import round_specs
from nemo_minitron.search.latency import Conditions, LatencyTable
from nemo_minitron.search.problem import SearchProblem, pose
from nemo_minitron.stages.run_folder import RunFolder


def students_of(config: RunConfig, teacher: ModelSpec, run: RunFolder | None = None) -> tuple[ModelSpec, ...]:
    """The model after each round; the last one is the student.

    A target with budgets has one round. Before its search is finished, a shape that fits stands for the student: all
    candidates use the budget alike.

    Raises:
        PlanError: The target or the rounds on the way to it cannot be.
        SearchError: No shape fits the budgets.
    """
    if not config.target.budgets:
        return round_specs(config.target, teacher, config.rounds)
    if run is not None and run.is_complete("search"):
        return (ModelSpec.from_dict(run.result("search")["spec"]),)
    problem = posed(config, teacher)
    return (problem.spec(problem.candidates[0].sizes),)


def posed(config: RunConfig, teacher: ModelSpec) -> SearchProblem:
    """The recipe's search, with its latency table where a budget needs one.

    Raises:
        SearchError: Rules contradict each other, no shape fits, or the table was timed for something else.
        SpecError: The teacher's layers differ in size.
    """
    deployment = config.target.deployment
    if not {"prefill_ms", "decode_ms"} & set(config.target.budgets) or deployment.latency_table is None:
        return pose(config, teacher)
    device = deployment.device
    if device is None:
        from nemo_minitron.search.timing import device_name

        device = device_name()
    table = LatencyTable.load(Path(deployment.latency_table), Conditions.of(teacher, deployment, device))
    return pose(config, teacher, table)
