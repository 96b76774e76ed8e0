"""Scores of all kinds as targets: functions of the output, and those of :mod:`captum_abslrp.targets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import NoiseTunnel
from torch import Tensor, nn

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, demo
from captum_abslrp.targets import (
    Attribute,
    Box,
    Distance,
    Pair,
    Segment,
    Similarity,
    WithKeywords,
)
from tests.conftest import relative_error
from tests.test_no_trace import no_trace

KINDS: dict[str, Callable[..., AbsLRP]] = {
    "separate": AbsLRP,
    "joint": lambda model, **o: AbsLRP(model, normalization="joint", **o),
    "recommended": AbsLRP.recommended,
    "epsilon": LRP,
}


def double(name: str) -> nn.Module:
    model: nn.Module = demo.load_model(name).double()
    return model


def images(count: int = 3, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_one_score_is_the_class_alone(kind: str) -> None:
    model, x = double("resnet"), images()
    attributor = KINDS[kind](model)
    with no_trace(model):
        found = attributor.attribute(x, target=lambda out: out[:, 2])
    expected = attributor.attribute(x, target=2, contrast=None)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_functions_are_compared_as_classes_are(kind: str) -> None:
    model, x = double("vit"), images()
    attributor = KINDS[kind](model)
    found = attributor.attribute(
        x, target=lambda out: out[:, 2], contrast=lambda out: out[:, [0, 1]].mean(1)
    )
    backwards = attributor.attribute(
        x, target=lambda out: out[:, [0, 1]].mean(1), contrast=lambda out: out[:, 2]
    )
    two_classes = attributor.attribute(
        x, target=lambda out: out[:, 2], contrast=lambda out: out[:, 0]
    )
    assert relative_error(two_classes, attributor.attribute(x, 2, contrast=0)) < 1e-9
    assert relative_error(found, two_classes) > 0.01
    if attributor.combine == "difference":
        assert relative_error(found, -backwards) < 1e-12
    else:
        assert relative_error(found, backwards) > 0.1


def test_of_scores_of_classes_the_predicted_one_is_explained_against_the_others() -> None:
    model, x = double("vgg"), images()
    found = AbsLRP(model).attribute(x, target=lambda out: out[:, 3:8])
    with torch.no_grad():
        predicted = model(x)[:, 3:8].argmax(1)
    expected = AbsLRP(model, output=lambda out: out[:, 3:8]).attribute(x, predicted)
    assert torch.equal(found, expected)
    of_two = AbsLRP(model).attribute(x, target=lambda out: out[:, 3:8], contrast="softmax")
    assert relative_error(of_two, found) > 1e-3


def test_a_function_gets_what_output_picks() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = double("resnet")

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.model(x), "features": self.model(x) * 2}

    x = images(2)
    whole = AbsLRP(Returns().eval())
    part = AbsLRP(Returns().eval(), output=lambda out: out["features"])
    found = whole.attribute(x, target=lambda out: out["features"][:, 1])
    assert torch.equal(found, part.attribute(x, target=lambda features: features[:, 1]))


def test_a_layer_and_a_program_explain_functions_too() -> None:
    model, x = double("vit"), images(2)

    def score(out: Tensor) -> Tensor:
        return out[:, 1] + out[:, 4]

    block = model.blocks[0]
    of_layer = LayerAbsLRP(model, block).attribute(x, target=score)
    expected = LayerAbsLRP(model, block, output=lambda out: score(out)[:, None]).attribute(x, 0)
    assert torch.equal(of_layer, expected)
    attributor = AbsLRP(ENCODER)
    for contrast in ("others", lambda out: out[:, 2]):
        program = attributor.trace(torch.randn(2, 6).double(), target=score, contrast=contrast)
        other = torch.randn(2, 6).double()
        _, relevance = program(other)
        assert torch.equal(relevance, attributor.attribute(other, score, contrast=contrast))
        with pytest.raises(ValueError, match="traced without a target or with a function"):
            program(other, target=1)


ENCODER = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).double().eval()


@pytest.mark.parametrize("size", [1, 2, None])
@pytest.mark.parametrize("score", [Similarity, Distance])
def test_samples_have_references_of_their_own(score: Any, size: int | None) -> None:
    x, references = torch.randn(5, 6).double(), torch.randn(5, 5).double()
    attributor = AbsLRP(ENCODER)
    found = attributor.attribute(x, target=score(references), internal_batch_size=size)
    for i in range(5):
        alone = attributor.attribute(x[i : i + 1], target=score(references[i]))
        torch.testing.assert_close(found[i : i + 1], alone)


def test_copies_of_samples_keep_their_reference() -> None:
    x, references = torch.randn(3, 6).double(), torch.randn(3, 5).double()
    tunnel = NoiseTunnel(AbsLRP(ENCODER))
    options: dict[str, Any] = {"nt_type": "smoothgrad", "nt_samples": 4, "stdevs": 1e-9}
    found = tunnel.attribute(x, target=Similarity(references), **options)
    expected = AbsLRP(ENCODER).attribute(x, target=Similarity(references))
    assert relative_error(found, expected) < 1e-5


LINEAR = nn.Linear(6, 4, bias=False).double().eval()


def test_the_similarity_of_a_linear_encoder_is_its_closed_form() -> None:
    x = torch.randn(3, 6).double()
    w, f = LINEAR.weight.detach(), LINEAR(x).detach()
    e = F.normalize(f + torch.randn(3, 4).double(), dim=1)
    similar = F.cosine_similarity(f, e)
    # Signed: each product of weight and input, at the length that f has.
    contributions = x.unsqueeze(1) * w * (e / f.norm(dim=1, keepdim=True)).unsqueeze(2)
    signed = LRP(LINEAR).attribute(x, target=Similarity(e * 3))
    torch.testing.assert_close(signed, contributions.sum(1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(signed.sum(1), similar, rtol=1e-6, atol=1e-8)
    # Positive: of the features that speak for it, what raises them.
    of_features = (f * e).clamp(min=0)
    of_features /= of_features.sum(1, keepdim=True)
    raised = (x.unsqueeze(1) * w).clamp(min=0) * (of_features / f.abs()).unsqueeze(2)
    positive = raised.sum(1) / raised.sum((1, 2)).unsqueeze(1)
    torch.testing.assert_close(AbsLRP(LINEAR).attribute(x, target=Similarity(e)), positive)


def test_a_pair_has_the_closed_form_on_both_sides() -> None:
    a, b = torch.randn(2, 3, 6).double()
    w = LINEAR.weight.detach()
    fa, fb = (F.normalize(LINEAR(v).detach(), dim=1) for v in (a, b))
    pair = LRP(Pair(LINEAR))
    of_a, of_b = pair.attribute((a, b), target=Similarity())
    for x, other, relevance in ((a, fb, of_a), (b, fa, of_b)):
        length = LINEAR(x).detach().norm(dim=1, keepdim=True)
        half = (x.unsqueeze(1) * w * (other / length).unsqueeze(2)).sum(1) / 2
        torch.testing.assert_close(relevance, half, rtol=1e-6, atol=1e-8)
    # Both sides together are the similarity.
    both = of_a.sum(1) + of_b.sum(1)
    torch.testing.assert_close(both, (fa * fb).sum(1), rtol=1e-6, atol=1e-8)
    swapped = pair.attribute((b, a), target=Similarity())
    torch.testing.assert_close(swapped[0], of_b)


@pytest.mark.parametrize("contrast", [None, "softmax"])
def test_both_sides_of_a_pair_are_explained_where_one_would_be_guided(contrast: Any) -> None:
    encoder = double("vit")
    encoder.reset_classifier(0)
    a, b = images(4).chunk(2)
    attributor = AbsLRP.recommended(Pair(encoder))
    assert attributor.combine == "guided"
    found = attributor.attribute((a, b), target=Similarity(), contrast=contrast)
    expected = attributor.attribute((a, b), target=Similarity(), combine="difference")
    assert len(found) == 2
    for side, same in zip(found, expected, strict=True):
        assert side.shape == a.shape and torch.equal(side, same)
    assert relative_error(found[0], found[1]) > 0.1
    if contrast is None:  # as it may be said, too
        said = attributor.attribute((a, b), Similarity(), contrast=None, combine="guided")
        assert len(said) == 2 and torch.equal(said[1], found[1])


def test_what_a_distance_comes_from() -> None:
    """Where only the second feature differs, its inputs alone are relevant, by the sign of the difference."""
    encoder = nn.Linear(4, 2, bias=False).double().eval()
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]]))
    x = torch.ones(1, 4).double()
    farther = AbsLRP(encoder).attribute(x, target=Distance(torch.tensor([3.0, 1.0]).double()))
    torch.testing.assert_close(farther, torch.tensor([[0.0, 0, 1, 2]]).double() / 3)
    # What raises a feature brings it nearer to a reference that is higher.
    nearer = AbsLRP(encoder).attribute(x, target=Distance(torch.tensor([3.0, 5.0]).double()))
    torch.testing.assert_close(nearer, -torch.tensor([[0.0, 0, 1, 2]]).double() / 3)


def test_several_references_count_as_their_mean() -> None:
    x, others = torch.randn(2, 6).double(), torch.randn(1, 3, 5).double()
    several = LRP(ENCODER).attribute(x, target=Similarity(others))
    single = [LRP(ENCODER).attribute(x, target=Similarity(other)) for other in others[0]]
    torch.testing.assert_close(several, torch.stack(single).mean(0))
    this = Similarity(others[0, 0])
    difference = LRP(ENCODER).attribute(x, target=this, contrast=Similarity(others))
    torch.testing.assert_close(difference, single[0] - several)


@pytest.mark.parametrize("written", ["norm", "normalize", "linalg"])
def test_a_norm_written_out_is_a_constant_of_signed_rules(written: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "norm": lambda f: f / f.norm(dim=-1, keepdim=True),
        "normalize": lambda f: F.normalize(f, dim=-1),
        "linalg": lambda f: f.div(torch.linalg.vector_norm(f, dim=-1, keepdim=True)),
    }
    x, e = torch.randn(3, 6).double(), torch.randn(5).double()
    found = LRP(ENCODER).attribute(x, target=lambda f: ways[written](f) @ F.normalize(e, dim=0))
    torch.testing.assert_close(found, LRP(ENCODER).attribute(x, target=Similarity(e)))


class Colors(nn.Module):
    """Segments red, green and blue: the score of a class is what its color has around a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
        nn.init.constant_(self.around.weight, 1 / 25)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.around(x)[:, :, ::2, ::2]}


