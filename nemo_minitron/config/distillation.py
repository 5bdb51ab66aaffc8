"""What a student is trained for and where its targets come from: the same keys and defaults through every door."""

from typing import Any, Self, TypeVar

from pydantic import field_validator, model_validator

from nemo_minitron.config.base import Count, NonNegativeFloat, OpenFraction, Positive, Section
from nemo_minitron.config.hidden import HiddenConfig
from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.config.parallel import Precision

PartT = TypeVar("PartT", bound=Section)


class RampTo(Section):
    """Values at the last step. Each goes there in a straight line from its key's value at the first; None: it stays.

    Validations take the values at the end, so that they can be compared.
    """

    kd_weight: NonNegativeFloat | None = None
    lm_weight: NonNegativeFloat | None = None
    hidden_weight: NonNegativeFloat | None = None
    temperature: Positive | None = None


class Objective(Section):
    """`kd_weight` times the divergence of student and teacher, plus `lm_weight` times the student's cross-entropy.

    Plus `hidden_weight` times the balanced losses of intermediate states, where `hidden` names some, `router_weight`
    times the divergence of routers, and `balance_weight` times the imbalance of the student's. In nats per token. The
    papers take the forward KL over the full vocabulary, alone (arXiv:2407.14679, table 15).
    """

    kd_weight: NonNegativeFloat = 1.0
    """Factor of the divergence; 0 for plain training on the text."""
    lm_weight: NonNegativeFloat = 0.0
    """Factor of the next-token cross-entropy on the text."""
    hidden_weight: NonNegativeFloat = 1.0
    """Factor of the losses of `hidden`, after their balance."""
    router_weight: NonNegativeFloat = 0.0
    """Factor of the KL divergence between the routers of teacher and student, over the experts that the student has:
    the mean over layers with experts. Needs a teacher in memory."""
    balance_weight: NonNegativeFloat = 0.0
    """Factor of the load-balancing loss of the student's routers (arXiv:2412.19437, eq. 17): over each sequence, the
    fraction of tokens that an expert is chosen for times its mean score, relative to equal loads, where it is 1; the
    mean over layers with experts. Models are trained with 0.0001 to 0.01."""
    hidden: HiddenConfig | None = None
    """Intermediate states to compare, as `{layers: [[-3, -3]], embedding: true}`; nothing for none."""
    temperature: Positive = 1.0
    """Divides both models' logits; the divergence is multiplied by its square (arXiv:1503.02531, section 2)."""
    divergence: DivergenceKind = DivergenceKind.FORWARD_KL
    """Of the teacher's distribution p and the student's q: `forward_kl` KL(p || q), `reverse_kl` KL(q || p),
    `jensen_shannon` (with `beta`), `skewed_kl` KL(p || s p + (1 - s) q), `skewed_reverse_kl` KL(q || (1 - s) p + s q)
    (s is `skew`), or `total_variation`. Validations measure the forward KL too, whatever it is."""
    beta: OpenFraction = 0.5
    """Teacher's weight in `jensen_shannon` (arXiv:2306.13649)."""
    skew: OpenFraction = 0.1
    """Of the skewed divergences (arXiv:2402.03898)."""
    top_k: Count | None = None
    """Compare this many of the teacher's likeliest tokens, and all others as one; None compares every token. The papers
    find 100 or fewer to be too few (arXiv:2407.14679)."""
    ramp_to: RampTo = RampTo()
    """Where weights and temperature end, as `{temperature: 1, lm_weight: 0.5}`."""
    freeze_embeddings: bool = False
    """Keep embedding and output layer as the teacher has them: faster steps, and they need no repair when hidden
    channels are not cut."""
    loss_chunk_tokens: Count | None = None
    """Tokens whose logits exist at one time; None chooses from the vocabulary and the device."""

    def at(self, progress: float) -> "Objective":
        """The objective at one point of a training, with nothing left to ramp.

        Args:
            progress: 0 at the first step, 1 at the last one and in validations.
        """
        values = {name: getattr(self, name) for name in Objective.model_fields}
        for name, last in self.ramp_to:
            if last is not None:
                values[name] += (last - values[name]) * progress
        return Objective.model_construct(**{**values, "ramp_to": RampTo()})


class TeacherConfig(Section):
    """How a teacher is held that computes beside its student."""

    teacher_precision: Precision | None = None
    """Dtype of the teacher, fp32 or bf16; None for the run's."""
    teacher_fp8: bool = False
    """Multiply the teacher's weights in fp8 (each tensor scaled by its own maximum), on GPUs that have it and with
    Transformer Engine's layers. Targets become a little coarser; on an H200 the check of it failed with the
    weights that it had first, and the one that it has now has not run on a card."""
    offload_teacher: bool = False
    """Keep the teacher's layers in host memory between its passes: less GPU memory, more traffic."""

    @field_validator("teacher_precision")
    @classmethod
    def _is_a_dtype(cls, value: Precision | None) -> Precision | None:
        if value is Precision.AUTO:
            raise ValueError("fp32 or bf16; leave it out for the precision of the run, which may be auto")
        return value


class DistillationConfig(Objective, TeacherConfig):
    """The objective together with where its targets come from: a teacher in memory, or a cache.

    `minitron.distillation` of a NeMo configuration has these keys; a recipe's `distill` has all but `teacher` and
    `cache`, which its run folder knows.
    """

    teacher: str | None = None
    """A `.nemo` file, its unpacked folder, a Hugging Face folder or a GGUF file. None: `attach_teacher` is called."""
    cache: str | None = None
    """A folder of stored targets, instead of a teacher."""

    @property
    def objective(self) -> Objective:
        """What is minimised, without where its targets come from."""
        return part(self, Objective)

    @model_validator(mode="before")
    @classmethod
    def _older_forms(cls, data: Any) -> Any:
        """The forms that configurations of earlier versions have.

        `divergence` was a mapping of `kind`, `beta` and `skew`, and `teacher_precision` was NeMo's "32".
        """
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(given := data.get("divergence"), dict) and given.keys() <= {"kind", "beta", "skew"}:
            data |= {"divergence" if name == "kind" else name: value for name, value in given.items()}
            if "kind" not in given:
                del data["divergence"]
        if data.get("divergence", "") is None:
            del data["divergence"]
        if data.get("teacher_precision") in ("32", 32):
            data["teacher_precision"] = Precision.FP32
        return data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.cache is None:
            return self
        unused = {
            name: getattr(self, name)
            for name in (*TeacherConfig.model_fields, "teacher", "hidden", "top_k", "router_weight")
        }
        problems = [
            f"{name} = {value} with a cache: there is no teacher in memory" for name, value in unused.items() if value
        ]
        if self.ramp_to.temperature not in {None, self.temperature}:
            problems.append("ramp_to.temperature with a cache: cached targets are of one temperature")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def part(section: Section, kind: type[PartT]) -> PartT:
    """The settings of one kind out of a section that has more."""
    return kind.model_construct(**{name: getattr(section, name) for name in kind.model_fields})
