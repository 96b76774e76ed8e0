"""How good is an attribution? Global Attribution Evaluation (GAE) of any Captum attributor."""

from captum_abslrp.metrics.comparison import Comparison, MethodScores, compare
from captum_abslrp.metrics.evaluation import Evaluation
from captum_abslrp.metrics.gae import GAEResult, gae

__all__ = ["Comparison", "Evaluation", "GAEResult", "MethodScores", "compare", "gae"]
