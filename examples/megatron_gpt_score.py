"""Measure importance in NeMo's usual way: hydra_runner, a trainer with one callback, `trainer.validate`.

It needs a model and token files, for example those of a run folder, at any parallel layout:

    nemo-minitron data smollm2/demo --run-dir runs/demo
    python examples/megatron_gpt_score.py model.restore_from_path=runs/demo/stages/import/teacher \
        model.data=runs/demo/stages/data scoring.path=scores.safetensors

`megatron_gpt_prune.py pruning.scores=scores.safetensors` and `nemo-minitron plan build` go on from the file.
"""

from pathlib import Path

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from omegaconf import DictConfig, OmegaConf

from nemo_minitron import ImportanceCallback, MegatronGPTModel, MegatronStrategy
from nemo_minitron.models.data import CalibrationDataModule
from nemo_minitron.models.nemo_settings import parallel_config, parallel_keys


@hydra_runner(config_path="conf", config_name="megatron_gpt_score")
def main(cfg: DictConfig) -> None:
    calibration = CalibrationDataModule(
        Path(cfg.model.data),
        sequence_length=cfg.model.encoder_seq_length,
        samples=cfg.scoring.samples,
        global_batch_size=cfg.model.global_batch_size,
    )
    importance = ImportanceCallback(cfg.scoring.path, ffn_site=cfg.scoring.ffn_site, provenance=calibration.provenance)
    trainer = Trainer(strategy=MegatronStrategy(parallel_config(cfg.model)), callbacks=[importance], **cfg.trainer)

    own = MegatronGPTModel.restore_from(cfg.model.restore_from_path, return_config=True)
    layout = parallel_keys(parallel_config(cfg.model))
    settings = OmegaConf.merge(own, layout, {key: cfg.model[key] for key in ("precision", "micro_batch_size")})
    model = MegatronGPTModel.restore_from(cfg.model.restore_from_path, override_config_path=settings, trainer=trainer)

    trainer.validate(model, datamodule=calibration)


if __name__ == "__main__":
    main()
