"""Every divergence, full, top-k and sampled, fused and dense, at every world size, in value and in every gradient.

The reference (`tests.oracles.divergence`) works on complete float64 tensors of probabilities in one process.
"""

import functools

import pytest
import torch
from torch import distributed

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd
from nemo_minitron.parallel.sparse_targets import top_k_targets
from tests.oracles import divergence as oracle
from tests.oracles.vocab import mask_padding, vocab_divergence, vocab_sparse_divergence
from tests.ranks import run_on_ranks
from tests.tolerances import TOL

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCABULARY, PADDED = 13, 6, 9, 14, 20
"""With 14 real tokens of 20 columns, the last of four tensor-parallel ranks holds nothing but padding."""
K = 4

DIVERGENCES = [
    *(Divergence(kind=kind) for kind in DivergenceKind),
    *(Divergence(kind=kind, temperature=1.7, beta=0.2, skew=0.3) for kind in DivergenceKind),
]
FULL, TOP_K, SAMPLED = "full", "top_k", "sampled"
CASES = [
    (targets, divergence, lm_weight, chunk)
    for targets in (FULL, TOP_K, SAMPLED)
    for divergence in DIVERGENCES
    for lm_weight, chunk in ((0.0, None), (0.4, 4))
    if targets != SAMPLED or divergence.kind is DivergenceKind.FORWARD_KL
]


@functools.cache
def problem(dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": normal(TOKENS, HIDDEN),
        "student_weight": normal(PADDED, HIDDEN),
        "teacher_hidden": normal(TOKENS, TEACHER_HIDDEN),
        "teacher_weight": normal(PADDED, TEACHER_HIDDEN),
        "keep": torch.rand(TOKENS, generator=generator) > 0.3,
        "labels": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
    }


def whole_targets(data, kind, divergence):
    """Targets made in one process with plain torch."""
    logits = (data["teacher_hidden"].double() @ data["teacher_weight"].double().t())[:, :VOCABULARY]
    p = torch.softmax(logits / divergence.temperature, -1)
    if kind == TOP_K:
        top = p.topk(K, 1)
        return SparseTargets(
            ids=top.indices, log_probs=top.values.log(), tail=1 - top.values.sum(1), temperature=divergence.temperature
        )
    # Entries in any order, an unused place among them, and counts that do not come from p.
    ids = torch.stack(
        [torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(n))[:K] for n in range(TOKENS)]
    )
    ids[::2, 1] = -1
    counts = torch.arange(1, K + 1).expand(TOKENS, K)
    return SparseTargets.from_counts(ids, counts, temperature=divergence.temperature)


def buckets(q, targets):
    """`[N, K + 1]` probabilities of the entries and of all other ids."""
    one_hot = torch.nn.functional.one_hot(targets.ids.clamp_min(0), VOCABULARY).double()
    one_hot = one_hot * (targets.ids >= 0).unsqueeze(-1)
    inside = torch.einsum("nkv,nv->nk", one_hot, q)
    outside = ((1 - one_hot.sum(1)) * q).sum(1, keepdim=True)
    return torch.cat([inside, outside], 1)


def reference(case, dtype):
    """Loss, divergence, and gradients of student states and weight."""
    kind, divergence, lm_weight, _ = case
    data = problem(dtype)
    hidden, weight = (data[f"student_{what}"].double().clone().requires_grad_() for what in ("hidden", "weight"))
    keep = data["keep"]
    logits = (hidden @ weight.t())[:, :VOCABULARY]
    teacher = (data["teacher_hidden"].double() @ data["teacher_weight"].double().t())[:, :VOCABULARY]
    p, q = (torch.softmax(x / divergence.temperature, -1) for x in (teacher, logits))
    if kind != FULL:
        targets = whole_targets(data, kind, divergence)
        tail = torch.zeros(TOKENS) if targets.tail is None else targets.tail
        p, q = torch.cat([targets.log_probs.double().exp(), tail.double().unsqueeze(1)], 1), buckets(q, targets)
    each = oracle.tensor_divergence(divergence.kind, p, q, beta=divergence.beta, skew=divergence.skew)
    kd = (each * divergence.temperature**2)[keep].sum()
    loss = 0.7 * kd + lm_weight * torch.nn.functional.cross_entropy(logits[keep], data["labels"][keep], reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), "kd": kd.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


