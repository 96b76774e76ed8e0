"""Parity with the stored reference results, with the mapping found automatically."""

import pytest
import torch

from captum_abslrp import AbsLRP
from tests.conftest import GOLDEN_NAMES, load_golden, relative_error

TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name: str, dtype: torch.dtype, device: torch.device) -> None:
    golden = load_golden(name, dtype)
    attributor = AbsLRP(golden.model.to(device))
    x = golden.x.to(device)
    target_map = attributor.attribute(x, golden.target, contrast=None).cpu()
    difference = attributor.attribute(x, golden.target).cpu()
    tolerance = TOLERANCES[dtype]
    assert relative_error(target_map, golden.relevance_target) < tolerance
    assert relative_error(target_map - difference, golden.relevance_rest) < tolerance
    assert relative_error(difference, golden.relevance) < tolerance


def test_golden_models_compute_the_stored_logits() -> None:
    for name in GOLDEN_NAMES:
        golden = load_golden(name)
        with torch.no_grad():
            assert torch.allclose(golden.model(golden.x), golden.logits, atol=1e-10)


def test_a_wrong_mapping_is_noticed() -> None:
    golden = load_golden("vit")
    with torch.no_grad():
        wrong = AbsLRP(golden.model, "generic").attribute(golden.x, golden.target)
    assert relative_error(wrong, golden.relevance) > 1e-2


def test_unfused_attention_agrees_with_fused() -> None:
    golden = load_golden("vit")
    for block in golden.model.blocks:
        block.attn.fused_attn = False
    relevance = AbsLRP(golden.model).attribute(golden.x, golden.target)
    assert relative_error(relevance, golden.relevance) < 1e-6
