"""Tokenizers as checkpoints carry them give the ids of their own libraries, on text of any script."""

import base64
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from nemo_minitron.checkpoints.gguf_tokenizer import convert_tokenizer
from nemo_minitron.checkpoints.sentencepiece_file import read_sentencepiece
from nemo_minitron.checkpoints.sentencepiece_tokenizer import build_tokenizer
from nemo_minitron.checkpoints.sidecar import tokenizer_problem, with_tokenizer_json
from nemo_minitron.checkpoints.tekken_tokenizer import tekken_files
from nemo_minitron.errors import CheckpointError

SCRIPTS = (
    *((0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF)),
    *((0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F), (0xF00, 0xFFF), (0x10A0, 0x10FF)),
    *((0x1100, 0x11FF), (0x1200, 0x137F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F)),
    *((0x2000, 0x206F), (0xFF00, 0xFFEF), (0x300, 0x36F)),
)
BETWEEN = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\t",
    "aaaa",
    "-----",
    "hello world",
    "the quick",
    "<x>",
    "▁",
    " \n ",
    "12345",
    "'s",
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog " * 3,
    "hello world, it's a nice day; don't you think? HELLO 12345",
    "der schnelle braune Fuchs ist größer",
    "Привет мир, как дела",
    "東京は日本の首都です",
    "مرحبا بالعالم",
    "aaaa aaaaaaa ----- ----  x\n\n\ty",
] * 20
PROBE = "The 2nd naïve café isn't   worth $1,234.56!\n\n\tdef f(x): return x**2  # Привет, 東京 👋🏽 ﬁ İ\r\n"


def texts(count: int) -> list[str]:
    """Random text over more than twenty scripts, with runs, spaces and words between."""
    rng = random.Random(0)
    found = [PROBE, "", " ", "▁", "a", " a", "a ", "  a  b  "]
    while len(found) < count:
        parts = []
        for _ in range(rng.randint(1, 12)):
            low, high = rng.choice(SCRIPTS)
            parts += ["".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))), rng.choice(BETWEEN)]
        found.append("".join(parts))
    return found


COUNTS = pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
KINDS = {
    "llama 2": {"byte_fallback": True, "remove_extra_whitespaces": False, "split_digits": True},
    "mistral, more control": {"byte_fallback": True, "remove_extra_whitespaces": False, "control_symbols": ["[INST]"]},
    "gemma": {
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "user_defined_symbols": ["<x>", "\n", "\n\n", "  ", "   "],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    },
    "nemotron": {"byte_fallback": True, "user_defined_symbols": ["<x>"]},
    "no bytes": {"vocab_size": 250},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    made: dict[str, bytes] = {}

    def train(name: str, **settings: Any) -> bytes:
        if name not in made:
            wanted: dict[str, Any] = {"vocab_size": 450, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1} | settings
            sentencepiece.SentencePieceTrainer.train(
                **{"input": str(folder / "corpus.txt"), "model_prefix": str(folder / "m"), "character_coverage": 1.0},
                **{"normalization_rule_name": "identity", "minloglevel": 2, "model_type": "bpe"} | wanted,
            )
            made[name] = (folder / "m.model").read_bytes()
        return made[name]

    return train


def different(name: str, ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], count: int) -> list[str]:
    """Texts whose ids differ; says how many there are."""
    found = [text for text in texts(count) if ours(text) != theirs(text)]
    print(f"{name}: ids of {count:,} texts over {len(SCRIPTS)} ranges of Unicode, {len(found)} differ")
    return found


@COUNTS
@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_models(trained: Callable[..., bytes], kind: str, count: int) -> None:
    data = trained(kind, **KINDS[kind])
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = build_tokenizer(read_sentencepiece(data, where=kind), add_bos=False, add_eos=False, where=kind)
    assert different(f"SentencePiece, {kind}", lambda text: tokenizer.encode(text).ids, reference.encode, count) == []
    plain = "hello world, it's  a nice day"
    assert tokenizer.decode(reference.encode(plain)) == reference.decode(reference.encode(plain))
    assert tokenizer.get_vocab_size() == reference.vocab_size()


