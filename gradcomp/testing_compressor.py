"""The contract of :class:`gradcomp.interfaces.Compressor` as checks that any compressor can be put through."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from gradcomp.errors import PacketError
from gradcomp.interfaces import Compressor, State
from gradcomp.packet import HEADER_NBYTES, Kind, Packet
from gradcomp.rounds import Rounds

__all__ = ["check_compressor"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHAPES = ((), (0,), (1,), (7,), (8,), (65,), (3, 5, 7), (16, 64), (4099,))
_STEPS = 4
_EPSILON = torch.finfo(torch.float32).eps


def check_compressor(compressor: Compressor, device: torch.device | str = "cpu") -> None:
    """Check everything :class:`gradcomp.interfaces.Compressor` promises.

    Args:
        compressor: ready to use; it need not be registered.
        device: where the gradients lie.

    Raises:
        AssertionError: names the promise that is not kept, and for which input.
    """
    where = torch.device(device)
    _check_config(compressor)
    for dtype in _DTYPES:
        for shape in _SHAPES:
            what = f"{compressor!r}, {dtype}, shape {shape}"
            _run(_check_steps, what, compressor, [_noise(shape, dtype, where, step) for step in range(_STEPS)])
        for name, grad in _special(dtype, where).items():
            _run(_check_steps, f"{compressor!r}, {dtype}, {name}", compressor, [grad] * _STEPS)
        for value in (math.nan, math.inf, -math.inf):
            for position in (0, 500, 1002):
                what = f"{compressor!r}, {dtype}, {value} at {position}"
                _run(_check_nonfinite, what, compressor, dtype, where, value, position)
    if compressor.linear:
        for shape in _SHAPES:
            what = f"{compressor!r}, sums, shape {shape}"
            _run(_check_rounds, what, compressor, [_noise(shape, torch.float32, where, rank) for rank in range(3)])
    _run(_check_misuse, repr(compressor), compressor, where)
    _run(_check_damage, repr(compressor), compressor, where)


def _run(check: Callable[..., None], what: str, *args: object) -> None:
    try:
        check(*args)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(promise)


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
    return noise.to(device, dtype)


def _special(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    ramp = torch.linspace(-1.0, 1.0, 1003)
    spike = torch.zeros(1003)
    spike[1002] = -3.0
    few = torch.zeros(1003)
    few[::100] = 0.5
    cases = {
        "zeros": torch.zeros(1003),
        "negative zeros": -torch.zeros(1003),
        "a constant": torch.full((1003,), 0.25),
        "one spike": spike,
        "few equal values": few,
        "a ramp": ramp,
        "denormals": ramp * (1e-6 if dtype is torch.float16 else 1e-40),
        "large values": ramp * (6e4 if dtype is torch.float16 else 1e37),
    }
    return {name: values.to(device, dtype) for name, values in cases.items()}


def _copy(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are the same: NaN is NaN, and 0 is not -0."""
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _same_state(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)


def _check_config(compressor: Compressor) -> None:
    config = json.loads(json.dumps(compressor.config()))
    _require(config.get("id") == compressor.id, f"config() names the id {compressor.id!r}; got {config}")
    again = type(compressor).from_options({key: value for key, value in config.items() if key != "id"})
    _require(again == compressor, f"from_options(config()) is equal; {again!r} is not {compressor!r}")
    _require(hash(again) == hash(compressor), "equal compressors have the same hash")
    _require(type(compressor).__name__ in repr(compressor), f"repr() names the class; got {repr(compressor)!r}")
    for field in [f.name for f in dataclasses.fields(compressor)] or ["id"]:  # type: ignore[arg-type]
        try:
            setattr(compressor, field, getattr(compressor, field))
        except AttributeError:
            continue
        raise AssertionError(f"a compressor is frozen; its {field} can be set")


def _check_steps(compressor: Compressor, grads: list[Tensor]) -> None:
    state = compressor.new_state(grads[0])
    _require(
        isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()),
        "new_state() gives a dict of tensors",
    )
    _require(not (compressor.stateless and state), "a stateless compressor has no state")
    for field in [field for field in compressor.additive if field in state]:
        right = state[field].dtype == torch.float32 and state[field].shape == (grads[0].numel(),)
        _require(right, f"what is additive is float32, flat, of the gradient's size; {field} is not")
    _check_packet(compressor, grads[0], compressor.encode(grads[0]))
    for grad in grads:
        grad_before, before = grad.clone(), _copy(state)
        packet = compressor.encode(grad, state)
        _require(_same(grad, grad_before), "encode() leaves the gradient as it is")
        _require(_same_state(state, before), "encode() leaves the state as it is")
        _require(compressor.encode(grad, state) == packet, "the same gradient and state give the same packet")
        _check_packet(compressor, grad, packet)
        other = _copy(state)
        _require(compressor.compress(grad, other) == packet, "compress() gives the packet of encode()")
        third, used_up = _copy(state), grad.clone()
        prepared, commit = compressor.prepare(used_up, third)
        _require(prepared == packet, "prepare() gives the packet of encode()")
        _require(_same_state(third, before), "prepare() leaves the state as it is until it is committed")
        memory = commit()
        _require(_same_state(third, other), "what prepare() commits is what commit() does")
        _require(memory is None or memory.numel() == grad.numel(), "a commit returns as much memory, or None")
        same = _same(compressor.at(state).decompress(packet), compressor.decompress(packet))
        _require(same, "at() decodes the step's packet as decompress() does")
        fourth = _copy(state)
        compressor.pass_over(fourth)
        _require(fourth.keys() == state.keys(), "pass_over() keeps the state's fields")
        if "residual" in state:
            _require(_same(fourth["residual"], state["residual"]), "pass_over() leaves the residual as it is")
        compressor.commit(grad, packet, state)
        _require(_same(grad, grad_before), "commit() leaves the gradient as it is")
        _require(_same_state(state, other), "compress() is encode() and commit()")
        if "residual" in state and compressor.conserves:
            _check_conservation(grad, before["residual"], compressor.decompress(packet), state["residual"])


