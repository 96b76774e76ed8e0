"""Makes the description for the package index from the README; `pyproject.toml` has everything else."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"


def for_the_package_index(text: str) -> str:
    """Remove from a README what only works inside of the repository.

    The package index shows the README on a page of its own, where relative links lead nowhere.

    Args:
        text: the README.

    Returns:
        The README without comments and images, with plain text in place of relative links.
    """
    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n\n(\*[^*]+\*\n\n)?", "", text)  # with its caption
    return re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]+\)", r"\1", text)


setup(
    long_description=for_the_package_index(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
