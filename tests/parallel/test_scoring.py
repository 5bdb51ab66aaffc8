"""Nats of documents in overlapping windows, against transformers in float64, token by token."""

from pathlib import Path

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.errors import DataError
from tests.ranks import run_on_ranks
from tests.support.expert_models import loaded, write_experts
from tests.tiny import write_llama

LENGTH, STRIDE, BEGIN, VOCABULARY = 12, 5, 0, 251
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2 pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "dp2": (2, ParallelConfig()),
}


def documents() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (count,), generator=draw).tolist() for count in (1, 11, 12, 13, 40, 7, 31)]


def spelled(tokens: list[int], *, skip_special_tokens: bool) -> str:
    return str(tokens)


def nats_at(folder: Path, parallel: ParallelConfig) -> tuple[list[float], list[str]]:
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.evaluation.held_out import overlapping
    from nemo_minitron.evaluation.leading import led
    from nemo_minitron.evaluation.scoring import Continuation, Prompt, TokenScorer
    from nemo_minitron.models.gpt import MegatronGPTModel

    model = MegatronGPTModel.restore_from(folder, settings=ModelSettings(parallel=parallel, seed=0))
    scorer = TokenScorer(model.chunks, model.runtime, batch_size=3, decode=spelled, ends=())
    windows = [list(overlapping(text, begin=BEGIN, length=LENGTH, stride=STRIDE)) for text in documents()]
    scores = iter(scorer.score([window for own in windows for window in own]))
    refused = []
    for context, tokens in (((), (1,)), ((1,), tuple(range(1, 40))), ((1,), (VOCABULARY,))):
        try:
            scorer.score([Continuation(context, tokens)])
        except DataError as error:
            refused.append(error.what)
    for prompt in ((VOCABULARY,), ()):
        try:
            led(scorer, lambda leader, prompt=prompt: leader.generate([Prompt(prompt, (), 1)]))
        except DataError as error:
            refused.append(error.what)
    return [-sum(next(scores).logprob for _ in own) for own in windows], refused


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("model") / "hf"
    model = write_llama(folder, vocab_size=VOCABULARY, max_position_embeddings=16).double()
    sums = []
    for text in documents():
        total = 0.0
        for place, token in enumerate(text):
            # The window that predicts this token ends at the next multiple of the stride behind the first window.
            steps = max(0, -(-(place + 1 - LENGTH) // STRIDE))
            end = min(LENGTH + steps * STRIDE, len(text))
            first = max(0, end - LENGTH)
            read = [BEGIN, *text][first : place + 1]
            with torch.no_grad():
                logits = model(torch.tensor([read])).logits[0, -1]
            total -= torch.log_softmax(logits, -1)[token].item()
        sums.append(total)
    return folder, sums


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_what_transformers_measures(layout, expected):
    folder, sums = expected
    world_size, parallel = LAYOUTS[layout]
    for found, refused in run_on_ranks(world_size, nats_at, folder, parallel):
        assert found == pytest.approx(sums, rel=1e-5)
        assert len(refused) == 5
        assert "0 tokens and 1 to be scored" in refused[0]
        assert "39 to be scored" in refused[1]
        assert refused[3:] == ["prompt: holds tokens outside the model's vocabulary", "prompt of 0 tokens"]


PROMPTS, ADDED = ([3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]), 4


def with_experts(folder: Path) -> tuple[list[float], list[str]]:
    """Two data-parallel ranks that share experts, and numbers of requests that they could not share alike."""
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.evaluation.scoring import Continuation, Prompt, TokenScorer
    from nemo_minitron.models.gpt import MegatronGPTModel

    settings = ModelSettings(parallel=ParallelConfig(expert=2), seed=0)
    model = MegatronGPTModel.restore_from(folder, settings=settings)
    scorer = TokenScorer(model.chunks, model.runtime, batch_size=2, decode=spelled, ends=())
    texts = [tuple(text) for text in documents() if len(text) > 1]
    scores = scorer.score([Continuation(text[:1], text[1:]) for text in texts])
    return [score.logprob for score in scores], scorer.generate([Prompt(tuple(p), (), ADDED) for p in PROMPTS])


def test_copies_that_share_experts_measure_what_transformers_measures(tmp_path):
    write_experts(tmp_path / "hf", "qwen3_moe")
    model = loaded(tmp_path / "hf")
    expected, texts = [], []
    with torch.no_grad():
        for text in (text for text in documents() if len(text) > 1):
            logs = model(torch.tensor([text[:-1]])).logits[0].double().log_softmax(-1)
            expected.append(sum(float(logs[place, token]) for place, token in enumerate(text[1:])))
        for prompt in PROMPTS:
            tokens = list(prompt)
            for _ in range(ADDED):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            texts.append(str(tokens[len(prompt) :]))
    for found, generated in run_on_ranks(2, with_experts, tmp_path / "hf"):
        assert found == pytest.approx(expected, rel=1e-5)
        assert generated == texts
