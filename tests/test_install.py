"""What setup.py asks for and constraints.txt pins, what a module may import, how `make` finds Python."""

import ast
import importlib.metadata
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deit

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {"runs", "build", "dist"}
TOOLS_OF_PIP = {"pip", "wheel"}


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """Return what setup.py hands to setuptools."""
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **kw: arguments.update(kw))
        patch.chdir(REPOSITORY)
        runpy.run_path(str(REPOSITORY / "setup.py"), run_name="__main__")
    return arguments


def requirements(arguments: dict) -> list[Requirement]:
    texts = [*arguments["install_requires"], *arguments["extras_require"]["test"]]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, list[Requirement]]:
    """Return the lines of constraints.txt by package."""
    found: dict[str, list[Requirement]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def applies(requirement: Requirement, *, extra: str = "", python: str | None = None) -> bool:
    environment = {"extra": extra} | ({"python_version": python} if python else {})
    return requirement.marker is None or requirement.marker.evaluate(environment)


def installed(requirement: Requirement) -> str | None:
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def dependencies(requirement: Requirement) -> list[Requirement]:
    """Return what an installed package asks for on this machine, its chosen extras included."""
    texts = importlib.metadata.requires(requirement.name) or []
    extras = ["", *requirement.extras]
    return [r for r in map(Requirement, texts) if any(applies(r, extra=extra) for extra in extras)]


def test_the_version_is_the_package_s_own_and_only_the_package_is_installed(setup_arguments):
    assert setup_arguments["version"] == deit.__version__
    assert "deit" in setup_arguments["packages"]
    assert all(name.split(".")[0] == "deit" for name in setup_arguments["packages"])


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_every_requirement_has_exactly_one_pinned_version_and_its_range_admits_it(setup_arguments, python):
    for requirement in requirements(setup_arguments):
        lines = [p for p in pins()[canonicalize_name(requirement.name)] if applies(p, python=python)]
        assert len(lines) == 1, f"{requirement} on Python {python}"
        (pin,) = lines[0].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} refuses {pin}"


def test_every_package_that_is_needed_in_turn_is_pinned(setup_arguments):
    here = {name: line for name, lines in pins().items() for line in lines if applies(line)}
    other = [str(line) for line in here.values() if not line.specifier.contains(installed(line) or "0")]
    if other:
        pytest.skip(f"this environment is not the pinned one: {other[0]} and {len(other) - 1} others differ")
    waiting, seen = requirements(setup_arguments), set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), *sorted(requirement.extras))
        if key not in seen:
            seen.add(key)
            waiting.extend(dependencies(requirement))
    needed = {name for name, *_ in seen}
    assert needed - set(here) == set(), "add to constraints.txt"
    assert set(here) - needed - TOOLS_OF_PIP == set(), "nothing needs these: remove from constraints.txt"


