"""Layers without a mixer or a feed-forward: scored, planned, pruned, run, saved, refused where nothing can say them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_minitron.arch.layer import PARTS
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import write_folder, write_nemo
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.load import check
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import ConfigError, PlanError, ScoresError, SpecError
from nemo_minitron.megatron import runtime, sharded_io
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
from nemo_minitron.megatron.hooks import ImportanceCollector
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.replace import BlockLossCollector, Replacement
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan, random_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import LOSSES, Scores
from nemo_minitron.pruning.sizes import student_spec
from nemo_minitron.pruning.table import size_table
from nemo_minitron.stages.prune import check_export
from tests import tiny
from tests.jobs import config_for
from tests.support.loaded import megatron_model

TOKENS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
KEEP = torch.rand(3, 24, generator=torch.Generator().manual_seed(2)) < 0.7
GONE = {0: ("feed_forward",), 2: ("mixer",), 3: ("mixer",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sublayers") / "hf"
    tiny.write_llama(path)
    return path


def batch() -> MicroBatch:
    return MicroBatch.of(TOKENS, TOKENS.roll(-1, 1), KEEP)


@torch.no_grad()
def logits(model: MinitronGPT) -> Tensor:
    return model(batch().tokens, batch().position_ids, None)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def silence(model: PreTrainedModel, layer: int, part: str) -> None:
    """Let a part of a layer of transformers' model add nothing to the residual stream."""
    block = model.model.layers[layer]
    (block.self_attn.o_proj if part == "mixer" else block.mlp.down_proj).weight.data.zero_()


def plan_without(source: TensorSource) -> PruningPlan:
    target = TargetConfig(
        random_seed=0,
        drop_mixers=tuple(layer for layer, parts in GONE.items() if "mixer" in parts),
        drop_feed_forwards=tuple(layer for layer, parts in GONE.items() if "feed_forward" in parts),
    )
    return random_plan(target, source.spec, seed=0)


def test_a_dropped_part_is_a_part_that_adds_nothing(folder: Path, tmp_path: Path, here: Runtime) -> None:
    source = open_hf(folder)
    student = PrunedSource(source, plan_without(source))
    assert [tuple(name for name in PARTS if getattr(layer, name) is None) for layer in student.spec.layers] == [
        GONE.get(index, ()) for index in range(4)
    ]
    model = loaded(folder)
    for layer, parts in GONE.items():
        for part in parts:
            silence(model, layer, part)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits.float()
    torch.testing.assert_close(logits(megatron_model(student, here)), expected, rtol=1e-4, atol=1e-4)
    # Through a `.nemo`, a model that loads and saves it, and back.
    write_folder(student, tmp_path / "student")
    chunks = build_chunks(student.spec, here, Precision.FP32, trainable=False)
    sharded_io.load_weights(chunks, tmp_path / "student")
    torch.testing.assert_close(logits(chunks[0]), expected, rtol=1e-4, atol=1e-4)
    sharded_io.save_weights(chunks, tmp_path / "student")
    write_nemo(open_checkpoint(tmp_path / "student"), tmp_path / "student.nemo")
    again = open_checkpoint(tmp_path / "student.nemo")
    assert again.spec == student.spec
    assert all(torch.equal(again.get(name), student.get(name)) for name in student.names())
    assert PruningPlan.of_checkpoint(tmp_path / "student.nemo").digest() == plan_without(source).digest()


@pytest.mark.parametrize("recompute", list(Recompute))
def test_gradients_flow_past_what_is_absent(recompute: Recompute, folder: Path) -> None:
    """And are those of transformers' silenced model."""
    source = open_hf(folder)
    student = PrunedSource(source, plan_without(source))
    model = loaded(folder)
    for layer, parts in GONE.items():
        for part in parts:
            silence(model, layer, part)
    model(TOKENS, use_cache=False).logits.square().sum().backward()
    here = runtime.start(ParallelConfig(recompute=recompute), seed=0)
    try:
        ours = megatron_model(student, here).requires_grad_().train()
        ours(batch().tokens, batch().position_ids, None).square().sum().backward()
        found = {weight.name: parameter.grad for weight, parameter in ours.named_weights()}
    finally:
        runtime.stop()
    expected = model.model.layers[1].mlp.down_proj.weight.grad
    torch.testing.assert_close(found["decoder.layers.1.mlp.linear_fc2.weight"].double(), expected, rtol=1e-3, atol=1e-3)
    assert all(gradient is not None for gradient in found.values())


