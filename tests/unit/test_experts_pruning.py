"""Cutting experts, their neurons and those of shared experts: what is exact, what is refused, what follows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.source import TensorSource, stream
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import PlanError, SpecError
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan
from nemo_minitron.pruning.rounds import round_specs
from tests.support.expert_models import EXPERTS, FFN, LAYERS, loaded, write_experts
from tests.support.loaded import hf_logits, megatron_logits

DEAD_EXPERT, DEAD_NEURONS = 2, (0, 3, 23)
TARGETS = {
    "experts": {"num_experts": 4},
    "expert FFN": {"expert_ffn_hidden_size": 12},
    "top_k": {"top_k": 1},
    "all": {
        "num_experts": 0.5,
        "expert_ffn_hidden_size": 0.5,
        "top_k": 1,
        "hidden_size": 40,
        "num_query_groups": 1,
        "num_layers": 2,
    },
}
SHARED = {"shared FFN": {"shared_ffn_hidden_size": 24}}


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe, some dense", "qwen2_moe", "olmoe", "dots1"])
def test_a_cut_model_is_what_transformers_reads(case: str, tmp_path: Path, here: Runtime) -> None:
    write_experts(tmp_path / "teacher", case)
    source = open_hf(tmp_path / "teacher")
    targets = TARGETS | (SHARED if "shared_ffn_hidden_size" in source.spec.layers[-1].sizes else {})
    if case == "olmoe":  # two heads of 12 channels
        targets["all"] = TARGETS["all"] | {"hidden_size": 24}
    for name, sizes in targets.items():
        plan = random_plan(TargetConfig(**sizes), source.spec, seed=4)
        pruned = PrunedSource(source, plan)
        assert PruningPlan.from_bytes(plan.to_bytes(), where="there").digest() == plan.digest()
        write_hf(pruned, tmp_path / name)
        again = open_hf(tmp_path / name)
        assert again.spec == pruned.spec
        experts = again.spec.layers[-1].moe
        assert experts.num_experts == {"experts": 4, "all": 3}.get(name, EXPERTS)
        assert experts.expert_ffn_hidden_size == {"expert FFN": 12, "all": 12}.get(name, FFN)
        assert experts.top_k == (1 if "top_k" in sizes else source.spec.layers[-1].moe.top_k)
        expected = hf_logits(loaded(tmp_path / name))
        torch.testing.assert_close(megatron_logits(pruned, here), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def kill(model: PreTrainedModel) -> None:
    """Make one expert of every layer that nobody is routed to, and some neurons of the others that say nothing.

    All states get a large mean, so that the dead expert's row of the router, minus the scales of the norm before it,
    gives the lowest logit for every token.
    """
    model.model.embed_tokens.weight.add_(4.0)
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        if hasattr(layer.mlp.gate, "e_score_correction_bias"):
            layer.mlp.gate.e_score_correction_bias[DEAD_EXPERT] = -100.0
        layer.mlp.gate.weight[DEAD_EXPERT] = -20.0 * layer.post_attention_layernorm.weight.sign()
        layer.mlp.experts.down_proj[:, :, list(DEAD_NEURONS)] = 0.0
        shared = getattr(layer.mlp, "shared_expert", getattr(layer.mlp, "shared_experts", None))
        if shared is not None:
            shared.down_proj.weight[:, list(DEAD_NEURONS)] = 0.0


def without_the_dead(source: TensorSource) -> PruningPlan:
    """All but the dead units; of layers with a shared expert, its dead neurons go too."""
    layers = []
    for number, layer in enumerate(source.spec.layers):
        plan = LayerPlan.keep_all(number, layer)
        if layer.has_experts:
            experts = tuple(e for e in plan.kept[Axis.EXPERT] if e != DEAD_EXPERT)
            neurons = [f for f in range(FFN) if f not in DEAD_NEURONS]
            cut = {Axis.EXPERT: experts, Axis.EXPERT_FFN: tuple(e * FFN + f for e in experts for f in neurons)}
            if Axis.SHARED_FFN in plan.kept:
                cut[Axis.SHARED_FFN] = tuple(f for f in plan.kept[Axis.SHARED_FFN] if f not in DEAD_NEURONS)
            plan = replace(plan, kept={**plan.kept, **cut})
        layers.append(plan)
    return replace(PruningPlan.keep_all(source.spec), layers=tuple(layers))


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe, some dense", "qwen2_moe", "olmoe", "dots1"])
def test_cutting_what_is_never_used_changes_no_logit(case: str, tmp_path: Path, here: Runtime) -> None:
    """Neither in transformers, which reads the export, nor in Megatron's model (dots1 cannot write such sizes)."""
    write_experts(tmp_path / "alive", case)
    model = loaded(tmp_path / "alive")
    before = hf_logits(model)
    kill(model)
    chosen: list[Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    expected = hf_logits(model)
    assert len(chosen) >= LAYERS - 1
    assert all((found != DEAD_EXPERT).all() for found in chosen)
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "dead")
    source = open_hf(tmp_path / "dead")
    pruned = PrunedSource(source, without_the_dead(source))
    assert pruned.spec.layers[-1].moe.num_experts == EXPERTS - 1
    torch.testing.assert_close(megatron_logits(pruned, here), megatron_logits(source, here), rtol=1e-6, atol=1e-6)
    if case == "dots1":
        with pytest.raises(SpecError, match="shared_ffn_hidden_size = 45"):
            write_hf(pruned, tmp_path / "pruned")
        return
    write_hf(pruned, tmp_path / "pruned")
    torch.testing.assert_close(hf_logits(loaded(tmp_path / "pruned")), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("case", "top_k"), [("mixtral", 2), ("olmoe", 4)])
