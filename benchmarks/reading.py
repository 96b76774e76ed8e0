"""Compute the figures of ``docs/reading-maps.md`` about photographs with blue objects.

``python -m benchmarks.reading --model lite0 --images FOLDER``. Models and images are named as for
``benchmarks.real``; ``--photo NAME --region left`` analyzes one photograph in detail (default: the one whose
center is most negative). The script prints

- in how many images the center has more negative than positive relevance with ``contrast="others"``, and
  which share of the relevance of the target remains in the difference of target and contrast;
- of one photograph, the share of relevance in a region for several maps, and the contributions of the region
  to the class and to the others in the last layer, where a model ends with an average and a linear layer;
- how often hiding the right quarter of a mosaic lowers the logit most, of the four quarters.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.real_data import Case, load_case, load_model, make_mosaics
from captum_abslrp import AbsLRP


def center(image: Tensor) -> Tensor:
    """The middle half of the height and of the width of (..., H, W)."""
    height, width = image.shape[-2:]
    return image[..., height // 4 : height - height // 4, width // 4 : width - width // 4]


def left(image: Tensor) -> Tensor:
    """The left third of (..., H, W)."""
    return image[..., : image.shape[-1] // 3]


REGIONS = {"center": center, "left": left}


def predict(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two largest probabilities of each image and their classes, both (B, 2)."""
    with torch.no_grad():
        probabilities, classes = model(x).softmax(1).topk(2)
    return probabilities, classes


def scan(case: Case, batch_size: int) -> tuple[Tensor, Tensor]:
    """Measure how negative the center of each difference map is, and which share remains in the difference.

    Returns:
        the sum of relevance in the center, relative to the sum of all magnitudes, (N,); and the magnitudes
        of the difference, relative to those of the target map, (N,).
    """
    attributor = AbsLRP(case.model)
    sums, kept = [], []
    for x in tqdm(case.images.split(batch_size), mininterval=5):
        _, classes = predict(case.model, x)
        difference = attributor.attribute(x, classes[:, 0]).sum(1)
        alone = attributor.attribute(x, classes[:, 0], contrast=None).sum(1)
        size = difference.abs().sum((1, 2))
        sums.append(center(difference).sum((1, 2)) / size)
        kept.append(size / alone.abs().sum((1, 2)))
    return torch.cat(sums), torch.cat(kept)


def look_at(model: nn.Module, x: Tensor, region: str) -> None:
    """Print where the relevance of one photograph (1, C, H, W) lies."""
    probabilities, classes = predict(model, x)
    target, second = classes[0].tolist()
    print(f"classes {target} and {second}, probabilities {probabilities[0].tolist()}")
    published, recommended = AbsLRP(model), AbsLRP.recommended(model)
    maps = {
        "no contrast": published.attribute(x, target, contrast=None),
        "others": published.attribute(x, target),
        "softmax": published.attribute(x, target, contrast="softmax"),
        "second class": published.attribute(x, target, contrast=second),
        "published rules, guided": published.attribute(x, target, combine="guided"),
        "recommended": recommended.attribute(x, target),
    }
    print(f"{'share in the ' + region:28} positive  negative  sum / magnitudes")
    for name, found in maps.items():
        relevance = found.sum(1)
        part = REGIONS[region](relevance)
        shares = [
            float((sign * part).clamp(min=0).sum() / (sign * relevance).clamp(min=0).sum())
            for sign in (1, -1)
        ]
        total = float(part.sum() / relevance.abs().sum())
        print(f"{name:28} {shares[0]:8.1%}  {shares[1]:8.1%}  {total:.2f}")
    if hasattr(model, "forward_features") and isinstance(model.get_classifier(), nn.Linear):
        last_layer(model, x, target)


def last_layer(model: nn.Module, x: Tensor, target: int) -> None:
    """Print what the middle of the last feature map contributes to the class, and to others on average."""
    with torch.no_grad():
        features = model.forward_features(x)
    if features.dim() != 4:
        return
    weight = model.get_classifier().weight.detach()
    places = features[0].flatten(1) / features[0, 0].numel()  # of an average, (D, h * w)
    rows, columns = features.shape[2:]
    middle = torch.zeros(rows, columns, dtype=torch.bool)
    middle[rows // 2 - 1 : rows // 2 + 2, columns // 2 - 1 : columns // 2 + 2] = True
    for name, of in (
        ("positive contributions", weight.clamp(min=0) @ places.clamp(min=0)),
        ("all contributions", weight @ places),
    ):
        inside, total = of[:, middle.flatten()].sum(1), of.sum(1)
        others = torch.arange(len(of)) != target
        print(
            f"{name} of the nine middle places: {inside[target]:.2f} to the class and "
            f"{inside[others].mean():.2f} to the others; of all places "
            f"{inside[target] / total[target]:.1%} and {(inside / total)[others].mean():.1%}"
        )


def hide_quarters(case: Case, count: int) -> float:
    """Return how often the logit falls most when the right quarter of a mosaic is hidden."""
    mosaics = make_mosaics(case, count, full_size=False)
    height, width = (n // 2 for n in mosaics.images.shape[2:])
    logits = []
    for quarter in range(4):
        row, column = divmod(quarter, 2)
        x = mosaics.images.clone()
        x[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
        with torch.no_grad():
            logits.append(mosaics.model(x).gather(1, mosaics.targets[:, None]))
    return float((torch.cat(logits, 1).argmin(1) == mosaics.positions).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", type=Path, required=True, help="a folder")
    parser.add_argument("--photo", help="name of a file in the folder")
    parser.add_argument("--region", choices=[*REGIONS], default="center")
    parser.add_argument("--n-mosaics", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.photo:
        model, prepare = load_model(args.model)
        picture = Image.open(args.images / args.photo).convert("RGB")
        look_at(model, prepare(picture)[None], args.region)
        return
    case = load_case(args.model, args.images)
    sums, kept = scan(case, args.batch_size)
    print(f"center negative in {int((sums < 0).sum())} of {len(sums)} images")
    print(f"the difference keeps {kept.median():.2%} of the relevance of the target (median)")
    print(f"hiding the right quarter matters most in {hide_quarters(case, args.n_mosaics):.0%}")
    strongest = int(sums.argmin())
    print(f"the most negative center: image {strongest}, class {int(case.labels[strongest])}")
    look_at(case.model, case.images[strongest : strongest + 1], args.region)


if __name__ == "__main__":
    main()
