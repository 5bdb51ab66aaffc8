"""What ranks do in the tests of depth metrics: measure a small model without some of its layers at some layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.pruning.depth import candidate_blocks
from tests.parallel.hooks_jobs import sharpen
from tests.parallel.megatron_jobs import ONE, SPECS, global_batch


@dataclass(frozen=True)
class DepthCase:
    """One measurement."""

    spec: str
    parallel: ParallelConfig = ONE
    micro_batch_size: int = 1
    dead: int | None = None
    """Layer whose two outputs are made zero."""
    poison: int | None = None
    """Layer whose MLP weight is made infinite."""


class Misses:
    """How often the next token was not the likeliest one, on the calibration text."""

    def batches(self, tokenizer: Any) -> None:
        return None

    def measure(self, batch: Any, nats_BS: torch.Tensor, correct_BS: torch.Tensor) -> tuple[float, float]:
        return float(batch.keep.sum() - correct_BS.sum()), float(batch.keep.sum())


class LastToken:
    """Nats of the last token of samples of its own, of two lengths."""

    def batches(self, tokenizer: Any) -> Iterable[Any]:
        from nemo_minitron.megatron.forward import MicroBatch

        tokens, labels, _ = global_batch()
        for index, length in enumerate((12, 8, 12, 8, 8)):
            keep = torch.zeros(2, length, dtype=torch.bool)
            keep[:, -1] = True
            yield MicroBatch.of(tokens[index : index + 2, :length], labels[index : index + 2, :length], keep)

    def measure(self, batch: Any, nats_BS: torch.Tensor, correct_BS: torch.Tensor) -> tuple[float, float]:
        assert nats_BS.shape == batch.tokens.shape
        return float(nats_BS[:, -1].sum()), len(nats_BS)


def measure(case: DepthCase) -> dict[str, torch.Tensor]:
    """Every metric for every block, by name."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.depth_metrics import DepthCollector
    from nemo_minitron.megatron.forward import MicroBatch

    here = runtime.start(case.parallel, seed=0)
    spec = SPECS[case.spec]
    own = {"misses": Misses(), "last_token": LastToken()}
    try:
        chunks = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
        prepare(chunks, case)
        collector = DepthCollector(
            chunks,
            here,
            spec,
            blocks=candidate_blocks(spec.num_layers, range(1, spec.num_layers)),
            metrics=("lm_loss", "logit_mse", "misses", "last_token"),
            own=own,
        )
        tokens, labels, keep = global_batch()
        mine = slice(here.dp_rank, None, here.dp_size)
        whole = MicroBatch.of(tokens[mine], labels[mine], keep[mine])
        for micro_batch in whole.split(case.micro_batch_size):
            collector.add(micro_batch, own=["misses"])
        collector.add_own("last_token", own["last_token"].batches(None))
        return collector.result().tensors
    finally:
        runtime.stop()


def measure_all(cases: list[DepthCase]) -> list[dict[str, torch.Tensor]]:
    return [measure(case) for case in cases]


def prepare(chunks: list[Any], case: DepthCase) -> None:
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            sharpen(layer)
            if layer.layer_number - 1 == case.dead:
                layer.self_attention.linear_proj.weight.data.zero_()
                layer.mlp.linear_fc2.weight.data.zero_()
            if layer.layer_number - 1 == case.poison:
                layer.mlp.linear_fc1.weight.data.fill_(torch.inf)


