"""A man in the middle between workers and a parameter server, who loses some frames and doubles others."""

from __future__ import annotations

import random
import threading

import zmq


class Relay:
    """Passes frames on, both ways, in a thread of its own; each worker's connection is one of its own behind it, too.

    Args:
        address: ``host:port`` of the server.
        drop, double: shares of the frames.

    Attributes:
        address: where to connect instead.
        passed, dropped, doubled: frames so far.
    """

    def __init__(self, address: str, *, drop: float, double: float, seed: int) -> None:
        self._behind = f"tcp://{address}"
        self._drop, self._double = drop, double
        self._random = random.Random(seed)
        self.passed = self.dropped = self.doubled = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._socket(zmq.ROUTER)
        self.address = f"127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._identities: dict[zmq.Socket[bytes], bytes] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._front, zmq.POLLIN)
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *details: object) -> None:
        self._stop = True
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._context.destroy(0)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        return socket

    def _run(self) -> None:
        while not self._stop:
            for socket, _ in self._poller.poll(50):
                parts = socket.recv_multipart()
                if socket is self._front:
                    identity, *frame = parts
                    self._pass(self._back(identity), frame)
                else:
                    self._pass(self._front, [self._identities[socket], *parts])

    def _back(self, identity: bytes) -> zmq.Socket[bytes]:
        if identity not in self._backs:
            back = self._socket(zmq.DEALER)
            back.connect(self._behind)
            self._poller.register(back, zmq.POLLIN)
            self._backs[identity], self._identities[back] = back, identity
        return self._backs[identity]

    def _pass(self, socket: zmq.Socket[bytes], parts: list[bytes]) -> None:
        chance = self._random.random()
        if chance < self._drop:
            self.dropped += 1
            return
        self.passed += 1
        socket.send_multipart(parts)
        if chance < self._drop + self._double:
            self.doubled += 1
            socket.send_multipart(parts)
