"""The architecture that a GGUF file's metadata describes, key by key with the defaults of llama.cpp."""

import math
from typing import Any

import numpy as np

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import MAX_LAYERS, AnyScaling, LinearScaling, ModelSpec, RopeScaling, YarnScaling
from nemo_minitron.checkpoints.gguf_file import GgufFile
from nemo_minitron.errors import CheckpointError, SpecError

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how Llama 3.1's scaling is stored."""
# Keys that change what is computed, with the values that do not; llama.cpp's default is the first.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (None, 0.0),
    "attention.clamp_kqv": (None, 0.0),
    "attention.max_alibi_bias": (None, 0.0),
    "attention.sliding_window": (None, 0),
    "expert_count": (None, 0),
    "use_parallel_residual": (None, False),
    "logit_scale": (None, 0.0, 1.0),
    "residual_scale": (None, 0.0, 1.0),
    "embedding_scale": (None, 0.0, 1.0),
    "attn_logit_softcapping": (None, 0.0),
    "final_logit_softcapping": (None, 0.0),
    "pooling_type": (None, 0),
}
_BASE = 10000.0


def read_spec(file: GgufFile) -> ModelSpec:
    """The architecture of a file.

    Raises:
        CheckpointError: A key is missing that llama.cpp demands, or contradicts the tensors.
        SpecError: The architecture or a setting is not supported.
    """
    return _Reader(file).spec()


