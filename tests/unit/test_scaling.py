"""The page on scale says what its script says, and the script's numbers are those of arithmetic done by hand."""

import numpy as np
import pytest

from benchmarks import scaling
from nemo_minitron.cache.entries import Coding, SampleTargets
from nemo_minitron.config.cache import TargetKind
from nemo_minitron.estimate.communication import Split
from nemo_minitron.estimate.memory import GPU_BYTES


def test_the_page_holds_what_the_script_prints():
    assert scaling.tables() in scaling.PAGE.read_text(encoding="utf-8")


def test_operations_of_llama_8b():
    """Per layer 4096 x (4096 + 2 x 1024) + 4096 x 4096 + 3 x 4096 x 14336, 32 of them, and 128256 x 4096 columns."""
    job = scaling.jobs()[0]
    matrices = 32 * (4096 * 6144 + 4096**2 + 3 * 4096 * 14336) + 128256 * 4096
    attention = 32 * 4 * 4096 * 8192 / 2
    assert scaling.forward_seconds(job, 8, 8 * 8192) == pytest.approx(
        8192 * (2 * matrices + attention) / (989e12 * 0.5)
    )


def test_a_tensor_parallel_layer_talks_at_the_wire_speed():
    """70B on TP 4 alone: 80 layers gather twice and scatter twice 8192 x 8192 bf16 numbers, once for the embedding and
    once for the loss; 3/4 of each at 315 GB/s."""
    job = scaling.jobs()[1]
    spent = scaling.forward_seconds(job, 8, 2 * 8192) - 8192 * scaling.forward_flops(job.teacher, 8192) / (
        4 * 989e12 * 0.5
    )
    assert spent == pytest.approx((80 * 4 + 2) * 8192 * 8192 * 2 * 0.75 / 315e9)


def test_the_chosen_layouts_fit_and_more_gpus_are_quicker():
    for job in scaling.jobs():
        steps = [scaling.step_of(job, gpus, cached=True) for gpus in (128, 512, 1024)]
        assert all(step.memory <= 0.9 * GPU_BYTES["h100"] for step in steps)
        assert steps[0].seconds > steps[1].seconds > steps[2].seconds
        assert all(step.talk[Split.DATA].seconds > 0 for step in steps)
        assert all(step.talk[Split.TENSOR].hidden == 0 for step in steps)
        assert all(step.hidden > 0.5 * step.talk[Split.DATA].seconds for step in steps)


def test_a_cached_token_takes_a_byte_and_three_an_id():
    coding = Coding(kind=TargetKind.SAMPLED, vocab_size=128256, width=50)
    lengths = np.full(1000, 12)
    targets = SampleTargets(lengths, np.arange(12000) % 128256, np.full(12000, 4))
    assert len(coding.encode(targets)) == 1000 * (1 + 3 * 12)
    assert pytest.approx(1 + 3 * 12, rel=0.05) == scaling.CACHE_BYTES