def fused(case, data, weights, tp, tokens=slice(None)):
    kind, divergence, lm_weight, chunk = case
    hidden = data["student_hidden"][tokens].clone().requires_grad_()
    weight = weights[0].clone().requires_grad_()
    rest = {
        "divergence": divergence,
        "kd_weight": 0.7,
        "lm_weight": lm_weight,
        "vocab_size": VOCABULARY,
        "chunk_tokens": chunk,
        "tp": tp,
    }
    keep, labels = data["keep"][tokens], data["labels"][tokens]
    if kind == FULL:
        loss = fused_linear_kd(hidden, weight, data["teacher_hidden"][tokens], weights[1], keep, labels, **rest)
    else:
        if kind == TOP_K:
            options = {"vocab_size": VOCABULARY, "temperature": divergence.temperature, "chunk_tokens": chunk, "tp": tp}
            targets = top_k_targets(data["teacher_hidden"][tokens], weights[1], k=K, **options)
        else:
            targets = whole_targets(data, kind, divergence).select(tokens)
        loss = fused_linear_sparse_kd(hidden, weight, targets, keep, labels, **rest)
    (loss.loss_sum * 3).backward()
    return {
        "loss": loss.loss_sum.detach(),
        "kd": loss.kd_sum,
        "d_hidden": hidden.grad / 3,
        "d_weight": weight.grad / 3,
    }


def dense(case, data, weights, tp):
    kind, divergence, _, _ = case
    hidden, weight = data["student_hidden"].clone().requires_grad_(), weights[0].clone().requires_grad_()
    student = mask_padding(hidden @ weight.t(), vocab_size=VOCABULARY, tp=tp)
    if kind == FULL:
        teacher = mask_padding(data["teacher_hidden"] @ weights[1].t(), vocab_size=VOCABULARY, tp=tp)
        each = vocab_divergence(student, teacher, divergence, tp=tp)
    else:
        each = vocab_sparse_divergence(student, whole_targets(data, kind, divergence), divergence, tp=tp)
    kd = each[data["keep"]].sum()
    (kd * 0.7).backward()
    d_hidden = hidden.grad
    if tp is not None:
        distributed.all_reduce(d_hidden, group=tp)
    return {"kd": kd.detach(), "d_hidden": d_hidden, "d_weight": weight.grad}


