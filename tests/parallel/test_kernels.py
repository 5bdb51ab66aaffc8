"""The Triton form of every fused loss against complete float64 tensors, in Triton's interpreter, alone and on two
ranks.

The reference is `tests.oracles.divergence`, which works on probabilities, and torch's cross-entropy. That the kernels
also compile for a GPU is checked by compiling them: the interpreter takes more than the compiler does.
"""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence
from tests.oracles import divergence as oracle
from tests.parallel.kernel_jobs import TOKENS, Case, every, problem, sparse
from tests.ranks import run_on_ranks
from tests.tolerances import TOL

pytest.importorskip("triton")

SOME, ALL, NONE = (0, 1, 3, 4, 6), tuple(range(TOKENS)), ()
# A block is 2048 columns: more than one of them, the last one not full; shards whose end, or all, is padding.
SMALL, PADDED, SHARD_OF_PADDING, BLOCKS = (14, 14), (13, 20), (9, 20), (4100, 4160)


def cases():
    for kind in DivergenceKind:
        for temperature in (1.0, 2.5):
            divergence = Divergence(kind=kind, temperature=temperature, beta=0.2, skew=0.3)
            yield Case(divergence, *PADDED, SOME, lm_weight=0.4, chunk=3)
            yield Case(divergence, *SMALL, ALL, statistics=False)
        yield Case(Divergence(kind=kind, temperature=1.3), *BLOCKS, SOME[:2], lm_weight=0.4)
        yield Case(Divergence(kind=kind), *SHARD_OF_PADDING, SOME, lm_weight=0.4)
        yield Case(Divergence(kind=kind, temperature=0.7), *PADDED, SOME, deviation=2.0)
        yield Case(Divergence(kind=kind), *PADDED, NONE)
        yield Case(Divergence(kind=kind, temperature=2.0), *BLOCKS, SOME[:2], lm_weight=0.4, dtype=torch.bfloat16)
    for sizes in (SMALL, PADDED, SHARD_OF_PADDING, BLOCKS):
        yield Case(None, *sizes, SOME, chunk=3)
    yield Case(None, *PADDED, NONE)
    yield from sparse_cases()


def sparse_cases():
    for kind in DivergenceKind:
        for temperature in (1.0, 2.5):
            divergence = Divergence(kind=kind, temperature=temperature, beta=0.2, skew=0.3)
            yield Case(divergence, *PADDED, SOME, lm_weight=0.4, chunk=3, entries=4)
        yield Case(Divergence(kind=kind, temperature=1.3), *BLOCKS, SOME[:2], lm_weight=0.4, entries=9)
    forward = Divergence(temperature=0.7)
    yield Case(forward, *PADDED, SOME, deviation=2.0, entries=4, sampled=True, lm_weight=0.4)
    yield Case(forward, *PADDED, SOME, entries=4, statistics=False)
    yield Case(forward, *SHARD_OF_PADDING, SOME, lm_weight=0.4, entries=3)
    yield Case(forward, *PADDED, NONE, entries=4)
    yield Case(Divergence(), *SMALL, ALL, entries=14)  # nothing is left over
    yield Case(Divergence(temperature=2.0), *BLOCKS, SOME[:2], lm_weight=0.4, entries=9, dtype=torch.bfloat16)


CASES = list(cases())


def reference(case):
    data = problem(case)
    hidden, weight = (data[f"student_{what}"].double().requires_grad_() for what in ("hidden", "weight"))
    keep, labels = data["keep"], data["labels"][data["keep"]]
    student = (hidden @ weight.t())[keep, : case.vocabulary]
    teacher = (data["teacher_hidden"].double() @ data["teacher_weight"].double().t())[keep, : case.vocabulary]
    entropy = functools.partial(torch.nn.functional.cross_entropy, target=labels, reduction="sum")
    if case.divergence is None:
        loss = entropy(student)
        found = {"loss": loss, "correct": (student.argmax(-1) == labels).sum()}
    else:
        d = case.divergence
        p, q = (torch.softmax(x / d.temperature, -1) for x in (teacher, student))
        if case.entries:
            p, q = buckets(case, p, q)
        each = oracle.tensor_divergence(d.kind, p, q, beta=d.beta, skew=d.skew)
        kd = each.sum() * d.temperature**2
        loss = 0.7 * kd + case.lm_weight * entropy(student)
        found = {"loss": loss, "kd": kd}
        if case.statistics:
            best = teacher.argmax(-1) if not case.entries else heaviest(case)
            found |= {"ce": entropy(student), "agreement": (student.argmax(-1) == best).sum()}
            found |= {} if case.entries else {"teacher_ce": entropy(teacher)}
    loss.backward()
    return {name: x.detach().double() for name, x in found.items()} | {"d_hidden": hidden.grad, "d_weight": weight.grad}


def buckets(case, p, q):
    """What the targets say of each entry and of all other tokens together, and the student's probabilities of these."""
    targets = sparse(case)
    ids, given = targets.ids[problem(case)["keep"]], targets.log_probs[problem(case)["keep"]].double().exp()
    of_student = q.gather(1, ids)
    of_student = torch.cat([of_student, 1 - of_student.sum(1, keepdim=True)], 1)
    nothing_left = case.sampled or case.entries == case.vocabulary
    rest = torch.zeros_like(given[:, :1]) if nothing_left else 1 - given.sum(1, keepdim=True)
    return torch.cat([given, rest], 1).clamp_min(0), of_student


def heaviest(case):
    targets = sparse(case)
    place = targets.log_probs.argmax(1, keepdim=True)
    return targets.ids.gather(1, place).squeeze(1)[problem(case)["keep"]]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_triton_form_equals_the_reference_in_value_and_gradient(world):
    ranks = run_on_ranks(world, every, CASES, interpret=True)
    for index, case in enumerate(CASES):
        expected = reference(case)
        d_weight = torch.cat([answer[index][0]["d_weight"] for answer in ranks])
        assert not d_weight[case.vocabulary :].any(), "columns that pad the vocabulary received a gradient"
        for answer in ranks:
            found, ran = answer[index]
            assert bool(ran) == bool(case.keep), f"{case}: {ran}"
            for name, value in (found | {"d_weight": d_weight}).items():
                compare(value.double(), expected[name], case, name)


def compare(found, expected, case, name):
    if case.dtype == torch.bfloat16 and name.startswith("d_"):
        # Logits are rounded to 8 bits, so the gradient is judged as a whole, not entry by entry.
        assert (found - expected).norm() <= 3e-2 * expected.norm(), f"{case}, {name}"
        return
    torch.testing.assert_close(found, expected, **TOL[case.dtype], msg=lambda text: f"{case}, {name}: {text}")


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_without_spilling(tmp_path):
    """In a process of its own, where Triton is not in its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.kernel_compilation"],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    # Six divergences in two or three kernels, two kernels of the cross-entropy, two of losses on few entries, and sums
    # of activations with and without a mask; and each of these for sizes of 1, of one divergence.
    assert len(rows) == 29 + 8
    assert all(row["stack_bytes"] == 0 and row["registers"] <= 128 for row in rows), rows
