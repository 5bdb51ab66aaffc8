"""Greedy text at every layout, with a cache of keys and values where the layers are our own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nemo_minitron.checkpoints.special_ids import generation_ends
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.logits import length_step, returning
from nemo_minitron.megatron import forward
from nemo_minitron.megatron.forward import LossResult, MicroBatch
from nemo_minitron.megatron.kv_cache import Progress, cached, can_cache
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.parallel.collectives import gather, sum_over

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Finished = Callable[[int, list[int]], bool]
"""`finished(sample, its new tokens)`: whether a sample needs no more; equal on every rank."""


def greedy(
    chunks: Sequence[nn.Module], runtime: Runtime, prompt: Sequence[int], count: int, *, ends: Collection[int] = ()
) -> list[int]:
    """The likeliest next token, `count` times or until one of `ends`; the same list on every rank.

    Every rank calls it with the same arguments. It stops early where the model's context is full.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        prompt: Token ids to go on from.
        count: Most tokens to add.
        ends: Tokens that end the text, left out of the result.

    Returns:
        The new tokens, without the prompt. Of equally likely tokens the lower id is taken.

    Raises:
        DataError: The prompt is empty, holds a token outside the vocabulary, or does not fit into the model's context.
    """
    [tokens] = generate(chunks, runtime, [prompt], count, finished=lambda _, new: new[-1] in ends)
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def end_tokens(tokenizer: "PreTrainedTokenizerFast", files: Mapping[str, bytes]) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's end of sequence, and those that the model's generation defaults name.

    Chat models have several: the end of a turn, and the end of a document.

    Args:
        tokenizer: The model's.
        files: What travels with the model, `generation_config.json` among it.
    """
    return frozenset((int(tokenizer.eos_token_id), *generation_ends(files)))


def generate(
    chunks: Sequence[nn.Module],
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    finished: Finished = lambda sample, new: False,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue several prompts at one time, each with its likeliest next token.

    All ranks of one copy of the model call it with the same arguments; copies may have different ones.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        prompts: Token ids of each sample; lengths may differ.
        count: Most tokens to add to each.
        finished: Asked after every token.
        use_cache: Whether to remember keys and values. Without, or where positions are split over ranks, each token
            costs a pass over the complete text so far.

    Returns:
        New tokens of each sample, with the one that finished it. Of equally likely tokens the lower id is taken.

    Raises:
        DataError: As `greedy`.
    """
    spec = unwrap(chunks[0]).spec
    for prompt in prompts:
        check_prompt(prompt, limit=spec.max_position_embeddings, vocab_size=spec.vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    room = min(max(lengths) + count, spec.max_position_embeddings)
    texts: list[list[int]] = [list(prompt) for prompt in prompts]
    left = {index for index, length in enumerate(lengths) if count > 0 and length < room}
    with ExitStack() as stack:
        progress = None
        if use_cache and left and can_cache(chunks):
            progress = stack.enter_context(cached(chunks, samples=len(prompts), length=room))
        fresh = True
        while left:
            tokens = _next_tokens(chunks, runtime, texts, None if fresh else progress)
            fresh = False
            for index, token in enumerate(tokens):
                texts[index].append(token)
                new = texts[index][lengths[index] :]
                if index in left and (finished(index, new) or len(new) == count or len(texts[index]) == room):
                    left.remove(index)
                elif index not in left:
                    texts[index].pop()
    return [text[length:] for text, length in zip(texts, lengths, strict=True)]


def check_prompt(tokens: Sequence[int], *, limit: int, vocab_size: int) -> None:
    """Refuse a prompt that a model cannot go on from.

    Raises:
        DataError: It is empty, longer than the model's context `limit`, or has tokens outside the vocabulary.
    """
    if not tokens or len(tokens) > limit:
        raise DataError(f"prompt of {len(tokens)} tokens", rule=f"between 1 and {limit}")
    if not all(0 <= token < vocab_size for token in tokens):
        raise DataError(
            "prompt: holds tokens outside the model's vocabulary",
            rule=f"below {vocab_size}",
            remedy="use the model's own tokenizer",
        )


def _next_tokens(
    chunks: Sequence[nn.Module], runtime: Runtime, texts: Sequence[Sequence[int]], progress: Progress | None
) -> list[int]:
    """The likeliest token after each text, on all ranks of a copy of the model.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        texts: Token ids so far.
        progress: Of a cache that holds all tokens of the texts but the last ones; None passes over the complete texts.
    """
    lengths = torch.tensor([len(text) for text in texts])
    if progress is None:
        longest = int(lengths.max())
        longest += -longest % length_step(runtime)  # causal: what follows is not seen
        tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        last = lengths - 1
    else:
        tokens = torch.tensor([[text[-1]] for text in texts])
        progress.move_to((lengths - 1).unsqueeze(1).to(runtime.device), int(lengths.max()))
        last = torch.zeros_like(lengths)
    batch = MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def likeliest(hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        found = _likeliest(chunks[-1], hidden_SBH, micro_batch.position_ids[0], last.to(hidden_SBH.device), runtime)
        nothing = hidden_SBH.new_zeros(())
        return LossResult(nothing, torch.ones_like(nothing), {"tokens_B": found})

    # The interleaved schedule takes micro-batches by the pipeline size; they leave the same in the cache.
    copies = runtime.parallel.pipeline if runtime.parallel.virtual_pipeline is not None else 1
    with returning(chunks, "hidden"):
        reports = forward.run(chunks, [batch] * copies, likeliest, runtime=runtime, forward_only=True)
    chosen = torch.zeros(len(texts), dtype=torch.int64, device=runtime.device)
    if reports:
        chosen = reports[0]["tokens_B"]
    found: list[int] = sum_over(chosen, runtime.groups.pp).tolist()  # zero on all stages but the last
    return found


def _likeliest(chunk: nn.Module, hidden_SBH: Tensor, positions_S: Tensor, last_B: Tensor, runtime: Runtime) -> Tensor:
    """Id of the largest logit at one position of each sample, `[b]`; positions may be shared out over ranks."""
    model = unwrap(chunk)
    here = positions_S == last_B.unsqueeze(1)  # [b, s]
    samples = torch.arange(last_B.shape[0], device=last_B.device)
    rows = hidden_SBH[here.int().argmax(1), samples] * here.any(1, keepdim=True)
    rows = sum_over(rows, runtime.groups.cp)
    shards = gather((rows @ model.output_weight().T).float(), runtime.groups.tp)
    logits = torch.cat(list(shards), dim=-1)[:, : model.spec.vocab_size]
    return logits.argmax(-1)
