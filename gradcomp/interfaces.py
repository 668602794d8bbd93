"""The plug-in contracts on one page: Compressor (and LinearCompressor), Transport, Exchange.

A compressor turns a tensor into a packet, a transport carries bytes between ranks, an exchange decides who sends what
to whom. Each is an immutable config (a frozen, keyword-only dataclass); what must last between steps lives in a plain
dict of tensors (:data:`State`), what lives on the network in the transport's connection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from gradcomp import kernels
from gradcomp.interface_transport import MY_TURN, Buffer, Incoming, Levels, Part, Slot, Transport
from gradcomp.options import Configured
from gradcomp.rounds import alone

if TYPE_CHECKING:
    from gradcomp.bucket import Piece, Unit
    from gradcomp.message import Message
    from gradcomp.packet import Packet
    from gradcomp.products import Product

__all__ = [
    "MY_TURN",
    "Buffer",
    "Commit",
    "Compressor",
    "Exchange",
    "Incoming",
    "Levels",
    "LinearCompressor",
    "Part",
    "Slot",
    "State",
    "Transport",
    "Work",
]

State = dict[str, Tensor]
Commit = Callable[[], Tensor | None]


class Compressor(Configured, ABC):
    """Turns gradients into packets. Immutable: what it remembers is the state dict it is handed.

    A subclass writes :meth:`encode`, :meth:`decode_add` and :meth:`max_nbytes`. With error feedback it also calls
    ``super().new_state`` (which makes the residual), or replaces :meth:`commit` when more than the residual changes.
    Where a kernel can do both in one sweep, it replaces :meth:`encode_in_place`, where one adds up several packets in a
    sweep :meth:`decode_sum`; where packets are not just added up, :meth:`aggregate`. One that draws random numbers
    replaces :meth:`seed_state`. ``gradcomp.testing.check_compressor`` checks the whole contract.

    Attributes:
        stateless: remembers nothing; encodes each element by itself, so tensors may be joined and cut anywhere, unless
            it is ``factored``.
        factored: sends what a linear layer's gradient is a product of, where it is told: :meth:`encode_product`.
        in_step: its state counts steps (int64), on all ranks alike: :meth:`pass_over` tells those without a gradient.
    """

    stateless: ClassVar[bool] = False
    factored: ClassVar[bool] = False
    in_step: ClassVar[bool] = False

    @property
    def linear(self) -> bool:
        """Whether what ranks send may be added up on its way: then it has :meth:`rounds`."""
        return False

    @property
    def conserves(self) -> bool:
        """Whether gradient + residual = decoded + new residual. Not so where momentum enters or clipping takes away."""
        return True

    @property
    def additive(self) -> tuple[str, ...]:
        """The fields of the state that count in the sum over ranks, flat float32 with an element for each gradient's.

        When other ranks take over they are added up and cut anew; all other fields are taken from one old rank.
        """
        return ("residual",)

    @property
    def for_sums(self) -> Compressor:
        """What compresses sums of its packets: itself, without what is done to gradients once, such as momentum."""
        return self

    def new_state(self, grad: Tensor) -> State:
        """What must last between steps for a tensor like ``grad``.

        Returns:
            ``{"residual": float32 zeros, flat, grad.numel()}`` on grad's device; ``{}`` if stateless.
        """
        if self.stateless:
            return {}
        return {"residual": torch.zeros(grad.numel(), dtype=torch.float32, device=grad.device)}

    def seed_state(self, state: State, *, parameter: str, rank: int) -> None:
        """Make random numbers of a new ``state`` differ by parameter and, unless ranks must agree, by rank."""

    @abstractmethod
    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        """The packet for ``grad`` plus the residual. Changes neither: :meth:`commit` does, once the step is sure.

        Args:
            grad: float32, float16 or bfloat16, any shape, contiguous. Element-wise compressors see it flat.
            state: from :meth:`new_state`, or None for one shot without error feedback.

        Returns:
            A packet; ``Packet.nonfinite`` if the gradient or its sum with the residual holds NaN or Inf, except
            where the encoding carries such values itself (``stateless`` ones do).
        """

    def encode_product(self, grad: Tensor, product: Product) -> Packet:
        """As :meth:`encode`, of a gradient that is ``product``, if ``factored``."""
        raise TypeError(f"compressor {self.id!r} sends no factors")

    @abstractmethod
    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        """``out += scale * decoded`` for a packet of this compressor's own kind, without a dense temporary.

        Args:
            out: flat float32, ``packet.numel`` elements.

        Raises:
            PacketError: another kind of packet, or indices that are not strictly increasing and below numel; ``out``
                is then unchanged.
        """

    def decode_sum(self, packets: Sequence[Packet], out: Tensor, scale: float) -> None:
        """``out`` becomes the sum of ``packets`` times ``scale``, to the bits of adding one after the other to zeros.

        A compressor replaces it where a kernel decodes several packets in one sweep. As :meth:`decode_add`, but what is
        in ``out`` after an error is of no use.
        """
        kernels.clear(out)
        for packet in packets:
            self.decode_add(packet, out, scale)

    @abstractmethod
    def max_nbytes(self, numel: int) -> int:
        """The most bytes a packet for ``numel`` elements can have: what a receiver is ready to take."""

    def typical_nbytes(self, numel: int) -> int:
        """Bytes to expect of a packet, at most ``max_nbytes``; from the config alone: all ranks expect the same."""
        return self.max_nbytes(numel)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        """Make ``state`` what it is after ``packet`` = ``encode(grad, state)`` was sent: residual += grad - decoded.

        What else a compressor learns (a threshold, say) it learns here, from ``packet.scalar`` and ``packet.count``.
        """
        residual = state.get("residual")
        if residual is not None:
            residual.add_(grad.reshape(-1))
            self.decompress_add(packet, residual, -1.0)

    def encode_in_place(self, grad: Tensor, state: State) -> Packet:
        """:meth:`encode` and :meth:`commit` at once, to the same bits; ``state`` stays as it is if not finite."""
        packet = self.encode(grad, state)
        if not packet.is_nonfinite:
            self.commit(grad, packet, state)
        return packet

    def pass_over(self, state: State) -> None:
        """As :meth:`commit`, on a rank that had no gradient where others had: on to the next step, if ``in_step``."""

    def at(self, state: State) -> Compressor:
        """What decodes all ranks' packets of the step that ``state`` is at; refuses others' where they can be told."""
        return self

    def rounds(self, grad: Tensor, state: State | None = None) -> Generator[Tensor, Tensor, tuple[Packet, Packet]]:
        """As :meth:`LinearCompressor.rounds`, if ``linear``."""
        raise TypeError(f"compressor {self.id!r} is not linear")

    def commit_sum(self, grad: Tensor, own: Packet, total: Packet, state: State) -> None:
        """As :meth:`commit`, for what :meth:`rounds` returned."""
        self.commit(grad, own, state)

    def aggregate(self, total: Tensor) -> None:
        """Make of ``total``, to which all ranks' packets were added, what counts as their sum; in place.

        Most do nothing; it is for compressors whose result is no sum, such as a vote. Called wherever packets of
        several ranks, or packets of such results, were added up, with float32, flat; not if one of them was not
        finite.
        """

    def prepare(self, grad: Tensor, state: State) -> tuple[Packet, Commit]:
        """:meth:`encode` a gradient whose memory is not needed any more, and :meth:`commit` later.

        The residual's new value may be written where the gradient was, and become the residual when it is committed:
        then nothing has to be copied. A step that is not sure is given up by not committing.

        Args:
            grad: owned by the caller alone; holds nothing of use afterwards.

        Returns:
            The packet, to the bits of :meth:`encode`, and what commits it. That returns memory for as many float32 that
            is not needed any more, flat, or None.
        """
        packet = self.encode(grad, state)
        return packet, lambda: self.commit(grad, packet, state)

    @final
    def compress(self, grad: Tensor, state: State | None = None) -> Packet:
        """Encode ``grad`` and update ``state`` in place: ``grad + residual == decompress(packet) + new residual``.

        A non-finite gradient leaves ``state`` alone and gives a packet that decodes to non-finite values.
        """
        return self.encode(grad) if state is None else self.encode_in_place(grad, state)

    @final
    def decompress(self, packet: Packet) -> Tensor:
        """The decoded packet: float32, flat, ``packet.numel`` elements, on the packet's device."""
        out = torch.zeros(packet.numel, dtype=torch.float32, device=packet.device)
        self.decompress_add(packet, out)
        return out

    @final
    def decompress_add(self, packet: Packet, out: Tensor, scale: float = 1.0) -> None:
        """``out += scale * decoded``, in place, without a dense temporary.

        Args:
            out: float32, contiguous, ``packet.numel`` elements, on the packet's device.
            scale: multiplied in float32 before the addition.

        Raises:
            PacketError: the packet is not this compressor's, or does not decode; ``out`` is then unchanged.
            ValueError: ``out`` has the wrong size, dtype or layout.
        """
        _require_fit(packet, out)
        flat = out.view(-1)
        if packet.is_nonfinite:
            flat += packet.scalar * scale
        else:
            self.decode_add(packet, flat, scale)

    @final
    def decompress_sum(self, packets: Sequence[Packet], out: Tensor, scale: float = 1.0) -> None:
        """``out`` becomes 0 and then what :meth:`decompress_add` makes of it with each packet, bit for bit."""
        for packet in packets:
            _require_fit(packet, out)
        flat = out.view(-1)
        if not any(packet.is_nonfinite for packet in packets):
            self.decode_sum(packets, flat, scale)
            return
        kernels.clear(flat)
        for packet in packets:
            self.decompress_add(packet, flat, scale)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """Numbers worth showing about what was just sent, e.g. ``{"density": 0.001, "tau": 2e-4}``."""
        return {}


