"""`fourm run`: a list of commands as one."""

from fourm.pipeline import PipelineConfig as Config
from fourm.pipeline import run

__all__ = ["Config", "run"]
