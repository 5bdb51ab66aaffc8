"""Hybrids at every layout: scores and depth as transformers has them, the same training, states that move."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.arch.axes import Axis
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sites import ExpertMetric
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.ops.importance import SiteSums, aggregate
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.depth import DepthScores
from nemo_minitron.pruning.scores import Scores
from tests import jobs
from tests.oracles import importance as oracle
from tests.oracles.experts import statistics
from tests.parallel.hybrid_jobs import Measured, measure_all, text, train_all
from tests.parallel.megatron_jobs import STEPS, Case
from tests.ranks import run_on_ranks
from tests.tiny import NEMOTRON_3_PATTERN, NEMOTRON_H_PATTERN, write_bamba, write_corpus, write_nemotron_h
from tests.tolerances import TOL

ONE, TP2, PP2 = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
LAYOUTS = {"TP2": TP2, "PP2": PP2, "DP2": ONE}
EP2 = ParallelConfig(expert=2)
WITH_EXPERTS = LAYOUTS | {"EP2": EP2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    write_nemotron_h(path / "hf")
    return path / "hf"


@pytest.fixture(scope="module")
def bamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two pipeline stages the first has attention alone, and the second Mamba."""
    path = tmp_path_factory.mktemp("bamba")
    write_bamba(path / "hf", attn_layer_indices=[0, 1, 2])
    return path / "hf"


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid_experts")
    write_nemotron_h(path / "hf", pattern=NEMOTRON_3_PATTERN)
    return path / "hf"


@pytest.fixture(scope="module")
def each_alone(folder: Path, bamba: Path, with_experts: Path) -> list[Measured]:
    ((found,),) = run_on_ranks(1, measure_all, [folder, bamba, with_experts], [ONE])
    return found


@pytest.fixture(scope="module")
def alone(each_alone: list[Measured]) -> Measured:
    return each_alone[0]


@pytest.fixture(scope="module")
def together(folder: Path, bamba: Path) -> dict[str, list[list[Measured]]]:
    """What each rank of a layout measures of each folder."""
    ranks = run_on_ranks(2, measure_all, [folder, bamba], list(LAYOUTS.values()))
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(LAYOUTS)}


@pytest.fixture(scope="module")
def experts_together(with_experts: Path) -> dict[str, list[Measured]]:
    """What each rank of a layout measures of the hybrid with experts."""
    ranks = run_on_ranks(2, measure_all, [with_experts], list(WITH_EXPERTS.values()))
    return {name: [rank[index][0] for rank in ranks] for index, name in enumerate(WITH_EXPERTS)}


def read_spec(folder: Path):
    from nemo_minitron.checkpoints.open import open_checkpoint

    return open_checkpoint(folder).spec


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_depth_are_the_same_at_every_layout(
    layout: str,
    each_alone: list[Measured],
    together: dict[str, list[list[Measured]]],
    folder: Path,
    bamba: Path,
) -> None:
    for which, path in enumerate((folder, bamba)):
        spec, alone = read_spec(path), each_alone[which]
        target = jobs.config_for(path, path, target={"mamba_num_heads": 4, "mamba_head_dim": 5}).target
        plans = set()
        for rank in (alone, *(ranks[which] for ranks in together[layout])):
            same_measures(rank, alone)
            plans.add(build_plan(Scores(spec, rank.scores), target, spec).digest())
        assert len(plans) == 1


def same_measures(rank: Measured, alone: Measured) -> None:
    for found, expected in ((rank.scores, alone.scores), (rank.depth, alone.depth)):
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOL[torch.float32], msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("layout", WITH_EXPERTS)
def test_scores_of_experts_and_depth_are_the_same_at_every_layout(
    layout: str, each_alone: list[Measured], experts_together: dict[str, list[Measured]], with_experts: Path
) -> None:
    spec, alone = read_spec(with_experts), each_alone[2]
    sizes = {"mamba_num_heads": 4, "num_experts": 4, "expert_ffn_hidden_size": 10, "shared_ffn_hidden_size": 30}
    counts = {"num_moe_layers": 2, "depth_metric": "logit_mse", "hidden_size": 40}
    target = TargetConfig(**sizes | counts)
    plans = set()
    for rank in (alone, *experts_together[layout]):
        same_measures(rank, alone)
        scores = Scores(spec, rank.scores, depth=DepthScores.from_tensors(spec, rank.depth))
        plan = build_plan(scores, target, spec)
        assert plan.student.kinds == {"mamba": 3, "attention": 2, "mlp": 1, "moe": 2}
        plans.add(plan.digest())
    assert len(plans) == 1


