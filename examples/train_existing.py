"""An ordinary training script that learned to train on several machines: the lines marked with + are all that is new.

    python examples/train_existing.py                                              by itself
    torchrun --standalone --nproc-per-node 4 examples/train_existing.py            four processes here
    torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_existing.py   on each of two hosts

Over several hosts the transport must be allowed to leave loopback: transport="zmq:insecure=true" (see README.md).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradcomp  # +


def main() -> None:
    torch.manual_seed(0)
    found = load_digits()
    order = torch.randperm(len(found.target))
    images, digits = torch.tensor(found.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(found.target)[order]
    test_images, test_digits = images[1400:], digits[1400:]
    images, digits = images[:1400], digits[:1400]

    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    sync = gradcomp.attach(optimizer, model=model, compressor="threshold:density=0.01")  # + exchanges gradients
    images, digits = (part[sync.rank :: sync.world_size][: 1400 // sync.world_size] for part in (images, digits))  # +

    for epoch in range(15):
        for rows in torch.randperm(len(images)).split(35):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), digits[rows])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_digits).float().mean().item()
        print(f"epoch {epoch + 1}  loss {loss.item():.3f}  accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
