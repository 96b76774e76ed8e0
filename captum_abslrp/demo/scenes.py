"""Scenes of handwritten digits: 64x64 color images with one boolean mask per digit.

A scene is a textured background, a few bits of clutter that are no digits, and one digit
("single") or two different, non-overlapping digits ("pair") at random places, sizes, slants and
tints. Scenes are rendered in batches with torch, from 8x8 gray digits.

Axes: B scenes, D digits per scene (1 or 2), H = W = 64 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
MEAN: tuple[float, float, float] = (0.5, 0.5, 0.5)
STD: tuple[float, float, float] = (0.25, 0.25, 0.25)
CLASS_NAMES: tuple[str, ...] = tuple("0123456789")

DATA = Path(__file__).parent / "data"

_KINDS: dict[str, int] = {"single": 1, "pair": 2}
_SIZES: dict[int, tuple[float, float]] = {1: (20.0, 36.0), 2: (20.0, 28.0)}
_CHUNK = 200
_MARGIN = 2.0
_GAP = 3.0
_CLUTTER_REACH = 7
_LUMA = (0.299, 0.587, 0.114)

Kind = Literal["single", "pair"]


@dataclass(frozen=True)
class Digits:
    """Gray 8x8 digits: `images` (N, 8, 8) uint8 with values 0 to 16, `labels` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes with their ground truth.

    - `images`: (B, 3, 64, 64) float32 in [0, 1];
    - `labels`: (B,) for single digits, (B, 2) for pairs, int64;
    - `masks`: (B, 64, 64) for single digits, (B, 2, 64, 64) for pairs, bool, one mask per digit
      in the order of `labels`; the masks of a pair are disjoint.

    Example:
        >>> scenes = load_scenes("pair", 4)
        >>> tuple(scenes.images.shape), tuple(scenes.labels.shape), tuple(scenes.masks.shape)
        ((4, 3, 64, 64), (4, 2), (4, 2, 64, 64))
    """

    images: Tensor
    labels: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def inputs(self) -> Tensor:
        """The images as the demo models take them, `normalize(self.images)`."""
        return normalize(self.images)


def normalize(images: Tensor) -> Tensor:
    """Turn images in [0, 1], (..., 3, H, W), into model inputs, `(images - MEAN) / STD`.

    Example:
        >>> float(normalize(torch.full((1, 3, 64, 64), 0.5)).abs().max())
        0.0
    """
    mean = images.new_tensor(MEAN).view(3, 1, 1)
    std = images.new_tensor(STD).view(3, 1, 1)
    return (images - mean) / std


def load_scenes(kind: Kind, n: int | None = None) -> Scenes:
    """Load the held-out scenes that ship with the package.

    Args:
        kind: "single" (100 scenes, ten per class) or "pair" (60 scenes).
        n: take the first `n` scenes; all of them when None.

    Raises:
        ValueError: `kind` is unknown, or `n` is not in 1 to the number of scenes.

    Example:
        >>> load_scenes("single", 10).labels.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    digits_per_scene(kind)
    with np.load(DATA / f"{kind}.npz") as data:
        images, labels, packed = data["images"], data["labels"], data["masks"]
    if n is not None and not 1 <= n <= len(images):
        raise ValueError(f"Expected `n` to be between 1 and {len(images)}, but got {n}.")
    masks = np.unpackbits(packed, axis=-1).astype(bool)
    return Scenes(
        images=torch.from_numpy(images[:n]).permute(0, 3, 1, 2).float().div(255).contiguous(),
        labels=torch.from_numpy(labels[:n].astype(np.int64)),
        masks=torch.from_numpy(masks[:n]),
    )


def save_scenes(scenes: Scenes, path: Path) -> None:
    """Write scenes as a compressed file of 8-bit images and packed masks."""
    images = scenes.images.mul(255).round().byte().permute(0, 2, 3, 1)
    np.savez_compressed(
        path,
        images=images.numpy(),
        labels=scenes.labels.numpy().astype(np.uint8),
        masks=np.packbits(scenes.masks.numpy(), axis=-1),
    )


