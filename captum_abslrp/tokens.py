"""Maps from the tokens of a transformer to positions in the image.

Axes: B images, L tokens, D features, h and w the size of the patch grid, H and W the size of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from captum_abslrp.checks import part_of_model, unwrapped

__all__ = ["TokenPlaces", "token_map"]

Size = tuple[int, int]


def token_map(
    relevance: Tensor,
    model: nn.Module,
    layer: nn.Module | None = None,
    *,
    size: Sequence[int] | None = None,
    extra_tokens: int | tuple[int, int] | None = None,
) -> Tensor:
    """Sum the relevance of tokens over features and arrange it as a map of the image.

    The number of patches and of other tokens (class, distillation, register and detection tokens) is read
    from the model. Supported models are

    - timm: all Vision Transformers (``num_prefix_tokens`` and ``patch_embed``), SAM, Swin, Swin V2;
    - torchvision: ``VisionTransformer`` and ``SwinTransformer``, both versions;
    - Hugging Face: ViT, DeiT, DINOv2 (with or without registers), DINOv3, BEiT, CLIP, SigLIP, BLIP, OWL-ViT,
      YOLOS, SAM, Swin, Swin V2 and others.

    In the window attention of Swin and SAM, tokens are grouped by window. The grouping, the cyclic shift
    and the padding are undone, according to the windows of ``layer``.

    Args:
        relevance: the relevance of one tensor of a layer, from :meth:`LayerAbsLRP.attribute`: tokens
            (B, L, D), a feature map (B, h, w, D) or (B, D, h, w), or windows (B * n, wh * ww, D) or
            (B * n, wh, ww, D).
        model: the model that was explained.
        layer: the layer that was explained. It is required if the relevance could be that of windows, or if
            the model has several transformers.
        size: height and width of the images, ``x.shape[2:]``. None uses the image size of the model.
        extra_tokens: number of tokens before the patch tokens, or a pair with the numbers before and after
            them. None reads them from the model. Pass it to support any other model whose patches come from
            a convolution with a stride equal to its kernel size, in row-major order.

    Returns:
        The map, (B, h, w), with the dtype and device of the relevance. It sums to the relevance of the patch
        tokens. The relevance of extra tokens and of window padding has no position in the image.

    Raises:
        TypeError: if the relevance is not a tensor, or if the model or the layer is not a module.
        ValueError: if the layer is not part of the model, if the patches of the model are not known, or
            if the shape of the relevance does not match the model, the layer and the size.

    Example:
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.rand(2, 3, 160, 160)
        >>> relevance = LayerAbsLRP(model, model.blocks[0]).attribute(x, target=3)
        >>> relevance.shape  # one class token, and 10 x 10 patches
        torch.Size([2, 101, 64])
        >>> token_map(relevance, model, model.blocks[0], size=x.shape[2:]).shape
        torch.Size([2, 10, 10])
    """
    if not isinstance(relevance, Tensor):
        raise TypeError(
            f"Expected `relevance` to be a tensor, but got {type(relevance).__name__}. If a layer has "
            f"several tensors, or several layers were explained, pass one tensor at a time."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}."
        )
    if not (layer is None or isinstance(layer, nn.Module)):
        raise TypeError(
            f"Expected `layer` to be the torch.nn.Module that was explained, but got "
            f"{type(layer).__name__}. Pass one layer and its relevance at a time."
        )
    model = unwrapped(model)
    layer = None if layer is None else part_of_model(model, layer)
    return TokenPlaces(model, size, extra_tokens).map(relevance, layer)


class _Transformer(NamedTuple):
    """The patch layout of a transformer."""

    path: str
    """Path of the transformer in the model."""
    module: nn.Module
    grid: Callable[[Size], Size]
    """Maps the size of an image to the number of patches along height and width."""
    size: Size | None
    """The image size that the model expects, or None for any size."""
    extra: Size
    """The number of tokens before and after the patches."""


class _Windows(NamedTuple):
    """The windows that a block partitions its grid into."""

    grid: Size
    window: Size
    shift: Size
    """Cyclic shift up and to the left before the partition."""
    shifts_first: bool
    """See :class:`_Convention`."""


class _Convention(NamedTuple):
    """How the blocks of a class partition their grid into windows."""

    inside: tuple[str, ...]
    """The children that process windows."""
    shifts_first: bool = False
    """Whether the grid is shifted and then padded, instead of padded and then shifted."""
    unclear: tuple[str, ...] = ()
    """Layers with heads in their leading dimension, or that process windows in only one of two calls."""


_SWIN, _SWIN_OF_TIMM = _Convention(("attention",)), _Convention(("attn",), shifts_first=True)
_CONVENTIONS = {
    "timm.Block": _Convention(
        ("attn", "ls1", "drop_path1"), unclear=("attn.attn_drop", "attn.k_norm", "attn.q_norm")
    ),  # of SAM
    "timm.SwinTransformerBlock": _SWIN_OF_TIMM,
    "timm.SwinTransformerV2Block": _SWIN_OF_TIMM,
    "timm.SwinTransformerV2CrBlock": _SWIN_OF_TIMM,
    "transformers.DonutSwinLayer": _SWIN,
    "transformers.MaskFormerSwinLayer": _SWIN,
    "transformers.SamHQVisionLayer": _Convention(("attn",)),
    "transformers.SamVisionLayer": _Convention(("attn",)),
    "transformers.SwinLayer": _Convention(("attention",), unclear=("dropout",)),
    "transformers.Swinv2Layer": _SWIN,
    "transformers.VitDetLayer": _SWIN,
}
"""Blocks that may have windows. In torchvision's Swin, windows only exist inside a function."""

