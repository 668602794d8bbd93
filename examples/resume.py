"""Training that goes on after an interruption, with as many workers or others: lines marked with + are for that.

    torchrun --standalone --nproc-per-node 4 examples/resume.py checkpoints --epochs 4      trains, saves every epoch
    torchrun --standalone --nproc-per-node 4 examples/resume.py checkpoints --epochs 8      goes on, bit for bit
    torchrun --standalone --nproc-per-node 2 examples/resume.py checkpoints --epochs 12     goes on with two workers
    torchrun --standalone --nproc-per-node 3 examples/resume.py checkpoints --epochs 16     and with three

Interrupt it where you like: it goes on after the last epoch that was saved. Over several hosts the folder must be one
that all of them see, and the transport must be allowed to leave loopback (see README.md).
"""

import argparse
import hashlib

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradcomp


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on digits; go on where the last run ended.")
    parser.add_argument("folder", help="where checkpoints are")
    parser.add_argument("--epochs", type=int, default=4, help="in all, those of earlier runs included")
    options = parser.parse_args()

    torch.manual_seed(0)
    found = load_digits()
    order = torch.randperm(len(found.target))
    images, digits = torch.tensor(found.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(found.target)[order]
    test_images, test_digits = images[1400:], digits[1400:]
    images, digits = images[:1400], digits[:1400]

    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    sync = gradcomp.attach(optimizer, model=model, compressor="threshold:density=0.01")
    images, digits = (part[sync.rank :: sync.world_size][: 1400 // sync.world_size] for part in (images, digits))

    epochs_done = 0
    loaded = gradcomp.load_checkpoint(options.folder, sync, model=model, optimizer=optimizer)  # + None at first
    if loaded is not None:  # +
        epochs_done = loaded.extra["epochs_done"]  # + what we gave to save_checkpoint below
        scheduler.load_state_dict(loaded.extra["scheduler"])  # +
        if sync.rank == 0 and loaded.same_ranks:
            # Weights, residuals, thresholds and random numbers are what they were: as if nothing had happened.
            print(f"resumed bit for bit after epoch {epochs_done}  weights {digest(model)}", flush=True)
        elif sync.rank == 0:
            # Residuals were dealt out anew, their sum is what it was. Shards of data and random numbers are others.
            print(
                f"resumed after epoch {epochs_done} with {sync.world_size} workers in place of {loaded.world_size}  "
                f"weights {digest(model)}",
                flush=True,
            )

    for epoch in range(epochs_done, options.epochs):
        for rows in torch.randperm(len(images)).split(35):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[rows]), digits[rows])
            loss.backward()
            optimizer.step()
        scheduler.step()
        extra = {"epochs_done": epoch + 1, "scheduler": scheduler.state_dict()}  # + whatever else must come back
        gradcomp.save_checkpoint(options.folder, sync, model=model, optimizer=optimizer, extra=extra)  # + on all ranks
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_digits).float().mean().item()
        if sync.rank == 0:
            print(f"epoch {epoch + 1}  accuracy {100 * accuracy:.1f} %  weights {digest(model)}", flush=True)
    sync.close()


def digest(model: nn.Module) -> str:
    """The same eight characters only for the same bits."""
    parts = [parameter.detach().numpy().tobytes() for parameter in model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


if __name__ == "__main__":
    main()
