"""Budgets of models whose layers are of several kinds: counts against built models, and plans by kind."""

import io
import random
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, DynamicCache, NemotronHConfig

from nemo_minitron.arch.families import family_of_hf_config
from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba, Mlp, Moe, transformer_layer
from nemo_minitron.arch.sizes import named_sizes
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.cli import dry_run_search, recipes
from nemo_minitron.config.budget import DeploymentConfig
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import PlanError, SearchError, SpecError
from nemo_minitron.pruning.build import build_plan, random_plan
from nemo_minitron.pruning.rounds import round_specs
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.sizes import student_spec
from nemo_minitron.search.axes import axes_of, named, resized, short_name, sizes_of
from nemo_minitron.search.choose import DEPTH, choose_candidates
from nemo_minitron.search.measures import limits, measures
from nemo_minitron.search.problem import pose
from nemo_minitron.search.space import find_shapes, make_space
from tests.support.hybrid_sizes import active_by_hand, by_hand, published
from tests.support.scores import sums

MAMBA = LayerSpec(
    mixer=Mamba(mamba_num_heads=8, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=4), feed_forward=None
)
ATTENTION = LayerSpec(mixer=Attention(num_attention_heads=8, num_query_groups=4), feed_forward=None)
MLP = LayerSpec(mixer=None, feed_forward=Mlp(ffn_hidden_size=96))
HYBRID = ModelSpec(
    vocab_size=256,
    hidden_size=64,
    head_dim=16,
    layers=(MAMBA, MLP, ATTENTION, MLP, MAMBA, MLP, MAMBA, MAMBA, ATTENTION, MLP),
    max_position_embeddings=256,
    activation=Activation.SQUARED_RELU,
    rotary_percent=0.0,
)
NAMES = ("params", "active_params", "non_embedding_params", "kv_cache", "ssm_state", "memory")


def random_config(rng: random.Random, *, with_experts: bool) -> NemotronHConfig:
    groups, mamba_groups = rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
    pattern = "".join(["M*-", *rng.choices("M*-", k=rng.randint(0, 6))])
    experts = {}
    if with_experts:
        pattern += "".join(["E", *rng.choices("M*-E", k=rng.randint(0, 4))])
        top_k = rng.randint(1, 3)
        experts = {
            "n_routed_experts": top_k + rng.randint(1, 6),
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": 8 * rng.randint(1, 6),
            "moe_shared_expert_intermediate_size": 8 * rng.randint(1, 6),
        }
    return NemotronHConfig(
        **experts,
        vocab_size=16 * rng.randint(8, 40),
        hidden_size=16 * rng.randint(1, 6),
        intermediate_size=8 * rng.randint(1, 20),
        hybrid_override_pattern=pattern,
        num_attention_heads=groups * rng.randint(1, 3),
        num_key_value_heads=groups,
        head_dim=8 * rng.randint(1, 3),
        max_position_embeddings=128,
        mamba_num_heads=mamba_groups * rng.randint(1, 4),
        mamba_head_dim=4 * rng.randint(1, 4),
        n_groups=mamba_groups,
        ssm_state_size=8 * rng.randint(1, 4),
        conv_kernel=rng.choice([2, 3, 4]),
        chunk_size=16,
    )


