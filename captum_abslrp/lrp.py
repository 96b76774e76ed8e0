"""The Captum attribution class of LRP by its composites."""

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
    r"""Layer-wise relevance propagation by signed rules, on the engine of :class:`AbsLRP`.

    Relevance starts as the logit of the target, :math:`R = z_t`, and is shared call by call by contributions
    of both signs. With a contrast one pass explains the difference of logits, :math:`z_t - \bar z_o` of the
    others, or :math:`z_t - z_c` of a class. The map is in the unit of the logit; what goes to biases is lost.

    Sources: Bach et al. 2015; Montavon et al. 2019; Achtibat et al. 2024 (AttnLRP); Ali et al. 2022 (CP-LRP);
    Berend et al. 2026 (ResLRP). The model is never changed; batch norm is folded into the layer before it on
    the fly.

    Args:
        model: as for :class:`AbsLRP`.
        composite: the name of a composite, or a :class:`~captum_abslrp.mappings.Mapping` of signed rules:

            - ``"epsilon"``: the epsilon rule everywhere;
            - ``"epsilon_plus"``: z-plus in convolutions, epsilon in linear layers;
            - ``"epsilon_plus_flat"``: the same with the flat rule in the first layer;
            - ``"epsilon_alpha2_beta1"``: alpha-beta (2, 1) in convolutions, epsilon in linear layers;
            - ``"epsilon_gamma_box"``: z-box in the first convolution, gamma in the others; needs ``low`` and
              ``high``, the limits of the input;
            - ``"attnlrp"``: for transformers: softmax by its gradient, products shared evenly;
            - ``"cp_lrp"``: the same with attention as a constant;
            - ``"res_lrp"``: AttnLRP with ``residual_gamma=1``.
        output: as for :class:`AbsLRP`.
        parameters: parameters of the composite: ``epsilon``, ``stabilizer``, ``gamma``, ``conv_gamma``,
            ``linear_gamma``, ``residual_gamma``, ``low``, ``high``.

    Raises:
        TypeError: as for :class:`AbsLRP`, or if the composite does not have a parameter or lacks one.
        ValueError: if there is no such composite, or the mapping is not one of signed rules.

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
        """Attribute the logit of the target, or its difference to a contrast, to the elements of the inputs.

        Args:
            inputs, target, additional_forward_args: as for :meth:`AbsLRP.attribute`.
            contrast: what is subtracted from the logit of the target: None (nothing), ``"others"`` (the
                mean of the other logits), ``"softmax"`` (their mean by probability), or classes.
            options: ``combine`` (``"difference"`` or ``"guided"``), ``guide``, ``class_dim``,
                ``internal_batch_size``, ``return_convergence_delta`` and ``check_finite`` of
                :meth:`AbsLRP.attribute`.

        Returns:
            Relevance shaped like ``inputs``, in the unit of the logits. The delta is the sum of relevance
            less what was explained.

        Raises:
            As :meth:`AbsLRP.attribute`.

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
            f"Expected no parameters beside a mapping of your own, but got {[*parameters]}. Give them to its "
            f"rules."
        )
    if not given.signed:
        raise ValueError(
            f"Expected `composite` to be a mapping of signed rules, but got {given.name!r}. Pass "
            f"`Mapping(..., signed=True)` for rules that explain the logit, or use `AbsLRP(model, mapping)`."
        )
    return given