def on_rank(dtype):
    """All cases with the vocabulary over all ranks, and over pairs of ranks that each hold half of the tokens."""
    data, rank, world = problem(dtype), distributed.get_rank(), distributed.get_world_size()
    weights = [data[f"{who}_weight"].chunk(world)[rank] for who in ("student", "teacher")]
    tp = distributed.group.WORLD if world > 1 else None
    answer = {"fused": [fused(case, data, weights, tp) for case in CASES]}
    answer["dense"] = [dense(case, data, weights, tp) for case in CASES if not case[2]]
    if world == 4:
        pairs = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        half = slice(0, 7) if rank < 2 else slice(7, TOKENS)
        weights = [data[f"{who}_weight"].chunk(2)[rank % 2] for who in ("student", "teacher")]
        answer["split"] = [fused(case, data, weights, pairs[rank // 2], half) for case in CASES]
    return answer


def compare(found, expected, dtype, name):
    for key, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[key].double(), **TOL[dtype], msg=lambda text, key=key: f"{name}, {key}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_divergence_equals_the_reference_at_every_split(world, dtype):
    ranks = run_on_ranks(world, on_rank, dtype)
    expected = [reference(case, dtype) for case in CASES]
    for index, case in enumerate(CASES):
        whole = torch.cat([answer["fused"][index]["d_weight"] for answer in ranks])
        assert not whole[VOCABULARY:].any(), "columns that pad the vocabulary received a gradient"
        for answer in ranks:
            compare(answer["fused"][index] | {"d_weight": whole}, expected[index], dtype, f"fused {case}")
    plain = [index for index, case in enumerate(CASES) if not case[2]]
    for place, index in enumerate(plain):
        whole = torch.cat([answer["dense"][place]["d_weight"] for answer in ranks])
        for answer in ranks:
            compare(answer["dense"][place] | {"d_weight": whole}, expected[index], dtype, f"dense {CASES[index]}")
    for index, case in enumerate(CASES if world == 4 else []):
        first, second = ([ranks[rank]["split"][index] for rank in pair] for pair in ((0, 1), (2, 3)))
        sums = {
            "loss": first[0]["loss"] + second[0]["loss"],
            "kd": first[0]["kd"] + second[0]["kd"],
            "d_hidden": torch.cat([first[0]["d_hidden"], second[0]["d_hidden"]]),
            "d_weight": sum(torch.cat([part["d_weight"] for part in pair]) for pair in (first, second)),
        }
        compare(sums, expected[index], dtype, f"tokens split, {case}")


def alone(case, data, *, keep=None):
    weights = data["student_weight"], data["teacher_weight"]
    data = data | {"keep": torch.ones(TOKENS, dtype=torch.bool) if keep is None else keep}
    return fused(case, data, weights, None)


@pytest.mark.parametrize("case", [case for case in CASES if case[3] is not None], ids=str)
def test_gradcheck(case):
    kind, divergence, lm_weight, chunk = case
    data = problem(torch.float64)
    inputs = [data[f"student_{what}"].clone().requires_grad_() for what in ("hidden", "weight")]
    options = {"divergence": divergence, "lm_weight": lm_weight, "vocab_size": VOCABULARY, "chunk_tokens": chunk}
    rest = data["keep"], data["labels"]
    if kind == FULL:

        def loss(hidden, weight):
            pair = data["teacher_hidden"], data["teacher_weight"]
            return fused_linear_kd(hidden, weight, *pair, *rest, **options).loss_sum
    else:
        targets = whole_targets(data, kind, divergence)

        def loss(hidden, weight):
            return fused_linear_sparse_kd(hidden, weight, targets, *rest, **options).loss_sum

    # Along random directions; the comparison above has every entry.
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
def test_a_tied_embedding_collects_both_gradients(case):
    kind, divergence, _, _ = case
    data = problem(torch.float64)
    ids = torch.arange(TOKENS) % VOCABULARY
    weight = data["student_weight"].clone().requires_grad_()
    hidden = torch.nn.functional.embedding(ids, weight)
    if kind == FULL:
        pair = data["teacher_hidden"], data["teacher_weight"]
        loss = fused_linear_kd(hidden, weight, *pair, divergence=divergence, vocab_size=VOCABULARY)
    else:
        targets = whole_targets(data, kind, divergence)
        loss = fused_linear_sparse_kd(hidden, weight, targets, divergence=divergence, vocab_size=VOCABULARY)
    loss.loss_sum.backward()
    twin = data["student_weight"].clone().requires_grad_()
    teacher = (data["teacher_hidden"] @ data["teacher_weight"].t())[:, :VOCABULARY]
    student = (twin[ids] @ twin.t())[:, :VOCABULARY]
    p, q = (torch.softmax(x / divergence.temperature, -1) for x in (teacher, student))
    if kind != FULL:
        p, q = targets.bucket_logp(torch.float64).exp(), buckets(q, targets)
    each = oracle.tensor_divergence(divergence.kind, p, q, beta=divergence.beta, skew=divergence.skew)
    (each.sum() * divergence.temperature**2).backward()
    torch.testing.assert_close(weight.grad, twin.grad, **TOL[torch.float64])


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
def test_nothing_kept_gives_zero_and_zero_gradients(case):
    found = alone(case, problem(torch.float32), keep=torch.zeros(TOKENS, dtype=torch.bool))
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("case", [case for case in CASES if not case[2] and case[0] != SAMPLED], ids=str)
def test_equal_models_have_no_divergence_and_no_gradient(case):
    data = problem(torch.float64)
    data = data | {"student_hidden": data["teacher_hidden"], "student_weight": data["teacher_weight"]}
    found = alone(case, data)
    for key, value in found.items():
        # The derivative of |p - q| is a sign: rounding alone decides it at equality.
        if key in ("loss", "kd") or case[1].kind is not DivergenceKind.TOTAL_VARIATION:
            assert value.abs().max() < 1e-12, key


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
def test_a_shift_of_all_logits_changes_nothing(case):
    data = problem(torch.float64)
    shifted = dict(data)
    for who, by in (("student", 30.0), ("teacher", -20.0)):
        shifted[f"{who}_hidden"] = torch.cat([data[f"{who}_hidden"], torch.ones(TOKENS, 1, dtype=torch.float64)], 1)
        column = torch.full((PADDED, 1), by, dtype=torch.float64)
        shifted[f"{who}_weight"] = torch.cat([data[f"{who}_weight"], column], 1)
    found, expected = alone(case, shifted), alone(case, data)
    torch.testing.assert_close(found["kd"], expected["kd"], **TOL[torch.float64])
    torch.testing.assert_close(found["d_hidden"][:, :HIDDEN], expected["d_hidden"], **TOL[torch.float64])


@pytest.fixture(params=[False, True], ids=["denormals", "denormals flushed"])
def denormals_flushed(request):
    """As `megatron.runtime` has them flushed in every run on a CPU, and not."""
    before = float(torch.tensor([1e-39]) * 1) == 0
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(before)


@pytest.mark.usefixtures("denormals_flushed")
@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=str)
def test_very_unequal_models_stay_finite_in_float32(case):
    data = problem(torch.float32)
    data = data | {"student_hidden": data["student_hidden"] * 300, "teacher_hidden": data["teacher_hidden"] * 300}
    assert all(value.isfinite().all() for value in alone(case, data).values())


def test_sparse_targets_refuse_what_does_not_fit_them():
    data = problem(torch.float64)
    pair = data["student_hidden"], data["student_weight"]
    sampled = whole_targets(data, SAMPLED, Divergence())
    with pytest.raises(ValueError, match="unbiased for the forward KL alone"):
        fused_linear_sparse_kd(
            *pair, sampled, divergence=Divergence(kind=DivergenceKind.REVERSE_KL), vocab_size=VOCABULARY
        )
    with pytest.raises(ValueError, match="taken at temperature"):
        fused_linear_sparse_kd(*pair, sampled, divergence=Divergence(temperature=2.0), vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="k = 15"):
        top_k_targets(data["teacher_hidden"], data["teacher_weight"], k=15, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="beta and skew"):
        Divergence(beta=1.0)


def test_all_ids_as_entries_give_the_full_divergence():
    data = problem(torch.float64)
    for kind in DivergenceKind:
        divergence = Divergence(kind=kind)
        targets = top_k_targets(data["teacher_hidden"], data["teacher_weight"], k=VOCABULARY, vocab_size=VOCABULARY)
        answers = []
        for call in (
            lambda *pair, d=divergence, t=targets: fused_linear_sparse_kd(
                *pair, t, divergence=d, vocab_size=VOCABULARY
            ),
            lambda *pair, d=divergence: fused_linear_kd(
                *pair, data["teacher_hidden"], data["teacher_weight"], divergence=d, vocab_size=VOCABULARY
            ),
        ):
            pair = [data[f"student_{what}"].clone().requires_grad_() for what in ("hidden", "weight")]
            loss = call(*pair).loss_sum
            answers.append([loss.detach(), *torch.autograd.grad(loss, pair)])
        torch.testing.assert_close(*answers, **TOL[torch.float64])
