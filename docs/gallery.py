"""Draws the gallery of the README: the same pictures asked for one class and for another.

``python docs/gallery.py`` explains scenes of the demo with the demo models, offline. With network,
``python docs/gallery.py --models vit_base_patch16_224 resnet50 vgg16_bn --images cat.jpg ...`` does the
same with pretrained models of timm's and the two most probable classes of each picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_abslrp import AbsLRP, demo, stem_stride
from captum_abslrp.visualization import denormalize, plot_grid, smooth_map

SCENES = (2, 1)


def explained(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Maps (B, 1, H, W), without the grid of the model."""
    maps = AbsLRP(model, normalization="joint").attribute(x, target=targets)
    smoothing = stem_stride(model, x)
    return torch.stack([torch.from_numpy(smooth_map(one, smoothing))[None] for one in maps])


def of_demo_models() -> tuple[list[Tensor], list[list[Tensor]], list[str], list[str]]:
    """Pictures, rows of maps, labels of rows and columns: each scene asked for both of its digits."""
    scenes = demo.load_scenes("pair")
    images = scenes.images[list(SCENES)].repeat_interleave(2, 0)
    targets = scenes.labels[list(SCENES)].flatten()
    names = demo.list_models()
    maps = [explained(demo.load_model(name), demo.normalize(images), targets) for name in names]
    asked = [f"why {t}?" for t in targets.tolist()]
    return list(images), [list(row) for row in zip(*maps, strict=True)], asked, names


def of_pretrained_models(
    names: list[str], paths: list[Path]
) -> tuple[list[Tensor], list[list[Tensor]], list[str], list[str]]:
    import timm
    from PIL import Image

    labels = timm.data.ImageNetInfo().label_descriptions()
    models = {name: timm.create_model(name, pretrained=True).eval() for name in names}
    configs = {name: timm.data.resolve_model_data_config(m) for name, m in models.items()}
    pictures, rows, asked = [], [], []
    for path in paths:
        image = Image.open(path).convert("RGB")
        # One crop for all, that of the first model; each has a size and a normalization of its own.
        crop = configs[names[0]]["crop_pct"]
        inputs = {
            name: timm.data.create_transform(**config | {"crop_pct": crop})(image)[None]
            for name, config in configs.items()
        }
        with torch.no_grad():
            top = models[names[0]](inputs[names[0]]).topk(2).indices[0]
        x, config = inputs[names[0]][0], configs[names[0]]
        picture = denormalize(x, config["mean"], config["std"])
        maps = [
            nn.functional.interpolate(
                explained(model, inputs[name].expand(2, -1, -1, -1), top), picture.shape[-2:]
            )
            for name, model in models.items()
        ]
        for i, target in enumerate(top.tolist()):
            pictures.append(picture)
            rows.append([of_model[i] for of_model in maps])
            asked.append(f"why {labels[target].split(',')[0]}?")
    return pictures, rows, asked, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", help="pretrained models of timm's")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="pictures for them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "gallery.png")
    args = parser.parse_args()
    if bool(args.models) != bool(args.images):
        parser.error("Expected --models and --images together.")
    found = of_pretrained_models(args.models, args.images) if args.models else of_demo_models()
    pictures, maps, asked, names = found
    plot_grid(pictures, maps, row_labels=asked, column_labels=names).savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
