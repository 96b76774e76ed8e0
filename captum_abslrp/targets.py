"""Target functions for scores other than a class: segments, boxes, similarities, attributes.

A target function maps the model's output to scores. Pass it as ``target`` or ``contrast`` of
:meth:`AbsLRP.attribute <captum_abslrp.AbsLRP.attribute>`. Any function works, for example
``target=lambda out: out["depth"].mean((1, 2))``.

Axes: B samples, K classes, H height, W width, D features, N boxes, Q queries.

Example:
    >>> encoder = timm.create_model("test_vit", num_classes=0).eval()
    >>> x = torch.rand(2, 3, 160, 160)
    >>> reference = encoder(torch.rand(1, 3, 160, 160))[0].detach()
    >>> AbsLRP(encoder).attribute(x, target=Similarity(reference)).shape
    torch.Size([2, 3, 160, 160])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_abslrp.checks import logits_of
from captum_abslrp.engine.arguments import on_host

__all__ = [
    "Attribute",
    "Box",
    "Distance",
    "MeanPooling",
    "Pair",
    "Segment",
    "Similarity",
    "WithKeywords",
]


class _PerSample:
    """Base class of scores whose tensors have one row for all samples or one row per sample.

    Attributes:
        samples: number of samples; 1 if all samples share the same row.
    """

    _fields: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return max((len(getattr(self, name)) for name in self._present()), default=1)

    def _present(self) -> list[str]:
        return [name for name in self._fields if getattr(self, name) is not None]

    def _with(self, change: Callable[[Tensor], Tensor]) -> Any:
        if self.samples == 1:
            return self
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        for name in self._present():
            value = getattr(self, name)
            setattr(copy, name, value if len(value) == 1 else change(value))
        return copy

    def rows(self, start: int, stop: int) -> Any:
        """Return the score for samples `start` to `stop - 1`."""
        return self._with(lambda value: value[start:stop])

    def repeated(self, times: int) -> Any:
        """Return the score for a batch in which each sample is repeated `times` times in a row."""
        return self._with(lambda value: value.repeat_interleave(times, 0))


class Attribute:
    """One output of a multi-label model, which scores several attributes independently.

    The other attributes do not compete with the target, so the map has no contrast.

    Args:
        index: index of the attribute.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
        >>> x = torch.rand(2, 3, 2, 2)
        >>> striped = AbsLRP(model).attribute(x, target=Attribute(3))
        >>> torch.equal(striped, AbsLRP(model).attribute(x, target=3, contrast=None))
        True
    """

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(self, output: Any) -> Tensor:
        """Return the score of the attribute, (B,), from logits (B, K) or an object that has them."""
        scores: Tensor = logits_of(output)
        return scores[:, self._index]

    def __repr__(self) -> str:
        return f"Attribute({self._index})"


class Segment(_PerSample):
    """A class of a segmentation model over a region: why are these pixels a cat?

    The score of each class is its mean over the region, so classes are compared within the region.

    Args:
        index: the class, or a list with one class per sample.
        mask: the region: booleans or weights, (H, W) or (B, H, W), of any resolution. None uses the pixels
            for which the model predicts the class.

    Raises:
        ValueError: when called, if the region of a sample is empty or the output is not a segmentation.

    Example:
        >>> model = nn.Conv2d(3, 5, 3, padding=1).eval()
        >>> x = torch.rand(2, 3, 8, 8)
        >>> mask = torch.zeros(8, 8)
        >>> mask[:4, :4] = 1
        >>> relevance = AbsLRP(model).attribute(x, target=Segment(2, mask))
        >>> bool(relevance[:, :, 5:].any())  # what the region does not see
        False
    """

    _fields = ("_mask", "_index")

    def __init__(self, index: int | Sequence[int], mask: Tensor | None = None) -> None:
        self._index = torch.as_tensor(index).detach().long().reshape(-1)
        if mask is not None and mask.dim() not in (2, 3):
            raise ValueError(
                f"Expected `mask` to have shape (H, W) or (B, H, W), but got {tuple(mask.shape)}."
            )
        self._mask = None if mask is None else mask.detach().float().view(-1, *mask.shape[-2:])

    def __call__(self, output: Any) -> Tensor:
        """Return the mean score of each class over the region, (B, K).

        Args:
            output: scores (B, K, H, W); or an object or dict that has them as ``logits`` or ``out``; or
                mask and class queries, as in Hugging Face's MaskFormer and Mask2Former.
        """
        scores = _pixel_scores(output)
        size = scores.shape[1]
        outside = (self._index < -size) | (self._index >= size)
        if outside.any():
            raise IndexError(
                f"Expected the class of {self!r} to be one of {size} classes, but got "
                f"{int(self._index[outside][0])}."
            )
        if self._mask is None:
            wanted = self._index.remainder(size).to(scores.device).view(-1, 1, 1)
            region = (scores.detach().argmax(1) == wanted).to(scores.dtype)
        else:
            region = self._mask.to(scores)
            if region.shape[1:] != scores.shape[2:]:
                region = F.interpolate(region.unsqueeze(1), scores.shape[2:], mode="area")[:, 0]
        whole = region.sum((1, 2), keepdim=True)
        empty = (whole <= 0).flatten()
        if on_host(empty.any()):
            found = "no pixel of the class" if self._mask is None else "a `mask` that is zero"
            raise ValueError(
                f"Expected a region for {self!r}, but got {found} in sample {empty.tolist().index(True)}. "
                f"Pass a `mask` of the pixels to explain."
            )
        return (scores * (region / whole).unsqueeze(1)).sum((2, 3))

    def __repr__(self) -> str:
        mask = "" if self._mask is None else f", mask of {tuple(self._mask.shape)}"
        return f"Segment({self.index}{mask})"

    @property
    def index(self) -> list[int] | int:
        """The class, or that of each sample."""
        classes: list[int] = self._index.tolist()
        return classes[0] if len(classes) == 1 else classes


def _pixel_scores(output: Any) -> Tensor:
    """Class scores for each pixel, (B, K, H, W)."""
    of_queries = [_entry(output, f"{name}_queries_logits") for name in ("class", "masks")]
    if all(isinstance(part, Tensor) for part in of_queries):  # the last class means "no object"
        classes, masks = of_queries
        return torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    out = _entry(output, "out")
    scores = out if isinstance(out, Tensor) else logits_of(output)
    if not isinstance(scores, Tensor) or scores.dim() != 4:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"Expected the model to return class scores for each pixel, (B, K, H, W), but got {found}. "
            f'Pick them with `output=lambda out: out["..."]`.'
        )
    return scores


def _entry(output: Any, name: str) -> Any:
    """The entry of a dict or attribute of an object with this name, or None."""
    if isinstance(output, Tensor):
        return None
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


class Box(_PerSample):
    """One box of a detector, by its class score: why is this a dog?

    Boxes can move between runs (with other rules, or with noise). Each run therefore uses the detection of
    the class that overlaps the box most. The class score is explained, not the position of the box.

    Args:
        box: x1, y1, x2, y2: (4,), or (B, 4) for one box per sample. In pixels for torchvision's detectors;
            as fractions of width and height for DETR and YOLOS.
        label: its class, or a list of B classes.
        min_iou: minimum intersection over union of the detection with the box.

    Raises:
        ValueError: when called, if no detection overlaps the box enough (for torchvision's detectors: no
            detection of the class), or if the output is not that of a detector.

    Example:
        >>> class Detector(nn.Module):
        ...     def forward(self, x):
        ...         left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
        ...         boxes = torch.tensor([[0.0, 0, 4, 8], [4.0, 0, 8, 8]])
        ...         labels = torch.tensor([1, 1])
        ...         scores = torch.stack([left, right], 1)
        ...         return [{"boxes": boxes, "labels": labels, "scores": s} for s in scores]
        >>> x = torch.rand(1, 3, 8, 8)
        >>> relevance = AbsLRP(Detector().eval()).attribute(x, target=Box([4, 0, 8, 8], 1))
        >>> bool(relevance[..., :4].any()), bool(relevance[..., 4:].all())
        (False, True)
    """

    _fields = ("_box", "_label")

    def __init__(
        self,
        box: Tensor | Sequence[float] | Sequence[Sequence[float]],
        label: int | Sequence[int] | Tensor,
        *,
        min_iou: float = 0.5,
    ) -> None:
        if isinstance(box, (list, tuple)) and box and isinstance(box[0], Tensor):
            box = torch.stack([*map(torch.as_tensor, box)])
        self._box = torch.as_tensor(box).detach().float().reshape(-1, 4)
        self._label = torch.as_tensor(label).detach().long().reshape(-1)
        self.min_iou = min_iou

    @property
    def index(self) -> list[int] | int:
        """The class, or that of each sample."""
        labels: list[int] = self._label.tolist()
        return labels[0] if len(labels) == 1 else labels

    def __call__(self, output: Any) -> Tensor:
        """Return the score of the detection.

        Args:
            output: for torchvision's detectors, a list of B dicts with ``boxes`` (N, 4), ``labels`` (N,) and
                ``scores`` (N,); for Hugging Face's detectors, an object with ``logits`` (B, Q, K) and
                ``pred_boxes`` (B, Q, 4).

        Returns:
            (B,), or (B, K) if the detector scores every class for the same box.
        """
        logits, boxes = _entry(output, "logits"), _entry(output, "pred_boxes")
        if isinstance(logits, Tensor) and isinstance(boxes, Tensor):
            return self._of_queries(logits, boxes.detach())
        if isinstance(output, (list, tuple)) and all(isinstance(d, Mapping) for d in output):
            found = [self._of_image(d, n) for n, d in enumerate(output)]
            # Stacking the scores restores one row per sample.
            return torch.stack(found)
        raise ValueError(
            f"Expected the model to return detections, a list of dicts with `boxes`, `labels` and `scores` "
            f"or an object with `logits` and `pred_boxes`, but got {type(output).__name__}."
        )

    def _of_queries(self, logits: Tensor, boxes: Tensor) -> Tensor:
        center, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([center - size / 2, center + size / 2], -1)
        chosen = []
        for n in range(len(boxes)):
            overlap = self._overlap(corners[n], n)
            # Among queries at the same place, take the most confident one for the class.
            sure = logits[n].detach().float().log_softmax(-1)[:, int(self._row(self._label, n))]
            near = overlap >= self.min_iou
            self._check(near, overlap, n)
            chosen.append(int(sure.masked_fill(~near, -torch.inf).argmax()))
        rows = torch.tensor(chosen, device=logits.device).view(-1, 1, 1)
        return logits.gather(1, rows.expand(-1, 1, logits.shape[2])).squeeze(1)

    def _of_image(self, detections: Mapping[str, Tensor], n: int) -> Tensor:
        of_class = detections["labels"] == self._row(self._label, n).to(detections["labels"])
        overlap = self._overlap(detections["boxes"].detach(), n).where(of_class, -1.0)
        self._check(overlap >= self.min_iou, overlap, n)
        return detections["scores"][int(overlap.argmax())]

    def _check(self, near: Tensor, overlap: Tensor, n: int) -> None:
        if near.any():
            return
        best = float(overlap.max()) if overlap.numel() else -1.0
        found = "no detection of the class" if best < 0 else f"an IoU of at most {best:.2f}"
        raise ValueError(
            f"Expected a detection of class {int(self._row(self._label, n))} that overlaps the box "
            f"{self._row(self._box, n).tolist()} by an IoU of at least {self.min_iou} in sample {n}, but got "
            f"{found}. Use a box and a label that the model detects."
        )

    @staticmethod
    def _row(values: Tensor, n: int) -> Tensor:
        return values[0 if len(values) == 1 else n]

    def _overlap(self, boxes: Tensor, n: int) -> Tensor:
        """Intersection over union of the box with others (N, 4), (N,)."""
        boxes = boxes.float()  # areas in pixels exceed the range of float16
        box = self._row(self._box, n).to(boxes)
        low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
        shared = (high - low).clamp(min=0).prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
        return shared / (areas + (box[2:] - box[:2]).prod() - shared).clamp(min=1e-12)

    def __repr__(self) -> str:
        return f"Box({self._box.tolist()}, {self._label.tolist()})"


class _Reference(_PerSample):
    """Base class of scores that compare embeddings with a reference."""

    _fields = ("_reference",)

    def __init__(
        self, reference: Tensor | None = None, *, embedding: Callable[[Any], Tensor] | None = None
    ) -> None:
        if reference is not None:
            if reference.dim() not in (1, 2, 3) or not reference.is_floating_point():
                raise ValueError(
                    f"Expected `reference` to be floating-point embeddings of shape (D,), (B, D), (1, M, D) "
                    f"or (B, M, D), but got {reference.dtype} of shape {tuple(reference.shape)}."
                )
            reference = reference.detach()
            if reference.dim() < 3:
                reference = reference.reshape(-1, 1, reference.shape[-1])
        self._reference = reference
        self._embedding = embedding

    def _pair(self, output: Any) -> tuple[Tensor, Tensor]:
        """Return embeddings, (B, D), and their references, (1 or B, M, D)."""
        if self._reference is None:
            if not isinstance(output, (list, tuple)) or len(output) != 2:
                raise ValueError(
                    f"Expected the model to return a pair of embeddings, because `reference` is None, but "
                    f"got {type(output).__name__}. Explain `Pair(encoder)`, or pass a reference."
                )
            first, second = map(self._embedded, output)
            return first, second.unsqueeze(1)
        found = self._embedded(output)
        if self._reference.shape[-1] != found.shape[-1]:
            raise ValueError(
                f"Expected the embeddings of the model and the reference to have the same size, but got "
                f"{found.shape[-1]} and {self._reference.shape[-1]}. Compute the reference with the same "
                f"model."
            )
        return found, self._reference.to(found)

    def _embedded(self, output: Any) -> Tensor:
        found = _embedding_of(output) if self._embedding is None else self._embedding(output)
        if not isinstance(found, Tensor) or found.dim() != 2:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"Expected the model to return embeddings (B, D), but got {got}. Pick them, for example the "
                f"class token: `{type(self).__name__}(..., embedding=lambda out: "
                f"out.last_hidden_state[:, 0])`."
            )
        return found

    def __repr__(self) -> str:
        shape = "a pair" if self._reference is None else tuple(self._reference.shape)
        return f"{type(self).__name__}({shape})"


def _embedding_of(output: Any) -> Any:
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        found = _entry(output, name)
        if isinstance(found, Tensor):
            return found
    return output


class Similarity(_Reference):
    """Cosine similarity of embeddings: why does this image look like that one?

    Args:
        reference: the embedding to compare with, (D,), or one per sample, (B, D), computed by the same model,
            ``model(other_image)``. For several references, (1, M, D) or (B, M, D), the score is the mean
            similarity; such a score of other images suits the contrast,
            ``contrast=Similarity(others[None])``. None means that the model returns a pair of embeddings,
            see :class:`Pair`.
        embedding: a function that picks the embedding, (B, D), from the model's output. None uses the
            returned tensor, or ``image_embeds``, ``text_embeds`` or ``pooler_output`` of an object.

    Raises:
        ValueError: if the reference has the wrong shape; when called, if the output is not an embedding.

    Example:
        >>> encoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
        >>> x, other = torch.randn(2, 3), torch.randn(3)
        >>> like_other = Similarity(encoder(other))
        >>> AbsLRP(encoder).attribute(x, target=like_other).shape
        torch.Size([2, 3])
        >>> rather_than_these = Similarity(encoder(torch.randn(1, 5, 3)))
        >>> AbsLRP(encoder).attribute(x, target=like_other, contrast=rather_than_these).shape
        torch.Size([2, 3])
    """

    def __call__(self, output: Any) -> Tensor:
        """Return the similarity, (B,), averaged over the references."""
        found, reference = self._pair(output)
        # The product acts as a linear layer whose weights are the references, and gets the rule of one. The
        # division by the lengths comes last, so that it only scales the output.
        products = found.unsqueeze(1) @ reference.mT
        lengths = found.norm(dim=-1)[:, None, None] * reference.norm(dim=-1).unsqueeze(1)
        return (products / lengths.clamp(min=1e-12)).mean((1, 2))


class Distance(_Reference):
    """Euclidean distance between embeddings: why is this image far from that one?

    Args:
        reference, embedding: as in :class:`Similarity`.

    Raises:
        ValueError: as in :class:`Similarity`.

    Example:
        >>> encoder = nn.Linear(3, 4).eval()
        >>> far = Distance(encoder(torch.rand(3)))
        >>> AbsLRP(encoder).attribute(torch.rand(2, 3), target=far).shape
        torch.Size([2, 3])
    """

    def __call__(self, output: Any) -> Tensor:
        """Return the distance, (B,), averaged over the references."""
        found, reference = self._pair(output)
        apart = found.unsqueeze(1) - reference
        return apart.pow(2).sum(-1).sqrt().mean(1)


class Pair(nn.Module):
    """Encode two inputs with the same encoder, to explain their similarity with respect to both.

    Args:
        encoder: a module that maps inputs to embeddings, (B, D), or to an object that has them.

    Example:
        >>> encoder = nn.Linear(3, 4).eval()
        >>> a, b = torch.rand(2, 3), torch.rand(2, 3)
        >>> of_a, of_b = AbsLRP(Pair(encoder)).attribute((a, b), target=Similarity())
        >>> of_a.shape, of_b.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.training = encoder.training  # `train()` would change modules inside

    def forward(self, first: Tensor, second: Tensor) -> tuple[Any, Any]:
        """Return the encoder's outputs for both inputs."""
        return self.encoder(first), self.encoder(second)


