"""The script that measures on a GPU, on the host with tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which takes minutes")
def test_the_script_runs_to_its_end_and_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        ["sh", "benchmarks/gpu.sh", "--minutes", "0"],
        cwd=ROOT,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no GPU to measure: tiny models run on the CPU")
    assert "Left out for lack of time: test_resnet float32 1, " in done.stdout
    assert done.stdout.splitlines()[-1] == "There is no GPU: the tests that need one are left out."


def test_each_row_has_all_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "TINY", ("test_vit",))
    monkeypatch.setattr(gpu, "median_seconds", lambda run: run() is None or 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Device: CPU")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    expected = [["test_vit", "float32", "1"], ["test_vit", "bfloat16, autocast", "1"]]
    assert [row[:3] for row in rows] == expected
    for row in rows:
        cells = dict(zip(gpu.HEADER, row, strict=True))
        on_gpu = [head for head in gpu.HEADER if "MB" in head or "CUDA" in head]
        assert {head for head, cell in cells.items() if cell == "-"} == set(on_gpu)
