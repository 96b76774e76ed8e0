"""Draws the pictures of the README and of the gallery: photographs, and scenes of two digits.

``python docs/gallery.py`` writes ``hero.jpg``, ``photos.jpg`` and ``digits.png`` beside this file, offline.
It needs the extra ``photos``.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_abslrp import AbsLRP, demo, stem_stride
from captum_abslrp.methods import get_method
from captum_abslrp.visualization import denormalize, plot_grid

MODELS = {"vgg": "VGG", "resnet": "ResNet", "vit": "ViT"}
HERE = Path(__file__).parent
QUESTIONS = {
    "grace_hopper": ("mortarboard", "military uniform", "Windsor tie"),
    "astronaut": ("football helmet", "space shuttle", "flagpole"),
    "chelsea": ("tiger cat", "Egyptian cat", "tiger cat rather than Egyptian cat"),
}
METHODS = {
    "abslrp_recommended": "AbsLRP\n(recommended)",
    "abslrp": "AbsLRP\n(published)",
    "gradcam": "Grad-CAM",
    "occlusion": "Occlusion",
    "ig": "Integrated\nGradients",
    "saliency": "Saliency\n(unsigned)",
}


def percent(share: Tensor) -> str:
    return "below 0.1%" if share < 0.001 else f"{share:.0%}"


class Photographs:
    """The photographs and their model."""

    def __init__(self) -> None:
        self.model = demo.load_photo_model()
        self.config = timm.data.resolve_model_data_config(self.model)
        self.names = [n.split(",")[0] for n in timm.data.ImageNetInfo().label_descriptions()]
        prepare = timm.data.create_transform(**self.config)
        self.inputs: dict[str, Tensor] = {p.name: prepare(p.open()) for p in demo.load_photos()}
        with torch.no_grad():
            found = self.model(torch.stack(list(self.inputs.values()))).softmax(1)
        self.probabilities = dict(zip(self.inputs, found, strict=True))
        self.smoothing = stem_stride(self.model, next(iter(self.inputs.values()))[None])

    def show(self, name: str) -> Tensor:
        """A photograph with values in [0, 1]."""
        return denormalize(self.inputs[name], self.config["mean"], self.config["std"])

    def hero(self) -> Figure:
        """Three photographs, each with three questions."""
        attributor = AbsLRP.recommended(self.model)
        rows, labels = [], []
        for name, questions in QUESTIONS.items():
            row, probabilities = [], self.probabilities[name]
            best = int(probabilities.argmax())
            labels.append(f"predicted: {self.names[best]}\n{percent(probabilities[best])}")
            for question in questions:
                target, _, other = question.partition(" rather than ")
                i, options = self.names.index(target), {}
                label = f"why {target}?\n{percent(probabilities[i])}"
                if other:
                    options = {"contrast": self.names.index(other), "combine": "difference"}
                    label = f"why {target} and\nnot {other}?"
                row.append(attributor.attribute(self.inputs[name][None], i, **options)[0])
                labels.append(label)
            rows.append(row)
        figure = plot_grid([self.show(name) for name in QUESTIONS], rows, smoothing=self.smoothing)
        figure.axes[-1].remove()  # the caption says what the colors mean
        figure.supxlabel("")
        for axes, label in zip(figure.axes, labels, strict=True):
            axes.set_title(label, fontsize=10)
        return figure

    def compared(self) -> Figure:
        """All photographs, explained by several methods for the class that is predicted."""
        x = torch.stack(list(self.inputs.values()))
        chance, targets = torch.stack(list(self.probabilities.values())).max(1)
        maps = [get_method(method)(self.model)(x, targets) for method in METHODS]
        return plot_grid(
            [self.show(name) for name in self.inputs],
            [list(row) for row in zip(*maps, strict=True)],
            row_labels=[f"{self.names[t]}\n{p:.0%}" for t, p in zip(targets, chance, strict=True)],
            column_labels=list(METHODS.values()),
            smoothing=self.smoothing,
        )


def digits() -> Figure:
    """Scenes with two digits, explained for each of the two by each demo model."""
    scenes = demo.load_scenes("pair")
    images = scenes.images[[2, 1]].repeat_interleave(2, 0)
    targets = scenes.labels[[2, 1]].flatten()
    models = [demo.load_model(name) for name in MODELS]
    inputs = demo.normalize(images)
    maps = [AbsLRP.recommended(model).attribute(inputs, target=targets) for model in models]
    return plot_grid(
        list(images),
        [list(row) for row in zip(*maps, strict=True)],
        row_labels=[f"why {t}?" for t in targets.tolist()],
        column_labels=list(MODELS.values()),
    )


def main() -> None:
    photographs = Photographs()
    photographs.hero().savefig(HERE / "hero.jpg", dpi=150, pil_kwargs={"quality": 88})
    photographs.compared().savefig(HERE / "photos.jpg", dpi=110, pil_kwargs={"quality": 88})
    digits().savefig(HERE / "digits.png", dpi=100)


if __name__ == "__main__":
    main()
