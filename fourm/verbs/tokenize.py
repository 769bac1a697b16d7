"""`fourm tokenize`: raw shards to token shards."""

import sys

from fourm.tokenization.encode import TokenizeConfig as Config
from fourm.tokenization.encode import tokenize, verify

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Writes token shards; or reads them again, lists what is wrong, and ends with status 1 if anything is."""
    if not config.verify:
        tokenize(config)
        return
    problems = verify(config)
    print("\n".join(problems) or f"{config.output}: all is well")
    if problems:
        sys.exit(1)
