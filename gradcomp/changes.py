"""Going on with another plan in mid-run: another compressor, or other parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gradcomp import replicas
from gradcomp.errors import ConfigError, GradcompError
from gradcomp.gradients import HeldGradients, ParameterGradients
from gradcomp.interfaces import Transport
from gradcomp.plan import Planner, message_bounds
from gradcomp.products import Products
from gradcomp.rules import Choice
from gradcomp.stepper import Stepper

__all__ = ["go_on_with"]


def go_on_with(
    what: str,
    named: Sequence[tuple[str, Tensor]],
    choice: Callable[[], Choice],
    *,
    stepper: Stepper,
    planner: Planner,
    transport: Transport,
    products: Products,
    agreed: tuple[int, int],
) -> None:
    """Use a plan for these parameters and this compressor from the next step on, if all ranks do.

    Args:
        what: the method that was called, for messages.
        choice: gives the compressor; what it raises, all ranks hear of.
        products: what knows of products (gradcomp.gradients).
        agreed: the longest message, and how much a rank may send in a step, as the ranks agreed at the start.

    Raises:
        ConfigError: a step is under way, or this rank cannot go on so.
        HandshakeError: the ranks do not agree; names the field. Nothing has changed then, on any rank.
    """
    if stepper.under_way:
        raise ConfigError(f"{what}: a step is under way; call it between steps")
    problem: GradcompError | None = None
    hello: dict[str, str | int | bytes] = {"step": stepper.step}
    try:
        plan = planner.plan(named, choice())
        bounds = message_bounds(plan.message_bytes(), [tensor for _, tensor in named])
        for most, allowed in zip(bounds, agreed, strict=True):
            if most > allowed:
                raise ConfigError(f"{what}: messages could have {most} bytes; {allowed} were agreed on")
        numels = plan.numels
        store = stepper.store.recut(
            {key: piece for key, piece in stepper.plan.named_pieces().items() if key[0] in numels},
            plan.named_pieces(),
            numels,
            stepper.tensors[0].device,
        )
        hello |= plan.describe()
    except GradcompError as error:
        # The others must hear of it, or they would wait for this rank.
        problem = error
        hello["compressor"] = f"refused on rank {transport.rank}: {error}"[:1000]
    replicas.check_agreed(transport, stepper.next_turn(), hello, problem)
    tensors = [tensor for _, tensor in named]
    same = [id(tensor) for tensor in tensors] == [id(tensor) for tensor in stepper.tensors]
    gradients = HeldGradients if isinstance(stepper.gradients, HeldGradients) else ParameterGradients
    stepper.use(plan, store, tensors, stepper.gradients if same else gradients(tensors, products))
