"""Relevance of the tokens of a text, from the output of a tokenizer.

Token indices cannot have relevance, so their embeddings are explained. The relevance of a token is the sum
over its embedding. Hugging Face models are called by keyword, as in ``model(**tokenizer(...))``, because the
attention mask is not the second argument of every model.

Axes: B texts, L tokens, D features.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_abslrp.layer import LayerAbsLRP
from captum_abslrp.mappings import Mapping, find_mapping
from captum_abslrp.seeds import Contrast, Target
from captum_abslrp.targets import WithKeywords

__all__ = ["TextAbsLRP", "find_embedding"]


class TextAbsLRP(LayerAbsLRP):
    r"""Relevance of each token of a text, for text classifiers and sentence similarity.

    In contrast to :class:`LayerAbsLRP`, this class finds the word embedding, accepts the output of a
    tokenizer, sums the relevance of each token, and defaults to signed rules. With signed rules, relevance
    is in the unit of the score, and negative relevance lowers it. The share of position
    and token-type embeddings is not included.

    Tokens that the attention mask removes get no relevance. They do not affect the relevance of other tokens,
    provided that the model ignores them.

    Args:
        model: the model, in evaluation mode: a text classifier, or a module that returns sentence
            embeddings, such as :class:`~captum_abslrp.targets.MeanPooling`.
        embedding: the module that returns one vector per token, (B, L, D). None uses the result of
            ``get_input_embeddings()`` for a Hugging Face model, or the only ``nn.Embedding``.
        mapping: as in :class:`AbsLRP`, where None is the published method. The default, ``"attnlrp"``, has
            signed rules.
        normalization, output: as in :class:`AbsLRP`.

    Raises:
        TypeError: as in :class:`AbsLRP`, or if ``embedding`` is not a module.
        ValueError: as in :class:`AbsLRP`; or if ``embedding`` is not part of the model, or if it is None and
            the embedding cannot be found.

    Example:
        >>> class Classifier(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        ...     def forward(self, input_ids, attention_mask):
        ...         weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        ...         return self.head((self.words(input_ids) * weight).sum(1))
        >>> ids = torch.tensor([[1, 5, 2, 0], [8, 3, 3, 7]])
        >>> encoded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
        >>> relevance = TextAbsLRP(Classifier().eval()).attribute(encoded, target=2)
        >>> relevance.shape, float(relevance[0, 3])  # the last token of the first text is padding
        (torch.Size([2, 4]), 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: nn.Module | None = None,
        mapping: Mapping | str | None = "attnlrp",
        *,
        normalization: str = "separate",
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if embedding is None and isinstance(model, nn.Module):
            embedding = find_embedding(model)
        elif not isinstance(embedding, nn.Module) and isinstance(model, nn.Module):
            raise TypeError(
                f"Expected `embedding` to be a torch.nn.Module or None, but got "
                f"{type(embedding).__name__}. Pass the module that returns the vectors of the tokens."
            )
        super().__init__(
            model,
            embedding,  # type: ignore[arg-type]  # the next check raises if the model is not a module
            mapping,
            normalization=normalization,
            output=output,
        )

    def attribute(  # type: ignore[override]  # the options of layers are left out
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        contrast: Contrast = "others",
        combine: str = "difference",
        class_dim: int | None = None,
        call_index: int | None = None,
        internal_batch_size: int | str | None = None,
        return_convergence_delta: bool = False,
        check_finite: bool = False,
    ) -> Any:
        """Attribute the target's output to the tokens.

        Args:
            inputs: the output of a tokenizer with ``return_tensors="pt"``: a dict of tensors with
                ``input_ids``, (B, L). All entries are passed to the model by keyword. For a model without
                padding, the token ids alone, (B, L), are passed as its first argument.
            target: as in :meth:`AbsLRP.attribute`; for sentences, see
                :class:`~captum_abslrp.targets.Similarity`.
            additional_forward_args: arguments of the model after the token ids, one argument or a tuple, if
                ``inputs`` are token ids alone.
            contrast, combine, class_dim, internal_batch_size, check_finite: as in
                :meth:`LayerAbsLRP.attribute`.
            call_index: index of the call to explain if the model calls the embedding more than once.
            return_convergence_delta: whether to return the delta as well.

        Returns:
            Relevance of each token, (B, L), with the dtype and device of the embedding. With
            ``return_convergence_delta``, a pair of the relevance and the delta, (B,): the sum of the
            relevance minus the explained score. The delta shows how much relevance position embeddings,
            token-type embeddings and biases absorb.

        Raises:
            TypeError: as in :meth:`AbsLRP.attribute`, or if ``inputs`` are not integer tensors.
            ValueError: as in :meth:`LayerAbsLRP.attribute`; or if ``inputs`` lack ``input_ids`` or do not
                have shape (B, L); if ``additional_forward_args`` are passed with a dict; or if ``embedding``
                does not return one vector per token.

        Example:
            >>> encoder = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5)).eval()
            >>> ids, others = torch.tensor([[1, 5, 2]]), torch.tensor([[8, 0, 3]])
            >>> from captum_abslrp.targets import Similarity
            >>> like_others = Similarity(encoder(others))
            >>> TextAbsLRP(encoder).attribute(ids, target=like_others).shape
            torch.Size([1, 3])
        """
        ids, names, values = _split(inputs, additional_forward_args)
        explained: LayerAbsLRP = self
        if names:
            explained = LayerAbsLRP(
                WithKeywords(self.model, *names),
                self.layer,
                self.mapping or find_mapping(self.model),
                normalization=self.normalization,
                output=self.output,
            )
        relevance, delta = LayerAbsLRP.attribute(
            explained,
            ids,
            target,
            values,
            contrast=contrast,
            combine=combine,
            class_dim=class_dim,
            call_index=call_index,
            internal_batch_size=internal_batch_size,
            return_convergence_delta=True,
            check_finite=check_finite,
        )
        if not isinstance(relevance, Tensor) or relevance.shape[:-1] != ids.shape:
            found = relevance if isinstance(relevance, tuple) else (relevance,)
            raise ValueError(
                f"Expected {self._name(self.layer)} to return one vector for each of {tuple(ids.shape)} "
                f"tokens, but got {', '.join(str(tuple(r.shape)) for r in found)}. Pass another module as "
                f"`embedding`."
            )
        of_tokens = relevance.sum(-1)
        return (of_tokens, delta) if return_convergence_delta else of_tokens


def find_embedding(model: nn.Module) -> nn.Module:
    """Find the module that maps token ids to vectors.

    Args:
        model: a text model, or a module that contains one.

    Returns:
        The result of ``get_input_embeddings()`` of the outermost module that has this method (Hugging Face);
        otherwise the only ``nn.Embedding``.

    Raises:
        ValueError: if there is no such module, or if there are several.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
        >>> find_embedding(model)
        Embedding(9, 4)
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        try:
            found = getattr(module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # the module has no word embedding
            continue
        if isinstance(found, nn.Module) and any(found is part for part in modules.values()):
            return found
    paths = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    if len(paths) == 1:
        return modules[paths[0]]
    listed = ", ".join(f"`{path}`" for path in paths)
    raise ValueError(
        f"Expected a model with a single word embedding, but got {type(model).__name__} with "
        f"{len(paths) or 'no'} `nn.Embedding`{f' ({listed})' if paths else ''}. Pass the embedding: "
        f'`TextAbsLRP(model, model.get_submodule("{paths[0] if paths else "..."}"))`.'
    )


def _split(inputs: Any, extra: Any) -> tuple[Tensor, list[str], Any]:
    """Return token ids, the keywords of all arguments (empty for positional), and the other arguments."""
    names: list[str] = []
    ids = inputs
    if isinstance(inputs, collections.abc.Mapping):
        if "input_ids" not in inputs:
            raise ValueError(
                f"Expected `inputs` to have `input_ids`, but got {[*inputs]}. Pass what the tokenizer "
                f"returns, or the token ids alone."
            )
        if extra is not None:
            raise ValueError(
                "Expected no `additional_forward_args`, because `inputs` is a dict, but got both. Add them "
                "to `inputs`: `{**encoded, name: value}`."
            )
        names = ["input_ids", *(name for name in inputs if name != "input_ids")]
        ids, *values = (inputs[name] for name in names)
        extra = tuple(values)
        lists = [name for name in names if isinstance(inputs[name], list)]
        if lists:
            raise TypeError(
                f"Expected `inputs` to contain tensors, but got a list as `{lists[0]}`. Call the tokenizer "
                f'with `return_tensors="pt"`, and with `padding=True` for texts of different lengths.'
            )
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"Expected `inputs` to be token ids, or the output of a tokenizer with "
            f'`return_tensors="pt"`, but got {found}.'
        )
    if ids.dim() != 2:
        raise ValueError(
            f"Expected token ids of shape (B, L), but got {tuple(ids.shape)}. Tokenize a list of texts, or "
            f"add the batch dimension to one text: `ids.unsqueeze(0)`."
        )
    return ids, names, extra
