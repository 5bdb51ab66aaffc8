"""Experts and Mamba on Transformer Engine's layers; `test_on_engine.py` runs them in a process with the stand-in."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.weights import weight_named
from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.config.hidden import HiddenConfig
from nemo_minitron.config.parallel import ParallelConfig, Recompute
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.megatron.placement import local_shard
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.scores import Scores
from tests.emulation import jobs, mixture_jobs
from tests.emulation.mixture_jobs import COUNT, PROMPTS
from tests.jobs import config_for, distill_losses, prepare
from tests.parallel import expert_jobs, hybrid_jobs
from tests.parallel.expert_jobs import ExpertScoreCase
from tests.parallel.megatron_jobs import ALL_SPECS, EXPERT_SPECS, STEPS, Case
from tests.ranks import RankError, run_on_ranks
from tests.support.expert_models import write_experts
from tests.tiny import write_corpus, write_family, write_nemotron_h
from tests.tolerances import TOL

RECIPES = Path(__file__).parents[2] / "recipes/tiny"
ONE, EP2, TP2, CP2 = ParallelConfig(), ParallelConfig(expert=2), ParallelConfig(tensor=2), ParallelConfig(context=2)
SP2 = ParallelConfig(tensor=2, sequence_parallel=True)
SP2_EP2 = ParallelConfig(tensor=2, sequence_parallel=True, expert=2)
CP2_EP2, CP2_EP4 = ParallelConfig(context=2, expert=2), ParallelConfig(context=2, expert=4)
CP2_TP2 = ParallelConfig(context=2, tensor=2)
CP2_SP2 = ParallelConfig(context=2, tensor=2, sequence_parallel=True)
CP2_SELECTIVE = ParallelConfig(context=2, recompute=Recompute.SELECTIVE)
CP2_FULL = ParallelConfig(context=2, recompute=Recompute.FULL)
RECOMPUTED = ParallelConfig(expert=2, recompute=Recompute.SELECTIVE)
LAYOUTS = {
    "EP2": (2, Case("experts", EP2, micro_batch_size=2)),
    "EP2, copies sent": (2, Case("one each", EP2, micro_batch_size=4, distributed=True)),
    "EP2 recomputed": (2, Case("experts", RECOMPUTED, micro_batch_size=4)),
    "SP2": (2, Case("experts", SP2, micro_batch_size=4)),
    "SP2, copies sent": (2, Case("one each", SP2, micro_batch_size=4)),
    "TP2": (2, Case("experts", TP2, micro_batch_size=4)),
    "CP2": (2, Case("experts", CP2, micro_batch_size=4)),
    "CP2 EP2, copies sent": (2, Case("one each", CP2_EP2, micro_batch_size=4)),
    "hybrid SP2": (2, Case("nemotron_h", SP2, micro_batch_size=4)),
    "hybrid CP2": (2, Case("nemotron_h", CP2, micro_batch_size=4)),
    "hybrid CP2, MLPs recomputed": (2, Case("nemotron_h", CP2_SELECTIVE, micro_batch_size=4)),
    "hybrid CP2, layers recomputed": (2, Case("nemotron_h", CP2_FULL, micro_batch_size=4, distributed=True)),
    "hybrid with experts EP2": (2, Case("hybrid", EP2, micro_batch_size=2)),
    "hybrid with experts SP2": (2, Case("hybrid", SP2, micro_batch_size=4)),
    "SP2 EP2": (4, Case("experts", SP2_EP2, micro_batch_size=4)),
    "CP2 EP4": (4, Case("alike", CP2_EP4, micro_batch_size=4)),
    "hybrid CP2 TP2": (4, Case("nemotron_h", CP2_TP2, micro_batch_size=4)),
    "hybrid CP2 SP2": (4, Case("nemotron_h", CP2_SP2, micro_batch_size=4)),
    "hybrid CP2 DP2": (4, Case("nemotron_h", CP2, micro_batch_size=4, distributed=True)),
}
SPECS = ALL_SPECS | EXPERT_SPECS
ALONE = ("experts", "one each", "alike", "nemotron_h", "hybrid")


@pytest.fixture(scope="module")
def one_rank():
    """The same training of the engine's layers, and of the project's own, by model."""
    ((*found,),) = run_on_ranks(1, mixture_jobs.train_on_both, [Case(spec, micro_batch_size=4) for spec in ALONE])
    return dict(zip(ALONE, found, strict=True))


@pytest.fixture(scope="module")
def several_ranks():
    found = {}
    for size in (2, 4):
        names = [name for name, (ranks, _) in LAYOUTS.items() if ranks == size]
        results = run_on_ranks(size, jobs.train_all, [LAYOUTS[name][1] for name in names])
        found |= {name: [rank[index] for rank in results] for index, name in enumerate(names)}
    return found


def assert_same_training(found, expected):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ALONE)
def test_the_engine_s_layers_train_like_the_project_s(spec, one_rank):
    engine, local = one_rank[spec]
    assert engine["losses"][-1] < engine["losses"][0]
    assert_same_training(engine, local)
    assert engine["weights"].keys() == local["weights"].keys()
    for name, weight in local["weights"].items():
        torch.testing.assert_close(engine["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_every_layout(layout, one_rank, several_ranks):
    case = LAYOUTS[layout][1]
    alone, spec = one_rank[case.spec][0], SPECS[case.spec]
    for rank in several_ranks[layout]:
        assert_same_training(rank, alone)
        for name, mine in rank["weights"].items():
            whole, size = alone["weights"][name], case.parallel.tensor
            shard = local_shard(weight_named(spec, name), whole, spec, rank=rank["tp"], size=size)
            torch.testing.assert_close(mine, shard, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        if not case.distributed:  # which leaves every rank a part of the sum
            for name, grad in rank["router_grads"].items():
                expected = alone["router_grads"][name]
                largest = float(expected.abs().max())
                assert largest > 1e-5
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * largest)


def test_layers_are_made_of_the_engine_s_modules():
    """Of experts the grouped products; the project's own where a tensor-parallel rank has no tokens of its own."""
    one, hybrid = run_on_ranks(1, mixture_jobs.modules_of, [Case("experts"), Case("nemotron_h")])[0]
    grouped = {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "SharedExpertMLP"}
    assert grouped | {"EngineMoe", "RMSNorm", "MoEAllGatherTokenDispatcher", "TEDotProductAttention"} <= set(one)
    assert {"LocalMamba", "TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= set(hybrid)
    assert not {"LocalNorm", "LocalSelfAttention", "LocalColumnLinear"} & {*one, *hybrid}
    sent, plain = run_on_ranks(2, mixture_jobs.modules_of, [Case("one each", SP2), Case("experts", TP2)])[0]
    assert {"MoEAlltoAllTokenDispatcher", "TEGroupedMLP"} <= set(sent)
    assert {"LocalMoe", "TEDotProductAttention"} <= set(plain)
    assert "TEGroupedMLP" not in plain


def test_a_state_moves_between_layouts_and_kinds_of_layers(tmp_path, one_rank):
    """Grouped weights are stored as experts that stand alone; written at SP2, EP2 and CP2, read elsewhere."""
    written = [
        Case("experts", EP2, micro_batch_size=4, save=tmp_path / "experts"),
        Case("alike", SP2, micro_batch_size=4, save=tmp_path / "alike"),
        Case("nemotron_h", CP2, micro_batch_size=4, save=tmp_path / "nemotron_h"),
    ]
    run_on_ranks(2, jobs.train_all, written)
    names = [case.spec for case in written]
    reading = [Case(name, micro_batch_size=4, load=tmp_path / name) for name in names]
    (read,) = run_on_ranks(1, mixture_jobs.train_on_both, reading)
    layouts = (CP2_EP2, EP2, SP2)
    elsewhere = [replace(case, parallel=layout) for case, layout in zip(reading, layouts, strict=True)]
    again = run_on_ranks(2, jobs.train_all, elsewhere)
    results = [(name, found) for name, both in zip(names, read, strict=True) for found in both]
    results += [(case.spec, found) for rank in again for case, found in zip(elsewhere, rank, strict=True)]
    for name, found in results:
        alone = one_rank[name][0]
        torch.testing.assert_close(found["losses"], alone["losses"][STEPS // 2 :], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["norms"], alone["norms"][STEPS // 2 :], rtol=1e-5, atol=1e-6)


def test_documents_in_a_sample_are_kept_apart_by_mamba_too():
    ((packed, alone),) = run_on_ranks(
        1, jobs.train_all, [Case("nemotron_h", documents=kind) for kind in ("packed", "alone")]
    )
    assert_same_training(packed, alone)


def test_context_parallelism_is_refused_where_it_cannot_be():
    for case, rule in (
        (Case("nemotron_h", ParallelConfig(context=3)), "mamba_num_heads = 4 of layer 0 is not a multiple of 6"),
        (Case("nemotron_h", CP2, documents="packed"), "several documents in a sample"),
        (Case("experts", ParallelConfig(context=2, expert=3)), "one divides the other"),
    ):
        with pytest.raises(RankError, match=rule):
            run_on_ranks(case.parallel.ranks, jobs.train_all, [case])


TARGET = TargetConfig(num_experts=4, expert_ffn_hidden_size=14, num_query_groups=1, hidden_size=40)
SCORED = {
    "EP2": (2, EP2, True),
    "SP2": (2, SP2, False),
    "CP2": (2, CP2, True),
    "CP2 EP2": (2, CP2_EP2, True),
    "SP2 EP2": (4, SP2_EP2, True),
}


@pytest.fixture(scope="module")
def expert_scores(tmp_path_factory):
    """Of one rank's two kinds of layers, and of each layout's ranks."""
    folder = tmp_path_factory.mktemp("scored")
    write_experts(folder, "qwen2_moe")
    (alone,) = run_on_ranks(1, mixture_jobs.score_on_both, ExpertScoreCase(folder, ONE, micro_batch_size=2))
    found = {}
    for size in (2, 4):
        names = [name for name, (ranks, *_) in SCORED.items() if ranks == size]
        cases = [ExpertScoreCase(folder, SCORED[name][1], fold=SCORED[name][2]) for name in names]
        results = run_on_ranks(size, expert_jobs.score_experts, cases)
        found |= {name: [rank[index] for rank in results] for index, name in enumerate(names)}
    return open_hf(folder).spec, alone, found


@pytest.mark.parametrize("layout", ["one", *SCORED])
def test_scores_and_plans_of_experts_are_those_of_the_project_s_layers(layout, expert_scores):
    spec, (engine, local), layouts = expert_scores
    plan = build_plan(Scores(spec, local), TARGET, spec)
    for found in [engine] if layout == "one" else layouts[layout]:
        assert list(found) == list(local)
        for name, expected in local.items():
            torch.testing.assert_close(
                found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert build_plan(Scores(spec, found), TARGET, spec).digest() == plan.digest()


def test_scores_and_depth_of_a_hybrid_are_those_of_the_project_s_layers(tmp_path):
    write_nemotron_h(tmp_path)
    ((engine, local),) = run_on_ranks(1, mixture_jobs.measure_on_both, tmp_path)
    split = run_on_ranks(2, hybrid_jobs.measure_all, [tmp_path], [SP2, CP2])
    for found in (engine, *(found for rank in split for (found,) in rank)):
        for kind in ("scores", "depth"):
            mine, expected = getattr(found, kind), getattr(local, kind)
            assert set(mine) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(mine[name], value, **TOL[torch.float32], msg=lambda t, n=name: f"{n}: {t}")


def test_texts_with_a_cache_are_those_without(tmp_path):
    write_family(tmp_path / "qwen3", "qwen3")  # norms of heads
    write_nemotron_h(tmp_path / "hybrid")  # no positions
    write_experts(tmp_path / "experts", "qwen2_moe")
    folders = [tmp_path / name for name in ("qwen3", "hybrid", "experts")]
    (alone,) = run_on_ranks(1, mixture_jobs.generate_with_and_without_cache, folders, ONE)
    assert [found["kind"] for found in alone] == ["EngineSelfAttention", "LocalMamba", "EngineSelfAttention"]
    longest = len(PROMPTS[0])
    for found in alone:
        assert found["texts"] == found["plain"]
        assert found["read"] == [longest] + [1] * (COUNT - 1), "each further token costs one position"
        assert found["left"] is None
    for rank in run_on_ranks(2, mixture_jobs.generate_with_and_without_cache, folders[1:], TP2):
        assert [found["texts"] for found in rank] == [found["texts"] for found in alone[1:]]
    for which, layout in ((0, SP2), (1, CP2)):
        for (found,) in run_on_ranks(2, mixture_jobs.generate_with_and_without_cache, [folders[which]], layout):
            assert found["texts"] == alone[which]["texts"]
            assert found["read"][-1] > 1, "one token cannot be split: no cache"


@pytest.mark.parametrize("recipe", ["experts_cpu", "hybrid_cpu"])
def test_a_tiny_recipe_distils_as_on_the_project_s_layers(recipe, tmp_path):
    """With positions split, from import to distillation, where the routers' divergence is part of the experts' loss.

    A hybrid's student is evaluated, too.
    """
    given = [f"model.source={tmp_path / 'hf'}", f"data.sources=[{tmp_path / 'corpus'}]"]
    given += ["distill.tokens=2560", "score.samples=8"]
    if recipe == "experts_cpu":
        write_experts(tmp_path / "hf", "qwen2_moe", trained_steps=60)
        given.append("distill.router_weight=0.2")
        last, layout = "distill", ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    else:
        write_nemotron_h(tmp_path / "hf", trained_steps=60)
        last, layout = "evaluate", ["parallel.context=2"]
    write_corpus(tmp_path / "corpus")
    path = RECIPES / f"{recipe}.yaml"
    (own,) = run_on_ranks(1, mixture_jobs.run_on_own_layers, path, given, tmp_path / "own", last)
    split = run_on_ranks(2, jobs.run_recipe, path, [*given, *layout], tmp_path / "split", last)
    assert len(own["kl"]) == 2, "validated before the first step and after the last"
    assert own["kl"][1] < own["kl"][0]
    assert len(own["perplexity"]) == (3 if last == "evaluate" else 0)
    for found in split:
        assert found["layers"] != own["layers"]
        assert found["kl"] == pytest.approx(own["kl"], rel=1e-3)
        assert found["perplexity"] == pytest.approx(own["perplexity"], rel=1e-4)


def test_twenty_steps_of_a_hybrid_with_positions_split_are_those_of_one_rank(tmp_path):
    """By logits and intermediate states; the student has half of the teacher's Mamba heads, and narrower ones."""
    write_nemotron_h(tmp_path / "hf", trained_steps=60)
    write_corpus(tmp_path / "corpus")
    target = {"mamba_num_heads": 4, "mamba_head_dim": 6, "hidden_size": 48, "ffn_hidden_size": 64, "num_layers": 7}
    run_on_ranks(1, prepare, tmp_path, {"target": target})
    losses = {}
    for ranks in (1, 2):
        config = config_for(tmp_path / "hf", tmp_path / "corpus", parallel=ParallelConfig(context=ranks))
        hidden = HiddenConfig(layers=((0, 0), (4, 3)))
        config = config.model_copy(update={"distill": config.distill.model_copy(update={"hidden": hidden})})
        folders = (tmp_path / name for name in ("student", "teacher", "data"))
        losses[ranks] = run_on_ranks(ranks, distill_losses, *folders, config)
    (expected,) = losses[1]
    assert len(expected) == 20
    assert expected[-1] < 0.9 * expected[0], "the student learns"
    for found in losses[2]:
        assert found == pytest.approx(expected, rel=1e-5)
