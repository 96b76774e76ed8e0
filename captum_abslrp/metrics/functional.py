r"""The parts of Global Attribution Evaluation (GAE) as pure functions.

Axes: M mosaics, B images, C channels, H height, W width, K classes, S masking states (ten as
published, starting with the unmasked image).

Source: Vukadin et al., ACM TIST 15(3), 2024, section on GAE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "dice_distance",
    "faithfulness",
    "gradient_map",
    "impact_map",
    "lerf_morf_area",
    "localization",
    "masked_states",
    "mosaic",
    "positive_part",
    "positive_probabilities",
    "robustness",
    "score_map",
    "weighted_mean",
]


def mosaic(images: Tensor) -> Tensor:
    """Combine every four images into a mosaic, at half size by nearest-neighbor interpolation.

    Args:
        images: (4 M, C, H, W); mosaic ``m`` consists of images ``4 m`` to ``4 m + 3``: top left, top
            right, bottom left, bottom right.

    Returns:
        Mosaics, (M, C, H, W).

    Raises:
        ValueError: if the number of images is not a multiple of four, or if H or W is odd.

    Example:
        >>> images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
        >>> mosaic(images)[0, 0]
        tensor([[0., 1.],
                [2., 3.]])
    """
    if images.dim() != 4 or len(images) % 4 or len(images) == 0:
        raise ValueError(
            f"Expected `images` to have shape (4 M, C, H, W), but got {tuple(images.shape)}."
        )
    height, width = images.shape[2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"Expected the height and width of `images` to be even, but got {height} x {width}."
        )
    small = F.interpolate(images, size=(height // 2, width // 2), mode="nearest")
    rows = small.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(-1, images.shape[1], height, width)


def positive_probabilities(mosaic_outputs: Tensor, predictions: Tensor) -> Tensor:
    """Compute the probability that each image of a mosaic is drawn as the positive image.

    Args:
        mosaic_outputs: outputs of the model for the mosaics, (M, K).
        predictions: predicted classes of the four images of each mosaic, (M, 4).

    Returns:
        The softmax over the outputs of the four classes, (M, 4).

    Example:
        >>> positive_probabilities(torch.zeros(1, 3), torch.tensor([[0, 1, 2, 0]]))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return mosaic_outputs.gather(1, predictions).softmax(1)


