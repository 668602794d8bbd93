"""Rules: which parameter goes through which compressor, wherever a compressor can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import attach, outcomes, parameters_of, run_ranks, small_net, train_step

import gradcomp
from gradcomp import Rule, Rules
from gradcomp.bucket import DenseRule, tensor_table
from gradcomp.errors import ConfigError
from gradcomp.integrations.worker import RunOptions
from gradcomp.rules import choose

NAMED = [
    ("body.conv1.weight", torch.zeros(64, 3, 3, 3)),
    ("body.conv1.bias", torch.zeros(64)),
    ("body.norm.weight", torch.zeros(64)),
    ("head.weight", torch.zeros(1000, 64)),
    ("head.bias", torch.zeros(1000)),
    ("scale", torch.zeros(())),
]


def chosen(choice: Any, dense: Any = None) -> dict[str, str]:
    table = tensor_table(NAMED, choose(choice), dense or DenseRule())
    return {row.name: row.codec.id for row in table}


def test_the_first_rule_that_matches_decides() -> None:
    rules = Rules(
        [
            Rule(name="*.conv*.weight", compressor="topk"),
            Rule(name="body.*", max_dim=1, compressor="fp16"),
            Rule(min_numel=1000, max_numel=64_000, compressor="threshold"),
            Rule(max_numel=64_000, min_dim=1, compressor="bf16"),
        ],
        default="onebit",
    )
    assert chosen(rules) == {
        "body.conv1.weight": "topk",
        "body.conv1.bias": "fp16",
        "body.norm.weight": "fp16",
        "head.weight": "threshold",
        "head.bias": "threshold",  # a rule beats the dense rule
        "scale": "none",  # the default does not
    }


def test_the_dense_rule_has_its_say_on_the_default_only() -> None:
    everything = Rules([Rule(compressor="onebit")], default="topk")
    assert set(chosen(everything).values()) == {"onebit"}
    nothing = Rules(default="topk")
    assert chosen(nothing) == chosen("topk")
    assert chosen(nothing, lambda name, tensor: name.startswith("head"))["head.weight"] == "none"


def test_configs_round_trip_through_json() -> None:
    rules = Rules([Rule(name="a.[0-9]", min_dim=2, max_dim=4, compressor="topk:k=3"), {"compressor": "fp16"}], "onebit")
    config = json.loads(json.dumps(rules.config()))
    assert choose(config) == rules
    assert hash(choose(config)) == hash(rules)
    assert config["rules"][0]["compressor"]["k"] == 3
    assert choose(rules) is rules
    assert choose("topk") == gradcomp.compressor("topk")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rules": {}}, "rules={}"),
        ({"rules": [3]}, "rule 0 is 3"),
        ({"rules": [{"name": "x"}]}, "rule 0 names no compressor"),
        ({"rules": [{"compressor": "none"}, {"compressor": "none", "size": 3}]}, "rule 1: unknown option 'size'"),
        ({"rules": [{"compressor": "zip"}]}, "unknown compressor 'zip'"),
        ({"rules": [{"compressor": "none", "name": ""}]}, "name=''"),
        ({"rules": [{"compressor": "none", "min_numel": -1}]}, "min_numel=-1"),
        ({"rules": [{"compressor": "none", "min_dim": 3, "max_dim": 2}]}, "max_dim=2"),
        ({"rules": [], "else": "none"}, "unknown option 'else'"),
        ({"rules": [], "default": "zip"}, "unknown compressor 'zip'"),
    ],
)
def test_bad_rules_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(config)


def test_rules_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    config = {"rules": [{"name": "0.*", "compressor": "onebit"}], "default": "topk:ratio=0.1"}
    path.write_text(json.dumps(config))
    assert choose(f"@{path}") == choose(config)
    for text, words in (("{", "rules.json"), ("[]", "holds a list"), ('{"name": 1}', "'id'")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            choose(f"@{path}")
    with pytest.raises(ConfigError, match="gone"):
        choose(f"@{tmp_path}/gone.json")


def test_workers_check_the_file_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def task(): ...\n")
    options = RunOptions(task=str(tmp_path / "task.py"), compressor=f"@{tmp_path}/rules.json")
    with pytest.raises(ConfigError, match="rules file"):
        options.check()
    (tmp_path / "rules.json").write_text('{"rules": []}')
    options.check()
    assert f"--compressor=@{tmp_path}/rules.json" in options.to_arguments()


def test_a_rule_for_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        rules = Rules([Rule(name="0.weight", compressor="topk"), Rule(name="layer4.*", compressor="onebit")])
        attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport, compressor=rules).close()

    run_ranks(1, rank_main)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "rule 1 matches no parameter" in record.getMessage()
    assert "layer4.*" in record.getMessage()


@pytest.mark.parametrize("exchange", ["all_gather", "two_shot", "tree"])
def test_training_by_rules_keeps_replicas_identical(exchange: str) -> None:
    rules = Rules([Rule(name="0.weight", compressor="onebit:block=8"), Rule(name="4.*", compressor="dgc:ratio=0.1")])

    def rank_main(transport: Any) -> list[torch.Tensor]:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with attach(net, optimizer, transport, compressor=rules, exchange=exchange, digest_every=1) as sync:
            for step in range(5):
                train_step(net, optimizer, sync.rank, step)
            stats = sync.stats()
            assert set(stats["parameters"]) == {"0.weight", "4.weight", "4.bias"}
            assert stats["compressors"]["0.weight"] == "onebit:block=8"
            assert stats["compressors"]["4.bias"] == "dgc:ratio=0.1"
            assert stats["compressors"]["6.weight"] == "none"
            state = sync.state_dict()
            sync.load_state_dict(state)
            with pytest.raises(gradcomp.StateError, match="compressor"):
                sync.load_state_dict(state | {"compressor": "{}"})
        return parameters_of(net)

    first, *others = run_ranks(3, rank_main)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_ranks_with_other_rules_are_refused() -> None:
    def rank_main(transport: Any) -> None:
        net = small_net()
        rules = [Rule(name=f"{i}.*", compressor="topk") for i in range(100)]
        if transport.rank == 1:
            rules[70] = Rule(name="70.*", compressor="topk:ratio=0.5")
        attach(net, torch.optim.SGD(net.parameters(), lr=1.0), transport, compressor=Rules(rules))

    for error in outcomes(2, rank_main):
        assert isinstance(error, gradcomp.HandshakeError)
        assert error.field == "compressor"
        assert "0.001" in str(error)
        assert "0.5" in str(error)
        assert len(str(error)) < 1000
