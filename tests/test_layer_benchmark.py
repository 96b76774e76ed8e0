"""The script that says what maps of several layers cost."""

from __future__ import annotations

import sys

import pytest

from benchmarks import layers


def test_all_blocks_take_one_forward_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--models", "test_vit", "--image-size", "160", "--batch-size", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["layers", *options])
    layers.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {what: (int(passes), float(ratio)) for _, what, passes, ratio in rows}
    assert [*found][1].startswith("all ")
    assert all(passes == 1 and ratio > 0 for passes, ratio in found.values())
