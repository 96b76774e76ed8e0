"""`TextAbsLRP` on small models of Hugging Face's with random weights, docs/text.md and benchmarks/text.py."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks import text as benchmark
from captum_abslrp import LayerAbsLRP, TextAbsLRP
from captum_abslrp.targets import MeanPooling, Pair, Similarity, WithKeywords
from captum_abslrp.words import find_embedding
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace

VOCABULARY, CLASSES, PAD = 60, 3, 1
COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "num_labels": CLASSES,
    "initializer_range": 0.2,
}
LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
DEEP = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 96,
}
"""As MiniLM: six layers, heads of few features."""
DECODER = {"n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 2}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", LAYERS),
    "RoBERTa": ("Roberta", LAYERS),
    "DistilBERT": ("DistilBert", DISTIL),
    "MiniLM": ("Bert", DEEP),
    "GPT-2": ("GPT2", DECODER),  # whose second argument is not the mask
}
ENCODERS = [name for name in CONFIGURATIONS if name != "GPT-2"]
LENGTHS = [9, 5, 7]
MAPPINGS = ["attnlrp", "cp_lrp", None]


def made(name: str, kind: str, attention: str = "sdpa") -> nn.Module:
    """A classifier (`ForSequenceClassification`) or an encoder (`Model`), in float64."""
    torch.manual_seed(0)
    family, options = CONFIGURATIONS[name]
    config = getattr(transformers, f"{family}Config")(**COMMON, **options)
    model = getattr(transformers, family + kind)._from_config(config, attn_implementation=attention)
    return realistic(model.double())


def classifier(name: str, attention: str = "sdpa") -> nn.Module:
    return made(name, "ForSequenceClassification", attention)


def encoder(name: str, attention: str = "sdpa") -> MeanPooling:
    return MeanPooling(made(name, "Model", attention))


def texts(name: str) -> dict[str, Tensor]:
    """Three texts of different lengths, as a tokenizer returns them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    encoded = {"input_ids": ids.where(mask.bool(), torch.tensor(PAD)), "attention_mask": mask}
    return encoded | (
        {"token_type_ids": torch.zeros_like(ids)} if name in ("BERT", "MiniLM") else {}
    )


