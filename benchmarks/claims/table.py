"""The claims: what is tried for each, and what the papers found.

Papers: (1) arXiv:2407.14679, (2) arXiv:2408.11796, (3) arXiv:2503.16870.
"""

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.claims.students import Lesson, Student, Trial

# -- students: shares of the teacher's sizes, so that a small model can stand in for SmolLM2 in tests ----------------

WIDTH_TARGET = ("hidden_size=0.8889", "ffn_hidden_size=0.75", "multiple_of=4")
"""SmolLM2-135M: hidden 512 of 576, FFN 1152 of 1536; 101.9M of 134.5M parameters."""
DEPTH_TARGET = ("num_layers=0.7",)
"""21 of 30 layers; 102.7M."""
BOTH_TARGET = ("num_layers=0.8", "ffn_hidden_size=0.8125", "multiple_of=8", "depth_metric=lm_loss")
"""24 of 30 layers, FFN 1248; 101.3M."""
BLOCK_TARGET = (*DEPTH_TARGET, "depth_metric=lm_loss", "depth_contiguous=true")


def width(batch: str, sequence: str) -> Student:
    """Cut in width by one of the nine aggregations."""
    how = (f"batch_aggregation={batch}", f"sequence_aggregation={sequence}")
    return Student(f"width, {batch} {sequence}", (*WIDTH_TARGET, *how))


WIDTH = width("l2", "mean")
BLOCK = Student("depth, best block", BLOCK_TARGET)
BY_LOSS = Student("depth, loss one by one", (*DEPTH_TARGET, "depth_metric=lm_loss"))
BY_INFLUENCE = Student("depth, block influence", DEPTH_TARGET)
BOTH = Student("depth and width", BOTH_TARGET)
RANDOM_UNITS = Student("width, at random", (*WIDTH_TARGET, "random_seed={seed}"))
RANDOM_WEIGHTS = Student("width, random weights", WIDTH_TARGET, random=True)
CORRECTED = Student("depth, best block, of the corrected teacher", BLOCK_TARGET, corrected=True)
ITERATED = {rounds: Student(f"width, {rounds} rounds", WIDTH_TARGET, rounds=rounds) for rounds in (2, 4)}

# -- lessons ---------------------------------------------------------------------------------------------------------


def hidden(name: str, value: str) -> Lesson:
    """Forward KL and the cosine between hidden states."""
    return Lesson(f"KL + {name}", (f"distill.hidden={value}",))


KL = Lesson("forward KL")
REVERSE = Lesson("reverse KL", ("distill.divergence=reverse_kl",))
MIX = Lesson("KL + CE", ("distill.kd_weight=0.5", "distill.lm_weight=0.5"))
CE = Lesson("CE", ("distill.kd_weight=0", "distill.lm_weight=1"))
COLD = Lesson("KL, temperature 0.5", ("distill.temperature=0.5",))
HOT = Lesson("KL, temperature 3", ("distill.temperature=3",))
TOP = Lesson("KL, top 10", ("distill.top_k=10",))
FROZEN = Lesson("KL, frozen embeddings", ("distill.freeze_embeddings=true",))
LAST_BUT_TWO = hidden("last but two", "{layers: [[-3, -3]]}")
LAST_BUT_TWO_AND_EMBEDDING = hidden("last but two, embedding", "{layers: [[-3, -3]], embedding: true}")
LAST = hidden("last", "{layers: [[-1, -1]]}")
CACHE = Lesson("KL, 50 cached draws", ("cache.kind=sampled",), cached=True)
CORRECTION = Lesson("KL, corrected teacher", corrected=True)


class When(StrEnum):
    """Which of a row's two models is compared."""

    BEFORE = "before"
    AFTER = "after"


class Measure(StrEnum):
    """What is compared."""

    LOSS = "nats"
    """The next-token loss on held-out text."""
    KL = "kl"
    """The forward KL to the (uncorrected) teacher, there too."""


@dataclass(frozen=True)
class Row:
    """A line of a claim's table: a student as it was cut, and after its lesson.

    Attributes:
        label: Its name in the table.
        student: The student.
        lesson: Its lesson.
        rank: What runs first: 0 before 1 before 2.
    """

    label: str
    student: Student
    lesson: Lesson = KL
    rank: int = 0

    def trial(self, when: When) -> Trial:
        """The trial that measures it."""
        return Trial(self.student, None if when is When.BEFORE else self.lesson)


