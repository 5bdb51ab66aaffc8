"""Losses on intermediate states: against transformers at one rank, and the same at every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_minitron.checkpoints.convert import convert
from nemo_minitron.config.hidden import HiddenBalance, HiddenConfig
from nemo_minitron.config.objective import HiddenLossKind
from nemo_minitron.config.parallel import ParallelConfig, Recompute
from tests import jobs
from tests.parallel import hidden_jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

STEPS = 6
PAIRS = ((1, 1), (2, 0), (-3, 1), (4, 3))
"""Layers of five and of four. Outputs are compared after the norm that follows, so with two stages the teacher's state
of the first pair goes from the first stage to the second, that of the next from the second to the first, and stays once
more on the second. The last are the final norms."""
STATES = ((0, 0), (2, 2), (3, 1), (3, 2), (5, 4))
"""The same, with the embeddings, as states."""
SIZES = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hidden")
    write_llama(folder / "hf", trained_steps=100, num_hidden_layers=5)
    write_corpus(folder / "corpus")
    run_on_ranks(1, jobs.prepare, folder, {"target": SIZES})
    convert(folder / "student", folder / "student_hf", to="hf")
    return {"student": folder / "student", "teacher": folder / "teacher", "data": folder / "data", "root": folder}


def config_for(places, parallel=None, *, micro_batch_size=2, **hidden):
    layout = parallel or ParallelConfig()
    config = jobs.config_for(places["root"] / "hf", places["root"] / "corpus", parallel=layout)
    batch = config.distill.batch.model_copy(update={"micro_batch_size": micro_batch_size})
    changes = {
        "tokens": STEPS * 8 * 64,
        "batch": batch,
        "hidden": HiddenConfig(**({"layers": PAIRS, "embedding": True} | hidden)),
    }
    return config.model_copy(update={"distill": config.distill.model_copy(update=changes)})


def run(world_size, job, places, config):
    return run_on_ranks(world_size, job, places["student"], places["teacher"], places["data"], config)


@pytest.mark.parametrize("kind", HiddenLossKind)
def test_value_and_gradients_are_those_of_transformers(places, kind):
    config = config_for(places, kind=kind)
    [found] = run(1, hidden_jobs.first_step, places, config)
    teacher = LlamaForCausalLM.from_pretrained(places["root"] / "hf").double()
    student = LlamaForCausalLM.from_pretrained(places["root"] / "student_hf").double()
    projection = found["projection"].double().requires_grad_()

    def states(model):
        out = model(found["tokens"], output_hidden_states=True)
        before = zip(model.model.layers, out.hidden_states, strict=False)
        return [*(layer.input_layernorm(x) for layer, x in before), out.hidden_states[-1]], out.logits

    with torch.no_grad():
        theirs, target = states(teacher)
    own, logits = states(student)
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    keep = found["keep"]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[keep].sum()
    hidden = torch.zeros((), dtype=torch.float64)
    for a, b in STATES:
        t, s = theirs[a][keep], own[b][keep] @ projection.T
        if kind is HiddenLossKind.COSINE:
            hidden = hidden + (1 - (t * s).sum(-1) / (t.norm(dim=-1) * s.norm(dim=-1))).sum()
        else:
            hidden = hidden + ((t - s) ** 2).mean(-1).sum()
    loss = kl + hidden * (kl / hidden).detach()
    (loss / keep.sum()).backward()

    report = found["report"]
    assert report["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert report["hidden"] == pytest.approx(hidden.item(), rel=1e-5)
    assert report["loss"] == pytest.approx(2 * kl.item(), rel=1e-5), "balanced: as large as the divergence"

    gradients = {"embedding.word_embeddings.weight": student.model.embed_tokens.weight.grad}
    for index, layer in enumerate(student.model.layers):
        prefix = f"decoder.layers.{index}."
        gradients[prefix + "self_attention.linear_qkv.layer_norm_weight"] = layer.input_layernorm.weight.grad
        gradients[prefix + "mlp.linear_fc2.weight"] = layer.mlp.down_proj.weight.grad
        gradients[prefix + "self_attention.linear_proj.weight"] = layer.self_attn.o_proj.weight.grad
    for name, expected in gradients.items():
        _assert_close(found["gradients"][name], expected, name)
    _assert_close(found["projection_gradient"] / report["tokens"], projection.grad, "projection")


def test_parts_of_the_projection_gradient_add_up_over_stages(places):
    """Tensor-parallel ranks hold the same part each; pairs of layers lie on both stages."""
    [whole] = run(1, hidden_jobs.first_step, places, config_for(places))
    parts = run(4, hidden_jobs.first_step, places, config_for(places, ParallelConfig(tensor=2, pipeline=2)))
    for tp_rank in range(2):
        own = [part["projection_gradient"] for part in parts if part["tp_rank"] == tp_rank]
        assert all(part.norm() > 0.01 * whole["projection_gradient"].norm() for part in own), "pairs on both stages"
        _assert_close(sum(own), whole["projection_gradient"], "projection")


def _assert_close(found, expected, name):
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 1e-5, f"{name}: {error:.1e}"


LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "dp2": (2, {}),
    "pp2": (2, {"pipeline": 2}),
    "vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2_recompute": (2, {"pipeline": 2, "recompute": Recompute.FULL}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def one_rank(places):
    configs = [config_for(places, balance=balance) for balance in HiddenBalance]
    return run(1, hidden_jobs.curves, places, configs)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_one_rank_at_every_layout(places, one_rank, layout):
    world_size, parallel = LAYOUTS[layout]
    configs = [config_for(places, ParallelConfig(**parallel), balance=balance) for balance in HiddenBalance]
    for found in run(world_size, hidden_jobs.curves, places, configs):
        for expected, rows in zip(one_rank, found, strict=True):
            for name, values in expected.items():
                np.testing.assert_allclose(rows[name], values, rtol=1e-5, err_msg=name)


def test_micro_batches_and_recomputation_change_nothing(places, one_rank):
    full = ParallelConfig(recompute=Recompute.FULL)
    configs = [
        *(config_for(places, micro_batch_size=size) for size in (1, 4)),
        config_for(places, full),
    ]
    for found in run(1, hidden_jobs.curves, places, configs)[0]:
        np.testing.assert_allclose(found["loss"], one_rank[0]["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["hidden"], one_rank[0]["hidden"], rtol=1e-5)


def test_balances(one_rank):
    previous, same, none = ({name: np.array(values) for name, values in rows.items()} for rows in one_rank)
    np.testing.assert_allclose(same["loss"], 2 * same["kl"], rtol=1e-5)
    factor = np.r_[previous["kl"][0] / previous["hidden"][0], (previous["kl"] / previous["hidden"])[:-1]]
    np.testing.assert_allclose(previous["loss"], previous["kl"] + factor * previous["hidden"], rtol=1e-5)
    np.testing.assert_allclose(none["loss"], none["kl"] + none["hidden"], rtol=1e-5)
    assert all(rows["hidden"][-1] < 0.9 * rows["hidden"][0] for rows in (previous, same, none)), "states come closer"


def test_all_stages_connect_before_some_of_them_exchange_states():
    """Else those that do would wait for the others for ever, on NCCL and where nothing else connects them."""
    first, middle, last = run_on_ranks(3, hidden_jobs.uses_of_the_pipeline_group)
    assert all(rank["routers"] == ["all"] for rank in (first, middle, last))
    assert (first["states"], middle["states"], last["states"]) == (["all", "some"], ["all"], ["all", "some"])
    assert (first["arrived"], middle["arrived"], last["arrived"]) == ({}, {}, {1: True})
