"""A mixture of experts of Megatron's modules, with our own routing and our own way of tokens to experts.

Routing and `Mixture` serve both kinds of mixtures; `LocalMoe` is used where Transformer Engine's
(`megatron.engine_experts`) is not. Weights are Megatron's in name, shape and split. Experts are spread over the
expert-parallel group, whose ranks are data-parallel ranks: every rank gathers the tokens of all of them, applies its
experts to those that are routed there, and gets the sums for its own tokens back. Each expert is split over the
tensor-parallel group like an MLP. No token is dropped; losses of routers are `models.routers`' matter.

Shapes: T tokens of this rank, A tokens of all expert-parallel ranks, E experts, H hidden, F neurons of this rank.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from nemo_minitron.arch.layer import Moe, RouterScore
from nemo_minitron.arch.spec import Activation
from nemo_minitron.megatron.layers import ACTIVATIONS, LocalColumnLinear, LocalMLP, LocalRowLinear
from nemo_minitron.megatron.marks import device_of, mark
from nemo_minitron.ops.routing import route


class ExpertObserver(Protocol):
    """Who looks on while experts work; called without a graph."""

    def see(self, expert: int, rows: Tensor, neurons: Tensor, output: Tensor, weights: Tensor) -> None:
        """What one expert of this rank does to the tokens routed to it.

        Args:
            expert: Its number in the layer.
            rows: Which of the A tokens.
            neurons: `[rows, F]`, what enters the second matrix.
            output: `[rows, H]`, this tensor-parallel rank's addend of what leaves it.
            weights: `[rows]`, what the output is still to be multiplied with.
        """
        ...


class Routing(NamedTuple):
    """What a router says of T tokens, each `[T, E]`."""

    logits: Tensor
    weights: Tensor
    """Zero for experts that a token is not routed to."""
    chosen: Tensor
    """Which experts a token is routed to, bool."""


class LocalRouter(MegatronModule):
    """A linear function of every token, equal on all ranks, and the choice of its experts."""

    def __init__(self, config: TransformerConfig, experts: Moe) -> None:
        super().__init__(config)
        self.experts = experts
        device = device_of(config)
        shape = (experts.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.sequence_parallel:  # each tensor-parallel rank routes tokens of its own
            mark(self.weight, sequence_parallel=True)
        self.expert_bias: Tensor | None
        bias = torch.zeros(experts.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias if experts.correction_bias else None)

    def forward(self, tokens_TH: Tensor) -> Routing:
        """Route every token."""
        wide = self.experts.router_fp32
        tokens, weight = (tokens_TH.float(), self.weight.float()) if wide else (tokens_TH, self.weight)
        logits_TE = nn.functional.linear(tokens, weight)
        weights_TE, chosen_TE = route(
            logits_TE,
            top_k=self.experts.top_k,
            sigmoid=self.experts.score_function is RouterScore.SIGMOID,
            normalize=self.experts.normalize_top_k,
            bias_E=self.expert_bias,
            scaling=self.experts.scaling_factor,
        )
        return Routing(logits_TE, weights_TE, chosen_TE)


class SharedExpert(LocalMLP):
    """The MLP that sees every token, and its gate where it has one."""

    gated: bool

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.gate_weight: nn.Parameter | None = None
        if self.gated:
            shape = (1, config.hidden_size)
            self.gate_weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device_of(config)))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Transform `[s, b, h]`; returns the output, and no bias."""
        output, _ = super().forward(hidden_states, *args, **kwargs)
        if self.gate_weight is not None:
            output = output * nn.functional.linear(hidden_states, self.gate_weight).sigmoid()
        return output, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's for an MLP, and the gate."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gate_weight is not None:
            name = f"{prefix}gate_weight"
            state[name] = make_sharded_tensor_for_checkpoint(
                self.gate_weight,
                name,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        return state


class Mixture(MegatronModule):
    """Router, this rank's experts, and the shared expert of a layer.

    Attributes:
        sizes: Of the complete mixture, and its traits.
        kind: What experts apply between their two matrices.
        count: Experts of this rank.
        first: Number of the first of them in the layer.
        router: Equal on all ranks.
        shared_experts: The MLP that sees every token; None where there is none.
        observer: Who looks on; None for nobody.
    """

    sizes: Moe
    kind: Activation
    shared_experts: Any

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config)
        self.groups = get_default_pg_collection()
        self.count = self.sizes.num_experts // self.groups.ep.size()
        self.first = self.groups.ep.rank() * self.count
        self.router = LocalRouter(config, self.sizes)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[self.kind]
        self.observer: ExpertObserver | None = None


