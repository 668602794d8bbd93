"""Hessian-free training, L-BFGS and SVRG over several workers: the examples, as processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import zygote
from processes import run_script

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUN = "import runpy\nsys.argv = OPTIONS['argv']\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"


def run_by_torchrun(*arguments: str) -> list[dict[str, Any]]:
    """What an example prints, run by two processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = zygote.run(
        [sys.executable, *torchrun, str(EXAMPLES / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hessian_free_under_torchrun() -> None:
    lines = run_by_torchrun("hessian_free.py", "--steps", "6")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.3
    assert lines[-1]["accuracy"] > 93


def test_lbfgs_gives_the_same_bits_whoever_does_how_much() -> None:
    arguments = [str(EXAMPLES / "lbfgs.py"), "--steps", "4"]
    (even, _), (uneven, _) = (
        run_script(RUN, 2, options={"argv": [*arguments, *more]}) for more in ([], ["--slow", "1"])
    )
    assert even[-2]["accuracy"] > 88
    assert even[:-1] == uneven[:-1]
    assert even[-1]["weights"] == uneven[-1]["weights"]
    portions = 28 * even[-2]["evaluations"]
    assert sum(even[-1]["portions_by_rank"]) == sum(uneven[-1]["portions_by_rank"]) == portions
    assert uneven[-1]["portions_by_rank"][1] < portions / 2


def test_svrg_converges_on_a_server_that_nobody_locks() -> None:
    gaps = [line["suboptimality"] for line in run_by_torchrun("svrg.py", "--epochs", "3", "--batch", "16")]
    assert len(gaps) == 3
    assert gaps[-1] < 1e-5
    assert gaps[-1] < gaps[0] / 100
