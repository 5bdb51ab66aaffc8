"""Untrusted JSON and YAML as plain data of bounded size, and architectures read from it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from nemo_minitron.arch.spec import MAX_LAYERS, ModelSpec
from nemo_minitron.errors import CheckpointError, MinitronError, SpecError
from nemo_minitron.json_lines import without_double_keys

LARGEST_JSON = 256_000_000
"""Bytes. The largest tokenizers take some 40 MB, the largest indices of weights some 10."""
LARGEST_YAML = 4_000_000
"""Bytes; NeMo's largest configurations take some 50 kB, and a YAML parser needs a minute for ten megabytes."""
MOST_VALUES = 1_000_000
"""Values of a YAML document with its aliases written out; an alias of an alias of an alias could stand for billions."""
DEEPEST = 100
"""Levels of nesting."""

_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "block_count")
_CODE_KEYS = ("_target_", "target")
_KNOWN_CODE = (
    *(
        "nemo.",
        "nemo_minitron.",
        "nemo_run.",
        "megatron.",
        "lightning.",
        "pytorch_lightning.",
        "torch.",
        "transformers.",
    ),
    *("transformer_engine.", "omegaconf.", "hydra.", "modelopt."),
)
# Modules of those packages that run what they are given.
_DANGEROUS_CODE = ("torch.utils.cpp_extension", "torch.hub", "torch.load", "torch.serialization", "torch.storage")


def read_json(data: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: It is larger than `LARGEST_JSON`, not JSON, not an object, or has a key twice.
    """
    if len(data) > LARGEST_JSON:
        raise CheckpointError(f"{where}: {len(data)} bytes of JSON", rule=f"at most {LARGEST_JSON}")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=without_double_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: is not a JSON object")
    return found


def read_yaml(data: bytes, *, where: str) -> dict[str, Any]:
    """A YAML mapping of plain values; Python's own tags are refused unread.

    Raises:
        CheckpointError: It is larger than `LARGEST_YAML` or, with aliases written out, `MOST_VALUES`; not YAML; not a
            mapping; or has a key twice.
    """
    if len(data) > LARGEST_YAML:
        raise CheckpointError(f"{where}: {len(data)} bytes of YAML", rule=f"at most {LARGEST_YAML}")
    try:
        found = _load_yaml(data)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{where} is not YAML of plain values ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is not a mapping")
    _count(found, where, left=[MOST_VALUES], depth=0)
    return found


def _load_yaml(data: bytes) -> Any:
    """As `yaml.safe_load`, which takes the last of two equal keys; OmegaConf, with which NeMo reads, refuses them."""
    loader = yaml.SafeLoader(data)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_double_keys(root)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _refuse_double_keys(root: yaml.Node) -> None:
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue  # an alias leads to a node that was looked at
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[1]!r} occurs twice")
            left += [value for _, value in node.value]
        else:
            left += node.value


def refuse_code(data: Any, *, where: str) -> None:
    """Look at every `_target_` and `target` of a configuration. We resolve none, but others might.

    Raises:
        CheckpointError: One names something outside the packages that such configurations are about.
    """
    if isinstance(data, Mapping):
        for key in _CODE_KEYS:
            target = data.get(key)
            if isinstance(target, str) and not is_known_code(target):
                raise CheckpointError(
                    f"{where}: refused because of {key}: {target}",
                    rule="a configuration names classes of NeMo, Megatron, Lightning or torch, and no other code",
                    remedy="do not use this file unless you trust whoever made it; if you do, take the entry out",
                )
        data = data.values()
    elif not isinstance(data, list | tuple):
        return
    for value in data:
        refuse_code(value, where=where)


def is_known_code(path: str) -> bool:
    """Whether a dotted path leads into a package that configurations of language models are about."""
    return (
        path.startswith(_KNOWN_CODE) and not path.startswith(_DANGEROUS_CODE) and path.replace(".", "").isidentifier()
    )


def spec_of(read: Callable[[], ModelSpec], config: Mapping[str, Any], *, where: str) -> ModelSpec:
    """An architecture from a configuration whose values may be of any type and size.

    Raises:
        SpecError: The configuration makes no sense.
    """
    for key in _LAYER_KEYS:
        count = config.get(key)
        if count is not None and (type(count) is not int or not 0 < count <= MAX_LAYERS):
            raise SpecError(f"{where}: {key} = {str(count)[:40]}", rule=f"a whole number from 1 to {MAX_LAYERS}")
    try:
        spec = read()
        hash(spec)  # a value that is no number, text or flag
    except MinitronError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError) as error:
        raise SpecError(f"{where}: a value is of the wrong kind ({type(error).__name__}: {error})") from error
    for name, value in (("norm_eps", spec.norm_eps), ("rotary_base", spec.rotary_base)):
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise SpecError(f"{where}: {name} = {str(value)[:40]}", rule="a positive number")
    sizes = (spec.vocab_size, spec.hidden_size, spec.head_dim, spec.max_position_embeddings)
    inner = [value for layer in set(spec.layers) for value in layer.sizes.values()]
    if wrong := [value for value in (*sizes, *inner) if type(value) is not int or value > 2**31]:
        raise SpecError(f"{where}: {str(wrong[0])[:40]} is not a size", rule="whole numbers below 2^31")
    return spec


def _count(data: Any, where: str, *, left: list[int], depth: int) -> None:
    left[0] -= 1
    if left[0] < 0 or depth > DEEPEST:
        raise CheckpointError(
            f"{where}: too large with its aliases written out",
            rule=f"at most {MOST_VALUES} values, {DEEPEST} levels deep",
        )
    if isinstance(data, dict):
        data = data.values()
    elif not isinstance(data, list | tuple | set):
        return
    for value in data:
        _count(value, where, left=left, depth=depth + 1)
