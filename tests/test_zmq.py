"""The ZeroMQ transport against hostile peers, dying peers and slow links."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

import pytest
import xxhash
import zmq
import zygote
from ports import free_port

from gradcomp.errors import ConfigError, HandshakeError, PeerLost, TransportError, TransportTimeout
from gradcomp.handshake import pack
from gradcomp.interfaces import Slot, Transport
from gradcomp.testing_transport import run_ranks
from gradcomp.transports.frames import BYE_SEEN, DATA, HELLO, MAX_CHUNK_BYTES, Header, digest_payload, pack_header
from gradcomp.transports.rendezvous import Meeting, Record
from gradcomp.transports.zmq import ZmqTransport

PORT = free_port()
_runs = iter(range(1000))


def world(world_size: int, **options: object) -> list[ZmqTransport]:
    run = f"run{next(_runs)}"
    shared = {"world_size": world_size, "master": f"127.0.0.1:{PORT}", "timeout_s": 10.0, "run": run} | options
    return [ZmqTransport.from_options(shared | {"rank": rank}) for rank in range(world_size)]


def connect(transport: Transport) -> None:
    transport.connect({"model": "m"}, max_message_bytes=4 << 20)


# Refusals.


def test_worlds_of_different_sizes_are_refused() -> None:
    small, big = world(2)[0], world(3)[1]
    big.run = small.run = "sizes"

    def body(transport: Transport) -> float:
        begin = time.monotonic()
        with pytest.raises(HandshakeError, match="differ in world_size") as found:
            connect(transport)
        assert found.value.field == "world_size"
        return time.monotonic() - begin

    assert max(run_ranks([small, big], body)) < 2


def test_a_missing_rank_is_named() -> None:
    def body(transport: Transport) -> None:
        with pytest.raises(TransportTimeout, match="rank 2 never came"):
            connect(transport)

    run_ranks(world(3, timeout_s=0.5)[:2], body)


def test_a_missing_master_is_named() -> None:
    transport = ZmqTransport(rank=1, world_size=2, master=f"127.0.0.1:{free_port()}", timeout_s=1.0)
    with pytest.raises(TransportTimeout, match="no rendezvous at 127"):
        connect(transport)


def test_other_addresses_than_loopback_are_refused() -> None:
    transport = ZmqTransport(rank=0, world_size=2, master=f"127.0.0.1:{PORT}", address="192.0.2.1")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1.*insecure=true"):
        connect(transport)


def test_ipc_leaves_nothing_behind(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def body(transport: Transport) -> None:
        connect(transport)
        folders = [entry for entry in os.scandir(str(tmp_path)) if entry.is_dir()]
        assert folders
        assert all(entry.stat().st_mode & 0o777 == 0o700 for entry in folders)
        transport.all_gather(Slot(0, 0, 0), b"x")

    run_ranks(world(2, ipc=True), body)
    assert not os.listdir(str(tmp_path))


def test_a_forked_child_is_refused() -> None:
    transport = ZmqTransport(rank=0, world_size=1)
    connect(transport)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            transport.close()  # does nothing
            transport.recv(0, Slot(0, 0, 0))
        except TransportError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


# Hostile strangers.


def _attack(endpoint: str, identity: bytes, header: bytes, stop: threading.Event) -> None:
    """Send junk, a little at a time, until told to stop: as a stranger, and under a peer's name."""
    random_bytes = random.Random(1).randbytes
    with zmq.Context() as context:
        for name in (b"stranger", identity):
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.routing_id = name
                dealer.connect(endpoint)
                for number in range(150):
                    frames = [random_bytes(number % 80) for _ in range(number % 4)]
                    if number % 3 == 0:
                        frames = [header, random_bytes(16)]
                    try:
                        dealer.send_multipart(frames or [b""], zmq.NOBLOCK)
                        dealer.send(header, zmq.NOBLOCK | zmq.SNDMORE)  # a message that is never finished
                    except zmq.Again:
                        stop.wait(0.01)
                    if number % 3 == 1:
                        dealer.send(bytes(MAX_CHUNK_BYTES + 5000), zmq.NOBLOCK)  # too long: ZeroMQ hangs up
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    while not stop.is_set():
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(random_bytes(200))
            stop.wait(0.02)


