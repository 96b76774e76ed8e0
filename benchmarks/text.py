"""Score the relevance of tokens for the similarity of two sentences: several methods on a real model.

``python -m benchmarks.text --model FOLDER``, with the folder of a model of sentence-transformers that
averages its tokens, in the format of Hugging Face's (MiniLM, for example). ``--write`` puts the table into
RESULTS.md.

The methods explain each sentence of a pair (``text_pairs.txt``): which of its tokens make it similar to the
other one? All scores are means over the two sentences of a pair. Higher is better.

- ``removed``: the similarity as tokens are removed from the sentence one by one, least relevant first, minus
  the same with most relevant first: the mean difference over all numbers of tokens (LeRF - MoRF). ``[CLS]``
  and ``[SEP]`` stay. ``masked``: the same with ``[MASK]`` in their places.
- ``words``: how often a word that carries the shared meaning, marked by hand, has more relevance than one
  that is not marked, over all such pairs of words of a sentence (area under the ROC curve); chance is 0.5.
  ``content words``: the same without articles, prepositions, pronouns and the like.
- ``time``: of an explanation, in forward passes (median).

▲ and ▼ mark methods that are better or worse than the first one: the 95% bootstrap interval of the mean
difference over pairs of sentences does not include 0.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.gae import write_between_marks
from captum_abslrp import TextAbsLRP
from captum_abslrp.metrics.gae import bootstrap_interval
from captum_abslrp.targets import MeanPooling, Similarity
from captum_abslrp.text import markdown_table
from captum_abslrp.words import find_embedding

HERE = Path(__file__).parent
SCORES = ("removed", "masked", "words", "content words")
LITTLE_MEANING = frozenset(
    """
    . , ? ! a about after all although an and are as at be because before behind but by can during even
    for from go got had has have he her his i in is it its many me my near nobody of
    on our please she so such that the their there they this to too under very was
    were what when where while who will with you your
    """.split()
)
"""Words that ``content words`` leaves out where they are not marked."""


class Case(NamedTuple):
    """A sentence, and what it is compared with."""

    encoded: dict[str, Tensor]
    """What the model takes, of one sentence."""
    content: Tensor
    """Where the tokens are that are not special ones, (n,)."""
    words: Tensor
    """The number of the word of each of them, (n,)."""
    marked: Tensor
    """Whether each word is marked, (W,) bool."""
    little: Tensor
    """Whether each word carries little meaning, (W,) bool."""
    reference: Tensor
    """The embedding of the other sentence, (D,)."""
    others: Tensor
    """Those of sentences of other pairs, (1, M, D)."""


class Setting(NamedTuple):
    """A model, and the objects that explaining it needs."""

    encoder: MeanPooling
    mask: int
    """The id of ``[MASK]``."""
    pad: int


Method = Callable[[Setting, Case, torch.Generator], Tensor]
"""Relevance of the tokens of a case, (L,)."""


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs of sentences with their stars."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" | ") for line in lines if line and not line.startswith("#")]
    return [(first, second) for first, second in pairs]


def words_of(sentence: str) -> tuple[list[str], Tensor]:
    """Split a sentence into words and punctuation marks; return them, and which are marked, (W,)."""
    words, marked = [], []
    for part in sentence.split():
        word = part.replace("*", "")
        end = len(word.rstrip(".,?!"))
        words.append(word[:end])
        marked.append("*" in part)
        for sign in word[end:]:
            words.append(sign)
            marked.append(False)
    return words, torch.tensor(marked)


def load(folder: str) -> tuple[Setting, Any]:
    """Load the model and the tokenizer of a folder."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return Setting(MeanPooling(model), tokenizer.mask_token_id, tokenizer.pad_token_id), tokenizer


@torch.no_grad()
def make_cases(
    setting: Setting, tokenizer: Any, pairs: list[tuple[str, str]]
) -> list[tuple[Case, Case]]:
    """Both sentences of each pair, each to be compared with the other one."""
    split = [[words_of(sentence) for sentence in pair] for pair in pairs]
    encoded = [
        [tokenizer(words, is_split_into_words=True, return_tensors="pt") for words, _ in pair]
        for pair in split
    ]
    means = torch.stack([torch.cat([setting.encoder(**e) for e in pair]) for pair in encoded])
    cases = []
    for n, pair in enumerate(split):
        of_pair = []
        for side, (words, marked) in enumerate(pair):
            of_tokens = encoded[n][side].word_ids()
            content = [i for i, word in enumerate(of_tokens) if word is not None]
            others = torch.cat([means[:n, 1 - side], means[n + 1 :, 1 - side]])
            of_pair.append(
                Case(
                    dict(encoded[n][side]),
                    torch.tensor(content),
                    torch.tensor([of_tokens[i] for i in content]),
                    marked,
                    torch.tensor([word.lower() in LITTLE_MEANING for word in words]),
                    means[n, 1 - side],
                    others[None],
                )
            )
        cases.append((of_pair[0], of_pair[1]))
    return cases


