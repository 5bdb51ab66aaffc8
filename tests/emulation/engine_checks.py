"""Checks that need Transformer Engine's layers; `test_on_engine.py` runs them in a process with the stand-in."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nemo_minitron.arch.weights import weight_named
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron.placement import local_shard
from nemo_minitron.stages.session import make_trainer
from tests.emulation import jobs
from tests.jobs import config_for
from tests.parallel import documents_jobs
from tests.parallel.hooks_jobs import ScoreCase
from tests.parallel.megatron_jobs import ALL_SPECS, STEPS, Case
from tests.parallel.overlap_jobs import Run, train_gathering
from tests.ranks import RankError, run_on_ranks
from tests.tiny import write_corpus, write_llama
from tests.tolerances import TOL

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"
SP2, CP2 = ParallelConfig(tensor=2, sequence_parallel=True), ParallelConfig(context=2)
PP2 = ParallelConfig(pipeline=2)
LAYOUTS = {
    "SP2": Case("tied", SP2),
    "SP2 in micro-batches of 2": Case("tied", SP2, micro_batch_size=2),
    "CP2": Case("tied", CP2),
    "CP2 distributed optimizer": Case("tied", CP2, distributed=True),
    "PP2": Case("tied", PP2),
}


@pytest.fixture(scope="module")
def one_rank():
    """The same training of the engine's layers, and of the project's own."""
    ((engine, local),) = run_on_ranks(1, jobs.train_on_both, [Case("tied")])
    return engine, local


@pytest.fixture(scope="module")
def two_ranks():
    results = run_on_ranks(2, jobs.train_all, list(LAYOUTS.values()))
    return {name: [rank[index] for rank in results] for index, name in enumerate(LAYOUTS)}


def test_the_engine_s_layers_train_like_the_project_s(one_rank):
    engine, local = one_rank
    assert engine["losses"][-1] < engine["losses"][0]
    torch.testing.assert_close(engine["losses"], local["losses"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(engine["norms"], local["norms"], rtol=1e-5, atol=1e-6)
    assert engine["weights"].keys() == local["weights"].keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_every_layout(layout, one_rank, two_ranks):
    alone, case = one_rank[0], LAYOUTS[layout]
    spec = ALL_SPECS[case.spec]
    for rank in two_ranks[layout]:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
        for name, mine in rank["weights"].items():
            whole, size = alone["weights"][name], case.parallel.tensor
            shard = local_shard(weight_named(spec, name), whole, spec, rank=rank["tp"], size=size)
            torch.testing.assert_close(mine, shard, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_a_state_moves_between_layouts(tmp_path, one_rank):
    alone = one_rank[0]
    run_on_ranks(2, jobs.train_all, [Case("tied", SP2, save=tmp_path / "sp"), Case("tied", CP2, save=tmp_path / "cp")])
    (results,) = run_on_ranks(1, jobs.train_all, [Case("tied", load=tmp_path / name) for name in ("sp", "cp")])
    for result in results:
        torch.testing.assert_close(result["losses"], alone["losses"][STEPS // 2 :], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["norms"], alone["norms"][STEPS // 2 :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_resuming_is_bit_identical(precision, distributed, tmp_path):
    how = {"precision": precision, "distributed": distributed}
    whole, second = Case("tied", save=tmp_path / "state", **how), Case("tied", load=tmp_path / "state", **how)
    ((all_steps, last_steps),) = run_on_ranks(1, jobs.train_all, [whole, second])
    assert last_steps["losses"] == all_steps["losses"][STEPS // 2 :]
    for name, weight in all_steps["weights"].items():
        assert torch.equal(weight, last_steps["weights"][name]), name


@pytest.mark.parametrize("distributed", [False, True])
def test_a_state_can_be_saved_before_the_first_step(distributed, tmp_path):
    (found,) = run_on_ranks(1, jobs.save_before_the_first_step, tmp_path / "state", distributed)
    assert found["names"] == ["FusedAdam", "exp_avg", "exp_avg_sq"]
    assert found["again"] == found["first"]


def test_documents_in_a_sample_are_computed_as_if_they_stood_alone():
    """Packed sequences: losses, gradients and weights are those of documents that are samples of their own."""
    ((packed, alone),) = run_on_ranks(1, jobs.train_all, [Case("tied", documents=kind) for kind in ("packed", "alone")])
    split = [Case("tied", parallel, documents="packed") for parallel in (SP2, PP2)]
    ranks = run_on_ranks(2, jobs.train_all, split)
    for found in (packed, *(result for rank in ranks for result in rank)):
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(packed["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_scores_of_documents_in_a_sample_are_those_of_documents_alone():
    """Micro-batches of 4 are cut, since packed sequences come one sample at a time."""
    ((alone, packed),) = run_on_ranks(
        1, documents_jobs.sums_all, [(ParallelConfig(), kind) for kind in ("alone", "packed")]
    )
    assert alone.keys() == packed.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(packed[name], expected, **TOL[torch.float32], msg=lambda t, n=name: f"{n}: {t}")


def test_documents_are_refused_where_they_cannot_be_kept_apart():
    for case, rule in (
        (Case("tied", micro_batch_size=2, documents="packed"), "one sample at a time"),
        (Case("tied", CP2, documents="packed"), "parallel.context = 2"),
    ):
        with pytest.raises(RankError, match=rule):
            run_on_ranks(case.parallel.context, jobs.train_all, [case])


@pytest.mark.parametrize(
    ("spec", "expert"), [("tied", 1), ("untied", 1), ("experts", 1), ("experts", 2), ("nemotron_h", 1)]
)
def test_weights_gathered_during_the_forward_pass_train_the_same(spec, expert):
    """Norms are inside the linears, whose module alone waits for them, as grouped products and Mamba's linears do."""
    run = Run(spec, ParallelConfig(expert=expert), distributed=True, steps=6, validations=(2, 6))
    for ((plain, late),) in run_on_ranks(2, train_gathering, [run]):
        chains = 2 if spec == "experts" else 1
        assert late["gathering"][-1] == (chains, late["buckets"] - chains)
        assert (late["losses"], late["validated"]) == (plain["losses"], plain["validated"])
        assert all(torch.equal(late["weights"][name], weight) for name, weight in plain["weights"].items())


