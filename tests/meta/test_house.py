"""Promises about the source tree itself: layers, lean imports, sizes of files, words that must not be there."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.cli import recipes
from nemo_minitron.config.load import load_recipe

ROOT = Path(__file__).parents[2]
MOST_LINES = 500
MOST_FUNCTION_LINES = 50
HEAVY = {"torch", "nemo", "megatron", "lightning", "transformers", "pydantic", "matplotlib", "numpy"}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function's code: neither its signature nor its docstring."""
    code = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - code[0].lineno + 1 if code else 0


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_free():
    assert not HEAVY & loaded_after("import nemo_minitron")


def test_the_command_line_loads_nothing_heavy_before_it_must():
    assert not HEAVY & loaded_after("import nemo_minitron.cli.main")


def test_help_answers_in_half_a_second():
    command = [sys.executable, "-m", "nemo_minitron", "--help"]

    def once() -> float:
        """Processor time, which other work on the machine does not stretch."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(5)) < 0.5


def test_public_names_exist():
    import nemo_minitron

    for name in nemo_minitron.__all__:
        assert getattr(nemo_minitron, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        nemo_minitron.Nope  # noqa: B018


@pytest.mark.parametrize("recipe", recipes.bundled(), ids=lambda recipe: recipe.name)
def test_every_recipe_loads_and_says_what_it_is_for(recipe):
    needed = [] if "tiny" not in recipe.name else ["model.source=m", "data.sources=[t]"]
    load_recipe(recipe.path, needed)
    assert recipe.purpose


def test_every_recipe_is_in_the_wheel():
    declared = (ROOT / "setup.cfg").read_text()
    for path in tracked("recipes/**/*.yaml", "recipes/**/*.json"):
        folder = path.parent.relative_to(ROOT)
        line = re.search(rf"^share/nemo_minitron/{folder} = (.*)$", declared, re.MULTILINE)
        assert line is not None
        assert f"{folder}/*{path.suffix}" in line[1].split(", ")


def test_files_and_functions_stay_short():
    problems = []
    for path in tracked("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > MOST_LINES:
            problems.append(f"{path}: {len(text.splitlines())} lines")
        if {"tests", "benchmarks"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and body_lines(node) > MOST_FUNCTION_LINES:
                problems.append(f"{path}:{node.lineno}: {node.name} has {body_lines(node)} lines")
    assert not problems, "\n".join(problems)


def test_nothing_is_left_undone_or_ties_us_to_one_machine():
    # Put together here, so that this file does not find itself.
    words = [
        "TO" + "DO",
        "FIX" + "ME",
        "raise " + "NotImplementedError",
        "/" + "work/",
        "/" + "root/",
    ]
    pattern = re.compile("|".join(rf"(?<![A-Za-z]){re.escape(word)}" for word in words))
    problems = []
    for path in tracked():
        if (
            path.suffix in (".py", ".md", ".cfg", ".toml", ".yaml", ".j2", ".css", ".txt", "")
            and path.name not in ("LICENSE", ".metadata")  # the index of a checkpoint is binary
        ):
            lines = path.read_text(encoding="utf-8").splitlines()
            problems += [f"{path}:{number}: {line}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert not problems, "\n".join(problems)


def test_no_package_index_is_named():
    index = re.compile(r"--(extra-)?index-url|pypi\.|/simple\b")
    problems = [
        str(path) for path in tracked() if path.suffix != ".py" and index.search(path.read_text(errors="replace"))
    ]
    assert not problems


def test_imports_point_down():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, wherever in it, for types only or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules.keys() or {node.module}
    return found & modules.keys()


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which reaches all the others."""
    reached: dict[str, set[str]] = {}
    for start, first in graph.items():
        todo, seen = list(first), set()
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reached[start] = seen
    rings = [frozenset(other for other in reached[name] if name in reached[other]) for name in graph]
    return [set(ring) for ring in sorted(set(rings) - {frozenset()}, key=sorted)]


def test_no_file_imports_itself_in_a_circle(capsys):
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in tracked("nemo_minitron/*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {name: imports_of(path, modules) - {name} for name, path in modules.items()}
    found = circles(graph)
    with capsys.disabled():
        print(f"\nimport circles between {len(graph)} files: {len(found)}")
    assert not found
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_no_test_module_imports_another(capsys):
    """What several of them need lies in tests/support."""
    names = re.compile(r"^tests(\.\w+)*\.test_\w+$")
    found = []
    for path in tracked("tests/*.py", "benchmarks/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            found += [f"{path.relative_to(ROOT)}: {name}" for name in modules if names.match(name)]
    with capsys.disabled():
        print(f"\nimports of one test module by another: {len(found)}")
    assert not found, found
