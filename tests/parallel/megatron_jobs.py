"""What ranks do in the Megatron tests: train a small random model for a few steps at some layout."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.arch.layer import LayerSpec, Mamba, Moe, RouterScore, transformer_layer
from nemo_minitron.arch.spec import Activation, ModelSpec, Norm
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig

STEPS = 4
ONE = ParallelConfig()
SAMPLES, LENGTH = 8, 12
STARTS = ((0, 5), (0,), (0, 1, 7), (0, 3, 4, 11), (0, 6), (0, 2, 4, 6, 8, 10), (0, 11), (0, 4, 9))
"""Where documents begin in the samples that hold several: 23 of them, of 1 to 12 tokens."""

# 94 tokens: padded at TP 2 and TP 3. 9 heads in 3 groups, wider than the hidden size, as after pruning.
SPEC = ModelSpec(
    vocab_size=94,
    hidden_size=24,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=36),) * 4,
    max_position_embeddings=64,
    tied_embeddings=True,
)
EVEN = SPEC.with_sizes(num_attention_heads=8, num_query_groups=4)
MAMBA = LayerSpec(
    mixer=Mamba(mamba_num_heads=4, mamba_head_dim=6, mamba_state_dim=5, mamba_num_groups=2, chunk_size=4),
    feed_forward=None,
)
SPECS = {
    "tied": EVEN,
    "untied": replace(EVEN, tied_embeddings=False, qkv_bias=True),
    "three groups": SPEC,
    "uneven": replace(
        EVEN,
        layers=(
            transformer_layer(num_attention_heads=8, num_query_groups=4, ffn_hidden_size=36),
            transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=20),
            transformer_layer(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=44),
        ),
    ),
}
FAMILY_SPECS = {
    "qwen3": replace(EVEN, qk_norm=True),
    "nemotron": replace(
        EVEN,
        tied_embeddings=False,
        activation=Activation.SQUARED_RELU,
        norm=Norm.LAYERNORM1P,
        rotary_percent=0.5,
    ),
    "gemma3": replace(
        EVEN,
        layers=tuple(EVEN.layer.looking_back(local=local) for local in (True, True, False, True)),
        activation=Activation.GEGLU_TANH,
        norm=Norm.RMSNORM1P,
        qk_norm=True,
        post_norms=True,
        scaled_embeddings=True,
        query_scalar=12,
        sliding_window=5,
        local_rotary_base=100.0,
    ),
    "sublayers": replace(
        EVEN,
        layers=(EVEN.layer, EVEN.layer.without("mixer"), EVEN.layer.without("feed_forward"), EVEN.layer),
    ),
    "nemotron_h": replace(
        EVEN,
        layers=(
            MAMBA,
            EVEN.layer.without("mixer"),
            EVEN.layer.without("feed_forward"),
            replace(MAMBA, feed_forward=EVEN.layer.mlp),
            MAMBA,
        ),
        tied_embeddings=False,
        activation=Activation.SQUARED_RELU,
        rotary_percent=0.0,
    ),
    # Two pipeline stages: attention alone on the first, Mamba alone on the second.
    "bamba": replace(
        EVEN,
        layers=(EVEN.layer,) * 2 + (replace(MAMBA, feed_forward=EVEN.layer.mlp),) * 2,
        tied_embeddings=False,
        rotary_percent=0.5,
    ),
}
"""Families whose layers differ from Llama's, or from Qwen2's, in more than a name; and layers that lack a part."""
ALL_SPECS = SPECS | FAMILY_SPECS
_MIXER = EVEN.layer.mixer
HYBRID_EXPERTS = LayerSpec(
    mixer=None,
    feed_forward=Moe(
        num_experts=4,
        expert_ffn_hidden_size=12,
        top_k=2,
        shared_ffn_hidden_size=16,
        score_function=RouterScore.SIGMOID,
        correction_bias=True,
        scaling_factor=2.5,
        router_fp32=True,
    ),
)
EXPERT_SPECS = {
    "experts": replace(
        EVEN,
        layers=(
            LayerSpec(mixer=_MIXER, feed_forward=Moe(num_experts=4, expert_ffn_hidden_size=20, top_k=2)),
            EVEN.layer,
            LayerSpec(
                mixer=_MIXER,
                feed_forward=Moe(
                    num_experts=6,
                    expert_ffn_hidden_size=12,
                    top_k=3,
                    shared_ffn_hidden_size=16,
                    shared_gate=True,
                    score_function=RouterScore.SIGMOID,
                    correction_bias=True,
                    scaling_factor=1.5,
                    router_fp32=True,
                ),
            ),
        ),
    ),
    "alike": replace(
        EVEN,
        layers=(LayerSpec(mixer=_MIXER, feed_forward=Moe(num_experts=4, expert_ffn_hidden_size=20, top_k=2)),) * 2,
        qk_norm=True,
    ),
    "olmoe": replace(
        EVEN,
        layers=(
            LayerSpec(
                mixer=_MIXER,
                feed_forward=Moe(num_experts=4, expert_ffn_hidden_size=20, top_k=2, normalize_top_k=False),
            ),
        )
        * 2,
        qk_norm=True,
        full_width_qk_norm=True,
    ),
    "late": replace(
        EVEN,
        layers=(EVEN.layer,) * 2
        + (LayerSpec(mixer=_MIXER, feed_forward=Moe(num_experts=4, expert_ffn_hidden_size=20, top_k=2)),) * 2,
        tied_embeddings=False,
    ),
    "hybrid": replace(
        EVEN,
        layers=(MAMBA, HYBRID_EXPERTS, EVEN.layer.without("feed_forward"), HYBRID_EXPERTS, MAMBA),
        tied_embeddings=False,
        activation=Activation.SQUARED_RELU,
        rotary_percent=0.0,
    ),
    "one each": replace(
        EVEN,
        layers=(
            LayerSpec(
                mixer=_MIXER,
                feed_forward=Moe(
                    num_experts=4,
                    expert_ffn_hidden_size=20,
                    top_k=1,
                    normalize_top_k=False,
                    shared_ffn_hidden_size=16,
                ),
            ),
        )
        * 2,
    ),
}
"""Layers with experts: of several kinds with one without among them, all alike, in the second half alone, without a
mixer in a hybrid, and with one expert for each token."""


@dataclass(frozen=True)
class Case:
    """One training run."""

    spec: str
    parallel: ParallelConfig = ONE
    micro_batch_size: int = 1
    distributed: bool = False
    precision: Precision = Precision.FP32
    load: Path | None = None
    """Start from this training state instead of random weights."""
    save: Path | None = None
    """Write the training state here after half of the steps."""
    documents: str = ""
    """"packed": samples hold several documents. "alone": each of those is a sample of its own."""


def optimizer_config(case: Case) -> OptimizerConfig:
    # With the usual eps, Adam's first steps turn the rounding noise of tiny gradients into full-sized updates.
    return OptimizerConfig(
        lr=1e-2, min_lr=1e-3, warmup_steps=2, clip_grad=0.5, eps=1e-4, weight_decay=0.1, distributed=case.distributed
    )


def global_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and mask `[SAMPLES, LENGTH]`; samples keep unequal numbers of tokens, one of them none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SPEC.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    keep = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0, 1, SAMPLES)[:, None]
    return tokens[:, :-1], tokens[:, 1:], keep


def train(case: Case) -> dict[str, Any]:
    """Losses and gradient norms of each step, and this rank's weights by canonical name."""
    from nemo_minitron.megatron import optim, runtime, sharded_io
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import reduce_report, run

    here = runtime.start(case.parallel, seed=0)
    spec = (ALL_SPECS | EXPERT_SPECS)[case.spec]
    chunks = build_chunks(spec, here, case.precision, seed=7)
    config = optimizer_config(case)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.build_optimizer(wrapped, config, case.precision, STEPS)
    first = 0
    if case.load is not None:
        first = sharded_io.load_training(wrapped, optimizer, case.load)["step"]
    losses, norms = [], []
    batch = micro_batches(case, here)
    for step in range(first, STEPS):
        optimizer.zero_grad()
        reports = run(wrapped, batch, loss, runtime=here, forward_only=False)
        info = optimizer.step()
        sums = reduce_report(reports, here)
        losses.append(sums["total"] / sums["tokens"])
        norms.append(info.grad_norm)
        if case.save is not None and step + 1 == STEPS // 2:
            sharded_io.save_training(wrapped, optimizer, case.save, common={"step": step + 1})
    router_grads = {
        weight.name: parameter.main_grad.clone()
        for chunk in chunks
        for weight, parameter in chunk.named_weights()
        if weight.name.endswith("router.weight")
    }
    weights = {weight.name: parameter.detach() for chunk in chunks for weight, parameter in chunk.named_weights()}
    place = {"tp": here.tp_rank, "pp": here.pp_rank, "dp": here.dp_rank}
    runtime.stop()
    return {"losses": losses, "norms": norms, "weights": weights, "router_grads": router_grads, **place}


