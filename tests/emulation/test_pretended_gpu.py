"""The project on a GPU that is pretended: the same numbers as on a CPU, and no tensor of the CPU among the GPU's."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from tests.emulation import jobs
from tests.parallel.hooks_jobs import ScoreCase
from tests.parallel.megatron_jobs import STEPS, Case
from tests.parallel.overlap_jobs import Run
from tests.ranks import RankError, run_on_ranks
from tests.tolerances import TOL

CASES = {
    "fp32": Case("tied"),
    "bf16": Case("nemotron", precision=Precision.BF16),
    "distributed optimizer": Case("untied", distributed=True),
    "windows and zero-centred norms": Case("gemma3", micro_batch_size=2),
    "experts": Case("experts", micro_batch_size=4),
    "Mamba": Case("nemotron_h", micro_batch_size=4),
}


def on_gpu(job, *args):
    return run_on_ranks(1, jobs.on_pretended_gpu, job, *args)[0]


def test_training_gives_the_cpu_s_losses():
    on_cpu = run_on_ranks(1, jobs.train_all, list(CASES.values()))[0]
    for name, expected, found in zip(CASES, on_cpu, on_gpu("train_all", list(CASES.values())), strict=True):
        close = {"rtol": 1e-2, "atol": 1e-2} if name == "bf16" else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(
            found["losses"], expected["losses"], **close, msg=lambda text, n=name: f"{n}: {text}"
        )
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=2e-2 if name == "bf16" else 1e-4, atol=1e-6)


@pytest.mark.parametrize("distributed", [False, True])
def test_resuming_is_bit_identical(distributed, tmp_path):
    whole = Case("tied", distributed=distributed, save=tmp_path / "state")
    second = Case("tied", distributed=distributed, load=tmp_path / "state")
    all_steps, last_steps = on_gpu("train_all", [whole, second])
    assert last_steps["losses"] == all_steps["losses"][STEPS // 2 :]
    for name, weight in all_steps["weights"].items():
        assert torch.equal(weight, last_steps["weights"][name]), name


def test_two_gpus_send_gradients_and_weights_while_they_compute():
    """By themselves: the recipe says nothing but how large a bucket is."""
    run = Run("untied", ParallelConfig(grad_bucket_size=2000), distributed=True, steps=6, validations=(3,))
    off = {"overlap_grad_reduce": True, "overlap_param_gather": False}
    plain = replace(run, parallel=run.parallel.model_copy(update=off))
    expected = run_on_ranks(2, jobs.train_by_default, plain)
    for rank, found in zip(expected, run_on_ranks(2, jobs.on_pretended_gpu, "train_by_default", run), strict=True):
        assert found["gathering"][-1] == (1, found["buckets"] - 1)
        assert found["under way"][-1] == found["buckets"] > 2
        assert rank["gathering"][-1] == (0, 0)
        torch.testing.assert_close(found["losses"], rank["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["validated"], rank["validated"], rtol=1e-6, atol=1e-6)


def test_scores_are_the_cpu_s():
    [[expected]] = run_on_ranks(1, jobs.score_all, [ScoreCase("tied")])
    found = on_gpu("score_without_triton", ScoreCase("tied"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **TOL[torch.float32], msg=lambda t, n=name: f"{n}: {t}")


def test_the_thread_that_saves_uses_the_rank_s_device_and_copies_nothing_ahead(tmp_path):
    found = on_gpu("save_in_background", tmp_path)
    assert found["current"] == [("writes background.ckpt", "cuda:0")]
    assert found["written"] == "background.ckpt"
    assert found["again"] == found["losses"][1]


def test_the_state_of_a_projection_is_saved_from_the_cpu():
    found = on_gpu("states_of_a_projection")
    assert found == {"projection": "cuda:0", "state": ["cpu"], "count": 4, "same": True, "moments": ["cuda:0"]}


def test_a_tensor_of_the_cpu_among_the_gpu_s_is_told():
    with pytest.raises(RankError, match=r"PlacementError: aten.mul.Tensor: .* shapes \[\[2, 3\]\] are on the CPU"):
        on_gpu("mixed", "forward")
    with pytest.raises(RankError, match=r"PlacementError: aten.mul.Tensor: .* shapes \[\[2, 3\]\] are on the CPU"):
        on_gpu("mixed", "backward")
    with pytest.raises(RankError, match="can't convert a CUDA tensor to numpy"):
        on_gpu("mixed", "numpy")
    assert on_gpu("mixed", "moved") == 12.0
