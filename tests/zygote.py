"""Processes of Python that need not import torch: forked from one that has.

A fresh interpreter takes seconds of processor time until torch is there and an optimizer has made its first step, and
the tests start hundreds of them. :class:`Popen` is ``subprocess.Popen``, and :func:`run` is ``subprocess.run``, for
commands ``[sys.executable, SCRIPT or "-m" MODULE or "-c" CODE, ...]``, also behind ``ip netns exec HOST``. The first
such command starts the zygote, one a pytest worker: a process that has imported what takes long and otherwise done
nothing. It then forks the children, each of which takes on the file descriptors, the environment, the folder and the
arguments it was given, and runs its program as ``__main__`` to the end of an ordinary interpreter's life.

A child is a true child of the test's process (the zygote forks twice, and the orphan comes to whoever asked to be the
reaper), so that pids, signals, exit statuses and waiting are the operating system's own. It is killed if the test's
process dies. All that is shared with the zygote is what importing leaves behind: there are no threads, sockets, CUDA
contexts or random numbers drawn before the fork.

What only a fresh interpreter can be is started as one: where fork or prctl is missing, a program or an option this
module does not know, an environment that differs in what is read while starting or importing, or all of them when
GRADCOMP_TEST_PROCESSES=fresh. Tests of imports, of memory and of CUDA use ``subprocess`` itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

# What ranks, servers and launchers import. Whatever is missing is left to those that need it.
PRELOADED = (
    "torch._dynamo",  # which the first step of an optimizer imports
    "torch.distributed.checkpoint",
    "torch.distributed.launcher.api",
    "torch.nn.parallel.distributed",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
    "sklearn.datasets",
    "gradcomp.cli",
    "gradcomp.integrations.checkpoint",
    "gradcomp.integrations.ddp",
    "gradcomp.integrations.launch",
    "gradcomp.integrations.serve",
    "gradcomp.integrations.worker",
    "gradcomp.transports.hierarchical",
    "gradcomp.transports.inproc",
    "gradcomp.transports.server_link",
    "gradcomp.transports.torch_distributed",
    "gradcomp.transports.zmq",
)
# Variables that are read when Python starts or a module is imported: too late after the fork.
# (Not those that torch and scikit-learn set themselves while they are imported: TORCHINDUCTOR_CACHE_DIR, KMP_...)
READ_EARLY = re.compile(
    r"PYTHON(?!UNBUFFERED$|PATH$)|LD_|GRADCOMP_KERNELS|OMP_(?!NUM_THREADS$)|MKL_|TORCH_|TORCHDYNAMO_|PYTORCH_"
)
KNOWN_OPTIONS = {"bufsize", "cwd", "encoding", "env", "errors", "stderr", "stdin", "stdout", "text"}
START_S = 120.0
MAX_REQUEST_BYTES = 128 << 10
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLONE_NEWNET = 0x40000000


def _prctl(option: int, value: int) -> bool:
    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


# -- the side of the tests ---------------------------------------------------------------------------------------------


class Zygote:
    """The process that forks, and a socket to it."""

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        self.environment = dict(os.environ)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # As many threads as a fresh interpreter would have is for each child to say; BLAS may start none before a fork.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *modules],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._socket.settimeout(START_S)
        self._usable: bool | None = None

    @property
    def usable(self) -> bool:
        """Whether it can fork; known, and waited for, when it has imported all it imports."""
        with self._lock:
            if self._usable is None:
                try:
                    self._usable = self._socket.recv(1) == b"1"
                except OSError:
                    self._usable = False
            return self._usable

    def differs(self, environment: Mapping[str, str]) -> bool:
        """Whether a fresh interpreter in this environment would not be what a child is."""
        names = filter(READ_EARLY.match, {*environment, *self.environment})
        return any(environment.get(name) != self.environment.get(name) for name in names)

    def fork(self, job: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """A child of this process that does ``job``; its pid."""
        message = json.dumps(job).encode()
        with self._lock:
            _prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._socket, [message], descriptors)
                return int(self._socket.recv(32))
            finally:
                _prctl(PR_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


class _Shared:
    lock = threading.Lock()
    zygote: Zygote | None = None


def zygote() -> Zygote | None:
    """That of this process, started when first asked for and not waited for; None where there can be none."""
    if not sys.platform.startswith("linux") or os.environ.get("GRADCOMP_TEST_PROCESSES") == "fresh":
        return None
    with _Shared.lock:
        if _Shared.zygote is None:
            _Shared.zygote = Zygote()
        return _Shared.zygote


def close() -> None:
    """End it. Its children live on."""
    with _Shared.lock:
        if _Shared.zygote is not None:
            _Shared.zygote.close()
            _Shared.zygote = None


class Popen(subprocess.Popen[Any]):
    """See the module."""

    def __init__(self, args: Sequence[str], *, start_new_session: bool = False, **options: Any) -> None:
        self._job = _job(list(args), options, start_new_session)
        super().__init__(args, start_new_session=start_new_session, **options)

    # Nobody promises that this method stays. Where it is not called, children are fresh interpreters; a test says so.
    def _execute_child(self, *given: Any) -> None:
        parent = zygote() if self._job is not None else None
        if parent is None or parent.differs(self._job["env"]) or not parent.usable:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        pipes = given[10:16]
        wanted = (pipes[0], pipes[3], pipes[5])
        descriptors = [own if pipe == -1 else pipe for own, pipe in enumerate(wanted)]
        try:
            self.pid = parent.fork(self._job, descriptors)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(
    args: Sequence[str], *, timeout: float, capture_output: bool = False, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """As ``subprocess.run``."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _job(args: list[str], options: dict[str, Any], new_session: bool) -> dict[str, Any] | None:
    """What a child is to do; None if it must be a fresh interpreter."""
    host = None
    if args[:3] == ["ip", "netns", "exec"]:
        host, args = args[3], args[4:]
    if not set(options) <= KNOWN_OPTIONS or args[0] != sys.executable or len(args) < 2:
        return None
    if args[1].startswith("-") and (args[1] not in ("-m", "-c") or len(args) < 3):
        return None
    environment = options.get("env")
    job = {
        "arguments": args[1:],
        "env": dict(os.environ if environment is None else environment),
        "folder": os.path.abspath(options.get("cwd") or os.getcwd()),
        "host": host,
        "new_session": new_session,
        "parent": os.getpid(),
    }
    return job if len(json.dumps(job)) < MAX_REQUEST_BYTES else None


