"""One model of every family of timm: small ones always, all of them with ``pytest -m ""``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

from captum_abslrp import LRP, AbsLRP, inspect_rules
from captum_abslrp.mappings.composites import COMPOSITES
from tests.conftest import realistic, relative_error
from tests.test_no_trace import no_trace

SMALL = 4.0
"""Million parameters up to which a model is run in every test run."""
LATER = frozenset("cspnext dla efficientformer_v2 fastvit repghost swiftformer vovnet".split())
"""Families with a small model that are left to the slow tests nevertheless: others are like them (cspnet,
ghostnet, edgenext), or the model takes long, being made for images of 224 pixels (efficientformer_v2)."""


class Representative(NamedTuple):
    family: str
    model: str
    size: int
    millions: float


def _table() -> dict[str, Representative]:
    lines = (Path(__file__).parent / "timm_families.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {f: Representative(f, model, int(size), float(m)) for f, model, size, m in rows}


def smallest_of(family: str) -> Representative:
    """The model of fewest parameters, for a family that is newer than the table."""
    found = []
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name)
        count = sum(p.numel() for p in model.parameters())
        found.append(Representative(family, name, model.default_cfg["input_size"][-1], count / 1e6))
    return min(found, key=lambda r: r.millions)


TABLE = _table()
FAMILIES = [TABLE.get(family) or smallest_of(family) for family in timm.list_modules()]


def parameter(representative: Representative) -> object:
    slow = representative.millions > SMALL or representative.family in LATER
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(representative, id=representative.family, marks=marks)


# With random weights the classes of some are told apart in float64 only.
@pytest.mark.filterwarnings("ignore:The maps of target and contrast")
@pytest.mark.parametrize("representative", [parameter(family) for family in FAMILIES])
def test_every_family_is_explained(representative: Representative) -> None:
    if not timm.is_model(representative.model):
        pytest.skip(f"timm {timm.__version__} has no {representative.model}")
    torch.manual_seed(0)
    model = timm.create_model(representative.model)
    if not model.num_classes:  # made for its features
        model = timm.create_model(representative.model, num_classes=10)
    x = torch.randn(2, 3, representative.size, representative.size)
    realistic(model, x)
    model, x = model.double(), x.double()
    target = torch.tensor([1, 2])
    attribute = AbsLRP(model).attribute
    with no_trace(model):
        relevance = attribute(x, target)
    assert relevance.shape == x.shape
    assert bool(torch.isfinite(relevance).all())
    assert bool(relevance.flatten(1).any(1).all())
    assert relative_error(attribute(x[:1], target[:1]), relevance[:1]) < 1e-3
    with torch.no_grad():
        least = model(x).argmin(1)
    assert bool(attribute(x, least, contrast=None).flatten(1).any(1).all())
    assert relative_error(attribute(x, target.flip(0)), relevance) > 1e-3
    single = AbsLRP(model.float()).attribute(x.float(), target)
    assert bool(torch.isfinite(single).all())
    assert bool(single.flatten(1).any(1).all())


def with_composites(representative: Representative) -> object:
    always = representative.family in ("vision_transformer", "resnet", "mobilenetv3")
    marks = [] if always else [pytest.mark.slow]
    return pytest.param(representative, id=representative.family, marks=marks)


@pytest.mark.parametrize("representative", [with_composites(family) for family in FAMILIES])
def test_every_composite_explains_every_family(representative: Representative) -> None:
    if not timm.is_model(representative.model):
        pytest.skip(f"timm {timm.__version__} has no {representative.model}")
    torch.manual_seed(0)
    model = timm.create_model(representative.model)
    if not model.num_classes:
        model = timm.create_model(representative.model, num_classes=10)
    x = torch.randn(2, 3, representative.size, representative.size)
    realistic(model, x)
    model, x, target = model.double(), x.double(), torch.tensor([1, 2])
    for name in COMPOSITES:
        box = {"low": -4.0, "high": 4.0} if name == "epsilon_gamma_box" else {}
        attribute = LRP(model, name, **box).attribute  # type: ignore[arg-type]
        with no_trace(model):
            relevance = attribute(x, target, contrast="others")
        assert bool(torch.isfinite(relevance).all()), name
        assert bool(relevance.flatten(1).any(1).all()), name
        alone = attribute(x[:1], target[:1], contrast="others")
        assert relative_error(alone, relevance[:1]) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_call_of_every_model_has_a_rule(family: str) -> None:
    for name in timm.list_models(module=family):
        with torch.device("meta"):  # no values are needed
            model = timm.create_model(name).eval()
            inspection = inspect_rules(model, torch.empty(1, *model.default_cfg["input_size"]))
        assert not inspection.unsupported, f"{name}\n{inspection}"
