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
from omegaconf import DictConfig, OmegaConf

from nemo_minitron import ImportanceCallback, MegatronGPTModel, MegatronStrategy, PruningCallback, Scores
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.config.load import check
from nemo_minitron.config.run import ExportFormat, TargetConfig
from nemo_minitron.models.data import CalibrationDataModule
from nemo_minitron.models.nemo_settings import parallel_config, parallel_keys
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.write import write_checkpoint
from nemo_minitron.stages.team import environment_rank


@hydra_runner(config_path="conf", config_name="megatron_gpt_prune")
def main(cfg: DictConfig) -> None:
    if cfg.pruning.scores is None:
        score_and_prune(cfg)
    elif environment_rank()[0] == 0:
        prune_by_scores(cfg)


def prune_by_scores(cfg: DictConfig) -> None:
    teacher = open_checkpoint(Path(cfg.model.restore_from_path))
    target = check(TargetConfig, OmegaConf.to_container(cfg.pruning.target), source="pruning.target")
    plan = build_plan(Scores.load(Path(cfg.pruning.scores)), target, teacher.spec)
    folder = Path(cfg.pruning.folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    formats = [ExportFormat(name) for name in cfg.pruning.formats]
    name = "student" if len(formats) > 1 else {"nemo": "student.nemo", "hf": "student_hf"}[formats[0]]
    students = write_checkpoint(PrunedSource(teacher, plan), folder / name, formats)
    print(plan.table())
    print(*students.values(), sep="\n")


def score_and_prune(cfg: DictConfig) -> None:
    calibration = CalibrationDataModule(
        Path(cfg.model.data),
        sequence_length=cfg.model.encoder_seq_length,
        samples=cfg.pruning.samples,
        global_batch_size=cfg.model.global_batch_size,
    )
    importance = ImportanceCallback(provenance=calibration.provenance)
    pruning = PruningCallback(cfg.pruning.target, cfg.pruning.folder, formats=cfg.pruning.formats)
    trainer = Trainer(
        strategy=MegatronStrategy(parallel_config(cfg.model)), callbacks=[importance, pruning], **cfg.trainer
    )

    own = MegatronGPTModel.restore_from(cfg.model.restore_from_path, return_config=True)
    layout = parallel_keys(parallel_config(cfg.model))
    settings = OmegaConf.merge(own, layout, {key: cfg.model[key] for key in ("precision", "micro_batch_size")})
    model = MegatronGPTModel.restore_from(cfg.model.restore_from_path, override_config_path=settings, trainer=trainer)

    trainer.validate(model, datamodule=calibration)
    if trainer.is_global_zero:
        print(pruning.plan.table())
        print(*pruning.students.values(), sep="\n")


if __name__ == "__main__":
    main()