def alone(encoded: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One of several texts, without padding."""
    return {name: value[number, None, : LENGTHS[number]] for name, value in encoded.items()}


class Task:
    """A model with its texts, the target of all, and that of each."""

    def __init__(self, name: str, kind: str, attention: str = "sdpa") -> None:
        self.encoded = texts(name)
        if kind == "classes":
            self.model = classifier(name, attention)
            self.target: Any = [2, 0, 1]
            self.targets: list[Any] = self.target
        else:
            self.model = encoder(name, attention)
            with torch.no_grad():
                reference = self.model(**self.encoded).roll(1, 0)
            self.target = Similarity(reference)
            self.targets = [Similarity(row) for row in reference]


TASKS = [(n, "classes") for n in CONFIGURATIONS] + [(n, "similarity") for n in ENCODERS]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(("name", "kind"), TASKS)
def test_padding_changes_nothing_and_a_batch_is_its_texts(
    name: str, kind: str, mapping: str | None
) -> None:
    task = Task(name, kind)
    attributor = TextAbsLRP(task.model, mapping=mapping)
    before = {key: value.clone() for key, value in task.encoded.items()}
    with no_trace(task.model):
        relevance = attributor.attribute(task.encoded, task.target)
    assert relevance.shape == task.encoded["input_ids"].shape
    assert relevance.dtype == torch.float64
    assert not relevance.requires_grad
    assert relevance.isfinite().all()
    assert all(torch.equal(task.encoded[key], value) for key, value in before.items())
    for number, length in enumerate(LENGTHS):
        assert not relevance[number, length:].any()
        assert relevance[number, :length].all()
        own = attributor.attribute(alone(task.encoded, number), task.targets[number])
        assert relative_error(relevance[number, :length], own[0]) < 1e-9
    in_parts = attributor.attribute(task.encoded, task.target, internal_batch_size=2)
    assert relative_error(in_parts, relevance) < 1e-9


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_the_sum_over_the_embedding_by_hand(name: str) -> None:
    model, encoded = classifier(name), texts(name)
    by_keyword = WithKeywords(model, *encoded)
    layer = model.get_input_embeddings()
    by_hand = LayerAbsLRP(by_keyword, layer, "attnlrp")
    expected = by_hand.attribute(encoded["input_ids"], 1, tuple(encoded.values())[1:])
    attributor = TextAbsLRP(model)
    assert attributor.layer is layer
    assert torch.equal(attributor.attribute(encoded, 1), expected.sum(-1))
    shuffled = dict(reversed(encoded.items()))
    assert torch.equal(attributor.attribute(shuffled, 1), expected.sum(-1))
    # What the tokenizer returns is no dict.
    batch = transformers.BatchEncoding(encoded)
    assert torch.equal(attributor.attribute(batch, 1), expected.sum(-1))


def test_the_mask_reaches_a_model_whose_second_argument_is_another() -> None:
    model, encoded = classifier("GPT-2"), texts("GPT-2")
    with torch.no_grad():
        expected = model(**encoded).logits
    seen = []
    handle = model.register_forward_hook(lambda _, __, out: seen.append(out.logits.detach()))
    TextAbsLRP(model).attribute(encoded, 1)
    handle.remove()
    assert torch.allclose(seen[0], expected)


@pytest.mark.parametrize("mapping", ["attnlrp", "epsilon", "cp_lrp"])
@pytest.mark.parametrize("name", ENCODERS)
def test_relevance_adds_up_to_the_score_where_biases_are_zero(name: str, mapping: str) -> None:
    model, encoded = classifier(name), texts(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.zero_()
        logits = model(**encoded).logits
    # Everything that enters a layer norm without a bias comes from words, positions and token types.
    attributor = TextAbsLRP(model, whole_embedding(model), mapping)
    options: dict[str, Any] = {"contrast": None, "return_convergence_delta": True}
    relevance, delta = attributor.attribute(encoded, [2, 0, 1], **options)
    explained = logits[torch.arange(3), torch.tensor([2, 0, 1])]
    assert torch.allclose(relevance.sum(1) - explained, delta, atol=1e-9)
    if mapping == "cp_lrp":  # attention is a constant: nothing else keeps relevance
        assert delta.abs().max() < 1e-6 * explained.abs().max()
    against = attributor.attribute(
        encoded, [2, 0, 1], contrast="others", return_convergence_delta=True
    )
    others = (logits.sum(1) - explained) / (CLASSES - 1)
    assert torch.allclose(against[0].sum(1) - (explained - others), against[1], atol=1e-9)


def whole_embedding(model: nn.Module) -> nn.Module:
    """The module that adds positions to the words, and normalizes the sum."""
    return model.base_model.embeddings


@pytest.mark.parametrize("name", ENCODERS)
def test_the_delta_is_what_biases_positions_and_attention_keep(name: str) -> None:
    model, encoded = classifier(name), texts(name)
    relevance, delta = TextAbsLRP(model).attribute(
        encoded, 1, contrast=None, return_convergence_delta=True
    )
    with torch.no_grad():
        logits = model(**encoded).logits[:, 1]
    assert torch.allclose(relevance.sum(1) - logits, delta)
    assert delta.abs().min() > 1e-3


@pytest.mark.parametrize("kind", ["classes", "similarity"])
def test_tokens_keep_their_order(kind: str) -> None:
    """Without positions, a text read backwards has its map backwards."""
    task = Task("BERT", kind)
    for path, parameter in task.model.named_parameters():
        if "position_embeddings" in path:
            parameter.data.zero_()
    one = alone(task.encoded, 0)
    # The class token stays in front: the classifier looks there.
    order = torch.tensor([0, *reversed(range(1, LENGTHS[0]))])
    turned = {key: value[:, order] for key, value in one.items()}
    attributor = TextAbsLRP(task.model)
    relevance = attributor.attribute(one, task.targets[0])
    backwards = attributor.attribute(turned, task.targets[0])
    assert relative_error(backwards, relevance[:, order]) < 1e-9
    assert relative_error(backwards, relevance) > 0.1


@pytest.mark.parametrize("kind", ["classes", "similarity"])
def test_both_implementations_of_attention_give_the_same_map(kind: str) -> None:
    maps = [
        TextAbsLRP(task.model).attribute(task.encoded, task.target)
        for task in (Task("BERT", kind, attention) for attention in ("eager", "sdpa"))
    ]
    assert relative_error(*maps) < 1e-5  # softmax in float32


class Keyword(nn.Module):
    """A classifier whose class 1 hangs on word 7."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2, bias=False)
        self.words.weight.data = torch.full((9, 4), 0.1)
        self.words.weight.data[7, 0] = 2.0
        self.head.weight.data = torch.tensor([[0.1] * 4, [1.0, 0, 0, 0]])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids).sum(1))


