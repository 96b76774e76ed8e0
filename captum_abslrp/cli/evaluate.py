"""``captum-abslrp evaluate``: compare attribution methods by GAE on many images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_abslrp import demo, processes
from captum_abslrp.cli.files import (
    PROGRAM,
    UserError,
    complain,
    folder,
    html_file,
    image_files,
    positive_int,
    save_figure,
    save_report,
    save_text,
    say,
)
from captum_abslrp.cli.models import (
    DEMO_PREFIX,
    Subject,
    add_checkpoint,
    add_device,
    add_smoothing,
    exact_name,
    find_device,
    load_subject,
    model_names,
    smoothing_of,
)
from captum_abslrp.methods import get_method, list_methods
from captum_abslrp.metrics.comparison import Comparison
from captum_abslrp.metrics.evaluation import Evaluation
from captum_abslrp.metrics.gae import SCHEDULES, Setting
from captum_abslrp.report import Panel, Section, Table
from captum_abslrp.visualization import plot_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_MOSAICS = 3


def add_command(commands: Any) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = commands.add_parser(
        "evaluate",
        help="compare attribution methods by Global Attribution Evaluation (GAE)",
        description="Score attribution methods on mosaics of four images. Write a table (comparison.md, "
        ".csv and .json), two figures (comparison.png, maps.png) and, during the run, one line per mosaic "
        "and method (scores.jsonl). With `torchrun -m captum_abslrp evaluate ...`, several processes share "
        "the mosaics.",
    )
    parser.set_defaults(command=_evaluate)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=model_names() + " (default with --demo: all demo models, each in its own folder)",
    )
    add_checkpoint(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of images, with or without one subfolder per class (names are ignored)",
    )
    data.add_argument(
        "--demo", action="store_true", help="use generated scenes of single digits as images"
    )
    parser.add_argument(
        "--methods",
        type=_method_names,
        default=list_methods(),
        metavar="M,M,...",
        help=f"methods to compare: {','.join(list_methods())} (default: all)",
    )
    parser.add_argument(
        "--n-mosaics",
        type=positive_int,
        default=100,
        metavar="N",
        help="number of mosaics (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed (default: %(default)s)"
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=SCHEDULES[0],
        help="number of elements that each step masks (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=20,
        metavar="B",
        help="number of images per batch; a mosaic needs 20 (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of CPU threads per process; it affects the last digits of scores, unlike the number of "
        "processes (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the scores in the output folder"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("abslrp-evaluation"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    add_smoothing(parser)
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write an HTML report: a single file with tables, figures and maps",
    )


def _method_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        try:
            get_method(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if not names:
        raise argparse.ArgumentTypeError(f"Expected method names, but got {text!r}.")
    return list(dict.fromkeys(names))


def _evaluate(args: argparse.Namespace) -> int:
    names = [args.model] if args.model else []
    if args.demo and not names:
        names = [DEMO_PREFIX + name for name in demo.list_models()]
    if not names:
        raise UserError("Expected `--model` with `--data`, but got none. See `--help`.")
    if args.demo and not all(name.startswith(DEMO_PREFIX) for name in names):
        raise UserError(f"Expected a demo model with `--demo`, but got {args.model!r}.")
    html_file(args.html)
    device = find_device(args.device)
    idle = (os.cpu_count() or 1) // args.threads
    if device.type == "cpu" and processes.count() == 1 and idle > 1:
        say(
            f"Using {args.threads} of {os.cpu_count()} CPU cores. To get the same table faster, run: "
            f"torchrun --nproc-per-node {idle} -m captum_abslrp evaluate ..."
        )
    sections: list[Section] = []
    try:
        for name in names:
            out = args.out if args.model else args.out / name.removeprefix(DEMO_PREFIX)
            sections += _evaluate_model(name, out, args, device)
    finally:  # report the finished models even if the run is interrupted
        if args.html is not None and not sections and processes.rank() == 0:
            say(f"No model was evaluated, so {args.html} was not written.")
        elif args.html is not None and sections:
            models = ", ".join(section.title for section in sections)
            save_report(args, sections, f"Comparison of attribution methods on {models}")
    return 0


def _evaluate_model(
    name: str, out: Path, args: argparse.Namespace, device: torch.device
) -> list[Section]:
    """Evaluate methods on a model, write the results, and return the sections of the report.

    If several processes share the mosaics, only the first one writes.
    """
    subject = load_subject(name, args.checkpoint, device)
    images: DemoScenes | ImageFolder
    if args.demo:
        images = DemoScenes(args.n_mosaics, args.seed)
        found = "scenes of the demo"
    else:
        images = ImageFolder(args.data, subject, args.out)
        found = str(args.data.resolve())
        if 4 * args.n_mosaics > len(images):
            say(
                f"{len(images)} images for {args.n_mosaics} mosaics: some images are used repeatedly."
            )
    out = folder(out)
    try:
        evaluation = Evaluation(
            out,
            subject.model,
            images,
            labels=images.labels,
            seed=args.seed,
            schedule=args.schedule,
            max_examples_per_batch=args.batch_size,
            device=device,
            description={
                "model": exact_name(name),
                "checkpoint": args.checkpoint and str(args.checkpoint.resolve()),
                "data": found,
            },
            resume=args.resume,
        )
    except FileExistsError as error:
        raise UserError(
            f"Expected `--out` to be a folder without scores, but got {out}, which has some. Continue with "
            f"`--resume`, or choose another folder."
        ) from error
    except ValueError as error:
        raise UserError(str(error)) from error
    methods = {method: _Method(method, subject.model) for method in args.methods}
    try:
        table = evaluation.run(methods, args.n_mosaics, show_progress=True)
        if processes.rank() > 0:
            return []
        maps = _maps(evaluation, methods, table, args.n_mosaics)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{out} could not be written to: {error.strerror or error}") from error
    except KeyboardInterrupt:
        complain(UserError(f"interrupted; continue with {PROGRAM} evaluate ... --resume"))
        raise SystemExit(130) from None

    mosaics = "1 mosaic" if args.n_mosaics == 1 else f"{args.n_mosaics} mosaics"
    heading = f"{name}, {mosaics}, mean [95% confidence interval]"
    skipped = "".join(f"\n- {reason}" for reason in evaluation.skipped.values())
    if skipped:
        skipped = f"\nSkipped images ({len(evaluation.skipped)}):\n{skipped}\n"
    text = f"{heading}\n\n{table}\n{skipped}"
    save_text(text, out / "comparison.md")
    save_text(table.to_csv(), out / "comparison.csv")
    save_text(table.to_json(), out / "comparison.json")
    save_figure(table.plot(title=heading), out / "comparison.png")
    smoothing = smoothing_of(args, subject.model, maps[0][0].mosaics[:1])
    save_figure(_figure(maps, subject, smoothing), out / "maps.png")
    say(text)
    say(f"Tables and figures are in {out}.")
    columns, *rows = table.rows()
    failed = {name: scores.failure for name, scores in table.methods.items() if scores.failure}
    rows = [[name, "failed"] if name in failed else [name, *cells] for name, *cells in rows]
    section = Section(
        name,
        panels=[
            Panel(
                f"Mosaic {number}",
                subject.show(setting.mosaics[0].cpu()),
                [subject.label(int(setting.targets))],
                {method: [None if isinstance(m, str) else m] for method, m in of_mosaic.items()},
                smoothing=smoothing,
            )
            for number, (setting, of_mosaic) in enumerate(maps, start=1)
        ],
        tables=[Table(heading, columns, rows)],
        figures={f"Scores of the methods on {name}": (out / "comparison.png").read_bytes()},
        notes=[f"{method} failed: {reason}" for method, reason in failed.items()]
        + [f"Skipped: {reason}" for reason in evaluation.skipped.values()],
    )
    return [section]


class _Method:
    """A method that is constructed when it is called, so that an error only affects its own row."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model = model

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        return get_method(self.name)(self.model)(inputs, target)