def test_scores_are_the_same_with_positions_split():
    alone = run_on_ranks(1, jobs.score_all, [ScoreCase("tied"), ScoreCase("untied")])[0]
    cases = [ScoreCase("tied", SP2), ScoreCase("untied", CP2, micro_batch_size=2)]
    for rank in run_on_ranks(2, jobs.score_all, cases):
        for expected, found in zip(alone, rank, strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, **TOL[torch.float32], msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("parallel", [ParallelConfig(), SP2], ids=["one", "SP2"])
def test_a_model_trains_after_it_ran_in_inference_mode(parallel):
    for found in run_on_ranks(parallel.tensor, jobs.inference_mode_then_training, parallel):
        assert found["trained"][0] == pytest.approx(found["validated"], rel=1e-6), "no step was between them"
        assert found["trained"][1] < found["trained"][0]
        assert found["samples"] == 14, "of 8 samples one is masked, and all were scored twice"


def test_a_trainer_of_ones_own_validates_outside_of_inference_mode(tmp_path):
    write_llama(tmp_path / "hf")
    (found,) = run_on_ranks(1, jobs.validate_with_a_trainer_of_ones_own, tmp_path / "hf")
    assert found == {"inference_mode": [False], "steps": 2}


def test_the_project_s_trainers_validate_outside_of_inference_mode(tmp_path):
    trainer = make_trainer(config_for(tmp_path, tmp_path))
    assert not any(loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop))


