"""Greedy text, to see for oneself what a model has kept. Works at every layout; made for samples, not for speed."""

from collections.abc import Sequence

import torch
from torch import nn

from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.logits import gather_logits
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime


def greedy(
    chunks: Sequence[nn.Module], runtime: Runtime, prompt: Sequence[int], count: int, *, end: int | None = None
) -> list[int]:
    """The likeliest next token, `count` times or until `end`; the same list on every rank.

    Every rank calls it with the same arguments. Each token costs one pass over the whole text so far (no cache), and
    stops early where the model's context is full.

    Args:
        chunks: This rank's model chunks.
        runtime: The running layout.
        prompt: Token ids to go on from.
        count: Most tokens to add.
        end: Token that ends the text, left out of the result; None goes on in any case.

    Returns:
        The new tokens, without the prompt. Of equally likely tokens the lower id is taken.

    Raises:
        DataError: The prompt is empty, holds a token outside the vocabulary, or does not fit into the model's context.
    """
    spec = unwrap(chunks[0]).spec
    tokens = list(prompt)
    if not tokens or len(tokens) > spec.max_position_embeddings:
        raise DataError(f"prompt of {len(tokens)} tokens", rule=f"between 1 and {spec.max_position_embeddings}")
    if not all(0 <= token < spec.vocab_size for token in tokens):
        raise DataError(
            "prompt: holds tokens outside the model's vocabulary",
            rule=f"below {spec.vocab_size}",
            remedy="use the model's own tokenizer",
        )
    for _ in range(min(count, spec.max_position_embeddings - len(tokens))):
        last = len(tokens) - 1
        logits = gather_logits(chunks, torch.tensor([tokens]), runtime, spec.vocab_size, positions=[last])
        token = int(logits[0, 0].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