def painted() -> Tensor:
    """Red on the left, green at the upper right, blue at the lower right, (1, 3, 16, 16)."""
    x = torch.zeros(1, 3, 16, 16)
    x[:, 0, :, :8] = 1
    x[:, 1, :8, 8:] = 1
    x[:, 2, 8:, 8:] = 1
    return x


REGIONS = {
    0: (slice(None), slice(0, 8)),
    1: (slice(0, 8), slice(8, None)),
    2: (slice(8, None),) * 2,
}


@pytest.mark.parametrize("index", REGIONS)
@pytest.mark.parametrize("contrast", [None, "others"])
def test_a_segment_points_at_its_region(index: int, contrast: str | None) -> None:
    x = painted()
    relevance = AbsLRP(Colors().eval()).attribute(x, target=Segment(index), contrast=contrast)
    rows, columns = REGIONS[index]
    inside = relevance[:, :, rows, columns].clamp(min=0).sum()
    assert inside / relevance.clamp(min=0).sum() > 0.9


def test_a_mask_chooses_where_a_segment_is_explained() -> None:
    x = painted()
    upper = torch.zeros(16, 16)
    upper[:8, :8] = 1
    lower = upper.flip(0)
    model = Colors().eval()
    both = torch.cat([x, x])
    found = AbsLRP(model).attribute(both, Segment(0, torch.stack([upper, lower])), contrast=None)
    assert not found[0, :, 11:].any() and found[0, 0, :8, :8].all()
    assert not found[1, :, :5].any() and found[1, 0, 8:, :8].all()
    one_by_one = AbsLRP(model).attribute(
        both, Segment(0, torch.stack([upper, lower])), contrast=None, internal_batch_size=1
    )
    torch.testing.assert_close(one_by_one, found)
    with pytest.raises(ValueError, match=r"got no pixel of the class in sample 0\. Pass a `m"):
        AbsLRP(model).attribute(
            x * torch.tensor([0.0, 1, 1]).view(1, 3, 1, 1) + x.flip(3) * 0.1, Segment(0)
        )
    with pytest.raises(ValueError, match=r"got a `mask` that is zero in sample 0"):
        AbsLRP(model).attribute(x, Segment(0, torch.zeros(16, 16)))
    with pytest.raises(IndexError, match="to be one of 3 classes, but got 7"):
        AbsLRP(model).attribute(x, Segment(7))
    with pytest.raises(ValueError, match=r"\(B, K, H, W\), but got \(1, 4\)"):
        AbsLRP(LINEAR).attribute(torch.rand(1, 6).double(), Segment(0))