@dataclass(frozen=True)
class Finding:
    """What a paper says about two rows.

    Attributes:
        text: In words, with the paper's numbers.
        better: Label of the row that is better there.
        other: Label of the other one.
        when: Before or after training.
        measure: What is compared here.
        equal: Whether the paper calls them equal.
        within: Nats per token that count as no difference then; the page says when one that is not the default was set.
    """

    text: str
    better: str
    other: str
    when: When = When.AFTER
    measure: Measure = Measure.LOSS
    equal: bool = False
    within: float = 0.01


@dataclass(frozen=True)
class Claim:
    """What is tried, and what the papers found."""

    name: str
    title: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()


_AGGREGATIONS = [(batch, sequence) for batch in ("l2", "mean", "var") for sequence in ("l2", "mean", "var")]
_EARLY = (("l2", "mean"), ("l2", "l2"))

AGGREGATIONS = Claim(
    "aggregations",
    "The nine aggregations",
    tuple(
        Row(f"{batch}, {sequence}", width(batch, sequence), rank=0 if (batch, sequence) in _EARLY else 2)
        for batch, sequence in _AGGREGATIONS
    ),
    (
        Finding("(l2, mean) 7.18, (l2, l2) 8.73 (1, table 13)", "l2, mean", "l2, l2", When.BEFORE),
        Finding("(l2, mean) 7.18, (var, var) 10.55 (1, table 13)", "l2, mean", "var, var", When.BEFORE),
        Finding(
            "(l2, mean) 7.18, (mean, mean) 7.21: as good as equal (1, table 13)",
            "l2, mean",
            "mean, mean",
            When.BEFORE,
            equal=True,
            within=0.03,
        ),
        Finding("(l2, mean) stays ahead of (l2, l2) (1, figure 5)", "l2, mean", "l2, l2"),
    ),
)

WIDTH_DEPTH = Claim(
    "width-depth",
    "Width against depth",
    (
        Row("width", WIDTH),
        Row("depth, layers one by one", BY_LOSS),
        Row("depth, best block", BLOCK),
        Row("depth and width", BOTH),
    ),
    (
        Finding(
            "KL: depth and width 5.35, width 6.33 (1, table 1)", "depth and width", "width", When.BEFORE, Measure.KL
        ),
        Finding(
            "KL: width 6.33, depth 8.35 (1, table 1)", "width", "depth, layers one by one", When.BEFORE, Measure.KL
        ),
        Finding("KL: width 0.37, depth and width 0.38 (1, table 1)", "width", "depth and width", measure=Measure.KL),
        Finding("KL: width 0.37, depth 0.49 (1, table 1)", "width", "depth, layers one by one", measure=Measure.KL),
    ),
)

ITERATIVE = Claim(
    "iterative",
    "Importance once, or in rounds",
    (
        Row("one round", WIDTH),
        Row("two rounds", ITERATED[2], rank=1),
        Row("four rounds", ITERATED[4], rank=2),
    ),
    (
        Finding("1.92 and 1.92 (1, table 14)", "two rounds", "one round", equal=True),
        Finding("1.92 and 1.92 (1, table 14)", "four rounds", "one round", equal=True),
        Finding("5.24 and 5.43 (1, table 14)", "four rounds", "one round", When.BEFORE),
    ),
)

LOSSES = Claim(
    "losses",
    "Distillation objective",
    (
        Row("forward KL", BLOCK),
        Row("reverse KL", BLOCK, REVERSE),
        Row("half KL, half CE", BLOCK, MIX),
        Row("CE", BLOCK, CE),
        Row("forward KL, temperature 0.5", BLOCK, COLD, rank=1),
        Row("forward KL, temperature 3", BLOCK, HOT, rank=1),
        Row("forward KL, 10 likeliest tokens", BLOCK, TOP, rank=1),
    ),
    (
        Finding("2.155 against 2.665, depth-pruned (1, table 16)", "forward KL", "reverse KL"),
        Finding("2.107 against 2.117 (1, table 15)", "forward KL", "half KL, half CE"),
        Finding("distillation beats plain training (1, table 11)", "forward KL", "CE"),
        Finding("temperature 1 is best of 0.1 to 3 (1, section 4)", "forward KL", "forward KL, temperature 0.5"),
        Finding("temperature 1 is best of 0.1 to 3 (1, section 4)", "forward KL", "forward KL, temperature 3"),
        Finding("100 tokens or fewer cost accuracy (1, section 4)", "forward KL", "forward KL, 10 likeliest tokens"),
    ),
)