class WithKeywords(nn.Module):
    """Call a module with its positional arguments as keywords, plus fixed keyword arguments.

    The explained inputs must be the first arguments of a model. Many Hugging Face models have a different
    order: CLIP takes texts before images.

    Args:
        model: the module.
        names: the keywords for the positional arguments, in order.
        fixed: keyword arguments that are the same in each call, such as the texts to compare images with.

    Example:
        >>> class Both(nn.Module):
        ...     def forward(self, texts, images):
        ...         return images @ texts.T
        >>> images_first = WithKeywords(Both(), "images", texts=torch.rand(4, 3)).eval()
        >>> AbsLRP(images_first).attribute(torch.rand(2, 3), target=1).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, *names: str, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.fixed = fixed
        self.training = model.training  # `train()` would change modules inside

    def forward(self, *args: Any) -> Any:
        """Return the output of the module for these arguments."""
        if len(args) > len(self.names):
            raise TypeError(
                f"Expected at most {len(self.names)} arguments, {', '.join(self.names)}, but got "
                f"{len(args)}."
            )
        return self.model(**dict(zip(self.names, args)), **self.fixed)


class MeanPooling(nn.Module):
    """Compute sentence embeddings as the mean of the token vectors, excluding padding.

    Most sentence-transformers models use this pooling. It is part of the module because it needs the
    attention mask.

    Args:
        model: a module that maps token ids, (B, L), to vectors, (B, L, D), or to an object or dict that has
            them as ``last_hidden_state``.

    Raises:
        ValueError: when called, if the model does not return one vector per token.

    Example:
        >>> class Words(nn.Embedding):
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return super().forward(input_ids).relu()
        >>> encoder = MeanPooling(Words(9, 4)).eval()
        >>> ids, mask = torch.tensor([[1, 5, 0], [8, 3, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> sentences = encoder(ids, mask)
        >>> torch.allclose(sentences[0], encoder(ids[:1, :2])[0])
        True
        >>> like_the_other = Similarity(sentences.flip(0))
        >>> LayerAbsLRP(encoder, encoder.model).attribute(ids, like_the_other, mask).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # `train()` would change modules inside

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Return sentence embeddings, (B, D).

        Args:
            input_ids: token ids, (B, L).
            attention_mask: 1 for tokens, 0 for padding, (B, L). None means no padding.
            others: other keyword arguments of the model.
        """
        if attention_mask is not None:
            others["attention_mask"] = attention_mask
        output = self.model(input_ids, **others)
        found = output if isinstance(output, Tensor) else _entry(output, "last_hidden_state")
        if not isinstance(found, Tensor) or found.shape[:-1] != input_ids.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
            raise ValueError(
                f"Expected the model to return one vector for each of {tuple(input_ids.shape)} tokens, or "
                f"an object with `last_hidden_state`, but got {got}. Pass the encoder without its head."
            )
        if attention_mask is None:
            return found.mean(1)
        counts = attention_mask.to(found.dtype).unsqueeze(-1)
        return (found * counts).sum(1) / counts.sum(1).clamp(min=1)