_FEATURES_FIRST = (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.BatchNorm1d, nn.Conv1d)
"""Layers whose tensors have tokens in the last dimension, (B, D, L)."""

_EMBEDDINGS = {
    f"transformers.{name}"
    for name in (
        "Aimv2VisionEmbeddings AltCLIPVisionEmbeddings BeitEmbeddings Blip2VisionEmbeddings "
        "BlipVisionEmbeddings CLIPSegVisionEmbeddings CLIPVisionEmbeddings ChineseCLIPVisionEmbeddings "
        "DINOv3ViTEmbeddings DPTViTEmbeddings Data2VecVisionEmbeddings DeiTEmbeddings Dinov2Embeddings "
        "Dinov2WithRegistersEmbeddings DonutSwinEmbeddings FlavaImageEmbeddings GitVisionEmbeddings "
        "IJepaEmbeddings InstructBlipVisionEmbeddings InternVLVisionEmbeddings JanusVisionEmbeddings "
        "MLCDVisionEmbeddings MaskFormerSwinEmbeddings MetaClip2VisionEmbeddings Owlv2VisionEmbeddings "
        "OwlViTVisionEmbeddings PixioEmbeddings SamHQVisionEncoder SamVisionEncoder SiglipVisionEmbeddings "
        "SwinEmbeddings Swinv2Embeddings ViTEmbeddings ViTMSNEmbeddings VitDetEmbeddings "
        "VitPoseBackboneEmbeddings YolosEmbeddings"
    ).split()
}
"""Hugging Face modules that partition an image into patches and keep their order. The modules of Hiera, of
ViTMAE and of models whose inputs are patches do not."""

_PATCHES = ("patch_embeddings", "patch_embedding", "patch_embed")
_IN_FRONT = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
_BEHIND = ("detection_tokens",)
"""Names of the patch layer and of the token parameters in these modules."""


