"""The factors of linear layers' gradients: the same gradient as sent as it is, whatever a training loop does to it."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run_script
from ranks import attach, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Tied, filled, noise, sgd
from training_loops import LOOPS, ours

import gradcomp
from gradcomp import testing_transport
from gradcomp.bucket import Parameter, Unit
from gradcomp.compressors.factors import Factors
from gradcomp.errors import ConfigError, PacketError
from gradcomp.exchanges.auto import Auto
from gradcomp.host_products import HostProducts
from gradcomp.packet import HEADER_NBYTES, Kind, Packet
from gradcomp.products import Product, Products, is_product, saves
from gradcomp.transports.hierarchical import HierarchicalTransport

Loop = Callable[[nn.Module, torch.optim.Optimizer, Any], None]
Rows = dict[str, float]

EXCHANGES = ["all_gather", "two_shot", "auto"]
IN, MIDDLE, OUT = 96, 80, 40


def network() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(IN, MIDDLE), nn.ReLU(inplace=True), nn.Linear(MIDDLE, OUT)))


def loss(net: nn.Module, sync: Any, step: int, *shape: int) -> Tensor:
    """Of a batch of 8, another one on each rank and at each step."""
    return net(noise(sync.rank, step, *(shape or (8,)), IN)).square().mean()


def plain(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any, *, steps: int = 2, shape: Any = (8,)) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, sync, step, *shape).backward()
        optimizer.step()


def run(
    loop: Loop, compressor: Any, transport: Any, make: Callable[[], nn.Module] = network, **options: Any
) -> tuple[dict[str, Tensor], Rows, Any]:
    """Gradients at the end; the rows of each linear layer's factors in the last step; statistics."""
    net = make()
    optimizer = sgd(net)
    with attach(net, optimizer, transport, compressor=compressor, **{"digest_every": 1} | options) as sync:
        loop(net, optimizer, sync)
        stats = sync.stats()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    rows = {name.removesuffix(".weight"): row["rows"] for name, row in stats["parameters"].items() if "rows" in row}
    return gradients, rows, stats


def near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        off = float((found[name] - grad).float().norm()) / max(float(grad.float().norm()), 1e-30)
        assert off <= tolerance, f"{name}: {off}"


def compare(loop: Loop, *, tolerance: float = 1e-6, **options: Any) -> Rows:
    """Run ``loop`` on two ranks, with factors and without; the gradients must be the same. Returns the rows sent."""
    found, expected = (run_ranks(2, functools.partial(run, loop, id, **options)) for id in ("factors", "none"))
    for mine, theirs in zip(found, expected, strict=True):
        near(mine[0], theirs[0], tolerance)
        near(mine[0], found[0][0], 0.0)
    assert found[0][1] == found[1][1]
    return found[0][1]


# -- where packets meet ------------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    """Its first layer is cut by two_shot."""
    return filled(nn.Sequential(nn.Linear(IN, 400), nn.Tanh(), nn.Linear(400, OUT)))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_is_that_of_dense_gradients(exchange: str, world_size: int) -> None:
    found, expected = (
        run_ranks(world_size, functools.partial(run, plain, id, make=wide, exchange=exchange))
        for id in ("factors", "none")
    )
    for (mine, rows, stats), (theirs, _, dense) in zip(found, expected, strict=True):
        near(mine, theirs)
        assert rows == {"0": 8, "2": 8}
        assert stats["packet_bytes"] < dense["packet_bytes"] / 2
        assert stats["compressors"]["0.weight"] == "factors"
        assert stats["compressors"]["0.bias"] == "none"


