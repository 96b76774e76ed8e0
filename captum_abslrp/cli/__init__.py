"""The command line: ``captum-abslrp demo``, ``explain``, ``evaluate`` and ``inspect``.

What a user can put right is one line on stderr and exit code 2. Everything else is a fault of the
program and leaves with its traceback.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from captum_abslrp import __version__, processes
from captum_abslrp.cli import demo, evaluate, explain, inspect
from captum_abslrp.cli.files import PROGRAM, UserError, complain
from captum_abslrp.cli.models import of_threads

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0; 1 if ``inspect`` has found a call without a rule; 2 after an error of the
        user's. Arguments that cannot be parsed, ``--help`` and ``--version`` raise SystemExit, as
        argparse does.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Why does a vision model see this class here? (absLRP)"
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for part in (demo, explain, evaluate, inspect):
        part.add_command(commands)
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    args.line = shlex.join([PROGRAM, *given])  # for reports
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        with processes.started(), of_threads(getattr(args, "threads", None)):
            return command(args)
    except UserError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # the reader has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