@torch.no_grad()
def test_scores_of_experts_are_loops_over_tokens_on_transformers_activations(
    each_alone: list[Measured], with_experts: Path
) -> None:
    model, sums = transformers_model(with_experts), each_alone[2].scores
    scores = Scores(read_spec(with_experts), sums)
    inputs: dict[int, torch.Tensor] = {}
    shared: dict[int, torch.Tensor] = {}
    for index, (letter, block) in enumerate(zip(NEMOTRON_3_PATTERN, model.model.layers, strict=True)):
        if letter == "E":
            block.mixer.register_forward_pre_hook(lambda _, args, i=index: inputs.update({i: args[0]}))
            down = block.mixer.shared_experts.down_proj
            down.register_forward_pre_hook(lambda _, args, i=index: shared.update({i: args[0]}))
    tokens, _, mask = text()
    model(tokens, use_cache=False)
    assert sorted(inputs) == [index for index, letter in enumerate(NEMOTRON_3_PATTERN) if letter == "E"]
    for layer, states in inputs.items():
        expected = statistics(model.model.layers[layer].mixer, states, mask, model.config)
        output, routed = torch.tensor(expected.output).double(), torch.tensor(expected.routed).double()
        assert routed.max() > routed.min(), "the toy's routers choose all experts equally often"
        for metric, wanted in {
            ExpertMetric.REAP: output / routed.clamp_min(1),
            ExpertMetric.OUTPUT: output / mask.sum(),
            ExpertMetric.FREQUENCY: routed / mask.sum(),
        }.items():
            got = scores.importance(Axis.EXPERT, layer, experts=metric)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        for row in SiteSums.ROWS:
            found = sums[f"layers.{layer}.expert_ffn.{row}"]
            torch.testing.assert_close(found, expected.site(*row.split(".")), rtol=1e-5, atol=1e-6)
        for site, values in (("shared_ffn", shared[layer]), ("hidden.mlp", states)):
            means = [values[sample][mask[sample]].abs().mean(0) for sample in range(len(mask)) if mask[sample].any()]
            found = sums[f"layers.{layer}.{site}.mean.sum"]
            torch.testing.assert_close(found, torch.stack(means).sum(0), rtol=1e-5, atol=1e-5)


def transformers_model(folder: Path):
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager).eval()


@torch.no_grad()
def test_scores_are_the_papers_on_transformers_activations(alone: Measured, folder: Path) -> None:
    model = transformers_model(folder)
    found: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str], *, output: bool = False, part: slice = slice(None)):
        return lambda module, args, out: found.__setitem__(key, (out if output else args[0])[..., part])

    for index, (letter, block) in enumerate(zip(NEMOTRON_H_PATTERN, model.model.layers, strict=True)):
        norm = {"M": "hidden.mamba", "*": "hidden.attention", "-": "hidden.mlp"}[letter]
        block.norm.register_forward_hook(keep((index, norm), output=True))
        match letter:
            case "M":  # rows 0-63 are the gate's, 64-127 the input's
                block.mixer.in_proj.register_forward_hook(keep((index, "mamba"), output=True, part=slice(64, 128)))
            case "*":
                block.mixer.o_proj.register_forward_hook(keep((index, "head")))
            case "-":
                block.mixer.down_proj.register_forward_hook(keep((index, "ffn")))
    tokens, _, mask = text()
    model(tokens, use_cache=False)
    kept = [sample for sample in range(len(mask)) if mask[sample].any()]
    assert (alone.scores["samples"].item(), alone.scores["tokens"].item()) == (len(kept), mask.sum().item())
    assert {name.split(".block_influence")[0].rpartition(".")[0] for name in alone.scores if "mamba.mean" in name}
    for (layer, site), values in found.items():
        samples = [values[sample][mask[sample]].tolist() for sample in kept]
        for sequence in ("mean", "l2", "var"):
            for batch in ("mean", "l2", "var"):
                prefix = f"layers.{layer}.{site}.{sequence}"
                got = aggregate(
                    alone.scores[f"{prefix}.sum"], alone.scores[f"{prefix}.sumsq"], alone.scores["samples"], batch
                )
                expected = torch.tensor(oracle.importance(samples, batch=batch, sequence=sequence)).double()
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda t, p=prefix: f"{p}: {t}")