@lru_cache(maxsize=1)
def heldout_digits() -> Digits:
    """Return the digits that no demo model has seen in training.

    Example:
        >>> heldout_digits().labels.unique().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    with np.load(DATA / "heldout.npz") as data:
        return Digits(
            images=torch.from_numpy(data["images"]),
            labels=torch.from_numpy(data["labels"].astype(np.int64)),
        )


def render_scenes(
    kind: Kind,
    n: int,
    *,
    generator: torch.Generator | int,
    digits: Digits | Literal["heldout"] = "heldout",
) -> Scenes:
    """Render `n` new scenes; the same seed gives the same scenes.

    Args:
        kind: "single" or "pair".
        n: number of scenes.
        generator: CPU generator that is advanced, or a seed.
        digits: the digits to draw from; those held out of training by default.

    Raises:
        ValueError: `kind` is unknown, `n` is negative, or `digits` is neither "heldout" nor a
            `Digits`.

    Example:
        >>> a, b = (render_scenes("pair", 2, generator=0) for _ in range(2))
        >>> torch.equal(a.images, b.images), (a.labels[:, 0] != a.labels[:, 1]).all().item()
        (True, True)
    """
    count = digits_per_scene(kind)
    if n < 0:
        raise ValueError(f"Expected `n` to be at least 0, but got {n}.")
    if isinstance(digits, str):
        if digits != "heldout":
            raise ValueError(
                f"Expected `digits` to be 'heldout' or a `Digits`, but got {digits!r}."
            )
        digits = heldout_digits()
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    # Rendering takes some 0.5 MB a scene: thousands at once would need gigabytes.
    parts = [
        compose(digits, draw_index(digits.labels, size, count, generator), generator)
        for size in [_CHUNK] * (n // _CHUNK) + [n % _CHUNK]
    ]
    return Scenes(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        masks=torch.cat([part.masks for part in parts]),
    )


def digits_per_scene(kind: str) -> int:
    """Return D for a kind of scene.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in _KINDS:
        raise ValueError(f"Expected `kind` to be one of {sorted(_KINDS)}, but got {kind!r}.")
    return _KINDS[kind]


def draw_index(labels: Tensor, n: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw (n, count) digits, uniform over instances, of different classes within a scene."""
    first = torch.randint(len(labels), (n,), generator=generator)
    if count == 1:
        return first[:, None]
    # A random key per candidate; candidates of the first digit's class are ruled out.
    keys = torch.rand(n, len(labels), generator=generator)
    keys = keys.masked_fill(labels[None] == labels[first][:, None], -1.0)
    return torch.stack([first, keys.argmax(1)], dim=1)


def compose(digits: Digits, index: Tensor, generator: torch.Generator) -> Scenes:
    """Render the digits `index`, (B, D), one scene per row; D is 1 or 2."""
    b, d = index.shape
    rand = _Uniform(generator)
    size = rand(*_SIZES[d], (b, d))
    alpha = _draw_digits(digits.images[index], size, _place(size, rand), rand)
    masks = alpha > 0.5
    if d == 2:
        # Slanted strokes may leave their box by a pixel or so: the first digit is on top.
        alpha = torch.stack([alpha[:, 0], alpha[:, 1] * (1 - alpha[:, 0])], dim=1)
        masks = torch.stack([masks[:, 0], masks[:, 1] & ~masks[:, 0]], dim=1)

    ground_luma = rand(0.08, 0.5, (b,))
    texture = _texture(b, rand)
    images = _background(ground_luma, texture, rand)
    images = _scatter_clutter(images, alpha.amax(1), ground_luma, rand)
    shade = 0.35 * (texture - 0.5)
    for i in range(d):
        ink = _color(_ink_luma(ground_luma, rand), rand)[..., None, None] + shade
        images = torch.lerp(images, ink, alpha[:, i, None])
    noise = torch.randn(images.shape, generator=generator)
    images = (images + 0.015 * noise).clamp(0, 1)

    labels = digits.labels[index]
    if d == 1:
        labels, masks = labels[:, 0], masks[:, 0]
    return Scenes(images=images, labels=labels, masks=masks)


class _Uniform:
    """Uniform draws from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, low: float, high: float, shape: tuple[int, ...]) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)


