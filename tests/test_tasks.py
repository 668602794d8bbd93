"""Tasks: found, given their options, and cut into batches."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradcomp.errors import ConfigError
from gradcomp.integrations.tasks import Task, TaskFunction, evaluation_batches, load, train_batches
from gradcomp.integrations.trainer import Trainer

EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"


def make_task(**changes: Any) -> Task:
    model = nn.Linear(3, 2)
    data = (torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    fields = {
        "model": model,
        "loss": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_data": data,
        "test_data": data,
        "batch_size": 2,
        "epochs": 1,
    }
    return Task(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model must be a torch Module; got int"),
        ({"optimizer": None}, "optimizer must be a torch Optimizer; got NoneType"),
        ({"loss": "cross_entropy"}, "loss must be callable; got str"),
        ({"batch_size": 0}, "batch_size=0 is not allowed; batch_size must be an integer >= 1"),
        ({"epochs": 1.5}, "epochs=1.5 is not allowed"),
        ({"train_data": [1, 2]}, "train_data must be a Dataset with a length or a pair of tensors; got list"),
        ({"train_data": (torch.zeros(2), torch.zeros(3))}, "train_data has 2 inputs and 3 targets"),
        ({"test_data": (torch.zeros(0), torch.zeros(0))}, "test_data is empty"),
        ({"test_data": (torch.zeros(1),)}, "test_data must be a Dataset or a pair of tensors"),
    ],
)
def test_a_task_names_the_field_that_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make_task(**changes)


# -- finding the function ----------------------------------------------------------------------------------------------


def test_a_task_is_a_file_or_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_task_module.py").write_text("def task(*, width: int = 4): ...\n")
    assert load(str(tmp_path / "some_task_module.py")).parse(["width=8"]) == {"width": 8}
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("some_task_module").parse([]) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file"),
        ("x = 1\n", r"must define a function task\(\)"),
        ("task = 3\n", r"must define a function task\(\)"),
        ("def task(:\n", "does not import: SyntaxError"),
        ("1 / 0\n", r"does not import: ZeroDivisionError: division by zero \(bad.py, line 1\)"),
        ("import no_such_thing\n", "No module named 'no_such_thing'; is it installed?"),
    ],
)
def test_a_file_without_a_task_is_refused(tmp_path: Path, source: str | None, message: str) -> None:
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"neither a file ending in \.py nor a module"):
        load("no.such_module")


def test_the_function_must_return_a_task() -> None:
    with pytest.raises(ConfigError, match=r"task\(\) must return a Task; got int"):
        TaskFunction("here", lambda: 3).build()


def test_epochs_and_batch_size_replace_the_tasks_own_and_reach_its_function() -> None:
    seen = []

    def task(*, epochs: int = 5) -> Task:
        seen.append(epochs)
        return make_task(epochs=epochs)

    built = TaskFunction("here", task).build(epochs=7, batch_size=4)
    assert (built.epochs, built.batch_size, seen) == (7, 4, [7])


# -- options -----------------------------------------------------------------------------------------------------------


def options(
    *,
    lr: float = 0.1,
    width: int = 4,
    bias: bool = True,
    name: str = "a",
    kind: Literal["small", "large"] = "small",
    limit: int | None = None,
    sizes: list[int] = [],  # noqa: B006
) -> Task:
    return make_task()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr=1e-3", 1e-3),
        ("lr=1", 1.0),
        ("width=8", 8),
        ("bias=false", False),
        ("name=word", "word"),
        ("name=8", "8"),
        ("name=a=b", "a=b"),
        ("kind=large", "large"),
        ("limit=null", None),
        ("limit=100", 100),
        ("sizes=[1,2]", [1, 2]),
    ],
)
def test_settings_follow_the_annotation(setting: str, value: object) -> None:
    parsed = TaskFunction("here", options).parse([setting])
    assert list(parsed.values()) == [value]
    assert type(next(iter(parsed.values()))) is type(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr"], "'lr' is not key=value"),
        (["rate=1"], "unknown option 'rate'; it has lr, width, bias, name, kind, limit, sizes"),
        (["lr=1", "lr=2"], "'lr' is given twice"),
        (["lr=fast"], "lr=fast is not allowed; it must be float"),
        (["width=1.5"], "width=1.5 is not allowed; it must be int"),
        (["width=true"], "width=true is not allowed; it must be int"),
        (["bias=1"], "bias=1 is not allowed; it must be bool"),
        (["kind=huge"], "kind=huge is not allowed; it must be one of small, large"),
        (["limit=all"], "limit=all is not allowed; it must be int"),
    ],
)
def test_bad_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskFunction("here", options).parse(settings)


def test_a_setting_without_a_default_is_asked_for() -> None:
    def task(*, folder: str) -> Task:
        return make_task()

    with pytest.raises(ConfigError, match=r"needs --set folder=\.\.\."):
        TaskFunction("here", task).parse([])


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize(("samples", "world_size", "batch_size"), [(50, 4, 3), (12, 3, 4), (7, 1, 2)])
def test_ranks_take_disjoint_shares_in_equally_many_steps(
    as_dataset: bool, samples: int, world_size: int, batch_size: int
) -> None:
    pair = (torch.arange(samples), torch.arange(samples))
    data = TensorDataset(*pair) if as_dataset else pair
    seen = []
    for rank in range(world_size):
        batches = list(train_batches(data, batch_size=batch_size, rank=rank, world_size=world_size, seed=1, epoch=2))
        assert [len(inputs) for inputs, _ in batches] == [batch_size] * (samples // world_size // batch_size)
        assert all(torch.equal(inputs, targets) for inputs, targets in batches)
        seen += [int(i) for inputs, _ in batches for i in inputs]
    assert len(seen) == len(set(seen))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    data = (torch.arange(32), torch.arange(32))

    def order(seed: int, epoch: int) -> list[int]:
        batches = train_batches(data, batch_size=4, rank=0, world_size=2, seed=seed, epoch=epoch)
        return [int(i) for inputs, _ in batches for i in inputs]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(5, 1)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_every_test_sample_is_evaluated_once(as_dataset: bool) -> None:
    pair = (torch.arange(11), torch.arange(11))
    data = TensorDataset(*pair) if as_dataset else pair
    seen = [
        int(i)
        for rank in range(3)
        for inputs, _ in evaluation_batches(data, batch_size=2, rank=rank, world_size=3)
        for i in inputs
    ]
    assert sorted(seen) == list(range(11))


# -- the examples ------------------------------------------------------------------------------------------------------


def test_digits_is_split_the_same_way_every_time() -> None:
    pytest.importorskip("sklearn")
    function = load(str(EXAMPLES / "digits.py"))
    torch.manual_seed(1)
    first = function.build()
    torch.manual_seed(2)
    second = function.build(["lr=0.01"])
    assert isinstance(first.train_data, tuple)
    assert isinstance(second.train_data, tuple)
    assert torch.equal(first.train_data[0], second.train_data[0])
    assert len(first.train_data[0]) == 1400
    assert first.model(first.train_data[0][:2]).shape == (2, 10)


def import_cifar10() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10_example", EXAMPLES / "cifar10.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_cifar10(folder: Path, records: int = 3) -> None:
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = generator.integers(0, 256, (records, 3073), dtype=np.uint8)
        rows[:, 0] = generator.integers(0, 10, records)
        rows.tofile(folder / name)


@pytest.mark.parametrize(("network", "parameters"), [("vgg11", 9_228_362), ("alexnet", 7_041_610)])
def test_cifar10_reads_the_binary_layout(tmp_path: Path, network: str, parameters: int) -> None:
    write_cifar10(tmp_path)
    task = load(str(EXAMPLES / "cifar10.py")).build([f"folder={tmp_path}", f"network={network}"], epochs=2)
    assert isinstance(task.train_data, tuple)
    images, labels = task.train_data
    assert images.shape == (15, 3, 32, 32)
    assert images.dtype == torch.uint8
    raw = np.fromfile(tmp_path / "data_batch_1.bin", dtype=np.uint8)
    assert labels[0] == raw[0]
    assert images[0, 1, 0, 0] == raw[1 + 1024]
    assert sum(p.numel() for p in task.model.parameters()) == parameters
    assert task.augment is not None
    assert task.model(task.augment(images[:2])).shape == (2, 10)


def test_cifar10_can_be_limited(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    images, labels = import_cifar10().read_records(tmp_path, ("data_batch_1.bin", "data_batch_2.bin"), 4)
    assert len(images) == len(labels) == 4


def rates_of_steps(task: Task, steps: int) -> list[list[float]]:
    """Train: the learning rates, one a parameter group, that each step was taken with."""
    trainer = Trainer(task, torch.device("cpu"))
    assert isinstance(task.train_data, tuple)
    images, labels = task.train_data
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in task.optimizer.param_groups])
        trainer.step(images[:4], labels[:4])
    return rates


def test_cifar10_can_anneal_by_steps(tmp_path: Path) -> None:
    write_cifar10(tmp_path, records=8)
    function = load(str(EXAMPLES / "cifar10.py"))
    settings = [f"folder={tmp_path}", "network=resnet20", "lr=0.2"]
    by_epochs = function.build(settings)
    assert by_epochs.step_scheduler is None
    assert by_epochs.scheduler is not None
    task = function.build([*settings, "steps=4"])
    assert task.scheduler is None
    cosine = [0.1 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert [rate for (rate,) in rates_of_steps(task, 5)] == pytest.approx(cosine, abs=1e-9)
    with pytest.raises(ConfigError, match="cifar10: steps=0 is not allowed; steps must be an integer >= 1"):
        function.build([*settings, "steps=0"])


def test_crop_and_flip_moves_whole_images() -> None:
    image = torch.arange(3 * 32 * 32).remainder(200).to(torch.uint8).view(1, 3, 32, 32) + 1
    moved = import_cifar10().crop_and_flip(image.repeat(64, 1, 1, 1))
    padded = nn.functional.pad(image, (4, 4, 4, 4))[0]
    windows = {
        bytes(side[:, y : y + 32, x : x + 32].contiguous().numpy())
        for y in range(9)
        for x in range(9)
        for side in (padded, padded.flip(2))
    }
    found = {bytes(one.contiguous().numpy()) for one in moved}
    assert found <= windows
    assert len(found) > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "set folder= to the folder with data_batch_1.bin"),
        (b"", "0 bytes are not whole records of 3073 bytes"),
        (b"\0" * 3074, "3074 bytes are not whole records"),
        (b"\0" * 3073 + b"\x0a" + b"\0" * 3072, "record 1 has label 10; labels are 0 to 9"),
    ],
)
def test_cifar10_checks_its_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        import_cifar10().read_records(tmp_path, ("data_batch_1.bin",), None)