def _maps(
    evaluation: Evaluation, methods: dict[str, _Method], table: Comparison, n_mosaics: int
) -> list[tuple[Setting, dict[str, Tensor | str]]]:
    """The first mosaics, each with the maps of all methods for the class of its positive image."""
    settings = [evaluation.setting(number) for number in range(min(SHOWN_MOSAICS, n_mosaics))]
    return [
        (
            setting,
            {
                name: "failed"
                if table.methods[name].failure is not None
                else method(setting.mosaics, setting.targets)[0].detach().cpu()
                for name, method in methods.items()
            },
        )
        for setting in settings
    ]


def _figure(
    maps: Sequence[tuple[Setting, dict[str, Tensor | str]]], subject: Subject, smoothing: int
) -> Figure:
    return plot_grid(
        [subject.show(setting.mosaics[0].cpu()) for setting, _ in maps],
        [list(of_mosaic.values()) for _, of_mosaic in maps],
        row_labels=[f"why {subject.label(int(setting.targets))}?" for setting, _ in maps],
        column_labels=list(maps[0][1]),
        smoothing=smoothing,
    )


class DemoScenes:
    """Scenes of single digits, four per mosaic."""

    def __init__(self, n_mosaics: int, seed: int) -> None:
        scenes = demo.render_scenes("single", 4 * n_mosaics, generator=seed)
        self.inputs = scenes.inputs
        self.labels: Sequence[int] = scenes.labels.tolist()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]


class ImageFolder:
    """Preprocessed images from a folder, with or without one subfolder per class.

    Files without an image extension are skipped, as are the files in the folder `passed_over`.
    """

    def __init__(self, path: Path, subject: Subject, passed_over: Path | None = None) -> None:
        if not path.is_dir():
            raise UserError(f"Expected `--data` to be a folder, but got {path}, which is not one.")
        self.paths = image_files(path, passed_over)
        self.subject = subject
        if len(self.paths) < 4:
            raise UserError(
                f"Expected `--data` to have at least four images, but got {len(self.paths)} in {path}."
            )
        classes = [file.relative_to(path).parts[:-1][:1] for file in self.paths]
        known = {name: label for label, name in enumerate(dict.fromkeys(classes))}
        self.labels: Sequence[int] = [known[name] for name in classes]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.subject.read(self.paths[index])
        except UserError as error:
            raise OSError(str(error)) from error