def ours(
    mapping: str | None, *, contrast: bool = False, whole: bool = False, **options: Any
) -> Method:
    """Attribution of this library with a mapping; optionally with a contrast to sentences of other pairs."""

    def explain(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
        embedding = setting.encoder.model.embeddings if whole else None
        attributor = TextAbsLRP(setting.encoder, embedding, mapping, **options)
        relevance: Tensor = attributor.attribute(
            case.encoded,
            Similarity(case.reference),
            contrast=Similarity(case.others) if contrast else None,
        )
        return relevance[0]

    return explain


class ByPosition(nn.Module):
    """The similarity of a sentence, with the signature that Captum's methods expect of a model."""

    def __init__(self, encoder: nn.Module, case: Case) -> None:
        super().__init__()
        self.encoder, self.case = encoder, case

    def forward(self, input_ids: Tensor) -> Tensor:
        rest = {
            name: value.expand(len(input_ids), -1)
            for name, value in self.case.encoded.items()
            if name != "input_ids"
        }
        return F.cosine_similarity(self.encoder(input_ids, **rest), self.case.reference[None])


def input_x_gradient(*, whole: bool) -> Method:
    """At the word embeddings, or after the positions are added and the sum is normalized."""

    def explain(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
        encoder = setting.encoder
        layer = encoder.model.embeddings if whole else find_embedding(encoder)
        method = LayerGradientXActivation(ByPosition(encoder, case), layer)
        return method.attribute(case.encoded["input_ids"]).detach().sum(-1)[0]

    return explain


def integrated_gradients(token: str) -> Method:
    """From a sentence of ``[MASK]`` or ``[PAD]`` between the special tokens."""

    def explain(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
        ids = case.encoded["input_ids"]
        baseline = ids.clone()
        baseline[0, case.content] = getattr(setting, token)
        model = ByPosition(setting.encoder, case)
        method = LayerIntegratedGradients(model, find_embedding(setting.encoder))
        return method.attribute(ids, baseline, n_steps=50).detach().sum(-1)[0]

    return explain


@torch.no_grad()
def rollout(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020), averaged over the tokens that the model averages."""
    attentions = setting.encoder.model(**case.encoded, output_attentions=True).attentions
    size = attentions[0].shape[-1]
    found = torch.eye(size)
    for attention in attentions:
        found = (attention[0].mean(0) + torch.eye(size)) / 2 @ found
    return found.mean(0)


@torch.no_grad()
def last_layer(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
    """The contribution of the vector of each token in the last layer to the similarity."""
    return setting.encoder.model(**case.encoded).last_hidden_state[0] @ case.reference


def leave_one_out(kind: str) -> Method:
    """The fall of the similarity without each single token; one forward pass for each."""

    @torch.no_grad()
    def explain(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
        count = len(case.content)
        without = ~torch.eye(count, dtype=torch.bool)
        kept = torch.cat([torch.ones(1, count, dtype=torch.bool), without])
        similarities = PERTURBED[kind](setting, case, kept)
        relevance = torch.zeros(case.encoded["input_ids"].shape[1])
        relevance[case.content] = similarities[0] - similarities[1:]
        return relevance

    return explain


def random(setting: Setting, case: Case, generator: torch.Generator) -> Tensor:
    return torch.rand(case.encoded["input_ids"].shape[1], generator=generator)


METHODS: dict[str, Method] = {
    "TextAbsLRP, `attnlrp` (the default)": ours("attnlrp"),
    "TextAbsLRP, `attnlrp`, rather than other sentences": ours("attnlrp", contrast=True),
    "TextAbsLRP, `attnlrp`, with positions": ours("attnlrp", whole=True),
    "TextAbsLRP, `epsilon`": ours("epsilon"),
    "TextAbsLRP, `cp_lrp`": ours("cp_lrp"),
    "TextAbsLRP, `cp_lrp`, rather than other sentences": ours("cp_lrp", contrast=True),
    "TextAbsLRP, `res_lrp`": ours("res_lrp"),
    "TextAbsLRP, `recommended`": ours("recommended"),
    "published absLRP": ours(None),
    "published absLRP, rather than other sentences": ours(None, contrast=True),
    "published absLRP, joint": ours(None, normalization="joint"),
    "published absLRP, joint, rather than other sentences": ours(
        None, contrast=True, normalization="joint"
    ),
    "InputXGradient": input_x_gradient(whole=False),
    "InputXGradient, behind the norm of the embeddings": input_x_gradient(whole=True),
    "IntegratedGradients, from `[MASK]`": integrated_gradients("mask"),
    "IntegratedGradients, from `[PAD]`": integrated_gradients("pad"),
    "attention rollout": rollout,
    "last layer": last_layer,
    "leave one out, removed": leave_one_out("removed"),
    "leave one out, masked": leave_one_out("masked"),
    "random": random,
}


@torch.no_grad()
def similarities_of(encoder: nn.Module, case: Case, ids: Tensor, mask: Tensor) -> Tensor:
    """Similarity of variants of a sentence (S, L) to the other one, (S,)."""
    rest = {
        name: torch.zeros_like(ids)
        for name in case.encoded
        if name not in ("input_ids", "attention_mask")
    }
    return F.cosine_similarity(encoder(ids, mask, **rest), case.reference[None])


def without_tokens(setting: Setting, case: Case, kept: Tensor) -> Tensor:
    """Similarities if only some tokens of the content (S, n) remain; later tokens move up."""
    ids = case.encoded["input_ids"]
    every = torch.ones(len(kept), ids.shape[1], dtype=torch.bool)
    every[:, case.content] = kept
    order = every.long().argsort(dim=1, descending=True, stable=True)  # remaining tokens first
    moved = ids.expand(len(kept), -1).gather(1, order)
    left = torch.arange(ids.shape[1]) < every.sum(1, keepdim=True)
    return similarities_of(
        setting.encoder, case, moved.where(left, torch.tensor(setting.pad)), left.long()
    )


def masked_tokens(setting: Setting, case: Case, kept: Tensor) -> Tensor:
    """Similarities with ``[MASK]`` in place of the tokens that are not kept, (S, n)."""
    ids = case.encoded["input_ids"].repeat(len(kept), 1)
    ids[:, case.content] = ids[:, case.content].where(kept, torch.tensor(setting.mask))
    return similarities_of(setting.encoder, case, ids, torch.ones_like(ids))


PERTURBED = {"removed": without_tokens, "masked": masked_tokens}


def curve(setting: Setting, case: Case, relevance: Tensor, kind: str) -> Tensor:
    """Similarity after 0 to n tokens are removed, most relevant first, (n + 1,)."""
    ranks = relevance[case.content].argsort(descending=True, stable=True).argsort()
    kept = ranks >= torch.arange(len(ranks) + 1)[:, None]
    return PERTURBED[kind](setting, case, kept)


def word_ranking(case: Case, relevance: Tensor, *, all_words: bool) -> float:
    """The share of pairs of a marked and another word in which the marked one has more; ties count half."""
    of_words = torch.zeros(len(case.marked)).index_add(0, case.words, relevance[case.content])
    others = ~case.marked if all_words else ~case.marked & ~case.little
    more = of_words[case.marked][:, None] - of_words[others]
    return float(((more > 0).double() + (more == 0).double() / 2).mean())


@torch.no_grad()
def score(setting: Setting, case: Case, relevance: Tensor) -> list[float]:
    """The scores of a map."""
    found = []
    for kind in ("removed", "masked"):
        least, most = (curve(setting, case, sign * relevance, kind) for sign in (-1, 1))
        found.append(float((least - most).mean()))
    rankings = [word_ranking(case, relevance, all_words=every) for every in (True, False)]
    return [*found, *rankings]


def run(setting: Setting, cases: list[tuple[Case, Case]]) -> dict[str, tuple[Tensor, float]]:
    """Scores of each method, (pairs, scores), and the median time of a map in forward passes."""
    found = {}
    for name, method in METHODS.items():
        scores, times = [], []
        for number, pair in enumerate(tqdm(cases, desc=name, mininterval=5)):
            of_pair = []
            for side, case in enumerate(pair):
                generator = torch.Generator().manual_seed(2 * number + side)
                start = time.perf_counter()
                with torch.no_grad():
                    setting.encoder(**case.encoded)
                between = time.perf_counter()
                relevance = method(setting, case, generator)
                times.append((time.perf_counter() - between) / (between - start))
                of_pair.append(score(setting, case, relevance))
            scores.append(torch.tensor(of_pair, dtype=torch.float64).mean(0))
        found[name] = torch.stack(scores), float(torch.tensor(times).median())
    return found


def table(found: dict[str, tuple[Tensor, float]]) -> str:
    """Means and 95% bootstrap intervals over pairs, and the difference to the default."""
    first, _ = next(iter(found.values()))
    rows = []
    for name, (scores, passes) in found.items():
        row = [name]
        for values, reference in zip(scores.T, first.T):
            low, high = bootstrap_interval(values)
            below, above = bootstrap_interval(values - reference)
            sign = " ▲" if below > 0 else " ▼" if above < 0 else ""
            row.append(f"{values.mean():.3f} [{low:.3f}, {high:.3f}]{sign}")
        rows.append([*row, f"{passes:.1f}"])
    return markdown_table(["method", *SCORES, "time"], rows, aligned=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--pairs", type=Path, default=HERE / "text_pairs.txt")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    setting, tokenizer = load(args.model)
    cases = make_cases(setting, tokenizer, read_pairs(args.pairs))
    references = [torch.stack([case.reference for case in side]) for side in zip(*cases)]
    similarity = F.cosine_similarity(*references)
    print(
        f"{len(cases)} pairs, similarity {similarity.min():.2f} to {similarity.max():.2f}, mean "
        f"{similarity.mean():.2f}"
    )
    text = table(run(setting, cases))
    print(text)
    if args.write:
        write_between_marks(HERE / "RESULTS.md", text, "text")


if __name__ == "__main__":
    main()