class Detector(nn.Module):
    """Finds squares of 8 by 8: class 1 red, class 2 green; each score sees 12 by 12 pixels around."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
        self.cells = nn.Conv2d(3, 2, 8, 8, bias=False)
        with torch.no_grad():
            self.smooth.weight.fill_(1 / 25)
            self.cells.weight.zero_()
            self.cells.weight[0, 0] = self.cells.weight[1, 1] = 1 / 64
            self.cells.weight[0, 1] = self.cells.weight[1, 0] = -1 / 64

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        logits = self.cells(self.smooth(x).relu()).flatten(2)
        n = x.shape[-1] // 8
        row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        corner = torch.stack([column.flatten(), row.flatten()], 1) * 8.0
        boxes = torch.cat([corner, corner + 8], 1)
        found = []
        for of_image in logits:
            scores, labels = of_image.sigmoid().max(0)
            kept = scores > 0.55
            found.append({"boxes": boxes[kept], "labels": labels[kept] + 1, "scores": scores[kept]})
        return found


def scene(*squares: tuple[int, int, int]) -> Tensor:
    """Squares of a channel at a row and a column of the grid, (1, 3, 32, 32)."""
    x = torch.zeros(1, 3, 32, 32)
    for channel, row, column in squares:
        x[:, channel, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    return x


def test_a_box_is_explained_by_what_is_in_it() -> None:
    x = torch.cat([scene((0, 0, 0), (1, 2, 3)), scene((1, 1, 1), (0, 3, 0))])
    detector = Detector().eval()
    boxes, labels = [[24.0, 16, 32, 24], [1, 25, 9, 33]], [2, 1]
    with no_trace(detector):
        found = AbsLRP(detector).attribute(x, target=Box(boxes, labels))
    places = [(slice(16, 24), slice(24, 32)), (slice(24, 32), slice(0, 8))]
    for relevance, (rows, columns), box in zip(found, places, boxes, strict=True):
        assert relevance[:, rows, columns].sum() / relevance.sum() > 0.95
        outside = relevance.clone()
        left, top = int(box[0]) // 8 * 8, int(box[1]) // 8 * 8
        outside[:, max(top - 2, 0) : top + 10, max(left - 2, 0) : left + 10] = 0
        assert not outside.any()  # beyond what the score sees
    alone = AbsLRP(detector).attribute(x[1:], target=Box(boxes[1], 1))
    torch.testing.assert_close(found[1:], alone)


def test_a_box_that_is_not_found_is_refused() -> None:
    detector, x = Detector().eval(), scene((0, 0, 0), (1, 2, 3))
    with pytest.raises(
        ValueError, match=r"class 1 that overlaps the box .* got an IoU of at most 0\.00"
    ):
        AbsLRP(detector).attribute(x, target=Box([16, 16, 24, 24], 1))
    with pytest.raises(ValueError, match=r"class 3 .* but got no detection of the class"):
        AbsLRP(detector).attribute(x, target=Box([0, 0, 8, 8], 3))
    shifted = Box([2, 2, 10, 10], 1, min_iou=0.3)  # matched by overlap
    assert AbsLRP(detector).attribute(x, target=shifted)[:, :, :8, :8].any()
    with pytest.raises(ValueError, match=r"detections, .* but got Tensor"):
        AbsLRP(LINEAR).attribute(torch.rand(1, 6).double(), target=Box([0, 0, 1, 1], 0))


def test_attributes_do_not_compete() -> None:
    model, x = double("resnet"), images(2)
    found = AbsLRP(model).attribute(x, target=Attribute(4))
    assert torch.equal(found, AbsLRP(model).attribute(x, target=4, contrast=None))
    assert repr(Attribute(4)) == "Attribute(4)"


def test_keywords_are_passed_in_their_place() -> None:
    class TextsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ENCODER

        def forward(self, texts: Tensor, images: Tensor, scale: float = 1.0) -> Tensor:
            return self.encoder(images) @ texts.T * scale

    x, texts = torch.randn(2, 6).double(), torch.randn(4, 5).double()
    model = WithKeywords(TextsFirst().eval(), "images", "scale", texts=texts)
    assert not model.training
    found = AbsLRP(model).attribute(x, 1, (2.0,))
    expected = AbsLRP(ENCODER, output=lambda f: f @ texts.T).attribute(x, 1)
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match=r"at most 2 arguments, images, scale, but got 3"):
        model(x, 2.0, 3.0)


WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "contrast alone": (2, lambda f: f[:, 0], TypeError, "Expected `target` to be a function"),
    "no tensor": (lambda f: 3.0, None, TypeError, "to return a floating-point tensor .*got float"),
    "integers": (lambda f: f.argmax(1), None, TypeError, "floating-point .*but got torch.int64"),
    "too few": (lambda f: f[:1, 0], None, ValueError, r"but got shape \(1,\)"),
    "classes beside a function": (
        lambda f: f,
        lambda f: f[:, 0],
        ValueError,
        r"function `target` to return one score per sample, .* got shape \(2, 5\)",
    ),
    "another number of samples": (
        Similarity(torch.rand(3, 5)),
        None,
        ValueError,
        r"for one sample or for all 2 samples of `inputs`, but got Similarity\(\(3, 1, 5\)\), which is for 3",
    ),
    "another size": (Similarity(torch.rand(4)), None, ValueError, "but got 5 and 4"),
    "no pair": (Similarity(), None, ValueError, "to return a pair of embeddings"),
    "independent": (lambda f: torch.ones(2), None, ValueError, "to depend on `inputs`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_explained_is_refused(case: str) -> None:
    target, contrast, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        AbsLRP(ENCODER).attribute(torch.randn(2, 6).double(), target, contrast=contrast)


def test_what_a_score_cannot_be_made_of_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `mask` to have shape \(H, W\)"):
        Segment(1, torch.ones(3))
    with pytest.raises(ValueError, match=r"embeddings of shape \(D,\).* of shape \(1, 2, 3, 4\)"):
        Similarity(torch.rand(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"embeddings \(B, D\), but got \(1, 3, 8, 8\)"):
        AbsLRP(Colors().eval(), output=lambda out: out["out"]).attribute(
            painted(), Similarity(torch.rand(3))
        )


class Mixing(nn.Module):
    """A model that mixes samples, so that they are run one at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return ENCODER(x + 0 * x.mean(0))


