"""Recipes that come with the package: find, list and copy them.

They live in `recipes/` at the top of the source tree, outside the package: they change on another schedule. An
installed wheel carries them as data files under `share/nemo_minitron/recipes` of its environment.
"""

import difflib
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nemo_minitron.errors import ConfigError

_SHARE = "share/nemo_minitron/recipes/"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A bundled recipe."""

    name: str
    """`family/stem`."""
    path: Path

    @property
    def purpose(self) -> str:
        """The first line of its opening comment."""
        first = self.path.read_text(encoding="utf-8").split("\n", 1)[0]
        return first.removeprefix("#").strip() if first.startswith("#") else ""


def bundled() -> list[Recipe]:
    """All of them, by name."""
    return sorted((Recipe(_name(path), path) for path in _paths()), key=lambda recipe: recipe.name)


def find(text: str) -> Path:
    """The file a user means: a path, or the name of a bundled recipe with or without its family.

    Raises:
        ConfigError: There is none, or more than one of that name.
    """
    path = Path(text)
    if path.is_file():
        return path
    recipes = bundled()
    matching = [recipe for recipe in recipes if text in (recipe.name, recipe.name.rpartition("/")[2])]
    if len(matching) == 1:
        return matching[0].path
    if matching:
        raise ConfigError(text, [f"is more than one recipe: {', '.join(recipe.name for recipe in matching)}"])
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        raise ConfigError(text, ["no such recipe file"])
    names = [recipe.name for recipe in recipes]
    close = difflib.get_close_matches(text, [*names, *(name.rpartition("/")[2] for name in names)], n=1)
    hint = f"did you mean {close[0]}?" if close else "`nemo-minitron ls` lists those that come with the package"
    raise ConfigError(text, [f"no such file or bundled recipe; {hint}"])


def copy(name: str, destination: Path) -> Path:
    """Copy a recipe to edit it, and its `model.architecture` beside it; a folder as destination keeps the file's name.

    Raises:
        ConfigError: There is no such recipe, or the destination exists.
    """
    source = find(name)
    target = destination / source.name if destination.is_dir() else destination
    copies = {target: source} | {target.parent / file: source.parent / file for file in _files_beside(source)}
    for path, original in copies.items():
        if path.exists() and (path == target or path.read_bytes() != original.read_bytes()):
            raise ConfigError(str(path), ["exists; name another file, or remove it first"])
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, original in copies.items():
        shutil.copyfile(original, path)
    return target


def _files_beside(recipe: Path) -> list[str]:
    """Files that a recipe needs beside it, relative to its folder."""
    import yaml

    try:
        data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        named = data["model"]["architecture"]
    except (yaml.YAMLError, KeyError, TypeError):
        return []
    return [named] if isinstance(named, str) and not Path(named).is_absolute() else []


def _paths() -> list[Path]:
    tree = Path(__file__).resolve().parents[2]
    if (tree / "setup.cfg").is_file() and (tree / "recipes").is_dir():
        return list((tree / "recipes").glob("**/*.yaml"))
    try:
        files = metadata.files("nemo_minitron") or []
    except metadata.PackageNotFoundError:
        return []
    return [
        Path(str(file.locate())).resolve() for file in files if _SHARE in file.as_posix() and file.suffix == ".yaml"
    ]


def _name(path: Path) -> str:
    parts = path.parts
    start = len(parts) - 1 - parts[::-1].index("recipes")
    return "/".join(parts[start + 1 :]).removesuffix(".yaml")
