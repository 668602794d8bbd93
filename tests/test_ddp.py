"""The hook of DistributedDataParallel: the same training as DDP's own, compressed, whatever DDP does to its buckets."""

from __future__ import annotations

import pytest
from processes import run_script

SETUP = """
import copy, datetime
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import gradcomp
from gradcomp.integrations import ddp
import xxhash

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
DENSE = gradcomp.DenseRule(min_numel=0, min_dim=2)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.left, self.right = nn.Linear(16, 32), nn.Linear(16, 32)
        self.last = nn.Linear(32, 10)
        self.never = nn.Linear(8, 8)

    def forward(self, x, way="left"):
        x = self.norm(self.first(x)).relu().flatten(1)
        x = {"left": self.left, "right": self.right}[way](x) if way != "both" else self.left(x) + self.right(x)
        return self.last(x.relu())

def batch(step, rank=RANK):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.randint(0, 10, (8,), generator=generator)

def wrap(net=None, *, unused=False, cap_mb=0.002, **more):
    return DDP(net or Net(), bucket_cap_mb=cap_mb, find_unused_parameters=unused, **more)

def used(net):
    net.never.requires_grad_(False)
    return net

def step_of(model, optimizer, step, way="both", scale=1.0):
    x, y = batch(step)
    (nn.functional.cross_entropy(model(x, way), y) * scale).backward()

def train(model, steps, *, lr=0.05, ways=None, momentum=0.9):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for step in range(steps):
        optimizer.zero_grad()
        step_of(model, optimizer, step, ways[step % len(ways)] if ways else "both")
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def bits(tensor):
    return xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes())

def close(a, b, rtol=1e-4):
    return float((a - b).norm() / b.norm()) < rtol
"""
DONE = "\ndist.barrier()\ndist.destroy_process_group()\n"


@pytest.mark.parametrize("transport", [None, "zmq"])
def test_none_trains_as_ddp_does(transport: str | None) -> None:
    found = run_script(
        SETUP
        + """
plain = train(wrap(used(Net())), 100)
model = wrap(used(Net()))
with ddp.register(model, "none", OPTIONS["transport"]) as sync:
    ours = train(model, 100)
    say(close=close(ours, plain), bits=bits(ours), steps=sync.stats()["steps"])
for more in ({"static_graph": True}, {"gradient_as_bucket_view": True}, {"cap_mb": 25}):
    model = wrap(used(Net()), **more)
    with ddp.register(model, "none", OPTIONS["transport"] and f"zmq:run={more}"):
        say(close=close(train(model, 20), train(wrap(used(Net()), **more), 20)))
"""
        + DONE,
        4,
        options={"transport": transport},
    )
    assert all(line["close"] for rank in found for line in rank), found
    assert {rank[0]["bits"] for rank in found} == {found[0][0]["bits"]}
    assert found[0][0]["steps"] == 100


def test_every_compressor_keeps_replicas_identical_whatever_the_buckets() -> None:
    """Packets and residuals go by parameter: DDP's buckets, rebuilt after the first step or not, change no bit."""
    found = run_script(
        SETUP
        + """
for number, spec in enumerate(gradcomp.available_compressors()):
    said = []
    for cap_mb, view in ((0.002, False), (25, True)):
        model = wrap(used(Net()), cap_mb=cap_mb, gradient_as_bucket_view=view)
        with ddp.register(model, spec, dense=DENSE, digest_every=1, bucket_bytes=4096) as sync:
            said.append(bits(train(model, 4)))
            state = sync.state_dict()
    say(spec=spec, bits=said, names=sorted(state["states"]))
"""
        + DONE,
        2,
    )
    for ours, theirs in zip(*found, strict=True):
        assert ours["bits"] == theirs["bits"]
        if ours["spec"] != "powersgd":  # a matrix product's last bit depends on where in memory the matrix begins
            assert len(set(ours["bits"])) == 1, f"{ours['spec']}: the result depends on DDP's buckets"
    names = {line["spec"]: line["names"] for line in found[0]}
    assert names["threshold"] == ["first.weight", "last.weight", "left.weight", "right.weight"]


