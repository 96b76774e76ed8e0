"""The documentation: nothing is said twice, links lead to files, and the code of ``docs/howto`` runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_abslrp.cli import main

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if not {"_build", "tutorials"} & set(path.relative_to(ROOT / "docs").parts)
)
HOWTO = [path for path in DOCS if path.parent.name == "howto"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))

# Nothing is said twice.

SENTENCE = 9
"""Two sentences of at least so many words must not be equal."""
RUN = 12
"""Two texts must not share so many words in a row."""

OPENINGS = {"README.md", "docs/index.md"}
"""The README and the start page of the site open with the same lines, which say what the library is. What
stands above their first heading of the second level is compared with the other pages only."""


class Sentence(NamedTuple):
    """A sentence of prose, by its words."""

    file: str
    line: int
    words: tuple[str, ...]
    opens: bool = False
    """Whether it belongs to the lines that the README and the start page share."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.file}:{self.line}"


def prose(text: str, file: str, first_line: int = 1) -> Iterator[Sentence]:
    """The sentences of a Markdown text, without code, directives, tables, comments and formulas."""
    opens = file in OPENINGS
    paragraph: list[tuple[int, str]] = []
    fence = ""
    for number, line in enumerate([*text.splitlines(), ""], first_line):
        stripped = line.strip()
        mark = re.match(r"(`{3,}|:{3,}|~{3,}|\$\$|<!--)", stripped)
        if fence:
            ended = stripped.endswith(fence) if fence in {"$$", "-->"} else stripped == fence
            fence = "" if ended else fence
            continue
        starts = re.match(r"([-*+]|\d+\.)\s", stripped) or stripped.startswith(("#", "|", ">"))
        if not stripped or mark or starts:
            yield from _sentences(paragraph, file, opens)
            paragraph = []
        if stripped.startswith("## "):
            opens = False
        if mark:
            fence = {"<!--": "-->"}.get(mark[1], mark[1])
            if fence in {"$$", "-->"} and stripped.endswith(fence) and stripped != fence:
                fence = ""
        elif stripped.startswith("#"):
            yield from _sentences([(number, stripped)], file, opens)
        elif not stripped.startswith("|"):
            paragraph.append((number, stripped))


def _sentences(paragraph: list[tuple[int, str]], file: str, opens: bool) -> Iterator[Sentence]:
    """The sentences of the lines of one paragraph or item."""
    found: list[tuple[int, str]] = []
    for number, line in paragraph:
        found += [(number, word) for word in line.split()]
    text = " ".join(word for _, word in found)
    at = 0
    for part in re.split(r"(?<=[.!?:;])\s+", text):
        count = len(part.split())
        if count:
            yield Sentence(file, found[at][0], words_of(part), opens)
        at += count


def words_of(text: str) -> tuple[str, ...]:
    """The words of a sentence of Markdown: lower case, without marks, formulas and addresses."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", " ", text)  # images
    text = re.sub(r"\]\([^)]*\)", "] ", text)  # addresses of links
    text = re.sub(r"\$[^$]*\$", " ", text)
    text = re.sub(r"\{\w+\}`", "`", text)  # roles
    return tuple(re.findall(r"\w+", text.lower()))


def repetitions(sentences: Iterable[Sentence]) -> list[str]:
    """What is said twice, with both places."""
    sentences = list(sentences)
    whole: dict[tuple[str, ...], Sentence] = {}
    runs: dict[tuple[str, ...], Sentence] = {}
    found: dict[tuple[str, str], str] = {}

    def shared(a: Sentence, b: Sentence) -> bool:
        return a.opens and b.opens and a.file != b.file

    for sentence in sentences:
        words = sentence.words
        first = whole.setdefault(words, sentence) if len(words) >= SENTENCE else sentence
        if first is not sentence and not shared(first, sentence):
            found[first.place, sentence.place] = " ".join(words)
        for start in range(len(words) - RUN + 1):
            run = words[start : start + RUN]
            first = runs.setdefault(run, sentence)
            if first is not sentence and not shared(first, sentence):
                found.setdefault((first.place, sentence.place), " ".join(run))
    return [f"{a} and {b}: {words!r}" for (a, b), words in found.items()]


def all_prose() -> Iterator[Sentence]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        yield from prose(text, path.relative_to(ROOT).as_posix())
    for path in TUTORIALS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "markdown":
                for sentence in prose("".join(cell["source"]), f"tutorials/{path.name}"):
                    yield sentence._replace(file=f"{sentence.file}, cell {number}, line")


def test_nothing_is_said_twice() -> None:
    found = repetitions(all_prose())
    assert not found, "Say it once, and link to it:\n" + "\n".join(found)


TWICE = """# A page