def test_plans_with_dropped_parts_are_data_and_compose(folder: Path) -> None:
    source = open_hf(folder)
    plan = plan_without(source)
    assert plan.to_dict()["version"] == 3
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    then = random_plan(TargetConfig(random_seed=1, drop_layers=(1,), hidden_size=48), plan.student, seed=1)
    both = plan.compose(then)
    assert both.student == then.student
    assert [layer.without for layer in both.layers] == [GONE[0], GONE[2], GONE[3]]
    once = PrunedSource(PrunedSource(source, plan), then)
    assert once.plan.digest() == both.digest()
    assert PruningPlan.keep_all(source.spec).to_dict()["version"] == 1
    assert plan.table().endswith(
        "layers dropped: none\nmixer dropped of layers: 2-3\nfeed_forward dropped of layers: 0"
    )


# -- scores -----------------------------------------------------------------------------------------------------------


def scored(folder: Path, here: Runtime) -> Scores:
    source = open_hf(folder)
    model = megatron_model(source, here)
    with ImportanceCollector([model], here, source.spec, sublayers=True) as collector:
        collector.expect([KEEP])
        collect_hidden([model], [batch()], here)
    sums = collector.result()
    collector.load(sums)
    assert all(torch.equal(value, sums[name]) for name, value in collector.result().items())
    places = [(layer, part) for layer in range(4) for part in PARTS]
    losses = BlockLossCollector(
        [model], here, source.spec, [Replacement(layer=layer, without=(part,)) for layer, part in places]
    )
    losses.add(batch())
    count, (base, *values) = losses.sums()
    found = {f"layers.{layer}.lm_loss.{part}.sum": value for (layer, part), value in zip(places, values, strict=True)}
    return Scores(source.spec, sums).with_sums({**found, f"{LOSSES}.base": base, f"{LOSSES}.count": count})


@torch.no_grad()
def test_scores_of_parts_are_what_transformers_gives(folder: Path, tmp_path: Path, here: Runtime) -> None:
    """Block Influence from its states, and its loss without the part, both in float64."""
    scores = scored(folder, here)
    scores.save(tmp_path / "scores.safetensors")
    scores = Scores.load(tmp_path / "scores.safetensors")
    model = loaded(folder)
    states: dict[tuple[int, str], Tensor] = {}

    def keep_input(key: tuple[int, str]) -> Any:
        return lambda module, args: states.__setitem__(key, args[0])

    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(keep_input((index, "in")))
        block.post_attention_layernorm.register_forward_pre_hook(keep_input((index, "middle")))
    model.model.norm.register_forward_pre_hook(keep_input((4, "in")))

    def loss() -> float:
        log_p = model(TOKENS, use_cache=False).logits.log_softmax(-1)
        return float(-log_p.gather(-1, batch().labels[..., None])[..., 0][KEEP].mean())

    whole = loss()
    ends = dict(states)
    for layer in range(4):
        passed = [ends[layer, "in"], ends[layer, "middle"], ends[layer + 1, "in"]]
        for part, before, after in zip(PARTS, passed, passed[1:], strict=False):
            expected = float((1 - torch.cosine_similarity(before, after, dim=-1))[KEEP].mean())
            assert scores.sublayers(part)[layer] == pytest.approx(expected, rel=1e-4)
            kept = [p.clone() for p in model.parameters()]
            silence(model, layer, part)
            assert scores.sublayers(part, "lm_loss")[layer] == pytest.approx(loss() - whole, rel=1e-3, abs=1e-5)
            for parameter, value in zip(model.parameters(), kept, strict=True):
                parameter.copy_(value)


@pytest.mark.parametrize("metric", ["block_influence", "lm_loss"])
def test_parts_that_are_worth_least_go(metric: str, folder: Path, here: Runtime) -> None:
    scores = scored(folder, here)
    target = TargetConfig(drop_mixers=2, drop_feed_forwards=1, sublayer_metric=metric)
    plan = build_plan(scores, target, scores.spec)
    mixers = [layer.source for layer in plan.layers if "mixer" in layer.without]
    worth = scores.sublayers("mixer", metric)
    assert mixers == sorted(sorted(worth, key=worth.__getitem__)[:2])
    (feed_forward,) = [layer.source for layer in plan.layers if "feed_forward" in layer.without]
    left = {layer: value for layer, value in scores.sublayers("feed_forward", metric).items() if layer not in mixers}
    assert feed_forward == min(left, key=left.__getitem__)
    # Not measured: said, with what would measure it.
    plain = Scores(scores.spec, {k: v for k, v in scores.tensors.items() if not k.endswith((*_ends(), *_totals()))})
    with pytest.raises(ScoresError, match=r"score\.sublayers=true"):
        build_plan(plain, target, plain.spec)


