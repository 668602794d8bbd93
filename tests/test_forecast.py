"""Forecasts of step times: worked out by hand, and what must hold whatever the numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradcomp
from gradcomp.bucket import DenseRule, Piece, Unit
from gradcomp.errors import ConfigError
from gradcomp.forecast import CodecCost, Forecast, Link, StepProfile, forecast
from gradcomp.interfaces import Compressor, Exchange, Incoming, Work
from gradcomp.plan import Plan

_NUMEL = 250_000  # 1 MB
_HEAD = 16  # of a message


def _plan(exchange: str | Exchange, compressor: str = "none", *, world_size: int, tensors: int = 1) -> Plan:
    named = [(f"{i}.weight", torch.nn.Parameter(torch.empty(500, 500))) for i in range(tensors)]
    return Plan.make(
        named,
        gradcomp.compressor(compressor),
        dense=DenseRule(),
        exchange=gradcomp.exchange(exchange) if isinstance(exchange, str) else exchange,
        world_size=world_size,
        bucket_bytes=4 * _NUMEL,
    )


def _cost(codec: Compressor) -> CodecCost:
    """1 ms to encode a tensor, 0.5 ms to decode it; a tenth of the bytes, or all."""
    share = 1.0 if codec.id == "none" else 0.1
    return CodecCost(
        encode_s_per_element=1e-3 / _NUMEL,
        decode_s_per_element=0.5e-3 / _NUMEL,
        packet_bytes=0.0,
        bytes_per_element=4.0 * share,
    )


def _forecast(
    exchange: str | Exchange = "all_gather",
    compressor: str = "none",
    *,
    world_size: int = 2,
    ready_s: Sequence[float] = (0.1,),
    cores: float = 8.0,
    overlap: str = "backward",
    **link: float,
) -> Forecast:
    profile = StepProfile(
        forward_s=0.05, backward_s=0.1, optimizer_s=0.01, ready_s=tuple(ready_s), cores=cores, compute_cores=1.0
    )
    return forecast(
        _plan(exchange, compressor, world_size=world_size, tensors=len(ready_s)),
        gradcomp.exchange(exchange) if isinstance(exchange, str) else exchange,
        profile=profile,
        link=Link(**({"latency_s": 1e-3, "bytes_per_s": 1e8} | link)),
        cost_of=_cost,
        world_size=world_size,
        overlap=overlap,
    )


def test_one_bucket_at_the_end_of_backward_is_not_hidden() -> None:
    found = _forecast()
    wire_s = (4 * _NUMEL + _HEAD) / 1e8
    # Encode, send, one trip, add up two packets.
    assert found.step_s == pytest.approx(0.16 + 1e-3 + wire_s + 1e-3 + 2 * 0.5e-3)
    assert found.compute_s == pytest.approx(0.16)
    (bucket,) = found.buckets
    assert bucket.ready_s == pytest.approx(0.15)
    assert bucket.wire_s == pytest.approx(wire_s)
    assert bucket.sent_bytes == 4 * _NUMEL + _HEAD
    assert bucket.exposed_s == pytest.approx(found.exposed_s)


def test_what_is_ready_early_is_hidden() -> None:
    found = _forecast(ready_s=[0.02, 0.1])
    assert found.step_s == pytest.approx(_forecast().step_s)
    assert found.buckets[0].exposed_s == 0.0
    assert found.buckets[0].done_s < 0.15


def test_buckets_queue_on_the_link() -> None:
    one, two = _forecast(bytes_per_s=1e7), _forecast(ready_s=[0.1, 0.1], bytes_per_s=1e7)
    assert two.step_s - one.step_s == pytest.approx((4 * _NUMEL + _HEAD) / 1e7, rel=0.02)


def test_residuals_wait_for_the_end_of_the_step() -> None:
    """Sums of compressors with state are added up by the training thread, after the last bucket is in."""
    found = _forecast(compressor="onebit", ready_s=[0.02, 0.1])
    wire_s = (0.4 * _NUMEL + _HEAD) / 1e8
    assert found.step_s == pytest.approx(0.16 + 1e-3 + wire_s + 1e-3 + 2 * 2 * 0.5e-3)


def test_on_one_core_work_adds_up_instead_of_overlapping() -> None:
    early, cores = _forecast(ready_s=[0.02, 0.1]), _forecast(ready_s=[0.02, 0.1], cores=1.0)
    assert cores.step_s - early.step_s == pytest.approx(2e-3)  # the first bucket's encoding and decoding
    half = _forecast(ready_s=[0.02, 0.1], cores=0.5)
    assert half.compute_s == pytest.approx(0.32)
    assert half.step_s >= (0.16 + 4e-3) / 0.5


def test_where_others_use_the_machine_each_thread_gets_less() -> None:
    """But several threads get more than one does."""
    profile = StepProfile(forward_s=0.05, backward_s=0.1, optimizer_s=0.01, ready_s=(0.02, 0.1), thread_cores=0.5)
    assert profile.compute_s == pytest.approx(0.32)
    found = forecast(
        _plan("all_gather", world_size=2, tensors=2),
        gradcomp.exchange("all_gather"),
        profile=profile,
        link=Link(latency_s=0.0, bytes_per_s=1e12),
        cost_of=_cost,
        world_size=2,
    )
    # The first bucket's work, 2 ms of a core, goes on beside backward; the second's takes twice as long.
    assert found.step_s == pytest.approx(0.32 + 2 * 2e-3, rel=1e-4)


def test_moving_bytes_takes_core_time() -> None:
    free, dear = (_forecast(cores=1.0, ready_s=[0.02, 0.1], cpu_s_per_byte=cost) for cost in (0.0, 5e-9))
    # The first bucket's megabyte costs 5 ms of the core that backward is on; the second's is on an idle one.
    assert dear.step_s - free.step_s == pytest.approx(5e-3, rel=0.05)


def test_an_idle_link_lets_a_burst_through() -> None:
    assert _forecast(burst_bytes=1 << 20).step_s == pytest.approx(0.16 + 1e-3 + 1e-3 + 2 * 0.5e-3)
    slower, faster = _forecast(bytes_per_s=1e6), _forecast(bytes_per_s=1e6, burst_bytes=200_000)
    assert slower.step_s - faster.step_s == pytest.approx(0.2)


def test_a_slow_pair_limits_what_few_can_do_together() -> None:
    assert _forecast(stream_bytes_per_s=5e7).step_s > _forecast().step_s
    assert _forecast(world_size=4, stream_bytes_per_s=5e7).step_s == _forecast(world_size=4).step_s


@pytest.mark.parametrize("world_size", [4, 8, 16])
def test_all_gather_pays_only_over_half_as_many_ranks(world_size: int) -> None:
    """Against a dense sum in two shots, where the link is all that counts."""

    def sent(exchange: str, ratio: float) -> float:
        plan = _plan(exchange, "none" if ratio == 1 else "onebit", world_size=world_size)
        return forecast(
            plan,
            gradcomp.exchange(exchange),
            profile=StepProfile(forward_s=0.0, backward_s=0.0, optimizer_s=0.0, ready_s=(0.0,)),
            link=Link(latency_s=0.0, bytes_per_s=1e6),
            cost_of=lambda codec: CodecCost(packet_bytes=0.0, bytes_per_element=4.0 / ratio),
            world_size=world_size,
        ).step_s

    dense = sent("two_shot", 1)
    assert sent("all_gather", 0.45 * world_size) > dense > sent("all_gather", 0.55 * world_size)
    assert sent("two_shot", 4) == pytest.approx(dense / 4, rel=0.05)


def test_a_tree_takes_two_trips_a_level() -> None:
    def step_s(latency_s: float) -> float:
        return _forecast("tree", world_size=7, latency_s=latency_s).step_s

    assert step_s(0.011) - step_s(0.001) == pytest.approx(4 * 0.01)


def test_many_ranks_of_a_tree_are_looked_at_where_they_differ() -> None:
    few, many = (_forecast("tree:arity=4", world_size=n, latency_s=0.0).step_s for n in (21, 341))
    assert many > few  # two levels, and four


def test_powersgd_goes_by_two_all_reduces() -> None:
    plan = _plan("auto", "powersgd:rank=2", world_size=4)
    cost = CodecCost(packet_bytes=0.0, bytes_per_element=0.0, bytes_per_side=8.0, rounds=2)
    found = forecast(
        plan,
        gradcomp.exchange("auto"),
        profile=StepProfile(forward_s=0.0, backward_s=0.0, optimizer_s=0.0, ready_s=(0.0,)),
        link=Link(latency_s=1.0, bytes_per_s=1e6),
        cost_of=lambda codec: cost if codec.id == "powersgd" else CodecCost(),
        world_size=4,
    )
    assert found.buckets[0].sent_bytes == 3 * 8 * 1000  # each round to three others, in one trip
    assert found.step_s == pytest.approx(2.0 + 3 * 8 * 1000 / 1e6)


def test_the_next_forward_hides_more() -> None:
    backward = _forecast(ready_s=[0.09, 0.095, 0.1], bytes_per_s=2e7)
    forward = _forecast(ready_s=[0.09, 0.095, 0.1], bytes_per_s=2e7, overlap="forward")
    assert forward.compute_s <= forward.step_s < backward.step_s


def test_alone_there_is_nothing_to_wait_for() -> None:
    assert _forecast(world_size=1).buckets[0].sent_bytes == 0


_numbers = st.fixed_dictionaries(
    {
        "exchange": st.sampled_from(["auto", "all_gather", "two_shot", "tree"]),
        "compressor": st.sampled_from(["none", "onebit"]),
        "world_size": st.integers(2, 6),
        "ready_s": st.lists(st.floats(0, 0.1), min_size=1, max_size=4).map(sorted),
        "overlap": st.sampled_from(["backward", "forward"]),
    }
)


@settings(max_examples=40, deadline=None)
@given(_numbers, st.floats(1e5, 1e9), st.floats(1e-5, 1e-2), st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0]))
def test_more_of_anything_is_never_slower(numbers: dict, rate: float, latency_s: float, cores: float) -> None:
    """Of bandwidth, of cores, and of latency less; and no step is faster than computing, or than its work is."""
    now = _forecast(**numbers, bytes_per_s=rate, latency_s=latency_s, cores=cores)
    assert now.step_s >= now.compute_s * (1 - 1e-9)
    work_s = sum(bucket.encode_s + bucket.decode_s for bucket in now.buckets)
    assert now.step_s >= (0.16 + work_s) / cores * (1 - 1e-9) or cores > 1
    # Two buckets may change places on the link, as they may in truth: a little longer is not wrong.
    better = _forecast(**numbers, bytes_per_s=2 * rate, latency_s=latency_s, cores=cores)
    assert better.step_s <= now.step_s * 1.01
    better = _forecast(**numbers, bytes_per_s=rate, latency_s=latency_s / 2, cores=cores)
    assert better.step_s <= now.step_s * 1.01
    better = _forecast(**numbers, bytes_per_s=rate, latency_s=latency_s, cores=2 * cores)
    assert better.step_s <= now.step_s * 1.01


@dataclass(frozen=True, kw_only=True)
class _Neighbours(Exchange):
    """Another package's exchange, which sends and receives by itself."""

    id: ClassVar[str] = "neighbours"

    def cut(self, units: Sequence[Unit], world_size: int) -> list[Piece]:
        return [Piece(i, 0, unit.numel, unit.shape, unit.codec) for i, unit in enumerate(units)]

    def run(self, work: Work) -> Generator[Sequence[Incoming], None, None]:
        mine = work.encode(work.pieces)
        work.send((work.rank + 1) % work.world_size, 0, mine)
        incoming = work.recv((work.rank - 1) % work.world_size, 0)
        yield [incoming]
        work.deliver(work.pieces, [mine, work.parse(work.pieces, incoming)])


