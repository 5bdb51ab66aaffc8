"""Measure importance in NeMo's usual way: hydra_runner, a trainer with one callback, `trainer.validate`.

It needs a model and token files, for example those of a run folder, at any parallel layout:

    nemo-minitron data smollm2/demo --run-dir runs/demo
    python examples/megatron_gpt_score.py model.restore_from_path=runs/demo/stages/import/teacher \
        model.data=runs/demo/stages/data scoring.path=scores.safetensors

`megatron_gpt_prune.py pruning.scores=scores.safetensors` and `nemo-minitron plan build` go on from the file.
"""

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_minitron import ImportanceCallback, MegatronGPTModel, MegatronStrategy
from nemo_minitron.config.scripts import ScoringSection
from nemo_minitron.models.data import CalibrationDataModule
from nemo_minitron.models.scripts import calibration_script, reported_errors


@hydra_runner(config_path="conf", config_name="megatron_gpt_score")
def main(cfg: DictConfig) -> None:
    with reported_errors():
        score(cfg)


def score(cfg: DictConfig) -> None:
    script = calibration_script(cfg, "scoring", ScoringSection)
    scoring, settings = script.section, script.settings
    calibration = CalibrationDataModule(
        script.data,
        sequence_length=settings.batch.sequence_length,
        samples=scoring.samples,
        global_batch_size=settings.batch.global_batch_size,
    )
    importance = ImportanceCallback(scoring.path, ffn_site=scoring.ffn_site, provenance=calibration.provenance)
    strategy = MegatronStrategy(settings.parallel, seed=settings.seed)
    trainer = Trainer(strategy=strategy, callbacks=[importance], **script.trainer)
    model = MegatronGPTModel.restore_from(script.checkpoint, trainer=trainer, settings=settings)
    trainer.validate(model, datamodule=calibration)


if __name__ == "__main__":
    main()
