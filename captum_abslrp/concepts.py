"""Concepts: the channels of a layer that are relevant for a class, and example images that illustrate them.

The concept of a channel is illustrated by the images with the most relevance through it (relevance
maximization, Achtibat et al., *From attribution maps to human-understandable explanations through Concept
Relevance Propagation*, Nature Machine Intelligence 5, 2023). The map of a channel is the part of the map of
the class that flows through it, :meth:`LayerAbsLRP.attribute(select=...)
<captum_abslrp.LayerAbsLRP.attribute>`.

Axes: N images of a data set, B images of a batch, D channels, C color channels, H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_abslrp.layer import LayerAbsLRP
from captum_abslrp.report import Section
from captum_abslrp.seeds import Contrast
from captum_abslrp.selection import channel_dimension
from captum_abslrp.visualization import SMOOTHED, plot_overlays, smooth_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Concepts", "Example", "concept_section", "find_concepts", "plot_concepts"]


@dataclass(frozen=True)
class Example:
    """An image of a data set, and the relevance of its class that flows through a channel.

    Attributes:
        image: index of the image in the data set.
        target: the class that was explained.
        relevance: the sum of the channel's relevance.
    """

    image: int
    target: int
    relevance: float


@dataclass(frozen=True, eq=False)
class Concepts:
    """The relevance of the channels of a layer for the images of a data set, from :func:`find_concepts`.

    Attributes:
        relevance: the sum of the relevance of each channel over positions, (N, D).
        targets: the class that was explained for each image, (N,).

    Example:
        >>> relevance = torch.tensor([[0.1, 0.6], [0.2, 0.9], [0.8, 0.1]])
        >>> concepts = Concepts(relevance, torch.tensor([7, 7, 3]))
        >>> concepts.top_channels(7, 1)
        [(1, 0.75)]
        >>> concepts.examples(1, 2)
        [Example(image=1, target=7, relevance=0.9), Example(image=0, target=7, relevance=0.6)]
    """

    relevance: Tensor
    targets: Tensor

    @property
    def classes(self) -> list[int]:
        """The classes of the data set, in order."""
        found: list[int] = self.targets.unique().tolist()
        return found

    def top_channels(self, target: int, count: int = 5) -> list[tuple[int, float]]:
        """Return the most relevant channels for a class.

        Args:
            target: the class.
            count: maximum number of channels.

        Returns:
            Pairs of a channel and its mean relevance over the images of the class, in descending order.

        Raises:
            ValueError: if no image was explained for the class.
        """
        rows = self.relevance[self.targets == target]
        if len(rows) == 0:
            raise ValueError(
                f"Expected `target` to be a class of the data set, {self.classes}, but got {target}."
            )
        values, channels = rows.mean(0).topk(min(count, rows.shape[1]))
        return [(int(c), _rounded(v)) for c, v in zip(channels, values)]

    def examples(self, channel: int, count: int = 5, *, target: int | None = None) -> list[Example]:
        """Return the images with the most relevance through a channel.

        Args:
            channel: the channel.
            count: maximum number of images.
            target: restricts the result to images of this class; None includes all classes.

        Raises:
            IndexError: if there is no such channel.
        """
        channels = self.relevance.shape[1]
        if not 0 <= channel < channels:
            raise IndexError(
                f"Expected `channel` to be between 0 and {channels - 1}, but got {channel}."
            )
        images = torch.arange(len(self.targets))
        if target is not None:
            images = images[self.targets == target]
        values = self.relevance[images, channel]
        order = values.argsort(descending=True, stable=True)[:count]
        return [
            Example(int(images[i]), int(self.targets[images[i]]), _rounded(values[i]))
            for i in order.tolist()
        ]


def _rounded(value: Tensor) -> float:
    """A number rounded to the precision of float32."""
    return float(f"{float(value):.6g}")


def find_concepts(
    attributor: LayerAbsLRP,
    batches: Iterable[tuple[Tensor, Any]],
    *,
    contrast: Contrast = "others",
    channel_dim: int | None = None,
) -> Concepts:
    """Compute the relevance of each channel of a layer for each image of a data set.

    Args:
        attributor: the attributor of a single layer, which returns one tensor.
        batches: pairs of images, (B, ...), and targets, one class per image, (B,) or a list; for example a
            ``DataLoader``.
        contrast: as in :meth:`AbsLRP.attribute <captum_abslrp.AbsLRP.attribute>`.
        channel_dim: the channel dimension; None selects it as ``select_dim`` of
            :meth:`LayerAbsLRP.attribute <captum_abslrp.LayerAbsLRP.attribute>` does.

    Returns:
        The relevance of all images, in the order of the batches.

    Raises:
        ValueError: if there are no batches, or if a batch does not have one target per image.
        TypeError: if the attributor explains several layers, or inputs instead of a layer.

    Example:
        >>> model = timm.create_model("test_resnet").eval()
        >>> data = [(torch.rand(2, 3, 64, 64), [3, 7]), (torch.rand(1, 3, 64, 64), [3])]
        >>> concepts = find_concepts(LayerAbsLRP(model, model.layer3), data)
        >>> concepts.relevance.shape, concepts.classes
        (torch.Size([3, 192]), [3, 7])
    """
    if not isinstance(attributor, LayerAbsLRP) or isinstance(attributor.layer, list):
        raise TypeError(
            f"Expected `attributor` to be a `LayerAbsLRP` of one layer, but got {attributor!r}."
        )
    found, targets = [], []
    for images, classes in batches:
        of_batch = torch.as_tensor(classes).reshape(-1).cpu()
        if len(of_batch) != len(images):
            raise ValueError(
                f"Expected one target for each of the {len(images)} images of a batch, but got "
                f"{len(of_batch)}."
            )
        relevance = attributor.attribute(images, of_batch, contrast=contrast)
        if not isinstance(relevance, Tensor):
            raise ValueError(
                f"Expected the layer to return one tensor, but got {len(relevance)}. Choose a layer inside "
                f"it."
            )
        at = channel_dim
        if at is None:
            at = channel_dimension(attributor.layer, relevance)
        channels = relevance.movedim(at, 1).flatten(2) if relevance.dim() > 2 else relevance
        found.append((channels.sum(2) if channels.dim() > 2 else channels).cpu())
        targets.append(of_batch)
    if not found:
        raise ValueError("Expected `batches` to yield at least one batch, but got none.")
    return Concepts(torch.cat(found), torch.cat(targets))


def plot_concepts(
    concepts: Concepts,
    attributor: LayerAbsLRP,
    images: Sequence[Tensor],
    target: int,
    *,
    channels: int | Sequence[int] = 4,
    examples: int = 4,
    contrast: Contrast = "others",
    show: Callable[[Tensor], Tensor] | None = None,
    names: Sequence[str] | None = None,
    crop: float = 0.5,
    channel_dim: int | None = None,
    smoothing: int = 1,
) -> Figure:
    """Plot one row per channel with the images it is most relevant for, cropped around its relevance.

    Args:
        concepts: the result of :func:`find_concepts`.
        attributor: the attributor that was passed to :func:`find_concepts`.
        images: the data set in the same order, as model inputs (C, H, W).
        target: the class whose channels are shown.
        channels: the number of channels, or a list of channels.
        examples: number of images per channel, of any class.
        contrast: as in :func:`find_concepts`.
        show: a function that maps a model input to a picture with values in [0, 1]; None shows the input
            unchanged.
        names: names of all classes; None shows their indices.
        crop: height and width of the crop, as a fraction of the image; 1 shows whole images.
        channel_dim: as in :func:`find_concepts`.
        smoothing: number of pixels that maps are smoothed over, see
            :func:`~captum_abslrp.visualization.smooth_map`.

    Returns:
        A figure. The map on each picture is the relevance that flows through the channel.

    Raises:
        ValueError: if ``crop`` is not in (0, 1], or as in :meth:`Concepts.top_channels`.

    Example:
        >>> model = timm.create_model("test_resnet").eval()
        >>> images = torch.rand(4, 3, 64, 64)
        >>> layer = LayerAbsLRP(model, model.layer3)
        >>> concepts = find_concepts(layer, [(images, [3, 3, 7, 7])])
        >>> figure = plot_concepts(concepts, layer, images, 3, channels=2, examples=3)
        >>> type(figure).__name__
        'Figure'
    """
    if not 0 < crop <= 1:
        raise ValueError(
            f"Expected `crop` to be a fraction of the image, in (0, 1], but got {crop!r}."
        )
    top = dict(concepts.top_channels(target, concepts.relevance.shape[1]))
    chosen = [*top][:channels] if isinstance(channels, int) else [*channels]
    total = sum(max(value, 0.0) for value in top.values())
    pictures: list[list[Tensor]] = []
    maps: list[list[Any]] = []
    above: list[list[str]] = []
    for channel in chosen:
        of_channel = concepts.examples(channel, examples)
        parts = [
            attributor.attribute(
                images[example.image][None],
                example.target,
                contrast=contrast,
                select=channel,
                select_dim=channel_dim,
            )[0]
            for example in of_channel
        ]
        drawn = [smooth_map(part.detach().cpu(), smoothing) for part in parts]
        windows = [_window(relevance, crop) for relevance in drawn]
        inputs = [images[example.image].detach().cpu() for example in of_channel]
        shown = inputs if show is None else [*map(show, inputs)]
        pictures.append([picture[..., r, c] for picture, (r, c) in zip(shown, windows)])
        maps.append([relevance[r, c] for relevance, (r, c) in zip(drawn, windows)])
        above.append([f"image {e.image}, {_name(names, e.target)}" for e in of_channel])
    of_class = _name(names, target)
    return plot_overlays(
        pictures,
        maps,
        row_labels=[
            f"channel {c}\n{max(top[c], 0.0) / max(total, 1e-30):.0%} of relevance" for c in chosen
        ],
        cell_labels=above,
        title=f"Most relevant channels for {of_class}, and the images with the most relevance through each",
        note=SMOOTHED.format(smoothing) if smoothing > 1 else None,
    )


def concept_section(figures: Sequence[tuple[str, Figure]], *, title: str = "Concepts") -> Section:
    """Return a section of an HTML report with figures of concepts.

    Args:
        figures: pairs of an alternative text and a figure from :func:`plot_concepts`.
        title: heading of the section.

    Returns:
        A section for :func:`captum_abslrp.report.render`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> section = concept_section([("channels that matter for a cat", Figure(figsize=(1, 1)))])
        >>> section.title, [*section.figures]
        ('Concepts', ['channels that matter for a cat'])
    """
    pngs = {}
    for alt, figure in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pngs[alt] = file.getvalue()
    note = (
        "Each row is a channel of a layer, with its share of the relevance of the class. The pictures are "
        "crops of the images with the most relevance through the channel. Colors show the part of the map "
        "of each image's class that flows through the channel."
    )
    return Section(title, figures=pngs, notes=[note])


def _name(names: Sequence[str] | None, index: int) -> str:
    return f"class {index}" if names is None else names[index].split(",")[0]


def _window(relevance: Any, share: float) -> tuple[slice, slice]:
    """Rows and columns of the window with the most positive relevance."""
    values = torch.from_numpy(np.ascontiguousarray(relevance)).clamp(min=0)[None, None].double()
    height, width = values.shape[2:]
    size = max(1, round(share * height)), max(1, round(share * width))
    sums = torch.nn.functional.avg_pool2d(values, size, stride=1)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return slice(row, row + size[0]), slice(column, column + size[1])
