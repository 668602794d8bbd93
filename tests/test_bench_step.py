"""``gradcomp bench step``: packets go to the rank itself over ZeroMQ, and a step is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import attach, parameters_of, run_ranks, small_net, train_step

from gradcomp.bench.networks import MODELS
from gradcomp.bench.step_alone import main
from gradcomp.bench.timeline import Timeline
from gradcomp.bench.to_itself import ToItself, ToItselfTransport
from gradcomp.errors import ConfigError

QUICK = ["--model", "tiny", "--batch", "4", "--rows", "2", "--in-a-row", "1", "--warm-up", "1", "--bucket-mb", "0.1"]


def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "step.png"
    assert main([*QUICK, "--json", "--profile", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    [row] = result["rows"]
    assert row["times_alone"] == pytest.approx(row["gradcomp_ms"] / row["alone_ms"], abs=0.01)
    assert row["packet_kib"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_packets_really_travel_and_are_applied() -> None:
    """A rank that exchanges with itself trains as one that is alone."""

    def trained(transport: object, **options: object) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with attach(net, optimizer, transport, compressor="topk:ratio=0.1", **options) as sync:
            for step in range(4):
                train_step(net, optimizer, 0, step)
            assert sync.stats()["bytes_received"] == (sync.stats()["bytes_sent"] if options else 0)
            assert (sync.stats()["bytes_sent"] > sync.stats()["packet_bytes"]) == bool(options)
        return parameters_of(net)

    [alone] = run_ranks(1, lambda transport: trained(transport))
    again = trained(ToItselfTransport(timeout_s=20.0), exchange=ToItself())
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize(("name", "parameters"), [("vgg16", 138_357_544), ("resnet50", 25_557_032)])
def test_the_networks_of_the_papers(name: str, parameters: int) -> None:
    with torch.device("meta"):
        net = MODELS[name]()
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.gpu
def test_streams_are_drawn(tmp_path: Path) -> None:
    timeline = Timeline(torch.device("cuda", 0))
    with timeline.recorded(), timeline.watch("work"):
        torch.ones(1 << 20, device="cuda").add_(1.0)
    assert any(span.row.startswith("CUDA stream") for span in timeline.spans)
    assert any(span.row == "training thread" for span in timeline.spans)
    assert all(-1.0 < span.start_ms <= span.stop_ms < 60_000 for span in timeline.spans)
    timeline.draw(str(tmp_path / "step.png"), "a step")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--batch", "0"], "--batch=0"), (["--profile", "x.png", *(2 * ["--compressor", "none"])], "2 compressors")],
)
def test_bad_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main([*QUICK, *arguments])