def _check_packet(compressor: Compressor, grad: Tensor, packet: Packet) -> None:
    numel = grad.numel()
    data = packet.to_bytes()
    _require(packet.numel == numel, f"a packet has the gradient's {numel} elements; got {packet.numel}")
    _require(packet.device == grad.device, f"a packet lies on {grad.device}, where the gradient does")
    _require(packet.payload.data_ptr() != grad.data_ptr() or not numel, "a packet owns its payload")
    _require(packet.nbytes == len(data), f"nbytes is {packet.nbytes}; to_bytes() has {len(data)}")
    most, typical = compressor.max_nbytes(numel), compressor.typical_nbytes(numel)
    _require(len(data) <= most, f"max_nbytes({numel}) is {most}; a packet has {len(data)}")
    _require(HEADER_NBYTES <= typical <= most, f"typical_nbytes({numel}) is {typical}, max_nbytes {most}")
    stats = compressor.stats(packet)
    _require(all(isinstance(value, float) for value in stats.values()), f"stats() are floats; got {stats}")

    decoded = compressor.decompress(packet)
    _require(decoded.dtype == torch.float32 and decoded.shape == (numel,), "decompress() gives a float32 vector")
    received = Packet.from_bytes(data, numel=numel, device=grad.device)
    _require(received == packet, "from_bytes(to_bytes()) is the same packet")
    _require(_same(compressor.decompress(received), decoded), "a packet and its bytes decode to the same bits")
    start = torch.ones(numel, device=grad.device)
    out = start.clone()
    compressor.decompress_add(received, out, 0.25)  # a power of two: scaling rounds only below 1e-38
    right = torch.allclose(out, start + decoded * 0.25, rtol=1e-6, atol=1e-30, equal_nan=True)
    _require(right, "decompress_add() adds scale * decoded")
    one_by_one = torch.zeros_like(out)
    for each in (received, packet):
        compressor.decompress_add(each, one_by_one, 0.3)
    compressor.decompress_sum([received, packet], out, 0.3)
    _require(_same(out, one_by_one), "decompress_sum() is decompress_add() one by one, to the bit")


def _check_conservation(grad: Tensor, before: Tensor, decoded: Tensor, after: Tensor) -> None:
    total = grad.reshape(-1).to(torch.float32) + before
    size = total.abs() + decoded.abs() + after.abs()
    lost = (total.double() - decoded.double() - after.double()).abs() > 2 * _EPSILON * size.double()
    where = lost.nonzero().view(-1).tolist()[:10]
    _require(not where, f"grad + residual == decoded + new residual; not so at {where}")


def _check_nonfinite(
    compressor: Compressor, dtype: torch.dtype, device: torch.device, value: float, position: int
) -> None:
    grad = _noise((1003,), dtype, device, 0)
    state = compressor.new_state(grad)
    compressor.compress(grad, state)
    before = _copy(state)
    grad[position] = value
    packet = compressor.compress(grad, state)
    _require(_same_state(state, before), "a non-finite gradient leaves the state alone")
    prepared, _ = compressor.prepare(grad.clone(), state)
    _require(_same_state(state, before), "also when it is prepared")
    _require(prepared == packet, "prepare() gives the packet of compress()")
    received = Packet.from_bytes(packet.to_bytes(), numel=1003, device=device)
    _require(not bool(compressor.decompress(received).isfinite().all()), "a non-finite gradient is seen as such")
    _require(not bool(compressor.decompress(compressor.encode(grad)).isfinite().all()), "also in one shot")