def test_of_parts_that_are_worth_the_same_the_first_stays(
    folder: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor parallelism moves a score by 1e-7, which must not tell two parts apart."""
    scores = scored(folder, here)
    for worth in ({0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}, {0: 0.5, 1: 0.5 + 1e-8, 2: 0.5 - 1e-8, 3: 0.5}):
        monkeypatch.setattr(Scores, "sublayers", lambda self, part, metric, worth=worth: worth)
        plan = build_plan(scores, TargetConfig(drop_mixers=2), scores.spec)
        assert [layer.source for layer in plan.layers if "mixer" in layer.without] == [2, 3]


def _ends() -> tuple[str, ...]:
    return tuple(f"{metric}.{part}.sum" for metric in ("block_influence", "lm_loss") for part in PARTS)


def _totals() -> tuple[str, ...]:
    return f"{LOSSES}.base", f"{LOSSES}.count"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"drop_mixers": (1,), "drop_feed_forwards": (1,)}, "layer 1 has nothing else; name it in drop_layers"),
        ({"drop_layers": (2,), "drop_mixers": (2,)}, "not among the layers that stay"),
        ({"drop_mixers": (9,)}, "not among the layers that stay"),
        ({"drop_mixers": 4, "drop_feed_forwards": 1}, "drop_feed_forwards = 1, and 0 layers have both parts"),
        ({"drop_mixers": 5}, "drop_mixers = 5, and 4 layers have both parts"),
        ({"num_layers": 2, "drop_mixers": 3}, "drop_mixers = 3, and 2 layers have both parts"),
        ({"num_layers": 2, "drop_mixers": (3,)}, "drop_mixers names layers, but num_layers leaves it to scores"),
        ({"num_layers": 2, "by_layer": {3: {"ffn_hidden_size": 8}}}, "by_layer names layers, but num_layers leaves it"),
    ],
)
def test_parts_that_cannot_go(target: dict[str, Any], said: str, folder: Path) -> None:
    spec = open_hf(folder).spec
    with pytest.raises(PlanError) as error:
        random_plan(TargetConfig(random_seed=0, **target), spec, seed=0)
    assert said in str(error.value)


def test_a_number_of_one_part_leaves_named_layers_of_the_other_alone(folder: Path) -> None:
    spec = open_hf(folder).spec
    student = student_spec(TargetConfig(drop_mixers=1, drop_feed_forwards=(0,)), spec)
    assert [layer.described for layer in student.layers[:3]] == [
        "attention alone",
        "an MLP alone",
        "attention and an MLP",
    ]


def test_a_model_without_any_attention_has_a_table(folder: Path) -> None:
    spec = open_hf(folder).spec
    rows = {
        line.split("  ")[0]: line
        for line in size_table(spec, student_spec(TargetConfig(drop_mixers=4), spec)).splitlines()
    }
    assert rows["query heads"].split()[-2:] == ["0", "0.0%"]


def test_keys_of_layers_are_no_keys_of_a_plan(folder: Path) -> None:
    data = plan_without(open_hf(folder)).to_dict()
    with pytest.raises(PlanError, match="plan: unknown key"):
        PruningPlan.from_dict({**data, "without": ["mixer"]})
    layers = [{**data["layers"][0], "norm_scale": [4, 0]}, *data["layers"][1:]]
    with pytest.raises(PlanError, match="no ratio of channels of a Mamba group"):
        PruningPlan.from_dict({**data, "layers": layers})


def test_families_that_cannot_say_it_refuse_it_before_work(folder: Path, tmp_path: Path) -> None:
    source = open_hf(folder)
    student = PrunedSource(source, plan_without(source))
    words = r"LlamaForCausalLM does not compute layers of attention alone \(layer 0 first\), layers of an MLP alone"
    with pytest.raises(SpecError, match=words):
        write_hf(student, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    config = config_for(folder, folder)
    with pytest.raises(SpecError, match=words):
        check_export(config, student.spec, "llama")
    data = config.model_dump(mode="json") | {"target": {"drop_mixers": 1}}
    with pytest.raises(ConfigError, match=r"set score\.sublayers=true"):
        check(RunConfig, data, source="test")