def imported(tree: ast.AST, *, lazily: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (top package, whether a function imports it when it is called) of every import."""
    for node in ast.iter_child_nodes(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        yield from ((name.split(".")[0], lazily) for name in names)
        yield from imported(node, lazily=lazily or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_every_package_that_the_code_or_a_test_imports_is_asked_for(setup_arguments):
    """An extra may ask for what a tool, or a function when it is called, imports: all else runs without it."""
    asked = {canonicalize_name(requirement.name) for requirement in requirements(setup_arguments)} | {"deit"}
    extras = [Requirement(text) for texts in setup_arguments["extras_require"].values() for text in texts]
    asked_by_extras = asked | {canonicalize_name(requirement.name) for requirement in extras}
    providers = importlib.metadata.packages_distributions()
    for folder in ("deit", "configs", "tests", "tools"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for top, lazily in imported(ast.parse(path.read_text(encoding="utf-8"))):
                packages = set(map(canonicalize_name, providers.get(top, ())))
                enough = packages & (asked_by_extras if lazily or folder == "tools" else asked)
                assert enough or not packages, f"{path.name} imports {top}: add it to setup.py"


def test_an_import_inside_a_function_is_told_from_one_at_the_top():
    code = "import a.b\nif a:\n    from c import d\nclass E:\n    def f(self):\n        with g:\n            import h\n"
    assert list(imported(ast.parse(code))) == [("a", False), ("c", False), ("h", True)]


def doors(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, what) of imports that have one door."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [f"tensorflow.{node.attr}"] if ast.unparse(node.value) == "tf" and node.attr == "keras" else []
        for name in names:
            top = name.split(".")[0]
            if top in ("keras", "tf_keras") or name.startswith("tensorflow.keras"):
                yield node.lineno, "keras"
            if top == "tensorflow_addons":
                yield node.lineno, top


ONE_DOOR = {"keras": "deit/keras.py", "tensorflow_addons": "deit/addons.py"}


def python_files() -> Iterator[pathlib.Path]:
    for folder, names, files in os.walk(REPOSITORY):
        names[:] = [name for name in names if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        yield from (pathlib.Path(folder, file) for file in files if file.endswith(".py"))


def test_legacy_keras_and_addons_have_one_door_each():
    found = []
    for path in python_files():
        relative = path.relative_to(REPOSITORY).as_posix()
        for line, what in doors(ast.parse(path.read_text(encoding="utf-8"))):
            if ONE_DOOR.get(what) != relative:
                found.append(f"{relative}:{line}: {what}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import tf_keras",
        "from tf_keras import layers",
        "import keras",
        "from tensorflow import keras",
        "import tensorflow.keras.layers as layers",
        "tf.keras.Model",
        "import tensorflow_addons as tfa",
        "from tensorflow_addons.optimizers import AdamW",
    ],
)
def test_the_search_for_other_doors_finds(code):
    assert list(doors(ast.parse(code)))


@pytest.mark.parametrize("code", ["from deit import keras", "keras.Model", "from . import keras"])
def test_the_search_for_other_doors_passes_over(code):
    assert not list(doors(ast.parse(code)))


def test_the_door_to_addons_leaves_no_second_keras_in_the_process():
    code = "import sys, deit.addons; print(*(n for n in sys.modules if n.split('.')[0] in ('keras', 'tf_keras')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()[-1].split()
    assert "tf_keras" in found
    assert [name for name in found if name.split(".")[0] == "keras"] == []


def run_make(folder: pathlib.Path, *arguments: str, path: pathlib.Path) -> subprocess.CompletedProcess:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    environment = {"PATH": str(path), "LC_ALL": "C"}
    return subprocess.run([make, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def clone(tmp_path) -> pathlib.Path:
    """Return a folder with what the set-up reads and an empty `bin` to serve as PATH."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def put_program(path: pathlib.Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("target", [".venv", "quickstart", "test", "lint"])
def test_without_a_python_make_says_in_one_line_how_to_get_one(clone, target):
    put_program(clone / "bin" / "python3.11", "exit 127")  # what a version manager leaves behind
    done = run_make(clone, target, path=clone / "bin")
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no working Python 3.10 or 3.11" in done.stderr and "make PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()


def test_make_takes_the_first_python_that_runs_and_the_one_it_is_told(clone):
    put_program(clone / "bin" / "python3.11", "exit 127")
    put_program(clone / "bin" / "python3.10", "exit 0")
    put_program(clone / "bin" / "python3", "exit 0")
    put_program(clone / "bin" / "mine", "exit 0")
    assert "with python3.10:" in run_make(clone, "-n", ".venv", path=clone / "bin").stdout
    assert "with mine:" in run_make(clone, "-n", ".venv", "PYTHON=mine", path=clone / "bin").stdout


@pytest.mark.parametrize("changed", ["setup.py", "constraints.txt"])
def test_the_set_up_is_done_again_only_when_a_list_of_packages_changed(clone, changed):
    put_program(clone / "bin" / "python3", "exit 0")
    (clone / ".venv").mkdir()
    (clone / ".venv" / "installed").touch()
    for name in ("setup.py", "constraints.txt"):
        os.utime(clone / name, (1e9, 1e9))
    assert "Installing" not in run_make(clone, "-n", ".venv", path=clone / "bin").stdout
    os.utime(clone / changed, (4e9, 4e9))
    assert "Installing" in run_make(clone, "-n", ".venv", path=clone / "bin").stdout
