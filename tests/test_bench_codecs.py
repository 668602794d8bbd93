"""``gradcomp bench codecs`` measures whatever is installed, and refuses what it cannot measure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import gradcomp
from gradcomp.bench import codecs, gradients, torch_hook
from gradcomp.bench.codec_tensors import Layout
from gradcomp.cli import main
from gradcomp.errors import ConfigError

QUICK = ["--sizes", "2000", "--repeats", "1"]

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradcomp import Compressor, Packet


@dataclass(frozen=True, kw_only=True)
class Nothing(Compressor):
    """Sends nothing at all."""

    id: ClassVar[str] = "nothing"

    def encode(self, grad, state=None):
        return Packet(kind=200, numel=grad.numel(), payload=torch.empty(0, dtype=torch.uint8))

    def decode_add(self, packet, out, scale):
        packet.require(200)

    def max_nbytes(self, numel):
        return 32
'''


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    assert main(["bench", "codecs", "--json", *QUICK, *arguments]) == 0
    return {row["compressor"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_every_compressor_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(capsys)
    assert set(rows) == set(gradcomp.available_compressors()) - {"auto"}  # it is one of the others
    for row in rows.values():
        assert row["encode_passes"] > 0
        assert row["decode_passes"] > 0
        assert row["ratio"] == pytest.approx(4 / row["bytes_per_element"])
    assert rows["none"]["relative_error"] == 0
    assert 0 < rows["bf16"]["relative_error"] < 0.01
    assert rows["none"]["bytes_per_element"] == 4 + 32 / 2000


def test_bits_of_an_index_are_at_least_the_entropy(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(capsys, "--compressor", "topk:ratio=0.05", "--compressor", "threshold:density=0.05")
    for row in rows.values():
        assert row["entropy_bits"] < row["index_bits"] < 2 * row["entropy_bits"]
    topk = rows["topk:ratio=0.05"]
    assert topk["entropy_bits"] == pytest.approx(math.log2(math.comb(2000, 100)) / 100)


def test_a_plugin_appears_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing_codec.py").write_text(PLUGIN)
    info = tmp_path / "nothing_codec-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nothing-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gradcomp.compressors]\nnothing = nothing_codec:Nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    gradcomp.registry._found.cache_clear()
    try:
        rows = measured(capsys)
    finally:
        gradcomp.registry._found.cache_clear()
    assert rows["nothing"]["relative_error"] == pytest.approx(1)


def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "codecs.png"
    assert main(["bench", "codecs", *QUICK, "--compressor", "fp16", "--png", str(picture)]) == 0
    head, row = capsys.readouterr().out.splitlines()[1:]
    assert head.split()[0] == "compressor"
    assert row.split()[:2] == ["fp16", "2,000"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(capsys, "--compressor", "topk:ratio=0.001", "--beside-torch")
    assert len(rows) == 4
    assert rows["torch.topk 0.1 %"]["relative_error"] == pytest.approx(rows["topk:ratio=0.001"]["relative_error"])
    for row in rows.values():
        assert 0 < row["relative_error"] < 1
        assert min(row["encode_passes"], row["decode_passes"]) > 0


def test_the_tensors_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        "tiny",
        "--repeats",
        "1",
        "--compressor",
        "powersgd:rank=2",
        "--compressor",
        "topk:ratio=0.01",
    ]
    assert main(["bench", "codecs", "--json", "--beside-torch", *arguments]) == 0
    rows = {row["compressor"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {row["model"] for row in rows.values()} == {"tiny"}
    matrices, biases = [(32, 3072), (64, 32), (10, 64)], 32 + 64 + 10
    assert all(row["numel"] == biases + sum(m * n for m, n in matrices) for row in rows.values())
    numel = rows["topk:ratio=0.01"]["numel"]
    # The last one has few elements, and goes as it is, too.
    factors, dense = sum(2 * (m + n) for m, n in matrices[:2]), 640 + biases
    nbytes = 4 * (factors + dense) + 2 * 16 + 6 * 32
    assert rows["powersgd:rank=2"]["bytes_per_element"] == pytest.approx(nbytes / numel)
    assert rows["topk:ratio=0.01"]["entropy_bits"] < rows["topk:ratio=0.01"]["index_bits"]
    hook = rows[torch_hook.NAME] if torch_hook.can_run(torch.device("cpu")) else rows["torch PowerSGD rank 2"]
    assert hook["ratio"] == pytest.approx(rows["powersgd:rank=2"]["ratio"], rel=0.1)
    assert all(0 < row["relative_error"] < 1 and row["encode_passes"] > 0 for row in rows.values())


def test_a_model_is_cut_as_an_exchange_would() -> None:
    layout = Layout.of_model("vgg16")
    assert layout.numel == 138_357_544
    assert len(layout.shapes) == 32
    assert layout.dense == 16 * (False, True)
    tiny = Layout.of_model("tiny")
    vector = torch.arange(float(tiny.numel))
    parts = tiny.cut(vector)
    assert [tuple(part.shape) for part in parts] == list(tiny.shapes)
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), vector)


def test_gradients_of_a_task_are_saved_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    saved = tmp_path / "digits.npy"
    task = str(Path(__file__).parent.parent / "examples" / "tasks" / "digits.py")
    measured(capsys, "--compressor", "onebit", "--task", task, "--save", str(saved))
    rows = gradients.load(str(saved))
    assert rows.dtype == torch.float32
    assert rows.shape[0] == gradients.STEPS
    assert not torch.equal(rows[0], rows[1])
    again = measured(capsys, "--compressor", "onebit", "--gradients", str(saved))
    assert 0 < again["onebit"]["relative_error"] < 1


def test_gradients_are_stretched() -> None:
    rows = torch.arange(6.0).view(2, 3)
    assert gradients.stretch(rows, 2).tolist() == [[0, 1], [3, 4]]
    assert gradients.stretch(rows, 7).tolist() == [[0, 1, 2, 0, -1, -2, 0], [3, 4, 5, -3, -4, -5, 3]]


def test_drawn_gradients_repeat() -> None:
    assert torch.equal(gradients.draw(10_000), gradients.draw(10_000))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        gradients.load(str(tmp_path / "none.npy"))
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="float64"):
        gradients.load(str(wrong))
    wrong.write_bytes(b"not an array")
    with pytest.raises(ConfigError, match="not a NumPy array"):
        gradients.load(str(wrong))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save", "x.npy"], "--task"),
        (["--repeats", "0"], "--repeats=0"),
        (["--model", "tiny"], "--model=tiny"),
        (["--compressor", "nope"], "nope"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        codecs.main([*QUICK, *arguments])


@pytest.mark.parametrize("sizes", ["", "a", "0", "1e3,inf"])
def test_bad_sizes(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        codecs.main(["--sizes", sizes])
    assert "--sizes" in capsys.readouterr().err