BEGINNING = Claim(
    "beginning",
    "Pruned, or random, at equal tokens",
    (
        Row("pruned by scores", WIDTH),
        Row("pruned at random", RANDOM_UNITS),
        Row("pruned by scores, trained with CE", WIDTH, CE, rank=1),
        Row("random weights", RANDOM_WEIGHTS),
    ),
    (
        Finding("loss 2.049 against 3.953 (1, table 1)", "pruned by scores", "random weights"),
        Finding("scores first (2, figure 6)", "pruned by scores", "pruned at random"),
        Finding("distillation first (2, figure 6)", "pruned by scores", "pruned by scores, trained with CE"),
        Finding("random weights last (2, figure 6)", "pruned at random", "random weights"),
    ),
)

CORRECT = Claim(
    "correction",
    "Correcting the teacher first",
    (
        Row("teacher as it is", BLOCK),
        Row("corrected teacher", CORRECTED, CORRECTION),
    ),
    (Finding("less loss, by over 6 % (2, section 2)", "corrected teacher", "teacher as it is"),),
)

LAYERS = Claim(
    "layers",
    "Which layers to match",
    (
        Row("logits alone", BLOCK),
        Row("last but two", BLOCK, LAST_BUT_TWO),
        Row("last but two, and embedding", BLOCK, LAST_BUT_TWO_AND_EMBEDDING, rank=1),
        Row("last", BLOCK, LAST),
    ),
    (
        Finding("2.145 against 2.155 (1, table 17)", "last but two", "logits alone"),
        Finding("2.141 against 2.155 (1, table 17)", "last but two, and embedding", "logits alone"),
        Finding("2.155 against 2.180, with the embedding (1, table 17)", "logits alone", "last"),
    ),
)

METRICS = Claim(
    "depth-metric",
    "How layers are chosen",
    (
        Row("block influence", BY_INFLUENCE),
        Row("loss, layer by layer", BY_LOSS),
        Row("loss, best block", BLOCK),
    ),
    (
        Finding("2.155 against 2.177 (1, table 10)", "loss, layer by layer", "block influence"),
        Finding("Winogrande 0.595 against 0.5 (2, section 4)", "loss, best block", "loss, layer by layer", When.BEFORE),
        Finding("the gap stays after retraining (2, section 4)", "loss, best block", "loss, layer by layer"),
    ),
)

CACHED = Claim(
    "cache",
    "Sampled targets from a cache",
    (Row("teacher in memory", BLOCK), Row("50 cached draws", BLOCK, CACHE)),
    (Finding("loss 2.75 and 2.75, 12 ids a token (3)", "50 cached draws", "teacher in memory", equal=True),),
)

OBJECTIVES = Claim(
    "objectives",
    "What a student is taught with",
    (
        Row("forward KL", BLOCK),
        Row("reverse KL", BLOCK, REVERSE),
        Row("forward KL + CE, half each", BLOCK, MIX),
        Row("CE alone", BLOCK, CE),
        Row("forward KL + hidden states", BLOCK, LAST_BUT_TWO),
        Row("forward KL, 50 cached draws", BLOCK, CACHE),
        Row("forward KL, corrected teacher", CORRECTED, CORRECTION),
        Row("forward KL, frozen embeddings", BLOCK, FROZEN, rank=1),
        Row("forward KL, from random weights", RANDOM_WEIGHTS),
    ),
)
"""The page on objectives; all but one of its rows belong to a claim too."""

CLAIMS = (WIDTH_DEPTH, METRICS, LOSSES, BEGINNING, CORRECT, LAYERS, CACHED, AGGREGATIONS, ITERATIVE, OBJECTIVES)
"""In the order in which they run."""


def named(name: str) -> Claim:
    """A claim by its name.

    Raises:
        KeyError: There is none.
    """
    return {claim.name: claim for claim in CLAIMS}[name]


def trials(claims: tuple[Claim, ...]) -> list[Trial]:
    """Everything that claims name, once, in the order in which it runs."""
    ranked = [
        (min(row.rank, 1) if when is When.BEFORE else row.rank, row.trial(when))
        for claim in claims
        for row in claim.rows
        for when in When
    ]
    return list(dict.fromkeys(trial for _, trial in sorted(ranked, key=lambda pair: pair[0])))
