"""The example script that does all of it at once."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import zygote

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "amp_accumulate_clip.py"


def test_it_trains_under_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = zygote.run(
        [*command, "--epochs", "6"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    accuracy = [float(found) for found in re.findall(r"epoch 6  loss [\d.]+  accuracy ([\d.]+) %", done.stdout)]
    assert len(accuracy) == 2, done.stdout
    assert accuracy[0] == accuracy[1], "replicas differ, or their running statistics"
    assert accuracy[0] > 80


def test_what_is_new_in_it_is_marked() -> None:
    lines = SCRIPT.read_text().partition('"""\n\n')[2].splitlines()
    marked = [line for line in lines if "# +" in line]
    assert all("# +" in line for line in lines if "gradcomp" in line or "sync" in line)
    assert len(marked) < 10
