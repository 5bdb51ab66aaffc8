"""What is tried: students, lessons, and pairs of them."""

from dataclasses import dataclass

import torch

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weight_named
from nemo_minitron.checkpoints.source import TensorSource, names_of


@dataclass(frozen=True)
class Student:
    """How a student comes from its teacher.

    Attributes:
        name: In the results file.
        target: Keys of a recipe's `target`; `{seed}` stands for the seed of the trial.
        rounds: In how many rounds the importance is measured and units go, without training between them.
        random: Whether it has random weights instead of the teacher's.
        corrected: Whether it is cut from the teacher that was fine-tuned on the texts first.
    """

    name: str
    target: tuple[str, ...]
    rounds: int = 1
    random: bool = False
    corrected: bool = False


@dataclass(frozen=True)
class Lesson:
    """How a student is trained.

    Attributes:
        name: In the results file.
        overrides: On top of the recipe.
        cached: Whether the teacher's targets come from a cache.
        corrected: Whether the teacher is the one that was fine-tuned on the texts first.
    """

    name: str
    overrides: tuple[str, ...] = ()
    cached: bool = False
    corrected: bool = False


@dataclass(frozen=True)
class Trial:
    """A student and how it is trained; without a lesson, it is measured as it was cut."""

    student: Student
    lesson: Lesson | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Its name in the results file."""
        return self.student.name, "" if self.lesson is None else self.lesson.name


class RandomSource:
    """A checkpoint of the same architecture with normal weights of deviation 0.02, and norms of one."""

    def __init__(self, like: TensorSource, seed: int) -> None:
        self._like, self._seed = like, seed
        self.family = like.family
        self.lineage = {**like.lineage, "random": seed}

    @property
    def spec(self) -> ModelSpec:
        """The other's."""
        return self._like.spec

    @property
    def dtype(self) -> torch.dtype:
        """The other's."""
        return self._like.dtype

    def names(self) -> tuple[str, ...]:
        """In table order."""
        return names_of(self.spec)

    def get(self, name: str) -> torch.Tensor:
        """Drawn when asked for, the same at every time and in any order."""
        shape = weight_named(self.spec, name).shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype)
        generator = torch.Generator().manual_seed(self._seed * 100_003 + self.names().index(name))
        return torch.randn(shape, generator=generator).mul_(0.02).to(self.dtype)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The other's."""
        return self._like.tokenizer_files()
