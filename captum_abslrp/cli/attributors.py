"""The options of a command for the attributor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.checks import check_combine
from captum_abslrp.cli.files import UserError
from captum_abslrp.cli.models import Subject
from captum_abslrp.text import did_you_mean

NORMALIZATIONS = ("separate", "joint")
CONTRASTS = ("others", "softmax", "none")
COMBINATIONS = ("difference", "gated", "guided")
RECOMMENDED, PUBLISHED = "recommended", "published"


def add_attributor(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--mapping``, ``--contrast``, ``--combine`` and ``--normalization`` to a parser."""
    parser.add_argument(
        "--mapping",
        default=RECOMMENDED,
        metavar="NAME",
        help="mapping or LRP composite, such as generic, epsilon_plus or attnlrp; 'recommended' selects "
        "the best settings for the kind of model, 'published' the published method (default: %(default)s)",
    )
    parser.add_argument(
        "--contrast",
        metavar="|".join([*CONTRASTS, "CLASS", "INDEX"]),
        help="classes to compare with: all others equally, all others by probability, none, or one class "
        "(default: as recommended, otherwise others)",
    )
    parser.add_argument(
        "--combine",
        choices=COMBINATIONS,
        help="how to combine the maps of class and contrast: their difference; gated: the class's map "
        "where it exceeds the contrast's; guided: the class's map weighted by the difference "
        "at an inner layer (default: as recommended, otherwise difference)",
    )
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        help="scale the relevance of each input of a call separately, or of all inputs jointly (default: as "
        "recommended, otherwise separate)",
    )


def attributor_of(args: argparse.Namespace, subject: Subject) -> AbsLRP:
    """The attributor that is asked for; options that are given win over what is recommended."""
    try:
        if args.mapping == RECOMMENDED:
            method = AbsLRP.recommended(subject.model)
        else:
            mapping = None if args.mapping == PUBLISHED else args.mapping
            method = AbsLRP(subject.model, mapping)
    except ValueError as error:
        raise UserError(f"--mapping: {error}") from error
    method.normalization = args.normalization or method.normalization
    method.combine = args.combine or method.combine
    try:
        check_combine(method.combine, signed=method.signed)
    except ValueError as error:
        raise UserError(f"--combine: {error}") from error
    return method


def contrast_of(args: argparse.Namespace, method: AbsLRP, subject: Subject) -> int | str | None:
    """The contrast that is asked for; an index is of a class."""
    if args.contrast is None:
        return method.contrast  # type: ignore[return-value]  # a name, of those recommended
    if args.contrast in CONTRASTS:
        return None if args.contrast == "none" else args.contrast
    return class_index(args.contrast, subject.names, "--contrast", CONTRASTS)


def class_index(
    text: str, names: Sequence[str], option: str, other_words: Sequence[str] = ()
) -> int:
    """The class that a name (any synonym, any case) or an index stands for.

    `other_words` are what the option takes besides; they are for the message only.
    """
    try:
        index = int(text)
    except ValueError:
        pass
    else:
        if not 0 <= index < len(names):
            raise UserError(
                f"Expected `{option}` to be between 0 and {len(names) - 1}, but got {index}."
            )
        return index

    wanted = text.strip().casefold()
    known: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        parts = [name, *name.split(",")] if "," in name else [name]
        for synonym in dict.fromkeys(part.strip().casefold() for part in parts):
            known.setdefault(synonym, []).append(index)
    found = known.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        indices = " or ".join(str(index) for index in found)
        raise UserError(
            f"Expected `{option}` to name one class, but got {text!r}, which matches "
            f"{len(found)} classes. Pass the index {indices}."
        )
    expected = f"{', '.join(other_words)} or a class" if other_words else "a class"
    raise UserError(
        f"Expected `{option}` to be {expected} of the model, but got {text!r}"
        f"{did_you_mean(wanted, [*other_words, *known])}. An index is accepted as well."
    )
