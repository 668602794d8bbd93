"""Mixed precision, gradient accumulation, clipping and a schedule, as in many scripts; lines marked with + are new.

    python examples/amp_accumulate_clip.py                                              by itself
    torchrun --standalone --nproc-per-node 2 examples/amp_accumulate_clip.py            two processes here
    torchrun --standalone --nproc-per-node 2 examples/amp_accumulate_clip.py --epochs 1

On CUDA it computes in float16 under a GradScaler, on the CPU in bfloat16, which needs none.
"""

import argparse
import contextlib

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradcomp  # +

MICRO_BATCHES = 2  # a step


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--epochs", type=int, default=15)
    epochs = arguments.parse_args().epochs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    found = load_digits()
    order = torch.randperm(len(found.target))
    images, digits = torch.tensor(found.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(found.target)[order]
    images, digits = images.view(-1, 1, 8, 8).to(device), digits.to(device)
    test_images, test_digits = images[1400:], digits[1400:]
    images, digits = images[:1400], digits[:1400]

    convolution = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(convolution, head).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    # scaler: thresholds are in units of the gradient, whatever the scale. buffers: BatchNorm's, which would differ.
    spec = "threshold:density=0.02"  # +
    sync = gradcomp.attach(optimizer, model=model, compressor=spec, scaler=scaler, buffers="average")  # +
    images, digits = (part[sync.rank :: sync.world_size][: 1400 // sync.world_size] for part in (images, digits))  # +

    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(images)).split(70):
            optimizer.zero_grad()
            micro_batches = rows.chunk(MICRO_BATCHES)
            for number, micro in enumerate(micro_batches, start=1):
                last = number == len(micro_batches)
                with contextlib.nullcontext() if last else sync.no_sync():  # + only the last one exchanges, the sum
                    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
                        loss = nn.functional.cross_entropy(model(images[micro]), digits[micro]) / len(micro_batches)
                    scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the mean over ranks, the same on all of them
            scaler.step(optimizer)  # where one rank saw Inf, all of them skip
            scaler.update()
        schedule.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_digits).float().mean().item()
        print(f"epoch {epoch + 1}  loss {loss.item() * len(micro_batches):.3f}  accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