def _require_fit(packet: Packet, out: Tensor) -> None:
    if out.numel() != packet.numel or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous float32 with {packet.numel} elements; "
            f"got {out.dtype}, {out.numel()} elements, contiguous={out.is_contiguous()}"
        )


class LinearCompressor(Compressor):
    """A compressor whose payloads may be added up on their way, by all-reduces; a subclass writes :meth:`rounds`.

    What ranks must share, such as a seed or a basis, comes from config, parameter, sums and the number of steps: those
    they have alike.
    """

    @property
    def linear(self) -> bool:
        return True

    @abstractmethod
    def rounds(self, grad: Tensor, state: State | None = None) -> Generator[Tensor, Tensor, tuple[Packet, Packet]]:
        """As :meth:`encode`, together with all ranks.

        Yields:
            What this rank adds to a sum, flat float32, not finite if its gradient is not; it is sent the sum. Number
            and lengths of rounds depend on config, shape and sums; in all no longer than a packet's payload.

        Returns:
            This rank's own packet, which is its part of the sum, and the packet of the sum; ``Packet.nonfinite`` if the
            sum is not finite. If ``stateless``, both may be the sum's: nobody asks for its own.
        """

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        """The rounds of a rank that is alone."""
        return alone(self.rounds(grad, state))[0]


