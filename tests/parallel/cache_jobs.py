"""Jobs on ranks: write a cache, and train a student from it."""

from pathlib import Path
from typing import Any

from nemo_minitron.cache.folder import CacheManifest, CacheWriter
from nemo_minitron.config.cache import CacheConfig
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig


def manifest(config: RunConfig, cache: CacheConfig, vocab_size: int) -> CacheManifest:
    """Of all samples that distillation sees."""
    distill = config.distill
    return CacheManifest(
        kind=cache.kind,
        width=cache.width,
        temperature=distill.temperature,
        vocab_size=vocab_size,
        samples=distill.steps * distill.batch.global_batch_size,
        sequence_length=distill.batch.sequence_length,
        samples_per_shard=cache.samples_per_shard,
        seed=config.seed,
        order_digest="order",
        tokenizer_digest="tokenizer",
        teacher_digest="teacher",
    )


def write(folder: Path, teacher: Path, data: Path, config: RunConfig, cache: CacheConfig) -> bool:
    """Write a cache of a teacher at the config's layout."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.data import training_dataset
    from nemo_minitron.megatron.target_writer import TargetWriter
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore

    model = restore(
        MegatronGPTModel,
        teacher,
        config=config,
        micro_batch_size=cache.micro_batch_size,
        trainer=make_trainer(config),
    )
    model.requires_grad_(False)
    made = manifest(config, cache, model.spec.vocab_size)
    samples = training_dataset(data, made.sequence_length, made.samples, seed=config.seed)
    if model.runtime.rank == 0:
        CacheWriter(folder, made)
    runtime.barrier()
    writer = TargetWriter(
        model.chunks,
        model.runtime,
        CacheWriter(folder, made),
        samples,
        micro_batch_size=cache.micro_batch_size,
    )
    return writer.run(stopped=lambda: False, progress=lambda shards: None)


def samples(data: Path, config: RunConfig) -> list[Any]:
    """Tokens of every training sample in order, as numpy arrays."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.data import training_dataset

    runtime.start(config.parallel, seed=config.seed)
    distill = config.distill
    count = distill.steps * distill.batch.global_batch_size
    dataset = training_dataset(data, distill.batch.sequence_length, count, seed=config.seed)
    return [dataset[index]["tokens"].numpy() for index in range(count)]


def losses(student: Path, cache: Path, data: Path, config: RunConfig) -> list[dict[str, float]]:
    """Loss and divergence of every training step from a cache."""
    from lightning.pytorch import Callback

    from nemo_minitron.models.data import TokenDataModule
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel
    from nemo_minitron.stages.session import make_trainer, restore

    class Keep(Callback):
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
            metrics = trainer.callback_metrics
            self.rows.append({name: metrics[f"train/{name}"].item() for name in ("loss", "kd", "ce")})

    keep, settings = Keep(), config.distill
    trainer = make_trainer(
        config, [keep], max_steps=settings.steps, max_epochs=-1, val_check_interval=10, check_val_every_n_epoch=None
    )
    model = restore(
        MegatronGPTDistillationModel,
        student,
        config=config,
        micro_batch_size=settings.batch.micro_batch_size,
        trainer=trainer,
        settings=ModelSettings.of_training(settings, settings.with_cache(cache)),
    )
    trainer.fit(model, datamodule=TokenDataModule(data, settings, seed=config.seed))
    return keep.rows
