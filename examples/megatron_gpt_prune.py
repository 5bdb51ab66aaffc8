"""Score and prune a model in NeMo's usual way: hydra_runner, a trainer with two callbacks, `trainer.validate`.

The recipes do this and more with one command; this script is for those who already drive NeMo with its own
configuration files, at any parallel layout. It needs a model and token files, for example those of a run folder:

    nemo-minitron data smollm2/demo --run-dir runs/demo
    python examples/megatron_gpt_prune.py model.restore_from_path=runs/demo/stages/import/teacher \
        model.data=runs/demo/stages/data pruning.target.ffn_hidden_size=0.8 pruning.folder=pruned

`pruning.folder` then holds `scores.safetensors`, `plan.json`, `student.nemo` and `student_hf/`. With `pruning.scores`,
a file that this script or megatron_gpt_score.py has left, no model runs: the checkpoint is cut on the CPU of rank 0.
"""

from pathlib import Path

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_minitron import ImportanceCallback, MegatronGPTModel, MegatronStrategy, PruningCallback, Scores
from nemo_minitron.callbacks.pruning import check_merging
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.scripts import PruningSection
from nemo_minitron.models.data import CalibrationDataModule
from nemo_minitron.models.scripts import Script, calibration_script, reported_errors
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.write import write_checkpoint
from nemo_minitron.stages.processes import environment_rank


@hydra_runner(config_path="conf", config_name="megatron_gpt_prune")
def main(cfg: DictConfig) -> None:
    with reported_errors():
        script = calibration_script(cfg, "pruning", PruningSection)
        if script.section.scores is None:
            score_and_prune(script)
        elif environment_rank()[0] == 0:
            prune_by_scores(script, Path(script.section.scores))


def prune_by_scores(script: Script[PruningSection], scores: Path) -> None:
    pruning = script.section
    check_merging(pruning.target, where="pruning.target")
    teacher = open_checkpoint(script.checkpoint)
    plan = build_plan(Scores.load(scores), pruning.target, teacher.spec)
    folder = Path(pruning.folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    formats = list(pruning.formats)
    name = "student" if len(formats) > 1 else {"nemo": "student.nemo", "hf": "student_hf"}[formats[0]]
    students = write_checkpoint(PrunedSource(teacher, plan), folder / name, formats)
    print(plan.table())
    print(*students.values(), sep="\n")


def score_and_prune(script: Script[PruningSection]) -> None:
    settings = script.settings
    calibration = CalibrationDataModule(
        script.data,
        sequence_length=settings.batch.sequence_length,
        samples=script.section.samples,
        global_batch_size=settings.batch.global_batch_size,
    )
    importance = ImportanceCallback(provenance=calibration.provenance)
    pruning = PruningCallback(script.section.target, script.section.folder, formats=script.section.formats)
    strategy = MegatronStrategy(settings.parallel, seed=settings.seed)
    trainer = Trainer(strategy=strategy, callbacks=[importance, pruning], **script.trainer)
    model = MegatronGPTModel.restore_from(script.checkpoint, trainer=trainer, settings=settings)
    trainer.validate(model, datamodule=calibration)
    if trainer.is_global_zero:
        print(pruning.plan.table())
        print(*pruning.students.values(), sep="\n")


if __name__ == "__main__":
    main()
