"""What ranks do in the tests of merging dropped layers: sum up over a small model at some layout."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.pruning.merge import Gap
from tests.parallel.hooks_jobs import sharpen
from tests.parallel.megatron_jobs import ONE, SPECS, global_batch


@dataclass(frozen=True)
class MergeCase:
    """One pass."""

    spec: str
    gaps: tuple[Gap, ...]
    parallel: ParallelConfig = ONE
    micro_batch_size: int = 1


def sums(case: MergeCase) -> dict[str, torch.Tensor]:
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.megatron.merge_sums import MergeCollector

    here = runtime.start(case.parallel, seed=0)
    spec = SPECS[case.spec]
    try:
        chunks = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                sharpen(layer)
        collector = MergeCollector(chunks, here, spec, case.gaps)
        mine = [tensor[here.dp_rank :: here.dp_size] for tensor in global_batch()]
        micro_batches = MicroBatch.of(*mine).split(case.micro_batch_size)
        half = len(micro_batches) // 2
        collector.add(micro_batches[:half])
        collector.add(micro_batches[half:])
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for chunk in chunks for m in chunk.modules()]
        assert sum(hooks) == 0, "hooks were left behind"
        return collector.result()
    finally:
        runtime.stop()


def sums_all(cases: list[MergeCase]) -> list[dict[str, torch.Tensor]]:
    return [sums(case) for case in cases]


def sums_of_folder(folder: Path, samples: torch.Tensor, keep: torch.Tensor, gaps: list[Gap]) -> dict[str, torch.Tensor]:
    """Sums of a checkpoint over samples of tokens, in fp32."""
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.megatron.merge_sums import MergeCollector
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore
    from tests.jobs import config_for

    config = config_for(folder, folder)
    model = restore(MegatronGPTModel, folder, config=config, micro_batch_size=1, trainer=make_trainer(config))
    collector = MergeCollector(model.chunks, model.runtime, model.spec, gaps)
    collector.add(MicroBatch.of(samples, samples, keep).split(1))
    return collector.result()