def test_a_word_that_decides_is_found_wherever_it_is() -> None:
    ids = torch.tensor([[1, 7, 2], [3, 4, 7]])
    relevance = TextAbsLRP(Keyword().eval()).attribute(ids, 1, contrast=None)
    assert torch.allclose(relevance, torch.tensor([[0.1, 2.0, 0.1], [0.1, 0.1, 2.0]]))


def test_the_next_word_of_a_language_model() -> None:
    model, encoded = made("GPT-2", "LMHeadModel"), texts("GPT-2")
    one = alone(encoded, 0)
    with no_trace(model):
        relevance, delta = TextAbsLRP(model).attribute(
            one, lambda out: out.logits[:, -1, 7], return_convergence_delta=True
        )
    with torch.no_grad():
        logit = model(**one).logits[0, -1, 7]
    assert relevance.all()
    assert torch.allclose(relevance.sum(1) - logit, delta)
    earlier = TextAbsLRP(model).attribute(one, lambda out: out.logits[:, 3, 7])
    assert earlier[0, :4].all()
    assert not earlier[0, 4:].any()


# Mean pooling


@pytest.mark.parametrize("name", ENCODERS)
def test_mean_pooling_is_the_mean_of_the_tokens_that_count(name: str) -> None:
    model, encoded = made(name, "Model"), texts(name)
    pooled = MeanPooling(model)
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
        sentences = pooled(**encoded)
    for row, tokens, length in zip(sentences, hidden, LENGTHS):
        assert torch.allclose(row, tokens[:length].mean(0))
    one = encoded["input_ids"][:1]
    with torch.no_grad():
        assert torch.allclose(pooled(one), sentences[:1])  # the longest one needs no mask
        by_position = pooled(encoded["input_ids"], encoded["attention_mask"])
    assert torch.allclose(by_position, sentences)


def test_mean_pooling_of_heads_is_refused() -> None:
    pooled = MeanPooling(classifier("BERT"))
    with pytest.raises(
        ValueError, match="one vector for each of .3, 9. tokens, .*without its head"
    ):
        pooled(**texts("BERT"))


@pytest.mark.parametrize("wrap", [MeanPooling, Pair, lambda m: WithKeywords(m, "input_ids")])
def test_wrapping_a_model_leaves_its_training_flags(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Dropout(0.5))
    model.train()
    model[1].eval()  # a part that is frozen
    with no_trace(model):
        assert wrap(model).training
    model.eval()
    model[1].train()
    with no_trace(model):
        assert not wrap(model).training


# Finding the embedding


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_embedding_of_words_is_found(name: str) -> None:
    model = classifier(name)
    found = find_embedding(nn.Sequential(model))
    assert isinstance(found, nn.Embedding)
    assert found is model.get_input_embeddings()
    assert found.num_embeddings == VOCABULARY


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        hidden = self.words(ids) + self.positions(torch.arange(ids.shape[1]).expand_as(ids))
        return self.head((hidden if weight is None else hidden * weight).mean(1))


