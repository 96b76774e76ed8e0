"""A static web page that explains images in the browser, without Python.

The page runs an exported explainer (ONNX) with onnxruntime-web. It loads files from its own folder only.
Images are not sent anywhere.

Axes: C channels (1 or 3), H height, W width, K classes.

Example:
    >>> import tempfile
    >>> about = {
    ...     "model": "a model",
    ...     "method": "AbsLRP",
    ...     "inputs": {"image": [1, 3, 64, 64], "target": [1]},
    ...     "outputs": {"scores": [1, 10], "relevance": [1, 3, 64, 64]},
    ...     "class_names": None,
    ...     "preprocessing": {"mode": "RGB", "resize": 64, "interpolation": "bilinear",
    ...                       "crop": [64, 64], "mean": [0.5] * 3, "std": [0.25] * 3},
    ...     "smoothing": 8,
    ... }
    >>> with tempfile.TemporaryDirectory() as folder, find_runtime() as runtime:  # doctest: +SKIP
    ...     write_page(Path(folder), Path("explainer.onnx").read_bytes(), about, runtime)
"""

from __future__ import annotations

import errno
import html
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from captum_abslrp.files import replaced
from captum_abslrp.report import drawing
from captum_abslrp.visualization import SMOOTHED

__all__ = ["RUNTIME_VERSION", "check_folder", "find_runtime", "write_page"]

RUNTIME_VERSION = "1.30.0"
"""The version of the npm package onnxruntime-web that the page is tested with."""

_PACKAGE = "onnxruntime-web"
# Some servers send files that end in .mjs with a content type that browsers reject, so the page has ort.js.
_RUNTIME_FILES = {
    "ort.js": "dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm": "dist/ort-wasm-simd-threaded.wasm",
}
_GENERATOR = '<meta name="generator" content="captum-abslrp explainer">'
_WAITING = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8">{_GENERATOR}<title>Not complete</title></head>
<body><p>This page is not complete. Wait until all of its files are written, and reload it.</p></body>
</html>
"""
_REMEDY = (
    f"Run `npm install {_PACKAGE}@{RUNTIME_VERSION}`, and pass the folder "
    f"node_modules/{_PACKAGE} of the installed package."
)


@contextmanager
def find_runtime(folder: str | Path | None = None) -> Iterator[Path]:
    """Find the npm package onnxruntime-web, which runs explainers in a browser.

    Without `folder`, the function uses ``node_modules/onnxruntime-web`` of the current folder or the
    closest parent that has it in the version :data:`RUNTIME_VERSION`. Otherwise, it fetches the package with
    npm into a temporary folder. No script of the package is run.

    Args:
        folder: the folder of the installed package.

    Returns:
        A context manager with the folder of the package. A fetched package is deleted at its end.

    Raises:
        ValueError: if `folder` does not have the package, or has another version of it.
        RuntimeError: if the package has to be fetched, and npm is missing or fails.

    Example:
        >>> with find_runtime("node_modules/left-pad") as runtime:
        ...     pass
        Traceback (most recent call last):
        ...
        ValueError: Expected node_modules/left-pad to be the folder of the npm package onnxruntime-web
        1.30.0, but got a folder without package.json. Run `npm install onnxruntime-web@1.30.0`, and pass the
        folder node_modules/onnxruntime-web of the installed package.
    """
    if folder is not None:
        trouble = _trouble(Path(folder))
        if trouble is not None:
            raise ValueError(
                f"Expected {folder} to be the folder of the npm package {_PACKAGE} {RUNTIME_VERSION}, "
                f"but got {trouble}. {_REMEDY}"
            )
        yield Path(folder)
        return
    here = Path.cwd()
    for parent in (here, *here.parents):
        installed = parent / "node_modules" / _PACKAGE
        if _trouble(installed) is None:
            yield installed
            return
    with tempfile.TemporaryDirectory() as fetched:
        yield _fetch(Path(fetched))


def _trouble(folder: Path) -> str | None:
    """Return what is wrong with the folder of a package, or None."""
    try:
        about = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except OSError:
        return "a folder without package.json" if not folder.is_file() else "a file"
    except ValueError:
        return "a package.json that is not JSON"
    name, version = (
        about.get(key) if isinstance(about, dict) else None for key in ("name", "version")
    )
    if (name, version) != (_PACKAGE, RUNTIME_VERSION):
        return f"{name} {version}"
    missing = [file for file in _RUNTIME_FILES.values() if not (folder / file).is_file()]
    return f"a package without {' and '.join(missing)}" if missing else None


def _fetch(folder: Path) -> Path:
    """Fetch the package with npm, and unpack the files that the page needs."""

    def failed(reason: str) -> RuntimeError:
        return RuntimeError(
            f"Expected npm to fetch the package {_PACKAGE} {RUNTIME_VERSION}, but {reason}. {_REMEDY}"
        )

    npm = shutil.which("npm")
    if npm is None:
        raise failed("npm is not installed")
    command = [npm, "pack", f"{_PACKAGE}@{RUNTIME_VERSION}", "--ignore-scripts", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise failed(f"npm could not be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line.removeprefix("npm").strip() for line in done.stderr.splitlines()]
        lines = [line for line in lines if line and "complete log" not in line]
        raise failed(f"got exit status {done.returncode}: {' '.join(lines[:3]).rstrip('.')}")
    archives = list(folder.glob("*.tgz"))
    package = folder / "package"
    try:
        with tarfile.open(archives[0]) as archive:
            for name in ("package.json", *_RUNTIME_FILES.values()):
                content = archive.extractfile(f"package/{name}")
                if content is None:
                    raise KeyError(name)
                (package / name).parent.mkdir(parents=True, exist_ok=True)
                with content, (package / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    except (IndexError, KeyError, OSError, tarfile.TarError) as error:
        raise failed("got no package that could be unpacked") from error
    trouble = _trouble(package)
    if trouble is not None:
        raise failed(f"got {trouble}")
    return package


def check_folder(folder: Path) -> None:
    """Check that a page of another origin is not in a folder.

    Raises:
        ValueError: if the folder has an ``index.html`` that :func:`write_page` did not write.
        OSError: if it is not a folder, or cannot be read.

    Example:
        >>> check_folder(Path("a-new-folder"))
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if (folder / "index.html").exists() and not _has_page(folder):
        raise _another(folder, "index.html")


