"""A mixture of experts whose experts are multiplied together, by Transformer Engine's grouped products.

Routing is our own, as in `megatron.experts`; Megatron's dispatchers carry tokens to experts and back, and its
`TEGroupedMLP` holds the weights, which are stored under the names and in the shapes of experts that stand alone. What
is multiplied with the router's weight is what enters the second matrix, which has no bias: the sum is the same.

Under tensor parallelism each rank has to bring tokens of its own, as under sequence parallelism; with the same tokens
on all of them the gradients of experts would be added up once for each.

Shapes: T tokens of this rank, A tokens of all expert- and tensor-parallel ranks, E experts, H hidden, F neurons of this
rank.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_minitron.arch.layer import Moe
from nemo_minitron.arch.spec import Activation
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron.experts import Mixture, trained_apart
from nemo_minitron.parallel.collectives import gather, split_group


def takes_experts(parallel: ParallelConfig) -> bool:
    """Whether mixtures can be of this kind at a layout."""
    return parallel.tensor == 1 or parallel.sequence_parallel


def goes_to_all(top_k: int, ranks: int) -> bool:
    """Whether every token is sent to every rank, instead of a copy to each of its experts: that is less to send.

    To all, a token goes as 2 bytes a channel in bf16 and comes back as 4, in the fp32 of the router's weights; to each
    of its experts, as 2 and back as 2.
    """
    return ranks == 1 or 3 * ranks <= 2 * top_k


class EngineMoe(Mixture):
    """A mixture of grouped products."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TEColumnParallelLinear,
            TERowParallelGroupedLinear,
            TERowParallelLinear,
        )

        super().__init__(config)
        groups = self.groups
        own = _sized(config, self.sizes)
        self.to_all = goes_to_all(self.sizes.top_k, groups.tp_ep.size())
        kind = MoEAllGatherTokenDispatcher if self.to_all else MoEAlltoAllTokenDispatcher
        numbers = list(range(self.first, self.first + self.count))
        self.dispatcher: MoETokenDispatcher = kind(self.count, numbers, config=own, pg_collection=groups)
        grouped = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        self.experts = TEGroupedMLP(self.count, own, grouped, pg_collection=groups)
        trained_apart(self.experts)
        self.shared_experts: SharedExpertMLP | None = None
        if self.sizes.shared_ffn_hidden_size:
            linears = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
            self.shared_experts = SharedExpertMLP(own, linears, gate=self.sizes.shared_gate, pg_collection=groups)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Transform `[s, b, h]`; returns the output, and no bias."""
        way = self.dispatcher
        _, weights_TE, chosen_TE = self.router(hidden_states.reshape(-1, hidden_states.shape[-1]))
        tokens, weights = way.dispatch_preprocess(hidden_states, chosen_TE, weights_TE)
        tokens, weights = way.token_dispatch(tokens, weights)
        tokens, counts, weights = way.dispatch_postprocess(tokens, weights)
        if self.observer is None:
            output, _ = self.experts(tokens, counts, weights)
        else:
            output = self._watched(tokens, counts, weights, chosen_TE)
        output = way.combine_postprocess(way.token_combine(way.combine_preprocess(output)))
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output, None

    def _watched(self, tokens: Tensor, counts: Tensor, weights: Tensor, chosen_TE: Tensor) -> Tensor:
        """What experts return for the tokens that have come to them; the observer sees it."""
        products: list[Tensor] = []

        def keep(linear: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            products.append(output[0].detach())

        handle = self.experts.linear_fc1.register_forward_hook(keep)
        try:
            output, _ = self.experts(tokens, counts, weights)
        finally:
            handle.remove()
        assert self.observer is not None
        with torch.no_grad():
            neurons, sizes = self.activation(products[0]), counts.tolist()
            cut = (torch.split(neurons, sizes), torch.split(output.detach(), sizes))
            parts = zip(self._rows(chosen_TE), *cut, strict=True)
            for index, (rows, own, weighted) in enumerate(parts):
                self.observer.see(self.first + index, rows, own, weighted, weights.new_ones(len(rows)))
        return output

    def _rows(self, chosen_TE: Tensor) -> list[Tensor]:
        """For each of this rank's experts, which of the A tokens have come to it, in their order.

        Of the A tokens, ranks of the expert-parallel group come one after the other, and of each its tensor-parallel
        ranks. Both dispatchers keep that order for each expert, but the one that sends copies takes the
        tensor-parallel ranks first.
        """
        every = gather(chosen_TE.to(torch.uint8), split_group(self.groups.tp_ep)).bool()
        every = every[..., self.first : self.first + self.count]
        ranks = (self.groups.ep.size(), self.groups.expt_tp.size())
        places = torch.arange(every.shape[0] * every.shape[1], device=every.device).view(*ranks, -1)
        every = every.view(*ranks, *every.shape[1:])
        if not self.to_all:
            places, every = places.transpose(0, 1), every.transpose(0, 1)
        places_A, every_AE = places.flatten(), every.flatten(0, 2)
        return [places_A[chosen_A] for chosen_A in every_AE.unbind(1)]


@lru_cache
def engine_moe(experts: Moe, kind: Activation) -> type[EngineMoe]:
    """A class for a mixture; Megatron warns of every other one given as a `ModuleSpec`."""
    return type("EngineMoe", (EngineMoe,), {"sizes": experts, "kind": kind})


def _sized(config: TransformerConfig, experts: Moe) -> TransformerConfig:
    """Megatron's configuration with the sizes of a mixture."""
    own = copy.copy(config)
    own.num_moe_experts, own.moe_router_topk = experts.num_experts, experts.top_k
    own.moe_ffn_hidden_size = own.ffn_hidden_size = experts.expert_ffn_hidden_size
    own.moe_shared_expert_intermediate_size = experts.shared_ffn_hidden_size or None
    own.moe_grouped_gemm = True
    return own