@pytest.mark.parametrize("by", ["size", "model"])
def test_a_function_that_holds_values_of_samples_is_refused_in_parts(by: str) -> None:
    model = ENCODER if by == "size" else Mixing().eval()
    x = torch.randn(5, 6).double()
    options: dict[str, Any] = {"internal_batch_size": 2} if by == "size" else {}
    attributor = AbsLRP(model)
    with pytest.raises(
        ValueError, match=r"same score in every batch.* method `rows\(start, stop\)`"
    ):
        attributor.attribute(x, lambda out: out.diagonal(), **options)
    if by == "size":
        whole = attributor.attribute(x, lambda out: out.diagonal())
        assert torch.equal(whole, attributor.attribute(x, list(range(5)), contrast=None))
    found = attributor.attribute(x, lambda out: out[:, 2], **options)
    torch.testing.assert_close(found, attributor.attribute(x, 2, contrast=None))


def test_classes_are_no_contrast_of_one_score() -> None:
    x = torch.randn(2, 6).double()
    for contrast in (4, [1, 2]):
        with pytest.raises(ValueError, match="`contrast` to be a function, .* but got classes"):
            AbsLRP(ENCODER).attribute(x, lambda out: out[:, 2], contrast=contrast)

    def score(out: Tensor) -> Tensor:
        return out[:, 2]

    with pytest.raises(ValueError, match="`contrast` and `target` to be different"):
        AbsLRP(ENCODER).attribute(x, score, contrast=score)