class _Reader:
    """Metadata of one file under the prefix of its architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.path = file, file.path
        self.architecture = file.field("general.architecture", None)
        if self.architecture not in FAMILIES:
            raise SpecError(
                f"{self.path}: general.architecture = {self.architecture!r} is not supported",
                rule=f"one of {', '.join(FAMILIES)}",
            )
        kind = file.field("general.type", "model")
        if kind != "model":
            raise CheckpointError(f"{self.path}: general.type = {kind!r}", rule="a model")

    def spec(self) -> ModelSpec:
        self._refuse()
        tensors = self.file.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: token_embd.weight is missing")
        heads = self._size("attention.head_count")
        layers = self._size("block_count")
        if layers > MAX_LAYERS:
            raise CheckpointError(f"{self.path}: block_count = {layers}", rule=f"at most {MAX_LAYERS}")
        layer = transformer_layer(
            num_attention_heads=heads,
            num_query_groups=self._size("attention.head_count_kv", heads),
            ffn_hidden_size=self._size("feed_forward_length"),
        )
        hidden = self._size("embedding_length")
        head_dim = self._size("attention.key_length", hidden // heads)
        values = self._size("attention.value_length", head_dim)
        rotated = self._size("rope.dimension_count", head_dim)
        if values != head_dim or rotated != head_dim:
            raise SpecError(
                f"{self.path}: attention.key_length = {head_dim}, attention.value_length = {values}, "
                f"rope.dimension_count = {rotated}",
                rule="keys and values of one size, turned complete",
            )
        context = self._size("context_length")
        scaling = self._scaling(context, head_dim)
        return ModelSpec(
            vocab_size=self._vocabulary(int(embedding.shape[1])),
            hidden_size=hidden,
            head_dim=head_dim,
            layers=(layer,) * layers,
            max_position_embeddings=context,
            norm_eps=self._number("attention.layer_norm_rms_epsilon", None),
            rotary_base=self._number("rope.freq_base", _BASE),
            rope_scaling=scaling,
            tied_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
        )

    def _field(self, key: str, default: Any = None) -> Any:
        return self.file.field(f"{self.architecture}.{key}", default)

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if isinstance(value, list) and len(value) == self._field("block_count") and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 1:
            words = "is missing" if value is None else f"= {str(value)[:60]}"
            raise CheckpointError(
                f"{self.path}: metadata {self.architecture}.{key} {words}",
                rule="one whole number, the same for every layer",
                remedy="layers of different sizes are not read from GGUF files" if isinstance(value, list) else "",
            )
        return value

    def _number(self, key: str, default: float | None) -> float:
        value = self._field(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            words = "is missing" if value is None else f"= {str(value)[:60]}"
            raise CheckpointError(f"{self.path}: metadata {self.architecture}.{key} {words}", rule="a positive number")
        return shortest(value)

    def _vocabulary(self, rows: int) -> int:
        """Rows of the embedding: one for each token, and padding behind them."""
        tokens, said = self.file.field("tokenizer.ggml.tokens", None), self._field("vocab_size")
        key = f"{self.architecture}.vocab_size"
        if said is not None and said != rows:
            raise CheckpointError(
                f"{self.path}: {key} = {said}, but token_embd.weight has {rows} rows", rule="the same"
            )
        if tokens is not None and len(tokens) > rows:
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.tokens holds {len(tokens)}, but token_embd.weight has {rows} rows",
                rule="a row for every token",
            )
        return rows

    def _refuse(self) -> None:
        for key, neutral in _NEUTRAL.items():
            found = self._field(key, neutral[0])
            if found not in neutral:
                raise SpecError(
                    f"{self.path}: {self.architecture}.{key} = {found} is not supported",
                    rule=f"{neutral[-1]} or absent",
                )

    def _scaling(self, context: int, head_dim: int) -> AnyScaling | None:
        """`rope.scaling.*` as llama.cpp reads it: a factor without a type is linear, none at all is no scaling."""
        kind = self._field("rope.scaling.type", "linear")
        old, new = self._field("rope.scale_linear"), self._field("rope.scaling.factor")
        if old not in (None, new) and new is not None:
            raise SpecError(
                f"{self.path}: rope.scaling.factor = {new}, but rope.scale_linear = {old}", rule="one factor"
            )
        if any(value is not None and type(value) not in (int, float) for value in (old, new)):
            raise SpecError(
                f"{self.path}: rope.scaling.factor = {str(old if new is None else new)[:40]}", rule="a number"
            )
        factor = next((value for value in (new, old) if value), 1.0)
        if kind not in ("none", "linear", "yarn"):
            raise SpecError(f"{self.path}: rope.scaling.type = {kind!r} is not supported", rule="none, linear or yarn")
        scaled = kind == "yarn" or (kind == "linear" and factor != 1)
        if FACTORS in self.file.tensors:
            if scaled:
                raise SpecError(f"{self.path}: {FACTORS} and rope.scaling.type = {kind!r} at once", rule="one of them")
            return self._llama3(context, head_dim)
        if not scaled:
            return None
        if kind == "linear":
            return LinearScaling(factor=shortest(factor))
        if (found := self._field("rope.scaling.attn_factor", 1.0)) != 1:
            raise SpecError(f"{self.path}: rope.scaling.attn_factor = {found} is not supported", rule="1 or absent")
        return YarnScaling(
            factor=shortest(factor),
            original_max_position_embeddings=self._size("rope.scaling.original_context_length", context),
            beta_fast=self._number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self._number("rope.scaling.yarn_beta_slow", 1.0),
        )

    def _llama3(self, context: int, head_dim: int) -> RopeScaling | None:
        """Llama 3.1's scaling out of the divisors that llama.cpp's converter made of it.

        Only the divisors are stored. Those of Llama 3.1 and 3.2 follow from four numbers, of which three are the same
        in every published model; the fourth is the largest divisor.
        """
        stored = self.file.tensor(FACTORS).double().numpy().ravel()
        base = self._number("rope.freq_base", _BASE)
        if stored.shape != (head_dim // 2,):
            raise CheckpointError(f"{self.path}: {FACTORS} is shaped {stored.shape}", rule=f"({head_dim // 2},)")
        if np.allclose(stored, 1.0, atol=1e-6):
            return None
        for original in sorted({8192, context, context // 2, context // 4, context // 8, context // 16}, reverse=True):
            scaling = RopeScaling(
                factor=float(round(float(stored.max()), 4)), original_max_position_embeddings=max(original, 1)
            )
            if np.allclose(stored, llama3_divisors(scaling, base, head_dim), rtol=1e-4):
                return scaling
        raise SpecError(
            f"{self.path}: {FACTORS} holds divisors that are not those of Llama 3.1's scaling",
            rule="low_freq_factor 1, high_freq_factor 4, an original context of 8192 or a part of context_length",
            remedy="import the Hugging Face checkpoint of this model instead",
        )


def llama3_divisors(scaling: RopeScaling, base: float, head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each rotary frequency is divided by under Llama 3.1's scaling, `[head_dim / 2]`."""
    frequencies = 1.0 / base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return 1.0 / (kept + (1 - kept) / scaling.factor)


def shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: GGUF stores 1e-5 as 9.99999974...e-06."""
    return float(str(np.float32(value)))