def test_strangers_do_no_harm() -> None:
    transports = world(2)

    def body(transport: Transport) -> int:
        assert isinstance(transport, ZmqTransport)
        connect(transport)
        assert transport._courier is not None
        peer = 1 - transport.rank
        link = transports[peer]
        transport.all_gather(Slot(0, 1, 0), b"both are connected")
        assert link._courier is not None
        mine = link._courier.links[transport.rank]  # as the peer sees this rank
        header = pack_header(Header(DATA, 1, 0, 1, 0, 0, 0, 0, 0, 16, 1 << 40), 0)
        stop = threading.Event()
        attacker = threading.Thread(
            target=_attack, args=(mine.endpoint, transport._courier.links[peer].identity, header, stop)
        )
        attacker.start()
        try:
            for step in range(60):
                payload = bytes([transport.rank, step]) * 50_000
                found = transport.all_gather(Slot(step, 0, 0), payload)
                assert found[peer] == bytes([peer, step]) * 50_000
                stop.wait(0.005)
        finally:
            stop.set()
            attacker.join(10)
        transport.all_gather(Slot(0, 2, 0), b"both are done")
        return transport._courier.junk_frames

    assert min(run_ranks(transports, body)) > 0


# A peer that says hello properly and then misbehaves.


class Rogue:
    """Rank 1 of 2, by hand."""

    def __init__(self, run: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger = 0
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        record = Record(
            rank=1,
            world_size=2,
            endpoint=f"tcp://127.0.0.1:{port}",
            identity=b"rogue-rank-one-x",
            incarnation=7,
            host=socket.gethostname(),
        )
        run += "/0"
        meeting = Meeting(("127.0.0.1", PORT), run, 1, 2, time.monotonic() + 10)
        theirs = meeting.exchange(record)[0]
        self.sequence = 0
        self.run = xxhash.xxh3_64_intdigest(run.encode())
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.linger = 0
        self.dealer.routing_id = record.identity
        self.dealer.connect(theirs.endpoint)
        hello = pack({"model": "m", "frames": 1, "run": run, "max_message_bytes": 4 << 20})
        self.send(self.header(hello, kind=HELLO), hello)

    def header(self, payload: bytes, **changes: int) -> Header:
        header = Header(DATA, self.run, 0, 7, 0, 0, 0, 0, self.sequence, len(payload), len(payload))
        self.sequence += 1
        return header._replace(**changes)

    def send(self, header: Header, payload: bytes, digest: int | None = None) -> None:
        self.dealer.send_multipart(
            [pack_header(header, digest_payload(payload) if digest is None else digest), payload]
        )

    def close(self) -> None:
        self.context.destroy(0)


def _hang_up(rogue: Rogue) -> None:
    rogue.send(rogue.header(b"x", total=9), b"x")
    rogue.close()


ROGUE_FRAMES: dict[str, Callable[[Rogue], object]] = {
    "another run": lambda rogue: rogue.send(rogue.header(b"x", run=1), b"x"),
    "frame 5 where 2 is due": lambda rogue: rogue.send(rogue.header(b"x", sequence=5), b"x"),
    "checksum": lambda rogue: rogue.send(rogue.header(b"x"), b"x", digest=1),
    "is over 4194304": lambda rogue: rogue.send(rogue.header(b"x", total=1 << 40), b"x"),
    "payload of 2 bytes": lambda rogue: rogue.send(rogue.header(b"x"), b"xx"),
    "payload of 3 bytes": lambda rogue: rogue.send(rogue.header(b"xx", total=9), b"xxx"),
    "header of 0 bytes": lambda rogue: rogue.dealer.send(b""),
    "without a payload": lambda rogue: rogue.dealer.send(pack_header(rogue.header(b""), digest_payload(b""))),
    "more than header": lambda rogue: rogue.dealer.send_multipart(
        [pack_header(rogue.header(b"x"), digest_payload(b"x")), b"x", b"more"]
    ),
    "nobody said": lambda rogue: rogue.send(rogue.header(b"", kind=BYE_SEEN), b""),
    "connection": _hang_up,
}


@pytest.mark.parametrize("reason", ROGUE_FRAMES)
def test_a_peer_that_breaks_the_protocol_is_lost(reason: str) -> None:
    transport = world(2)[0]

    def misbehave() -> None:
        rogue = Rogue(str(transport.run))
        rogue.send(rogue.header(b"good"), b"good")
        ready.wait(10)
        ROGUE_FRAMES[reason](rogue)
        done.wait(10)
        rogue.close()

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=misbehave)
    thread.start()

    def body(transport: Transport) -> None:
        connect(transport)
        assert bytes(transport.wait([transport.recv(1, Slot(0, 0, 0))])[0]) == b"good"
        ready.set()
        with pytest.raises(PeerLost, match=reason) as found:
            transport.wait([transport.recv(1, Slot(1, 0, 0))])
        assert found.value.peer == 1
        done.set()

    try:
        run_ranks([transport], body, deadline_s=20)
    finally:
        ready.set()
        done.set()
        thread.join(10)


