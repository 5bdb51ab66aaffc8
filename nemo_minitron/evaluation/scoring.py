"""Log-likelihoods of given tokens, and greedy continuations, of many requests at any parallel layout.

Requests are sorted by length and cut into batches; data-parallel copies of the model take turns, and pipeline stages
work on as many batches at one time as there are stages. All ranks hold all results.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.generate import check_prompt, generate
from nemo_minitron.evaluation.logits import length_step, returning
from nemo_minitron.megatron import forward
from nemo_minitron.megatron.forward import LossResult, MicroBatch
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime, gather_objects
from nemo_minitron.parallel.collectives import split_group, sum_over
from nemo_minitron.parallel.label_scores import label_scores


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens to be scored, given those before them."""

    context: tuple[int, ...]
    """At least one token."""
    tokens: tuple[int, ...]
    """What is scored."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return (self.context + self.tokens)[:-1]


@dataclass(frozen=True, slots=True)
class Score:
    """What a model says of a continuation."""

    logprob: float
    """Sum of log-probabilities of its tokens, nats."""
    is_greedy: bool
    """Whether each of them is the likeliest one at its place."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to go on from."""

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    """The text ends before the first of these that it comes to."""
    count: int
    """Most tokens to add."""


class Decode(Protocol):
    """A tokenizer's `decode`."""

    def __call__(self, tokens: list[int], /, *, skip_special_tokens: bool) -> Any:
        """Text of tokens, with or without the special ones."""
        ...


Item = TypeVar("Item")
Result = TypeVar("Result")
Rows = Sequence[tuple[tuple[int, ...], list[int]]]
"""What the model reads, and which requests read just that."""


