"""Hosts as network namespaces: gradcomp.bench.lab."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradcomp.bench import lab
from gradcomp.bench.lab import Lab
from gradcomp.errors import ConfigError, WorkerFailed

SAYS_WHO = "import os, socket; print(os.environ['RANK'], os.environ['WORLD_SIZE'], len(socket.if_nameindex()))"


def names() -> str:
    return subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.mark.root
def test_each_host_is_a_rank_and_nothing_is_left_of_it() -> None:
    with Lab(3, "100mbit") as hosts:
        assert hosts.run([sys.executable, "-c", SAYS_WHO], timeout_s=30) == [f"{i} 3 2\n" for i in range(3)]
        assert f"gc{os.getpid()}host2" in names()
    assert f"gc{os.getpid()}" not in names()


@pytest.mark.root
def test_links_have_the_rate_asked_for_and_then_another() -> None:
    def shaped(hosts: Lab, host: int) -> str:
        command = ["tc", "-n", f"gc{os.getpid()}host{host}", "qdisc", "show", "dev", "eth0"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout

    with Lab(2, "10mbit") as hosts:
        assert "rate 10Mbit" in shaped(hosts, 1)
        hosts.set_rate("1.5gbit")
        assert "rate 1500Mbit" in shaped(hosts, 0)
        with pytest.raises(ConfigError, match=r"rate='slow' is not allowed"):
            hosts.set_rate("slow")
        hosts.set_rate(None)
        assert "tbf" not in shaped(hosts, 1)
    with Lab(2, "10mbit", burst_bytes=128 << 10) as hosts:
        assert "burst 128Kb" in shaped(hosts, 0)


@pytest.mark.root
def test_what_the_first_rank_says_is_heard_while_it_runs(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    script = (
        "import os, pathlib, sys, time; print('half', end='', flush=True); print(' a line', flush=True)\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\n"
        "print('answered')"
    )
    heard: list[str] = []

    def listen(line: str) -> None:
        heard.append(line)
        answer.touch()

    with Lab(2) as hosts:
        hosts.run([sys.executable, "-c", script, str(answer)], timeout_s=60, listener=listen)
    assert heard == ["half a line", "answered"]


@pytest.mark.root
def test_sigterm_leaves_nothing_behind() -> None:
    script = (
        "from gradcomp.bench.lab import Lab\n"
        "with Lab(2) as hosts:\n"
        "    print('there', flush=True)\n"
        "    hosts.run(['sleep', '600'], timeout_s=600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "there\n"
            assert f"gc{program.pid}host1" in names()
            program.terminate()
            assert program.wait(60) == 128 + signal.SIGTERM
        finally:
            program.kill()
    assert f"gc{program.pid}" not in names()


@pytest.mark.root
def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    script = "import os, sys, time; sys.exit('a bad day') if os.environ['RANK'] == '1' else time.sleep(600)"
    with Lab(2) as hosts, pytest.raises(WorkerFailed, match=r"rank 1 ended with status 1\na bad day"):
        hosts.run([sys.executable, "-c", script], timeout_s=60)


@pytest.mark.root
def test_a_run_has_a_deadline() -> None:
    with Lab(1) as hosts, pytest.raises(WorkerFailed, match=r"rank 0 was not done within 0\.5 s"):
        hosts.run([sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=0.5)


def test_without_root_or_tools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="need root"):
        Lab(2)
    monkeypatch.setattr(lab.os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab.shutil, "which", lambda tool: None)
    with pytest.raises(ConfigError, match="install iproute2"):
        Lab(2)


@pytest.mark.parametrize(("hosts", "rate", "named"), [(0, None, "hosts"), (65, None, "hosts"), (2, "fast", "rate")])
def test_what_cannot_be_is_refused(hosts: int, rate: str | None, named: str) -> None:
    with pytest.raises(ConfigError, match=f"lab: {named}="):
        Lab(hosts, rate)


def test_a_burst_holds_a_segment() -> None:
    with pytest.raises(ConfigError, match="lab: burst_bytes=1500"):
        Lab(2, burst_bytes=1500)
