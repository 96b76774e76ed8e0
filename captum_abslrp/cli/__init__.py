"""The command line: ``captum-abslrp demo``, ``explain``, ``evaluate``, ``export`` and ``inspect``.

Errors that the user can fix are printed as one line on stderr, with exit code 2. All other errors are bugs
and raise a traceback.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from captum_abslrp import __version__, processes
from captum_abslrp.cli import demo, evaluate, explain, export, inspect
from captum_abslrp.cli.files import PROGRAM, UserError, complain
from captum_abslrp.cli.models import of_threads

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the name of the program; by default, those of the process.

    Returns:
        The exit code: 0 on success; 1 if ``inspect`` finds a call without a rule; 2 after a user error.
        Invalid arguments, ``--help`` and ``--version`` raise SystemExit, as usual for argparse.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Explain the predictions of vision models with absLRP."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for part in (demo, explain, evaluate, export, inspect):
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
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