class TokenScorer:
    """A model at some layout that scores and continues tokens. Every rank calls its methods with equal arguments.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        batch_size: Sequences of a batch.
        decode: Text of tokens, as a tokenizer's `decode`.
        ends: Tokens that end a text.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        runtime: Runtime,
        *,
        batch_size: int,
        decode: Decode,
        ends: Collection[int],
    ) -> None:
        self.chunks, self.runtime, self.batch_size = chunks, runtime, batch_size
        self.spec = unwrap(chunks[0]).spec
        self._decode, self._ends = decode, frozenset(ends)

    def score(
        self,
        requests: Sequence[Continuation],
        on_results: Callable[[Mapping[int, Score]], None] = lambda results: None,
    ) -> list[Score]:
        """Score continuations; equal inputs (answers of one token to one question) cost one pass.

        Args:
            requests: The same on every rank.
            on_results: Given results by index of their request as they come.

        Raises:
            DataError: A request has no context, does not fit into the model's context, or has tokens outside of the
                vocabulary.
        """
        self.check(requests)
        found = {index: Score(0.0, True) for index, request in enumerate(requests) if not request.tokens}
        by_inputs: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            if request.tokens:
                by_inputs.setdefault(request.inputs, []).append(index)
        rows = sorted(by_inputs.items(), key=lambda row: (-len(row[0]), row[0]))
        at_a_time = self.runtime.parallel.pipeline
        for share in self._rounds(rows, at_a_time):
            results: dict[int, Score] = {}
            if share:
                results = self._score_batches(list(_cut(share, self.batch_size)), requests)
            found |= self._exchange(results, on_results)
        return [found[index] for index in range(len(requests))]

    def generate(
        self,
        requests: Sequence[Prompt],
        on_results: Callable[[Mapping[int, str]], None] = lambda results: None,
    ) -> list[str]:
        """Greedy texts that follow prompts, without what ends them.

        Args:
            requests: The same on every rank.
            on_results: Given results by index of their request as they come.

        Raises:
            DataError: A prompt is empty, does not fit into the model's context, or has tokens outside of the
                vocabulary.
        """
        self.check_prompts(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
        found: dict[int, str] = {}
        for share in self._rounds(order, 1):
            results = self._generate_batch([requests[index] for index in share]) if share else []
            found |= self._exchange(dict(zip(share, results, strict=True)), on_results)
        return [found[index] for index in range(len(requests))]

    def check(self, requests: Sequence[Continuation]) -> None:
        """Raises DataError for a request that `score` would refuse."""
        limit, vocab_size = self.spec.max_position_embeddings, self.spec.vocab_size
        for request in requests:
            if not request.context or len(request.inputs) > limit:
                raise DataError(
                    f"a text of {len(request.context)} tokens and {len(request.tokens)} to be scored",
                    rule=f"at least one token before them, and {limit + 1} in all at most",
                )
            if not all(0 <= token < vocab_size for token in (*request.context, *request.tokens)):
                raise DataError(
                    "a text holds tokens outside the model's vocabulary",
                    rule=f"below {vocab_size}",
                    remedy="use the model's own tokenizer",
                )

    def check_prompts(self, requests: Sequence[Prompt]) -> None:
        """Raises DataError for a request that `generate` would refuse."""
        for request in requests:
            check_prompt(request.tokens, limit=self.spec.max_position_embeddings, vocab_size=self.spec.vocab_size)

    def _rounds(self, items: Sequence[Item], batches: int) -> Iterator[Sequence[Item]]:
        """This copy's share of each round, in which every copy takes up to `batches` batches; empty at the end.

        Copies that share experts exchange tokens in every pass, so they take the same items.
        """
        share, sharing = self.batch_size * batches, self.runtime.expert_peers
        for start in range(0, len(items), share * (self.runtime.dp_size // sharing)):
            first = start + share * (self.runtime.dp_rank // sharing)
            yield items[first : first + share]

    def _exchange(
        self, mine: dict[int, Result], on_results: Callable[[Mapping[int, Result]], None]
    ) -> dict[int, Result]:
        """Results of all copies; of each copy one rank speaks."""
        here = self.runtime
        speaks = here.is_last_stage and here.tp_rank == 0 and here.cp_rank == 0
        merged: dict[int, Result] = {}
        for part in gather_objects(mine if speaks else {}):
            merged |= part
        on_results(merged)
        return merged

    def _score_batches(self, batches: list[Rows], requests: Sequence[Continuation]) -> dict[int, Score]:
        """Scores of some batches, which share one pass of the pipeline; empty on other stages than the last."""
        here = self.runtime
        size = max(len(batch) for batch in batches)
        length = max(len(inputs) for batch in batches for inputs, _ in batch)
        length += -length % length_step(here)
        micro_batches = [_padded([inputs for inputs, _ in batch], size, length) for batch in batches]
        if here.parallel.virtual_pipeline is not None:  # takes micro-batches by the pipeline size
            micro_batches += micro_batches[:1] * (-len(micro_batches) % here.parallel.pipeline)
        wanted = [_labels(batch, requests) for batch in batches]

        def measure(hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
            nothing = hidden_SBH.new_zeros(())
            report = {}
            if index < len(batches):
                report = self._label_scores(hidden_SBH, micro_batch.position_ids[0], *wanted[index])
            return LossResult(nothing, torch.ones_like(nothing), report)

        with returning(self.chunks, "hidden"):
            reports = forward.run(self.chunks, micro_batches, measure, runtime=here, forward_only=True)
        results: dict[int, Score] = {}
        for batch, report in zip(batches, reports, strict=False):
            results |= _sums(batch, requests, report["nats"].tolist(), report["correct"].tolist())
        return results

    def _label_scores(
        self, hidden_SBH: Tensor, positions_S: Tensor, rows_N: Tensor, places_N: Tensor, labels_N: Tensor
    ) -> dict[str, Tensor]:
        """-log p and whether the label is the likeliest, of each label `[N]`, from all context-parallel ranks."""
        here, device = self.runtime, hidden_SBH.device
        rows_N, places_N, labels_N = (x.to(device) for x in (rows_N, places_N, labels_N))
        # Where this rank has each position of a sequence, -1 where it has it not.
        own = torch.arange(len(positions_S), device=device)
        held = torch.full((here.groups.cp.size() * len(positions_S),), -1, device=device)
        local_N = held.index_put((positions_S,), own)[places_N]
        mine = local_N >= 0
        picked = hidden_SBH[local_N[mine], rows_N[mine]]
        model = unwrap(self.chunks[-1])
        scores = label_scores(
            picked,
            model.output_weight(),
            labels_N[mine],
            vocab_size=self.spec.vocab_size,
            tp=split_group(here.groups.tp),
        )
        nats = torch.zeros(len(labels_N), dtype=torch.float64, device=device)
        correct = torch.zeros(len(labels_N), dtype=torch.int32, device=device)
        nats[mine], correct[mine] = scores.nats, scores.correct.int()
        return {"nats": sum_over(nats, here.groups.cp), "correct": sum_over(correct, here.groups.cp)}

    def _generate_batch(self, prompts: Sequence[Prompt]) -> list[str]:
        def text_of(index: int, tokens: list[int]) -> str:
            if tokens and tokens[-1] in self._ends:
                tokens = tokens[:-1]
            text = str(self._decode(tokens, skip_special_tokens=True))
            for stop in prompts[index].until:
                text = text.split(stop, 1)[0] if stop else text
            return text

        def finished(index: int, tokens: list[int]) -> bool:
            if tokens[-1] in self._ends or len(tokens) >= prompts[index].count:
                return True
            # With special tokens in it: many a stop sequence is one, as `<|im_end|>`.
            text = str(self._decode(tokens, skip_special_tokens=False))
            return any(stop in text for stop in prompts[index].until if stop)

        most = max(prompt.count for prompt in prompts)
        texts = generate(self.chunks, self.runtime, [prompt.tokens for prompt in prompts], most, finished=finished)
        return [text_of(index, tokens) for index, tokens in enumerate(texts)]


def _cut(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _padded(inputs: Sequence[tuple[int, ...]], size: int, length: int) -> MicroBatch:
    """Inputs as one micro-batch of `size` sequences, padded on the right: causal, so what follows is not seen."""
    tokens = torch.zeros(size, length, dtype=torch.int64)
    for row, one in enumerate(inputs):
        tokens[row, : len(one)] = torch.tensor(one)
    return MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _labels(batch: Rows, requests: Sequence[Continuation]) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and id of each token to be scored in a batch, requests in order, `[N]` each."""
    rows: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    for row, (inputs, indices) in enumerate(batch):
        for index in indices:
            tokens = requests[index].tokens
            rows += [row] * len(tokens)
            places += range(len(inputs) - len(tokens), len(inputs))
            labels += tokens
    return torch.tensor(rows), torch.tensor(places), torch.tensor(labels)


def _sums(
    batch: Rows, requests: Sequence[Continuation], nats: Sequence[float], correct: Sequence[int]
) -> dict[int, Score]:
    """Scores by request, from what was measured of each token in the order of `_labels`."""
    found: dict[int, Score] = {}
    start = 0
    for _, indices in batch:
        for index in indices:
            end = start + len(requests[index].tokens)
            found[index] = Score(-sum(nats[start:end]), all(correct[start:end]))
            start = end
    return found
