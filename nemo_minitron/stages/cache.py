"""Cache: run the teacher once over the training samples and store its targets, so that students need no teacher."""

import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_minitron.cache.folder import CacheManifest, CacheWriter, TargetCache
from nemo_minitron.checkpoints.digest import weights_digest
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.data import read_info, training_dataset
from nemo_minitron.megatron.target_writer import TargetWriter
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.stages.base import StageContext
from nemo_minitron.stages.distill import order_seed
from nemo_minitron.stages.session import make_trainer, restore


def run(context: StageContext) -> dict[str, Any]:
    """Write the cache; returns where it lies, what it holds and how large it is."""
    settings = context.config.cache
    assert settings is not None, "the chain has this stage only with its section"
    model = restore(
        MegatronGPTModel,
        context.input("teacher"),
        config=context.config,
        micro_batch_size=settings.micro_batch_size,
        trainer=make_trainer(context.config),
    )
    model.requires_grad_(False).eval()
    manifest = runtime.broadcast_object(_manifest(context) if context.rank == 0 else None)
    folder = cache_folder(context)
    # A fault of rank 0's is raised on all ranks.
    fault = runtime.broadcast_object(_prepare(folder, manifest) if context.rank == 0 else None)
    if fault is not None:
        raise fault
    samples = training_dataset(
        context.input("data"), manifest.sequence_length, manifest.samples, seed=order_seed(context)
    )
    writer = TargetWriter(
        model.chunks,
        model.runtime,
        CacheWriter(folder, manifest),
        samples,
        micro_batch_size=settings.micro_batch_size,
    )
    label, shards = context.stage.name, manifest.shards
    with context.reporter.progress(label, shards, unit="shards") as shown:
        if not writer.run(stopped=context.stop_requested, progress=shown.advance):
            context.stop()
    return {**contents(folder), "folder": settings.folder}


def cache_folder(context: StageContext) -> Path:
    """Where the cache lies: where the recipe says, or in the stage's own folder."""
    settings = context.config.cache
    assert settings is not None, "asked for only with its section"
    return context.out / "targets" if settings.folder is None else Path(settings.folder)


def contents(folder: Path) -> dict[str, Any]:
    """What a complete cache holds."""
    manifest = TargetCache(folder).manifest
    size = sum(path.stat().st_size for path in folder.glob("targets-*.bin"))
    tokens = manifest.samples * manifest.sequence_length
    return {
        "kind": manifest.kind.value,
        "samples": manifest.samples,
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / tokens,
        "digest": manifest.digest(),
        "summary": f"{tokens:,} tokens, {size / 1e6:.1f} MB, {size / tokens:.1f} bytes per token",
    }


def _prepare(folder: Path, manifest: CacheManifest) -> Exception | None:
    try:
        CacheWriter(folder, manifest)
    except Exception as error:
        return error
    return None


def _manifest(context: StageContext) -> CacheManifest:
    settings, distill = context.config.cache, context.config.distill
    assert settings is not None, "the chain has this stage only with its section"
    info = read_info(context.input("data"))
    teacher = open_checkpoint(context.input("teacher"))
    samples = distill.steps * distill.batch.global_batch_size
    order = [info["data_digest"], distill.batch.sequence_length, samples, order_seed(context)]
    return CacheManifest(
        kind=settings.kind,
        width=settings.width,
        temperature=distill.temperature,
        vocab_size=teacher.spec.vocab_size,
        samples=samples,
        sequence_length=distill.batch.sequence_length,
        samples_per_shard=settings.samples_per_shard,
        seed=context.config.seed,
        order_digest=hashlib.sha256(json.dumps(order).encode()).hexdigest(),
        tokenizer_digest=info["tokenizer_digest"],
        teacher_digest=weights_digest(teacher),
    )
