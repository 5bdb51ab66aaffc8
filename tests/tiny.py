"""A tiny model, tokenizer and corpus on disk, so that complete stages run in seconds."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    NemotronConfig,
    NemotronHConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

ZERO_CENTRED = ("nemotron", "gemma", "gemma3_text")
"""Model types whose norms add 1 to their weight."""

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


LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILY_CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama 3.2": (LlamaConfig, {"rope_parameters": LLAMA_3_SCALING, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral, window": (MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"rms_norm_eps": 1e-6}),
    "qwen3, tied": (Qwen3Config, {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
    "nemotron": (NemotronConfig, {"rms_norm_eps": None, "norm_eps": 1e-5}),
    "phi3": (Phi3Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "pad_token_id": 0}),
    "phi4 mini": (
        Phi3Config,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
            "sliding_window": 7,
            "pad_token_id": 0,
        },
    ),
    "gemma": (GemmaConfig, {}),
    "gemma, untied": (GemmaConfig, {"tie_word_embeddings": False}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "query_pre_attn_scalar": 24,
        },
    ),
}
"""Toys of every family and of the settings inside one that change what it computes: heads are wider than
`hidden_size / num_attention_heads`, windows and original contexts shorter than the texts of tests."""


def write_family(path: Path, name: str, *, seed: int = 0, trained_steps: int = 0, **changes: object) -> PreTrainedModel:
    """A model out of `FAMILY_CONFIGS` with 4 layers, hidden 64, 8 heads in 4 groups of 16 channels, FFN 96.

    Random, or trained for some steps as in `write_llama`.
    """
    kind, extra = FAMILY_CONFIGS[name]
    settings = _sizes({"head_dim": 16}) | extra | changes
    config = kind(**{key: value for key, value in settings.items() if value is not None or key == "sliding_window"})
    return _write(path, config, AutoModelForCausalLM.from_config, seed, trained_steps)


NEMOTRON_H_PATTERN = "M-*M-M*-"
NEMOTRON_3_PATTERN = "ME*-MEM*E"


def write_nemotron_h(
    path: Path, *, seed: int = 0, pattern: str = NEMOTRON_H_PATTERN, trained_steps: int = 0, **changes: object
) -> PreTrainedModel:
    """A hybrid: Mamba with 8 heads of 8 channels in 4 groups and 16 states, attention of 8 heads in 4 groups, FFN 96.

    Layers of experts (`E`) have 6 of 24 neurons, of which a token has 2, and a shared one of 40.

    Random, or trained for some steps as in `write_llama`.
    """
    settings: dict[str, object] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "hybrid_override_pattern": pattern,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 4,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if "E" in pattern:
        settings |= {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 1.5,
        }
    config = NemotronHConfig(**settings | changes)
    return _write(path, config, AutoModelForCausalLM.from_config, seed, trained_steps)


def write_bamba(path: Path, *, seed: int = 0, trained_steps: int = 0, **changes: object) -> PreTrainedModel:
    """A hybrid with an MLP in every layer: Mamba with 8 heads of 16 channels in 4 groups, attention in layers 1 and 3.

    Random, or trained for some steps as in `write_llama`.
    """
    settings: dict[str, object] = {
        **_sizes({"head_dim": 16, "num_hidden_layers": 5}),
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 4,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    }
    return _write(path, BambaConfig(**settings | changes), AutoModelForCausalLM.from_config, seed, trained_steps)


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


def _write(path: Path, config: object, kind: Callable[..., PreTrainedModel], seed: int, trained_steps: int = 0):
    torch.manual_seed(seed)
    model = kind(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_bias", "conv1d.weight")):
                continue  # Mamba's own: decay and steps that are neither nothing nor everything
            # Larger than the usual initialisation, so that layers, heads and neurons really differ.
            parameter.normal_(std=0.15 if parameter.ndim > 1 else 0.3)
            if "norm" in name and name.endswith("weight") and config.model_type not in ZERO_CENTRED:
                parameter.add_(1.0)
            if name.endswith(".gate.weight"):  # of routers, whose experts shall differ
                parameter.mul_(4.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    tokenizer = write_tokenizer(path, vocab_size=config.vocab_size)
    if trained_steps:
        train(model, tokenizer, trained_steps)
    model.save_pretrained(path)
    return model.eval()


def train(model, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train on sentences like the corpus's."""
    ids = torch.tensor(tokenizer.encode(" ".join(sentences(2000 + seed, 100) for seed in range(10))))
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = torch.arange(step * 16, step * 16 + 16) % len(windows)
        model(windows[rows], labels=windows[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
