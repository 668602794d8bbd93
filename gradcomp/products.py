"""What the gradients of linear layers are products of, kept until they are sent: for compressors that send the factors.

A backward pass makes the gradient of ``nn.Linear``'s weight as errors^T inputs: what comes back for the layer's output,
[rows, out], and what went into it, [rows, in], a row for each example (or position). Passes whose gradients add up
stack their rows. Both are kept from the backward pass that used them, no longer than until the step is exchanged, and
only where they are smaller than the gradient.

Nothing is believed: clipping, hooks, a weight that is used otherwise too, memory that is used again, all make a
gradient that is not this product, or not any more. So products are compared with the gradient before they are given
out, by their effect on a random vector (R. Freivalds, "Probabilistic machines can use less running time", 1977), which
reads the gradient once. What does not agree to the rounding of the gradient is not given out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradcomp.hooks import after_gradient
from gradcomp.kernels.random import philox
from gradcomp.lanes import uses

__all__ = ["Handout", "Product", "Products", "is_product", "saves"]

_HEAD_NBYTES = 16  # of a FACTORS packet
# What makes many dimensions of the two of a matrix product.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
# Of float32, in units of its precision: errors of sums grow with the square root of their length.
_TOLERANCE = 64.0


class Product(NamedTuple):
    """A matrix [out, in] that is ``errors.T @ inputs``.

    Attributes:
        errors: float32 [rows, out].
        inputs: float32 [rows, in].
    """

    errors: Tensor
    inputs: Tensor

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.errors.shape[1] * self.inputs.shape[1]

    def cut(self, start: int, stop: int) -> Product:
        """A run of the matrix's rows, given by its flat elements."""
        columns = self.inputs.shape[1]
        return Product(self.errors[:, start // columns : stop // columns], self.inputs)


class Handout:
    """A product that is given out in parts, and kept no longer than until the last.

    Args:
        product: None: it is not known.
        numel: elements of the whole matrix.
    """

    def __init__(self, product: Product | None, numel: int) -> None:
        self._product = product
        self.left = numel

    def take(self, start: int, stop: int) -> Product | None:
        """Flat elements ``start`` to ``stop`` of the matrix."""
        product = self._product
        self.left -= stop - start
        if not self.left:
            self._product = None
        return None if product is None else product.cut(start, stop)


def saves(count: int, rows: int, columns: int) -> bool:
    """Whether factors of ``count`` rows are smaller than their product, a float32 matrix."""
    return _HEAD_NBYTES + 4 * count * (rows + columns) < 4 * rows * columns


def is_product(grad: Tensor, product: Product, *dtypes: torch.dtype) -> bool:
    """Whether ``grad`` is ``product``, to the rounding of ``dtypes`` and its own; not if either is not finite.

    Args:
        grad: [out, in], of any floating type.
    """
    errors, inputs = product
    columns = inputs.shape[1]
    words = philox(columns, 0, 0, -(-columns // 4), grad.device).view(-1)[:columns]
    signs = ((words & 2) - 1).to(torch.float32)
    found = grad.to(torch.float32).reshape(-1, columns) @ signs
    expected = errors.t() @ (inputs @ signs)
    lengths = torch.linalg.vector_norm(errors, dim=0, dtype=torch.float64)
    allowed = lengths * torch.linalg.vector_norm(inputs, dtype=torch.float64) * _rounding(grad.dtype, *dtypes)
    return bool((((found - expected).abs() <= allowed) & allowed.isfinite()).all())


def _rounding(*dtypes: torch.dtype) -> float:
    """How far a product may be off, as a share of its factors' lengths."""
    halves = [torch.finfo(dtype).eps for dtype in dtypes if dtype != torch.float32]
    # What torch makes of float32 factors where it was told that precision matters less: TF32, or bfloat16.
    exact = {"highest": torch.finfo(torch.float32).eps, "high": 2.0**-16, "medium": 2.0**-13}
    return max([_TOLERANCE * exact[torch.get_float32_matmul_precision()], *halves])


class Products:
    """Watches the linear layers of a model.

    Args:
        model: None: nothing is watched.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._layers: dict[int, _Layer] = {}

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """From now on keep what the gradients of ``parameters`` are products of, where linear layers use them."""
        self.remove()
        linears = {} if self._model is None else _linears(self._model)
        for parameter in parameters:
            if id(parameter) in linears:
                self._layers[id(parameter)] = _Layer(parameter, linears[id(parameter)])

    def take(self, parameter: Tensor, grad: Tensor, start: int, stop: int) -> Product | None:
        """What flat elements ``start`` to ``stop`` of ``grad`` are a product of, if that is known. Once for each.

        Args:
            parameter: whose gradient it is.
            grad: all of it.
        """
        layer = self._layers.get(id(parameter))
        return None if layer is None else layer.take(grad, start, stop)

    def clear(self) -> None:
        """Forget what was kept: the step is over."""
        for layer in self._layers.values():
            layer.clear()

    def remove(self) -> None:
        """Watch nothing any more."""
        for layer in self._layers.values():
            layer.remove()
        self._layers.clear()


def _linears(model: nn.Module) -> Mapping[int, list[nn.Linear]]:
    """By parameter: the linear layers whose weight it is. Not if it is anything else, too, such as an embedding."""
    linears: dict[int, list[nn.Linear]] = {}
    others = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(module, nn.Linear) and name == "weight":
                linears.setdefault(id(parameter), []).append(module)
            else:
                others.add(id(parameter))
    return {key: modules for key, modules in linears.items() if key not in others}


class _Layer:
    """One weight and the layers that use it.

    From a layer's forward to its backward pass, what went in is held by the graph alone: it goes when the graph does.
    """

    def __init__(self, weight: Tensor, modules: Iterable[nn.Linear]) -> None:
        self._weight = weight
        self._pending: list[Product] = []  # of the pass under way: their gradient is not added to the weight's yet
        self._kept: list[Product] = []
        self._seen: tuple[weakref.ref[Tensor], int] | None = None  # the gradient that is the sum of these; its version
        self._handout = Handout(None, 0)
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._after_forward, with_kwargs=True) for module in modules
        ]
        self._handles.append(after_gradient(weight, self._after_accumulation))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear()

    def clear(self) -> None:
        self._pending, self._kept, self._seen, self._handout = [], [], None, Handout(None, 0)

    def take(self, grad: Tensor, start: int, stop: int) -> Product | None:
        if not self._handout.left:
            kept, unchanged = self._kept, self._is_unchanged()
            self.clear()
            self._handout = Handout(_join(kept, grad) if kept and unchanged else None, grad.numel())
        return self._handout.take(start, stop)

    def _is_unchanged(self) -> bool:
        """Whether nobody wrote to the gradient since it was made; where another tensor took its place, perhaps not."""
        if self._seen is None:
            return False
        grad, version = self._seen
        return grad() is not self._weight.grad or version == self._version()

    def _version(self) -> int:
        return -1 if self._weight.grad is None else self._weight.grad._version

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        inputs = args[0] if args else kwargs.get("input")
        if (
            torch.compiler.is_compiling()  # what is compiled has no place for this
            or not isinstance(output, Tensor)
            or not isinstance(inputs, Tensor)
            or output.grad_fn is None
            or not self._weight.requires_grad
            or module.weight is not self._weight
            or inputs.shape[-1:] != self._weight.shape[1:]
            or not saves(inputs.numel() // max(inputs.shape[-1], 1), *self._weight.shape)
        ):
            return
        # What autocast made of it is what the product was made of.
        held = [_Held.apply(self._weight, inputs.detach().to(output.dtype))]  # type: ignore[no-untyped-call]
        node = output.grad_fn
        while node.name() in _VIEWS and node.next_functions[0][0] is not None:
            node = node.next_functions[0][0]  # a view's own node is left out where the view is written to
        node.register_prehook(self._before_backward(held))

    def _before_backward(self, held: list[Tensor]) -> Callable[[tuple[Tensor, ...]], None]:
        def hook(gradients: tuple[Tensor, ...]) -> None:
            errors = gradients[0]
            if not held or errors is None:
                return  # a second pass through the same graph: its gradient will not be this product
            holder = held.pop()  # older versions of torch free what is saved as soon as this goes
            if holder.grad_fn is None:
                return  # a derivative of torch.func, which has no part in the weight's gradient
            (inputs,) = holder.grad_fn.saved_tensors  # type: ignore[attr-defined]
            if errors.shape[-1:] != self._weight.shape[:1] or errors.numel() // errors.shape[-1] != _rows_of(inputs):
                return  # a layer of its own kind
            if not self._is_unchanged() or self._seen is None or self._seen[0]() is not self._weight.grad:
                self._kept, self._seen = [], None  # what they were of is gone
            if not self._pending:
                # For a pass that is only asked for gradients and adds none.
                torch.autograd.Variable._execution_engine.queue_callback(self._pending.clear)
            # Errors as they are: as long as this tensor is held, autograd does not make its memory somebody's gradient.
            self._pending.append(Product(errors.detach() if errors.requires_grad else errors, inputs))

        return hook

    def _after_accumulation(self, weight: Tensor) -> None:
        self._kept += self._pending
        self._pending.clear()
        if not saves(sum(_rows_of(product.inputs) for product in self._kept), *weight.shape):
            self._kept = []
        if weight.grad is not None:
            self._seen = (weakref.ref(weight.grad), self._version())


class _Held(torch.autograd.Function):
    """Holds a tensor as the graph holds those it needs: checkpointing computes it anew, offloading moves it.

    Never run backward: whoever has the result asks its ``grad_fn`` for the tensor.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, inputs: Tensor) -> Tensor:
        return weight.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _rows_of(inputs: Tensor) -> int:
    return inputs.numel() // inputs.shape[-1]


def _join(kept: list[Product], grad: Tensor) -> Product | None:
    """All rows, in memory of their own; None if they do not make ``grad``."""
    rows, columns = grad.shape
    uses(*(tensor for product in kept for tensor in product))  # backward's, which goes on
    joined = Product(
        torch.cat([product.errors.reshape(-1, rows) for product in kept]).to(torch.float32),
        torch.cat([product.inputs.reshape(-1, columns) for product in kept]).to(torch.float32),
    )
    dtypes = [product.errors.dtype for product in kept]
    return joined if len(joined.errors) and is_product(grad, joined, *dtypes) else None
