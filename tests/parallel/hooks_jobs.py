"""What ranks do in the tests of the importance collector: score a small random model at some layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.sites import FfnSite
from tests.parallel.megatron_jobs import ONE, SPECS, global_batch


@dataclass(frozen=True)
class ScoreCase:
    """One scoring run."""

    spec: str
    parallel: ParallelConfig = ONE
    micro_batch_size: int = 1
    rounds: int = 2
    """The global batch is split into this many smaller ones."""
    poison: int | None = None
    """Layer whose MLP weight is made infinite."""
    ffn_site: FfnSite = FfnSite.AFTER_ACTIVATION
    sublayers: bool = False
    """Measure mixer and feed-forward of each layer apart as well."""
    fold: bool = False
    """Gather and deal out again after each part, as saving does."""


def score(case: ScoreCase) -> dict[str, torch.Tensor]:
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
    from nemo_minitron.megatron.hooks import ImportanceCollector

    here = runtime.start(case.parallel, seed=0)
    spec = SPECS[case.spec]
    try:
        chunks = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                sharpen(layer)
                if layer.layer_number - 1 == case.poison:
                    layer.mlp.linear_fc1.weight.data.fill_(torch.inf)
        tokens, labels, keep = global_batch()
        mine = slice(here.dp_rank, None, here.dp_size)
        whole = MicroBatch.of(tokens[mine], labels[mine], keep[mine])
        how = {"ffn_site": case.ffn_site, "sublayers": case.sublayers}
        with ImportanceCollector(chunks, here, spec, **how) as collector:
            for part in whole.split(len(whole.tokens) // case.rounds):
                micro_batches = part.split(case.micro_batch_size)
                collector.expect([micro_batch.keep for micro_batch in micro_batches])
                collect_hidden(chunks, micro_batches, here)
                if case.fold:
                    collector.load(collector.result())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for chunk in chunks for m in chunk.modules()]
        assert sum(hooks) == 0, "hooks were left behind"
        return collector.result()
    finally:
        runtime.stop()


def sharpen(layer: Any) -> None:
    """Make attention and norms of a freshly drawn layer do something, the same at every layout."""
    mlps = [layer.mlp] if hasattr(layer.mlp, "linear_fc1") else list(layer.mlp.experts.local_experts)
    for norm, linear in (
        (layer.input_layernorm, layer.self_attention.linear_qkv),
        (layer.pre_mlp_layernorm, mlps[0].linear_fc1),
    ):
        # Transformer Engine's norms are inside the linears.
        weight = norm.weight if hasattr(norm, "weight") else linear.layer_norm_weight
        weight.data.mul_(torch.linspace(0.5, 1.5, weight.numel(), device=weight.device))
    inside = (linear for mlp in mlps for linear in (mlp.linear_fc1, mlp.linear_fc2))
    for linear in (layer.self_attention.linear_qkv, *inside):
        linear.weight.data.mul_(12)


def score_all(cases: list[ScoreCase]) -> list[dict[str, torch.Tensor]]:
    return [score(case) for case in cases]


def activations() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Weights of the tied model by parameter name, and what one rank's scoring says of it; the mask last."""
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.build import build_chunks

    here = runtime.start(ParallelConfig(), seed=0)
    try:
        (chunk,) = build_chunks(SPECS["tied"], here, Precision.FP32, trainable=False, seed=3)
        for layer in chunk.decoder.layers:
            sharpen(layer)
        weights = {weight.name: parameter.detach().clone() for weight, parameter in chunk.named_weights()}
    finally:
        runtime.stop()
    return weights, score(ScoreCase("tied", micro_batch_size=4)), global_batch()[2]


def score_tokens(
    source: Path, tokens: torch.Tensor, keep: torch.Tensor, positions: torch.Tensor | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Scores of a checkpoint over given samples `[samples, tokens]`, one at a time, at either FFN site."""
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
    from nemo_minitron.megatron.hooks import ImportanceCollector
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore
    from tests.jobs import config_for

    config = config_for(source, source)
    model = restore(MegatronGPTModel, source, config=config, micro_batch_size=1, trainer=make_trainer(config))
    found = {}
    places = torch.arange(tokens.shape[1]).expand_as(tokens) if positions is None else positions
    for site in FfnSite:
        with ImportanceCollector(model.chunks, model.runtime, model.spec, ffn_site=site) as collector:
            for sample in range(len(tokens)):
                part = slice(sample, sample + 1)
                collector.expect([keep[part]])
                batch = MicroBatch(tokens[part], tokens[part], keep[part], places[part])
                collect_hidden(model.chunks, [batch], model.runtime)
            found[site.value] = collector.result()
    return found
