"""Forked processes are what subprocess's would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zygote
from zygote import Popen, run

DEADLINE_S = 90.0
forks = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.environ.get("GRADCOMP_TEST_PROCESSES") == "fresh",
    reason="all processes are fresh interpreters",
)
LOADED = "import sys; print('torch' in sys.modules)"


def said(*arguments: str, **options: object) -> str:
    """What a process writes that ends well."""
    done = run([sys.executable, *arguments], timeout=DEADLINE_S, capture_output=True, text=True, check=True, **options)
    return str(done.stdout)


@forks
def test_a_child_has_imported_what_takes_long_and_is_ours() -> None:
    script = f"{LOADED}; import os, threading; print(os.getppid(), os.getpgrp(), threading.active_count())"
    assert said("-c", script).split() == ["True", str(os.getpid()), str(os.getpgrp()), "1"]


@forks
def test_what_torch_and_sklearn_set_while_imported_changes_nothing() -> None:
    set_by_them = {"TORCHINDUCTOR_CACHE_DIR": "/nowhere/x", "KMP_INIT_AT_FORK": "FALSE", "KMP_DUPLICATE_LIB_OK": "True"}
    assert said("-c", LOADED, env=os.environ | set_by_them) == "True\n"


@forks
def test_what_is_read_early_makes_a_fresh_interpreter() -> None:
    assert said("-c", LOADED, env=os.environ | {"TORCH_UNHEARD_OF": "1"}) == "False\n"
    assert said("-W", "error", "-c", LOADED) == "False\n"
    assert said("-c", LOADED, umask=0o77) == "False\n"


def test_arguments_folder_environment_and_path(tmp_path: Path) -> None:
    script = (
        "import os, sys; print(os.getcwd(), sys.argv[1:], sys.path[:2], os.environ.get('A'), 'HOME' in os.environ);"
        "print(__name__, __import__('__main__').__dict__ is globals())"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "program.py").write_text(script)
    environment = {"A": "b", "PYTHONPATH": "/some/where"}
    for what, path in (("folder/program.py", tmp_path / "folder"), ("-m", tmp_path), ("-c", "")):
        name = {"-m": ["folder.program"], "-c": [script]}.get(what, [])
        first, second = said(what, *name, "one", "two", cwd=tmp_path, env=environment).splitlines()
        assert first == f"{tmp_path} ['one', 'two'] {[str(path), '/some/where']} b False"
        assert second == "__main__ True"


def test_ends(tmp_path: Path) -> None:
    def end(script: str) -> tuple[int, str]:
        done = run([sys.executable, "-c", script], timeout=DEADLINE_S, stderr=subprocess.PIPE, text=True)
        return done.returncode, done.stderr

    assert end("import sys; sys.exit(3)") == (3, "")
    assert end("import os; os._exit(4)") == (4, "")
    assert end("import sys; sys.exit('so')") == (1, "so\n")
    assert end("import os; os.abort()")[0] == -signal.SIGABRT
    status, errors = end("1 / 0")
    assert status == 1
    assert errors.endswith("ZeroDivisionError: division by zero\n")
    script = f"import atexit, pathlib; atexit.register(pathlib.Path({str(tmp_path / 'left')!r}).touch)"
    assert end(script) == (0, "")
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(number: int) -> None:
    script = "import time; print('here', flush=True); time.sleep(600)"
    with Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == -number


def test_standard_input_and_lines_as_they_are_written() -> None:
    script = "import sys\nfor line in sys.stdin: print(line.upper(), end='')"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with Popen([sys.executable, "-c", script], env=environment, **pipes) as process:
        for word in ("a", "b"):
            process.stdin.write(f"{word}\n")
            assert process.stdout.readline() == f"{word.upper()}\n"


def test_children_share_no_random_numbers_and_have_the_threads_they_ask_for() -> None:
    script = "import random, numpy, torch; print(random.random(), numpy.random.random(), torch.rand(1).item());"
    found = [
        said("-c", script + "print(torch.get_num_threads())", env=os.environ | {"OMP_NUM_THREADS": threads}).split()
        for threads in ("1", "3")
    ]
    assert len({number for line in found for number in line[:3]}) == 6
    assert [threads for *_, threads in found] == ["1", "3"]


@forks
def test_children_die_with_the_tests_process(tmp_path: Path) -> None:
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = (
        f"import sys; sys.path.insert(0, {str(Path(zygote.__file__).parent)!r})\nimport zygote\n"
        f"zygote._Shared.zygote = zygote.Zygote(modules=[])\nzygote.Popen([sys.executable, '-c', {sleeper!r}]).wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        process.kill()
        end = time.monotonic() + DEADLINE_S
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
