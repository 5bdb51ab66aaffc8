"""What is predicted and how many bytes it is, against texts whose bytes are counted directly."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_minitron.evaluation import held_out
from nemo_minitron.evaluation.perplexity import bits_per_byte
from nemo_minitron.stages.evaluate import continued
from tests.tiny import sentences, write_tokenizer

TEXTS = ["the river of the city.", "naïve café, 東京 👋🏽", "two  spaces\n\tand a tab", sentences(3, 4)]


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory) -> PreTrainedTokenizerFast:
    """Byte-level, with all 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentences(1, 40)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="module")
def by_pieces() -> PreTrainedTokenizerFast:
    """As SentencePiece cuts: a mark for each space, bytes for what has no piece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:2], show_progress=False)
    trainer.special_tokens = special[:2]
    tokenizer.train_from_iterator([sentences(1, 40)], trainer)
    vocabulary = {**{name: number for number, name in enumerate(special)}}
    for piece in tokenizer.get_vocab():
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(pair) for pair in _merges(tokenizer)]
    tokenizer.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


@pytest.mark.parametrize("kind", ["by_bytes", "by_pieces"])
def test_the_bytes_of_a_texts_tokens_add_up_to_the_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    sizes = held_out.bytes_of_tokens(tokenizer, len(tokenizer))
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert sizes[tokens].sum() == len(text.encode()), text
    assert len(tokens) < len(text.encode()) / 2, "tokens of several bytes were met"
    assert sizes[tokenizer.eos_token_id] == 0


def test_a_vocabulary_that_is_padded_or_cut_has_a_size_for_each_token(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    assert len(held_out.bytes_of_tokens(tokenizer, 300)) == 300
    assert len(held_out.bytes_of_tokens(tokenizer, 100)) == 100


@pytest.mark.parametrize(("count", "length", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (50, 8, 8)])
def test_windows_predict_every_token_once_and_keep_their_distance(count, length, stride):
    tokens = list(range(100, 100 + count))
    windows = list(held_out.overlapping(tokens, begin=1, length=length, stride=stride))
    assert [token for window in windows for token in window.tokens] == tokens
    text = [1, *tokens]
    done = 0
    for window in windows:
        read = list(window.inputs)
        done += len(window.tokens)
        assert len(read) <= length
        assert read == text[done - len(read) : done], "the model reads what stands just before the last token"
        if done > length:
            assert len(window.context) > length - stride
    assert windows[0].context == (1,)


def test_a_guess_over_all_bytes_costs_eight_bits():
    measured = bits_per_byte([3 * math.log(256), 5 * math.log(256)], [3, 5])
    assert measured.value == pytest.approx(8)
    assert measured.standard_error == pytest.approx(0, abs=1e-9)
    assert measured.bytes == 8
    assert math.isnan(bits_per_byte([], []).value)


def test_the_error_of_bits_per_byte_is_the_spread_over_resampled_documents():
    draw = np.random.default_rng(0)
    sizes = draw.integers(50, 500, 300)
    nats = sizes * draw.normal(0.7, 0.2, 300)
    chosen = draw.integers(0, 300, (2000, 300))
    spread = (nats[chosen].sum(1) / sizes[chosen].sum(1)).std() / math.log(2)
    assert bits_per_byte(nats.tolist(), sizes.tolist()).standard_error == pytest.approx(spread, rel=0.08)


def test_a_space_that_the_tokenizer_adds_is_none_of_the_text(by_pieces, by_bytes):
    """As Llama 2's: a space before every text, which its decoder takes off."""
    backend = Tokenizer.from_str(by_pieces.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    sizes = held_out.bytes_of_tokens(adding, len(adding))
    added = held_out.added_bytes(adding, sizes)
    assert added == 1
    for text in TEXTS:
        tokens = adding.encode(text, add_special_tokens=False)
        assert sizes[tokens].sum() - added == len(text.encode()), text
    for plain in (by_pieces, by_bytes):
        assert held_out.added_bytes(plain, held_out.bytes_of_tokens(plain, len(plain))) == 0


def test_what_a_model_adds_to_a_prompt_keeps_its_first_space(by_pieces):
    backend = Tokenizer.from_str(by_pieces.backend_tokenizer.to_str())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    stripping = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    prompt, new = (stripping.encode(text, add_special_tokens=False) for text in ("The city", " begins here"))
    assert stripping.decode(new) == "begins here"
    assert continued(stripping, prompt, new) == " begins here"
