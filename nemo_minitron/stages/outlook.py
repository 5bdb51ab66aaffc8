"""When a run will end: said at the start of each stage, from what was measured and what the recipe asks for."""

from collections.abc import Mapping, Sequence

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import BudgetOf, TrainingConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.estimate.compute import forward_flops
from nemo_minitron.estimate.work import work_of
from nemo_minitron.stages.base import Stage
from nemo_minitron.stages.budget import taken
from nemo_minitron.stages.chain import MODELS
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.stages.students import students_of

EFFICIENCY = 0.7
"""Of the rate of bare matrix products, what stages with models reach on a CPU; used until one was timed."""
_FILE_SECONDS: Mapping[str, float] = {"import": 5.0, "data": 8.0, "prune": 6.0, "export": 10.0, "report": 5.0}
"""Stages that move files, for a model of some hundred million parameters. They do not matter in longer runs."""


class Outlook:
    """Seconds that the stages of a run will take.

    Args:
        config: The recipe with its precision settled.
        run: The run folder; the teacher's sizes are read from its first stage.
        stages: Those that this command does, in order.
        chain: All stages of the recipe.
        ranks: Processes of the run.
    """

    def __init__(
        self, config: RunConfig, run: RunFolder, stages: Sequence[Stage], *, chain: Sequence[Stage], ranks: int
    ) -> None:
        self._config, self._run, self._ranks = config, run, ranks
        self._left = {stage.name: stage for stage in stages}
        self._chain = chain
        self._rate: float | None = None
        self._teacher: ModelSpec | None = None
        self._students: tuple[ModelSpec, ...] = ()

    def seconds(self) -> float | None:
        """Until the last stage is done; None before the first stage has read the model."""
        expected = [self._expected(stage) for stage in self._left.values()]
        return None if self._model() is None else sum(expected)

    def finished(self, name: str, seconds: float) -> None:
        """Leave a stage behind; one that ran models says how fast they run here."""
        stage = self._left.pop(name, None)
        self._students = ()
        if stage is None or self._is_timed(stage):
            return
        if (flops := self._flops(stage)) and seconds > 0:
            self._rate = flops / seconds

    def minutes_for(self, stage: Stage) -> float | None:
        """What all other stages of the recipe leave a training whose budget is the complete run's; None for others.

        Stages that are done count with the time that they took. Several such trainings share alike.
        """
        section = self._training(stage)
        if section is None or section.minutes is None or section.minutes_of is not BudgetOf.RUN:
            return None
        ahead = [other for other in self._chain if other.name in self._left or not self._run.is_complete(other.name)]
        sharing = [other for other in ahead if self._training(other) is section or other.name == stage.name]
        spent = sum(self._run.result(other.name).get("seconds", 0.0) for other in self._chain if other not in ahead)
        others = sum(self._expected(other) for other in ahead if other not in sharing)
        left: float = (section.minutes - (spent + others) / 60) / len(sharing)
        return left

    def _is_timed(self, stage: Stage) -> bool:
        section = self._training(stage)
        return section is not None and section.minutes is not None

    def _training(self, stage: Stage) -> TrainingConfig | None:
        section = getattr(self._config, stage.kind, None)
        return section if isinstance(section, TrainingConfig) else None

    def _model(self) -> ModelSpec | None:
        if self._teacher is None and self._run.is_complete("import") and "spec" in (read := self._run.result("import")):
            self._teacher = ModelSpec.from_dict(read["spec"])
        return self._teacher

    def _expected(self, stage: Stage) -> float:
        if (budget := self._budget(stage)) is not None:
            return budget
        flops = self._flops(stage)
        return flops / self._speed() if flops else _FILE_SECONDS.get(stage.kind, 0.0)

    def _budget(self, stage: Stage) -> float | None:
        section = self._training(stage)
        if section is None or section.minutes is None:
            return None
        left = self.minutes_for(stage)
        trainings = sum(self._training(other) is section for other in self._chain)
        return 60 * (section.minutes if left is None else taken(section.minutes, left, trainings))

    def _flops(self, stage: Stage) -> float:
        """Operations of a stage that runs models; 0 for another."""
        config, teacher = self._config, self._model()
        if teacher is None:
            return 0.0
        try:
            students = self._students or students_of(config, teacher, self._run)
        except MinitronError:  # stage prune will say so
            return 0.0
        self._students = students
        if stage.kind == "evaluate":
            asked = config.evaluate
            each = asked.max_tokens * asked.sequence_length / (asked.stride or asked.sequence_length)
            models = [teacher] + [students[-1]] * (len(set(MODELS) & stage.inputs.keys()) - 1)
            return sum(each * forward_flops(model, asked.sequence_length) for model in models)
        work = work_of(stage.kind, stage.round, config, teacher, students, ranks=self._ranks)
        return 0.0 if work is None else work.flops

    def _speed(self) -> float:
        """FLOP/s of all ranks together."""
        if self._rate is None:
            self._rate = expected_rate(self._config.precision, self._ranks)
        return self._rate


def expected_rate(precision: Precision, ranks: int) -> float:
    """FLOP/s that stages with models will reach on this machine, all ranks together, from a short measurement."""
    import torch

    from nemo_minitron.megatron.build import torch_dtype
    from nemo_minitron.ops.product_speed import product_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return EFFICIENCY * ranks * product_rate(device, torch_dtype(precision))