def test_unused_parameters_accumulation_and_loss_scales() -> None:
    found = run_script(
        SETUP
        + """
ways = [["left", "right"], ["right", "right"]][RANK % 2]

def pair(spec="none", **more):
    plain, model = wrap(**more), wrap(**more)
    return plain, model, ddp.register(model, spec, dense=DENSE)

plain, model, sync = pair(unused=True)
a, b = train(plain, 10, ways=ways), train(model, 10, ways=ways)
same_none = [(p.grad is None) == (q.grad is None) for p, q in zip(plain.parameters(), model.parameters())]
say(what="unused", good=close(b, a) and all(same_none) and model.module.never.weight.grad is None)
sync.close()

plain, model, sync = pair(net=None, unused=True)
results = []
for m, no_sync in ((plain, plain.no_sync), (model, model.no_sync), (model, sync.no_sync)):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m.load_state_dict(Net().state_dict() if m is None else {"module." + k: v for k, v in Net().state_dict().items()})
    for step in range(4):
        optimizer.zero_grad()
        with no_sync():
            step_of(m, optimizer, 10 * step)
            step_of(m, optimizer, 10 * step + 1)
        step_of(m, optimizer, 10 * step + 2)
        optimizer.step()
    results.append(torch.cat([p.detach().flatten() for p in m.parameters()]))
say(what="accumulation", good=close(results[1], results[0]) and close(results[2], results[0]))
sync.close()

outcome = {}
for scale in (1.0, 1024.0):
    model = wrap(used(Net()))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    with ddp.register(model, "topk:ratio=0.1", dense=DENSE, scaler=scaler) as sync:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            x, y = batch(step)
            scaler.scale(nn.functional.cross_entropy(model(x, "both"), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        before = sync.stats()["residual_norm"]
        x, y = batch(7)
        loss = nn.functional.cross_entropy(model(x * (float("inf") if RANK == 1 else 1.0), "both"), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        outcome[scale] = torch.cat([p.detach().flatten() for p in model.parameters()])
        say(what="inf", good=sync.stats()["residual_norm"] == before and scaler.get_scale() == scale / 2)
say(what="scale", good=close(outcome[1024.0], outcome[1.0], 1e-6))
"""
        + DONE,
        2,
    )
    for rank in found:
        assert [line["what"] for line in rank] == ["unused", "accumulation", "inf", "inf", "scale"]
        assert all(line["good"] for line in rank), rank


def test_a_checkpoint_resumes_bit_for_bit_into_other_buckets() -> None:
    found = run_script(
        SETUP
        + """
def run(model, sync, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        step_of(model, optimizer, step)
        optimizer.step()
    return bits(torch.cat([p.detach().flatten() for p in model.parameters()]))

model = wrap(used(Net()))
optimizer = torch.optim.Adam(model.parameters())
with ddp.register(model, "threshold:density=0.01", dense=DENSE) as sync:
    run(model, sync, optimizer, range(5))
    saved = [copy.deepcopy(one.state_dict()) for one in (model, optimizer, sync)]
    whole = run(model, sync, optimizer, range(5, 10))
again = wrap(used(Net()), cap_mb=25)
optimizer = torch.optim.Adam(again.parameters())
with ddp.register(again, "threshold:density=0.01", dense=DENSE) as sync:
    for one, state in zip((again, optimizer, sync), saved):
        one.load_state_dict(state)
    say(good=run(again, sync, optimizer, range(5, 10)) == whole)
"""
        + DONE,
        2,
    )
    assert found == [[{"good": True}], [{"good": True}]]