def test_equal_copies_of_all_experts_can_go_with_their_part_of_top_k(
    case: str, top_k: int, tmp_path: Path, here: Runtime
) -> None:
    """Weights that are normalised over the chosen experts, and softmax scores as they are."""
    write_experts(tmp_path / "alive", case, num_experts_per_tok=top_k)
    model = loaded(tmp_path / "alive")
    half = EXPERTS // 2
    with torch.no_grad():
        for layer in model.model.layers:
            for weights in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weights[half:] = weights[:half]
    model.save_pretrained(tmp_path / "copies")
    source = open_hf(tmp_path / "copies")
    cut = {Axis.EXPERT: tuple(range(half)), Axis.EXPERT_FFN: tuple(range(half * FFN))}
    layers = [LayerPlan.keep_all(number, layer) for number, layer in enumerate(source.spec.layers)]
    layers = [replace(plan, kept={**plan.kept, **cut}, top_k=top_k // 2) for plan in layers]
    pruned = PrunedSource(source, replace(PruningPlan.keep_all(source.spec), layers=tuple(layers)))
    torch.testing.assert_close(megatron_logits(pruned, here), hf_logits(model), rtol=1e-5, atol=1e-5)
    if top_k <= half:  # as many experts a token as before are others
        as_before = tuple(replace(plan, top_k=None) for plan in layers)
        changed = PrunedSource(source, replace(pruned.plan, layers=as_before))
        assert (megatron_logits(changed, here) - hf_logits(model)).abs().max() > 0.01


def test_pruning_twice_is_one_plan(tmp_path: Path) -> None:
    write_experts(tmp_path / "teacher", "qwen2_moe", dtype=torch.bfloat16)
    source = open_hf(tmp_path / "teacher")
    first = random_plan(TargetConfig(num_experts=5, expert_ffn_hidden_size=16), source.spec, seed=1)
    once = PrunedSource(source, first)
    second = random_plan(TargetConfig(num_experts=3, expert_ffn_hidden_size=10, top_k=2), once.spec, seed=2)
    twice = PrunedSource(once, second)
    write_hf(once, tmp_path / "once")
    from_disk = PrunedSource(open_hf(tmp_path / "once"), replace(second, spec=open_hf(tmp_path / "once").spec))
    for (name, tensor), (_, other) in zip(stream(twice), stream(from_disk), strict=True):
        assert torch.equal(tensor, other), name
    assert twice.plan.student.layers[0].moe.top_k == 2


def test_rounds_go_there_in_steps(tmp_path: Path) -> None:
    write_experts(tmp_path / "teacher", "mixtral")
    spec = open_hf(tmp_path / "teacher").spec
    specs = round_specs(TargetConfig(num_experts=2, expert_ffn_hidden_size=8), spec, 2)
    assert [each.layer.moe.num_experts for each in specs] == [4, 2]
    assert [each.layer.moe.expert_ffn_hidden_size for each in specs] == [16, 8]
    assert parameter_count(specs[1], active=True) == parameter_count(specs[1])


def test_what_cannot_be_is_named_before_work(tmp_path: Path) -> None:
    write_experts(tmp_path / "teacher", "qwen3_moe, some dense")
    spec = open_hf(tmp_path / "teacher").spec
    for sizes, words in (
        ({"num_experts": 2}, r"num_experts = 2 is below the teacher's top_k = 3 \(give a smaller target\.top_k"),
        ({"num_experts": 4, "top_k": 5}, "top_k = 5, the teacher routes a token to 3 experts"),
        ({"shared_ffn_hidden_size": 4}, "shared_ffn_hidden_size: the teacher has no"),
        ({"num_experts": 7}, "num_experts = 7, the teacher has 6"),
    ):
        with pytest.raises(PlanError, match=words):
            random_plan(TargetConfig(**sizes), spec, seed=0)
    plan = random_plan(TargetConfig(num_experts=3), spec, seed=0)
    fewer = {**plan.layers[0].kept, Axis.EXPERT: (0, 1), Axis.EXPERT_FFN: tuple(range(2 * FFN))}
    with pytest.raises(PlanError, match="routed to top_k = 3 experts, and 2 stay"):
        replace(plan, layers=(replace(plan.layers[0], kept=fewer), *plan.layers[1:]))