def test_unigram_models(trained: Callable[..., bytes]) -> None:
    """Of two ways to cut a run of one letter with the same score each library chooses its own: no runs here."""
    data = trained("unigram", model_type="unigram", byte_fallback=True, hard_vocab_limit=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = build_tokenizer(read_sentencepiece(data, where="u"), add_bos=False, add_eos=False, where="u")
    for text in texts(500):
        if "aaa" not in text and "---" not in text:
            assert tokenizer.encode(text).ids == reference.encode(text), text


def test_a_model_alone_becomes_what_transformers_makes_of_it(trained: Callable[..., bytes], tmp_path: Path) -> None:
    data = trained("llama 2", **KINDS["llama 2"])
    (tmp_path / "tokenizer.model").write_bytes(data)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = with_tokenizer_json(files, where="x")
    tokenizer = Tokenizer.from_str(made["tokenizer.json"].decode())
    for text in ("hello world", "der Fuchs  12", "東京"):
        assert tokenizer.encode(text).ids == theirs(text).input_ids
        assert theirs(text).input_ids[0] == 1
    without = with_tokenizer_json({"tokenizer.model": data}, where="x")
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert Tokenizer.from_str(without["tokenizer.json"].decode()).encode("hello").ids == reference.encode("hello")
    assert json.loads(without["tokenizer_config.json"])["eos_token"] == "</s>"


def test_a_damaged_model_is_carried_and_told(trained: Callable[..., bytes]) -> None:
    data = trained("llama 2", **KINDS["llama 2"])
    for damaged in (b"pieces", data[:-3], data[:100] + b"\xff" * 50):
        files = {"tokenizer.model": damaged}
        assert with_tokenizer_json(files, where="x") == files
        assert "tokenizer.model" in tokenizer_problem(files, where="x")
    assert tokenizer_problem({"tokenizer.model": data}, where="x") == ""
    assert "no tokenizer.json" in tokenizer_problem({}, where="x")
    words = trained("words", model_type="word", vocab_size=20, hard_vocab_limit=False)
    with pytest.raises(CheckpointError, match="model_type = word"):
        read_sentencepiece(words, where="x")


# -- byte-level BPE in GGUF files ------------------------------------------------------------------------------------

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published(pre: str) -> Tokenizer:
    """A tokenizer built as `tokenizer.json` of the published models is."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    patterns = {"llama-bpe": _LLAMA_3, "qwen2": _LLAMA_3.replace("{1,3}", ""), "tekken": _TEKKEN}
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre == "smollm":
        cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        cut = [
            pre_tokenizers.Split(Regex(patterns[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    for word in ("Ġunreachable", "Ġpieces"):  # tokens that no merges lead to: ignore_merges alone finds them
        data["model"]["vocab"][word] = len(data["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    if pre in ("llama-bpe", "tekken"):
        begin = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
        )
    return tokenizer


def in_gguf(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """Metadata as llama.cpp's converter writes it, without `add_bos_token`."""
    data = json.loads(tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = {item["content"] for item in data["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    }


def converted(metadata: dict[str, Any]) -> Tokenizer:
    files = convert_tokenizer(Path("m.gguf"), metadata.get)
    return Tokenizer.from_str(files["tokenizer.json"].decode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_bos_token", "false"),
        ("add_bos_token", 0),
        ("add_eos_token", 1.0),
        ("bos_token_id", 0.0),
        ("eos_token_id", "1"),
    ],
)
def test_flags_and_ids_of_another_type_are_refused(key: str, value: object) -> None:
    """llama.cpp refuses them too: a text "false" is true to Python."""
    with pytest.raises(CheckpointError, match=f"tokenizer.ggml.{key} = "):
        converted(in_gguf(published("smollm"), "smollm") | {f"tokenizer.ggml.{key}": value})


@COUNTS
@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "tekken"])
def test_byte_level_tokenizers_of_gguf_files(pre: str, count: int) -> None:
    reference = published(pre)
    ours = converted(in_gguf(reference, pre))
    ids = [lambda text, which=which: which.encode(text).ids for which in (ours, reference)]
    assert different(f"GGUF, {pre}", *ids, count) == []
    text = "an unreachable token"
    assert ours.encode(text).ids == reference.encode(text).ids
    assert ours.decode(ours.encode(PROBE).ids) == reference.decode(reference.encode(PROBE).ids)


@COUNTS
def test_sentencepiece_tokenizers_of_gguf_files(trained: Callable[..., bytes], count: int) -> None:
    """BOS comes first where no key says otherwise, and a space too, as in llama.cpp."""
    for kind in ("llama 2", "gemma"):
        reference = sentencepiece.SentencePieceProcessor(model_proto=trained(kind, **KINDS[kind]))
        metadata = spm_in_gguf(reference) | ({"tokenizer.ggml.add_space_prefix": False} if kind == "gemma" else {})
        ours = converted(metadata)
        expected = lambda text, theirs=reference: [theirs.bos_id(), *theirs.encode(text)]  # noqa: E731
        found = lambda text, which=ours: which.encode(text).ids  # noqa: E731
        assert different(f"GGUF, SentencePiece, {kind}", found, expected, count) == []
        ours = converted(metadata | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
        assert ours.encode("hello").ids == [*reference.encode("hello"), reference.eos_id()]


def spm_in_gguf(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    def kind(index: int) -> int:
        if model.is_unknown(index):
            return 2
        if model.is_control(index):
            return 3
        piece = model.id_to_piece(index)
        return 6 if model.is_byte(index) else 4 if piece in ("<x>", "\n", "\n\n", "▁▁", "▁▁▁") else 1

    ids = range(model.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [model.get_score(index) for index in ids],
        "tokenizer.ggml.token_type": [kind(index) for index in ids],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.pre": "gpt-9"}, r"tokenizer\.ggml\.pre = 'gpt-9'"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model = 't5'"),
        ({"tokenizer.ggml.tokens": []}, "has no tokenizer"),
        ({"tokenizer.ggml.token_type": None}, r"tokenizer\.ggml\.token_type is missing"),
        ({"tokenizer.ggml.token_type": [1]}, r"tokenizer\.ggml\.token_type has 1 values"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["q"]}, r"tokenizer\.ggml\.merges holds 'q'"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, r"tokenizer\.ggml\.eos_token_id = 10000"),
        ({"tokenizer.ggml.bos_token_id": None}, "BOS is to be added"),
    ],
)
def test_what_gguf_tokenizers_may_not_say(change: dict[str, Any], words: str) -> None:
    metadata = in_gguf(published("llama-bpe"), "llama-bpe") | change
    with pytest.raises(CheckpointError, match=words):
        converted({key: value for key, value in metadata.items() if value is not None})


