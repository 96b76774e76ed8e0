"""Draws the cases of ``docs/reading-maps.md`` in which a map misleads, from the demo models, offline."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from captum_abslrp import AbsLRP, demo
from captum_abslrp.methods import positive_share
from captum_abslrp.visualization import plot_grid

HERE = Path(__file__).parent


def absent_class() -> None:
    """Asked for a digit that is not there."""
    model = demo.load_model("resnet")
    scenes = demo.load_scenes("single")
    chosen = torch.tensor([3, 6, 0])
    x, labels = scenes.inputs[chosen], scenes.labels[chosen]
    attributor = AbsLRP(model, normalization="joint")
    absent = (labels + 5) % 10
    maps = [attributor.attribute(x, target=t) for t in (labels, absent)]
    with torch.no_grad():
        probabilities = model(x).softmax(1)
    rows = [
        f"a {here} ({p[here]:.0%}),\nno {gone} ({p[gone]:.1%})"
        for here, gone, p in zip(labels.tolist(), absent.tolist(), probabilities, strict=True)
    ]
    plot_grid(
        list(scenes.images[chosen]),
        [list(row) for row in zip(*maps, strict=True)],
        row_labels=rows,
        column_labels=["why what is there?", "why what is not there?"],
    ).savefig(HERE / "failure-absent-class.png", dpi=80)


def wrong_prediction() -> None:
    """A scene that the model gets wrong: why what it says, and why what is there?"""
    scenes = demo.load_scenes("single")
    images, rows, labels = [], [], []
    for name in demo.list_models():
        model = demo.load_model(name)
        with torch.no_grad():
            predicted = model(scenes.inputs).argmax(1)
        for i in (predicted != scenes.labels).nonzero().flatten()[:1].tolist():
            attributor = AbsLRP(model, normalization="joint")
            x = scenes.inputs[i : i + 1]
            said, true = int(predicted[i]), int(scenes.labels[i])
            images.append(scenes.images[i])
            rows.append(
                [
                    attributor.attribute(x, target=said)[0],
                    attributor.attribute(x, target=true)[0],
                    attributor.attribute(x, target=said, contrast=true)[0],
                ]
            )
            labels.append(f"{name}: {said},\nbut it is {true}")
    plot_grid(
        images,
        rows,
        row_labels=labels,
        column_labels=["why what it says?", "why what is there?", "the one rather than the other"],
    ).savefig(HERE / "failure-wrong-prediction.png", dpi=80)


SEEDS = 4


def random_weights() -> None:
    """The same model trained, with a random head, and with random weights throughout."""
    scenes = demo.load_scenes("pair", 20)
    x, targets, masks = scenes.inputs, scenes.labels[:, 0], scenes.masks[:, 0]
    trained = demo.load_model("resnet")
    print(f"area of the digit asked for {masks.float().mean():.1%}")

    def drawn(seed: int, *kinds: type[nn.Module]) -> nn.Module:
        torch.manual_seed(seed)
        model = copy.deepcopy(trained)
        for module in model.modules():
            if isinstance(module, kinds):
                module.reset_parameters()
        return model.eval()

    everything = nn.Conv2d, nn.Linear, nn.BatchNorm2d
    models = {
        "trained": [trained],
        "random head": [drawn(seed, nn.Linear) for seed in range(SEEDS)],
        "random weights": [drawn(seed, *everything) for seed in range(SEEDS)],
    }
    columns = {}
    for name, of_seeds in models.items():
        for contrast, said in ((None, "no contrast"), ("others", "difference")):
            maps = [
                AbsLRP(model, normalization="joint").attribute(x, targets, contrast=contrast)
                for model in of_seeds
            ]
            shares = [float(positive_share(m, masks).mean()) for m in maps]
            print(
                f"{name:15} {said:12} {min(shares):.1%} to {max(shares):.1%} on the digit asked for"
            )
            columns[f"{name},\n{said}"] = maps[0]
    plot_grid(
        list(scenes.images[:2]),
        [[maps[i] for maps in columns.values()] for i in range(2)],
        row_labels=[f"why {t}?" for t in targets[:2].tolist()],
        column_labels=list(columns),
    ).savefig(HERE / "failure-random-weights.png", dpi=80)


class _Adapted(nn.Module):
    """A linear layer with an adapter of low rank beside it (LoRA), as a sum of two products."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        """One layer that computes the same."""
        layer = copy.deepcopy(self.layer)
        layer.weight.data += self.up.weight.data @ self.down.weight.data
        return layer


def low_rank_adapters() -> None:
    """The demo ViT with random adapters, beside itself with the adapters merged."""
    torch.manual_seed(0)
    apart = demo.load_model("vit").double()
    merged = copy.deepcopy(apart)
    for name, layer in [*apart.named_modules()]:
        if name.endswith("qkv"):
            parent = name.rpartition(".")[0]
            adapted = _Adapted(layer, rank=4).double()
            apart.get_submodule(parent).qkv = adapted
            merged.get_submodule(parent).qkv = adapted.merged()
    scenes = demo.load_scenes("single", 8)
    x, targets = scenes.inputs.double(), scenes.labels
    with torch.no_grad():
        print(f"adapters: outputs differ by {float((apart(x) - merged(x)).abs().max()):.0e}")
    for normalization in ("separate", "joint"):
        for contrast in (None, "others"):
            one, other = (
                AbsLRP(model, normalization=normalization).attribute(x, targets, contrast=contrast)
                for model in (apart, merged)
            )
            distance = float((one - other).norm() / other.norm())
            print(f"{normalization}, contrast {contrast}: maps differ by {distance:.0%}")


if __name__ == "__main__":
    low_rank_adapters()
    absent_class()
    wrong_prediction()
    random_weights()