The map of a class shows where its relevance lies.
It has the shape of the input.

- Of two inputs there are two maps, one for each of them,
  and they add up to what arrives at both of them together.

| a table | the map of a class shows where its relevance lies |

```python
print("the map of a class shows where its relevance lies")
```
"""


def test_a_sentence_that_stands_in_two_places_is_found() -> None:
    other = "Whatever comes first. The *map* of a [class](x.md) shows where its relevance lies!"
    [found] = repetitions([*prose(TWICE, "a.md"), *prose(other, "b.md")])
    assert found.startswith("a.md:3 and b.md:1: 'the map of a class shows where its relevance")


def test_a_run_of_words_that_stands_in_two_places_is_found() -> None:
    other = "One knows: there are two maps, one for each of them, and they add up to the same."
    [found] = repetitions([*prose(TWICE, "a.md"), *prose(other, "b.md")])
    assert found.startswith("a.md:6 and b.md:1: 'there are two maps one for each of them and they")


def test_code_tables_and_short_sentences_are_not_compared() -> None:
    assert not repetitions(prose(TWICE, "a.md"))
    assert not repetitions([*prose("Everything runs offline.", "a.md")] * 2)


def test_only_the_openings_of_two_pages_may_be_equal() -> None:
    line = "This library explains what a model has seen in an image.\n"
    openings = [*prose(line, "README.md"), *prose(line, "docs/index.md")]
    assert not repetitions(openings)
    assert len(repetitions([*openings, *prose(line, "docs/other.md")])) == 1
    below = [*prose("## More\n" + line, "README.md"), *prose(line, "docs/index.md")]
    assert len(repetitions(below)) == 1


# Links.


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"(?ms)^(`{3,}).*?^\1", "", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"\w+:", link):
            assert (path.parent / link).exists(), link


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"(?m)^([\w/-]+)$", (ROOT / "docs" / "index.md").read_text("utf-8")))
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in DOCS}
    assert pages - {"index"} <= listed
    assert {f"tutorials/{path.stem}" for path in TUTORIALS} <= listed


def test_messages_in_the_tables_are_those_of_the_library() -> None:
    """A reader finds a message by the words that it has today."""
    sources = [path.read_text("utf-8") for path in (ROOT / "captum_abslrp").rglob("*.py")]
    messages = [re.sub(r'"\s*\n\s*f?"', "", text) for text in sources]
    text = (ROOT / "docs" / "howto" / "refused.md").read_text("utf-8")
    quoted = re.findall(r"(?m)^\| (`[^|]*) \|", text)
    assert len(quoted) > 10
    for words in re.findall(r"`([^`]+)`", " ".join(quoted)):
        for part in filter(None, map(str.strip, words.split("..."))):
            assert any(part in message for message in messages), part


# The code of the how-to pages, on small models with random weights.


class OneBox(nn.Module):
    """Detects one box, the left half of each image, by its brightness."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        box = {"boxes": torch.tensor([[0.0, 0, 80, 160]]), "labels": torch.tensor([3])}
        return [
            {**box, "scores": image[..., :80].mean((0, 1, 2), keepdim=True).view(1)} for image in x
        ]


