"""What ranks do in the tests of samples that hold several documents."""

from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.pruning.depth import candidate_blocks
from tests.parallel.hooks_jobs import sharpen
from tests.parallel.megatron_jobs import SPECS, whole_batch


def logits(folder: Path, parallel: ParallelConfig, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits `[b, s, V]` of a checkpoint, on every rank."""
    from nemo_minitron.evaluation.logits import gather_logits
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore
    from tests.jobs import config_for

    config = config_for(folder, folder).model_copy(update={"parallel": parallel})
    model = restore(MegatronGPTModel, folder, config=config, micro_batch_size=1, trainer=make_trainer(config))
    found = gather_logits(model.chunks, tokens, model.runtime, model.spec.vocab_size, position_ids_BS=positions)
    if parallel.pipeline == 1 and parallel.tensor == 1:
        with torch.no_grad():
            assert torch.equal(model(tokens, positions), found), "through the model class"
    return found


def sums(parallel: ParallelConfig, documents: str) -> dict[str, torch.Tensor]:
    """What is added up over tokens: block influence, and every depth metric, by name."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.depth_metrics import DepthCollector
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden, cut
    from nemo_minitron.megatron.hooks import ImportanceCollector

    here = runtime.start(parallel, seed=0)
    spec = SPECS["tied"]
    try:
        chunks = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                sharpen(layer)
        whole = MicroBatch(*whole_batch(documents))
        depth = DepthCollector(
            chunks, here, spec, blocks=candidate_blocks(spec.num_layers), metrics=("lm_loss", "logit_mse")
        )
        with ImportanceCollector(chunks, here, spec) as collector:
            batches = cut(whole, 4 if documents == "packed" else 1, chunks)
            collector.expect([batch.keep for batch in batches])
            collect_hidden(chunks, batches, here)
        for batch in batches:
            depth.add(batch)
        influence = {name: value for name, value in collector.result().items() if "block_influence" in name}
        return influence | {name: x for name, x in depth.result().tensors.items() if name != "depth.samples"}
    finally:
        runtime.stop()


def sums_all(cases: list[tuple[ParallelConfig, str]]) -> list[dict[str, torch.Tensor]]:
    return [sums(*case) for case in cases]


def refused(context: Any) -> str:
    """What is said of documents under context parallelism."""
    from nemo_minitron.errors import LayoutError
    from nemo_minitron.megatron.documents import attention_documents

    try:
        attention_documents(torch.tensor([[0, 1, 0, 1]]), [], torch.device("cpu"), context=context)
    except LayoutError as error:
        return str(error)
    return ""
