"""Importance statistics: the paper's definitions on transformers' activations, and the same at every layout."""

from functools import cache

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sites import FfnSite
from nemo_minitron.ops.importance import aggregate
from nemo_minitron.pruning.scores import Scores
from tests.oracles import importance as oracle
from tests.parallel.hooks_jobs import ScoreCase, activations, score, score_all
from tests.parallel.megatron_jobs import SPECS, global_batch
from tests.ranks import RankError, run_on_ranks
from tests.tolerances import TOL

TP2, PP2, TP4 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(tensor=4)
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)
BEFORE = FfnSite.BEFORE_ACTIVATION
LAYOUTS = {
    "micro-batches of 4": (1, ScoreCase("tied", micro_batch_size=4)),
    "TP2": (2, ScoreCase("tied", TP2)),
    "TP2 uneven layers": (2, ScoreCase("uneven", TP2)),
    "PP2": (2, ScoreCase("untied", PP2, micro_batch_size=2)),
    "PP2 VPP2": (2, ScoreCase("tied", ParallelConfig(pipeline=2, virtual_pipeline=2))),
    "DP2": (2, ScoreCase("tied", micro_batch_size=2)),
    "PP2 uneven stages, uneven layers": (2, ScoreCase("uneven", PP2, ffn_site=BEFORE)),
    "TP2 parts apart": (2, ScoreCase("untied", TP2, sublayers=True)),
    "PP2 parts apart": (2, ScoreCase("untied", PP2, sublayers=True, fold=True)),
    "DP2 parts apart": (2, ScoreCase("untied", micro_batch_size=2, sublayers=True)),
    "TP2 PP2": (4, ScoreCase("tied", TP2_PP2, micro_batch_size=2)),
    "TP2 PP2 before the activation": (4, ScoreCase("untied", TP2_PP2, ffn_site=BEFORE)),
    "TP2 DP2": (4, ScoreCase("untied", TP2)),
    "TP2 DP2 put down and taken up": (4, ScoreCase("untied", TP2, fold=True)),
    "TP4": (4, ScoreCase("tied", TP4, micro_batch_size=4)),
    "DP4 before the activation": (4, ScoreCase("tied", ffn_site=BEFORE, rounds=1)),
}


