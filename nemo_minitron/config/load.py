"""YAML and `key=value` overrides to a checked recipe; every problem is reported at once, with a suggestion."""

import difflib
import io
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python
from yaml import YAMLError

from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import ConfigError

_TRAININGS = ("correct", "distill", "tune")
SectionT = TypeVar("SectionT", bound=BaseModel)


def load_recipe(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe, put `key=value` overrides on top, check everything.

    Raises:
        ConfigError: With every problem found.
    """
    if not path.is_file():
        raise ConfigError(str(path), ["no such recipe file; `nemo-minitron ls` lists those that come with the package"])
    try:
        given = OmegaConf.from_dotlist(_checked(overrides or []))
        merged = OmegaConf.merge(_without_alternatives(_read(path), given), given)
        data = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(str(path), [" ".join(str(error).split())]) from error
    assert isinstance(data, dict), "what a mapping was merged into"
    return check(RunConfig, _with_files_beside(path, _without_missing(data)), source=str(path))


def _read(path: Path) -> DictConfig:
    """A YAML file whose top level is a mapping.

    Raises:
        ConfigError: It is none, or not UTF-8.
        YAMLError: It is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8; a recipe is a YAML text in that encoding"
        raise ConfigError(str(path), [problem]) from error
    try:
        recipe = OmegaConf.load(io.StringIO(text))
    except OSError:  # what OmegaConf raises for a number or a truth value
        recipe = None
    if not isinstance(recipe, DictConfig):
        raise ConfigError(str(path), ["a recipe is a mapping of sections, as `model: {source: ...}`"])
    return recipe


def load_target(overrides: list[str]) -> TargetConfig:
    """The `target` section alone, from `key=value` items with or without `target.` before the key.

    Raises:
        ConfigError: With every problem found.
    """
    items = [item.removeprefix("target.") for item in _checked(overrides)]
    try:
        data = OmegaConf.to_container(OmegaConf.from_dotlist(items), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError("command line", [" ".join(str(error).split())]) from error
    sections = data if isinstance(data, dict) else {}
    return check(TargetConfig, {str(key): value for key, value in sections.items()}, source="command line")


def check(model: type[SectionT], data: dict[str, Any], *, source: str) -> SectionT:
    """Validate plain data against a section.

    Raises:
        ConfigError: With every problem found.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(source, [_explain(model, problem) for problem in error.errors()]) from error


def to_yaml(config: BaseModel) -> str:
    """The resolved recipe as YAML, every default written out."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _without_alternatives(recipe: Any, given: Any) -> Any:
    """The recipe without a training's `tokens` where the command line gives `minutes`, and the other way round."""
    for section in _TRAININGS:
        asked = given.get(section)
        said: Any = recipe.get(section) if OmegaConf.is_dict(recipe) else None
        if not (OmegaConf.is_dict(asked) and OmegaConf.is_dict(said)):
            continue
        for one, other in (("tokens", "minutes"), ("minutes", "tokens")):
            if asked.get(one) is not None and other not in asked:
                said.pop(other, None)
    return recipe


def _checked(overrides: list[str]) -> list[str]:
    wrong = [item for item in overrides if "=" not in item or item.startswith("=")]
    if wrong:
        raise ConfigError("command line", [f"{item!r} is not of the form key=value" for item in wrong])
    return overrides


def _without_missing(data: dict[Any, Any]) -> dict[str, Any]:
    """Leave out values marked `???`, OmegaConf's sign for "to be given", so that they are reported as missing."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if value != MISSING:
            kept[str(key)] = _without_missing(value) if isinstance(value, dict) else value
    return kept


def _with_files_beside(recipe: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Write `model.architecture`, which is relative to the recipe, as a path of its own."""
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("architecture"), str):
        return data
    return {**data, "model": {**model, "architecture": str(recipe.absolute().parent / model["architecture"])}}


RENAMED = {"steps": "rounds", "decay_share": "decay_fraction", "most_skipped": "max_consecutive_skips"}
"""Keys that had other names in earlier versions."""


def _explain(model: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        number = next((part for part in location if part.isdigit()), "0")
        known = [name.replace("*", number) for name in known_keys(model)]
        if (now := ".".join([*location[:-1], RENAMED.get(location[-1], "")])) in known:
            return f"{key}: is called {now} now"
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        close = close or [name for name in known if name.rsplit(".", 1)[-1] == location[-1]][:1]
        hint = f"did you mean {close[0]}?" if close else f"keys here: {', '.join(_siblings(known, location))}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = f" = {value!r}" if key and not isinstance(value, dict) else ""
    return f"{key}{shown}: {message}" if key else message


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a section and of those below it, with dots; `*` for the number of one out of several."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # `Section | None` too
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                of_many = get_origin(field.annotation) is dict
                found += known_keys(kind, f"{prefix}{name}.{'*.' if of_many else ''}")
    return found


def has_default(model: type[BaseModel], key: str, value: Any) -> bool:
    """Whether the value of a key, with dots and as JSON data, is what a recipe has that does not say it."""
    name, _, rest = key.partition(".")
    if (field := model.model_fields.get(name)) is None:
        return False
    if not rest:
        return not field.is_required() and to_jsonable_python(field.get_default(call_default_factory=True)) == value
    if not field.is_required() and field.get_default(call_default_factory=True) is None:
        return False  # a section that is not there unless a recipe has it
    kinds = (field.annotation, *get_args(field.annotation))
    return any(
        has_default(kind, rest, value) for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)
    )


def _siblings(known: list[str], location: list[str]) -> list[str]:
    prefix = ".".join([*location[:-1], ""])
    return [name for name in known if name.startswith(prefix) and "." not in name[len(prefix) :]]
