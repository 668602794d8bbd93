"""An ordinary script for DistributedDataParallel and torchrun; the two lines marked with + compress its gradients.

    torchrun --standalone --nproc-per-node 4 examples/ddp_hook.py
    torchrun --standalone --nproc-per-node 4 examples/ddp_hook.py --compressor powersgd:rank=2 --seed 1

The packets go over DDP's own process group, here Gloo; with ``--transport zmq`` over ZeroMQ beside it.
"""

import argparse
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradcomp  # +
from gradcomp.examples.tasks.digits import lenet, load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--compressor", default="threshold:density=0.01")
    parser.add_argument("--transport", help="default: DDP's process group")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(lenet())
    sync = gradcomp.integrations.ddp.register(model, options.compressor, options.transport)  # +

    train, (test_images, test_digits) = load_digits()
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
        TensorDataset(*train), seed=options.seed, drop_last=True
    )
    loader = DataLoader(TensorDataset(*train), batch_size=16, sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for images, digits in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), digits)
            loss.backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        right = model.module(test_images).argmax(1) == test_digits
    if dist.get_rank() == 0:
        stats = sync.stats()
        result = {"compressor": options.compressor, "seed": options.seed, "steps": stats["steps"]}
        result |= {"accuracy": round(100 * right.float().mean().item(), 2), "ratio": round(stats["ratio"], 1)}
        print(json.dumps(result))
    sync.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