def test_mamba_heads_are_ranked_in_their_group_on_the_channels_that_stay(alone: Measured, folder: Path) -> None:
    """arXiv:2504.11409: channels by the norm over heads, heads by the norm over the best channels."""
    spec = read_spec(folder)
    target = jobs.config_for(folder, folder, target={"mamba_num_heads": 4, "mamba_head_dim": 3}).target
    plan = build_plan(Scores(spec, alone.scores), target, spec)
    for layer in plan.layers:
        if NEMOTRON_H_PATTERN[layer.source] != "M":
            continue
        # Means over positions, then the norm over samples: the recipe's defaults.
        pairs = alone.scores[f"layers.{layer.source}.mamba.mean.sumsq"].sqrt().view(8, 8).numpy()
        channels = sorted(np.argsort(-np.sqrt((pairs**2).sum(0)))[:3])
        heads = np.sqrt((pairs[:, channels] ** 2).sum(1))
        best = [2 * group + int(heads[2 * group + 1] > heads[2 * group]) for group in range(4)]
        assert {axis.value: list(kept) for axis, kept in layer.kept.items()} == {
            "mamba_channel": channels,
            "mamba_group": [0, 1, 2, 3],
            "mamba_head": best,
        }


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 2])
def test_layers_of_every_kind_are_ranked_by_logit_mse_as_transformers_gives_it(
    which: int, each_alone: list[Measured], folder: Path, with_experts: Path
) -> None:
    path = {0: folder, 2: with_experts}[which]
    model = transformers_model(path)
    scores = DepthScores.from_tensors(read_spec(path), each_alone[which].depth)
    tokens, labels, mask = text()
    layers = list(model.model.layers)

    def without(gone: int) -> tuple[torch.Tensor, torch.Tensor]:
        model.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(layers) if index != gone)
        logits = model(tokens, use_cache=False).logits.double()[mask]
        return logits, torch.nn.functional.cross_entropy(logits, labels[mask])

    whole, loss = without(-1)
    for layer in range(len(layers)):
        logits, found = without(layer)
        mse = ((whole - logits) ** 2).sum() / (whole**2).sum()
        assert scores.layers("logit_mse")[layer].item() == pytest.approx(mse.item(), rel=1e-5)
        assert scores.layers("lm_loss")[layer].item() == pytest.approx((found - loss).item(), abs=1e-5)


# -- training ---------------------------------------------------------------------------------------------------------


@cache
def plain() -> dict:
    ((found,),) = run_on_ranks(1, train_all, [Case("nemotron_h")])
    return found


def test_training_states_move_between_layouts(tmp_path: Path) -> None:
    """Parts of fused weights, and the optimizer's moments of them, are stored apart and put together again."""
    written = {
        "tensor": Case("nemotron_h", TP2, save=tmp_path / "tensor"),
        "data": Case("nemotron_h", distributed=True, save=tmp_path / "data"),
    }
    run_on_ranks(2, train_all, list(written.values()))
    reading = [Case("nemotron_h", PP2, load=tmp_path / "tensor"), Case("nemotron_h", TP2, load=tmp_path / "tensor")]
    results = [result for rank in run_on_ranks(2, train_all, reading) for result in rank]
    (alone,) = run_on_ranks(
        1,
        train_all,
        [Case("nemotron_h", load=tmp_path / "tensor"), Case("nemotron_h", distributed=True, load=tmp_path / "data")],
    )
    for result in (*results, *alone):
        torch.testing.assert_close(result["losses"], plain()["losses"][STEPS // 2 :], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["norms"], plain()["norms"][STEPS // 2 :], rtol=1e-5, atol=1e-6)


def test_documents_of_a_sample_do_not_see_one_another() -> None:
    """Packed in samples, or each in a sample of its own: states begin again with each document."""
    ((packed, alone),) = run_on_ranks(
        1, train_all, [Case("nemotron_h", documents="packed"), Case("nemotron_h", documents="alone")]
    )
    torch.testing.assert_close(packed["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
    assert abs(packed["losses"][0] - plain()["losses"][0]) > 1e-6


_WIDTH = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
}
_EXPERTS = {"num_experts": 4, "expert_ffn_hidden_size": 16, "shared_ffn_hidden_size": 32, "num_moe_layers": 2}
DISTILLED = {
    NEMOTRON_H_PATTERN: (_WIDTH | {"num_layers": 7}, LAYOUTS),
    NEMOTRON_3_PATTERN: (_WIDTH | _EXPERTS, WITH_EXPERTS),
}
"""By pattern of the teacher: the student, and the layouts."""


def prepared(path: Path, pattern: str) -> Path:
    """Teacher, token files and student, made by the ordinary stages on one rank."""
    write_nemotron_h(path / "hf", pattern=pattern, trained_steps=60)
    write_corpus(path / "corpus")
    run_on_ranks(1, jobs.prepare, path, {"target": DISTILLED[pattern][0]})
    return path


def distilled(path: Path, world: int, parallel: ParallelConfig) -> list[list[float]]:
    config = jobs.config_for(path / "hf", path / "corpus", parallel=parallel)
    if read_spec(path / "hf").has_experts:
        config = config.model_copy(update={"distill": config.distill.model_copy(update={"router_weight": 0.2})})
    return run_on_ranks(world, jobs.distill_losses, path / "student", path / "teacher", path / "data", config)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", DISTILLED)
def test_twenty_distillation_steps_are_those_of_one_rank(pattern: str, tmp_path: Path) -> None:
    """With experts, of routers' divergence too."""
    artefacts = prepared(tmp_path, pattern)
    (expected,) = distilled(artefacts, 1, ONE)
    assert len(expected) == 20
    assert expected[-1] < 0.9 * expected[0], "the student learns"
    for parallel in DISTILLED[pattern][1].values():
        for losses in distilled(artefacts, 2, parallel):
            np.testing.assert_allclose(losses, expected, rtol=1e-5)