def test_a_module_as_target_has_to_be_in_evaluation_mode() -> None:
    head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x = torch.randn(4, 6).double()
    before = [b.clone() for b in head.buffers()]
    with pytest.raises(ValueError, match=r"module `target` to be in evaluation mode.*target\.eval"):
        AbsLRP(ENCODER).attribute(x, head)
    head.eval()
    found = AbsLRP(ENCODER).attribute(x, head)
    whole = AbsLRP(nn.Sequential(ENCODER, head)).attribute(x)
    torch.testing.assert_close(found, whole)
    assert all(torch.equal(a, b) for a, b in zip(before, head.buffers(), strict=True))


def test_softmax_of_a_score_is_no_attention() -> None:
    """Rules that make a constant of attention explain probabilities and masks of classes nevertheless."""
    model, x = double("vit"), images(2)
    for mapping in ("cp_lrp", "recommended"):
        attributor = AbsLRP(model, mapping)
        found = attributor.attribute(x, lambda out: out.softmax(1)[:, 2])
        assert found.flatten(1).any(1).all()
        of_output = AbsLRP(model, mapping, output=lambda out: out.softmax(1)).attribute(
            x, 2, contrast=None
        )
        torch.testing.assert_close(found, of_output)

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.masks = nn.Linear(6, 12), nn.Linear(6, 3 * 16)

        def forward(self, x: Tensor) -> Any:
            classes = self.classes(x).unflatten(1, (3, 4))
            masks = self.masks(x).view(-1, 3, 4, 4)
            return {"class_queries_logits": classes, "masks_queries_logits": masks}

    queries = Queries().double().eval()
    y = torch.randn(2, 6).double()
    segment = Segment(1, torch.ones(4, 4))

    class Detached(Queries):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {**out, "class_queries_logits": out["class_queries_logits"].detach()}

    detached = Detached().double().eval()
    detached.load_state_dict(queries.state_dict())
    with pytest.warns(UserWarning, match="detached"):
        of_masks = AbsLRP(detached, "cp_lrp").attribute(y, segment)
    assert relative_error(AbsLRP(queries, "cp_lrp").attribute(y, segment), of_masks) > 0.01


