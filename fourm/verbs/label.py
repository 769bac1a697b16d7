"""`fourm label`: labels for pictures by teachers."""

from fourm.data.labels import LabelConfig as Config
from fourm.data.labels import label as run

__all__ = ["Config", "run"]