class WithoutWords(nn.Module):
    """As a model of Hugging Face's that has no words, or whose words are elsewhere."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.inside = TwoTables()
        self.answer = answer

    def get_input_embeddings(self) -> Any:
        if self.answer is NotImplementedError:
            raise NotImplementedError
        return self.answer and self.answer[0]


@pytest.mark.parametrize("answer", [None, NotImplementedError, [nn.Embedding(9, 4)]])
def test_an_answer_that_is_no_part_of_the_model_is_not_taken(answer: Any) -> None:
    with pytest.raises(ValueError, match="2 `nn.Embedding`"):
        find_embedding(WithoutWords(answer))


def test_where_several_tables_are_the_message_can_be_pasted() -> None:
    model = TwoTables().eval()
    with pytest.raises(ValueError, match=r"\(`words`, `positions`\)") as raised:
        TextAbsLRP(model)
    remedy = str(raised.value).split("`")[-2]
    attributor = eval(remedy, {"TextAbsLRP": TextAbsLRP, "model": model})
    ids, weight = torch.tensor([[1, 5], [2, 8]]), torch.rand(2, 1, 1)
    relevance = attributor.attribute(ids, 1, weight)
    expected = LayerAbsLRP(model, model.words, "attnlrp").attribute(ids, 1, weight)
    assert torch.equal(relevance, expected.sum(-1))
    with pytest.raises(ValueError, match="with no `nn.Embedding`"):
        TextAbsLRP(nn.Linear(3, 4))


# Bad input

GOOD = {"input_ids": torch.tensor([[1, 5], [2, 8]])}
BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "lists": (
        {"input_ids": [[1, 5], [2]], "attention_mask": [[1, 1], [1]]}, None, TypeError,
        r"a list as `input_ids`.*return_tensors=\"pt\".*padding=True",
    ),
    "a list beside": ({**GOOD, "weight": [1.0]}, None, TypeError, "a list as `weight`"),
    "no ids": ({"ids": torch.ones(2, 3)}, None, ValueError, r"to have `input_ids`, but got \['ids'\]"),
    "text": ("a cat", None, TypeError, "token ids, .*but got str"),
    "embeddings": (torch.rand(2, 3), None, TypeError, "token ids, .*but got torch.float32"),
    "one text": (torch.tensor([1, 5]), None, ValueError, r"\(B, L\), but got \(2,\).*unsqueeze\(0\)"),
    "both": (GOOD, torch.ones(2, 1, 1), ValueError, r"no `additional_forward_args`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    inputs, extra, error, message = BAD[name]
    model = TwoTables().eval()
    with pytest.raises(error, match=message):
        TextAbsLRP(model, model.words).attribute(inputs, 1, extra)


def test_bad_arguments_are_named() -> None:
    model = TwoTables().eval()
    with pytest.raises(TypeError, match="`embedding` to be a torch.nn.Module or None, but got str"):
        TextAbsLRP(model, "words")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`embedding` .*but got list"):
        TextAbsLRP(model, [model.words])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`model` to be a torch.nn.Module"):
        TextAbsLRP(lambda ids: ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="to be a module of `model`"):
        TextAbsLRP(model, nn.Embedding(9, 4))
    with pytest.raises(
        ValueError, match=r"`head` \(Linear\) to return one vector for each of \(2, 2\)"
    ):
        TextAbsLRP(model, model.head).attribute(torch.tensor([[1, 5], [2, 8]]), 1)


def test_a_keyword_that_the_model_does_not_take_is_the_error_of_the_model() -> None:
    model = Keyword().eval()
    encoded = {"input_ids": torch.tensor([[1, 7]]), "offset_mapping": torch.zeros(1, 2, 2)}
    with no_trace(model), pytest.raises(TypeError, match="offset_mapping"):
        TextAbsLRP(model).attribute(encoded, 1)


def test_settings_reach_the_maps() -> None:
    model, encoded = classifier("BERT"), texts("BERT")
    published = TextAbsLRP(model, mapping=None)
    joint = TextAbsLRP(model, mapping=None, normalization="joint")
    assert "attnlrp" in repr(TextAbsLRP(model))
    assert "generic" in repr(published)
    by_keyword = WithKeywords(model, *encoded)
    extra = tuple(encoded.values())[1:]
    for attributor, options in ((published, {}), (joint, {"normalization": "joint"})):
        layer = LayerAbsLRP(by_keyword, model.get_input_embeddings(), **options)
        expected = layer.attribute(encoded["input_ids"], 1, extra).sum(-1)
        assert torch.equal(attributor.attribute(encoded, 1), expected)
    swapped = TextAbsLRP(model, output=lambda out: out.logits.flip(1))
    assert torch.equal(swapped.attribute(encoded, 0), TextAbsLRP(model).attribute(encoded, 2))


def test_texts_are_run_in_parts() -> None:
    model, sizes = classifier("BERT"), []
    handle = model.register_forward_hook(lambda _, __, out: sizes.append(len(out.logits)))
    TextAbsLRP(model).attribute(texts("BERT"), 1, internal_batch_size=2)
    handle.remove()
    assert sizes == [2, 1]


class Twice(Keyword):
    """A classifier that looks up the text twice."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids).sum(1) + 3 * self.words(input_ids).sum(1))


def test_a_call_of_the_embedding_is_chosen() -> None:
    attributor, ids = TextAbsLRP(Twice().eval()), torch.tensor([[1, 7]])
    maps = [attributor.attribute(ids, 1, contrast=None, call_index=i) for i in (0, 1)]
    assert torch.allclose(maps[0], torch.tensor([[0.1, 2.0]]))
    assert torch.allclose(maps[1], 3 * maps[0])
    with pytest.raises(ValueError, match="2 calls .*call_index=0"):
        attributor.attribute(ids, 1)