def test_wrong_use_is_explained() -> None:
    found = run_script(
        SETUP
        + """
def failure(call):
    try:
        call()
    except gradcomp.GradcompError as error:
        return [type(error).__name__, getattr(error, "field", ""), str(error)]
    return ["nothing"]

model = wrap(used(Net()))
with ddp.register(model, "none"):
    say(twice=failure(lambda: ddp.register(model, "none")))
say(closed=failure(lambda: step_of(model, None, 0)))
say(plain=failure(lambda: ddp.register(Net(), "none")))
say(differ=failure(lambda: ddp.register(wrap(used(Net())), ["threshold", "onebit"][RANK])))
say(option=failure(lambda: ddp.register(wrap(used(Net())), "threshold:tau=-1")))
say(world=failure(lambda: ddp.register(wrap(used(Net())), "none", gradcomp.transport("zmq:rank=0,world_size=1"))))
state = ddp.HookState(wrap(used(Net())), "threshold")
say(frozen=failure(lambda: state.sync.set_parameters([("p", torch.zeros(3, requires_grad=True))])))
state.sync.close()
"""
        + DONE,
        2,
    )
    for rank in found:
        said = {key: value for line in rank for key, value in line.items()}
        assert said["twice"][0] == "ConfigError"
        assert "hook already" in said["twice"][2]
        assert said["closed"][0] == "TransportError"
        assert said["plain"][0] == "ConfigError"
        assert "gradcomp.attach" in said["plain"][2]
        assert said["differ"][:2] == ["HandshakeError", "compressor"]
        assert said["option"][0] == "ConfigError"
        assert "tau" in said["option"][2]
        assert said["world"][0] == "ConfigError"
        assert said["frozen"][0] == "ConfigError"


@pytest.mark.parametrize(("transport", "how"), [(None, "kill"), ("zmq", "kill"), (None, "exit")])
def test_a_rank_that_dies_inside_backward_fails_the_others(transport: str | None, how: str) -> None:
    found = run_script(
        SETUP
        + """
import signal, time
model = wrap(used(Net()))
sync = ddp.register(model, "threshold", OPTIONS["transport"], dense=DENSE)
train(model, 3)
x, y = batch(0)
hidden = model(x, "both")
if RANK == 1:
    die = {"kill": lambda _: os.kill(os.getpid(), signal.SIGKILL), "exit": lambda _: sys.exit(3)}
    hidden.register_hook(die[OPTIONS["how"]])
try:
    nn.functional.cross_entropy(hidden, y).backward()
    say(error="none")
except gradcomp.GradcompError as error:
    say(error=type(error).__name__, peer=getattr(error, "peer", None))
sys.stdout.flush()
os._exit(0)
""",
        3,
        options={"transport": transport, "how": how},
        may_die=[1],
    )
    for rank in (0, 2):
        (line,) = found[rank]
        assert line["error"] == "PeerLost"
        assert line["peer"] != rank  # rank 1, or another that left because of it


@pytest.mark.gpu
@pytest.mark.parametrize("transport", [None, "zmq"])
def test_gradients_on_a_gpu(transport: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on one device, DDP over Gloo: the packets are made on the GPU, the replicas are identical."""
    monkeypatch.setenv("GRADCOMP_TEST_PROCESSES", "fresh")  # CUDA is not to be had after a fork
    found = run_script(
        SETUP
        + """
inputs = batch
batch = lambda step: [part.cuda() for part in inputs(step)]
plain = train(wrap(used(Net()).cuda()), 20)
for spec in ("none", "threshold", "onebit", "powersgd"):
    model = wrap(used(Net()).cuda())
    with ddp.register(model, spec, OPTIONS["transport"] and f"zmq:run={spec}", dense=DENSE, digest_every=1):
        ours = train(model, 20)
    say(spec=spec, bits=bits(ours.cpu()), close=close(ours, plain))
"""
        + DONE,
        2,
        options={"transport": transport},
    )
    assert found[0] == [line | {"close": found[0][i]["close"]} for i, line in enumerate(found[1])]
    assert found[0][0]["close"]