# -- the zygote --------------------------------------------------------------------------------------------------------


def serve(control: socket.socket, modules: Sequence[str]) -> tuple[dict[str, Any], int, list[str]]:
    """Fork a child for every request, and end with the process that asks; in a child it returns.

    Returns:
        What the child is to do, the number of threads torch would use, and the path without PYTHONPATH.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever interrupts the tests means them
    sys.path.pop(0)  # the folder of this file
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [entry for entry in sys.path if entry not in theirs]
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch = sys.modules.get("torch")
    threads = 1 if torch is None else torch.get_num_threads()
    alone = len(os.listdir("/proc/self/task")) == 1 and not (torch and torch.cuda.is_initialized())
    control.send(b"1" if alone else b"0")
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 2 * MAX_REQUEST_BYTES, 3)
        if not message:
            sys.exit()
        job = json.loads(message)
        own, childs = os.pipe()
        between = os.fork()
        if not between:
            _be_orphaned(childs, job["parent"])
            os.close(own)
            os.close(childs)
            control.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return job, threads, path
        for descriptor in (childs, *descriptors):
            os.close(descriptor)
        pid = os.read(own, 32)
        os.close(own)
        os.waitpid(between, 0)
        control.send(pid)


def _be_orphaned(told: int, parent: int) -> None:
    """Go on as a child of the process that asked, which dies with it; ``told`` learns the pid."""
    between = os.getpid()
    child = os.fork()
    if child:
        os.write(told, str(child).encode())
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.0005)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def become(job: Mapping[str, Any], threads: int, path: list[str]) -> types.CodeType | str:
    """Take on what a fresh interpreter would have been given; its program, or the name of its module."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["new_session"]:
        os.setsid()
    if job["host"] is not None:
        namespace = os.open(f"/var/run/netns/{job['host']}", os.O_RDONLY)
        if ctypes.CDLL(None).setns(namespace, CLONE_NEWNET) != 0:
            sys.exit(f"no such network namespace: {job['host']}")
        os.close(namespace)
    os.chdir(job["folder"])
    environment: dict[str, str] = job["env"]
    os.environ.clear()
    os.environ.update(environment)
    _seed_and_threads(int(environment.get("OMP_NUM_THREADS") or threads), threads)
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    what, *more = job["arguments"]
    first = {"-m": job["folder"], "-c": ""}.get(what, os.path.dirname(os.path.abspath(what)))
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *added, *path]
    sys.argv[:] = more if what == "-m" else [what, *(more[1:] if what == "-c" else more)]
    if what == "-m":
        return str(more[0])
    if what == "-c":
        return compile(more[0], "<string>", "exec")
    with open(what, "rb") as file:
        return compile(file.read(), what, "exec")


def _seed_and_threads(threads: int, usual: int) -> None:
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
        if threads != usual:
            sys.modules["torch"].set_num_threads(threads)


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as control:
        job, threads, path = serve(control, sys.argv[2:])
    program = become(job, threads, path)
    if isinstance(program, str):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    module = types.ModuleType("__main__")
    if job["arguments"][0] != "-c":
        module.__file__ = job["arguments"][0]
    sys.modules["__main__"] = module
    exec(program, module.__dict__)


if __name__ == "__main__":
    main()
