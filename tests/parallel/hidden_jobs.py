"""Jobs on ranks: distil with losses on intermediate states, and show what came of it."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig


def curve(student: Path, teacher: Path, data: Path, config: RunConfig) -> dict[str, list[float]]:
    """Loss and hidden loss of every training step."""
    from lightning.pytorch import Callback

    from nemo_minitron.models.data import TokenDataModule

    class Keep(Callback):
        def __init__(self) -> None:
            self.rows: dict[str, list[float]] = {"loss": [], "kl": [], "hidden": []}

        def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
            for name, values in self.rows.items():
                values.append(trainer.callback_metrics[f"train/{name}"].item())

    keep = Keep()
    model, trainer = _model(student, teacher, config, [keep])
    trainer.fit(model, datamodule=TokenDataModule(data, config.distill, seed=config.seed))
    return keep.rows


def curves(student: Path, teacher: Path, data: Path, configs: list[RunConfig]) -> list[dict[str, list[float]]]:
    """Several of one layout, on one start-up of the ranks."""
    from nemo_minitron.megatron import runtime

    found = []
    for config in configs:
        found.append(curve(student, teacher, data, config))
        runtime.stop()
    return found


class _SeenError(Exception):
    """Enough."""


def first_step(student: Path, teacher: Path, data: Path, config: RunConfig) -> dict[str, Any]:
    """Report, gradients by canonical name, the projection and its gradient sum, and the batch of the first step."""
    from nemo_minitron.models.data import TokenDataModule

    found: dict[str, Any] = {}
    model, trainer = _model(student, teacher, config, [])

    def look(report: dict[str, float]) -> None:
        named = [pair for chunk in model.chunks for pair in chunk.named_weights()]
        found.update(
            report=dict(report),
            gradients={weight.name: parameter.main_grad.clone() for weight, parameter in named},
            projection=model._matching.projection.detach().clone(),
            projection_gradient=model._matching.projection.grad.clone(),
            tp_rank=model.runtime.tp_rank,
        )
        raise _SeenError

    def keep(batch: Any, batch_idx: int) -> None:
        found["tokens"], found["keep"] = batch.tokens, batch.keep
        found["labels"] = batch.labels
        step(batch, batch_idx)

    step = model.training_step
    model.update, model.training_step = look, keep
    try:
        trainer.fit(model, datamodule=TokenDataModule(data, config.distill, seed=config.seed))
    except _SeenError:
        return found
    raise AssertionError("no step was taken")


def _model(student: Path, teacher: Path, config: RunConfig, callbacks: list[Any]) -> tuple[Any, Any]:
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel
    from nemo_minitron.stages.session import make_trainer, restore

    settings = config.distill
    trainer = make_trainer(
        config, callbacks, max_steps=settings.steps, max_epochs=-1, limit_val_batches=0, check_val_every_n_epoch=None
    )
    model = restore(
        MegatronGPTDistillationModel,
        student,
        config=config,
        micro_batch_size=settings.batch.micro_batch_size,
        trainer=trainer,
        settings=ModelSettings.of_training(settings, settings.with_teacher(teacher)),
    )
    return model, trainer


def uses_of_the_pipeline_group() -> dict[str, Any]:
    """What a rank does on the group of its pipeline while a state goes from the first stage to the last, in order.

    NCCL connects the ranks of a group when it is first used, and waits for all of them.
    """
    import torch
    import torch.distributed as dist

    from nemo_minitron.config.hidden import HiddenConfig
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.config.training import OptimizerConfig
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.models.hidden import StateMatching
    from nemo_minitron.models.routers import RouterMatching
    from tests.parallel.megatron_jobs import EXPERT_SPECS, SPECS

    here = runtime.start(ParallelConfig(pipeline=dist.get_world_size()), seed=0)
    uses: list[str] = []
    add_up, exchange = dist.all_reduce, dist.batch_isend_irecv

    def added_up(tensor: torch.Tensor, *args: Any, group: Any = None, **how: Any) -> Any:
        uses.extend(["all"] * (group is here.groups.pp))
        return add_up(tensor, *args, group=group, **how)

    def exchanged(operations: list[Any]) -> Any:
        uses.extend(["some"] * all(operation.group is here.groups.pp for operation in operations))
        return exchange(operations)

    dist.all_reduce, dist.batch_isend_irecv = added_up, exchanged
    experts, spec = EXPERT_SPECS["experts"], SPECS["untied"]
    RouterMatching(student=experts, teacher=experts, plan=None, runtime=here)
    routers = list(uses)
    uses.clear()
    config = HiddenConfig(layers=((0, -1),))  # held by the first stage, wanted by the last
    matching = StateMatching(config, student=spec, teacher=spec, runtime=here, optimizer=OptimizerConfig())
    tokens = torch.arange(8).view(1, 8)
    value = torch.arange(8.0 * spec.hidden_size).view(8, 1, -1)
    matching._seen = {1: [value]} if here.is_first_stage else {}
    matching.send_targets([MicroBatch.of(tokens, tokens, tokens >= 0)], torch.float32)
    arrived = {state: torch.equal(found, value) for state, (found,) in matching._targets.items()}
    return {"routers": routers, "states": uses, "arrived": arrived}
