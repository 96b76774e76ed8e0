"""Channels that matter for a class, and the images that show what they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, LayerAbsLRP, demo
from captum_abslrp.concepts import Concepts, concept_section, find_concepts, plot_concepts
from captum_abslrp.report import render
from tests.test_no_trace import no_trace


class Colors(nn.Module):
    """Class 0 is red or green, class 1 blue: channel 2 sees red, 0 green and 1 blue, 3 by 3 pixels each."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.see.weight.zero_()
            for channel, color in enumerate((1, 2, 0)):
                self.see.weight[channel, color] = 1 / 9
            self.head.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.see(x).relu().mean((2, 3)))


def spot(color: int, row: int, column: int, size: int = 4) -> Tensor:
    x = torch.full((3, 16, 16), 0.01)
    x[color, row : row + size, column : column + size] = 1
    return x


IMAGES = torch.stack([spot(0, 0, 0), spot(1, 0, 12), spot(2, 12, 0), spot(0, 12, 12, 3)])
TARGETS = [0, 0, 1, 0]


def found() -> tuple[Concepts, LayerAbsLRP]:
    model = Colors().eval()
    layer = LayerAbsLRP(model, model.see)
    batches = [(IMAGES[:3], TARGETS[:3]), (IMAGES[3:], torch.tensor(TARGETS[3:]))]
    with no_trace(model):
        return find_concepts(layer, batches, contrast=None), layer


def test_the_channels_of_a_class_and_their_images_are_found() -> None:
    concepts, _ = found()
    assert concepts.classes == [0, 1]
    top = concepts.top_channels(0)
    assert [channel for channel, _ in top] == [2, 0, 1]
    assert top[0][1] > top[1][1] > 0 and top[2][1] == 0
    assert concepts.top_channels(1, 1)[0][0] == 1
    torch.testing.assert_close(concepts.relevance.sum(1), torch.ones(4))
    assert [e.image for e in concepts.examples(2, 2)] == [0, 3]
    assert concepts.examples(0, 1)[0].image == 1
    assert [e.image for e in concepts.examples(1, 5, target=1)] == [2]
    assert [e.target for e in concepts.examples(1, 1)] == [1]


def test_tokens_and_channels_last_have_their_channels_in_the_last_dimension() -> None:
    model = demo.load_model("vit")
    x = demo.load_scenes("single", 3).inputs
    of_tokens = find_concepts(LayerAbsLRP(model, model.blocks[1]), [(x, [1, 2, 3])])
    relevance = LayerAbsLRP(model, model.blocks[1]).attribute(x, [1, 2, 3])
    torch.testing.assert_close(of_tokens.relevance, relevance.sum(1))
    by_position = find_concepts(
        LayerAbsLRP(model, model.blocks[1]), [(x, [1, 2, 3])], channel_dim=1
    )
    torch.testing.assert_close(by_position.relevance, relevance.sum(2))


def test_a_figure_shows_where_a_channel_finds_its_concept() -> None:
    concepts, layer = found()
    figure = plot_concepts(
        concepts, layer, IMAGES, 0, channels=[2, 0], examples=1, contrast=None, crop=0.5,
        names=["warm, or green", "cold"],
    )  # fmt: skip
    cells = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in cells[:2]] == ["image 0, warm", "image 1, warm"]
    assert cells[0].get_ylabel().startswith("channel 2\n")
    text = "".join(t.get_text() for t in figure.texts) + str(figure.get_suptitle())
    assert "Most relevant channels for warm" in text
    # The red spot at the upper left, the green one at the upper right: cut out with all of them.
    for cell in cells[:2]:
        picture = np.asarray(cell.images[0].get_array())  # in gray
        assert picture.shape == (8, 8)
        assert (picture > picture.min() + 0.1).sum() == 16
    whole = plot_concepts(concepts, layer, IMAGES, 0, channels=1, examples=4, contrast=None, crop=1)
    assert np.asarray(whole.axes[0].images[0].get_array()).shape[:2] == (16, 16)


def test_a_figure_tells_shares_and_smoothing() -> None:
    concepts, layer = found()
    share = concepts.top_channels(0, 1)[0][1]  # of one
    for smoothing, note in ((1, ""), (3, "Maps are smoothed over 3 pixels.")):
        figure = plot_concepts(
            concepts, layer, IMAGES, 0, channels=[2], examples=1, contrast=None, smoothing=smoothing
        )
        assert figure.get_supxlabel() == note
        assert figure.axes[0].get_ylabel() == f"channel 2\n{share:.0%} of relevance"


def test_a_report_has_a_page_of_concepts() -> None:
    concepts, layer = found()
    figure = plot_concepts(concepts, layer, IMAGES, 0, channels=2, examples=2, contrast=None)
    section = concept_section([("channels that matter for class 0", figure)])
    page = render([section], title="Concepts", settings={"layer": "see"})
    assert "channels that matter for class 0" in page
    assert page.count("data:image/png;base64,") >= 1
    assert section.figures["channels that matter for class 0"].startswith(b"\x89PNG")


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no batches": (lambda c, a: find_concepts(a, []), ValueError, "at least one batch"),
    "too few targets": (
        lambda c, a: find_concepts(a, [(IMAGES, [1])]),
        ValueError,
        "one target for each of the 4 images of a batch, but got 1",
    ),
    "inputs": (
        lambda c, a: find_concepts(AbsLRP(a.model), [(IMAGES, TARGETS)]),
        TypeError,
        "to be a `LayerAbsLRP` of one layer, but got AbsLRP",
    ),
    "another class": (lambda c, a: c.top_channels(5), ValueError, r"data set, \[0, 1\], but got 5"),
    "another channel": (lambda c, a: c.examples(3), IndexError, "between 0 and 2, but got 3"),
    "crop": (
        lambda c, a: plot_concepts(c, a, IMAGES, 0, crop=0.0),
        ValueError,
        r"a fraction of the image, in \(0, 1\], but got 0.0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_found_is_refused(case: str) -> None:
    run, error, message = WRONG[case]
    concepts, layer = found()
    with pytest.raises(error, match=message):
        run(concepts, layer)
