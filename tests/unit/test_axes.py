"""The axis table: what it covers, who names axes besides, and layers that lack a mixer or a feed-forward."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nemo_minitron
from nemo_minitron.arch.axes import LAYER_AXES, MODEL_AXES, PRUNABLE, Axis, outer_axis
from nemo_minitron.arch.layer import Attention, LayerSpec, Mlp, transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import ROWS, parameter_count, weights
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sizes import MultipleOf, TargetConfig
from nemo_minitron.errors import PlanError, SpecError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan, random_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores, site_names
from nemo_minitron.pruning.sizes import student_spec
from tests.support.scores import sums

PACKAGE = Path(nemo_minitron.__file__).parent
NAMED = re.compile(
    r"\b(num_attention_heads|num_query_groups|ffn_hidden_size|kv_groups)\b"
    r"|\bAxis\.(HEAD|KV_GROUP|FFN)\b|(?<=\w)\.(heads|ffn)\b"
)
"""Heads, groups and neurons by name: fields of specs, recipes and plans, and rows of the table."""
OUTSIDE_AT_MOST = 3


def test_few_files_name_heads_groups_and_neurons(capsys: pytest.CaptureFixture[str]) -> None:
    """An axis is a row: outside the architecture and Megatron, code goes through the table."""
    rooms = ("arch", "megatron")
    naming = {
        str(path.relative_to(PACKAGE)): len(NAMED.findall(path.read_text(encoding="utf-8")))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in rooms
    }
    found = {path: count for path, count in sorted(naming.items()) if count}
    with capsys.disabled():
        print(f"\nfiles outside {' and '.join(rooms)} that name heads, groups or neurons: {len(found)} {found}")
    assert len(found) <= OUTSIDE_AT_MOST, found


def test_recipes_have_a_key_and_a_divisor_for_every_axis() -> None:
    sizes = {row.size for row in PRUNABLE}
    assert sizes <= set(TargetConfig.model_fields)
    assert sizes == set(MultipleOf.model_fields)
    assert {row.divided_by for row in PRUNABLE} - {""} <= set(ParallelConfig.model_fields)


def test_every_axis_is_ranked_by_something_and_cuts_some_weight() -> None:
    cut = {axis for row in ROWS for axis in row.axes} | {Axis.LAYER}
    for row in PRUNABLE:
        assert row.sites or row.sums or row.token_sums or row.axis is Axis.LAYER
        assert row.axis in cut or row.sums in cut
    assert [row.axis for row in PRUNABLE] == [row.axis for row in (*MODEL_AXES, *LAYER_AXES)]
    order = [row.axis for row in LAYER_AXES]
    for row in LAYER_AXES:
        assert (outer := outer_axis(row)) is None or order.index(outer.axis) < order.index(row.axis)


# -- layers with parts missing ----------------------------------------------------------------------------------------

BOTH = transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=6)
ONLY_MLP = replace(BOTH, mixer=None)
ONLY_ATTENTION = replace(BOTH, feed_forward=None)
MIXED = ModelSpec(
    vocab_size=16,
    hidden_size=8,
    head_dim=2,
    layers=(BOTH, ONLY_MLP, ONLY_ATTENTION),
    max_position_embeddings=8,
)


class Numbers:
    """Weights that count from 0, each element another number."""

    dtype, lineage, family = torch.float32, {}, "llama"

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def names(self) -> tuple[str, ...]:
        return tuple(weight.name for weight in weights(self.spec))

    def get(self, name: str) -> Tensor:
        (weight,) = (weight for weight in weights(self.spec) if weight.name == name)
        return torch.arange(weight.numel, dtype=torch.float32).view(weight.shape)

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}


def test_weights_are_present_by_layer() -> None:
    names = [{weight.row.name for weight in weights(MIXED) if weight.layer == layer} for layer in range(3)]
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    assert all(".mlp." in name for name in names[1])
    # Attention: norm 8, qkv (4 + 2*2) heads of 2 channels by 8, projection 8 by 8; MLP: norm 8, 12 by 8, 8 by 6.
    attention, mlp, outside = 8 + 16 * 8 + 8 * 8, 8 + 12 * 8 + 8 * 6, 2 * 16 * 8 + 8
    assert parameter_count(MIXED) == outside + 2 * attention + 2 * mlp


def test_a_missing_part_survives_as_data() -> None:
    assert ModelSpec.from_dict(MIXED.to_dict()) == MIXED
    data = MIXED.to_dict()["layers"]
    assert data[1] == {"ffn_hidden_size": 6, "mixer": None}
    assert data[2] == {"num_attention_heads": 4, "num_query_groups": 2, "feed_forward": None}
    for broken in ({"ffn_hidden_size": 6}, {"ffn_hidden_size": 6, "mixer": 3}, {"mixer": None, "feed_forward": None}):
        with pytest.raises(SpecError):
            ModelSpec.from_dict(MIXED.to_dict() | {"layers": [broken]})


def test_what_a_layer_lacks_cannot_be_asked_for_in_silence() -> None:
    with pytest.raises(SpecError, match="no attention"):
        _ = ONLY_MLP.attention
    with pytest.raises(SpecError, match="no MLP"):
        _ = ONLY_ATTENTION.mlp
    with pytest.raises(SpecError, match="num_query_groups"):
        ONLY_MLP.with_sizes(num_query_groups=1)
    with pytest.raises(PlanError, match="num_query_groups: the teacher has no KV groups"):
        student_spec(TargetConfig(num_query_groups=1), replace(MIXED, layers=(ONLY_MLP,) * 2))
    sizes = [layer.sizes for layer in student_spec(TargetConfig(num_query_groups=1), MIXED).layers]
    assert sizes == [
        {"num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 6},
        {"ffn_hidden_size": 6},
        {"num_attention_heads": 2, "num_query_groups": 1},
    ]


@pytest.mark.parametrize("draw", ["scores", "lots"])
def test_such_a_model_is_scored_and_pruned(draw: str, tmp_path: Path) -> None:
    """Hidden channels go through every layer; each layer is cut along the axes it has."""
    target = TargetConfig(hidden_size=5)
    scores = Scores(MIXED, sums(MIXED)[0])
    scores.save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors").spec == MIXED
    plan = random_plan(target, MIXED, seed=1) if draw == "lots" else build_plan(scores, target, MIXED)
    assert [set(layer.kept) for layer in plan.layers] == [
        {Axis.KV_GROUP, Axis.HEAD, Axis.FFN},
        {Axis.FFN},
        {Axis.KV_GROUP, Axis.HEAD},
    ]
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert plan.compose(PruningPlan.keep_all(plan.student)).digest() == plan.digest()
    pruned = PrunedSource(Numbers(MIXED), replace(plan, rescale_norms=False))
    kept = list(plan.hidden)
    for name in pruned.names():
        whole, cut = Numbers(MIXED).get(name), pruned.get(name)
        for dim, size in enumerate(whole.shape):
            if size == 8 and cut.shape[dim] == 5:
                whole = whole.index_select(dim, torch.tensor(kept))
        assert torch.equal(cut, whole), name


def test_sites_are_those_of_the_parts() -> None:
    assert [(layer, site) for layer, site, _ in site_names(MIXED)] == [
        *((0, site) for site in ("hidden.attention", "hidden.mlp", "ffn", "head")),
        *((1, site) for site in ("hidden.mlp", "ffn")),
        *((2, site) for site in ("hidden.attention", "head")),
    ]


def test_a_layer_is_a_mixer_and_a_feed_forward() -> None:
    layer = LayerSpec(mixer=Attention(num_attention_heads=4, num_query_groups=2), feed_forward=Mlp(ffn_hidden_size=6))
    assert layer == BOTH
    assert BOTH.sizes == {"num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 6}
    assert BOTH.on_rank(2) == (2, 1, 3)