def test_a_missing_pre_is_the_default_of_llama_cpp() -> None:
    """Its four patterns, one after the other: punctuation, words, numbers, three digits."""
    metadata = in_gguf(published("smollm"), "smollm")
    del metadata["tokenizer.ggml.pre"]
    pieces = converted(metadata).pre_tokenizer.pre_tokenize_str("a 12345's, x")
    assert [piece.replace("Ġ", " ") for piece, _ in pieces] == ["a", " ", "123", "45", "'", "s", ",", " x"]


# -- tekken ----------------------------------------------------------------------------------------------------------


def tekken(special: int = 20) -> tuple[bytes, dict[bytes, int]]:
    """A file as Mistral writes it, of the byte strings that a trained tokenizer joins, by rank."""
    data = json.loads(published("tekken").to_str())["model"]
    letters = {letter: byte for byte, letter in _letters().items()}
    ranks: dict[bytes, int] = {bytes([byte]): byte for byte in range(256)}
    for left, right in data["merges"]:
        ranks.setdefault(bytes(letters[letter] for letter in left + right), len(ranks))
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    config = {"pattern": _TEKKEN, "num_vocab_tokens": len(ranks), "default_vocab_size": len(ranks) + special}
    content = {"config": config | {"default_num_special_tokens": special, "version": "v3"}, "vocab": vocabulary}
    return json.dumps(content).encode(), ranks


