"""What pruning must leave alone: dead units change nothing, keeping all is the identity, twice is once."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_minitron.arch.axes import Axis
from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import Checkpoint
from nemo_minitron.errors import PlanError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.ranges import from_ranges, to_ranges
from tests import tiny
from tests.support.plans import layer_plan

TOKENS = torch.tensor([[3, 141, 59, 26, 5, 35, 89, 79, 32, 38, 4, 62]])
LAYERS, HIDDEN, FFN, HEADS, GROUPS, SIZE = 4, 64, 96, 8, 4, 8


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    tiny.write_llama(root / "tied", tied=True)
    tiny.write_llama(root / "untied", tied=False)
    tiny.write_qwen2(root / "qwen2")
    return root


def random_plan(
    source: Checkpoint, seed: int, *, hidden: int, ffn: int, groups: int, per_group: int, layers: int
) -> PruningPlan:
    """Any units at all, the same for whoever asks with the same seed."""
    rng = random.Random(seed)
    spec = source.spec

    def some(size: int, keep: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(size), keep)))

    kept_layers = []
    for index in some(spec.num_layers, layers):
        layer = spec.layers[index]
        size = layer.attention.num_attention_heads // layer.attention.num_query_groups
        kv_groups = some(layer.attention.num_query_groups, groups)
        heads = tuple(group * size + head for group in kv_groups for head in some(size, per_group))
        neurons = some(layer.mlp.ffn_hidden_size, ffn)
        kept_layers.append(layer_plan(source=index, kv_groups=kv_groups, heads=heads, ffn=neurons))
    return PruningPlan(spec=spec, hidden=some(spec.hidden_size, hidden), layers=tuple(kept_layers))


# -- dead units -------------------------------------------------------------------------------------------------------


def _kill_hidden(model: PreTrainedModel, plan: PruningPlan) -> None:
    dead = _others(plan.hidden, HIDDEN)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            weight[:, dead] = 0
        elif "o_proj.weight" in name or "down_proj.weight" in name:
            weight[dead] = 0


def _kill_ffn(model: PreTrainedModel, plan: PruningPlan) -> None:
    for layer in plan.layers:
        model.model.layers[layer.source].mlp.down_proj.weight[:, _others(layer.kept[Axis.FFN], FFN)] = 0


def _kill_heads(model: PreTrainedModel, plan: PruningPlan) -> None:
    for layer in plan.layers:
        output = model.model.layers[layer.source].self_attn.o_proj.weight
        for head in _others(layer.kept[Axis.HEAD], HEADS):
            output[:, head * SIZE : (head + 1) * SIZE] = 0


def _kill_layers(model: PreTrainedModel, plan: PruningPlan) -> None:
    for index in _others([layer.source for layer in plan.layers], LAYERS):
        model.model.layers[index].self_attn.o_proj.weight.zero_()
        model.model.layers[index].mlp.down_proj.weight.zero_()


def _others(kept: object, size: int) -> list[int]:
    return [index for index in range(size) if index not in kept]


ALL = {"hidden": HIDDEN, "ffn": FFN, "groups": GROUPS, "per_group": 2, "layers": LAYERS}
AXES: dict[str, tuple[dict[str, int], list[Callable[[PreTrainedModel, PruningPlan], None]]]] = {
    "hidden": ({"hidden": 40}, [_kill_hidden]),
    "ffn": ({"ffn": 50}, [_kill_ffn]),
    "heads": ({"per_group": 1}, [_kill_heads]),
    "kv groups": ({"groups": 3}, [_kill_heads]),
    "layers": ({"layers": 2}, [_kill_layers]),
    "all": (
        {"hidden": 40, "ffn": 50, "groups": 2, "per_group": 1, "layers": 3},
        [_kill_hidden, _kill_ffn, _kill_heads, _kill_layers],
    ),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("family", ["tied", "untied", "qwen2"])
def test_cutting_dead_units_changes_no_logit(teachers: Path, tmp_path: Path, family: str, axis: str) -> None:
    sizes, kills = AXES[axis]
    plan = random_plan(open_hf(teachers / family), 7, **(ALL | sizes))
    model = AutoModelForCausalLM.from_pretrained(teachers / family, dtype=torch.float32).eval()
    with torch.no_grad():
        # The toy's logits are of order five, where fp32 sums in another order differ by more than 1e-6.
        model.model.norm.weight *= 0.1
        alive = _logits(model)
        for kill in kills:
            kill(model, plan)
    expected = _logits(model)
    model.save_pretrained(tmp_path / "dead")
    write_hf(PrunedSource(open_hf(tmp_path / "dead"), plan), tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert pruned.num_parameters() < model.num_parameters()
    assert (expected - alive).abs().max() > 0.01  # the units were not dead before
    torch.testing.assert_close(_logits(pruned), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


# -- identity and composition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tied", "untied", "qwen2"])
def test_keeping_all_is_byte_identical(teachers: Path, tmp_path: Path, family: str) -> None:
    source = open_checkpoint(teachers / family)
    kept = PrunedSource(source, PruningPlan.keep_all(source.spec))
    write_hf(source, tmp_path / "hf")
    write_hf(kept, tmp_path / "hf_kept")
    write_folder(source, tmp_path / "nemo")
    write_folder(kept, tmp_path / "nemo_kept")
    for name in ("hf", "nemo"):
        files, kept_files = FolderFiles(tmp_path / name), FolderFiles(tmp_path / f"{name}_kept")
        assert files.names() == kept_files.names()
        for file in files.names():
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}_kept" / file).read_bytes(), file


@pytest.mark.parametrize("seed", range(4))
def test_pruning_twice_is_pruning_once(teachers: Path, tmp_path: Path, seed: int) -> None:
    source = open_hf(teachers / "qwen2")
    first = random_plan(source, seed, hidden=48, ffn=70, groups=3, per_group=2, layers=3)
    once = PrunedSource(source, first)
    second = random_plan(once, seed + 100, hidden=30, ffn=33, groups=2, per_group=1, layers=2)
    composed = first.compose(second)
    at_once = PrunedSource(source, composed)
    nested = PrunedSource(once, second)
    write_folder(once, tmp_path / "between")
    stepwise = PrunedSource(open_checkpoint(tmp_path / "between"), second)
    assert composed.student == nested.spec == stepwise.spec
    for name in at_once.names():
        assert torch.equal(nested.get(name), at_once.get(name)), name
        if name.endswith("norm_weight") or name.endswith("norm.weight"):
            # Rescaled and stored in between, so rounded twice.
            torch.testing.assert_close(stepwise.get(name), at_once.get(name), rtol=2**-22, atol=0)
        else:
            assert torch.equal(stepwise.get(name), at_once.get(name)), name


def test_composition_is_associative_and_has_an_identity(teachers: Path) -> None:
    source = open_hf(teachers / "tied")
    a = random_plan(source, 1, hidden=50, ffn=80, groups=4, per_group=2, layers=4)
    b = random_plan(PrunedSource(source, a), 2, hidden=40, ffn=60, groups=3, per_group=1, layers=3)
    c = random_plan(PrunedSource(source, a.compose(b)), 3, hidden=20, ffn=10, groups=1, per_group=1, layers=1)
    assert a.compose(b).compose(c).digest() == a.compose(b.compose(c)).digest()
    keep = PruningPlan.keep_all(source.spec)
    assert keep.compose(a).digest() == a.digest() == a.compose(PruningPlan.keep_all(a.student)).digest()


def test_a_plan_for_another_model_is_refused(teachers: Path) -> None:
    source = open_hf(teachers / "tied")
    plan = PruningPlan.keep_all(replace(source.spec, hidden_size=128))
    with pytest.raises(PlanError, match="hidden_size: plan 128, model 64"):
        PrunedSource(source, plan)
    with pytest.raises(PlanError, match="made for another model"):
        PruningPlan.keep_all(source.spec).compose(plan)


# -- each cut is the one on the separate matrices ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tied", "qwen2"])
def test_cuts_are_those_of_the_separate_matrices(teachers: Path, tmp_path: Path, family: str) -> None:
    """q, k, v, gate and up cut one by one from the Hugging Face weights, by Python lists."""
    source = open_hf(teachers / family)
    plan = random_plan(source, 11, hidden=33, ffn=17, groups=3, per_group=1, layers=2)
    write_hf(PrunedSource(source, replace(plan, rescale_norms=False)), tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(teachers / family).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    hidden = list(plan.hidden)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"][hidden])
    for index, layer in enumerate(plan.layers):
        old, new = f"model.layers.{layer.source}.", f"model.layers.{index}."
        queries = [head * SIZE + channel for head in layer.kept[Axis.HEAD] for channel in range(SIZE)]
        keys = [group * SIZE + channel for group in layer.kept[Axis.KV_GROUP] for channel in range(SIZE)]
        rows = {"q": queries, "k": keys, "v": keys}
        for part, kept in rows.items():
            name = f"self_attn.{part}_proj."
            assert torch.equal(after[f"{new}{name}weight"], before[f"{old}{name}weight"][kept][:, hidden])
            if family == "qwen2":
                assert torch.equal(after[f"{new}{name}bias"], before[f"{old}{name}bias"][kept])
        output = "self_attn.o_proj.weight"
        assert torch.equal(after[new + output], before[old + output][hidden][:, queries])
        neurons = list(layer.kept[Axis.FFN])
        for part in ("gate", "up"):
            name = f"mlp.{part}_proj.weight"
            assert torch.equal(after[new + name], before[old + name][neurons][:, hidden])
        down = "mlp.down_proj.weight"
        assert torch.equal(after[new + down], before[old + down][hidden][:, neurons])


# -- ranges -----------------------------------------------------------------------------------------------------------


# A busy machine is no fault of the strategy's.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sets(st.integers(0, 300)))
def test_ranges_round_trip(indices: set[int]) -> None:
    ordered = tuple(sorted(indices))
    assert from_ranges(to_ranges(ordered), size=301, what="x") == ordered


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.text(alphabet="0123456789,- x٣", max_size=12))
def test_any_text_is_indices_or_a_plan_error(text: str) -> None:
    try:
        found = from_ranges(text, size=50, what="x")
    except PlanError:
        return
    assert list(found) == sorted(set(found))
    assert all(0 <= index < 50 for index in found)
