"""absLRP for Captum: why did a vision model decide as it did?

``AbsLRP(model).attribute(x, target)`` returns the contrastive absLRP relevance (Vukadin et al., ACM TIST
2024) of every input element, for an unmodified timm or torchvision model.
"""

from captum_abslrp.attribution import AbsLRP
from captum_abslrp.interception import UnsupportedCallError

__all__ = ["AbsLRP", "UnsupportedCallError", "__version__"]

__version__ = "0.1.0"
