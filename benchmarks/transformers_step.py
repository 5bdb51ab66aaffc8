"""The distillation step that one writes with `transformers` and `torch` alone; what `kd_step` compares ours with.

It is meant to be the best plain version: scaled-dot-product attention, no KV cache, the teacher without gradients,
each logit computed once, one log-softmax a model which both parts of the loss share, torch's fused AdamW, and no
gradient for what is frozen. In bf16 weights and optimizer are bf16 throughout, which is faster than fp32 master weights
and autocast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.arch.families import family_named
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.hf import hf_names
from nemo_minitron.checkpoints.parts import split_stored
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.megatron.model import MinitronGPT


@dataclass(frozen=True, slots=True)
class Objective:
    """What both sides train on."""

    kd_weight: float = 1.0
    lm_weight: float = 0.0
    freeze_embeddings: bool = False


class TransformersStep:
    """Two Llama models, and the student's optimizer.

    Args:
        teacher: Our teacher, whose weights are copied.
        student: Our student; its weights are copied before its first step.
        objective: The loss, and whether the tied embedding is trained.
        config: Optimizer settings; the learning rate stays at its peak.
    """

    def __init__(
        self, teacher: MinitronGPT, student: MinitronGPT, objective: Objective, config: OptimizerConfig
    ) -> None:
        self.teacher = llama_like(teacher).eval().requires_grad_(False)
        self.student = llama_like(student).train()
        self.objective, self.config = objective, config
        if objective.freeze_embeddings:
            self.student.get_input_embeddings().requires_grad_(False)
        self.trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Sum over tokens `[b, s]`, with a graph."""
        objective = self.objective
        with torch.no_grad():
            target = F.log_softmax(self.teacher(tokens, use_cache=False).logits.float(), -1)
        logq = F.log_softmax(self.student(tokens, use_cache=False).logits.float(), -1)
        loss = objective.kd_weight * F.kl_div(logq, target, log_target=True, reduction="sum")
        if objective.lm_weight:
            loss = loss + objective.lm_weight * F.nll_loss(logq.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss

    def step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step on tokens and labels `[b, s]`; returns the mean loss."""
        count = sum(tokens.numel() for tokens, _ in micro_batches)
        total = 0.0
        self.optimizer.zero_grad()
        for tokens, labels in micro_batches:
            loss = self.loss(tokens, labels) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip_grad)
        self.optimizer.step()
        return total


@torch.no_grad()
def llama_like(ours: MinitronGPT) -> LlamaForCausalLM:
    """The same model in `transformers`, with the same weights, dtype and device."""
    spec = ours.spec
    weight = ours.output_weight()
    model = LlamaForCausalLM(llama_config(spec)).to(weight.device, weight.dtype)
    state: dict[str, Tensor] = {}
    for row, parameter in ours.named_weights():
        names = hf_names(family_named("llama"), row)
        parts = split_stored(parameter, row, spec, tensors=len(names))
        state.update((name, part.clone()) for name, part in zip(names, parts, strict=True))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or missing not in ([], ["lm_head.weight"]):
        raise AssertionError(f"weights missing {missing}, unexpected {unexpected}")
    return model


def llama_config(spec: ModelSpec) -> LlamaConfig:
    """Of a Llama whose layers all have the size of the first one."""
    layer = spec.layers[0]
    return LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=layer.mlp.ffn_hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=layer.attention.num_attention_heads,
        num_key_value_heads=layer.attention.num_query_groups,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        max_position_embeddings=spec.max_position_embeddings,
        rope_theta=spec.rotary_base,
        tie_word_embeddings=spec.tied_embeddings,
        attn_implementation="sdpa",
    )