def gradient_map(
    forward_func: Callable[[Tensor], Tensor], x: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Compute the map that determines the masking order, :math:`g = |x \, \partial |f_t(x)| / \partial x|`.

    Args:
        forward_func: the model, which maps images, (B, C, H, W), to outputs, (B, K).
        x: images, (B, C, H, W).
        target: classes ``t``, (B,).

    Returns:
        ``f_t(x)`` of shape (B,), and ``g`` with the shape of ``x``.

    Example:
        >>> f, g = gradient_map(lambda x: -x.sum((2, 3)), torch.ones(1, 2, 1, 1), torch.tensor([1]))
        >>> f, g.flatten()
        (tensor([-1.]), tensor([0., 1.]))
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        output = forward_func(leaf).gather(1, target.view(-1, 1)).squeeze(1)
        (gradient,) = torch.autograd.grad(output.abs().sum(), leaf)
    return output.detach(), (x * gradient).abs()


def masked_states(
    forward_func: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    most_relevant_first: bool,
    n_steps: int = 10,
    schedule: str = "published",
    baseline: float = 0.0,
    unmasked: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask images step by step, in the order of the model's gradient.

    Step ``k`` masks the image of step ``k - 1`` in the order of its own :func:`gradient_map`.

    Args:
        forward_func: the model, which maps images, (B, C, H, W), to outputs, (B, K).
        x: images, (B, C, H, W).
        target: classes, (B,).
        most_relevant_first: whether to mask the largest values of the map first (MoRF) or the smallest
            (LeRF).
        n_steps: number of states S, including the unmasked one.
        schedule: with ``"published"``, step ``k`` masks a fraction ``k / S`` of all elements, including
            elements that are already masked, so that MoRF accumulates (10, 30, 60, 100% with ten states)
            and LeRF does not. With ``"cumulative"``, a fraction ``k / S`` is masked after step ``k``.
        baseline: value of a masked element.
        unmasked: output and :func:`gradient_map` of the unmasked images, if already computed.

    Returns:
        States, (S, B, C, H, W), their outputs for the target, (S, B), and their maps, with the shape of the
        states, each scaled to sum 1.

    Example:
        >>> x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
        >>> states, outputs, maps = masked_states(
        ...     lambda x: x.sum((2, 3)), x, torch.tensor([0]), most_relevant_first=True, n_steps=2)
        >>> states[1], outputs.flatten()
        (tensor([[[[1., 2., 0., 0.]]]]), tensor([10.,  3.]))
    """
    count = x[0].numel()
    state, masked = x.detach(), torch.zeros_like(x, dtype=torch.bool)
    states, outputs, maps = [], [], []
    for step in range(1, n_steps + 1):
        if step == 1 and unmasked is not None:
            output, g = unmasked
        else:
            output, g = gradient_map(forward_func, state, target)
        states.append(state)
        outputs.append(output)
        maps.append(scaled_to_sum_one(g))
        if step == n_steps:
            break
        order = g.flatten(1)
        if schedule == "cumulative":
            # Masked elements stay first in the order.
            order = order.masked_fill(masked.flatten(1), torch.inf if most_relevant_first else -1.0)
        chosen = order.topk(step * count // n_steps, dim=1, largest=most_relevant_first).indices
        masked = masked.flatten(1).scatter(1, chosen, True).view_as(x)
        state = (
            state.masked_fill(masked, baseline)
            if schedule == "cumulative"
            else (state.flatten(1).scatter(1, chosen, baseline).view_as(x))
        )
    return torch.stack(states), torch.stack(outputs), torch.stack(maps)


def scaled_to_sum_one(values: Tensor) -> Tensor:
    """Scale nonnegative maps (B, ...) to sum 1; a map of zeros is unchanged."""
    totals = values.flatten(1).sum(1)
    return values / torch.where(totals > 0, totals, 1).view(-1, *[1] * (values.dim() - 1))


def impact_map(lerf_maps: Tensor, morf_maps: Tensor) -> Tensor:
    """Compute which elements have an impact under masking (1) and which do not (-1).

    Args:
        lerf_maps, morf_maps: gradient maps of the states, (S, B, C, H, W), each with sum 1.

    Returns:
        The sign of the difference between the LeRF and MoRF maps, (B, C, H, W), each summed over the states
        and scaled to sum 1.

    Example:
        >>> lerf, morf = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
        >>> impact_map(lerf.view(1, 1, 1, 1, 2), morf.view(1, 1, 1, 1, 2)).flatten()
        tensor([ 1., -1.])
    """
    return (scaled_to_sum_one(lerf_maps.sum(0)) - scaled_to_sum_one(morf_maps.sum(0))).sign()


def positive_part(attributions: Tensor) -> Tensor:
    """Compute the positive part of attributions, scaled to maximum 1 per image; zeros stay zeros.

    Args:
        attributions: (B, ...), signed, in any unit.

    Returns:
        Values in [0, 1], with the shape of the attributions.

    Example:
        >>> positive_part(torch.tensor([[-1.0, 2.0, 4.0], [-1.0, 0.0, -2.0]]))
        tensor([[0.0000, 0.5000, 1.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    positive = attributions.clamp(min=0)
    maxima = positive.flatten(1).amax(1)
    return positive / torch.where(maxima > 0, maxima, 1).view(-1, *[1] * (positive.dim() - 1))


def dice_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""Compute :math:`D(a, b) = \sum |a - b| / (\sum |a| + \sum |b|)` over all dimensions but the first.

    Returns:
        (B,), between 0 (equal) and 1; 0 if both are zero.

    Example:
        >>> dice_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([1.])
    """
    difference = (a - b).abs().flatten(1).sum(1)
    total = a.abs().flatten(1).sum(1) + b.abs().flatten(1).sum(1)
    return difference / torch.where(total > 0, total, 1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    r"""Compute :math:`\sum v r / \sum r` per image; 0 if all weights are zero.

    Args:
        values: ``v``, (B, ...).
        weights: ``r``, nonnegative, (B, ...), broadcastable with the values.

    Returns:
        (B,).

    Example:
        >>> weighted_mean(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([0.5000])
    """
    total = weights.flatten(1).sum(1)
    return (values * weights).flatten(1).sum(1) / torch.where(total > 0, total, 1)


def faithfulness(impact: Tensor, relevance: Tensor) -> Tensor:
    """Compute the share of relevance on elements with an impact minus the share on other elements.

    Args:
        impact: see :func:`impact_map`, (B, C, H, W).
        relevance: nonnegative, see :func:`positive_part`, (B, C, H, W).

    Returns:
        (B,), in [-1, 1].

    Example:
        >>> faithfulness(torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[1.0, 0.5, 0.5]]))
        tensor([0.2500])
    """
    return weighted_mean(impact, relevance)


def robustness(relevance_shift: Tensor, output_shift: Tensor) -> Tensor:
    """Compute how well the shift of relevance follows the shift of the output: ``1 - 2 D``.

    Args:
        relevance_shift: ``D(r, r_MoRF_k) - D(r, r_LeRF_k)``, (B, S - 1).
        output_shift: ``(f_LeRF_k - f_MoRF_k) / f_0``, (B, S - 1).

    Returns:
        (B,), in [-1, 1].

    Example:
        >>> robustness(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 1.0]]))
        tensor([0.6000])
    """
    return 1 - 2 * dice_distance(relevance_shift, output_shift)


def score_map(probabilities: Tensor, positive: Tensor, height: int, width: int) -> Tensor:
    r"""Compute the score of relevance at each position of a mosaic.

    The score is :math:`2 p_j / p_{positive} - 1` in quadrant ``j`` and 1 in the two center rows and columns.

    Args:
        probabilities: softmax output of the model for the positive image, at the predicted classes of
            the four images, (M, 4).
        positive: position of the positive image in each mosaic, (M,).
        height, width: size of the mosaic, even.

    Returns:
        (M, height, width), in [-1, 1].

    Example:
        >>> score_map(torch.tensor([[0.8, 0.2, 0.0, 0.4]]), torch.tensor([0]), 4, 4)
        tensor([[[ 1.0000,  1.0000,  1.0000, -0.5000],
                 [ 1.0000,  1.0000,  1.0000,  1.0000],
                 [ 1.0000,  1.0000,  1.0000,  1.0000],
                 [-1.0000,  1.0000,  1.0000,  0.0000]]])
    """
    quadrants = 2 * probabilities / probabilities.gather(1, positive.view(-1, 1)) - 1
    grid = quadrants.view(-1, 2, 2)
    scores = grid.repeat_interleave(height // 2, 1).repeat_interleave(width // 2, 2)
    scores[:, height // 2 - 1 : height // 2 + 1] = 1
    scores[:, :, width // 2 - 1 : width // 2 + 1] = 1
    return scores


def localization(relevance: Tensor, positive: Tensor) -> Tensor:
    """Compute the share of positive relevance in the quadrant of the target class (GridPG).

    Relevance is summed over channels first. The chance level is 0.25.

    Source: Böhle, Fritz, Schiele, *Convolutional Dynamic Alignment Networks for Interpretable
    Classifications*, CVPR 2021, section 4.

    Args:
        relevance: attributions of mosaics, (M, C, H, W).
        positive: position of that quadrant, (M,).

    Returns:
        (M,), in [0, 1]; 0 if there is no positive relevance.

    Example:
        >>> localization(torch.ones(1, 3, 4, 4), torch.tensor([2]))
        tensor([0.2500])
    """
    height, width = relevance.shape[2:]
    quadrants = torch.eye(4, dtype=relevance.dtype, device=relevance.device)[positive].view(
        -1, 2, 2
    )
    inside = quadrants.repeat_interleave(height // 2, 1).repeat_interleave(width // 2, 2)
    return weighted_mean(inside, relevance.sum(1).clamp(min=0))


def lerf_morf_area(
    forward_func: Callable[[Tensor], Tensor],
    x: Tensor,
    attributions: Tensor,
    target: Tensor,
    *,
    n_steps: int = 10,
    baseline: float = 0.0,
) -> Tensor:
    """Compute the area between the LeRF and MoRF curves of an attribution.

    The curves are the target's probability as pixels are masked, least relevant first (LeRF) and most
    relevant first (MoRF).

    Args:
        forward_func: the model, which maps images, (B, C, H, W), to outputs, (B, K).
        x: images, (B, C, H, W).
        attributions: relevance with the shape of ``x``; pixels are ranked by its sum over channels.
        target: classes, (B,).
        n_steps: fractions ``k / n_steps`` are masked, ``k = 1 .. n_steps - 1``.
        baseline: value of a masked pixel.

    Returns:
        Mean of LeRF minus MoRF over the steps, (B,), in [-1, 1]; higher is better.

    Example:
        >>> model = lambda x: torch.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)  # depends on one pixel
        >>> x = torch.full((1, 1, 1, 2), 5.0)
        >>> lerf_morf_area(model, x, torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([0]), n_steps=2)
        tensor([0.5000])
    """
    ranked = attributions.sum(1).flatten(1).argsort(dim=1, descending=True, stable=True)
    pixels = ranked.shape[1]
    gaps = []
    for step in range(1, n_steps):
        count = step * pixels // n_steps
        probabilities = []
        for chosen in (ranked[:, pixels - count :], ranked[:, :count]):
            masked = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, chosen, True)
            image = x.masked_fill(masked.view(-1, 1, *x.shape[2:]), baseline)
            with torch.no_grad():
                output = forward_func(image).softmax(1)
            probabilities.append(output.gather(1, target.view(-1, 1)).squeeze(1))
        gaps.append(probabilities[0] - probabilities[1])
    return torch.stack(gaps).mean(0)
