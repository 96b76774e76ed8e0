"""``captum-abslrp explain --concepts LAYER``: a section of the report about the channels of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.cli.files import UserError, progress
from captum_abslrp.cli.models import Subject
from captum_abslrp.concepts import concept_section, find_concepts, plot_concepts
from captum_abslrp.layer import LayerAbsLRP
from captum_abslrp.report import Section
from captum_abslrp.text import did_you_mean

MOST_CLASSES = 3
"""Maximum number of classes whose channels are shown; classes with more images come first."""


def find_layer(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a model at a path, such as ``layer3`` or ``blocks.6``."""
    modules = dict(model.named_modules())
    if not path or path not in modules:
        raise UserError(
            f"Expected `--concepts` to be the path of a layer of the model, but got {path!r}"
            f"{did_you_mean(path, [name for name in modules if name])}. List the layers with "
            f"`captum-abslrp inspect`."
        )
    return modules[path]


def section_of(
    subject: Subject,
    method: AbsLRP,
    path: str,
    images: Sequence[Path],
    *,
    target: int | None,
    smoothing: int,
    device: torch.device,
) -> Section:
    """Create the section of a report about the channels of a layer, over all images.

    Args:
        subject: the model.
        method: the attributor.
        path: path of the layer.
        images: readable image files.
        target: the class to explain for all images; None for the predicted class of each.
        smoothing: number of pixels that maps are smoothed over.
        device: the device of the model.
    """
    inputs = [subject.read(image) for image in images]
    with torch.no_grad():
        targets = [
            int(subject.model(x[None].to(device)).argmax()) if target is None else target
            for x in inputs
        ]
    layer = LayerAbsLRP(
        subject.model,
        find_layer(subject.model, path),
        method.mapping,
        normalization=method.normalization,
        output=method.output,
    )
    contrast = "softmax" if method.contrast == "softmax" else "others"
    batches = ((x[None].to(device), [t]) for x, t in zip(inputs, targets, strict=True))
    steps = progress(batches, "images", show=len(inputs) > 1)
    try:
        concepts = find_concepts(layer, steps, contrast=contrast)
        figures = []
        for index, _ in Counter(targets).most_common(MOST_CLASSES):
            figure = plot_concepts(
                concepts,
                layer,
                [x.to(device) for x in inputs],
                index,
                show=lambda x: subject.show(x.cpu()),
                names=subject.names,
                contrast=contrast,
                smoothing=smoothing,
            )
            label = subject.label(index)
            figures.append((f"most relevant channels of {path} for {label}", figure))
    except ValueError as error:
        raise UserError(
            f"`--concepts {path}` is not possible for {type(subject.model).__name__}: {error}"
        ) from error
    return concept_section(figures, title=f"Concepts: channels of {path}")