def _pixels() -> tuple[Tensor, Tensor]:
    """Return the x and y of pixel centers, (1, W) and (H, 1)."""
    centers = torch.arange(SIZE) + 0.5
    return centers[None, :], centers[:, None]


def _place(size: Tensor, rand: _Uniform) -> Tensor:
    """Draw centers (B, D, 2), x and y in pixels, so that the boxes of `size` (B, D) are apart."""
    b, d = size.shape
    low = _MARGIN + size / 2
    free = SIZE - 2 * low
    center = low[..., None] + free[..., None] * rand(0, 1, (b, d, 2))
    if d == 1:
        return center
    # One axis keeps the two boxes apart: the slack goes before, between and after them.
    slack = SIZE - 2 * _MARGIN - _GAP - size.sum(1)
    cuts = rand(0, 1, (b, 2)).sort(dim=1).values * slack[:, None]
    ahead = _MARGIN + cuts[:, 0] + size[:, 0] / 2
    behind = _MARGIN + cuts[:, 1] + size[:, 0] + _GAP + size[:, 1] / 2
    along = torch.stack([ahead, behind], dim=1)
    flip = rand(0, 1, (b, 1)) < 0.5
    along = torch.where(flip, SIZE - along, along)
    horizontal = rand(0, 1, (b, 1)) < 0.5
    return torch.stack(
        [
            torch.where(horizontal, along, center[..., 0]),
            torch.where(horizontal, center[..., 1], along),
        ],
        dim=-1,
    )


def _draw_digits(gray: Tensor, size: Tensor, center: Tensor, rand: _Uniform) -> Tensor:
    """Draw 8x8 digits (B, D, 8, 8) as coverage in [0, 1], (B, D, H, W)."""
    b, d = size.shape
    # A rim of zeros, since ink touches the border of most 8x8 digits.
    source = F.pad(gray.flatten(0, 1)[:, None].float() / 16, (1, 1, 1, 1))
    source = F.interpolate(source, scale_factor=4, mode="bicubic", align_corners=False)
    angle = rand(-0.2, 0.2, (b * d,))
    shear = rand(-0.2, 0.2, (b * d,))
    width = rand(0.85, 1.1, (b * d,))
    half = size.flatten() / 2 * (10 / 8)
    cos, sin = angle.cos() / half, angle.sin() / half
    x, y = _pixels()
    x = x - center[..., 0].reshape(-1, 1, 1)
    y = y - center[..., 1].reshape(-1, 1, 1)
    v = cos.view(-1, 1, 1) * y - sin.view(-1, 1, 1) * x
    u = cos.view(-1, 1, 1) * x + sin.view(-1, 1, 1) * y + shear.view(-1, 1, 1) * v
    grid = torch.stack([u / width.view(-1, 1, 1), v], dim=-1)
    ink = F.grid_sample(source, grid, align_corners=False)[:, 0]
    weight = rand(0.42, 0.56, (b * d, 1, 1))
    return torch.sigmoid(16 * (ink - weight)).mul(ink > 0.05).view(b, d, SIZE, SIZE)


def _color(luma: Tensor, rand: _Uniform) -> Tensor:
    """Draw colors (*luma.shape, 3) in [0, 1] of about the given luma."""
    tint = rand(0, 1, (*luma.shape, 3))
    tint = tint - (tint * torch.tensor(_LUMA)).sum(-1, keepdim=True)
    return (luma[..., None] + 0.75 * tint).clamp(0, 1)


def _ink_luma(ground: Tensor, rand: _Uniform) -> Tensor:
    """Draw a luma that is brighter than that of the ground by at least 0.4."""
    least = ground + 0.4
    return least + (1 - least) * rand(0, 1, ground.shape)