@pytest.mark.parametrize("number", range(12))
def test_counts_are_those_of_built_hybrids(number: int) -> None:
    """Parameters by numel; what transformers' cache holds after a prompt, by its own tensors."""
    rng = random.Random(number)
    config = random_config(rng, with_experts=number % 2 == 1)
    batch, length = rng.randint(1, 3), rng.randint(5, 30)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        cache = DynamicCache(config=config)
        model(torch.zeros(batch, length, dtype=torch.int64), past_key_values=cache)
    data = config.to_dict()
    spec = family_of_hf_config(data).read_config(data)
    # A teacher of other sizes, which has more of everything: only its traits and its kinds of layers count.
    mamba = next(layer.mamba for layer in spec.layers if isinstance(layer.mixer, Mamba))
    wide = {"hidden_size": 128, "ffn_hidden_size": 300, "mamba_num_heads": 8 * mamba.mamba_num_groups}
    wide |= {"num_experts": 16, "expert_ffn_hidden_size": 64} if spec.has_experts else {}
    teacher = replace(spec, layers=spec.layers * 2).with_sizes(**wide)
    deployment = DeploymentConfig(batch_size=batch, sequence_length=length, state_dtype="fp16")
    found = {name: measure(sizes_of(spec)) for name, measure in measures(teacher, deployment, NAMES).items()}
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    assert (biases > 0) == spec.has_experts
    total = model.num_parameters() + biases
    assert found["params"] == total
    # A token leaves out all experts but `top_k` of every layer that has some.
    unused = sum(
        matrix.numel() // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
        for name, matrix in model.named_parameters()
        if ".experts." in name
    )
    assert found["active_params"] == total - unused
    outside = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    assert found["non_embedding_params"] == total - outside
    keys = [each for layer in cache.layers for each in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    keys = [each for each in keys if each is not None]
    states = [each for layer in cache.layers for each in states_of(layer)]
    assert len(keys) == 2 * sum(isinstance(layer.mixer, Attention) for layer in spec.layers)
    assert len(states) == 2 * sum(isinstance(layer.mixer, Mamba) for layer in spec.layers)
    assert found["kv_cache"] == 2 * sum(each.numel() for each in keys)
    assert found["ssm_state"] == 2 * sum(each.numel() for each in states)
    assert found["memory"] == 2 * total + found["kv_cache"] + found["ssm_state"]


def states_of(layer: Any) -> list[torch.Tensor]:
    """What a layer of transformers' cache holds of a Mamba mixer."""
    found = (getattr(layer, name, {}).get(0) for name in ("conv_states", "recurrent_states"))
    return [each for each in found if each is not None]


def spec_of(name: str) -> ModelSpec:
    config = published(name)
    return family_of_hf_config(config).read_config(config)


PAIRS = [
    ("Nemotron-H 8B", "Nemotron-H 4B"),
    ("Nano 2 12B", "Nano 2 9B"),
    ("Nemotron 3 Nano 30B", "Nemotron 3 Nano 22B"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_published_students_count_exactly_in_their_teachers_spaces(pair: tuple[str, str]) -> None:
    teacher, student = map(spec_of, pair)
    found = measures(teacher, DeploymentConfig(), ["params"])
    assert found["params"](sizes_of(student)) == by_hand(published(pair[1]))
    assert found["params"](sizes_of(teacher)) == by_hand(published(pair[0]))
    if teacher.has_experts:
        active = measures(teacher, DeploymentConfig(), ["active_params"])["active_params"]
        assert [active(sizes_of(spec)) for spec in (teacher, student)] == [active_by_hand(published(x)) for x in pair]


def test_nano_2_fits_the_memory_that_it_was_made_for() -> None:
    """19.66 GiB for 128k tokens (arXiv:2508.14444): the 9B fits, the 12B does not; and each part by hand."""
    teacher = spec_of("Nano 2 12B")
    deployment = DeploymentConfig(sequence_length=131_072)
    found = measures(teacher, deployment, ["kv_cache", "ssm_state", "memory"])
    sizes = sizes_of(spec_of("Nano 2 9B"))
    attention, mamba = 4, 27
    assert found["kv_cache"](sizes) == attention * 131_072 * 2 * 8 * 128 * 2
    inner = 128 * 80
    assert found["ssm_state"](sizes) == mamba * (inner * 128 * 4 + (inner + 2 * 8 * 128) * 4 * 2)
    assert found["memory"](sizes) < 19.66 * 2**30 < found["memory"](sizes_of(teacher))
    other = measures(teacher, deployment.model_copy(update={"sequence_length": 1, "batch_size": 3}), ["ssm_state"])
    assert other["ssm_state"](sizes) == 3 * found["ssm_state"](sizes), "the length has no say"


def test_operations_of_a_generated_token_by_hand() -> None:
    """Each weight twice; scores and sums over 100 positions; every number of a state written and read."""
    found = measures(HYBRID, DeploymentConfig(sequence_length=100), ["flops_per_token"])["flops_per_token"]
    inner, maps = 8 * 8, 4 * 16
    mamba = 2 * (64 * (2 * inner + 2 * maps + 8) + inner * 64) + 4 * inner * 16
    attention = 2 * (64 * 16 * 16 + 8 * 16 * 64) + 4 * 8 * 16 * 100
    mlp = 2 * 2 * 64 * 96
    assert found(sizes_of(HYBRID)) == 4 * mamba + 2 * attention + 4 * mlp + 2 * 256 * 64


SPACE = {
    "num_mamba_layers": {"min": 3},
    "num_attention_layers": [1, 2],
    "num_mlp_layers": [2, 4],
    "hidden_size": [48, 64],
    "ffn_hidden_size": [64, 96],
    "mamba_num_heads": [2, 4, 6, 8],
    "mamba_head_dim": [4, 8],
    "mamba_num_groups": [2, 4],
}


def test_filtering_is_what_trying_every_shape_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_minitron.search.space._CHUNK", 30)  # so that leading axes go one by one
    target = TargetConfig(ratio=0.8, ssm_state="20KB")
    space = make_space(SearchConfig(space=SPACE), target, HYBRID, ParallelConfig())
    upper = limits(target, HYBRID)
    result = find_shapes(space, measures(HYBRID, target.deployment, list(upper)), upper, tolerance=0.1)
    assert [axis.key for axis in space.axes][:3] == ["num_mamba_layers", "num_attention_layers", "num_mlp_layers"]
    expected, ruled_out, above = set(), 0, 0
    for sizes in product(*space.values):
        shape = named(space.axes, sizes)
        heads, groups = shape["mamba_num_heads"], shape["mamba_num_groups"]
        if heads % groups or heads // groups > 2:
            ruled_out += 1
            continue
        inner, maps = heads * shape["mamba_head_dim"], groups * 16
        state = shape["num_mamba_layers"] * (inner * 16 * 4 + (inner + 2 * maps) * 4 * 2)
        use = max(parameter_count(resized(HYBRID, sizes)) / upper["params"], state / 20_000)
        above += state > 20_000
        if 0.9 <= use <= 1:
            expected.add(sizes)
    assert {tuple(map(int, row)) for row in result.shapes} == expected
    assert expected
    assert (result.ruled_out, result.above["ssm_state"]) == (ruled_out, above)


def test_without_a_word_kinds_and_mamba_heads_go_down_to_half() -> None:
    target = TargetConfig(ratio=0.7)
    space = make_space(SearchConfig(), target, spec_of("Nemotron-H 8B"), ParallelConfig(tensor=8))
    by_key = {axis.key: values for axis, values in zip(space.axes, space.values, strict=True)}
    assert by_key["num_mamba_layers"] == tuple(range(12, 25))
    assert by_key["num_attention_layers"] == (2, 3, 4)
    assert by_key["num_mlp_layers"] == tuple(range(12, 25))
    assert by_key["mamba_num_heads"] == (64, 80, 96, 112, 128), "the published student's is among them"
    assert by_key["mamba_head_dim"] == (64,)
    assert by_key["mamba_num_groups"] == (8,)


def test_every_pipeline_stage_has_a_layer_and_every_group_equally_many_heads() -> None:
    space = make_space(
        SearchConfig(space={"mamba_num_heads": {"min": 3, "step": 1}}),
        TargetConfig(ratio=0.7),
        HYBRID,
        ParallelConfig(pipeline=8),
    )
    assert space.values[:3] == ((2, 3, 4), (1, 2), (2, 3, 4))
    found = find_shapes(space, measures(HYBRID, DeploymentConfig(), ["params"]), {"params": 10**9}, tolerance=1.0)
    assert {int(row[:3].sum()) for row in found.shapes} == {8, 9, 10}
    assert {int(row[7]) for row in found.shapes} == {4, 8}


def test_context_parallel_ranks_that_share_a_group_have_equally_many_of_its_heads() -> None:
    """Four ranks: of two groups, two share each, so that a group has an even number of heads; four have one each."""
    choices = {"mamba_num_heads": [2, 4, 6, 8], "mamba_num_groups": [2, 4]}
    target = TargetConfig(ratio=0.7)
    found = {}
    for context in (1, 4):
        space = make_space(SearchConfig(space=choices), target, HYBRID, ParallelConfig(context=context))
        shapes = find_shapes(space, measures(HYBRID, DeploymentConfig(), ["params"]), {"params": 10**9}, tolerance=1.0)
        named_shapes = [named(space.axes, [int(size) for size in row]) for row in shapes.shapes]
        found[context] = {(shape["mamba_num_heads"], shape["mamba_num_groups"]) for shape in named_shapes}
    assert found == {1: {(2, 2), (4, 2), (4, 4), (8, 4)}, 4: {(4, 2), (4, 4), (8, 4)}}
    with pytest.raises(SearchError, match="context-parallel ranks that share Mamba groups"):
        make_space(SearchConfig(space={"mamba_num_heads": [4]}), target, HYBRID, ParallelConfig(context=8))


def test_depth_alone_takes_as_large_a_part_of_each_kind() -> None:
    target = TargetConfig(ratio=0.7)
    space = make_space(SearchConfig(), target, HYBRID, ParallelConfig())
    upper = limits(target, HYBRID)
    measured = measures(HYBRID, target.deployment, list(upper))
    found = find_shapes(space, measured, upper, tolerance=0.1)
    (depth,) = (each for each in choose_candidates(space, found, 8, measured, upper) if each.label == DEPTH)
    layers, widths = depth.sizes[:3], depth.sizes[3:]
    assert widths == sizes_of(HYBRID)[3:]
    assert depth.name.startswith(f"LM{layers[0]}-LA{layers[1]}-LF{layers[2]}-H64-F96-A8-G4-M8-C8-B4")
    assert max(abs(count / total - sum(layers) / 10) for count, total in zip(layers, (4, 2, 4), strict=True)) <= 0.25


@pytest.mark.parametrize(
    ("space", "target", "told"),
    [
        (
            {"num_layers": [8]},
            {},
            "search.space.num_layers: its layers are of several kinds: num_mamba_layers",
        ),
        ({}, {"num_layers": 8}, "target.num_layers: its layers are of several kinds"),
        ({"num_dense_layers": [3]}, {}, "search.space.num_dense_layers: the teacher has no such size"),
        ({"num_experts": [3]}, {}, "search.space.num_experts: the teacher has no such size"),
        (
            {"mamba_num_heads": [6], "mamba_num_groups": [4]},
            {},
            "no number of Mamba heads in [6] goes with Mamba",
        ),
        ({"num_mlp_layers": [5]}, {}, "num_mlp_layers: 5 is above the teacher's 4"),
    ],
)
def test_what_no_space_can_be(space: dict[str, Any], target: dict[str, Any], told: str) -> None:
    with pytest.raises(SearchError) as caught:
        make_space(SearchConfig(space=space), TargetConfig(ratio=0.7, **target), HYBRID, ParallelConfig())
    assert told in str(caught.value)


def test_layers_of_one_kind_that_differ_cannot_be_searched() -> None:
    other = replace(HYBRID, layers=(*HYBRID.layers, MAMBA.with_sizes(mamba_num_heads=4)))
    with pytest.raises(SpecError, match="layers of Mamba alone differ"):
        sizes_of(other)
    unnamed = replace(MAMBA, feed_forward=Moe(num_experts=4, expert_ffn_hidden_size=8, top_k=2))
    with pytest.raises(SpecError, match="layers of Mamba and experts stand beside others"):
        sizes_of(replace(HYBRID, layers=(*HYBRID.layers, unnamed)))


def test_a_published_hybrid_in_a_recipe_and_what_a_dry_run_says_of_it() -> None:
    """Nemotron-H 8B on TP 8 within the 4B's parameters and a fifth less memory; every candidate counts exactly."""
    names = ("hidden_size", "ffn_hidden_size", "mamba_num_heads")
    budgets = ["target.params=4.5B", "target.memory=11GB", "target.deployment.batch_size=16", "search.candidates=12"]
    path = recipes.find("nemotron_h_8b_to_4b_width_256gpu_h100")
    config = load_recipe(path, [*(f"target.{name}=null" for name in names), *budgets])
    teacher = read_architecture(path.parent / config.model.architecture)
    problem = pose(config, teacher)
    assert len(problem.candidates) == 12
    for candidate in problem.candidates:
        spec = problem.spec(candidate.sizes)
        mamba = next(layer.mamba for layer in spec.layers if isinstance(layer.mixer, Mamba))
        inner, kinds = mamba.mamba_num_heads * 64, spec.kinds
        states = kinds["mamba"] * (inner * 128 * 4 + (inner + 2 * 8 * 128) * 4 * 2)
        cache = kinds["attention"] * 4096 * 2 * 8 * 128 * 2
        assert problem.measured["params"](candidate.sizes) == parameter_count(spec) <= 4_500_000_000
        assert problem.measured["memory"](candidate.sizes) == 2 * parameter_count(spec) + 16 * (states + cache)
        assert problem.measured["memory"](candidate.sizes) <= 11_000_000_000
        assert mamba.mamba_num_heads % 8 == 0, "a group of heads on each tensor-parallel rank"
    assert len({tuple(problem.spec(each.sizes).kinds.values()) for each in problem.candidates}) > 3
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(dry_run_search.tables(config, teacher, ranks=256))
    shown = console.export_text()
    for words in ("Mamba layers", "attention layers", "MLP layers", "Mamba heads", "memory", "11 GB"):
        assert words in shown
    assert dict(named_sizes(teacher))["Mamba layers"] == 24


def test_a_published_hybrid_with_experts_within_budgets_of_active_parameters() -> None:
    """Nemotron 3 Nano within 24B parameters and 3.0B active ones, as Model Optimizer asked; all count exactly."""
    names = ("hidden_size", "num_experts", "shared_ffn_hidden_size")
    budgets = ["target.params=24B", "target.active_params=3.01B", "search.candidates=12"]
    steps = {"shared_ffn_hidden_size": "{min: 2816, step: 256}", "num_experts": "{min: 64, step: 8}"}
    space = [f"search.space.{key}={value}" for key, value in (steps | {"num_moe_layers": "{min: 20}"}).items()]
    path = recipes.find("nemotron3_nano_30b_a3b_to_22b_width_32gpu_h100")
    config = load_recipe(path, [*(f"target.{name}=null" for name in names), *budgets, *space])
    teacher = read_architecture(path.parent / config.model.architecture)
    problem = pose(config, teacher)
    assert [axis.key for axis in problem.space.axes] == [
        *("num_mamba_layers", "num_attention_layers", "num_moe_layers", "hidden_size", "expert_ffn_hidden_size"),
        *("num_attention_heads", "num_query_groups", "num_experts", "shared_ffn_hidden_size", "mamba_num_heads"),
        *("mamba_head_dim", "mamba_num_groups"),
    ]
    assert len(problem.candidates) == 12
    for candidate in problem.candidates:
        spec = problem.spec(candidate.sizes)
        assert problem.measured["params"](candidate.sizes) == parameter_count(spec) <= 24e9
        assert problem.measured["active_params"](candidate.sizes) == parameter_count(spec, active=True) <= 3.01e9
        experts = next(layer.moe for layer in spec.layers if layer.has_experts)
        assert experts.num_experts % 8 == 0, "expert-parallel ranks have equally many"
    assert len({problem.spec(each.sizes).kinds["moe"] for each in problem.candidates}) > 1
    published_student = sizes_of(spec_of("Nemotron 3 Nano 22B"))
    assert all(size in values for size, values in zip(published_student, problem.space.values, strict=True))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(dry_run_search.tables(config, teacher, ranks=32))
    shown = console.export_text()
    for words in ("MoE layers", "experts", "shared expert FFN size", "active_params", "3.01 B"):
        assert words in shown


# -- plans by kind ----------------------------------------------------------------------------------------------------


def test_a_plan_keeps_so_many_layers_of_each_kind() -> None:
    """Those of a kind that are worth most, whatever layers of other kinds are worth; kinds without a word stay."""
    scores = Scores(HYBRID, sums(HYBRID)[0])
    influence = scores.block_influence().tolist()
    target = TargetConfig(num_mamba_layers=2, num_attention_layers=1, mamba_num_heads=4)
    kept = [layer.source for layer in build_plan(scores, target, HYBRID).layers]
    places = {kind: [place for place, layer in enumerate(HYBRID.layers) if layer.kind == kind] for kind in HYBRID.kinds}
    best = [
        *sorted(places["mamba"], key=lambda layer: -influence[layer])[:2],
        max(places["attention"], key=lambda layer: influence[layer]),
    ]
    assert kept == sorted([*best, *places["mlp"]])
    student = build_plan(scores, target, HYBRID).student
    assert student.kinds == {"mamba": 2, "attention": 1, "mlp": 4}
    assert student_spec(target, HYBRID).kinds == student.kinds
    drawn = random_plan(target, HYBRID, seed=3)
    assert drawn.student.kinds == student.kinds
    assert drawn.student.layers != student.layers or [layer.source for layer in drawn.layers] != kept


def test_a_candidate_becomes_the_student_that_was_counted() -> None:
    scores = Scores(HYBRID, sums(HYBRID)[0])
    sizes = (3, 1, 2, 48, 64, 8, 4, 4, 6, 2)
    axes = axes_of(HYBRID)
    student = build_plan(scores, TargetConfig(**named(axes, sizes)), HYBRID).student
    assert sizes_of(student) == sizes
    measured = measures(HYBRID, DeploymentConfig(), ["params"])["params"](sizes)
    assert measured == parameter_count(student) == parameter_count(resized(HYBRID, sizes))
    assert short_name(axes, sizes) == "LM3-LA1-LF2-H48-F64-A8-G4-M4-C6-B2"


def test_numbers_of_kinds_that_cannot_be() -> None:
    for settings, told in (
        ({"num_mamba_layers": 5}, "num_mamba_layers = 5, the teacher has 4 such layers"),
        ({"num_expert_layers": 1}, "num_expert_layers = 1, the teacher has 0 such layers"),
        ({"num_mamba_layers": 3, "num_layers": 7}, "num_mamba_layers and num_layers: give one of them"),
        ({"num_mamba_layers": 3, "drop_layers": [0]}, "num_mamba_layers and drop_layers: give one of them"),
        ({"num_mlp_layers": 3, "depth_contiguous": True}, "layers of one kind do not follow one another"),
    ):
        with pytest.raises(PlanError) as caught:
            student_spec(TargetConfig(**settings), HYBRID)
        assert told in str(caught.value)


def test_rounds_go_down_in_each_kind() -> None:
    specs = round_specs(TargetConfig(num_mamba_layers=2, num_mlp_layers=2, mamba_num_heads=4), HYBRID, 2)
    assert [spec.kinds for spec in specs] == [
        {"mamba": 3, "attention": 2, "mlp": 3},
        {"mamba": 2, "attention": 2, "mlp": 2},
    ]


# -- experts beside dense layers --------------------------------------------------------------------------------------


def test_experts_beside_dense_layers_count_exactly() -> None:
    """Total and active parameters of every size, against the weight table of the model itself."""
    dense = transformer_layer(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=40)
    experts = Moe(num_experts=6, expert_ffn_hidden_size=24, top_k=2, shared_ffn_hidden_size=32)
    expert = replace(dense, feed_forward=experts)
    teacher = ModelSpec(
        vocab_size=64, hidden_size=48, head_dim=8, layers=(dense, *(expert,) * 3), max_position_embeddings=64
    )
    assert [axis.key for axis in axes_of(teacher)] == [
        *("num_dense_layers", "num_expert_layers", "hidden_size", "ffn_hidden_size", "expert_ffn_hidden_size"),
        *("num_attention_heads", "num_query_groups", "num_experts", "shared_ffn_hidden_size"),
    ]
    found = measures(teacher, DeploymentConfig(sequence_length=10), ["params", "active_params", "kv_cache"])
    for sizes in ((1, 3, 48, 40, 24, 4, 2, 6, 32), (1, 2, 32, 8, 16, 2, 1, 3, 8), (1, 1, 8, 40, 1, 4, 2, 2, 1)):
        spec = resized(teacher, sizes)
        assert sizes_of(spec) == sizes
        assert found["params"](sizes) == parameter_count(spec)
        assert found["active_params"](sizes) == parameter_count(spec, active=True)
        assert found["kv_cache"](sizes) == (sizes[0] + sizes[1]) * 10 * 2 * sizes[6] * 8 * 2
