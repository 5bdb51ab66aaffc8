"""What ranks do in the tests of `PruningCallback`: validate a tiny model at some layout, and prune it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.config.parallel import ParallelConfig
from tests.parallel.megatron_jobs import ONE


@dataclass(frozen=True)
class PruneCase:
    """One pruning run."""

    name: str
    parallel: ParallelConfig = ONE
    micro_batch_size: int = 1
    live: bool = False
    """As if the model had come from no checkpoint."""
    own_scores: bool = True
    """Without an `ImportanceCallback` in the trainer's list."""
    target: Any = None


TARGET = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 0.5,
    "num_attention_heads": 4,
    "merge_head_residuals": True,
}


def prune(folder: Path, case: PruneCase) -> dict[str, Any]:
    """Digest of the plan, and where the students are; the callbacks are the public ones."""
    from lightning.pytorch import Trainer
    from omegaconf import OmegaConf

    from nemo_minitron import ImportanceCallback, MegatronGPTModel, MegatronStrategy, PruningCallback
    from nemo_minitron.megatron import runtime
    from nemo_minitron.models import nemo_settings
    from nemo_minitron.models.data import CalibrationDataModule

    data = CalibrationDataModule(folder / "data", sequence_length=64, samples=16, global_batch_size=4)
    pruning = PruningCallback(case.target or TARGET, folder / case.name)
    others = [] if case.own_scores else [ImportanceCallback(provenance=data.provenance)]
    trainer = Trainer(
        strategy=MegatronStrategy(case.parallel),
        callbacks=[*others, pruning],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    values = {
        **nemo_settings.parallel_keys(case.parallel),
        "precision": "32",
        "micro_batch_size": case.micro_batch_size,
    }
    teacher = folder / "teacher"
    settings = OmegaConf.merge(MegatronGPTModel.restore_from(teacher, return_config=True), values)
    model = MegatronGPTModel.restore_from(teacher, override_config_path=settings, trainer=trainer)
    if case.live:
        model.restored_from = None
    try:
        trainer.validate(model, datamodule=data, verbose=False)
    finally:
        runtime.stop()
    return {"digest": pruning.plan.digest(), "students": {kind.value: path for kind, path in pruning.students.items()}}


def slow_first_rank() -> str:
    """What rank 0 gives to all ranks, after longer than they wait for each other in a computation."""
    import time
    from datetime import timedelta

    from torch.distributed import distributed_c10d, group

    from nemo_minitron.megatron import runtime

    runtime.start(ONE, seed=0)
    distributed_c10d._set_pg_timeout(timedelta(seconds=1), group.WORLD)
    return runtime.on_rank_zero(lambda: time.sleep(2.5) or "pruned", doing="prunes")


def prune_all(folder: Path, cases: list[PruneCase]) -> list[dict[str, Any]]:
    return [prune(folder, case) for case in cases]


def failing(folder: Path, cases: list[PruneCase]) -> list[str]:
    """What each run's error says on this rank."""
    said = []
    for case in cases:
        try:
            prune(folder, case)
            said.append("no error")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said
