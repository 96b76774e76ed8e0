"""``captum-abslrp inspect``: the rule of each call of a model."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from captum_abslrp.cli.files import say
from captum_abslrp.cli.models import build_model, model_names
from captum_abslrp.inspection import MOVES, Inspection, inspect_rules
from captum_abslrp.mappings import find_mapping
from captum_abslrp.text import markdown_table


def add_command(commands: Any) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = commands.add_parser(
        "inspect",
        help="show the rule of each call of a model",
        description="Run a model once with random weights (nothing is downloaded) and print a table of its "
        "calls and their rules. The exit code is 1 if a call has no rule.",
    )
    parser.set_defaults(command=_inspect)
    parser.add_argument("--model", required=True, metavar="NAME", help=model_names())
    parser.add_argument(
        "--each",
        action="store_true",
        help="print one line per call, in the order of the forward pass",
    )
    parser.add_argument(
        "--all", action="store_true", help="also show calls that only move elements"
    )


def _inspect(args: argparse.Namespace) -> int:
    model, input_size = build_model(args.model)
    inspection = inspect_rules(model.eval(), torch.randn(1, *input_size))
    shown = [call for call in inspection.calls if args.all or call.rule != MOVES]
    if args.each:
        rows = [
            [call.path or "(model)", call.layer, call.call, call.rule or "NONE", call.origin]
            for call in shown
        ]
        say(markdown_table(["module", "layer", "call", "rule", "from"], rows))
    else:
        say(str(Inspection(tuple(shown))))
    mapping = find_mapping(model)
    without = len(inspection.unsupported)
    say(
        f"\n{args.model}: mapping {mapping.name if mapping else 'generic'!r}, {len(inspection.calls)} "
        f"calls, {without or 'none'} without a rule"
    )
    return 1 if without else 0
