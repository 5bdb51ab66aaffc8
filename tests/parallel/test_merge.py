"""Sums for merging dropped layers: those of transformers' activations, the same at every layout; and the complete
job."""

from functools import cache

import pytest
import torch

from nemo_minitron.arch.axes import Axis
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import stream
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.pruning.merge import Gap, MergeSums
from nemo_minitron.pruning.plan import PruningPlan
from tests import chain_jobs
from tests.parallel.merge_jobs import MergeCase, sums_all, sums_of_folder
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama
from tests.tolerances import TOL

ONE_LAYER, LAST, TWO = Gap(0, 2), Gap(2, 4), (Gap(0, 2), Gap(2, 4))
TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
LAYOUTS = {
    "micro-batches of 2": (1, MergeCase("tied", TWO, micro_batch_size=2)),
    "TP2": (2, MergeCase("tied", TWO, TP2, micro_batch_size=2)),
    "PP2, a gap over both stages": (2, MergeCase("tied", (Gap(0, 3),), PP2)),
    "PP2, uneven layers": (2, MergeCase("uneven", (Gap(0, 2),), PP2)),
    "PP2 VPP2": (2, MergeCase("tied", TWO, ParallelConfig(pipeline=2, virtual_pipeline=2), micro_batch_size=2)),
    "DP2": (2, MergeCase("tied", TWO)),
    "TP2 PP2": (4, MergeCase("tied", (Gap(0, 3),), ParallelConfig(tensor=2, pipeline=2), micro_batch_size=2)),
}


@cache
def runs(world):
    """Every case of a world size in one start of the ranks; 0 stands for one rank and micro-batches of one."""
    cases = [case for size, case in LAYOUTS.values() if size == world]
    if world == 0:
        cases = [MergeCase(case.spec, case.gaps) for _, case in LAYOUTS.values()]
        cases = list(dict.fromkeys(cases))
        (results,) = run_on_ranks(1, sums_all, cases)
        return {(case.spec, case.gaps): [result] for case, result in zip(cases, results, strict=True)}
    results = run_on_ranks(world, sums_all, cases)
    return {case: [rank[index] for rank in results] for index, case in enumerate(cases)}


def assert_close_sums(found, expected, name):
    """Sums of products of both signs: close as measured by the largest."""
    scale = expected.abs().max()
    torch.testing.assert_close(
        found / scale, expected / scale, **TOL[torch.float32], msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_the_same_at_every_layout_and_on_every_rank(layout):
    world, case = LAYOUTS[layout]
    (alone,) = runs(0)[case.spec, case.gaps]
    assert set(alone) == {f"layers.{gap.layer}.{part}" for gap in case.gaps for part in ("moment", "cross")}
    for rank in runs(world)[case]:
        for name, expected in alone.items():
            assert rank[name].dtype == torch.float64
            assert_close_sums(rank[name], expected, name)
            assert torch.equal(rank[name], runs(world)[case][0][name]), "ranks disagree"


def test_sums_are_those_of_transformers_activations(tmp_path):
    model = write_llama(tmp_path / "hf").double()
    generator = torch.Generator().manual_seed(5)
    samples = torch.randint(0, 256, (3, 24), generator=generator)
    keep = torch.rand(3, 24, generator=generator) < 0.7
    (found,) = run_on_ranks(1, sums_of_folder, tmp_path / "hf", samples, keep, [Gap(0, 3)])
    inputs = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(samples, use_cache=False)
    a, added = inputs[0][keep], (outputs[2] - outputs[0])[keep]
    assert_close_sums(found["layers.0.moment"], a.T @ a, "moment")
    assert_close_sums(found["layers.0.cross"], a.T @ added, "cross")


def pruned_at(folder, name, target, parallel):
    chain_jobs.run_to(folder / name, folder, "prune", target=target, parallel=parallel)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Run folders up to stage prune: plain, merged, and merged with a ridge that allows no change."""
    folder = tmp_path_factory.mktemp("merge")
    write_llama(folder / "hf", trained_steps=20)
    write_corpus(folder / "corpus", documents=30)
    target = {"num_layers": None, "drop_layers": [1, 2]}
    for name, changes in {
        "plain": {},
        "merged": {"merge_layers": True},
        "stiff": {"merge_layers": True, "merge_ridge": 1e15},
    }.items():
        run_on_ranks(1, pruned_at, folder, name, target | changes, {})
    run_on_ranks(2, pruned_at, folder, "two", target | {"merge_layers": True}, {"tensor": 2})
    return folder


def weights_of(folder):
    return {name: tensor.clone() for name, tensor in stream(open_checkpoint(folder / "stages/prune/student"))}


def test_the_matrix_before_the_gap_changes_and_nothing_else_does(pruned):
    plain, merged, stiff = (weights_of(pruned / name) for name in ("plain", "merged", "stiff"))
    assert plain.keys() == merged.keys()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {"decoder.layers.0.mlp.linear_fc2.weight"}
    assert all(torch.equal(plain[name], stiff[name]) for name in plain)
    plan = PruningPlan.load(pruned / "merged/stages/prune/plan.json")
    assert plan.digest() == PruningPlan.load(pruned / "plain/stages/prune/plan.json").digest()
    sums = MergeSums.load(pruned / "merged/stages/score/merge.safetensors")
    sums.check_fits(plan)
    kept = torch.tensor(plan.layers[0].kept[Axis.FFN])
    teacher = open_checkpoint(pruned / "merged/stages/import/teacher").get("decoder.layers.0.mlp.linear_fc2.weight")
    moment, cross = sums.tensors["layers.0.moment"], sums.tensors["layers.0.cross"]
    # A reference written another way: normal equations of the new matrix itself, with the penalty as a diagonal.
    power = moment.diagonal()[kept]
    left = moment[kept][:, kept] + 0.3 * torch.diag(power)
    right = cross[kept] + moment[kept] @ teacher.double().T + 0.3 * power[:, None] * teacher.double().T[kept]
    expected = torch.linalg.solve(left, right).T[torch.tensor(plan.hidden)]
    torch.testing.assert_close(merged["decoder.layers.0.mlp.linear_fc2.weight"].double(), expected, rtol=0, atol=1e-5)
    assert open_checkpoint(pruned / "merged/stages/prune/student").lineage["pruned"][-1]["merged"]["gaps"] == [[0, 3]]


def test_two_tensor_parallel_ranks_come_to_the_same_student(pruned):
    one, two = weights_of(pruned / "merged"), weights_of(pruned / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
