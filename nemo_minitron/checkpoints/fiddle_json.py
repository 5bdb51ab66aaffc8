"""NeMo 2's `io.json`: objects and the arguments they were made with, as the library fiddle writes them.

NeMo loads such a file by importing every class it names and calling it. Here it is data: objects by their path from the
root, arguments by name, classes and functions as dotted names.
"""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import CheckpointError

_CONFIG = {"type": "pyref", "module": "fiddle._src.config", "name": "Config"}
_METADATA = {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"}
_MAX_DEPTH = 50


def arguments_at(document: Mapping[str, Any], path: str, *, where: str) -> dict[str, Any]:
    """Arguments of the object at a path as plain data, its class under `_target_`; {} when there is none.

    A path is from the root, as "model.config".

    Raises:
        CheckpointError: The document is not of this form.
    """
    objects = document.get("objects")
    if not isinstance(objects, dict):
        raise CheckpointError(f"{where}: has no objects", rule="a file of fiddle's serialization")
    for item in objects.values():
        paths = item.get("paths") if isinstance(item, dict) else None
        if isinstance(paths, list) and f"<root>.{path}" in paths:
            return _object(item, objects, where, depth=0)
    return {}


def _object(item: Mapping[str, Any], objects: Mapping[str, Any], where: str, depth: int) -> dict[str, Any]:
    pairs = item.get("items")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise CheckpointError(f"{where}: an object without items")
    found = {_name(str(name)): _value(value, objects, where, depth + 1) for name, value in pairs}
    kind = item.get("type")
    if kind == _CONFIG:
        metadata = _follow(item.get("metadata"), objects)
        inner = metadata.get("items") if isinstance(metadata, dict) else None
        named = {str(pair[0]): pair[1] for pair in inner or () if isinstance(pair, list) and len(pair) == 2}
        kind = named.get("Attr(name='fn_or_cls')")
    if isinstance(kind, dict) and kind.get("type") == "pyref":
        found["_target_"] = f"{kind.get('module')}.{kind.get('name')}"
    return found


def _value(value: Any, objects: Mapping[str, Any], where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{where}: nested more than {_MAX_DEPTH} levels deep", rule="no object holds itself")
    value = _follow(value, objects)
    if not isinstance(value, dict):
        return value if isinstance(value, str | int | float | bool) else None
    kind = value.get("type")
    if kind == "leaf":
        return value.get("value")
    if kind == "pyref":
        return f"{value.get('module')}.{value.get('name')}"
    if kind in (_builtin("list"), _builtin("tuple")):
        pairs = value.get("items")
        kept = pairs if isinstance(pairs, list) else []
        return [
            _value(pair[1], objects, where, depth + 1) for pair in kept if isinstance(pair, list) and len(pair) == 2
        ]
    return _object(value, objects, where, depth)


def _follow(value: Any, objects: Mapping[str, Any]) -> Any:
    if isinstance(value, dict) and value.get("type") == "ref":
        return objects.get(str(value.get("key")))
    return value


def _name(element: str) -> str:
    """`Attr(name='num_layers')` to `num_layers`."""
    return element.removeprefix("Attr(name='").removesuffix("')")


class FiddleDocument:
    """Puts an `io.json` together, objects before those that hold them.

    `load_context` finds an object by its path, so each is added with its own.
    """

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, target: str, arguments: Mapping[str, Any], *, path: str) -> dict[str, str]:
        """Add an object; returns the reference to it.

        Arguments are plain values, lists of them, references or `Symbol`s; the path is from the root, "" for
        the root itself.
        """
        empty = self._put("dict", {"type": _builtin("dict"), "items": [], "metadata": _tuple([])})
        other = self._put("dict", {"type": _builtin("dict"), "items": [], "metadata": _tuple([])})
        names = self._put("tuple", _tuple(list(arguments)))
        module, _, name = target.rpartition(".")
        metadata = self._put(
            "buildable_traverser_metadata",
            {
                "type": _METADATA,
                "items": [
                    ["Attr(name='fn_or_cls')", {"type": "pyref", "module": module, "name": name}],
                    ["Attr(name='argument_names')", names],
                    ["Attr(name='argument_tags')", empty],
                    ["Attr(name='argument_history')", other],
                ],
                "metadata": _METADATA,
            },
        )
        root = f"<root>.{path}" if path else "<root>"
        items = [[f"Attr(name='{key}')", _encoded(value, f"{root}.{key}")] for key, value in arguments.items()]
        return self._put(name.lower(), {"type": _CONFIG, "items": items, "metadata": metadata, "paths": [root]})

    def document(self, root: Mapping[str, str]) -> dict[str, Any]:
        """The finished file, as JSON data."""
        references = dict.fromkeys(self._objects, 1)
        return {"root": dict(root), "objects": self._objects, "refcounts": references, "version": "0.0.1"}

    def _put(self, hint: str, value: Any) -> dict[str, str]:
        self._counts[hint] = self._counts.get(hint, 0) + 1
        key = f"{hint}_{self._counts[hint]}"
        self._objects[key] = value
        return {"type": "ref", "key": key}


class Symbol(str):
    """A dotted name that stands for the class, function or constant of that name."""

    __slots__ = ()


def _encoded(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, Symbol):
        module, _, name = value.rpartition(".")
        return {"type": "pyref", "module": module, "name": name, "paths": [path]}
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        items = [[f"Index(index={i})", _encoded(item, f"{path}[{i}]")] for i, item in enumerate(value)]
        return {"type": _builtin("list"), "items": items, "metadata": None, "paths": [path]}
    return {"type": "leaf", "value": value, "paths": [path]}


def _builtin(name: str) -> dict[str, str]:
    return {"type": "pyref", "module": "builtins", "name": name}


def _tuple(values: list[str]) -> dict[str, Any]:
    items = [[f"Index(index={index})", value] for index, value in enumerate(values)]
    return {"type": _builtin("tuple"), "items": items, "metadata": None}