class TokenPlaces:
    """The positions of a model's tokens in images of a given size.

    Args:
        model: the model, without wrappers.
        size, extra_tokens: as in :func:`token_map`.
    """

    def __init__(
        self,
        model: nn.Module,
        size: Sequence[int] | None = None,
        extra_tokens: int | tuple[int, int] | None = None,
    ) -> None:
        self.model = model
        self.size = None if size is None else _checked_size(size)
        self.extra = None if extra_tokens is None else _checked_extra(extra_tokens)
        self.modules = dict(model.named_modules())
        self.paths = {module: path for path, module in self.modules.items()}
        # Submodules are registered, and listed, in the order in which they are called.
        self.order = {path: index for index, path in enumerate(self.modules)}
        self.merges = [path for path, module in self.modules.items() if _merges_patches(module)]
        found = [_transformer_at(path, module) for path, module in self.modules.items()]
        if not any(found) and self.extra is not None:
            found = [_first_patches(model)]
        self.transformers = [transformer for transformer in found if transformer is not None]

    def map(self, relevance: Tensor, layer: nn.Module | None = None) -> Tensor:
        """Return the relevance of a layer as a map, (B, h, w); see :func:`token_map`."""
        path = None if layer is None else self.paths[layer]
        transformer = self._transformer_of(path)
        size = self.size or transformer.size
        if size is None:
            raise ValueError(
                f"Expected `size`, because {_name(transformer.module)} accepts images of any size, but got "
                f"None. Pass `size=x.shape[2:]`."
            )
        base = transformer.grid(size)
        if path is None:
            self._check_no_windows(relevance, transformer, base)
        else:
            block = self._block_around(path, relevance)
            if block is not None:
                return self._from_windows(relevance, path, self._windows(transformer, base, block))
        inside = [merge for merge in self.merges if _is_inside(merge, transformer.path)]
        grids = list(dict.fromkeys(_halved(base, times) for times in range(len(inside) + 1)))
        readings = list(_readings(relevance, grids, self.extra or transformer.extra))
        if len(readings) != 1:
            raise ValueError(self._explained(relevance, transformer, size, grids, bool(readings)))
        return readings[0]

    def _transformer_of(self, path: str | None) -> _Transformer:
        """The innermost transformer around a layer, or the only one of the model."""
        found = self.transformers
        if path is not None:
            around = [t for t in found if _is_inside(path, t.path)]
            found = sorted(around, key=lambda t: len(t.path))[-1:] or found
        if not found:
            raise ValueError(
                f"Expected a supported transformer, but got {_name(self.model)}, whose patches are not "
                f"known. If its patches are in row-major order, pass `size=x.shape[2:]` and the number of "
                f"tokens before (and after) them, `extra_tokens=1` or `extra_tokens=(0, 1)`."
            )
        if len(found) > 1:
            raise ValueError(
                f"Expected `layer`, because the model has several transformers, "
                f"{', '.join(f'`{t.path}`' for t in found)}, but got "
                f"{'None' if path is None else f'`{path}`, which is in none of them'}. Pass the layer that "
                f"was explained, or one of the transformers as `model`."
            )
        return found[0]

    def _block_around(self, path: str, relevance: Tensor) -> str | None:
        """The path of the block whose windows a layer processes, or None."""
        unclear = isinstance(self.modules[path], _FEATURES_FIRST) and relevance.dim() == 3
        found = None
        parts = path.split(".")
        for end in range(1, len(parts)):
            block = ".".join(parts[:end])
            convention = _convention_of(self.modules[block])
            if convention is not None:
                unclear |= ".".join(parts[end:]) in convention.unclear
                if parts[end] in convention.inside and _has_windows(self.modules[block]):
                    found = block
        if unclear:
            raise ValueError(
                f"Expected a layer whose relevance has one position per token, but got `{path}` "
                f"({_name(self.modules[path])}), whose shape does not show the positions. Explain a layer "
                f"around it or next to it."
            )
        return found

    def _windows(self, transformer: _Transformer, base: Size, path: str) -> _Windows:
        """The windows of a block; `base` is the grid of the transformer's first block."""
        block: Any = self.modules[path]
        convention = _convention_of(block)
        assert convention is not None
        before = [
            merge
            for merge in self.merges
            if _is_inside(merge, transformer.path) and self.order[merge] < self.order[path]
        ]
        grid = _halved(base, len(before))
        window, shift = _pair(block.window_size), _pair(getattr(block, "shift_size", 0))
        if hasattr(
            block, "set_shift_and_window_size"
        ):  # the block sets them during its forward pass
            around = [module for name, module in self.modules.items() if _is_inside(path, name)]
            is_backbone = any("Backbone" in type(module).__name__ for module in around)
            if min(grid) <= min(window) and not is_backbone:  # a backbone never changes them
                window, shift = (min(grid), min(grid)), (0, 0)
        return _Windows(grid, window, shift, convention.shifts_first)

    def _from_windows(self, relevance: Tensor, path: str, windows: _Windows) -> Tensor:
        """The map of a layer that processes windows, (B * n, wh * ww, D) or (B * n, wh, ww, D)."""
        (h, w), (wh, ww) = windows.grid, windows.window
        rows, columns = -(-h // wh), -(-w // ww)
        shape = tuple(relevance.shape)
        if shape[1:-1] not in ((wh * ww,), (wh, ww)) or shape[0] % (rows * columns) != 0:
            raise ValueError(
                f"Expected the relevance of `{path}` ({_name(self.modules[path])}), whose block partitions "
                f"{h} x {w} patches into {rows} x {columns} windows, to have shape (B * {rows * columns}, "
                f"{wh * ww}, D) or (B * {rows * columns}, {wh}, {ww}, D), but got {shape}. If the images "
                f"have another size, pass `size=x.shape[2:]`."
            )
        cells = relevance.sum(-1).reshape(-1, rows, columns, wh, ww)
        whole = cells.transpose(2, 3).reshape(-1, rows * wh, columns * ww)
        if windows.shifts_first:
            return whole[:, :h, :w].roll(windows.shift, (1, 2))
        return whole.roll(windows.shift, (1, 2))[:, :h, :w]

    def _check_no_windows(self, relevance: Tensor, transformer: _Transformer, base: Size) -> None:
        """Raise if the relevance of an unknown layer could be that of windows."""
        for path, module in self.modules.items():
            if not _is_inside(path, transformer.path) or not _has_windows(module):
                continue
            windows = self._windows(transformer, base, path)
            wh, ww = windows.window
            is_whole = windows.grid == windows.window and windows.shift == (0, 0)
            # In blocks with a shift, no module processes windows as (wh, ww).
            cells = [(wh * ww,)] if hasattr(module, "shift_size") else [(wh * ww,), (wh, ww)]
            if tuple(relevance.shape[1:-1]) in cells and not is_whole:
                raise ValueError(
                    f"Expected `layer`, because relevance of shape {tuple(relevance.shape)} could be that of "
                    f"windows of {wh} x {ww} patches in `{path}`, but got None. Pass the layer that was "
                    f"explained."
                )

    def _explained(
        self,
        relevance: Tensor,
        transformer: _Transformer,
        size: Size,
        grids: Sequence[Size],
        ambiguous: bool,
    ) -> str:
        """The message for relevance that fits no layout, or more than one."""
        shape, (before, behind) = tuple(relevance.shape), self.extra or transformer.extra
        grid = " or ".join(f"{h} x {w}" for h, w in grids)
        if ambiguous:
            return (
                f"Expected relevance with a unique layout of {grid} patches, but got shape {shape}, which "
                f"fits with features first and with features last. Sum it over features before, for example "
                f"`relevance.sum(-1, keepdim=True)`."
            )
        extra = f" (with or without {before} tokens before and {behind} after them)"
        return (
            f"Expected the relevance of {_name(transformer.module)}, for images of {size[0]} x {size[1]}, to "
            f"be that of {grid} patches{extra if before or behind else ''}, as (B, L, D), (B, h, w, D) or "
            f"(B, D, h, w), but got shape {shape}. If the images have another size, pass "
            f"`size=x.shape[2:]`. If the model has other tokens, pass `extra_tokens=(before, after)`. "
            f"Relevance of single heads cannot be mapped."
        )


def _readings(relevance: Tensor, grids: Sequence[Size], extra: Size) -> Iterator[Tensor]:
    """Every way to arrange relevance on one of several grids, (B, h, w)."""
    if relevance.dim() == 3:
        for h, w in grids:
            # Some models add their class token in a later block.
            for before, behind in dict.fromkeys([(0, 0), extra]):
                if relevance.shape[1] == before + h * w + behind:
                    patches = relevance[:, before : before + h * w]
                    yield patches.sum(2).unflatten(1, (h, w))
    elif relevance.dim() == 4:
        for dim in (1, 3):
            if tuple(n for i, n in enumerate(relevance.shape) if i not in (0, dim)) in grids:
                yield relevance.sum(dim)


def _transformer_at(path: str, module: Any) -> _Transformer | None:
    """The transformer whose module or patch embedding this is, or None."""
    kinds = _kinds(module)
    if "torchvision.VisionTransformer" in kinds:
        grid = _by_patches(_pair(module.patch_size))
        return _Transformer(path, module, grid, _pair(module.image_size), (1, 0))
    if "torchvision.SwinTransformer" in kinds:
        return _Transformer(path, module, _by_convolution(module.features[0][0]), None, (0, 0))
    embeddings = kinds & _EMBEDDINGS
    if embeddings:
        return _of_hugging_face(
            path, module, in_encoder=any("Encoder" in kind for kind in embeddings)
        )
    embed = getattr(module, "patch_embed", None)
    if (
        not isinstance(embed, nn.Module) or "_orig_mod" in module._modules
    ):  # the compiled module follows
        return None
    before = getattr(module, "num_prefix_tokens", None)
    if before is None and any(map(_has_windows, module.modules())):
        before = 0
    if not isinstance(before, int):
        return None
    by_embed: Callable[[Size], Size] | None = getattr(embed, "dynamic_feat_size", None)
    patch = _pair_of(embed, "patch_size")
    if by_embed is None and patch is not None:
        by_embed = _by_patches(patch)
    if by_embed is None:
        return None
    return _Transformer(path, module, by_embed, _pair_of(embed, "img_size"), (before, 0))


def _of_hugging_face(path: str, module: Any, *, in_encoder: bool) -> _Transformer | None:
    """The transformer that a Hugging Face embedding module belongs to."""
    children = (getattr(module, name, None) for name in _PATCHES)
    patches: Any = next((child for child in children if child is not None), module)
    convolutions = [part for part in patches.modules() if isinstance(part, nn.Conv2d)]
    if len(convolutions) != 1:
        return None
    (convolution,) = convolutions
    size = _pair_of(patches, "image_size") or _pair_of(module, "config", "image_size")
    if "transformers.VitDetEmbeddings" in _kinds(module):
        size = None  # its `image_size` is that of pretraining, not of the inputs

    def count(names: Sequence[str]) -> int:
        tokens = (getattr(module, name, None) for name in names)
        return sum(t.numel() // convolution.out_channels for t in tokens if isinstance(t, Tensor))

    return _Transformer(
        path if in_encoder else path.rpartition(".")[0],
        module,
        _by_convolution(convolution, pads=hasattr(patches, "maybe_pad")),
        size,
        (count(_IN_FRONT), count(_BEHIND)),
    )


def _first_patches(model: nn.Module) -> _Transformer | None:
    """The layout of any other model, from its first convolution whose stride equals its kernel size."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1):
            return _Transformer("", model, _by_convolution(module), None, (0, 0))
    return None


def _by_patches(patch: Size) -> Callable[[Size], Size]:
    return lambda size: (size[0] // patch[0], size[1] // patch[1])


def _by_convolution(convolution: nn.Conv2d, *, pads: bool = False) -> Callable[[Size], Size]:
    """From the input size of a convolution to its output size; `pads` rounds inputs up to whole strides."""

    def along(axis: int, length: int) -> int:
        kernel, stride = convolution.kernel_size[axis], convolution.stride[axis]
        padding = convolution.padding
        if pads:
            length = -(-length // stride) * stride
        padded = length + (0 if isinstance(padding, str) else 2 * padding[axis])
        return (padded - kernel) // stride + 1

    return lambda size: (along(0, size[0]), along(1, size[1]))


def _halved(grid: Size, times: int) -> Size:
    """The size of a grid after merging 2 x 2 patches, with padding, several times."""
    return -(-grid[0] // 2**times), -(-grid[1] // 2**times)


def _merges_patches(module: nn.Module) -> bool:
    return any("PatchMerging" in kind.__name__ for kind in type(module).__mro__)


def _convention_of(block: nn.Module) -> _Convention | None:
    return next((_CONVENTIONS[kind] for kind in _kinds(block) if kind in _CONVENTIONS), None)


def _has_windows(block: nn.Module) -> bool:
    """Whether a module is known as a block that partitions its grid into windows."""
    return bool(getattr(block, "window_size", 0)) and _convention_of(block) is not None


def _kinds(module: object) -> set[str]:
    """The classes of a module, prefixed with their library."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(module).__mro__}


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _is_inside(path: str, outer: str) -> bool:
    """Whether a path is that of the outer module or of one of its submodules."""
    return outer == "" or path == outer or path.startswith(outer + ".")


def _pair(value: Any) -> Size:
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    return int(height), int(width)


def _pair_of(value: Any, *names: str) -> Size | None:
    """Height and width from a nested attribute, or None."""
    for name in names:
        value = getattr(value, name, None)
    pair = (value, value) if isinstance(value, int) else value
    return (pair[0], pair[1]) if _are_counts(pair, 2) else None


def _checked_size(size: Any) -> Size:
    if not _are_counts(size, 2) or 0 in size:
        raise ValueError(
            f"Expected `size` to be the height and width of the images, but got {size!r}. Pass "
            f"`size=x.shape[2:]`."
        )
    return size[0], size[1]


def _checked_extra(extra: Any) -> Size:
    pair = (extra, 0) if isinstance(extra, int) else extra
    if not _are_counts(pair, 2):
        raise ValueError(
            f"Expected `extra_tokens` to be the number of tokens before the patches, or a pair (before, "
            f"after), but got {extra!r}."
        )
    return pair[0], pair[1]


def _are_counts(values: Any, length: int) -> bool:
    return (
        isinstance(values, (tuple, list))
        and len(values) == length
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in values)
    )
