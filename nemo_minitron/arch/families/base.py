"""What a family has to say, as data and two pure functions, and what it refuses to leave unsaid."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from nemo_minitron.arch.families.keys import assumed, complete, special_ids
from nemo_minitron.arch.layer import Attention, LayerSpec, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX
from nemo_minitron.errors import SpecError

_HF_LAYER = "model.layers.{i}."

# Traits of a spec that a Hugging Face class either computes always, never, or as its config says.
_TRAITS = (
    *("activation", "norm", "rotary_percent", "rope_scaling", "tied_embeddings", "qkv_bias", "qk_norm", "linear_bias"),
    *("post_norms", "scaled_embeddings", "query_scalar", "sliding_window", "local_rotary_base"),
    "full_width_qk_norm",
)
_KEYS = {
    "rotary_percent": "partial_rotary_factor",
    "rope_scaling": "rope_scaling or rope_parameters",
    "tied_embeddings": "tie_word_embeddings",
}
_DEFAULTS = {spec_field.name: spec_field.default for spec_field in fields(ModelSpec)}

_EXPERT_DEFAULTS = {item.name: item.default for item in fields(Moe) if item.default is not MISSING}

_OFF = (None, False)
_ONE = (None, 1)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "qkv_bias", "use_qkv_bias", "mlp_bias", "use_bias", "lm_head_bias"), _OFF),
    **dict.fromkeys(("use_sliding_window", "sliding_window", "attention_chunk_size"), _OFF),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), _OFF),
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "use_bidirectional_attention", "clip_qkv", "alibi"), _OFF),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "rope_interleaved", "no_rope_layer_interval"), _OFF),
    **dict.fromkeys(("attention_multiplier", "residual_multiplier", "embedding_multiplier"), _ONE),
    **dict.fromkeys(("logits_scaling", "logit_scale"), _ONE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (None, 0)),
    **dict.fromkeys(("no_rope_layers", "per_layer_config"), (None, [], {})),
    **dict.fromkeys(("quantization_config", "compression_config", "transformers_weights"), (None,)),
}
"""Settings of `config.json` that change what a model computes, with the values that do not. A family that supports one
reads it itself; for the others anything else is refused, even where its class in transformers would not look at it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model family.

    Attributes:
        name: Key in `FAMILIES`.
        hf_model_type: `model_type` in `config.json`.
        hf_architecture: Class name in `architectures`.
        hf_names: Canonical row name to the Hugging Face names of its parts, in packing order (q, k, v or gate, up). One
            name for a packed weight: its parts lie one below the other in one tensor.
        read: `config.json` data to a spec.
        write: A spec to `config.json` data (architecture keys only).
        settings: Further keys that `read` looks after, those of `NEUTRAL` among them.
        fixed: Traits of the spec that the class always has, where they differ from `ModelSpec`'s defaults.
        free: Traits that its config decides.
        experts: Traits of `Moe` that its experts always have, where they differ from its defaults; None for a class
            without experts.
        free_experts: Traits of `Moe` that its config decides.
        has_dense_layers: Whether a class with experts also has layers without.
        experts_are_optional: Whether layers of a class with experts are those of `layer`, experts among them or not.
        layer: Whether its class has such a layer; attention and an MLP in each, unless a family says otherwise.
        holds: Which sizes its configuration can hold together, for a search: takes a model and sizes by their names in
            a recipe's `target`, integers or arrays, and returns booleans; None where it can hold any.
        defaults: What its class assumes where a key is absent; keys that decide what is computed, and special ids.
        nullable: Keys of `defaults` that may be null though their default is not.
    """

    name: str
    hf_model_type: str
    hf_architecture: str
    hf_names: Mapping[str, tuple[str, ...]]
    read: Callable[[Mapping[str, Any]], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    settings: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ("tied_embeddings",)
    experts: Mapping[str, Any] | None = None
    free_experts: tuple[str, ...] = ()
    has_dense_layers: bool = False
    experts_are_optional: bool = False
    layer: Callable[[LayerSpec], bool] = lambda layer: layer.is_transformer
    holds: Callable[[ModelSpec, Mapping[str, Any]], Any] | None = None
    defaults: Mapping[str, Any]
    nullable: tuple[str, ...] = (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "num_key_value_heads",
        "sliding_window",
    )

    def read_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """The architecture that a `config.json` describes.

        Raises:
            SpecError: A key is missing, or a setting that changes the result is not supported; names it.
        """
        architectures = config.get("architectures") or [self.hf_architecture]
        if not any(str(name).lower() == self.hf_architecture.lower() for name in architectures):
            raise SpecError(
                f"config.json: architectures = {architectures} is not supported for model_type {self.hf_model_type!r}",
                rule=self.hf_architecture,
            )
        for key, allowed in NEUTRAL.items():
            if key in config and key not in self.settings and config[key] not in allowed:
                raise SpecError(
                    f"config.json: {key} = {config[key]!r} is not supported for {self.name}",
                    rule=f"{key}: {allowed[-1]!r} or absent",
                )
        if {*(config.get("layer_types") or ())} - {"full_attention"} and "layer_types" not in self.settings:
            raise SpecError(f"config.json: layer_types are not all full_attention, which {self.name} does not support")
        filled = complete(config, self.defaults, self.nullable, family=self.hf_architecture)
        try:
            spec = self.read(filled)
        except SpecError as error:
            if (absent := self.assumed(config)) and not error.remedy:
                taken = ", ".join(f"{key} = {value}" for key, value in absent.items())
                error.remedy = f"config.json leaves out keys for which {self.hf_architecture} takes {taken}"
            raise
        self._check(spec, "config.json")
        return spec

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys that a `config.json` does not have, with what the class takes in their place."""
        return assumed(config, self.defaults)

    def special_ids(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Ids of the special tokens by key as `config.json` has them; None for one that it says there is not."""
        return special_ids(config, self.defaults)

    def write_config(self, spec: ModelSpec) -> dict[str, Any]:
        """`config.json` data of a model.

        Raises:
            SpecError: The family's class computes something else; names what differs.
        """
        self._check(spec, f"family {self.name}")
        return self.write(spec)

    def objections(self, spec: ModelSpec) -> list[str]:
        """Traits of a model that this family's class does not have."""
        wanted = {name: self.fixed.get(name, _DEFAULTS[name]) for name in _TRAITS if name not in self.free}
        found = [f"{name} = {getattr(spec, name)}" for name in wanted if getattr(spec, name) != wanted[name]]
        strange: dict[str, int] = {}
        for index, layer in enumerate(spec.layers):
            with_attention = isinstance(layer.mixer, Attention) and layer.feed_forward is not None
            of_experts = self.experts is not None and not self.experts_are_optional and with_attention
            if not (of_experts or self.layer(layer)):
                strange.setdefault(layer.described, index)
        found += [f"layers of {words} (layer {index} first)" for words, index in strange.items()]
        return found + self._expert_objections(spec)

    def _expert_objections(self, spec: ModelSpec) -> list[str]:
        parts = {part for layer in spec.layers if isinstance(part := layer.feed_forward, Moe)}
        if self.experts is None:
            return []
        dense = any(layer.feed_forward is not None and not layer.has_experts for layer in spec.layers)
        missing = not self.experts_are_optional and (not parts or (dense and not self.has_dense_layers))
        found = ["layers without experts"] if missing else []
        for name, default in _EXPERT_DEFAULTS.items():
            wanted = self.experts.get(name, default)
            values = {getattr(part, name) for part in parts}
            if name not in self.free_experts and values - {wanted}:
                found.append(f"{name} = {', '.join(map(str, sorted(values - {wanted})))}")
        return found

    def _check(self, spec: ModelSpec, where: str) -> None:
        if found := self.objections(spec):
            keys = ", ".join(_KEYS[name] for item in found if (name := item.partition(" ")[0]) in _KEYS)
            raise SpecError(
                f"{where}: {self.hf_architecture} does not compute {', '.join(found)}",
                rule=f"decided by {keys}" if keys else "",
            )


# Names shared by every family that copies Llama's modelling code.
LLAMA_LIKE_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.layer_norm_weight": (_HF_LAYER + "input_layernorm.weight",),
    LAYER_PREFIX + "self_attention.linear_qkv.weight": tuple(
        _HF_LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"
    ),
    LAYER_PREFIX + "self_attention.linear_proj.weight": (_HF_LAYER + "self_attn.o_proj.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.layer_norm_weight": (_HF_LAYER + "post_attention_layernorm.weight",),
    LAYER_PREFIX + "mlp.linear_fc1.weight": (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
    LAYER_PREFIX + "mlp.linear_fc2.weight": (_HF_LAYER + "mlp.down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}

QKV_BIAS_NAMES: dict[str, tuple[str, ...]] = {
    LAYER_PREFIX + "self_attention.linear_qkv.bias": tuple(_HF_LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"),
}

QK_NORM_NAMES: dict[str, tuple[str, ...]] = {
    LAYER_PREFIX + f"self_attention.{part}_layernorm.weight": (_HF_LAYER + f"self_attn.{part}_norm.weight",)
    for part in "qk"
}

_ROUTED, _SHARED = LAYER_PREFIX + "mlp.experts.local_experts.{e}.", LAYER_PREFIX + "mlp.shared_experts."
# Of families that name experts as Qwen's do; one tensor for each projection of each expert.
EXPERT_NAMES: dict[str, tuple[str, ...]] = {
    LAYER_PREFIX + "pre_mlp_layernorm.weight": (_HF_LAYER + "post_attention_layernorm.weight",),
    LAYER_PREFIX + "mlp.router.weight": (_HF_LAYER + "mlp.gate.weight",),
    _ROUTED + "linear_fc1.weight": tuple(
        _HF_LAYER + f"mlp.experts.{{e}}.{part}_proj.weight" for part in ("gate", "up")
    ),
    _ROUTED + "linear_fc2.weight": (_HF_LAYER + "mlp.experts.{e}.down_proj.weight",),
}


def shared_expert_names(module: str) -> dict[str, tuple[str, ...]]:
    """Names of the expert that sees every token, whose module is called so."""
    prefix = _HF_LAYER + f"mlp.{module}."
    return {
        _SHARED + "linear_fc1.weight": (prefix + "gate_proj.weight", prefix + "up_proj.weight"),
        _SHARED + "linear_fc2.weight": (prefix + "down_proj.weight",),
    }
