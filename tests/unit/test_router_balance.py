"""The load-balancing loss: loops over tokens, transformers' function, its gradient, and who may ask for it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.cli.recipes import find
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DistillConfig
from nemo_minitron.errors import ConfigError, TrainingError
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models.routers import RouterBalance
from nemo_minitron.ops.routing import load_imbalance
from nemo_minitron.stages.distill import _objective
from nemo_minitron.stages.preflight import check_models
from tests.support.expert_models import loaded, write_experts
from tests.support.loaded import megatron_model
from tests.support.small_spec import SPEC

GENERATOR = torch.Generator().manual_seed(2)
TOKENS = torch.randint(2, 256, (3, 24), generator=GENERATOR)  # 1 is OLMoE's padding, which has no gradient
KEEP = torch.rand(3, 24, generator=GENERATOR) < torch.tensor([0.9, 0.4, 0.0])[:, None]
WEIGHT = 0.3


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_loop_over_sequences_tokens_and_experts(sigmoid: bool) -> None:
    logits = torch.randn(24, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = 0.0
    for sample in range(3):
        rows = [logits[token, sample] for token in range(24) if KEEP[sample, token]]
        scores = [1 / (1 + (-row).exp()) if sigmoid else row.exp() for row in rows]
        for expert in range(5):
            chosen = sum(sum(float(other > row[expert]) for other in row) < 2 for row in rows)
            mass = sum(float(score[expert] / score.sum()) for score in scores)
            expected += 5 / 2 * chosen * mass / max(len(rows), 1)
    found = load_imbalance(logits, KEEP.t(), top_k=2, sigmoid=sigmoid)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    logits.requires_grad_()
    torch.autograd.gradcheck(lambda x: load_imbalance(x, KEEP.t(), top_k=2, sigmoid=sigmoid), (logits,))


def test_it_is_one_a_token_for_equal_loads_and_most_for_one_expert() -> None:
    turns = torch.eye(4).repeat(3, 1)[:, None] * 1e-3  # each expert in its turn, and scores that are almost equal
    keep = torch.ones(12, 1, dtype=torch.bool)
    assert float(load_imbalance(turns, keep, top_k=1)) == pytest.approx(12, rel=1e-3)
    always = torch.tensor([50.0, 0.0, 0.0, 0.0]).expand(12, 1, 4)
    assert float(load_imbalance(always, keep, top_k=1)) == pytest.approx(12 * 4, rel=1e-6)


def theirs(folder: Path) -> tuple[float, dict[str, Tensor]]:
    """The same from transformers' logits by its own function, a sequence and a layer at a time; and its gradients."""
    model = loaded(folder)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(TOKENS, use_cache=False)
    count, top_k = model.config.num_experts, model.config.num_experts_per_tok
    total = torch.zeros(())
    for logits in seen:
        for sample, keep in enumerate(KEEP):
            if keep.any():
                one = logits.view(*TOKENS.shape, -1)[sample]
                value = load_balancing_loss_func((one,), count, top_k, keep[None].long())
                total = total + value / top_k * keep.sum() / len(seen)
    (WEIGHT * total).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), gradients


@pytest.mark.parametrize("case", ["olmoe", "qwen3_moe, some dense"])
def test_value_and_gradient_are_those_of_transformers(case: str, tmp_path: Path, here: Runtime) -> None:
    write_experts(tmp_path / "hf", case)
    expected, gradients = theirs(tmp_path / "hf")
    source = open_hf(tmp_path / "hf")
    model = megatron_model(source, here, trainable=True)
    balance = RouterBalance(student=source.spec, runtime=here)
    micro_batches = MicroBatch.of(TOKENS, TOKENS, KEEP).split(1)
    balance.expect(micro_batches)

    def one_pass(*, training: bool) -> dict[str, float]:
        for batch in micro_batches:
            with torch.set_grad_enabled(training):
                logits = model(batch.tokens, batch.position_ids, None)
            if training:
                (logits * 0.0).sum().backward()
        return {"tokens": float(KEEP.sum()), **({"loss": 5.0} if training else {})}

    around = balance.around(one_pass, [model], weight=WEIGHT)
    assert around(training=False) == {"tokens": float(KEEP.sum()), "balance": pytest.approx(expected, rel=1e-5)}
    report = around(training=True)
    assert report["balance"] == pytest.approx(expected, rel=1e-5)
    assert report["loss"] == pytest.approx(5.0 + WEIGHT * report["balance"], rel=1e-9)
    found = {weight.name: parameter.grad for weight, parameter in model.named_weights()}
    for ours, name in (
        ("decoder.layers.2.mlp.router.weight", "model.layers.2.mlp.gate.weight"),
        ("decoder.layers.0.mlp.router.weight", "model.layers.0.mlp.gate.weight"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ):
        largest = float(gradients[name].abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(found[ours], gradients[name], rtol=1e-3, atol=1e-4 * largest)


def test_it_is_off_unless_asked_for_and_named_in_the_objective() -> None:
    assert DistillConfig(tokens=10_000).balance_weight == 0
    assert _objective(DistillConfig(tokens=10_000, balance_weight=0.01)).endswith("+ 0.01 x load balance of routers")


def test_without_experts_it_is_refused_before_work(here: Runtime) -> None:
    asked = ["model.source=m", "data.sources=[t]", "distill.balance_weight=0.01", "distill.router_weight=0.1"]
    config = load_recipe(find("tiny/tiny_cpu"), asked)
    with pytest.raises(ConfigError) as refused:
        check_models([SPEC], config, "llama")
    assert "distill.balance_weight = 0.01: the model has no experts" in str(refused.value)
    assert "distill.router_weight = 0.1: the model has no experts" in str(refused.value)
    with pytest.raises(TrainingError, match="balance_weight for a model without experts"):
        RouterBalance(student=SPEC, runtime=here)


def test_sequences_in_parts_are_refused_before_work(tmp_path: Path, here: Runtime) -> None:
    write_experts(tmp_path / "teacher", "mixtral")
    spec = open_hf(tmp_path / "teacher").spec
    asked = ["model.source=m", "data.sources=[t]", "distill.balance_weight=0.01", "parallel.context=2"]
    with pytest.raises(ConfigError) as refused:
        check_models([spec], load_recipe(find("tiny/tiny_cpu"), asked), "mixtral")
    assert "distill.balance_weight = 0.01: parallel.context = 2 splits sequences" in str(refused.value)
    split = replace(here, parallel=ParallelConfig(tensor=2, sequence_parallel=True))
    with pytest.raises(TrainingError, match=r"balance_weight with parallel.sequence_parallel = true"):
        RouterBalance(student=spec, runtime=split)
