"""The data stage's speed against what the `tokenizers` library alone reaches on as many threads.

    python -m benchmarks.tokenize_jsonl --tokenizer FOLDER --megabytes 16 --threads 1 --rounds 3

One side is everything the stage does from JSONL to `.bin/.idx` (survey, reading, JSON, checks, splits, tokens, shards,
merging, digests, start of worker processes); the other is `encode_batch_fast` of the same texts, already in memory, and
nothing else. Both take turns; the result is the median of each and of their ratios, in wall time and in processor time
of this process and its children, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

_WORDS = 30_000
_PROBE = 16
"""Megabytes."""
_SLOWER = 0.8
"""Of the library's speed, at least, for planning."""


def write_corpus(path: Path, megabytes: float, source: Path | None) -> list[str]:
    """JSONL of about so many megabytes: paragraphs of a text file, drawn at random, or words made of syllables."""
    rng = random.Random(1)
    if source is None:
        syllables = [
            first + second for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er", "st")
        ]
        vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(_WORDS)]
        weights = [1 / rank for rank in range(1, _WORDS + 1)]
        pieces = [" ".join(rng.choices(vocabulary, weights, k=60)).capitalize() + "." for _ in range(2000)]
    else:
        pieces = [piece for piece in source.read_text(encoding="utf-8").split("\n\n") if len(piece) > 100]
    texts: list[str] = []
    size = 0.0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            # Documents are unlike each other, so that a cache of words helps as much as it would in earnest.
            texts.append("\n\n".join(rng.sample(pieces, k=min(len(pieces), rng.randint(2, 12)))))
            size += len(texts[-1].encode())
            file.write(json.dumps({"id": len(texts), "text": texts[-1]}, ensure_ascii=False) + "\n")
    return texts


def _now() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


def _since(began: tuple[float, float]) -> tuple[float, float]:
    wall, processor = _now()
    return wall - began[0], processor - began[1]


def stage_seconds(corpus: Path, definition: str, folder: Path, threads: int) -> tuple[float, float]:
    """Wall and processor time from JSONL to token files."""
    from nemo_minitron.config.run import DataConfig
    from nemo_minitron.data.encoder import TextEncoder
    from nemo_minitron.data.merge import merge
    from nemo_minitron.data.shard_pool import make_shards, prepare
    from nemo_minitron.data.shards import ShardJob
    from nemo_minitron.data.survey import survey

    shutil.rmtree(folder, ignore_errors=True)
    began = _now()
    encoder = TextEncoder(definition, 0, 1 << 20)
    job = ShardJob(survey([corpus]).files, "text", 200, 1, encoder, "int32", folder / "shards")
    prepare(job)
    shards = make_shards(job, threads, lambda unit, parts: None)
    merge(shards, DataConfig(sources=(str(corpus),)), folder, "int32", small_corpus=1000)
    return _since(began)


def library_seconds(texts: list[str], definition: str) -> tuple[float, float]:
    """Wall and processor time of the library alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    began = _now()
    for first in range(0, len(texts), 1000):
        tokenizer.encode_batch_fast(texts[first : first + 1000])
    return _since(began)


def _megabytes_within(seconds: float, corpus: Path, source: Path | None, definition: str) -> float:
    """About as much text as both sides need so many seconds for, from what the library does with a little."""
    texts = write_corpus(corpus, _PROBE, source)
    rate = sum(len(text.encode()) for text in texts) / 1e6 / library_seconds(texts, definition)[0]
    return rate * seconds / (1 + 1 / _SLOWER)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--text", type=Path, help="UTF-8 text to draw paragraphs from")
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--within", type=float, help="seconds: take fewer megabytes if all rounds would need more")
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # before the library is loaded
    definition = (args.tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "a.jsonl"
        megabytes = args.megabytes
        if args.within is not None:
            megabytes = min(megabytes, _megabytes_within(args.within / args.rounds, corpus, args.text, definition))
        texts = write_corpus(corpus, megabytes, args.text)
        size = sum(len(text.encode()) for text in texts) / 1e6
        pairs = []
        for _ in range(args.rounds):
            alone = library_seconds(texts, definition)
            stage = stage_seconds(corpus, definition, Path(name) / "out", args.threads)
            pairs.append((alone, stage))
            print(f"library {size / alone[0]:.2f} MB/s, stage {size / stage[0]:.2f} MB/s", flush=True)
    print(f"{size:.1f} MB in {len(texts):,} documents, {args.threads} thread(s)")
    for index, kind in enumerate(("wall", "processor")):
        columns = [[pair[side][index] for pair in pairs] for side in (0, 1)]
        ratios = sorted(one / other for one, other in zip(*columns, strict=True))
        library, ours = (size / statistics.median(column) for column in columns)
        print(
            f"{kind} time: library {library:.2f} MB/s, stage {ours:.2f} MB/s, ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
