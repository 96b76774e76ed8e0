"""Configuration of the documentation: ``sphinx-build -W -n docs docs/_build/html``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from captum_abslrp import __version__  # noqa: E402

project = "captum-abslrp"
author = "the captum-abslrp authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
    "sphinx_copybutton",
    "generated",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"captum-abslrp {version}"
html_static_path: list[str] = []

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are run by the tests, and come with their outputs
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Names of other libraries are not looked up: the build needs no network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|captum|numpy|np|npt|nn|matplotlib|collections|typing|pathlib|pandas)\..*"),
    (r"py:.*", r"(Any|Callable|Image|Tensor|Figure|Path|Protocol|Sequence|Module|optional|type)"),
]
nitpick_ignore = [
    ("py:class", name)  # types of the inside, and names of types
    for name in (
        "captum_abslrp.engine.recording.Recording",
        "captum_abslrp.scores.Scores",
        "captum_abslrp.engine.observers.Observer",
        "captum_abslrp.engine.protocols.CallRule",
        "captum_abslrp.rules.base.DividingRule",
        "captum_abslrp.engine.calls.Recorder",
        "captum_abslrp.seeds.Default",
        "Array",
        "Contrast",
        "Key",
        "Propagate",
        "Tail",
        "Target",
    )
] + [("py:class", "dict[str")]  # of a dataclass whose default is made by a factory
linkcheck_timeout = 10


def setup(app: Any) -> None:
    """Links to notebooks lead somewhere in the repository and in the site alike."""

    def lead_to_pages(app: Any, name: str, source: list[str]) -> None:
        source[0] = source[0].replace("](../tutorials/", "](tutorials/")
        source[0] = source[0].replace("](../../tutorials/", "](../tutorials/")

    app.connect("source-read", lead_to_pages)


# The notebooks are part of the site. Those of an earlier build may have other names.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
shutil.copytree(
    HERE.parent / "tutorials", HERE / "tutorials",
    ignore=shutil.ignore_patterns("*.py", ".ipynb_checkpoints"),
)  # fmt: skip