def naive(spec_name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The collector's sums, and those of complete passes with the ordinary loss over models that lack a block."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch, reduce_report, run
    from nemo_minitron.models.losses import LanguageModelLoss

    smart = measure(DepthCase(spec_name, micro_batch_size=4))
    here = runtime.start(ONE, seed=0)
    spec = SPECS[spec_name]
    try:
        (chunk,) = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
        prepare([chunk], DepthCase(spec_name))
        chunk.output = "hidden"
        loss = LanguageModelLoss(model=chunk, vocab_size=spec.vocab_size, tensor_group=None)
        micro_batches = MicroBatch.of(*global_batch()).split(4)
        layers = chunk.decoder.layers
        totals = {}
        for first, length in [(0, 0), *candidate_blocks(spec.num_layers, range(1, spec.num_layers))]:
            kept = [layer for number, layer in enumerate(layers) if not first <= number < first + length]
            chunk.decoder.layers = torch.nn.ModuleList(kept)
            chunk.decoder.num_layers_per_pipeline_rank = len(kept)
            sums = reduce_report(run([chunk], micro_batches, loss, runtime=here, forward_only=True), here)
            totals[f"{first},{length}"] = torch.tensor(sums["ce"], dtype=torch.float64)
        return smart, totals
    finally:
        runtime.stop()


def measure_folder(folder: Path, samples: list[list[int]]) -> dict[str, torch.Tensor]:
    """Metrics of a checkpoint on samples of tokens, in fp32."""
    from nemo_minitron.megatron.depth_metrics import DepthCollector
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore
    from tests.jobs import config_for

    config = config_for(folder, folder)
    model = restore(MegatronGPTModel, folder, config=config, micro_batch_size=1, trainer=make_trainer(config))
    blocks = candidate_blocks(model.spec.num_layers, range(1, model.spec.num_layers))
    collector = DepthCollector(model.chunks, model.runtime, model.spec, blocks=blocks, metrics=("lm_loss", "logit_mse"))
    whole = torch.tensor(samples)
    collector.add(MicroBatch.of(whole[:, :-1], whole[:, 1:], torch.ones_like(whole[:, 1:], dtype=torch.bool)))
    return collector.result().tensors


class CutOffError(Exception):
    """Stands for a kill."""


def stage_files(folder: Path) -> None:
    """`hf/` and `corpus/` to `teacher/` and `data/`."""
    from nemo_minitron.checkpoints.nemo1 import write_folder
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.data.documents import read_documents
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.megatron.data import write_token_files

    source = open_checkpoint(folder / "hf")
    write_folder(source, folder / "teacher")
    (folder / "data").mkdir()
    documents = read_documents(folder / "corpus")
    tokenizer = load_tokenizer(source.tokenizer_files())
    write_token_files(documents, tokenizer, folder / "data", depth_config(folder).data, seed=1)


def depth_config(folder: Path) -> Any:
    from tests.jobs import config_for

    metrics = ["lm_loss", "logit_mse", "tests.parallel.depth_jobs:Misses", "tests.parallel.depth_jobs:LastToken"]
    depth = {"metrics": metrics, "blocks": True, "longest_block": 2, "samples": 7}
    return config_for(
        folder / "hf", folder / "corpus", score={"sequence_length": 24, "micro_batch_size": 1, "depth": depth}
    )


def stage(folder: Path, *, partial: Path | None = None, cut_after: int | None = None, kept_seconds: float = 0.0) -> Any:
    """The stage's measurement by name, or how far it came before it was cut off."""
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages import depth
    from nemo_minitron.stages.session import make_trainer, restore

    config = depth_config(folder)
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == cut_after:
            raise CutOffError

    depth.SAVE_SECONDS = kept_seconds
    trainer = make_trainer(config)
    model = restore(MegatronGPTModel, folder / "teacher", config=config, micro_batch_size=1, trainer=trainer)
    try:
        scores = depth.measure_depth(
            model.chunks,
            model.runtime,
            model.spec,
            folder / "data",
            config.score,
            tokenizer_files=model.tokenizer_files,
            partial=partial,
            progress=progress,
        )
    except CutOffError:
        return seen
    return scores.tensors, seen


def cut_off_and_go_on(folder: Path) -> dict[str, Any]:
    """Complete, cut off, resumed, and resumed from a damaged file."""
    stage_files(folder)
    whole, _ = stage(folder)
    cut = stage(folder, partial=folder / "partial", cut_after=4)
    kept = (folder / "partial").read_bytes()
    resumed, seen = stage(folder, partial=folder / "partial")
    (folder / "partial").write_bytes(kept[:100])
    damaged, again = stage(folder, partial=folder / "partial")
    (folder / "partial").write_bytes(kept)
    return {
        "complete": whole,
        "cut": cut,
        "resumed": resumed,
        "seen": seen,
        "damaged": damaged,
        "again": again,
    }