class LocalMoe(Mixture):
    """A mixture whose ranks gather all tokens, and whose experts work one after the other."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config)
        self.ep_group, self.tp_group = self.groups.ep, self.groups.tp
        own = _with_neurons(config, self.sizes.expert_ffn_hidden_size)
        linears = MLPSubmodules(linear_fc1=LocalColumnLinear, linear_fc2=LocalRowLinear)
        self.experts = SequentialMLP(self.count, own, linears, pg_collection=self.groups)
        trained_apart(self.experts)
        self.shared_experts: SharedExpert | None = None
        if neurons := self.sizes.shared_ffn_hidden_size:
            self.shared_experts = _shared_expert(self.kind, self.sizes.shared_gate)(_with_neurons(config, neurons))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Transform `[s, b, h]`; returns the output, and no bias."""
        tokens_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TE = self.router(tokens_TH).weights
        # Each tensor-parallel rank has a part of every expert, so what it knows of the gradients of both is a part.
        tokens_TH = copy_to_tensor_model_parallel_region(tokens_TH, group=self.tp_group)
        weights_TE = copy_to_tensor_model_parallel_region(weights_TE, group=self.tp_group)
        tokens_AH = gather_from_sequence_parallel_region(tokens_TH, group=self.ep_group)
        weights_AE = gather_from_sequence_parallel_region(weights_TE, group=self.ep_group)
        output_AH = self._routed(tokens_AH, weights_AE)
        output_TH = reduce_scatter_to_sequence_parallel_region(output_AH, group=self.ep_group)
        output_TH = reduce_from_tensor_model_parallel_region(output_TH, group=self.tp_group)
        output = output_TH.view(hidden_states.shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)[0]
        return output, None

    def _routed(self, tokens_AH: Tensor, weights_AE: Tensor) -> Tensor:
        """The weighted sum of what this rank's experts return, `[A, H]`, zero for tokens of others.

        Experts without a token are called too, so that their weights have a gradient, which is zero.
        """
        output_AH = torch.zeros_like(tokens_AH)
        for index, expert in enumerate(self.experts.local_experts):
            weights_A = weights_AE[:, self.first + index]
            rows = weights_A.detach().nonzero().squeeze(-1)
            inputs = tokens_AH.index_select(0, rows)
            neurons = self.activation(nn.functional.linear(inputs, expert.linear_fc1.weight))
            output = nn.functional.linear(neurons, expert.linear_fc2.weight)
            weights = weights_A.index_select(0, rows)
            if self.observer is not None:
                with torch.no_grad():
                    self.observer.see(self.first + index, rows, neurons.detach(), output.detach(), weights.detach())
            output_AH.index_add_(0, rows, (output * weights[:, None]).to(output_AH.dtype))
        return output_AH


def trained_apart(experts: nn.Module) -> None:
    """Give experts an optimizer of their own, also where every rank has all of them, so that its state has one form."""
    for parameter in experts.parameters():
        mark(parameter, allreduce=False)


def experts_of(layer: TransformerLayer) -> Mixture | None:
    """The mixture of a layer; None for a layer without."""
    feed_forward: Any = layer.mlp
    return feed_forward if isinstance(feed_forward, Mixture) else None


def with_experts(layer: ModuleSpec, experts: Moe, kind: Activation) -> ModuleSpec:
    """How to build a layer of `megatron.layers` with a mixture of experts in the place of its MLP.

    In checkpoints the norm before experts keeps its own name: no linear follows it that it could be fused with.
    """
    parts = cast("TransformerLayerSubmodules", layer.submodules)
    keys = {
        key: name for key, name in parts.sharded_state_dict_keys_map.items() if not key.startswith("pre_mlp_layernorm")
    }
    submodules = replace(parts, mlp=local_moe(experts, kind), sharded_state_dict_keys_map=keys)
    return replace(layer, submodules=submodules)


@lru_cache
def local_moe(experts: Moe, kind: Activation) -> type[LocalMoe]:
    """A class for a mixture; Megatron warns of every other one given as a `ModuleSpec`."""
    return type("LocalMoe", (LocalMoe,), {"sizes": experts, "kind": kind})


@lru_cache
def _shared_expert(kind: Activation, gated: bool) -> type[SharedExpert]:
    return type("SharedExpert", (SharedExpert,), {"kind": kind, "fc2": LocalRowLinear, "gated": gated})


def _with_neurons(config: TransformerConfig, neurons: int) -> TransformerConfig:
    own = copy.copy(config)
    own.ffn_hidden_size = own.moe_ffn_hidden_size = neurons
    return own
