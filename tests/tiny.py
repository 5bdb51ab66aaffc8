"""A tiny model, tokenizer and corpus on disk, so that whole stages run in seconds."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = [
    *("river", "mountain", "city", "history", "king", "empire", "war", "peace", "music", "science", "language"),
    *("culture", "trade", "island", "ocean", "forest", "summer", "winter", "battle", "treaty", "church", "school"),
    *("poet", "painter", "engine", "railway", "bridge", "harbor", "market", "village", "century"),
]


def sentences(seed: int, count: int) -> str:
    """Grammatical enough that some next tokens are likelier than others."""
    rng = random.Random(seed)
    return " ".join(
        f"the {rng.choice(WORDS)} of the {rng.choice(WORDS)} was a {rng.choice(WORDS)} in the {rng.choice(WORDS)}."
        for _ in range(count)
    )


def write_corpus(path: Path, *, documents: int = 60, sentences_each: int = 20) -> Path:
    """One plain-text file a document."""
    path.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        (path / f"{index:03d}.txt").write_text(sentences(index, sentences_each))
    return path


def write_tokenizer(path: Path, *, vocab_size: int = 256) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the corpus's sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=[], show_progress=False
    )
    tokenizer.train_from_iterator([sentences(1000 + seed, 50) for seed in range(20)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.save_pretrained(path)
    return fast


def write_llama(
    path: Path, *, seed: int = 0, tied: bool = True, trained_steps: int = 0, **sizes: int
) -> LlamaForCausalLM:
    """A Llama with grouped queries: 4 layers, hidden 64, 8 heads in 4 groups of head_dim 8, FFN 96.

    Random, or trained for some steps on sentences like the corpus's, so that it beats a uniform guess.
    """
    config = LlamaConfig(**_sizes(sizes), tie_word_embeddings=tied)
    return _write(path, config, LlamaForCausalLM, seed, trained_steps)


def write_qwen2(path: Path, *, seed: int = 0, **sizes: int) -> Qwen2ForCausalLM:
    """The same shape with a bias on QKV."""
    return _write(path, Qwen2Config(**_sizes(sizes), tie_word_embeddings=False), Qwen2ForCausalLM, seed)


def _sizes(sizes: dict[str, int]) -> dict[str, object]:
    return {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **sizes,
    }


def _write(path: Path, config: object, kind: type, seed: int, trained_steps: int = 0):
    torch.manual_seed(seed)
    model = kind(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the usual initialisation, so that layers, heads and neurons really differ.
            parameter.normal_(std=0.15 if parameter.ndim > 1 else 0.3)
            if "norm" in name:
                parameter.add_(1.0)
    tokenizer = write_tokenizer(path, vocab_size=config.vocab_size)
    if trained_steps:
        _train(model, tokenizer, trained_steps)
    model.save_pretrained(path)
    return model.eval()


def _train(model, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    ids = torch.tensor(tokenizer.encode(" ".join(sentences(2000 + seed, 100) for seed in range(10))))
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = torch.arange(step * 16, step * 16 + 16) % len(windows)
        model(windows[rows], labels=windows[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