def test_an_io_thread_that_dies_fails_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(transport: Transport) -> None:
        assert isinstance(transport, ZmqTransport)
        connect(transport)
        transport.all_gather(Slot(0, 0, 0), b"works")
        if transport.rank == 0:
            assert transport._courier is not None
            transport.wait([transport.recv(1, Slot(0, 1, 0))])  # what this rank sent is there

            def broken() -> None:
                raise MemoryError("no more")

            monkeypatch.setattr(transport._courier, "_send_round", broken)
            transport.send(1, Slot(1, 0, 0), [b"x"])
            with pytest.raises(TransportError, match="I/O thread died: MemoryError: no more"):
                transport.wait([transport.recv(1, Slot(1, 0, 0))])
            with pytest.raises(TransportError, match="died"):
                transport.send(1, Slot(2, 0, 0), [b"x"])
        else:
            transport.send(0, Slot(0, 1, 0), [b"so far"])
            with pytest.raises(PeerLost):
                transport.wait([transport.recv(0, Slot(1, 0, 0))])

    run_ranks(world(2), body)


# Pacing.


def test_a_paced_link_carries_its_rate() -> None:
    payload = bytes(500_000)

    def body(transport: Transport) -> float:
        connect(transport)
        transport.all_gather(Slot(0, 1, 0), b"begin")
        begin = time.monotonic()
        for step in range(5):
            transport.all_gather(Slot(step, 0, 0), payload)
        return time.monotonic() - begin

    # 2.5 MB at 20 Mb/s is one second: never less, and not much more unless this machine is very busy.
    for took_s in run_ranks(world(2, rate="20mbit"), body):
        assert 0.95 < took_s < 2.5


# Processes that die, stop, and leave.

_PROCESS = """
import sys, time
from gradcomp.errors import PeerLost
from gradcomp.interfaces import Slot
from gradcomp.transports.zmq import ZmqTransport
transport = ZmqTransport(timeout_s=60.0)
transport.connect({"model": "m"}, max_message_bytes=1 << 20)
transport.all_gather(Slot(0, 0, 0), b"x")
print("ready", flush=True)
for peer in reversed(range(transport.rank + 1, 3)):
    try:
        transport.wait([transport.recv(peer, Slot(1, 0, 0))])
    except PeerLost as error:
        print("lost", error.peer, flush=True)
if transport.rank:
    time.sleep(60)
sys.exit(3)  # without closing
"""


def _start(world_size: int, program: str) -> list[zygote.Popen]:
    shared = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")} | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [
        zygote.Popen(
            [sys.executable, "-c", program], env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]


def _kill(processes: list[zygote.Popen]) -> None:
    for process in processes:
        process.kill()


def _says(process: zygote.Popen, line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"


def test_a_killed_and_a_stopped_process_are_lost_and_nobody_hangs() -> None:
    processes = _start(3, _PROCESS)
    # Whatever goes wrong, nothing reads from these processes for ever.
    watchdog = threading.Timer(60, _kill, [processes])
    watchdog.start()
    try:
        for process in processes:
            _says(process, "ready")
        processes[2].kill()
        begin = time.monotonic()
        _says(processes[0], "lost 2")
        _says(processes[1], "lost 2")
        assert time.monotonic() - begin < 5
        processes[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        _says(processes[0], "lost 1")
        assert time.monotonic() - begin < 5
        assert processes[0].wait(10) == 3
    finally:
        watchdog.cancel()
        for process in processes:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


def test_under_torchrun_the_agent_hosts_the_rendezvous(tmp_path: object) -> None:
    script = os.path.join(str(tmp_path), "script.py")
    with open(script, "w") as file:
        file.write(
            "import os\n"
            "import torch.distributed as dist\n"
            "from gradcomp.interfaces import Slot\n"
            "from gradcomp.transports.zmq import ZmqTransport\n"
            "assert os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'True'\n"
            "dist.init_process_group('gloo')\n"
            "for turn in range(2):\n"
            "    transport = ZmqTransport(timeout_s=30.0)\n"
            "    transport.connect({'model': 'm'}, max_message_bytes=100)\n"
            "    found = transport.all_gather(Slot(0, 0, 0), bytes([transport.rank, turn]))\n"
            "    assert [bytes(one) for one in found] == [bytes([0, turn]), bytes([1, turn])]\n"
            "dist.destroy_process_group()\n"
        )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    done = zygote.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
