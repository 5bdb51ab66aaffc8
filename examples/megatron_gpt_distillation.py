"""Distil a pruned student from its teacher in NeMo's usual way: hydra_runner, exp_manager, trainer, model.

The recipes do this and more with one command; this script is for those who already drive NeMo with its own
configuration files. It needs a teacher, a student and token files, for example those of a run folder:

    nemo-minitron prune smollm2/demo --run-dir runs/demo
    python examples/megatron_gpt_distillation.py \
        model.minitron.distillation.teacher=runs/demo/stages/import/teacher \
        model.student=runs/demo/stages/prune/student model.data=runs/demo/stages/data

`model.minitron` takes every setting that a recipe has for the objective; `+model.minitron.distillation.top_k=128`.

`exp_manager` writes TensorBoard logs and checkpoints (folders that any parallel layout can read) below
`exp_manager.exp_dir`, resumes from them with `exp_manager.resume_if_exists=true`, and leaves `<name>.nemo` at the end.
"""

from pathlib import Path

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf

from nemo_minitron import MegatronGPTDistillationModel, MegatronStrategy
from nemo_minitron.config.load import check
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.nemo_settings import parallel_config, parallel_keys


@hydra_runner(config_path="conf", config_name="megatron_gpt_distillation")
def main(cfg: DictConfig) -> None:
    trainer = Trainer(strategy=MegatronStrategy(parallel_config(cfg.model), seed=cfg.model.seed), **cfg.trainer)
    exp_manager(trainer, cfg.exp_manager)

    student = MegatronGPTDistillationModel.restore_from(cfg.model.student, return_config=True)
    layout = parallel_keys(parallel_config(cfg.model))
    keys = ("precision", "micro_batch_size", "optim", "minitron")
    settings = OmegaConf.merge(student, layout, {key: cfg.model[key] for key in keys})
    model = MegatronGPTDistillationModel.restore_from(cfg.model.student, override_config_path=settings, trainer=trainer)

    batch = {
        "sequence_length": cfg.model.encoder_seq_length,
        "micro_batch_size": cfg.model.micro_batch_size,
        "global_batch_size": cfg.model.global_batch_size,
    }
    tokens = cfg.trainer.max_steps * cfg.model.encoder_seq_length * cfg.model.global_batch_size
    values = {"tokens": tokens, "batch": batch, "validation_samples": cfg.model.validation_samples}
    training = check(DistillConfig, values, source="model")
    trainer.fit(model, datamodule=TokenDataModule(Path(cfg.model.data), training, seed=cfg.model.seed))


if __name__ == "__main__":
    main()
