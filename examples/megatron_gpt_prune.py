"""Score and prune a model in NeMo's usual way: hydra_runner, a trainer with two callbacks, `trainer.validate`.

The recipes do this and more with one command; this script is for those who already drive NeMo with its own
configuration files, at any parallel layout. It needs a model and token files, for example those of a run folder:

    nemo-minitron data smollm2/demo --run-dir runs/demo
    python examples/megatron_gpt_prune.py model.restore_from_path=runs/demo/stages/import/teacher \
        model.data=runs/demo/stages/data pruning.target.ffn_hidden_size=0.8 pruning.folder=pruned

`pruning.folder` then holds `scores.safetensors`, `plan.json`, `student.nemo` and `student_hf/`. Other plans come from
the same scores by `nemo-minitron plan build`, without another pass.
"""

from pathlib import Path

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from omegaconf import DictConfig, OmegaConf

from nemo_minitron import ImportanceCallback, MegatronGPTModel, MegatronStrategy, PruningCallback
from nemo_minitron.models.data import CalibrationDataModule
from nemo_minitron.models.nemo_settings import parallel_config


@hydra_runner(config_path="conf", config_name="megatron_gpt_prune")
def main(cfg: DictConfig) -> None:
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
    keys = ("precision", "micro_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    settings = OmegaConf.merge(own, {key: cfg.model[key] for key in keys})
    model = MegatronGPTModel.restore_from(cfg.model.restore_from_path, override_config_path=settings, trainer=trainer)

    trainer.validate(model, datamodule=calibration)
    if trainer.is_global_zero:
        print(pruning.plan.table())
        print(*pruning.students.values(), sep="\n")


if __name__ == "__main__":
    main()