def micro_batches(case: Case, here: Any) -> list[Any]:
    from nemo_minitron.megatron.forward import MicroBatch

    mine = [tensor[here.dp_rank :: here.dp_size] for tensor in whole_batch(case.documents)]
    pieces = [tensor.split(case.micro_batch_size) for tensor in mine]
    return [MicroBatch(*piece) for piece in zip(*pieces, strict=True)]


def whole_batch(documents: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`global_batch` with positions; see `Case.documents`."""
    tokens, labels, keep = global_batch()
    positions = torch.arange(LENGTH).expand(SAMPLES, -1)
    if not documents:
        return tokens, labels, keep, positions
    packed, alone = [], []
    for sample, starts in enumerate(STARTS):
        spans = list(itertools.pairwise([*starts, LENGTH]))
        packed.append(torch.cat([torch.arange(stop - start) for start, stop in spans]))
        for start, stop in spans:
            rows = (x[sample, start:stop] for x in (tokens, labels, keep))
            alone.append([torch.nn.functional.pad(row, (0, LENGTH - stop + start)) for row in rows])
    if documents == "packed":
        return tokens, labels, keep, torch.stack(packed)
    separate = [torch.stack(column) for column in zip(*alone, strict=True)]
    return *separate, torch.arange(LENGTH).expand(len(alone), -1)


def loss(logits: torch.Tensor, batch: Any, index: int) -> Any:
    """Cross-entropy over the real vocabulary, gathered from the tensor-parallel ranks."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_minitron.megatron.forward import LossResult

    full = gather_from_tensor_model_parallel_region(logits)[..., : SPEC.vocab_size]
    per_token = torch.nn.functional.cross_entropy(full.mT.float(), batch.labels, reduction="none")
    return LossResult(torch.where(batch.keep, per_token, 0).sum(), batch.keep.sum())


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Several runs one after the other, on one start-up of the ranks."""
    return [train(case) for case in cases]
