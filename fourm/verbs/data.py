"""`fourm data`: the built-in data set."""

from fourm.data.earth import EarthConfig as Config
from fourm.data.earth import build as run

__all__ = ["Config", "run"]
