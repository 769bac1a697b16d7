"""`fourm tokenize`: raw shards to token shards."""

from fourm.tokenization.encode import TokenizeConfig as Config
from fourm.tokenization.encode import tokenize as run

__all__ = ["Config", "run"]