# docs/text.md and benchmarks/text.py, with a small tokenizer

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
WORDS = [*SPECIAL, *"a cat sleep ##s on the red sofa kitten is nap ##ping couch . ,".split()]


def small_tokenizer() -> Any:
    """A tokenizer of word pieces, as BERT's."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def small_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), num_labels=2, initializer_range=0.2, **LAYERS
    )
    return getattr(transformers, kind)(config).eval()


PAGE = Path(__file__).parents[1] / "docs" / "text.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the code of the page leaves, with small models instead of those that it names."""

    def loads(cls: str, make: Callable[[], Any]) -> None:
        monkeypatch.setattr(getattr(transformers, cls), "from_pretrained", lambda name: make())

    loads("AutoTokenizer", small_tokenizer)
    loads(
        "AutoModelForSequenceClassification", lambda: small_model("BertForSequenceClassification")
    )
    loads("AutoModel", lambda: small_model("BertModel"))
    names: dict[str, Any] = {}
    for block in BLOCKS:
        lines_before = PAGE.read_text(encoding="utf-8").partition(block)[0].count("\n")
        exec(compile("\n" * lines_before + block, str(PAGE), "exec"), names)
    return names


def test_the_page_explains_classes_and_words(page: dict[str, Any]) -> None:
    relevance, encoded = page["relevance"], page["encoded"]
    assert relevance.shape == encoded["input_ids"].shape
    assert torch.equal(relevance != 0, encoded["attention_mask"].bool())
    with torch.no_grad():
        logits = page["model"](**encoded).logits
    difference = logits[:, 1] - logits[:, 0]
    assert torch.allclose(relevance.sum(1) - difference, page["delta"], atol=1e-5)
    first, second = page["words"]
    assert "".join(word for word, _ in first) == page["texts"][0].replace(" ", "")
    assert [word for word, _ in second] == ["I", "liked", "it", "."]
    for of_text, row, encoding in zip((first, second), relevance, encoded.encodings):
        content = [word is not None for word in encoding.word_ids]
        assert sum(value for _, value in of_text) == pytest.approx(
            float(row[content].sum()), abs=1e-5
        )


def test_the_page_shows_tokens_in_color(page: dict[str, Any]) -> None:
    data = page["table"].data
    shown = re.findall(r'<mark style="background-color: hsl\((\d+).*?"black"> (\S+)', data, re.S)
    tokens, hues = [], []
    for number, mask in enumerate(page["encoded"]["attention_mask"].bool()):
        tokens += page["tokenizer"].convert_ids_to_tokens(
            page["encoded"]["input_ids"][number, mask].tolist()
        )
        hues += ["120" if r > 0 else "0" for r in page["relevance"][number, mask].tolist()]
    assert [token for _, token in shown] == tokens
    assert "[PAD]" not in tokens
    assert [hue for hue, _ in shown] == hues
    assert len(set(hues)) == 2
    for record in page["records"]:
        assert float(record.word_attributions.abs().max()) == pytest.approx(1)
        assert f"{record.attr_score:.2f}" in data
        assert f"{record.pred_class} ({record.pred_prob:.2f})" in data


def test_the_page_compares_sentences(page: dict[str, Any]) -> None:
    attributor, first, target = page["attributor"], page["first"], Similarity(page["of_second"])
    assert page["of_cat"].shape == first["input_ids"].shape
    assert page["of_kitten"].shape == page["second"]["input_ids"].shape
    assert page["of_kitten"].all()
    of_others = [attributor.attribute(first, Similarity(other)) for other in page["others"]]
    expected = attributor.attribute(first, target) - torch.stack(of_others).mean(0)
    assert relative_error(page["rather_than"], expected) < 1e-3
    assert relative_error(page["rather_than"], page["of_cat"]) > 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_model("BertModel").save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PAIRS = [
    ("A *cat* *sleeps* on the red *sofa*.", "The *kitten* is *napping* on a red *couch*."),
    ("The *kitten* *naps*, the red sofa.", "A *cat* *sleeps* on the couch."),
]


def test_words_and_marks_of_a_sentence() -> None:
    words, marked = benchmark.words_of("The *kitten*, a red *sofa*.")
    assert words == ["The", "kitten", ",", "a", "red", "sofa", "."]
    assert marked.nonzero().flatten().tolist() == [1, 5]