def test_the_likeliest_tokens_are_compared_in_inference_mode_too():
    ((inside, outside),) = run_on_ranks(1, jobs.top_k_loss_in_inference_mode)
    assert inside == outside > 0


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_llama(folder / "hf", trained_steps=100)
    write_corpus(folder / "corpus")
    return [f"model.source={folder / 'hf'}", f"data.sources=[{folder / 'corpus'}]"]


@pytest.fixture(scope="module")
def recipe_runs(overrides, tmp_path_factory):
    layouts = {"one": [], "SP2": ["parallel.tensor=2", "parallel.sequence_parallel=true"]}
    return {
        name: run_on_ranks(
            1 + bool(layout), jobs.run_recipe, RECIPE, [*overrides, *layout], tmp_path_factory.mktemp(name) / "run"
        )
        for name, layout in layouts.items()
    }


def test_the_tiny_recipe_runs_to_its_end(recipe_runs):
    """Import, score, prune, distil from a restored teacher, export and evaluate; every restore reads native weights."""
    (one,), two = recipe_runs["one"], recipe_runs["SP2"]
    assert one["layers"] == ["TELayerNormColumnParallelLinear"]
    assert one["perplexity"]["distilled"] < one["perplexity"]["pruned"]
    assert one["kl"][-1] < one["kl"][0]
    for rank in two:
        assert rank["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
        assert rank["kl"] == pytest.approx(one["kl"], rel=1e-3)


def test_nothing_of_a_stage_s_models_outlives_it(recipe_runs):
    """Neither models nor Megatron's wrappers and gradient buffers; with the garbage collector switched off."""
    for rank in (*recipe_runs["one"], *recipe_runs["SP2"]):
        assert rank["built"] >= 6, "score, student and teacher, three to evaluate"
        assert set(rank["alive"].values()) == {0}, rank["alive"]
        assert rank["most_at_once"] == 1, "the student, when its teacher is read"


# The stand-in itself: what the checks above do not compare with anything else.


def test_fused_accumulation_adds_to_the_gradient_buffer():
    from transformer_engine.pytorch import Linear

    linear = Linear(6, 4, init_method=torch.nn.init.normal_, bias=False, device="cpu", fuse_wgrad_accumulation=True)
    x = torch.randn(3, 2, 6, requires_grad=True)
    linear.weight.main_grad = torch.ones(4, 6)
    linear.weight.grad_added_to_main_grad = False
    linear(x).square().sum().backward()
    expected = torch.autograd.grad(functional.linear(x, linear.weight).square().sum(), [x, linear.weight])
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(linear.weight.main_grad, 1 + expected[1])
    assert linear.weight.grad_added_to_main_grad
    assert linear.weight.grad.isnan().all(), "nobody is to read it"


def test_a_grouped_linear_is_as_many_linears():
    from transformer_engine.pytorch import GroupedLinear

    grouped = GroupedLinear(3, 6, 4, init_method=torch.nn.init.normal_, device="cpu")
    torch.nn.init.normal_(grouped.bias2)
    x, rows = torch.randn(9, 6), [4, 0, 5]
    weights = [(getattr(grouped, f"weight{index}"), getattr(grouped, f"bias{index}")) for index in range(3)]
    expected = [functional.linear(part, *pair) for part, pair in zip(x.split(rows), weights, strict=True)]
    torch.testing.assert_close(grouped(x, rows), torch.cat(expected))


def test_attention_in_a_window_sees_so_many_positions_before_its_own():
    from transformer_engine.pytorch import DotProductAttention

    q, k, v = (torch.randn(5, 1, 1, 2, dtype=torch.float64) for _ in range(3))
    out = DotProductAttention(1, 2, window_size=(1, 0))(q, k, v)
    for position in range(5):
        seen = slice(max(0, position - 1), position + 1)
        weights = torch.softmax((k[seen, 0, 0] @ q[position, 0, 0]) / math.sqrt(2), 0)
        torch.testing.assert_close(out[position, 0], weights @ v[seen, 0, 0])
