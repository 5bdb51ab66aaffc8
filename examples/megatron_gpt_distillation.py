"""Distil a pruned student from its teacher in NeMo's usual way: hydra_runner, exp_manager, trainer, model.

The recipes do this and more with one command; this script is for those who already drive NeMo with its own
configuration files. It needs a teacher, a student and token files, for example those of a run folder:

    nemo-minitron prune smollm2/demo --run-dir runs/demo
    python examples/megatron_gpt_distillation.py \
        model.minitron.distillation.teacher=runs/demo/stages/import/teacher \
        model.student=runs/demo/stages/prune/student model.data=runs/demo/stages/data

`model.minitron.distillation` takes every setting that a recipe has for the objective, with the same defaults:
`+model.minitron.distillation.top_k=128`. Keys are checked like a recipe's: an unknown one, or one of NeMo-1 that asks
for something unsupported, ends the script at once with status 2 and the key to use instead.

`exp_manager` writes TensorBoard logs and checkpoints (folders that any parallel layout can read) below
`exp_manager.exp_dir`, resumes from them with `exp_manager.resume_if_exists=true`, and leaves `<name>.nemo` at the end.
A resume is compared with the checkpoint: learning rate, schedule, number of steps and the like may change and hold from
there on, while the batch size, the objective or the data may not, and end the script with status 2 and both values.
"""

from lightning.pytorch import Trainer
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nemo_minitron import MegatronGPTDistillationModel, MegatronStrategy
from nemo_minitron.callbacks.garbage import garbage_collection
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.scripts import distillation_script, reported_errors, resumed_settings


@hydra_runner(config_path="conf", config_name="megatron_gpt_distillation")
def main(cfg: DictConfig) -> None:
    with reported_errors():
        distill(cfg)


def distill(cfg: DictConfig) -> None:
    script = distillation_script(cfg)
    settings = script.settings
    strategy = MegatronStrategy(settings.parallel, seed=settings.seed)
    callbacks = garbage_collection(settings.parallel, ranks=strategy.runtime.world_size)
    trainer = Trainer(strategy=strategy, callbacks=callbacks, **script.trainer)
    exp_manager(trainer, cfg.get("exp_manager"))
    data = TokenDataModule(script.data, script.section, seed=settings.seed)
    settings = resumed_settings(script, trainer, data)
    model = MegatronGPTDistillationModel.restore_from(script.checkpoint, trainer=trainer, settings=settings)
    trainer.fit(model, datamodule=data)


if __name__ == "__main__":
    main()
