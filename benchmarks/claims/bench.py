"""Where trials run: one model, its texts, scores and teacher are made once for a seed, and every trial takes them.

All of it happens in one process. The stages up to the scores, the corrected teacher and the cached targets are stages
of an ordinary run folder; students are cut, trained and measured in memory.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.claims.students import Lesson, RandomSource, Student, Trial
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.callbacks.importance import ImportanceCallback
from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.distillation import DistillationConfig, Objective
from nemo_minitron.config.load import load_recipe, load_target
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import TrainingConfig
from nemo_minitron.evaluation.held_out import SPLIT
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.models.connector import model_of
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.rounds import round_targets
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.engine import Request, run_chain
from nemo_minitron.stages.processes import release_memory, start_collectives
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.stages.score import calibrate
from nemo_minitron.stages.session import make_trainer, validate, with_run

DIGITS = 5
"""Of nats in the results file."""


class Bench:
    """The trials of one seed.

    Args:
        folder: Where its run folder lies; one that was cut off goes on.
        recipe: What all trials share.
        overrides: On top of the recipe.
        seed: Of the split of documents, the order of samples, and whatever is random.
    """

    def __init__(self, folder: Path, recipe: Path, overrides: Sequence[str], *, seed: int) -> None:
        self._folder, self._recipe, self._overrides, self._seed = folder, recipe, list(overrides), seed
        self.config = self._config(())
        self._run = RunFolder(folder / "run")
        runtime.stop()  # the seed of an earlier bench

    def prepare(self) -> None:
        """Model, texts and scores."""
        self._stage(self.config, "score")

    def measure(self, trial: Trial) -> dict[str, Any]:
        """Cut the student, train it if there is a lesson, and read the held-out windows with it.

        Returns:
            Nats and KL to the teacher per token of every window (of every micro-batch, where that has more), the
            teacher's nats, the student's parameters.
        """
        student = self._source(trial.student)
        if trial.lesson is None:
            settings = TrainingConfig(tokens=self.config.distill.batch.tokens_per_step, batch=self.config.distill.batch)
            told = DistillationConfig(teacher=str(self._teacher))
            model, trainer = self._model(student, self.config, settings, told)
        else:
            model, trainer = self._trained(student, trial.lesson)
        return {"parameters": parameter_count(student.spec), **self._measured(model, trainer)}

    # -- what trials share ---------------------------------------------------------------------------------------

    def _config(self, overrides: Sequence[str]) -> RunConfig:
        return load_recipe(self._recipe, [*self._overrides, f"seed={self._seed}", *overrides])

    def _stage(self, config: RunConfig, name: str) -> Path:
        """The folder of a finished stage of the run folder."""
        request = Request(config=config, run=self._run, only=name)
        run_chain(chain_for(config), request, reporter=Reporter(silent=True))
        start_collectives(config.parallel, seed=config.seed)
        return self._run.stage(name)

    @property
    def _teacher(self) -> Path:
        return self._run.stage("import") / "teacher"

    @property
    def _data(self) -> Path:
        return self._run.stage("data")

    @cached_property
    def _scores(self) -> Scores:
        return Scores.load(self._run.stage("score") / "scores.safetensors")

    # -- students ------------------------------------------------------------------------------------------------

    def _source(self, student: Student) -> TensorSource:
        start_collectives(self.config.parallel, seed=self.config.seed)
        target = load_target([word.replace("{seed}", str(self._seed)) for word in student.target])
        source: TensorSource = open_checkpoint(self._teacher)
        original, scores = source.spec, self._scores
        if student.corrected:
            source = open_checkpoint(self._corrected())
        for number, goal in enumerate(round_targets(target, original, student.rounds)):
            if number > 0:
                scores = self._scored_anew(source)
            source = PrunedSource(source, build_plan(scores, goal, source.spec))
        return RandomSource(source, self._seed) if student.random else source

    def _scored_anew(self, source: TensorSource) -> Scores:
        """Importance in a model that some units have left."""
        folder = self._folder / "between"
        write_folder(source, folder)
        importance = ImportanceCallback()
        calibrate(folder, self._data, self.config, importance)
        assert importance.scores is not None  # a validation leaves them
        return importance.scores

    def _corrected(self) -> Path:
        """The teacher that has seen as many tokens of these texts as a student does."""
        overrides = (f"correct.tokens={self.config.distill.tokens}", "correct.validation_samples=1")
        return self._stage(self._config(overrides), "correct") / "teacher"

    # -- lessons -------------------------------------------------------------------------------------------------

    def _trained(self, student: TensorSource, lesson: Lesson) -> tuple[MegatronGPTDistillationModel, Any]:
        config = self._config(lesson.overrides)
        settings = config.distill
        if lesson.cached:
            told = settings.with_cache(self._stage(config, "cache") / "targets")
        else:
            told = settings.with_teacher(self._corrected() if lesson.corrected else self._teacher)
        model, trainer = self._model(student, config, settings, told, max_steps=settings.steps)
        trainer.fit(model, datamodule=TokenDataModule(self._data, settings, seed=config.seed))
        model.objective = Objective()  # what is measured is the same for every lesson, and so is the teacher
        if lesson.cached or lesson.corrected:
            model.attach_teacher(self._teacher)
        return model, trainer

    def _model(
        self,
        student: TensorSource,
        config: RunConfig,
        settings: TrainingConfig,
        told: DistillationConfig,
        *,
        max_steps: int = 1,
    ) -> tuple[MegatronGPTDistillationModel, Any]:
        release_memory()
        trainer = make_trainer(
            config,
            max_steps=max_steps,
            max_epochs=-1,
            val_check_interval=max_steps + 1,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0,
        )
        whole = ModelSettings.of_training(settings, told)
        whole = with_run(whole, config, micro_batch_size=settings.batch.micro_batch_size)
        return model_of(MegatronGPTDistillationModel, student, settings=whole, trainer=trainer), trainer

    def _measured(self, model: MegatronGPTDistillationModel, trainer: Any) -> dict[str, Any]:
        settings = self.config.evaluate
        samples = math.ceil(settings.max_tokens / settings.sequence_length)
        windows = WindowDataset(self._data, SPLIT, settings.sequence_length, samples, spread=True)
        validate(model, windows, micro_batch_size=self.config.distill.batch.micro_batch_size, trainer=trainer)
        found = {"nats": "ce", "kl": "kl", "teacher_nats": "teacher_ce"}
        reports = model.validation_reports
        return {
            name: [round(float(report[key]) / float(report["tokens"]), DIGITS) for report in reports]
            for name, key in found.items()
        }
