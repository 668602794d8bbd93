"""What becomes of a model's buffers (BatchNorm's running statistics), which no optimizer keeps alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcomp.errors import ConfigError, PacketError
from gradcomp.interfaces import Slot, Transport
from gradcomp.options import check_integer
from gradcomp.replicas import BUFFERS_BUCKET

__all__ = ["BufferPolicy"]

_CHUNK_ELEMENTS = 1 << 20
_POLICIES = ("alone", "broadcast", "average")


@dataclass(frozen=True, kw_only=True)
class BufferPolicy:
    """What to do with buffers after a step; they start as rank 0's in any case.

    Attributes:
        policy: ``"alone"``: each rank keeps its own; ``"broadcast"``: all take rank 0's, as DistributedDataParallel
            does; ``"average"``: floating-point ones become the mean over ranks, others rank 0's.
        every: after so many steps each.
    """

    policy: str = "alone"
    every: int = 1

    @classmethod
    def of(cls, spec: str) -> BufferPolicy:
        """From ``"alone"``, ``"broadcast"`` or ``"average:every=10"``.

        Raises:
            ConfigError: something else.
        """
        from gradcomp.registry import parse_spec

        if not isinstance(spec, str):
            raise ConfigError(f"attach: buffers={spec!r} is not allowed; buffers must be a string such as 'broadcast'")
        policy, options = parse_spec(spec)
        every = options.pop("every", 1)
        if policy not in _POLICIES or options:
            raise ConfigError(
                f"attach: buffers={spec!r} is not allowed; buffers must be one of {', '.join(_POLICIES)}, "
                "with :every=STEPS"
            )
        check_integer("buffers", "every", every, at_least=1)
        return cls(policy=policy, every=int(str(every)))

    def is_due(self, step: int) -> bool:
        """Whether buffers are exchanged after this step."""
        return self.policy != "alone" and step % self.every == 0

    def apply(self, transport: Transport, turn: int, buffers: Sequence[Tensor]) -> None:
        """Exchange them; all ranks must call it at the same step, with ``turn`` as for :mod:`gradcomp.replicas`.

        Raises:
            TransportError: as the transport's.
            PacketError: another rank's buffers have another size.
        """
        if transport.world_size == 1:
            return
        for number, (members, average) in enumerate(_groups(buffers, average=self.policy == "average")):
            flat = torch.cat([member.detach().reshape(-1).cpu() for member in members])
            if average:
                flat = flat.to(torch.float64)
            mine = flat.view(torch.uint8).numpy().tobytes() if average or transport.rank == 0 else b""
            slot = Slot((turn << 20) + number, BUFFERS_BUCKET, 0)
            everyone = transport.all_gather(slot, mine)
            given = [row for row in everyone if len(row)]
            if len(given) != (transport.world_size if average else 1) or any(len(row) != flat.nbytes for row in given):
                raise PacketError(
                    f"buffers of {[len(row) for row in everyone]} bytes came from the ranks; this rank's have "
                    f"{flat.nbytes}"
                )
            rows = [torch.frombuffer(bytearray(row), dtype=flat.dtype) for row in given]
            total = torch.stack(rows).mean(0) if average else rows[0]
            for member, part in zip(members, torch.split(total, [m.numel() for m in members]), strict=True):
                member.detach().copy_(part.view(member.shape))


def _groups(buffers: Sequence[Tensor], *, average: bool) -> Iterator[tuple[list[Tensor], bool]]:
    """Views of the buffers, joined to at most 8 MiB of one type, and whether to average them."""
    by_type: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for buffer in buffers:
        if buffer.numel():
            by_type.setdefault((buffer.dtype, average and buffer.is_floating_point()), []).append(buffer)
    for (_, averaged), members in by_type.items():
        group: list[Tensor] = []
        for member in members:
            whole = member.detach()
            parts = torch.split(whole.view(-1), _CHUNK_ELEMENTS) if whole.is_contiguous() else (whole,)
            for part in parts:
                if group and sum(one.numel() for one in group) + part.numel() > _CHUNK_ELEMENTS:
                    yield group, averaged
                    group = []
                group.append(part)
        if group:
            yield group, averaged
