"""How long a step will take: arithmetic on what was measured, with no clock and no socket in it.

A step is played through, event by event: forward; backward, which makes one bucket's gradients after the other; the
exchange thread, which takes each bucket the way its exchange goes (:mod:`gradcomp.routes`); the link, which carries one
message after the other; the end of the step and the optimizer. What of it needs a core shares the rank's cores with
whatever else needs one at that moment. All ranks are taken to be alike, and in step.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradcomp.interfaces import Exchange
from gradcomp.options import check_choice, check_integer, check_number
from gradcomp.plan import Plan
from gradcomp.play import Play, most_cores
from gradcomp.routes import CodecCost, CostOf, route

__all__ = ["BucketForecast", "CodecCost", "CostOf", "Forecast", "Link", "StepProfile", "forecast"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One rank's connection to all others.

    Attributes:
        latency_s: from sending a small message to having it on the other side.
        bytes_per_s: what a rank can send to all others together, while it receives as much.
        cpu_s_per_byte: core time that moving a byte costs a rank: sending it, and receiving another.
        cpu_s_per_message: the same for a message, however short, on the exchange thread.
        stream_bytes_per_s: what one pair can, if that is less.
        burst_bytes: what an idle link lets through at once, as links that are shaped do.
    """

    latency_s: float
    bytes_per_s: float
    cpu_s_per_byte: float = 0.0
    cpu_s_per_message: float = 0.0
    stream_bytes_per_s: float | None = None
    burst_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latency_s", "cpu_s_per_byte", "cpu_s_per_message", "burst_bytes"):
            check_number("Link", name, getattr(self, name), at_least=0.0)
        check_number("Link", "bytes_per_s", self.bytes_per_s, above=0.0)
        if self.stream_bytes_per_s is not None:
            check_number("Link", "stream_bytes_per_s", self.stream_bytes_per_s, above=0.0)

    def rate(self, peers: int) -> float:
        """Bytes a second to so many others at once."""
        if self.stream_bytes_per_s is None:
            return self.bytes_per_s
        return min(self.bytes_per_s, max(peers, 1) * self.stream_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One rank's step without any exchange, and the cores it has for it.

    Attributes:
        forward_s, backward_s, optimizer_s: on cores that nobody else uses.
        ready_s: from the start of backward until each bucket's gradients are there.
        cores: of a rank: 0.5 where four ranks share two.
        thread_cores: what a thread gets of a core at most: less than 1 where other programs use the machine as well.
        compute_cores: how many of them computing keeps busy; 0 where a GPU computes.
        copy_s_per_element: of one core, copying a float32 from memory to memory.
        overhead_s: of one core, what each step takes beside, once it is exchanged.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float
    ready_s: tuple[float, ...]
    cores: float = 2.0
    thread_cores: float = 1.0
    compute_cores: float = 1.0
    copy_s_per_element: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ready_s", tuple(self.ready_s))
        for name in ("forward_s", "backward_s", "optimizer_s", "compute_cores", "copy_s_per_element", "overhead_s"):
            check_number("StepProfile", name, getattr(self, name), at_least=0.0)
        check_number("StepProfile", "cores", self.cores, above=0.0)
        check_number("StepProfile", "thread_cores", self.thread_cores, above=0.0, at_most=1.0)
        for ready_s in self.ready_s:
            check_number("StepProfile", "ready_s", ready_s, at_least=0.0)

    @property
    def compute_s(self) -> float:
        """The step by itself, on the cores there are."""
        computing = self.forward_s + self.backward_s + self.optimizer_s
        if not self.compute_cores:
            return computing
        most = most_cores(self.compute_cores, self.thread_cores)
        return computing * self.compute_cores / min(self.cores, most)

    @property
    def thread_speed(self) -> float:
        """Of a thread that works while no other does."""
        return min(self.thread_cores, self.cores)


@dataclass(frozen=True, kw_only=True)
class BucketForecast:
    """One bucket, times in seconds from the start of the step.

    Attributes:
        ready_s: its gradients are there.
        encode_s: core time of compressing, sums of packets included.
        sent_bytes: by one rank.
        wire_s: that the link is busy with it.
        decode_s: core time of adding up what came in.
        done_s: its sums are there; where it has residuals, all but the adding up, which is done at the end of the step.
        exposed_s: that training waits for it, and for no bucket before it.
    """

    ready_s: float
    encode_s: float
    sent_bytes: float
    wire_s: float
    decode_s: float
    done_s: float
    exposed_s: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One step.

    Attributes:
        step_s: all of it.
        compute_s: the same step without an exchange.
        buckets: in order.
    """

    step_s: float
    compute_s: float
    buckets: tuple[BucketForecast, ...]

    @property
    def sent_bytes(self) -> float:
        """By one rank in one step."""
        return sum(bucket.sent_bytes for bucket in self.buckets)

    @property
    def exposed_s(self) -> float:
        """What the exchange adds to the step."""
        return max(self.step_s - self.compute_s, 0.0)


def forecast(
    plan: Plan,
    exchange: Exchange,
    *,
    profile: StepProfile,
    link: Link,
    cost_of: CostOf,
    world_size: int,
    overlap: str = "backward",
) -> Forecast:
    """Play a step through.

    Args:
        plan: made for this exchange and world size.
        exchange: as it is run: :meth:`gradcomp.interfaces.Exchange.on` a transport.
        cost_of: what each compressor of the plan costs, ``none`` included.
        world_size: how many exchange packets.
        overlap: ``"backward"`` or ``"forward"``, as for :func:`gradcomp.attach`.

    Raises:
        ConfigError: an argument out of range, or a profile with another number of buckets.
    """
    check_integer("forecast", "world_size", world_size, at_least=1)
    check_choice("forecast", "overlap", overlap, ("backward", "forward"))
    check_integer(
        "forecast", "ready_s (its length)", len(profile.ready_s), at_least=len(plan.buckets), at_most=len(plan.buckets)
    )
    routes = [
        route(
            exchange,
            bucket,
            pieces,
            world_size=world_size,
            cost_of=cost_of,
            copy_s_per_element=profile.copy_s_per_element,
        )
        for bucket, pieces in zip(plan.buckets, plan.pieces, strict=True)
    ]
    play = Play(routes, profile, link)
    step_s = play.ahead() if overlap == "forward" else play.step()
    done_before, buckets = play.awaited_from_s, []
    for way, seen in zip(routes, play.seen, strict=True):
        waited = max(seen.done_s - max(done_before, seen.ready_s), 0.0)
        buckets.append(
            BucketForecast(
                ready_s=seen.ready_s,
                encode_s=way.encode_s,
                sent_bytes=way.sent_bytes,
                wire_s=seen.wire_s,
                decode_s=way.decode_s,
                done_s=seen.done_s,
                exposed_s=waited + way.finish_s / profile.thread_speed,
            )
        )
        done_before = max(done_before, seen.done_s)
    return Forecast(step_s=step_s, compute_s=profile.compute_s, buckets=tuple(buckets))