def _texture(b: int, rand: _Uniform) -> Tensor:
    """Draw gray textures in about [0, 1], (B, 1, H, W): clouds, stripes and checks."""
    clouds = torch.zeros(b, 1, SIZE, SIZE)
    for cells in (3, 6, 12, 24):
        octave = rand(-1, 1, (b, 1, cells, cells)) * rand(0.1, 0.8, (b, 1, 1, 1))
        clouds = clouds + F.interpolate(octave, size=(SIZE, SIZE), mode="bilinear")
    angle = rand(0, math.pi, (b, 1, 1))
    pitch = 2 * math.pi / rand(5, 16, (b, 1, 1))
    phase = rand(0, 2 * math.pi, (b, 1, 1))
    x, y = _pixels()
    along = torch.sin(pitch * (angle.cos() * x + angle.sin() * y) + phase)
    across = torch.sin(pitch * (angle.cos() * y - angle.sin() * x) + phase)
    checks = rand(0, 1, (b, 1, 1)) < 0.4
    sharp = rand(0.5, 4, (b, 1, 1))
    waves = torch.tanh(sharp * torch.where(checks, along * across, along))[:, None]
    share = (rand(-0.5, 1, (b, 1, 1, 1))).clamp(min=0)
    return (0.5 + 0.5 * torch.lerp(clouds, waves, share)).clamp(-0.2, 1.2)


def _background(luma: Tensor, texture: Tensor, rand: _Uniform) -> Tensor:
    """Color textures (B, 1, H, W) between two tints of about the same luma, (B, 3, H, W)."""
    b = len(luma)
    spread = rand(0.02, 0.12, (b,))
    one = _color(luma - spread, rand)[..., None, None]
    two = _color(luma + spread, rand)[..., None, None]
    glow = F.interpolate(rand(-0.07, 0.07, (b, 3, 3, 3)), size=(SIZE, SIZE), mode="bilinear")
    return torch.lerp(one.expand(b, 3, SIZE, SIZE), two, texture) + glow


def _stroke(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot((u.abs() - 4.2).clamp(min=0), v) - 1.2


def _arc(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum((torch.hypot(u, v) - 4.2).abs() - 1.1, v)


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 2.6


def _slab(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs() - 3.6, v.abs() - 2.2)


def _hook(u: Tensor, v: Tensor) -> Tensor:
    arm = torch.hypot((u - 1).abs().sub(3).clamp(min=0), v + 2) - 1.1
    leg = torch.hypot(u + 2, (v - 1).abs().sub(3).clamp(min=0)) - 1.1
    return torch.minimum(arm, leg)


# Signed distances in pixels; each shape stays within _CLUTTER_REACH of its center.
_SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_stroke, _arc, _disc, _slab, _hook)


def _scatter_clutter(images: Tensor, digits: Tensor, ground_luma: Tensor, rand: _Uniform) -> Tensor:
    """Draw bits of shape on `images` (B, 3, H, W), clear of the digits' coverage (B, H, W)."""
    b = len(images)
    # Centers lie on a grid of every second pixel, free where no digit is within reach.
    window = 2 * _CLUTTER_REACH + 2
    taken = F.max_pool2d(digits[:, None], (window, 1), (2, 1), (_CLUTTER_REACH, 0))
    taken = F.max_pool2d(taken, (1, window), (1, 2), (0, _CLUTTER_REACH))
    columns = taken.shape[-1]
    free = (taken < 0.1).flatten(1).float()
    x, y = _pixels()
    for shape in _SHAPES:
        spot = (rand(0.01, 1, free.shape) * free).max(dim=1)
        center_x = (2 * (spot.indices % columns) + 1).view(b, 1, 1)
        center_y = (2 * (spot.indices // columns) + 1).view(b, 1, 1)
        drawn = ((spot.values > 0) & (rand(0, 1, (b,)) < 0.6)).view(b, 1, 1)
        angle = rand(0, 2 * math.pi, (b, 1, 1))
        scale = rand(0.7, 1.15, (b, 1, 1))
        cos, sin = angle.cos() / scale, angle.sin() / scale
        u = cos * (x - center_x) + sin * (y - center_y)
        v = cos * (y - center_y) - sin * (x - center_x)
        cover = (0.5 - shape(u, v) * scale).clamp(0, 1) * drawn
        ink_like = rand(0, 1, (b,)) < 0.6
        luma = torch.where(ink_like, _ink_luma(ground_luma, rand), rand(0, 0.6, (b,)))
        color = _color(luma, rand)[..., None, None]
        images = torch.lerp(images, color.expand_as(images), cover[:, None])
    return images