def run_hosts(hosts: int, ranks: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
    level = f"inproc:hub={uuid.uuid4().hex},timeout_s=20"
    levels = {"local": level, "between": level, "world_size": hosts * ranks, "ranks_per_host": ranks} | options
    transports = [HierarchicalTransport(rank=rank, **levels) for rank in range(hosts * ranks)]
    return testing_transport.run_ranks(transports, function)


@pytest.mark.parametrize("local_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_between_hosts_the_rows_of_all_their_ranks(ranks: int, local_dtype: str) -> None:
    """As a product they are exact, even where ranks inside a host send each other less."""
    found, expected = (
        run_hosts(2, ranks, functools.partial(run, plain, id), local_dtype=dtype)
        for id, dtype in (("factors", local_dtype), ("none", "float32"))
    )
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("0.weight", "2.weight"):
            near({name: mine[0][name]}, {name: theirs[0][name]}, 1e-6 if local_dtype == "float32" else 1e-2)
        near(mine[0], found[0][0], 0.0)
    assert found[0][1] == {"0": 8 * ranks, "2": 8 * ranks}


def test_between_hosts_whose_ranks_differ() -> None:
    def loop(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step, sizes in enumerate([(8, 8), (20, 20), (3, 60), (5, 0)]):
            optimizer.zero_grad()
            if size := sizes[sync.rank % 2]:
                loss(net, sync, step, size).backward()
            else:
                sync.exchange()
            if sync.rank == 0:
                rows.append(sync.stats()["parameters"].get("2.weight", {}).get("rows"))
            optimizer.step()

    rows: list[Any] = []
    found, expected = (run_hosts(2, 2, functools.partial(run, loop, id)) for id in ("factors", "none"))
    for mine, theirs in zip(found, expected, strict=True):
        near(mine[0], theirs[0])
    assert found[0][1] == {"0": 5, "2": 5}
    assert rows == [16, 0, 0, 5, None, None, None, None]


class Arrived:
    """A message from a member of the host."""

    peer = 1

    def __init__(self, data: bytes) -> None:
        self._data = data

    def result(self) -> memoryview:
        return memoryview(self._data)


def test_what_members_of_a_host_say_of_their_products_is_checked() -> None:
    shapes = [(80, 96), (7,), (40, 80)]
    table = [Parameter(f"p{i}", shape, torch.float32, Factors()) for i, shape in enumerate(shapes)]
    host = HostProducts(None, table, None, torch.device("cpu"))  # type: ignore[arg-type]

    def parse(counts: list[int], floats: int, more: bytes = b"") -> list[Product | None]:
        data = torch.tensor(counts).numpy().tobytes() + torch.ones(floats).numpy().tobytes() + more
        return host._parse(Arrived(data), [0, 1, 2])  # type: ignore[arg-type]

    first, second, third = parse([3, -1, 0], 3 * 176)
    assert first is not None
    assert third is not None
    assert (first.errors.shape, first.inputs.shape, second, len(third.errors)) == ((3, 80), (3, 96), None, 0)
    wrong = [([3, -1, 0], 527, b""), ([3, -1, 0], 529, b""), ([3, -1, 0], 528, b"x"), ([-2, -1, 0], 0, b"")]
    wrong += [([0, 0, 0], 0, b""), ([44, -1, 0], 44 * 176, b""), ([1 << 62, -1, 0], 0, b""), ([0, -1], 0, b"")]
    for counts, floats, more in wrong:
        with pytest.raises(PacketError, match="rank 1 of the host sent"):
            parse(counts, floats, more)


def test_auto_knows_that_sums_of_products_are_dense() -> None:
    def owned(numel_side: int, world_size: int) -> bool:
        unit = Unit((0,), (numel_side, numel_side), Factors())
        return any(piece.owner is not None for piece in Auto(native_sums=False).cut([unit], world_size))

    assert not any(owned(4096, world_size) for world_size in (2, 4, 16, 64))
    assert owned(4096, 128)  # by then all-gather sends more than the matrix itself
    assert owned(512, 32)


def test_under_ddp() -> None:
    script = """
import datetime
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from gradcomp.integrations import ddp

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))

def train(compressor, **options):
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(96, 80), nn.ReLU(inplace=True), nn.Linear(80, 40)), **options)
    sync = ddp.register(model, compressor) if compressor else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        optimizer.zero_grad(set_to_none=step % 3 != 0)
        x = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(100 * step + RANK))
        if step % 2:
            with model.no_sync():
                model(x[0]).square().mean().backward()
        model(x[1]).square().mean().backward()
        optimizer.step()
    rows = {name: row["rows"] for name, row in sync.stats()["parameters"].items()} if sync else {}
    if sync:
        sync.close()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), rows

for options in ({}, {"gradient_as_bucket_view": True}):
    plain, _ = train(None, **options)
    ours, rows = train("factors", **options)
    say(off=float((ours - plain).norm() / plain.norm()), rows=rows)
dist.barrier()
dist.destroy_process_group()
"""
    for rank in run_script(script, world_size=2):
        for found in rank:
            assert found["off"] < 1e-5
            assert found["rows"] == {"0.weight": 12, "2.weight": 12}


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_chosen_for_each_layer_by_the_rows_of_its_batch() -> None:
    most = {"0": (IN, MIDDLE), "2": (MIDDLE, OUT)}
    for rows in (1, 26, 27, 43, 44):
        found = compare(functools.partial(plain, shape=(rows,)))
        assert found == {name: rows if saves(rows, *shape) else 0 for name, shape in most.items()}
    assert compare(functools.partial(plain, shape=(3, 7))) == {"0": 21, "2": 21}  # positions of a sequence are rows


def test_batch_sizes_differ_by_rank_and_step() -> None:
    sizes = [[8, 60, 0, 9], [1, 12, 8, 60]]

    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step, size in enumerate(sizes[sync.rank]):
            optimizer.zero_grad()
            loss(net, sync, step, size).nan_to_num().backward()
            optimizer.step()

    found, expected = (run_ranks(2, functools.partial(run, loop, id)) for id in ("factors", "none"))
    for mine, theirs in zip(found, expected, strict=True):
        near(mine[0], theirs[0])
    assert [rank[1]["0"] for rank in found] == [9, 0]


ALEXNET = [(9216, 4096), (4096, 4096), (4096, 1000)]  # in, out


def test_bytes_for_the_dense_layers_of_alexnet_at_batch_32() -> None:
    batch, sent, dense = 32, 0, 0
    for columns, rows in ALEXNET:
        product = Product(torch.ones(batch, rows), torch.ones(batch, columns))
        packet = Factors().encode_product(torch.empty(rows, columns, device="meta"), product)
        assert packet.kind == Kind.FACTORS
        assert packet.nbytes == HEADER_NBYTES + 16 + 4 * batch * (rows + columns)
        sent += packet.nbytes
        dense += Factors().max_nbytes(rows * columns)
    assert (sent, dense) == (3_404_944, 234_487_904)
    assert round(dense / sent, 2) == 68.87


def test_rules() -> None:
    rules = {"rules": [{"name": "0.*", "compressor": "factors"}], "default": "threshold:tau=1e-3"}
    found = run_ranks(2, functools.partial(run, plain, rules))
    expected = run_ranks(2, functools.partial(run, functools.partial(plain, steps=1), "none"))
    assert found[0][1] == {"0": 8, "0.bias": 0}
    assert found[0][2]["compressors"]["2.weight"].startswith("threshold")
    first = run_ranks(2, functools.partial(run, functools.partial(plain, steps=1), rules))
    near({"0.weight": first[0][0]["0.weight"]}, {"0.weight": expected[0][0]["0.weight"]})


def test_changed_to_in_mid_run() -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        plain(net, optimizer, sync)
        for compressor in ("none", sync.compressor):
            sync.set_compressor(compressor)
            plain(net, optimizer, sync)

    assert compare(loop) == {"0": 8, "2": 8}


@pytest.mark.parametrize("hosts", [False, True])
def test_what_a_residual_held_back_goes_with_the_next_gradient(hosts: bool) -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any, *, then: str) -> None:
        sync.set_compressor("threshold:tau=1e-3")
        plain(net, optimizer, sync)
        sync.set_compressor(then)
        plain(net, optimizer, sync, steps=1)

    def train(id: str) -> list[Any]:
        function = functools.partial(run, functools.partial(loop, then=id), id)
        return run_hosts(2, 2, function) if hosts else run_ranks(2, function)

    found, expected = train("factors"), train("none")
    near(found[0][0], expected[0][0])
    assert found[0][1] == {"0": 0, "2": 0}  # gradient + residual is no product


# -- what training loops do --------------------------------------------------------------------------------------------


def test_a_weight_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(IN, IN), nn.Linear(IN, IN)
            self.again.weight = self.first.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.as_tensor(self.again(torch.tanh(self.first(self.first(input=inputs)))))

    assert compare(plain, make=lambda: filled(Twice())) == {"first": 24}


@pytest.mark.parametrize("when", ["backward", "step"])
def test_accumulated_gradients_stack_their_rows_until_dense_is_smaller(when: str) -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any, *, passes: int) -> None:
        for step in range(2):
            optimizer.zero_grad()
            with sync.no_sync():
                for micro in range(1, passes):
                    loss(net, sync, 100 * step + micro).backward()
            loss(net, sync, 100 * step).backward()
            optimizer.step()

    for passes, first, last in [(3, 24, 24), (5, 40, 0), (6, 0, 0), (7, 0, 0)]:
        found = compare(functools.partial(loop, passes=passes), when=when)
        assert found == {"0": first, "2": last}, passes


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_was_accumulated_and_thrown_away_is_gone(set_to_none: bool) -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step in range(3):
            with sync.no_sync():
                loss(net, sync, 10 + step).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            loss(net, sync, step).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        loss(net, sync, 5).backward()

    assert compare(loop) == {"0": 8, "2": 8}


def test_clipping_before_the_exchange() -> None:
    """A gradient that was written to is no product any more, however little was changed."""

    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any, *, most: float) -> None:
        for step in range(2):
            optimizer.zero_grad()
            loss(net, sync, step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), most)
            optimizer.step()

    assert compare(functools.partial(loop, most=0.01), when="step") == {"0": 0, "2": 0}
    assert compare(functools.partial(loop, most=1e9), when="step") == {"0": 0, "2": 0}
    assert compare(functools.partial(loop, most=0.01)) == {"0": 8, "2": 8}  # clipped after the exchange


