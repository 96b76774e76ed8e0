"""The script that measures on a GPU, on the host with tiny models."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import gpu


def test_the_script_runs_on_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "TINY", ("test_vit",))
    monkeypatch.setattr(gpu, "median_seconds", lambda run: run() is None or 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Device: CPU")
    assert [line.split(" | ")[:3] for line in lines[3:5]] == [
        ["| test_vit", "float32", "1"],
        ["| test_vit", "float32", "2"],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU" in capsys.readouterr().err