def test_any_exchange_can_be_forecast() -> None:
    found = _forecast(_Neighbours(), world_size=3)
    assert found.step_s == pytest.approx(_forecast(world_size=2).step_s)


def test_all_of_it_is_json() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(_forecast())))["buckets"][0]["ready_s"] == pytest.approx(0.15)
    assert CodecCost(**json.loads(json.dumps(dataclasses.asdict(CodecCost())))) == CodecCost()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Link(latency_s=-1.0, bytes_per_s=1.0), "latency_s"),
        (lambda: Link(latency_s=0.0, bytes_per_s=0.0), "bytes_per_s"),
        (lambda: CodecCost(rounds=0), "rounds"),
        (lambda: CodecCost(encode_s=-1.0), "encode_s"),
        (lambda: _forecast(cores=0.0), "cores"),
        (lambda: _forecast(overlap="sideways"), "overlap"),
        (lambda: StepProfile(forward_s=0.0, backward_s=0.0, optimizer_s=0.0, ready_s=(-1.0,)), "ready_s"),
    ],
)
def test_what_is_out_of_range_is_refused(make: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()  # type: ignore[operator]


def test_a_profile_of_other_buckets_is_refused() -> None:
    plan = _plan("auto", world_size=2, tensors=2)
    profile = StepProfile(forward_s=0.0, backward_s=0.0, optimizer_s=0.0, ready_s=(0.0,))
    link = Link(latency_s=0.0, bytes_per_s=1.0)
    with pytest.raises(ConfigError, match="ready_s"):
        forecast(plan, gradcomp.exchange("auto"), profile=profile, link=link, cost_of=_cost, world_size=2)
