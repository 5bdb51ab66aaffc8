"""The collector where positions are split (sequence and context parallelism) and norms sit inside the linears.

Megatron offers these only with Transformer Engine on a GPU. Here a layer of the same shape replays fixed activations,
each rank its own part of them, so the collector's arithmetic is tested without either.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import distributed, nn

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron.hooks import ImportanceCollector, fused_norm
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Groups, Runtime
from tests.ranks import RankError, run_on_ranks
from tests.tolerances import TOL

SPEC = ModelSpec(
    vocab_size=8,
    hidden_size=6,
    head_dim=2,
    layers=(transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=8),),
    max_position_embeddings=16,
)
S, B = 16, 3
LAYOUTS = {
    "SP2": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "CP2": (2, ParallelConfig(context=2)),
    "SP2 CP2": (4, ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
}


class FusedLinear(nn.Module):
    """A linear with its norm inside, as Transformer Engine has it; only the norm matters here."""

    def __init__(self, normalization="RMSNorm", zero_centered_gamma=False):
        super().__init__()
        self.normalization, self.zero_centered_gamma, self.eps = normalization, zero_centered_gamma, 1e-5
        self.layer_norm_weight = nn.Parameter(torch.linspace(0.5, 2, SPEC.hidden_size, dtype=torch.float64))
        self.layer_norm_bias = nn.Parameter(torch.linspace(-1, 1, SPEC.hidden_size, dtype=torch.float64))

    def forward(self, x):
        return x


class ReplayLayer(nn.Module):
    """Passes this rank's parts of fixed activations through modules named as Megatron names them."""

    layer_number = 1

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self.input_layernorm, self.pre_mlp_layernorm = IdentityOp(), IdentityOp()
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        self.self_attention.linear_qkv, self.self_attention.linear_proj = FusedLinear(), nn.Identity()
        self.mlp.linear_fc1, self.mlp.linear_fc2 = FusedLinear(), nn.Identity()

    def forward(self, hidden_states):
        self.self_attention.linear_qkv(hidden_states)
        self.self_attention.linear_proj(self.parts["head"])
        self.mlp.linear_fc1(self.parts["between"])
        self.mlp.linear_fc2(self.parts["ffn"])
        return self.parts["out"], None


class ReplayModel(MinitronGPT):
    def __init__(self, parts):
        nn.Module.__init__(self)
        self.decoder = SimpleNamespace(layers=[ReplayLayer(parts)])
        self.parts = parts

    def forward(self):
        return self.decoder.layers[0](hidden_states=self.parts["in"])


def whole():
    generator = torch.Generator().manual_seed(0)
    widths = {"in": 6, "between": 6, "out": 6, "head": 8, "ffn": 8}
    parts = {name: torch.randn(S, B, width, generator=generator, dtype=torch.float64) for name, width in widths.items()}
    keep = torch.rand(B, S, generator=generator) > 0.4
    keep[1] = False
    return parts, keep


def subgroups(size, stride, world):
    """The group of this rank among those of `size` ranks that lie `stride` apart."""
    mine = None
    for start in range(world):
        if (start // stride) % size == 0:
            ranks = [start + index * stride for index in range(size)]
            group = distributed.new_group(ranks)
            mine = group if distributed.get_rank() in ranks else mine
    return mine


def collect(parallel, announced=2):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    tp_rank, cp_rank = rank % parallel.tensor, rank // parallel.tensor
    tp, cp = subgroups(parallel.tensor, 1, world), subgroups(parallel.context, parallel.tensor, world)
    alone = subgroups(1, 1, world)
    runtime = Runtime(
        rank=rank,
        world_size=world,
        local_rank=rank,
        device=torch.device("cpu"),
        parallel=parallel,
        seed=0,
        groups=Groups(tp=tp, pp=alone, cp=cp, dp=alone, dp_cp=cp, mp=tp, ep=alone),
        tp_rank=tp_rank,
        pp_rank=0,
        cp_rank=cp_rank,
        dp_rank=0,
        dp_size=1,
    )
    parts, keep = whole()
    if parallel.context > 1:  # one piece from either end of the sequence, as Transformer Engine's attention wants it
        pieces = (cp_rank, 2 * parallel.context - 1 - cp_rank)
        parts = {k: torch.cat([x.chunk(2 * parallel.context)[piece] for piece in pieces]) for k, x in parts.items()}
    for name in ("head", "ffn"):
        parts[name] = parts[name].chunk(parallel.tensor, -1)[tp_rank]
    if parallel.sequence_parallel:
        parts |= {name: parts[name].chunk(parallel.tensor)[tp_rank] for name in ("in", "between", "out")}
    model = ReplayModel(parts)
    with ImportanceCollector([model], runtime, SPEC) as collector:
        collector.expect([keep, torch.ones_like(keep)][:announced])
        for _ in range(2):
            model()
    return collector.result()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_positions_add_up(layout):
    world, parallel = LAYOUTS[layout]
    (alone,) = run_on_ranks(1, collect, ParallelConfig())
    assert (alone["samples"].item(), alone["tokens"].item()) == (2 * B - 1, whole()[1].sum().item() + B * S)
    for rank in run_on_ranks(world, collect, parallel):
        for name, expected in alone.items():
            torch.testing.assert_close(rank[name], expected, **TOL[torch.float64], msg=lambda t, n=name: f"{n}: {t}")


def test_a_micro_batch_that_was_not_announced_is_refused():
    with pytest.raises(RankError, match=r"micro-batch 1 of 1 announced"):
        run_on_ranks(1, collect, ParallelConfig(), 1)


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_fused_norm_is_computed_once_more(kind, zero_centred):
    linear, x = FusedLinear(kind, zero_centred), whole()[0]["in"]
    weight = linear.layer_norm_weight + zero_centred
    if kind == "RMSNorm":
        expected = nn.functional.rms_norm(x, (6,), weight, 1e-5)
    else:
        expected = nn.functional.layer_norm(x, (6,), weight, linear.layer_norm_bias, 1e-5)
    torch.testing.assert_close(fused_norm(linear, x), expected, **TOL[torch.float64])
