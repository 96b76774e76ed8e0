"""The Captum attribution class of LRP with its composites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.mappings import Mapping, composite
from captum_abslrp.noise_tunnel import for_captum
from captum_abslrp.seeds import Contrast, Target

__all__ = ["LRP"]


class LRP(AbsLRP):
    r"""Layer-wise relevance propagation with signed rules, on the engine of :class:`AbsLRP`.

    Relevance starts as the logit of the target, :math:`R = z_t`. Each call distributes it in proportion to
    contributions of both signs. With a contrast, one pass explains the difference of logits: :math:`z_t -
    \bar z_o` for the mean of the other classes, or :math:`z_t - z_c` for a class. Relevance is in the unit of
    the logit. The share of biases is lost.

    Sources: Bach et al. 2015; Montavon et al. 2019; Achtibat et al. 2024 (AttnLRP); Ali et al. 2022 (CP-LRP);
    Berend et al. 2026 (ResLRP). The model is never modified: batch norm is folded into the layer before it
    on the fly.

    Args:
        model: as in :class:`AbsLRP`.
        composite: the name of a composite, or a :class:`~captum_abslrp.mappings.Mapping` of signed rules:

            - ``"epsilon"``: the epsilon rule everywhere;
            - ``"epsilon_plus"``: z-plus for convolutions, epsilon for linear layers;
            - ``"epsilon_plus_flat"``: ``"epsilon_plus"`` with the flat rule for the first layer;
            - ``"epsilon_alpha2_beta1"``: alpha-beta (2, 1) for convolutions, epsilon for linear layers;
            - ``"epsilon_gamma_box"``: z-box for the first convolution, gamma for the others; requires ``low``
              and ``high``, the limits of the input;
            - ``"attnlrp"``: for transformers; softmax by its gradient, products split evenly;
            - ``"cp_lrp"``: ``"attnlrp"`` with attention weights as constants;
            - ``"res_lrp"``: ``"attnlrp"`` with ``residual_gamma=1``.
        output: as in :class:`AbsLRP`.
        parameters: parameters of the composite: ``epsilon``, ``stabilizer``, ``gamma``, ``conv_gamma``,
            ``linear_gamma``, ``residual_gamma``, ``low``, ``high``.

    Raises:
        TypeError: as in :class:`AbsLRP`, or if a parameter is unknown to the composite or is missing.
        ValueError: if the composite is unknown, or if the mapping does not have signed rules.

    Example:
        >>> model = timm.create_model("test_vit").eval()
        >>> x = torch.rand(2, 3, 160, 160)
        >>> relevance = LRP(model, "attnlrp").attribute(x, target=3)
        >>> relevance.shape
        torch.Size([2, 3, 160, 160])
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Mapping | str = "epsilon",
        *,
        output: Callable[[Any], Tensor] | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__(model, _table(composite, parameters), output=output)
        self.contrast = None

    @for_captum
    def attribute(  # type: ignore[override]  # options are keyword-only
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast = None,
        **options: Any,
    ) -> Any:
        """Attribute the target's logit, or its difference from a contrast, to the elements of the inputs.

        Args:
            inputs, target, additional_forward_args: as in :meth:`AbsLRP.attribute`.
            contrast: the logit that is subtracted from the target's logit: None (nothing), ``"others"`` (the
                mean of the other logits), ``"softmax"`` (their mean, weighted by probability), or classes.
            options: ``combine`` (``"difference"`` or ``"guided"``), ``guide``, ``class_dim``,
                ``internal_batch_size``, ``return_convergence_delta`` and ``check_finite`` of
                :meth:`AbsLRP.attribute`.

        Returns:
            Relevance with the shape of ``inputs``, in the unit of the logits. The delta is the sum of
            relevance minus the explained logit (or difference of logits).

        Raises:
            The same errors as :meth:`AbsLRP.attribute`.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False))
            >>> x = torch.rand(2, 3)
            >>> relevance = LRP(model.eval()).attribute(x, target=2)
            >>> torch.allclose(relevance.sum(1), model(x)[:, 2], atol=1e-5)
            True
        """
        return super().attribute(
            inputs, target, additional_forward_args, contrast=contrast, **options
        )


def _table(given: Any, parameters: dict[str, Any]) -> Mapping:
    """The mapping of a composite."""
    if not isinstance(given, Mapping):
        return composite(given, **parameters)
    if parameters:
        raise TypeError(
            f"Expected no parameters with a custom mapping, but got {[*parameters]}. Pass them to the rules "
            f"of the mapping."
        )
    if not given.signed:
        raise ValueError(
            f"Expected `composite` to be a mapping with signed rules, but got {given.name!r}. Pass "
            f"`Mapping(..., signed=True)` if its rules explain the logit, or use `AbsLRP(model, mapping)`."
        )
    return given
