"""The networks of the example tasks: their sizes with each nonlinearity, that signals get through, that they train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from ranks import run_ranks
from test_tasks_files import write_mnist, write_sentences
from torch import Tensor, nn

import gradcomp
from gradcomp.examples.tasks import digits, mnist, speech
from gradcomp.examples.tasks.activations import MODULES, Activation, learning_rate
from gradcomp.examples.tasks.cifar10_quick import cifar10_quick
from gradcomp.examples.tasks.image_networks import alexnet, resnet20, vgg11, vgg16
from gradcomp.examples.tasks.sentences import MAX_NORM, SentenceCNN
from gradcomp.examples.tasks.speech_deep import very_deep
from gradcomp.integrations.tasks import load, train_batches
from gradcomp.integrations.trainer import Trainer

EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def colours() -> Tensor:
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def noise(*sizes: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(8, *sizes, generator=torch.Generator().manual_seed(0))


def numbers() -> Tensor:
    return torch.randint(0, 18_766, (8, 56), generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[Activation], nn.Module], Callable[[], Tensor], int, int]] = {
    "digits": (digits.lenet, noise(1, 8, 8), 383_306, 10),
    "mnist": (mnist.lenet, noise(1, 28, 28), 431_080, 10),
    "alexnet": (alexnet, colours, 7_041_610, 10),
    "vgg11": (vgg11, colours, 9_228_362, 10),
    "vgg16": (vgg16, colours, 14_724_042, 10),
    "resnet20": (resnet20, colours, 269_722, 10),
    "cifar10_quick": (
        lambda activation: cifar10_quick(torch.full((3, 32, 32), 120.0), activation),
        colours,
        145_578,
        10,
    ),
    "speech": (speech.sainath_parada, noise(1, speech.BANDS, speech.FRAMES), 2_961_398, 10),
    "speech_deep": (lambda activation: very_deep(16, activation), noise(1, speech.BANDS, speech.FRAMES), 1_008_858, 10),
    "sentences": (lambda activation: SentenceCNN(18_765, activation), numbers, 5_990_702, 2),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_parameters(name: str, activation: Activation) -> None:
    make, inputs, parameters, classes = NETWORKS[name]
    torch.manual_seed(0)
    network = make(activation)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    for other, kind in MODULES.items():
        assert any(isinstance(module, kind) for module in network.modules()) == (other == activation)
    found = network(inputs()[:2])
    assert found.shape == (2, classes)
    nn.functional.cross_entropy(found, torch.arange(2) % classes).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("name", ["digits", "mnist", "alexnet", "cifar10_quick", "speech"])
def test_signals_get_through_without_batchnorm(name: str, activation: Activation) -> None:
    """What reaches the last layer differs between inputs: neither dead nor saturated, however many layers there are."""
    make, inputs, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = make(activation).eval()
    assert isinstance(network, nn.Sequential)
    found = network[:-1](inputs()).detach()
    between = float((found - found.mean(0)).std())
    assert 0.01 < between < 5  # of noise, which pooling averages away
    assert float(found.mean(0).abs().max()) < 5


def test_relu_keeps_the_weights_it_had() -> None:
    """Figures that were published for a seed go on holding."""
    torch.manual_seed(3)
    expected = [
        nn.Conv2d(1, 32, 5, padding=2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.Linear(1024, 320),
        nn.Linear(320, 10),
    ]
    torch.manual_seed(3)
    found = [layer for layer in digits.lenet() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(expected, found, strict=True))
    torch.manual_seed(3)
    drawn = speech.sainath_parada()
    torch.manual_seed(3)
    again = speech.sainath_parada()
    torch.manual_seed(3)
    for module in again.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    for parameter in again.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), again.parameters(), strict=True) if a.dim() > 1)


def test_sigmoids_get_smaller_steps_unless_told() -> None:
    assert [learning_rate(None, 0.2, activation) for activation in ACTIVATIONS] == [0.2, 0.05, 0.2]
    assert [learning_rate(0.3, 0.2, activation) for activation in ACTIVATIONS] == [0.3] * 3


def test_every_task_is_short_and_listed() -> None:
    files = {path.name: path.read_text() for path in EXAMPLES.glob("*.py") if "\ndef task(" in path.read_text()}
    assert len(files) == 7
    listed = (EXAMPLES / "README.md").read_text()
    for name, source in files.items():
        assert len(source.splitlines()) < 150
        assert f"[{name}]({name})" in listed
        assert f"gradcomp train examples/tasks/{name}" in listed
    for _, _, parameters, _ in NETWORKS.values():
        assert f"{parameters:,}" in listed


def test_cifar10_quick_is_filled_as_caffe_fills_it() -> None:
    torch.manual_seed(0)
    mean = torch.rand(3, 32, 32) * 255
    network = cifar10_quick(mean)
    layers = [layer for layer in network if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, deviation in zip(layers, (0.0001, 0.01, 0.01, 0.1, 0.1), strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.1)
        assert layer.bias is not None
        assert not layer.bias.any()
    order = [type(layer).__name__.removesuffix("2d") for layer in network]
    assert " ".join(order) == ("Normalise Conv MaxPool ReLU Conv ReLU AvgPool Conv ReLU AvgPool Flatten Linear Linear")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(network[0](images), images.float() - mean)


def test_padding_changes_nothing() -> None:
    """However long the other sentences of a batch are."""
    torch.manual_seed(0)
    network = SentenceCNN(50, "tanh").eval()
    with torch.no_grad():
        for window in network.windows:
            next(window.parameters()).mul_(100)
        network.windows[0].bias.fill_(0.3)  # type: ignore[operator, union-attr]
        sentences = torch.randint(1, 51, (4, 20))
        sentences[0, 3:] = sentences[1, 10:] = sentences[2, 19:] = 0
        together = network(sentences)
        alone = torch.cat([network(sentence[None]) for sentence in sentences])
        torch.testing.assert_close(alone, together)


def test_rows_are_never_longer_than_the_largest_norm() -> None:
    torch.manual_seed(0)
    network = SentenceCNN(50)
    weight = network.classes.weight.detach().clone()
    with torch.no_grad():
        network.classes.parametrizations.weight.original[0] *= 20  # type: ignore[union-attr, index]
    norms = network.classes.weight.detach().norm(dim=1)
    assert float(norms[0]) == pytest.approx(MAX_NORM)
    shortened = network.classes.weight.detach()
    assert torch.equal(shortened[1], weight[1])
    torch.testing.assert_close(shortened[0] / MAX_NORM, weight[0] / weight[0].norm())
    optimizer = torch.optim.SGD(network.parameters(), lr=30.0)
    for step in range(3):
        optimizer.zero_grad()
        sentences = torch.randint(1, 51, (8, 9), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(network(sentences), torch.arange(8) % 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert float(network.classes.weight.detach().norm(dim=1).max()) <= MAX_NORM * (1 + 1e-6)
    assert not network.vectors.weight[0].any(), "padding has a vector"


# -- training ----------------------------------------------------------------------------------------------------------


def train(name: str, settings: list[str], *, epochs: int, batch_size: int, compressor: str) -> list[float]:
    """Two ranks through the Trainer; the losses, which both must have alike."""
    function = load(f"gradcomp.examples.tasks.{name}")

    def rank_main(transport: object) -> list[float]:
        torch.manual_seed(0)
        task = function.build(settings, epochs=epochs, batch_size=batch_size)
        losses = []
        with gradcomp.attach(task.optimizer, model=task.model, compressor=compressor, transport=transport) as sync:
            trainer = Trainer(task, torch.device("cpu"))
            for epoch in range(epochs):
                for inputs, targets in train_batches(
                    task.train_data, batch_size=batch_size, rank=sync.rank, world_size=2, seed=0, epoch=epoch
                ):
                    losses.append(float(sync.average(torch.tensor(trainer.step(inputs, targets)))))
            sync.check_replicas()
        return losses

    first, second = run_ranks(2, rank_main)
    assert first == second
    return first


def test_sentences_train(tmp_path: Path) -> None:
    write_sentences(tmp_path)
    losses = train(
        "sentences", [f"data={tmp_path}", "lr=3e-3"], epochs=4, batch_size=9, compressor="threshold:density=0.01"
    )
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mnist_trains(tmp_path: Path, activation: Activation) -> None:
    write_mnist(tmp_path)
    settings = [f"data={tmp_path}", f"activation={activation}", "lr=0.04"]
    losses = train("mnist", settings, epochs=32, batch_size=6, compressor="threshold:density=0.02")
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
