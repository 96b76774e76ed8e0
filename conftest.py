"""One thread per worker; names that the examples in docstrings use without importing them."""

import os

import captum
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from captum_abslrp import LRP, AbsLRP, LayerAbsLRP, TextAbsLRP, inspect_rules
from captum_abslrp.mappings import At, get_mapping

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers have the other cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


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
