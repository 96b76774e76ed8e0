"""The script that says where the time of an attribution goes."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import profile


@pytest.mark.parametrize("normalization", ["separate", "joint"])
def test_every_kind_of_call_and_operator_has_a_time(
    normalization: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "demo:resnet", "--batch-size", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["profile", *options, "--normalization", normalization])
    profile.main()
    out = capsys.readouterr().out
    cells = [line.strip("| ").split(" | ", 1) for line in out.splitlines()]
    rows = {row[0]: row[1] for row in cells if len(row) == 2}
    calls, milliseconds, passes = rows["record_convolution"].split(" | ")
    assert int(calls) > 10 and float(milliseconds) > 0 and float(passes) > 0
    assert "Products, forward and back: " in out
    others = re.findall(r"`\w+` (\d+\.\d+)", out.partition("Other operators: ")[2])
    assert len(others) == 10 and float(others[0]) > 0
    assert others == sorted(others, key=float, reverse=True)
