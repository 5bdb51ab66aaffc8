"""Where a generated text ends: at stop sequences, special tokens among them, and at every token that ends a text."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_minitron.evaluation import scoring
from nemo_minitron.evaluation.generate import end_tokens
from nemo_minitron.evaluation.scoring import Prompt, TokenScorer
from nemo_minitron.megatron.runtime import Runtime
from tests.support.small_spec import SPEC

WORDS = ("</s>", "<|im_end|>", "<|eot_id|>", "one", "two", "three", "stop")
END, TURN, EOT, ONE, TWO, THREE, STOP = range(len(WORDS))
SCRIPT = [ONE, TWO, TURN, THREE, STOP, EOT, ONE, END, TWO]
"""What the model would write if nothing ended it."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = {"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **more)


@pytest.fixture
def scorer(tokenizer: PreTrainedTokenizerFast, here: Runtime, monkeypatch: pytest.MonkeyPatch) -> TokenScorer:
    def generate(
        chunks: object,
        runtime: object,
        prompts: Sequence[object],
        count: int,
        *,
        finished: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        texts = []
        for sample in range(len(prompts)):
            size = next(size for size in range(1, len(SCRIPT) + 1) if finished(sample, SCRIPT[:size]) or size == count)
            texts.append(SCRIPT[:size])
        return texts

    monkeypatch.setattr(scoring, "generate", generate)
    monkeypatch.setattr(scoring, "unwrap", lambda chunk: chunk)
    chunk = SimpleNamespace(spec=SPEC)
    return TokenScorer([chunk], here, batch_size=8, decode=tokenizer.decode, ends={END})


@pytest.mark.parametrize(
    ("until", "count", "text"),
    [
        (("<|im_end|>",), 9, "one two"),
        (("stop", "<|im_end|>"), 9, "one two"),
        (("stop",), 9, "one two three"),
        (("<|eot_id|>",), 9, "one two three stop"),
        ((), 9, "one two three stop one"),
        (("</s>",), 9, "one two three stop one"),
        (("<|im_end|>",), 2, "one two"),
        (("",), 4, "one two three"),
    ],
)
def test_a_text_ends_before_the_first_stop_sequence(
    scorer: TokenScorer, until: tuple[str, ...], count: int, text: str
) -> None:
    [found] = scorer.generate([Prompt((1,), until, count)])
    assert found.strip() == text


def test_any_of_the_tokens_that_end_a_text_ends_it(
    scorer: TokenScorer, tokenizer: PreTrainedTokenizerFast, here: Runtime
) -> None:
    chat = TokenScorer(scorer.chunks, here, batch_size=8, decode=tokenizer.decode, ends={END, TURN})
    assert chat.generate([Prompt((1,), (), 9)]) == ["one two"]
    words = TokenScorer(scorer.chunks, here, batch_size=8, decode=tokenizer.decode, ends={END, STOP})
    assert words.generate([Prompt((1,), (), 9)]) == ["one two three"], "no special token, and no part of the text"


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config.json": {"eos_token_id": [1, 2]}}, {0, 1, 2}),
        ({"generation_config.json": {"eos_token_id": 2}}, {0, 2}),
        ({"generation_config.json": {"eos_token_id": [1]}, "minitron_ids.json": {"eos_token_id": 2}}, {0, 1}),
        ({"generation_config.json": {"top_k": 5}, "minitron_ids.json": {"eos_token_id": 2}}, {0, 2}),
        ({"generation_config.json": {"eos_token_id": "none"}}, {0}),
        ({}, {0}),
    ],
)
def test_ends_are_the_tokenizer_s_and_those_of_the_generation_defaults(
    tokenizer: PreTrainedTokenizerFast, files: dict[str, object], ends: set[int]
) -> None:
    assert end_tokens(tokenizer, {name: json.dumps(data).encode() for name, data in files.items()}) == ends
