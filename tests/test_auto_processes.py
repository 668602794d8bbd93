"""compressor="auto" between processes: over a link that is slow indeed, and behind DistributedDataParallel's hook."""

from __future__ import annotations

from ports import free_port
from processes import run_script

SCRIPT = """
import datetime
import gradcomp
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 10))

def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(RANK)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(4, 256, generator=generator), torch.randint(0, 10, (4,), generator=generator)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with gradcomp.attach(optimizer, model=model, compressor="auto", transport="zmq:rate=500kbit", digest_every=1) as sync:
    train(model, optimizer, 24)
    say(slow=sync.stats()["auto"])

import torch.distributed as dist
from gradcomp.integrations import ddp
os.environ["MASTER_PORT"] = str(OPTIONS["port"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
model = nn.parallel.DistributedDataParallel(net(), bucket_cap_mb=0.1)
sync = ddp.register(model, 'auto:candidates=["none","fp16","threshold"],trial=2', digest_every=1, bucket_bytes=1 << 19)
train(model, torch.optim.SGD(model.parameters(), lr=0.01), 60)
say(ddp=sync.stats()["auto"])
sync.close()
dist.destroy_process_group()
"""


def test_a_slow_link_and_ddp() -> None:
    first, second = run_script(SCRIPT, 2, options={"port": free_port()})
    assert first == second  # to the last digit
    slow, behind_ddp = first[0]["slow"], first[1]["ddp"]
    assert slow["choice"] == "threshold:density=0.001"
    assert slow["tried"]["none"]["step_ms"] is None  # a megabyte a step, at 500 kbit/s
    assert slow["link_mbit_per_s"] < 5
    assert behind_ddp["searches"] > 0
