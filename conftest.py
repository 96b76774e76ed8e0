"""One thread per worker; registries restored; names that examples in docstrings do not import."""

import os
from collections.abc import Iterator
from typing import Any

import captum
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, TextAbsLRP, inspect_rules, methods
from captum_abslrp.mappings import At, get_mapping, registry
from captum_abslrp.rules import captum as layer_rules

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers have the other cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


REGISTRIES: tuple[dict[Any, Any], ...] = (
    registry._CALL_RULES,
    registry._MAPPINGS,
    registry._ARCHITECTURES,
    layer_rules._LAYER_RULES,
    methods._METHODS,
)


@pytest.fixture(autouse=True)
def _restored_registries() -> Iterator[None]:
    """What a test or an example registers is forgotten after it."""
    saved = [dict(entries) for entries in REGISTRIES]
    yield
    for entries, before in zip(REGISTRIES, saved, strict=True):
        entries.clear()
        entries.update(before)


@pytest.fixture(autouse=True)
def _names_for_doctests(doctest_namespace: dict[str, object]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(
        AbsLRP=AbsLRP,
        At=At,
        F=F,
        LRP=LRP,
        LayerAbsLRP=LayerAbsLRP,
        TextAbsLRP=TextAbsLRP,
        captum=captum,
        get_mapping=get_mapping,
        inspect_rules=inspect_rules,
        nn=nn,
        timm=timm,
        torch=torch,
    )
