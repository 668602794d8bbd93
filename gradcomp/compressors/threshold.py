"""Threshold compression: what passes +-tau is sent as +-tau, the rest waits in the residual.

N. Strom, "Scalable distributed DNN training using commodity GPU cloud computing", Interspeech 2015.

With ``acc = grad + residual``: elements with ``|acc| > tau`` are sent as ``sign(acc) * tau``, and
``residual = acc - sent``. ``tau`` is fixed, or follows the share of elements that is to be sent: each tensor then has a
tau of its own, in its state, which starts as a quantile of ``|acc|`` and moves a little after every step.

Wire: a SIGNS packet. float32 ``tau`` in the header; the payload is the signed index set: about 2 bytes for each element
sent below a density of 1/8, 2 bits for every element of the tensor above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcomp import indices, kernels
from gradcomp.compressors import flat_gradient
from gradcomp.errors import ConfigError
from gradcomp.interfaces import Compressor, State
from gradcomp.options import check_number
from gradcomp.packet import HEADER_NBYTES, Coding, Kind, Packet

__all__ = ["Threshold"]

_DEFAULT_DENSITY = 1e-3
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Threshold(Compressor):
    """Send the elements that pass a threshold, as that threshold with their sign.

    State: ``residual`` (float32, flat); with ``density`` also ``tau`` (float32, 0-dim, on the CPU; NaN until known).

    Attributes:
        tau: the threshold, in units of the gradient; fixed. Larger: less traffic, more waits in the residual.
        density: share of elements to send, instead of ``tau``; 0.001 if neither is given. Larger: more traffic.
    """

    id: ClassVar[str] = "threshold"
    tau: float | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        if self.tau is not None and self.density is not None:
            raise ConfigError(
                f"threshold: give tau or density, not both; got tau={self.tau!r} and density={self.density!r}"
            )
        if self.tau is not None:
            check_number("threshold", "tau", self.tau, at_least=_FLOAT32.tiny, at_most=_FLOAT32.max)
            object.__setattr__(self, "tau", float(self.tau))  # 1 and 1.0 are the same config
            return
        density = _DEFAULT_DENSITY if self.density is None else self.density
        check_number("threshold", "density", density, above=0.0, at_most=1.0)
        object.__setattr__(self, "density", float(density))

    def new_state(self, grad: Tensor) -> State:
        state = super().new_state(grad)
        if self.density is not None:
            state["tau"] = torch.tensor(math.nan, dtype=torch.float32)
        return state

    def encode(self, grad: Tensor, state: State | None = None) -> Packet:
        flat = flat_gradient(grad)
        residual = None if state is None else state["residual"]
        if self.density is None:
            tau = self.tau or 0.0
        else:
            tau = math.nan if state is None else float(state["tau"])
            if math.isnan(tau):
                tau = kernels.sample_quantile(flat, residual, self.density)
        if not math.isfinite(tau):
            tau = 0.0  # the sample is not finite; then acc is not, and the kernel says what it is
        found = kernels.select_threshold(flat, residual, tau)
        if isinstance(found, float):
            return Packet.nonfinite(found, flat.numel(), flat.device)
        index, negative = found
        if tau == 0.0:  # every element of the sample is 0: nothing to go by yet, and +-0 says nothing
            index, negative = index[:0], negative[:0]
        return Packet.signs(index, negative, flat.numel(), tau)

    def decode_add(self, packet: Packet, out: Tensor, scale: float) -> None:
        packet.require(Kind.SIGNS)
        magnitude = float(torch.tensor(packet.scalar) * scale)
        if packet.coding is Coding.MAP:
            kernels.add_sign_map(out, packet.payload, magnitude)
        else:
            kernels.scatter_signs(out, *packet.index_set, magnitude)

    def commit(self, grad: Tensor, packet: Packet, state: State) -> None:
        if self.density is not None and packet.numel:
            # Before the residual changes: the sample must see what encode saw.
            state["tau"].fill_(self._next_tau(grad, packet, state))
        super().commit(grad, packet, state)

    def _next_tau(self, grad: Tensor, packet: Packet, state: State) -> float:
        density = self.density or _DEFAULT_DENSITY
        tau = packet.scalar
        found = packet.count / packet.numel / density
        # Tensors of fewer than 1/density elements send one or none; 0 is not far off for them.
        if tau == 0.0 or found > 8.0 or (found < 1 / 8 and packet.numel * density >= 8.0):
            sampled: float = kernels.sample_quantile(flat_gradient(grad), state["residual"], density)
            return sampled or tau or math.nan
        tau *= math.pow(min(max(found, 1 / 4), 4.0), 0.2)
        return min(max(tau, _FLOAT32.tiny), _FLOAT32.max)

    def max_nbytes(self, numel: int) -> int:
        return HEADER_NBYTES + indices.max_coded_nbytes(numel, numel, Coding.MAP, signed=True)

    def typical_nbytes(self, numel: int) -> int:
        # What a fixed tau lets through depends on the gradient; we expect it to be chosen for as much as the default.
        count = math.ceil((self.density or _DEFAULT_DENSITY) * numel)
        coding = indices.choose(count, numel, signed=True)
        return HEADER_NBYTES + indices.max_coded_nbytes(count, numel, coding, signed=True)

    def stats(self, packet: Packet, state: State | None = None) -> dict[str, float]:
        """``tau``: the threshold of this packet; ``density``: the share of elements that passed it."""
        return {"tau": packet.scalar, "density": packet.count / max(packet.numel, 1)}