class Pixels(nn.Module):
    """A segmentation of 21 classes, in the form that torchvision or Hugging Face returns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 21, 1)
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():  # so that some pixels are of these classes
            layers[-1].weight[[8, 12], [0, 1]] = 9

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {self.name: self.layers(x)}


def small_clip() -> nn.Module:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 16}
    text |= {"bos_token_id": 97, "eos_token_id": 98}
    vision = {"num_attention_heads": 2, "image_size": 160, "patch_size": 32}
    config = transformers.CLIPConfig(
        text_config=size | text, vision_config=size | vision, projection_dim=8
    )
    model: nn.Module = transformers.CLIPModel(config).eval()
    return model


def small_yolos() -> nn.Module:
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=[160, 160], patch_size=32, num_detection_tokens=4, num_labels=5,
    )  # fmt: skip
    model: nn.Module = transformers.YolosForObjectDetection(config).eval()
    return model


class SmallProcessor:
    """A processor of CLIP that knows two texts."""

    def __call__(self, *, text: list[str], **options: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[97, 1 + number, 98] for number in range(len(text))])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CREATE_MODEL = timm.create_model


def small_model(name: str, *, pretrained: bool = False, num_classes: int = 1000) -> nn.Module:
    """A small model of the same kind."""
    assert timm.is_model(name)
    kind = "test_vit" if "vit" in name else "test_resnet"
    return CREATE_MODEL(kind, num_classes=num_classes)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the how-to pages take as given."""
    torch.manual_seed(0)
    monkeypatch.setattr(timm, "create_model", small_model)
    monkeypatch.setattr(
        torchvision.models.segmentation, "deeplabv3_resnet50", lambda weights: Pixels("out")
    )
    monkeypatch.setattr(
        torchvision.models.detection, "fasterrcnn_resnet50_fpn", lambda weights: OneBox()
    )
    for cls, make in (
        ("SegformerForSemanticSegmentation", lambda: Pixels("logits").eval()),
        ("YolosForObjectDetection", small_yolos),
        ("CLIPModel", small_clip),
        ("CLIPProcessor", SmallProcessor),
    ):
        monkeypatch.setattr(
            getattr(transformers, cls), "from_pretrained", lambda name, make=make: make()
        )
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((200, 180), 50).convert("RGB").save("cat.jpg")
    return {
        "model": VisionTransformer(160, 32, embed_dim=24, depth=2, num_heads=2).eval(),
        "x": torch.randn(2, 3, 160, 160),
        "other": torch.randn(2, 3, 160, 160),
        "others": torch.randn(3, 3, 160, 160),
        "image": torch.rand(3, 160, 160),
        "images": torch.randn(8, 3, 160, 160),
        "labels": torch.arange(8),
        "resnet": CREATE_MODEL("test_resnet").eval(),
    }


@pytest.mark.parametrize("path", HOWTO, ids=lambda path: path.stem)
def test_the_code_runs_as_printed(path: Path, stand_ins: dict[str, Any]) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
    assert blocks
    given = dict(stand_ins)
    for block in blocks:
        lines_before = text.partition(block)[0].count("\n")  # so that a traceback shows the page
        exec(compile("\n" * lines_before + block, str(path), "exec"), given)


COMMANDS = [
    (path.stem, line)
    for path in (ROOT / "docs" / "command-line.md", *HOWTO)
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if "captum-abslrp " in line or "captum_abslrp " in line
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_of_the_pages_are_accepted(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option exists: the arguments are parsed, and what the command would do is left out."""
    accepted = []
    words = shlex.split(line, comments=True)
    start = next(i for i, word in enumerate(words) if word.replace("_", "-") == "captum-abslrp")
    for part in ("demo", "explain", "evaluate", "export", "inspect"):
        monkeypatch.setattr(
            f"captum_abslrp.cli.{part}._{part}", lambda args: accepted.append(args) or 0
        )
    assert main(words[start + 1 :]) == 0
    assert len(accepted) == 1