@pytest.mark.parametrize("composite", ["epsilon", "attnlrp"])
def test_a_divisor_is_a_constant_however_it_is_written(composite: str) -> None:
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda f, d: f / d,
        lambda f, d: torch.div(f, other=d),
        lambda f, d: torch.div(f, d, rounding_mode=None),
        lambda f, d: f * d**-1,
        lambda f, d: f * d.reciprocal(),
        lambda f, d: f.clone().div_(d),
    ]
    x = torch.randn(2, 6).double()
    found = [
        LRP(ENCODER, composite).attribute(
            x, target=lambda f, way=way: way(f, f.abs().sum(1, keepdim=True) + 1)[:, 1]
        )
        for way in ways
    ]
    for relevance in found[1:]:
        torch.testing.assert_close(relevance, found[0])


def test_the_query_at_the_box_is_chosen_however_sure_others_are() -> None:
    class Output:
        logits = torch.tensor([[[20.0, 0, 0, 0], [0, 20.0, 0, 0]]])
        pred_boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]])

    left = Box([0.0, 0, 0.5, 1], 1)
    assert left(Output()).tolist() == [[20, 0, 0, 0]]
    huge = [{
        "boxes": torch.tensor([[0.0, 0, 800, 700]]).half(),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]).half(),
    }]  # fmt: skip
    assert Box([0, 0, 800, 700], 2)(huge).tolist() == [0.5]


def test_each_sample_has_its_own_segment() -> None:
    x = torch.cat([painted(), painted()])
    model = Colors().eval()
    found = AbsLRP(model).attribute(x, Segment([0, 2]))
    for i, index in enumerate((0, 2)):
        torch.testing.assert_close(found[i : i + 1], AbsLRP(model).attribute(x[:1], Segment(index)))
    in_parts = AbsLRP(model).attribute(x, Segment([0, 2]), internal_batch_size=1)
    torch.testing.assert_close(in_parts, found)
    everywhere = torch.ones(16, 16)
    last = AbsLRP(model).attribute(x, Segment(-1, everywhere), contrast=Segment(0, everywhere))
    torch.testing.assert_close(
        last, AbsLRP(model).attribute(x, Segment(2, everywhere), contrast=Segment(0, everywhere))
    )
