"""One rank decides what a model that is spread over ranks is asked; the others take part until it is done."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from nemo_minitron.errors import MinitronError
from nemo_minitron.evaluation.scoring import Continuation, Prompt, Score, TokenScorer
from nemo_minitron.megatron.runtime import broadcast_object

T = TypeVar("T")
_DONE, _FAILED = "done", "failed"


class Leader:
    """A scorer as rank 0 uses it alone: each call reaches the other ranks, which wait for it in `led`."""

    def __init__(self, scorer: TokenScorer) -> None:
        self._scorer = scorer
        self.spec, self.batch_size = scorer.spec, scorer.batch_size

    def score(
        self,
        requests: Sequence[Continuation],
        on_results: Callable[[Mapping[int, Score]], None] = lambda results: None,
    ) -> list[Score]:
        """See `TokenScorer.score`."""
        self._scorer.check(requests)  # what would stop all ranks stops before they are asked
        self._tell("score", requests)
        return self._scorer.score(requests, on_results)

    def generate(
        self,
        requests: Sequence[Prompt],
        on_results: Callable[[Mapping[int, str]], None] = lambda results: None,
    ) -> list[str]:
        """See `TokenScorer.generate`."""
        self._scorer.check_prompts(requests)
        self._tell("generate", requests)
        return self._scorer.generate(requests, on_results)

    def _tell(self, verb: str, content: Any) -> None:
        if self._scorer.runtime.world_size > 1:
            broadcast_object((verb, content), patient=True)


def led(scorer: TokenScorer, work: Callable[[Leader], T]) -> T:
    """What `work` returns on rank 0, on every rank. Collective; `work` is called on rank 0 only.

    Raises:
        MinitronError: `work` raised it, on every rank. After another exception of rank 0, the others raise a
            RuntimeError.
    """
    runtime = scorer.runtime
    if runtime.rank > 0:
        followed: T = _follow(scorer)
        return followed
    leader = Leader(scorer)
    try:
        result = work(leader)
    except BaseException as error:
        leader._tell(_FAILED, error if isinstance(error, MinitronError) else RuntimeError("rank 0 failed"))
        raise
    leader._tell(_DONE, result)
    return result


def _follow(scorer: TokenScorer) -> Any:
    content: Any
    while True:
        verb, content = broadcast_object(("", None), patient=True)
        if verb == _DONE:
            return content
        if verb == _FAILED:
            raise content
        getattr(scorer, verb)(content)