@cache
def runs(world):
    """Every case of a world size in one start of the ranks; 0 stands for the plain runs they are compared with."""
    if world == 0:
        plain = sorted({(case.spec, case.ffn_site, case.sublayers) for _, case in LAYOUTS.values()})
        alone = [ScoreCase(spec, ffn_site=site, sublayers=apart) for spec, site, apart in plain]
        (results,) = run_on_ranks(1, score_all, alone)
        return {which: [result] for which, result in zip(plain, results, strict=True)}
    names = [name for name, (size, _) in LAYOUTS.items() if size == world]
    results = run_on_ranks(world, score_all, [LAYOUTS[name][1] for name in names])
    return {name: [rank[index] for rank in results] for index, name in enumerate(names)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_the_same_at_every_layout_and_on_every_rank(layout):
    world, case = LAYOUTS[layout]
    (alone,) = runs(0)[case.spec, case.ffn_site, case.sublayers]
    for rank in runs(world)[layout]:
        assert list(rank) == list(alone)
        for name, expected in alone.items():
            torch.testing.assert_close(
                rank[name], expected, **TOL[torch.float32], msg=lambda text, n=name: f"{n}: {text}"
            )
        assert all(torch.equal(rank[name], runs(world)[layout][0][name]) for name in alone), "ranks disagree"
    Scores(SPECS[case.spec], alone)  # accepts the names and shapes


@pytest.fixture(scope="module")
def scored():
    (answer,) = run_on_ranks(1, activations)
    return answer


def transformers_activations(weights):
    """What transformers' Llama computes at each site for every sample: `{site: [S, C] per sample}` in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = SPECS["tied"]
    layer, hd = spec.layer, spec.head_dim
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=layer.mlp.ffn_hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=layer.attention.num_attention_heads,
        num_key_value_heads=layer.attention.num_query_groups,
        head_dim=hd,
        rms_norm_eps=spec.norm_eps,
        rope_theta=spec.rotary_base,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double().eval()
    state = {"model.embed_tokens.weight": weights["embedding.word_embeddings.weight"]}
    state["model.norm.weight"] = weights["decoder.final_layernorm.weight"]
    groups = layer.attention.num_query_groups
    per_group = layer.attention.num_attention_heads // groups
    for index in range(spec.num_layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        rows = weights[ours + "self_attention.linear_qkv.weight"].view(
            layer.attention.num_query_groups, per_group + 2, hd, -1
        )
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state |= {
            theirs + "self_attn.q_proj.weight": rows[:, :-2].flatten(0, 2),
            theirs + "self_attn.k_proj.weight": rows[:, -2].flatten(0, 1),
            theirs + "self_attn.v_proj.weight": rows[:, -1].flatten(0, 1),
            theirs + "self_attn.o_proj.weight": weights[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.linear_fc2.weight"],
            theirs + "input_layernorm.weight": weights[ours + "self_attention.linear_qkv.layer_norm_weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "mlp.linear_fc1.layer_norm_weight"],
        }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict({name: value.double() for name, value in state.items()})
    found = {}

    def keep_input(site):
        return lambda module, args: found.setdefault(site, args[0])

    for index, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(keep_input((index, "head")))
        block.mlp.down_proj.register_forward_pre_hook(keep_input((index, "ffn")))
        block.self_attn.q_proj.register_forward_pre_hook(keep_input((index, "hidden.attention")))
        block.mlp.up_proj.register_forward_pre_hook(keep_input((index, "hidden.mlp")))
        block.register_forward_pre_hook(keep_input((index, "in")))
        block.register_forward_hook(lambda m, a, out, i=index: found.setdefault((i, "out"), out))
    with torch.no_grad():
        model(global_batch()[0])
    return {site: (value[0] if isinstance(value, tuple) else value) for site, value in found.items()}


def test_scores_are_the_papers_on_transformers_activations(scored):
    weights, sums, keep = scored
    found = transformers_activations(weights)
    kept = [sample for sample in range(len(keep)) if keep[sample].any()]
    assert len(kept) < len(keep), "the batch has a fully masked sample"
    assert (sums["samples"].item(), sums["tokens"].item()) == (len(kept), keep.sum().item())
    for layer in range(SPECS["tied"].num_layers):
        for site in ("hidden.attention", "hidden.mlp", "ffn", "head"):
            samples = [found[layer, site][sample][keep[sample]].tolist() for sample in kept]
            for sequence in ("mean", "l2", "var"):
                for batch in ("mean", "l2", "var"):
                    prefix = f"layers.{layer}.{site}.{sequence}"
                    got = aggregate(sums[f"{prefix}.sum"], sums[f"{prefix}.sumsq"], sums["samples"], batch)
                    expected = torch.tensor(oracle.importance(samples, batch=batch, sequence=sequence)).double()
                    torch.testing.assert_close(got, expected, **TOL[torch.float32], msg=lambda t, p=prefix: f"{p}: {t}")
        tokens_in, tokens_out = (found[layer, side][keep].tolist() for side in ("in", "out"))
        influence = sums[f"layers.{layer}.block_influence.sum"] / sums["tokens"]
        assert influence.item() == pytest.approx(oracle.block_influence(tokens_in, tokens_out), abs=1e-5)
        assert influence > 1e-3, "the toy's layers do too little to test anything"


def test_infinite_activations_are_reported_by_layer_and_site():
    with pytest.raises(RankError, match=r"NaN or infinity in the activations of layer 2, site ffn"):
        run_on_ranks(1, score, ScoreCase("tied", poison=2))
