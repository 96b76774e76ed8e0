"""What the pages take from the code itself: mapping tables and the help of the command line.

After the build every public name has to be in the index, or the build fails.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

PUBLIC = [
    "captum_abslrp",
    "captum_abslrp.rules",
    "captum_abslrp.mappings",
    "captum_abslrp.functional",
    "captum_abslrp.targets",
    "captum_abslrp.words",
    "captum_abslrp.methods",
    "captum_abslrp.metrics",
    "captum_abslrp.metrics.functional",
    "captum_abslrp.visualization",
    "captum_abslrp.report",
    "captum_abslrp.demo",
]
"""Modules whose ``__all__`` is the public interface."""


class _Lines(SphinxDirective):
    """A directive that writes Markdown."""

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        section = nodes.Element()
        self.state.nested_parse(StringList(self.lines(), source="generated"), 0, section)
        return section.children


class MappingTables(_Lines):
    """For each registered mapping what it is for, and its own entries, the first of which wins."""

    def lines(self) -> list[str]:
        from captum_abslrp.mappings import get_mapping, list_mappings, registry

        found = []
        for name in sorted(list_mappings(), key=lambda name: (name == "generic", name)):
            mapping = get_mapping(name)
            models = [a for a, known in registry._ARCHITECTURES.items() if known is mapping]
            found += [f"**`{name}`**: " + (", ".join(f"`{m}`" for m in models) or "all others"), ""]
            base = mapping.base.entries if mapping.base is not None else ()
            own = [entry for entry in mapping.entries if entry not in base]
            found += ["| call, layer or place | rule |", "|---|---|"] if own else []
            for keys, rule in own:
                keys = keys if isinstance(keys, tuple) else (keys,)
                found.append(f"| {', '.join(f'`{_key(key)}`' for key in keys)} | `{rule}` |")
            if mapping.base is not None:
                found += ["", f"Everything else as in `{mapping.base.name}`."]
            found.append("")
        return found


def _key(key: Any) -> str:
    if isinstance(key, type):
        return key.__name__
    return key if isinstance(key, str) else repr(key)


class CommandHelp(_Lines):
    """What ``captum-abslrp COMMAND --help`` prints."""

    required_arguments = 1

    def lines(self) -> list[str]:
        from captum_abslrp.cli import main

        output = io.StringIO()
        os.environ["COLUMNS"] = "84"
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([self.arguments[0], "--help"])
        return ["```text", *output.getvalue().rstrip().splitlines(), "```"]


def _resolved(name: str) -> Any:
    """The function, class or table of a qualified name; None for constants, which are known by name."""
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(ImportError, ValueError):
        found = getattr(importlib.import_module(module), attribute, None)
        if found is not None and not isinstance(found, (str, int, float, tuple)):
            return found
    return None


def check_public_names(app: Sphinx, exception: Exception | None) -> None:
    """Every public name has an entry."""
    if exception is not None or app.builder.name != "html":
        return
    documented = set(app.env.domains["py"].objects)
    objects = [found for name in documented if (found := _resolved(name)) is not None]
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            value = _resolved(f"{module}.{name}")
            known = value is not None and any(value is found for found in objects)
            if not known and f"{module}.{name}" not in documented:
                logging.getLogger(__name__).warning("%s.%s is not documented", module, name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("mapping-tables", MappingTables)
    app.add_directive("command-help", CommandHelp)
    app.connect("build-finished", check_public_names)
    return {"parallel_read_safe": True}