def write_page(folder: Path, explainer: bytes, about: Mapping[str, Any], runtime: Path) -> int:
    """Write the page and all files that it needs into a folder.

    Every file appears complete. A page that was written before is replaced; until all files are new, the page
    says that it is being written. Other files in the folder remain.

    Args:
        folder: the folder, which is created if it does not exist.
        explainer: an ONNX model with the inputs ``image``, float32 (1, C, H, W), and ``target``,
            int64 (1,), and the outputs ``scores``, (1, K), and ``relevance``, (1, C, H, W).
        about: the description of the explainer that the export returns: model, method, inputs, outputs,
            class_names, preprocessing, smoothing and versions.
        runtime: the folder of the npm package, see :func:`find_runtime`.

    Returns:
        The number of bytes of the page.

    Raises:
        ValueError: if `about` has no steps of a preprocessing or does not describe one image of float32, if
            `runtime` is not the package, or if the folder has another page or another file with the name of
            a file of the page.
        OSError: if a file cannot be written.

    Example:
        >>> write_page(Path("page"), b"", {"preprocessing": None}, Path("runtime"))
        Traceback (most recent call last):
        ...
        ValueError: Expected `about` to have the steps of a preprocessing, but got None. Export the
        explainer with `preprocessing=Preprocessing(...)`.
    """
    steps = about.get("preprocessing")
    if not isinstance(steps, Mapping):
        raise ValueError(
            f"Expected `about` to have the steps of a preprocessing, but got {steps!r}. Export the "
            "explainer with `preprocessing=Preprocessing(...)`."
        )
    shape, dtype = about["inputs"]["image"], about.get("dtype", "float32")
    if len(shape) != 4 or shape[0] != 1 or dtype != "float32":
        raise ValueError(
            f"Expected the explainer to take one image, (1, C, H, W), of float32, but got {tuple(shape)} of "
            f"{dtype}. Export it with another example."
        )
    trouble = _trouble(runtime)
    if trouble is not None:
        raise ValueError(
            f"Expected `runtime` to be the folder of the npm package {_PACKAGE} {RUNTIME_VERSION}, "
            f"but got {trouble}. {_REMEDY}"
        )
    page = _page(explainer, about, runtime)
    _require_own(folder, page)
    folder.mkdir(parents=True, exist_ok=True)
    # A page that is replaced must not show the new explainer with its old labels.
    first = {"index.html": _WAITING.encode()} if _has_page(folder) else {}
    for name, content in (*first.items(), *page.items()):
        with replaced(folder / name) as file:
            file.write(content)
    return sum(map(len, page.values()))


def _page(explainer: bytes, about: Mapping[str, Any], runtime: Path) -> dict[str, bytes]:
    """Return the files of the page by name, those that others need first."""
    shared, own = files("captum_abslrp.report"), files("captum_abslrp.web")
    scripts = ("files.js", "maps.js", "prepare.js", "worker.js", "main.js")
    names = "choices, element, labelOf, listenToKeys, mapOver, opacityOf, percent"
    data = {**about, "drawing": {**drawing(), "smoothed": SMOOTHED.format(about["smoothing"])}}
    title = html.escape(f"Why this class? {about['model']}")
    text = (own / "index.html").read_text(encoding="utf-8").replace("{{title}}", title)
    return {
        "explainer.onnx": explainer,
        **{name: (runtime / file).read_bytes() for name, file in _RUNTIME_FILES.items()},
        "onnxruntime-license.txt": (own / "onnxruntime-license.txt").read_bytes(),
        "about.json": json.dumps(data, allow_nan=False).encode(),
        "page.css": (shared / "report.css").read_bytes() + (own / "page.css").read_bytes(),
        "common.js": (shared / "common.js").read_bytes() + f"\nexport {{ {names} }};\n".encode(),
        **{name: (own / name).read_bytes() for name in scripts},
        "index.html": text.encode(),
    }


def _require_own(folder: Path, page: Mapping[str, bytes]) -> None:
    """Raise an error if writing the page would replace a file of another origin."""
    if _has_page(folder):
        return
    for name, content in page.items():
        path = folder / name
        # Equal files are those of a page that was not written to its end.
        if path.is_dir() or (path.exists() and path.read_bytes() != content):
            raise _another(folder, name)


def _has_page(folder: Path) -> bool:
    """Whether a folder has a page of `write_page`."""
    index = folder / "index.html"
    return index.is_file() and _GENERATOR in index.read_text(encoding="utf-8", errors="replace")


def _another(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"Expected {folder} to be a new folder or one with a page of this command, but got another {name} "
        "in it. Choose another folder."
    )