class Work(ABC):
    """One bucket on its way, as an exchange sees it. The engine makes it; an exchange only calls it.

    A *piece* is a contiguous range of one tensor (or of several joined ones) that is compressed by itself; a *message*
    is the packets of some pieces, from one rank.
    """

    rank: int
    world_size: int
    pieces: Sequence[Piece]

    @abstractmethod
    def encode(self, pieces: Sequence[Piece]) -> Message:
        """Compress this rank's gradient of ``pieces``."""

    @abstractmethod
    def reduce(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> Message:
        """Add up messages, in the order given, and compress the sum again, with a residual of its own."""

    @abstractmethod
    def deliver(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> None:
        """Make the sum of ``messages``, in the order given, the gradient of ``pieces``, on this rank."""

    @abstractmethod
    def rounds(self, pieces: Sequence[Piece]) -> Generator[Tensor, Tensor, None]:
        """Instead of encode and deliver, for linear compressors: yields what to add up over ranks, is sent the sums."""

    @abstractmethod
    def all_reduce(self, turn: int, mine: Tensor, *, one_trip: bool) -> Generator[Sequence[Incoming], None, Tensor]:
        """The sum of every rank's ``mine`` of round ``turn``: :meth:`Transport.all_reduce`."""

    @abstractmethod
    def swap(
        self, stage: int, outgoing: Iterable[tuple[int, Message]], expected: Mapping[int, Sequence[Piece]]
    ) -> Generator[Sequence[Incoming], None, dict[int, Message]]:
        """Send each peer a message, in the order given, and get the messages expected: one stage of an exchange.

        Where the transport carries the gradients' device, payloads stay on it; :meth:`send` and :meth:`recv` always go
        through host memory. Every rank must come to every stage that it sends or expects something in.

        Args:
            outgoing: peers and their messages.
            expected: by peer, the pieces its message must hold.

        Returns:
            The messages by peer, checked.
        """

    @abstractmethod
    def send(self, peer: int, stage: int, message: Message) -> None:
        """Send ``message`` to ``peer``; returns at once."""

    @abstractmethod
    def recv(self, peer: int, stage: int) -> Incoming:
        """Ask for ``peer``'s message of ``stage``."""

    @abstractmethod
    def parse(self, pieces: Sequence[Piece], incoming: Incoming) -> Message:
        """The message that came in, checked against the pieces it must hold.

        Raises:
            PacketError: anything malformed.
        """


class Exchange(Configured, ABC):
    """How packets meet: who sends which pieces to whom.

    Attributes:
        foreseeable: each rank encodes each piece once and reduces those it owns once, before it is sent anything else:
            what is then finite on all ranks stays so. (Where :meth:`Work.rounds` is run, nothing is said.)
    """

    foreseeable: ClassVar[bool] = False

    def transport(
        self, given: str | Mapping[str, object] | Transport | None, *, usual: str | Transport = "zmq"
    ) -> Transport:
        """What to run on, not yet connected: what the user gave, or what is ``usual``. An exchange may bring its own.

        Raises:
            ConfigError: what was given does not do.
        """
        from gradcomp.registry import transport

        return transport(usual if given is None else given)

    def on(self, transport: Transport) -> Exchange:
        """This exchange as it is run over ``transport``: itself, unless it chooses by what a transport can do."""
        return self

    @abstractmethod
    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        """Cut a bucket's units into pieces, the same on every rank, in order, covering every element once."""

    @abstractmethod
    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        """Exchange one bucket. Yield what must be here before going on; other buckets move in the meantime.

        Every rank must call :meth:`Work.deliver` for every piece exactly once, with the same packets in the same order,
        or :meth:`Work.rounds`.
        """