def _check_rounds(compressor: Compressor, grads: list[Tensor]) -> None:
    states = [compressor.new_state(grad) for grad in grads]
    for rank, state in enumerate(states):
        compressor.seed_state(state, parameter="weight", rank=rank)
    for _ in range(_STEPS):
        before = [_copy(state) for state in states]
        found = _add_up(compressor, grads, states)
        _require(all(map(_same_state, states, before)), "rounds() leaves the state as it is")
        totals = [total for _, total in found]
        _require(all(total == totals[0] for total in totals), "the packet of the sum is the same on all ranks")
        parts = torch.stack([compressor.decompress(own) for own, _ in found]).sum(0)
        if not compressor.stateless:
            right = torch.allclose(compressor.decompress(totals[0]), parts, rtol=1e-3, atol=1e-4)
            _require(right, "the packet of the sum decodes to the sum of the ranks' own packets")
        for grad, state, old, (own, total) in zip(grads, states, before, found, strict=True):
            if compressor.stateless:
                continue
            compressor.commit_sum(grad, own, total, state)
            if "residual" in state and compressor.conserves:
                _check_conservation(grad, old["residual"], compressor.decompress(own), state["residual"])
        shared = [{name: value for name, value in state.items() if name != "residual"} for state in states]
        _require(
            all(_same_state(shared[0], other) for other in shared), "all but the residual is the same on all ranks"
        )
    if grads[0].numel():
        spoiled = [grad.clone() for grad in grads]
        spoiled[1].view(-1)[-1] = math.nan
        for _, total in _add_up(compressor, spoiled, states):
            _require(
                not bool(compressor.decompress(total).isfinite().all()), "all ranks see a gradient that is not finite"
            )


def _add_up(compressor: Compressor, grads: list[Tensor], states: list[State]) -> list[tuple[Packet, Packet]]:
    """Rounds of several ranks, in step with each other."""
    ranks = [compressor.rounds(grad, state) for grad, state in zip(grads, states, strict=True)]
    most = compressor.max_nbytes(grads[0].numel()) - HEADER_NBYTES
    steps: list[Tensor | tuple[Packet, Packet]] = [_next_part(rank, None) for rank in ranks]
    while parts := [part for part in steps if isinstance(part, Tensor)]:
        alike = len(parts) == len(ranks) and len({part.numel() for part in parts}) == 1
        _require(alike, f"all ranks add vectors of one length in every round; got {[len(part) for part in parts]}")
        _require(parts[0].dtype == torch.float32 and parts[0].dim() == 1, "what is added up is flat float32")
        most -= 4 * parts[0].numel()
        _require(most >= 0, "what is added up is no longer than a packet's payload may be")
        total = torch.stack(parts).sum(0)
        steps = [_next_part(rank, total) for rank in ranks]
    return [end for end in steps if not isinstance(end, Tensor)]


def _next_part(rounds: Rounds[tuple[Packet, Packet]], total: Tensor | None) -> Tensor | tuple[Packet, Packet]:
    try:
        return next(rounds) if total is None else rounds.send(total)
    except StopIteration as end:
        result: tuple[Packet, Packet] = end.value
        return result


def _check_misuse(compressor: Compressor, device: torch.device) -> None:
    grad = _noise((64,), torch.float32, device, 0)
    packet = compressor.encode(grad)
    wrong = {
        "65 elements": torch.zeros(65, device=device),
        "float64": torch.zeros(64, device=device, dtype=torch.float64),
        "strided": torch.zeros(128, device=device)[::2],
    }
    for name, out in wrong.items():
        try:
            compressor.decompress_add(packet, out)
        except ValueError:
            continue
        raise AssertionError(f"decompress_add() raises ValueError for an out of {name}")
    if packet.kind != Kind.SIGNS:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        foreign = Packet.signs(none, none.to(torch.bool), 64, 1.0)
    else:
        foreign = Packet(kind=Kind.DENSE_F32, numel=64, payload=torch.zeros(256, dtype=torch.uint8, device=device))
    _require(_refused_or_decoded(compressor, foreign), f"a packet of kind {foreign.kind} is refused")


def _check_damage(compressor: Compressor, device: torch.device) -> None:
    dice = random.Random(0)
    data = compressor.encode(_noise((333,), torch.float32, device, 0)).to_bytes()
    damaged = [data[:length] for length in {*range(min(len(data), 64)), len(data) - 1}] + [data + b"\0"]
    for _ in range(200):
        flipped = bytearray(data)
        for _ in range(dice.randint(1, 3)):
            flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        damaged.append(bytes(flipped))
    for bad in damaged:
        try:
            packet = Packet.from_bytes(bad, numel=333, device=device)
        except PacketError:
            continue
        _refused_or_decoded(compressor, packet)
    try:
        Packet.from_bytes(data, numel=334)
    except PacketError:
        return
    raise AssertionError("a packet for another number of elements is refused")


def _refused_or_decoded(compressor: Compressor, packet: Packet) -> bool:
    """Whether decoding raised PacketError, in which case ``out`` must be as it was."""
    guard = 16  # elements before and after, which nobody may touch
    whole = torch.zeros(packet.numel + 2 * guard, device=packet.device)
    out = whole[guard : guard + packet.numel]
    try:
        compressor.decompress_add(packet, out)
    except PacketError:
        _require(not bool(out.any()), "a packet that is refused leaves out as it was")
        refused = True
    else:
        refused = False
    _require(not bool(whole[:guard].any() or whole[-guard:].any()), "decoding stays within out")
    return refused