def test_the_pairs_have_marked_and_other_words() -> None:
    pairs = benchmark.read_pairs(benchmark.HERE / "text_pairs.txt")
    assert len(pairs) >= 40
    for sentence in (sentence for pair in pairs for sentence in pair):
        words, marked = benchmark.words_of(sentence)
        assert sentence.count("*") == 2 * marked.sum()
        content = [word.lower() not in benchmark.LITTLE_MEANING for word in words]
        assert any(c and not m for c, m in zip(content, marked)), sentence


def test_tokens_are_deleted_as_they_should_be(folder: Path) -> None:
    setting, tokenizer = benchmark.load(str(folder))
    (case, other), _ = benchmark.make_cases(setting, tokenizer, PAIRS)
    tokens = [WORDS[i] for i in case.encoded["input_ids"][0, case.content]]
    assert tokens == ["a", "cat", "sleep", "##s", "on", "the", "red", "sofa", "."]
    assert case.words.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 7]
    kept = torch.ones(3, 9, dtype=torch.bool)
    kept[1, [1, 4]] = False
    kept[2] = False

    def similarity(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return F.cosine_similarity(setting.encoder(torch.tensor([ids])), case.reference[None])

    number = WORDS.index
    ids = case.encoded["input_ids"][0].tolist()
    removed = [i for i in ids if i not in (number("cat"), number("on"))]
    masked = [4 if i in (number("cat"), number("on")) else i for i in ids]
    expected = {
        "removed": [ids, removed, [2, 3]],
        "masked": [ids, masked, [2, *[4] * 9, 3]],
    }
    for kind, variants in expected.items():
        found = benchmark.PERTURBED[kind](setting, case, kept)
        by_hand = torch.cat([similarity(variant) for variant in variants])
        assert torch.allclose(found, by_hand, atol=1e-5), kind
    whole = F.cosine_similarity(other.reference[None], case.reference[None])
    assert torch.allclose(similarity(ids), whole, atol=1e-5)
    # The curve takes "cat" first, then "on", then the others.
    relevance = torch.zeros(11)
    relevance[case.content[[1, 4]]] = torch.tensor([2.0, 1.0])
    steps = benchmark.curve(setting, case, relevance, "removed")
    assert len(steps) == 10
    without_cat = similarity([i for i in ids if i != number("cat")])
    by_hand = torch.cat([similarity(ids), without_cat, similarity(removed), similarity([2, 3])])
    assert torch.allclose(steps[[0, 1, 2, 9]], by_hand, atol=1e-5)


def test_words_are_ranked_as_by_hand(folder: Path) -> None:
    setting, tokenizer = benchmark.load(str(folder))
    (case, _), _ = benchmark.make_cases(setting, tokenizer, PAIRS)
    relevance = torch.zeros(11)
    # a cat sleep ##s on the red sofa . : marked are cat 4, sleeps 1 + 2, sofa 0
    relevance[case.content] = torch.tensor([5.0, 4.0, 1.0, 2.0, 0.0, -1.0, 3.0, 0.0, -2.0])
    # against a 5, on 0, the -1, red 3, . -2: cat 4 of 5, sleeps 3.5, sofa 2.5; against red alone 1 + 0.5
    assert benchmark.word_ranking(case, relevance, all_words=True) == pytest.approx(10 / 15)
    assert benchmark.word_ranking(case, relevance, all_words=False) == pytest.approx(1.5 / 3)


def test_the_benchmark_writes_its_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.txt").write_text("# two\n" + "\n".join(map(" | ".join, PAIRS)) + "\n")
    results = tmp_path / "RESULTS.md"
    results.write_text("above\n<!-- text: begin -->\nold\n<!-- text: end -->\nbelow\n")
    monkeypatch.setattr(benchmark, "HERE", tmp_path)
    options = ["--model", str(folder), "--pairs", str(tmp_path / "pairs.txt"), "--write"]
    monkeypatch.setattr("sys.argv", ["text", *options])
    with warnings.catch_warnings():
        benchmark.main()
    above, *rows, below = [line for line in results.read_text().splitlines() if line]
    assert (above, below) == ("above", "below")
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")][2:]
    assert names == [*benchmark.METHODS]
    assert "nan" not in "".join(rows)
    values = dict(zip(names, rows[3:]))
    assert values[names[0]].split(" | ")[1:5] == values["TextAbsLRP, `epsilon`"].split(" | ")[1:5]
