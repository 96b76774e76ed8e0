"""``evaluate`` and ``explain`` shared by processes: the same results as of one, whoever dies."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed

from captum_abslrp import demo, processes
from captum_abslrp.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["captum_abslrp.cli", "timm", "matplotlib.figure"])
Process = Any
NUMBERS = itertools.count(random.SystemRandom().randrange(1_000))


def work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """What each of the processes does."""
    os.environ.update(environment)
    # As PyTorch and `torchrun` choose it.
    torch.set_num_threads(2 if environment["WORLD_SIZE"] == "1" else 1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def exchange_and_end(rank: int, ports: list[int], by_hand: bool) -> None:
    """Connect two processes, exchange something and part at once, again and again."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": str(rank)})
    for number, port in enumerate(ports):
        os.environ["MASTER_PORT"] = str(port)
        if by_hand:
            distributed.init_process_group("gloo")
        with processes.started():
            assert processes.gather({rank: "x" * number * rank}) == [{0: ""}, {1: "x" * number}]
            make = partial(divmod, number, 1 - rank)  # which fails in the second process
            assert processes.from_first(make) == (number, 0)
        assert distributed.is_initialized() == by_hand  # what others have connected stays so
        if by_hand:
            distributed.destroy_process_group()


def free_ports(count: int) -> list[int]:
    """Ports that are free, from a range of this worker's own that the system gives to nobody by itself."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    free: list[int] = []
    while len(free) < count:
        port = 16_000 + 1_000 * worker + next(NUMBERS) % 1_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody answers
                free.append(port)
    return free


def start(n_processes: int, *arguments: object, log: Path) -> list[Process]:
    """Start the command in processes that know of each other, as those of `torchrun` do."""
    [port] = free_ports(1)
    started = []
    for rank in range(n_processes):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(n_processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        process = SERVER.Process(
            target=work, args=([str(a) for a in arguments], environment, str(log))
        )
        process.start()
        started.append(process)
    return started


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[int]]:
    """Run the command to its end; the exit codes."""

    def run(n_processes: int, *arguments: object) -> list[int]:
        log = tmp_path / "log"
        started = start(n_processes, *arguments, log=log)
        for process in started:
            process.join(300)
        codes = [process.exitcode for process in started]
        if codes[0] != 0:
            print(log.read_text())
        return codes

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Scenes of single digits in a folder per class, and a file that is no picture."""
    scenes = demo.render_scenes("single", 8, generator=0)
    for number, image in enumerate(scenes.images):
        path = tmp_path / "pictures" / f"class {number % 4}" / f"{number // 8}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path.with_stem(f"{number // 4}"))
    (tmp_path / "pictures" / "class 0" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def scores(out: Path) -> dict[str, Any]:
    """All scores and failures of a table, to the last digit."""
    table = json.loads((out / "comparison.json").read_text())
    return {name: (scores["values"], scores["failure"]) for name, scores in table.items()}


def test_the_table_of_several_processes_is_that_of_one(
    run: Callable[..., list[int]], pictures: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "--model", "demo:resnet", "--data", pictures, "--n-mosaics", 4]
    command += ["--methods", "abslrp,lrp,random", "--out"]
    assert run(1, *command, tmp_path / "one") == [0]
    assert run(3, *command, tmp_path / "three") == [0, 0, 0]
    expected = scores(tmp_path / "one")
    assert expected["lrp"][1] is not None and expected["random"][1] is None
    assert len(expected["abslrp"][0]["gae"]) == 4
    assert scores(tmp_path / "three") == expected

    def lines(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if "skipped" not in line]

    # Four mosaics, none of them done twice; a method that fails is tried once by each process.
    counts = {p.name: len(lines(p)) for p in (tmp_path / "three").glob("scores*.jsonl")}
    assert counts == {"scores.jsonl": 5, "scores-1.jsonl": 3, "scores-2.jsonl": 3}
    texts = [(tmp_path / name / "comparison.md").read_text() for name in ("one", "three")]
    assert ["broken.png" in text for text in texts] == [True, True]


def test_explanations_of_several_processes_are_those_of_one(
    run: Callable[..., list[int]], pictures: Path, tmp_path: Path
) -> None:
    command = ["explain", pictures, "--model", "demo:vgg", "--top", 2, "--threads", 1]
    for n_processes in (1, 2):
        out = tmp_path / str(n_processes)
        codes = run(n_processes, *command, "--out", out, "--html", out / "report.html")
        assert codes == [2, *[0] * (n_processes - 1)]  # of the file that is no picture
    maps = [
        {path.relative_to(tmp_path / n): np.load(path) for path in (tmp_path / n).rglob("*.npy")}
        for n in ("1", "2")
    ]
    assert len(maps[0]) == 8 and maps[0].keys() == maps[1].keys()
    assert all(np.array_equal(maps[0][name], maps[1][name]) for name in maps[0])
    assert Path("class 3/1-abslrp.npy") in maps[0]
    shown = [
        re.findall(r'"name": ?"([^"]*\.png)"', (tmp_path / n / "report.html").read_text())
        for n in "12"
    ]
    assert shown[0] == shown[1] and len(shown[0]) == 8
    log = (tmp_path / "log").read_text()
    assert log.count("broken.png could not be read as an image") == 2


@pytest.mark.parametrize(
    ("n_kills", "n_mosaics"), [(1, 3), pytest.param(10, 6, marks=pytest.mark.slow)]
)
def test_sigkill_at_random_moments_loses_nothing(
    n_kills: int, n_mosaics: int, run: Callable[..., list[int]], tmp_path: Path
) -> None:
    command = ["evaluate", "--demo", "--model", "demo:vgg", "--n-mosaics", n_mosaics]
    command += ["--methods", "saliency,random", "--out"]
    began = time.monotonic()
    assert run(2, *command, tmp_path / "whole") == [0, 0]
    duration = time.monotonic() - began
    expected = scores(tmp_path / "whole")
    draw = random.Random(0)
    finished = []
    while len(finished) < n_kills:
        out = tmp_path / f"killed-{len(finished)}"
        started = start(2, *command, out, log=tmp_path / "log")
        time.sleep(draw.uniform(0, duration))
        victims = started if len(finished) % 2 else [draw.choice(started)]
        for process in victims:
            process.kill()
        for process in victims:
            process.join()
        if any(process.exitcode != -9 for process in victims):  # it had come to its end before
            for path in sorted(out.rglob("*")):
                path.unlink()
            continue
        for process in started:  # `torchrun` stops the others, too, after a while
            process.join(5)
            process.kill()
            process.join()
        finished.append(sum(path.read_bytes().count(b"\n") for path in out.glob("scores*.jsonl")))
        assert run([1, 3][len(finished) % 2], *command, out, "--resume")[0] == 0
        assert scores(out) == expected, finished
    print("lines that were written before the kill:", finished)


@pytest.mark.parametrize("by_hand", [pytest.param(False, marks=pytest.mark.slow), True])
def test_processes_that_part_at_once_come_to_an_end(by_hand: bool) -> None:
    ports = free_ports(40)
    pair = [
        SERVER.Process(target=exchange_and_end, args=(rank, ports, by_hand)) for rank in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        process.kill()  # if it hangs
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path: Path) -> None:
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 "
    command += "-m captum_abslrp evaluate --demo --model demo:vgg --n-mosaics 2 --methods random"
    result = subprocess.run(
        [*command.split(), "--out", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Tables and figures are in") == 1
    assert {p.name for p in tmp_path.glob("scores*")} == {"scores.jsonl", "scores-1.jsonl"}


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes.own_device(cuda) == cuda
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.own_device(cuda) == torch.device("cuda:3")
    assert processes.own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert processes.own_device(torch.device("cpu")) == torch.device("cpu")
