"""A SentencePiece model as a tokenizer of the `tokenizers` library, id for id."""

import re
from collections.abc import Mapping
from typing import Any

from nemo_minitron.checkpoints.sentencepiece_file import Kind, SentencePieces, read_sentencepiece
from nemo_minitron.checkpoints.special_ids import json_bytes
from nemo_minitron.errors import CheckpointError

_SPACE = "▁"


def build_tokenizer(model: SentencePieces, *, add_bos: bool, add_eos: bool, where: str) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of the model.

    Control pieces become special tokens. User-defined pieces are cut out of the text first, as SentencePiece does.

    Raises:
        CheckpointError: A piece occurs twice, or BOS or EOS is to be added and there is none.
    """
    from tokenizers import AddedToken, Tokenizer, decoders

    texts = [piece.text for piece in model.pieces]
    if len(set(texts)) != len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise CheckpointError(f"{where}: piece {twice!r} occurs twice", rule="one id for a piece")
    tokenizer = Tokenizer(_unigram(model) if model.unigram else _bpe(model))
    if (normalizer := _normalizer(model)) is not None:
        tokenizer.normalizer = normalizer
    if (cut := _pre_tokenizer(model)) is not None:
        tokenizer.pre_tokenizer = cut
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else [])])
    special = [piece.text for piece in model.pieces if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.post_processor = around(
        {name: (texts[index], index) for name, index in model.ids.items() if index is not None},
        add_bos=add_bos,
        add_eos=add_eos,
        where=where,
    )
    return tokenizer


def around(special: Mapping[str, tuple[str, int]], *, add_bos: bool, add_eos: bool, where: str) -> Any:
    """Puts BOS before and EOS behind a sequence.

    `special` has token and id by "bos" and "eos".

    Raises:
        CheckpointError: There is no such token.
    """
    from tokenizers.processors import TemplateProcessing

    wanted = [name for name, on in (("bos", add_bos), ("eos", add_eos)) if on]
    if absent := [name for name in wanted if name not in special]:
        raise CheckpointError(f"{where}: {absent[0].upper()} is to be added to every text, and there is no such token")
    before = [f"{special['bos'][0]}:{{i}}"] if add_bos else []
    behind = [f"{special['eos'][0]}:{{i}}"] if add_eos else []

    def sequence(letter: str, number: int) -> list[str]:
        return [item.format(i=number) for item in (*before, f"${letter}:{{i}}", *behind)]

    return TemplateProcessing(
        single=sequence("A", 0), pair=sequence("A", 0) + sequence("B", 1), special_tokens=[special[n] for n in wanted]
    )


def tokenizer_json(files: Mapping[str, bytes], *, where: str) -> dict[str, bytes]:
    """Hugging Face files for a checkpoint whose only tokenizer is a `tokenizer.model`.

    BOS and EOS are added where `tokenizer_config.json` says so (`add_bos_token`, `add_eos_token`); else the ids are
    those of the model alone, as in NeMo and in transformers 5.

    Returns:
        `tokenizer.json`, and a `tokenizer_config.json` if there was none.

    Raises:
        CheckpointError: The model is damaged, or of a kind that is not supported.
    """
    import json

    model = read_sentencepiece(files["tokenizer.model"], where=where)
    config = json.loads(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    config = config if isinstance(config, dict) else {}
    first, last = bool(config.get("add_bos_token")), bool(config.get("add_eos_token"))
    tokenizer = build_tokenizer(model, add_bos=first, add_eos=last, where=where)
    _add_tokens(tokenizer, config, len(model.pieces), where)
    found = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    if "tokenizer_config.json" not in files:
        named = {f"{name}_token": model.pieces[i].text for name, i in model.ids.items() if i is not None}
        found["tokenizer_config.json"] = json_bytes(
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
        )
    return found


def _add_tokens(tokenizer: Any, config: Mapping[str, Any], size: int, where: str) -> None:
    """Tokens that `tokenizer_config.json` adds behind the pieces, at the ids that it names."""
    from tokenizers import AddedToken

    added = config.get("added_tokens_decoder") or {}
    for key in sorted(added, key=int):
        token = added[key]
        known = tokenizer.id_to_token(int(key))
        if int(key) < size and known != token["content"]:
            raise CheckpointError(
                f"{where}: piece {key} is {known!r}, but added_tokens_decoder of tokenizer_config.json says "
                f"{token['content']!r}",
                rule="one token for an id",
            )
        flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        item = AddedToken(token["content"], special=bool(token.get("special", False)), **flags)
        (tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens)([item])
        if tokenizer.token_to_id(token["content"]) != int(key):
            raise CheckpointError(f"{where}: added token {token['content']!r} has no place at id {key}")


def _unigram(model: SentencePieces) -> Any:
    from tokenizers import models

    lowest = min(piece.score for piece in model.pieces)
    # Control pieces are never found in a text; a score below any path's makes sure of it.
    scores = [
        (piece.text, 0.0 if piece.kind is Kind.USER_DEFINED else piece.score if _findable(piece.kind) else lowest - 1e6)
        for piece in model.pieces
    ]
    return models.Unigram(scores, unk_id=model.ids["unk"], byte_fallback=model.byte_fallback)


def _findable(kind: Kind) -> bool:
    return kind in (Kind.NORMAL, Kind.USER_DEFINED)


def _bpe(model: SentencePieces) -> Any:
    from tokenizers import models

    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    unknown = model.ids["unk"]
    return models.BPE(
        ids,
        merges_of(model),
        unk_token=None if unknown is None else model.pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # A user-defined piece that has been cut out of the text is not spelled from its characters.
        ignore_merges=any(piece.kind is Kind.USER_DEFINED for piece in model.pieces),
    )


def merges_of(model: SentencePieces) -> list[tuple[str, str]]:
    """Merges in order: SentencePiece joins the two neighbours whose union has the highest score."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind is Kind.NORMAL}
    order = sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text])
    merges: list[tuple[str, str]] = []
    for text in order:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


def _normalizer(model: SentencePieces) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
        if model.remove_extra_whitespaces:  # of a text's end it removes that character too
            steps.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    return normalizers.Sequence(steps) if steps else None


def _pre_tokenizer(model: SentencePieces) -> Any:
    """Cuts user-defined pieces out of the text, the longest first."""
    from tokenizers import Regex, pre_tokenizers

    pieces = [piece.text for piece in model.pieces if piece.kind is Kind.USER_DEFINED]
    if not pieces:
        return None
    pattern = "|".join(re.escape(text).replace("\\ ", " ") for text in sorted(pieces, key=len, reverse=True))
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")
