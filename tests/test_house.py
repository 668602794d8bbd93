"""The house rules a machine can check: who imports whom, what an import does, and what must not be in here at all."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gradcomp
from gradcomp import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("transports", "integrations", "examples")
# These bring the parts together for a user at a keyboard, so they know them all.
TOOLS = ("__init__.py", "__main__.py", "cli.py", "bench/")


def sources(folder: str, *suffixes: str) -> list[Path]:
    """The files under ``folder``, not looking behind the links in gradcomp/."""
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(ROOT / folder)
        for name in names
        if name.endswith(suffixes or (".py",)) and "__pycache__" not in parent
    )


CORE = [path for path in sources("gradcomp") if not path.relative_to(ROOT / "gradcomp").as_posix().startswith(TOOLS)]
LIBRARY = [*sources("gradcomp"), *sources("transports"), *sources("integrations")]
PYTHON = [*LIBRARY, *sources("examples"), *sources("tests")]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Every module ``path`` imports, anywhere in it, for type checking too; from a import b gives a and a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offenders(paths: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    inside = tuple(f"{name}." for name in forbidden)
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imported(path)
        if name in forbidden or name.startswith(inside)
    ]


def test_there_is_something_to_check() -> None:
    assert len(CORE) > 15
    assert sources("transports")
    assert sources("integrations")


def test_the_core_imports_no_transport_and_no_integration() -> None:
    assert not offenders(CORE, tuple(f"gradcomp.{folder}" for folder in (*FOLDERS, "cli", "bench")))


def test_transports_and_integrations_do_not_know_each_other() -> None:
    assert not offenders(sources("transports"), ("gradcomp.integrations", "gradcomp.examples", "gradcomp.cli"))
    assert not offenders(sources("integrations"), ("gradcomp.transports", "gradcomp.cli"))


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="a source distribution holds copies in place of the links")
@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "gradcomp" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert link.is_dir()


IMPORT_ALONE = """
import os, sys, threading
import msgpack, numpy, torch, xxhash, zmq                # what these do is their own affair
import torch.distributed

read, events = [], []

class Environment(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") in ("os", "_collections_abc"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] == "gradcomp":
            read.append(f"{key} by {frame.f_globals['__name__']}")
        return super().__getitem__(key)

os.environ.__class__ = Environment
sys.addaudithook(lambda event, args: event in ("_thread.start_new_thread", "socket.__new__") and events.append(event))

def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()

before = tasks()
import gradcomp
assert not read, read
assert not events, events
assert tasks() == before, "a thread was started"
assert zmq.Context._instance is None, "a ZeroMQ context was made"
assert "gradcomp.transports.zmq" not in sys.modules, "a transport was loaded"
"""


def test_importing_does_nothing_else() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", IMPORT_ALONE], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("folder", ["gradcomp", *FOLDERS])
def test_modules_are_short(folder: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder, ".py", ".cpp", ".h")}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count >= 400}


def uses_pickle(node: ast.AST) -> bool:
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = node.id if isinstance(node, ast.Name) else node.attr
        return name.endswith("_object_list") or name in ("recv_pyobj", "send_pyobj", "recv_serialized")
    if isinstance(node, ast.keyword):
        return node.arg == "weights_only" and not (isinstance(node.value, ast.Constant) and node.value.value is True)
    return False


def test_no_pickle() -> None:
    modules = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.package")
    assert not offenders([*LIBRARY, *sources("examples")], modules)
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"
        for path in [*LIBRARY, *sources("examples")]
        for node in ast.walk(tree(path))
        if uses_pickle(node)
    ]
    assert not found


def test_every_library_module_says_what_it_is() -> None:
    assert not [
        str(path.relative_to(ROOT)) for path in LIBRARY if path.stat().st_size and not ast.get_docstring(tree(path))
    ]


def test_every_error_is_listed_drawn_and_handed_on() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(errors.__all__) == classes
    assert list(errors.__all__) == sorted(errors.__all__)
    for name in classes:
        assert issubclass(getattr(errors, name), errors.GradcompError)
        assert re.search(rf"\b{name}\b", errors.__doc__ or ""), f"{name} is not in the tree"
        assert getattr(gradcomp, name) is getattr(errors, name)
        assert name in gradcomp.__all__


def test_no_build_machine_is_named() -> None:
    # Put together here, so that this file does not hold what it looks for.
    paths = re.compile("|".join(rf"(?<![\w.~-])/{folder}/[a-z]" for folder in ("work", "home", "root", "Users", "tmp")))
    kinds = (".py", ".pyi", ".cpp", ".h", ".txt", ".toml", ".md", ".json", ".sh", "Makefile", "run")
    top = [path for path in ROOT.iterdir() if path.is_file() and path.name.endswith(kinds)]
    folders = ("gradcomp", *FOLDERS, "tests", "docs", ".ci")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in [*top, *(path for folder in folders for path in sources(folder, *kinds))]
        for match in paths.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found
