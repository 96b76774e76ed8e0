"""Metrics of attributions: Global Attribution Evaluation (GAE) for any Captum attributor."""

from captum_abslrp.metrics.comparison import Comparison, MethodScores, compare
from captum_abslrp.metrics.evaluation import Evaluation
from captum_abslrp.metrics.gae import GAEResult, gae

__all__ = ["Comparison", "Evaluation", "GAEResult", "MethodScores", "compare", "gae"]