def test_a_gradient_that_is_replaced_or_changed_between_micro_steps() -> None:
    def loop(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        with sync.no_sync():
            loss(net, sync, 0).backward()
        net[0].weight.grad = net[0].weight.grad * 0.5
        net[2].weight.grad.mul_(0.5)
        loss(net, sync, 1).backward()

    assert compare(loop) == {"0": 0, "2": 0}


def test_hooks_and_other_uses_of_the_weight() -> None:
    def halved(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        net[0].weight.register_hook(lambda grad: grad * 0.5)
        plain(net, optimizer, sync)

    def penalized(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        (loss(net, sync, 0) + 1e-3 * net[0].weight.square().sum()).backward()

    def functional(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        hidden = nn.functional.linear(noise(sync.rank, 5, 8, IN), net[0].weight)
        (loss(net, sync, 0) + hidden.square().mean()).backward()

    def one_element(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        net[0].weight.register_hook(lambda grad: grad.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(0.0)))
        plain(net, optimizer, sync, steps=1)

    for loop in (halved, penalized, functional, one_element):
        assert compare(loop) == {"0": 0, "2": 8}


def test_inputs_and_outputs_that_are_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(IN, IN), nn.Linear(IN, IN)])

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.layers[0](inputs).mul_(0.5).relu_()
            return torch.as_tensor(self.layers[1](hidden).tanh_())

    for shape in ((8,), (2, 4)):
        rows = compare(functools.partial(plain, shape=shape), make=lambda: filled(Writes()))
        assert rows == {"layers.0": 8, "layers.1": 8}

    def same_memory(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        inputs = torch.empty(8, IN)
        with sync.no_sync():
            net(inputs.copy_(noise(sync.rank, 0, 8, IN))).square().mean().backward()
        net(inputs.copy_(noise(sync.rank, 1, 8, IN))).square().mean().backward()

    assert compare(same_memory) == {"0": 0, "2": 16}


def test_a_graph_that_is_kept_and_gradients_that_are_only_asked_for() -> None:
    def kept(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        value = loss(net, sync, 0)
        value.backward(retain_graph=True)
        optimizer.zero_grad()
        value.backward()

    def asked(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        inputs = noise(sync.rank, 0, 8, IN).requires_grad_()
        torch.autograd.grad(net(inputs).square().mean(), inputs)
        loss(net, sync, 1).backward()

    def penalty(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        inputs = noise(sync.rank, 0, 8, IN).requires_grad_()
        value = net(inputs).square().mean()
        (slope,) = torch.autograd.grad(value, inputs, create_graph=True)
        (value + slope.square().sum()).backward()

    def transformed(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        inputs = noise(sync.rank, 0, 8, IN)
        torch.func.grad(lambda inputs: net(inputs).sum())(inputs)
        torch.func.jacrev(net)(inputs)
        torch.vmap(net)(inputs)
        loss(net, sync, 1).backward()

    assert compare(kept) == {"0": 0, "2": 0}
    assert compare(transformed) == {"0": 8, "2": 8}
    assert compare(asked) == {"0": 8, "2": 8}
    assert compare(penalty) == {"0": 0, "2": 0}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(IN, IN), nn.Tanh()) for _ in range(2))
            self.last = nn.Linear(IN, OUT)

        def forward(self, inputs: Tensor) -> Tensor:
            for block in self.blocks:
                inputs = checkpoint(block, inputs, use_reentrant=reentrant)
            return torch.as_tensor(self.last(inputs))

    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step in range(2):
            optimizer.zero_grad()
            net(noise(sync.rank, step, 8, IN).requires_grad_()).square().mean().backward()
            optimizer.step()

    assert compare(loop, make=lambda: filled(Blocks())) == {"blocks.0.0": 8, "blocks.1.0": 8, "last": 8}


def test_tied_to_an_embedding() -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        words = torch.randint(0, 11, (3,), generator=torch.Generator().manual_seed(sync.rank))
        net(words).square().mean().backward()

    assert compare(loop, make=lambda: filled(Tied())) == {"embedding": 0, "hidden": 3}


def test_frozen_and_unused_layers() -> None:
    def loop(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step in range(4):
            net[0].weight.requires_grad_(step != 1)
            optimizer.zero_grad()
            if step != 2 or sync.rank:
                loss(net, sync, step).backward()
            else:
                sync.exchange()
            optimizer.step()

    assert compare(loop) == {"0": 8, "2": 8}


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot"])
@pytest.mark.parametrize("name", LOOPS)
def test_ordinary_loops(name: str, exchange: str) -> None:
    found, expected = (ours(name, compressor=id, exchange=exchange) for id in ("factors", "none"))
    for mine, theirs in zip(found, expected, strict=True):
        finite = {key: value for key, value in theirs.items() if value.isfinite().all()}
        near({key: mine[key] for key in finite}, finite, {"autocast": 1e-2, "mixed_types": 1e-2}.get(name, 2e-6))


def test_layers_of_another_kind() -> None:
    """What looks like a linear layer need not be one."""

    class Odd(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).view(4, -1).sum(1)

    class Lookup(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.weight[inputs]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.lookup = Odd(IN, MIDDLE), Lookup(IN, MIDDLE)
            self.frozen = nn.Linear(IN, MIDDLE).requires_grad_(False)

        def forward(self, inputs: Tensor) -> Tensor:
            found = self.lookup(torch.tensor(3)).sum()
            return torch.as_tensor(found * self.odd(inputs).sum() + self.frozen(inputs).sum())

    def loop(net: Any, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step in range(2):
            optimizer.zero_grad()
            net(noise(sync.rank, step, 8, IN)).square().backward()
            optimizer.step()
            net.frozen.requires_grad_(True)

    assert compare(loop, make=lambda: filled(Net())) == {"odd": 0, "lookup": 0, "frozen": 8}


# -- types and values --------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        for step in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(net, sync, step)
            value.backward()

    assert compare(loop, tolerance=2.0**-8) == {"0": 8, "2": 8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(dtype: torch.dtype) -> None:
    def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any) -> None:
        net(noise(sync.rank, 0, 8, IN).to(dtype)).float().square().mean().backward()

    assert compare(loop, make=lambda: network().to(dtype), tolerance=2 * torch.finfo(dtype).eps) == {"0": 8, "2": 8}


def test_a_scaled_loss() -> None:
    for exponent in (3, 16):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)

        def loop(net: nn.Module, optimizer: torch.optim.Optimizer, sync: Any, scaler: Any = scaler) -> None:
            scaler.scale(loss(net, sync, 0)).backward()

        assert compare(loop, scaler=scaler) == {"0": 8, "2": 8}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "compressor", ["factors", {"rules": [{"name": "0.*", "compressor": "factors"}], "default": "topk"}]
)
def test_values_that_are_not_finite_reach_every_rank_and_no_residual(value: float, compressor: Any) -> None:
    def rank_main(transport: Any) -> None:
        net = network()
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor=compressor) as sync:
            plain(net, optimizer, sync)
            before = sync.stats()["residual_norm"]
            optimizer.zero_grad()
            inputs = noise(sync.rank, 9, 8, IN)
            inputs[3, 4] = value if sync.rank == 1 else 0.0
            net(inputs).square().mean().backward()
            assert not net[0].weight.grad.isfinite().all()
            stats = sync.stats()
            assert stats["residual_norm"] == before
            assert compressor == "factors" or stats["nonfinite_steps"] == 1
            assert stats["parameters"]["0.weight"]["rows"] == (0 if sync.rank == 1 else 8)

    run_ranks(2, rank_main)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_longer_than_it_is_needed() -> None:
    def rank_main(transport: Any) -> None:
        net = network()
        optimizer = sgd(net)
        with attach(net, optimizer, transport, compressor="factors") as sync:
            with torch.no_grad():
                evaluated = weakref.ref(inputs := noise(0, 0, 8, IN))
                net(inputs)
            del inputs
            value = net(inputs := noise(0, 1, 8, IN))
            held = weakref.ref(inputs.untyped_storage())
            del inputs, value  # no backward pass ever comes
            assert evaluated() is None
            assert held() is None
            value = net(inputs := noise(0, 2, 8, IN)).square().mean()
            held = weakref.ref(inputs.untyped_storage())
            del inputs
            assert held() is not None
            value.backward()
            assert held() is None
            with sync.no_sync():
                net(inputs := noise(0, 3, 8, IN)).square().mean().backward()
            held = weakref.ref(inputs.untyped_storage())
            del inputs
            assert held() is not None
        assert held() is None
        assert not net[0]._forward_hooks

    run_ranks(1, rank_main)


def test_checkpoints_keep_no_inputs() -> None:
    def rank_main(transport: Any) -> None:
        net = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
        seen: list[weakref.ref[Any]] = []
        net[0].register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output.untyped_storage())))
        with attach(net, sgd(net), transport, compressor="factors") as sync:
            value = checkpoint(net, noise(0, 1, 8, IN), use_reentrant=False).square().mean()
            gc.collect()
            assert seen[0]() is None
            value.backward()
            assert {row["rows"] for row in sync.stats()["parameters"].values()} == {8.0}

    run_ranks(1, rank_main)


# -- by itself ---------------------------------------------------------------------------------------------------------


def test_packets() -> None:
    product = Product(noise(0, 0, 4, 40), noise(0, 1, 4, 50))
    grad = product.errors.t() @ product.inputs
    packet = Factors().encode_product(grad, product)
    assert Packet.from_bytes(packet.to_bytes(), numel=2000) == packet
    torch.testing.assert_close(Factors().decompress(packet).view(40, 50), grad)
    part = product.cut(500, 1500)
    torch.testing.assert_close(Factors().decompress(Factors().encode_product(grad[10:30], part)), grad[10:30].flatten())
    assert Factors().encode_product(grad[:3], product.cut(0, 150)).kind == Kind.DENSE_F32
    assert Factors().stats(packet) == {"rows": 4.0, "density": (16 + 4 * 4 * 90) / 8000}
    with pytest.raises(PacketError):
        Factors().decompress(gradcomp.compressor("topk").compress(grad))
    with pytest.raises(TypeError, match="sends no factors"):
        gradcomp.compressor("topk").encode_product(grad, product)


def test_what_is_a_product() -> None:
    product = Product(noise(0, 0, 32, 200), noise(0, 1, 32, 300))
    grad = product.errors.t() @ product.inputs
    assert is_product(grad, product)
    assert is_product(grad.bfloat16(), product)
    for changed in (grad * 1.001, grad.clone().index_fill_(1, torch.tensor(7), 0.0), grad.flip(0)):
        assert not is_product(changed, product)
    for bad in (math.nan, math.inf):
        for broken in (product.errors, product.inputs, grad):
            spoiled = broken.clone()
            spoiled[2, 3] = bad
            given = [spoiled if tensor is broken else tensor for tensor in (*product, grad)]
            assert not is_product(given[2], Product(*given[:2]))
    zero = Product(torch.zeros(2, 20), torch.ones(2, 30))
    assert is_product(torch.zeros(20, 30), zero)
    assert not is_product(torch.full((20, 30), 1e-30), zero)


def test_nothing_is_watched_without_a_model() -> None:
    products = Products()
    products.watch([weight := nn.Parameter(torch.zeros(20, 30))])
    assert products.take(weight, torch.zeros(20, 30), 0, 600) is None


def test_wrong_use() -> None:
    net = network()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"compressor": "factors", "model": None}, r"factors.*group0\.0.*pass model="),
        ({"compressor": "factors", "exchange": "all_reduce"}, "factors.*is not linear"),
        ({"compressor": 'scheduled:stages=[[5,"factors"]]'}, "factors.*not allowed as a stage"),
        ({"compressor": 'scheduled:then="factors"'}, "factors.*not allowed as a stage"),
        ({"compressor": "warmup:compressor=factors"}, "must have a ratio or a density"),
        ({"compressor": "factors:rows=3"}, "unknown option 'rows'"),
    ]
    for options, text in cases:
        with pytest.raises(ConfigError, match=text):
            gradcomp.attach(sgd(net), **{"model": net, "transport": "inproc:rank=0,world_size=1"} | options)

    def rank_main(transport: Any) -> None:
        with attach(None, sgd(net := network()), transport, compressor="none") as sync:
            with pytest.raises(ConfigError, match="pass model="):
                sync.set_compressor("factors")
            with contextlib.suppress(ConfigError):
                sync.set_compressor("factors")
            loss(net, sync, 0).backward()

    run_ranks(2, rank_main)
