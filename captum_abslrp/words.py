"""Relevance of the tokens of a text, from what a tokenizer returns.

Token indices have no relevance of their own, so their embeddings are explained, and each token gets the sum
of its embedding. Models of Hugging Face's are called by keyword, as ``model(**tokenizer(...))`` does it,
because the attention mask is not the second argument of every model.

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
    r"""Relevance of each token of a text, for classifiers and for the similarity of sentences.

    The difference to :class:`LayerAbsLRP`: it finds the embedding of the words, takes what a tokenizer
    returns, adds up the relevance of each token, and has signed rules as its default. Relevance is in the
    unit of the score then, and a negative one speaks against the target. What the tables of positions and of
    token types add is not counted.

    Tokens that the attention mask takes out get no relevance, and do not change that of the others, as far as
    the model itself ignores them.

    Args:
        model: the model, in evaluation mode: a classifier of texts, or a module that returns embeddings of
            sentences, such as :class:`~captum_abslrp.targets.MeanPooling`.
        embedding: the module that returns a vector for each token, (B, L, D). None finds it: what
            ``get_input_embeddings()`` of a model of Hugging Face's returns, or the only ``nn.Embedding``.
        mapping: as for :class:`AbsLRP`, where None is the published method. The default is one of signed
            rules, ``"attnlrp"``.
        normalization, output: as for :class:`AbsLRP`.

    Raises:
        TypeError: as for :class:`AbsLRP`, or if ``embedding`` is not a module.
        ValueError: as for :class:`AbsLRP`; or if ``embedding`` is not part of the model, or none is given and
            the model does not tell which it is.

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
            embedding,  # type: ignore[arg-type]  # of what is no model the next one says so
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
            inputs: what a tokenizer returns with ``return_tensors="pt"``: a dict of tensors with
                ``input_ids``, (B, L). All entries are passed to the model by keyword. Or the token ids alone,
                (B, L), as the first argument of a model that has no padding.
            target: as for :meth:`AbsLRP.attribute`; of sentences
                :class:`~captum_abslrp.targets.Similarity`.
            additional_forward_args: arguments of the model after the token ids, one or a tuple, where
                ``inputs`` are token ids alone.
            contrast, combine, class_dim, internal_batch_size, check_finite: as for
                :meth:`LayerAbsLRP.attribute`.
            call_index: which call of the embedding to explain, where the model calls it more than once.
            return_convergence_delta: whether to return the delta, too.

        Returns:
            Relevance of each token, (B, L), of the dtype and the device of the embedding. With
            ``return_convergence_delta`` a pair of it and the delta, (B,): the sum of relevance less what was
            explained. It shows what positions, token types and biases keep.

        Raises:
            TypeError: as for :meth:`AbsLRP.attribute`, or if ``inputs`` are no tensors of integers.
            ValueError: as for :meth:`LayerAbsLRP.attribute`; or if ``inputs`` lack ``input_ids``, do not have
                shape (B, L), or come with ``additional_forward_args`` beside keywords; or if ``embedding``
                does not return one vector for each token.

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
    """The module that turns token ids into vectors.

    Args:
        model: a model of texts, or one that has it inside.

    Returns:
        What ``get_input_embeddings()`` of the outermost module that has it returns (models of Hugging
        Face's); elsewhere the only ``nn.Embedding``.

    Raises:
        ValueError: if there is none, or several.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
        >>> find_embedding(model)
        Embedding(9, 4)
    """
    modules = dict(model.named_modules())
    for module in modules.values():
        try:
            found = getattr(module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # of a module that has no words
            continue
        if isinstance(found, nn.Module) and any(found is part for part in modules.values()):
            return found
    paths = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    if len(paths) == 1:
        return modules[paths[0]]
    listed = ", ".join(f"`{path}`" for path in paths)
    raise ValueError(
        f"Expected a model that tells which module embeds its words, but got {type(model).__name__} with "
        f"{len(paths) or 'no'} `nn.Embedding`{f' ({listed})' if paths else ''}. Pass it: "
        f'`TextAbsLRP(model, model.get_submodule("{paths[0] if paths else "..."}"))`.'
    )


def _split(inputs: Any, extra: Any) -> tuple[Tensor, list[str], Any]:
    """Token ids, the keywords of all arguments (none: by position), and the other arguments."""
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
                "Expected no `additional_forward_args` where `inputs` has keywords, but got both. Add them "
                "to `inputs`: `{**encoded, name: value}`."
            )
        names = ["input_ids", *(name for name in inputs if name != "input_ids")]
        ids, *values = (inputs[name] for name in names)
        extra = tuple(values)
        lists = [name for name in names if isinstance(inputs[name], list)]
        if lists:
            raise TypeError(
                f"Expected `inputs` to hold tensors, but got a list as `{lists[0]}`. Call the tokenizer "
                f'with `return_tensors="pt"`, and with `padding=True` for texts of different lengths.'
            )
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"Expected `inputs` to be token ids, or what a tokenizer returns with "
            f'`return_tensors="pt"`, but got {found}.'
        )
    if ids.dim() != 2:
        raise ValueError(
            f"Expected token ids of shape (B, L), but got {tuple(ids.shape)}. Tokenize a list of texts, or "
            f"add the batch dimension to one text: `ids.unsqueeze(0)`."
        )
    return ids, names, extra