def _letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def joined(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as tiktoken defines it: the lowest rank of two neighbours' union first, from the left."""
    parts = [bytes([byte]) for byte in piece]
    if piece in ranks:
        return [ranks[piece]]
    while len(parts) > 1:
        found = [
            (ranks[left + right], index) for index, (left, right) in enumerate(pairwise(parts)) if left + right in ranks
        ]
        if not found:
            break
        _, index = min(found)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return [ranks[part] for part in parts]


def letters_of_one_table() -> set[str]:
    """Characters of the texts that are letters, marks or numbers of a kind to one of two libraries alone."""
    every = "".join(chr(code) for low, high in SCRIPTS for code in range(low, high + 1))
    found: set[str] = set()
    for kind in ("L", "N", "M", "Lu", "Ll", "Lt", "Lm", "Lo"):
        pieces = pre_tokenizers.Split(Regex(rf"\p{{{kind}}}"), "removed").pre_tokenize_str(every)
        found |= set("".join(piece for piece, _ in pieces)) ^ set(regex.sub(rf"\p{{{kind}}}", "", every))
    return found


@COUNTS
def test_tekken_files_are_what_transformers_makes_of_them(count: int, tmp_path: Path) -> None:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    content = json.loads(tekken()[0])
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    content["special_tokens"] = [{"rank": rank, "token_str": name} for rank, name in enumerate(names)]
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    theirs = MistralConverter(str(tmp_path / "tekken.json")).converted()
    files = tekken_files((tmp_path / "tekken.json").read_bytes(), where="tekken.json")
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    with_bos = lambda text: [1, *theirs.encode(text).ids]  # noqa: E731 - which mistral-common adds, not the file
    assert different("tekken, of transformers", lambda text: ours.encode(text).ids, with_bos, count) == []
    assert ours.encode("[INST]a").ids == with_bos("[INST]a")
    assert ours.get_vocab() == theirs.get_vocab()


@COUNTS
def test_tekken_files(count: int) -> None:
    data, ranks = tekken()
    files = tekken_files(data, where="tekken.json")
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    cut = regex.compile(_TEKKEN)

    def reference(text: str) -> list[int]:
        return [1] + [20 + rank for piece in cut.findall(text) for rank in joined(piece.encode(), ranks)]

    unlike = letters_of_one_table()
    differing = different("tekken, by its definition", lambda text: ours.encode(text).ids, reference, count)
    left_out = [text for text in texts(count) if unlike & set(text)]
    print(f"{len(left_out)} texts hold one of {len(unlike)} letters that only one of two Unicode tables has")
    assert set(differing) <= set(left_out)
    assert len(left_out) < count // 20
    assert ours.encode(PROBE).ids == reference(PROBE)
    assert ours.decode(reference(PROBE)) == PROBE
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    made = with_tokenizer_json({"tekken.json": data}, where="x")
    assert made["tokenizer.json"] == files["tokenizer.json"]
    with pytest.raises(CheckpointError, match="default_num_special_tokens"):
        tekken_files(data.replace(b'"rank": 3,', b'"rank": 9999,'), where="x")
    with pytest.raises(CheckpointError, match="not a tekken file"):
        tekken_files(b'{"config": {}}', where="x")


@COUNTS
def test_tiktoken_files_are_what_transformers_makes_of_them(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    _, ranks = tekken()
    data = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    size = len(ranks)
    added = {size: "<|begin|>", size + 1: "<|end|>", size + 4: "<|turn|>"}
    names = [added.get(index, f"<|reserved_token_{index}|>") for index in range(size, size + 5)]
    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda path: ranks))
    theirs = TikTokenConverter("tokenizer.model", extra_special_tokens=names).converted()
    config = {
        "added_tokens_decoder": {str(key): {"content": name, "special": True} for key, name in added.items()},
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|end|>"},
    }
    files = {"tokenizer.model": data, "tokenizer_config.json": json.dumps(config).encode()}
    assert tokenizer_problem(files, where="x") == ""
    ours = Tokenizer.from_str(with_tokenizer_json(files, where="x")["tokenizer.json"].decode())
    found = [lambda text, which=which: which.encode(text).ids for which in (ours, theirs)]
    assert different("tiktoken, of transformers", *found, count) == []
    assert ours.encode("<|turn|>a").ids == theirs.encode("<|turn|>a").ids == [size + 4, 97]
    assert ours.get_vocab() == theirs.get_vocab()
    files["tokenizer_config.json"] = json.dumps(config | {"add_bos_token": True, "add_eos_token": True}).encode()
    both = Tokenizer.from_str(with_tokenizer_json(files, where="x")["tokenizer.json"].decode())
    assert both.encode("a").ids == [size, 97, size + 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer_config.json": b"{}"}, "names no special tokens"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"1": {"content": "<s>"}}}'}, "'<s>' at 1"),
        ({"tokenizer.model": b"YQ== 0\nYg== 2\n"}, "ranks leave a gap"),
        ({"tokenizer.model": b"YQ== 0\nYg==\n"}, "not base64 and a rank"),
    ],
)
def test_tiktoken_files_that_are_refused(change: dict[str, bytes], words: str) -> None:
    config = b'{"added_tokens_decoder": {"2": {"content": "<s>"}}}'
    files = {"tokenizer.model": b"YQ== 0\nYg== 1\n", "tokenizer_config.json": config}
    assert tokenizer_problem(files, where="x") == ""
    assert words in tokenizer_problem(files | change, where="x")


def test_gguf_enumerations_are_those_of_the_pieces() -> None:
    from nemo_minitron.checkpoints.sentencepiece_file import Kind

    assert {kind.name: int(kind) for kind in Kind} == {kind.name: int(kind) for kind in gguf.TokenType}
