"""A worker process for tests that kill: python tests/server_worker.py ADDRESS NAME COORDINATE FOLDER

Each of its gradients is -1 at its own coordinate and 0 elsewhere, so that with SGD at a rate of 1 the parameter there
counts how many of them were applied. It writes the number of each push that was acknowledged to FOLDER/COORDINATE, and
goes on until there is a file FOLDER/stop; then it leaves, and writes the parameters it has to FOLDER/values.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import torch
from server_network import ask, join, linked
from server_sides import Side

from gradcomp.server.messages import Acked, Changed, Leave, Unknown

SIZE = 256


def counting_side(name: str, workers: int) -> Side:
    """A model of one vector of zeros, which counts."""
    optimizer = torch.optim.SGD([torch.zeros(SIZE, requires_grad=True)], lr=1.0)
    return Side(optimizer, name=name, incarnation=secrets.randbits(40), workers=workers)


def main(address: str, name: str, coordinate: int, folder: Path) -> None:
    torch.set_num_threads(1)
    me = counting_side(name, 2)
    gradient = torch.zeros(SIZE)
    gradient[coordinate] = -1.0
    with (
        (folder / str(coordinate)).open("w") as log,
        linked(address, worker=name, incarnation=me.incarnation, timeout_s=60.0) as links,
    ):
        join(links, me)
        while not (folder / "stop").exists():
            push = me.push([gradient])
            acknowledged = False
            while not acknowledged:
                replies = ask(links, push)
                if isinstance(replies[0], Acked):
                    assert (replies[0].sequence, replies[0].result) == (push.sequence, "applied")
                    print(push.sequence, file=log, flush=True)
                    acknowledged = True
                while isinstance(replies[-1], Unknown):  # forgotten while the server or this worker was away
                    join(links, me)
                    if not acknowledged:
                        break
                    replies = ask(links, me.pull())
            assert isinstance(replies[-1], Changed), replies
            me.take(replies[-1])
        ask(links, Leave(number=0, worker=name, incarnation=me.incarnation))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
