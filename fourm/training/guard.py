"""Which updates are not made: those with a loss that is not finite or leaps, and those the user leaves out."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, deque
from typing import Any, Literal

WINDOW = 128  # losses that a leap is measured by
LIMIT = 10  # updates in a row that may fail
STILL = 1e-3  # losses spread by this share of their mean at least

Verdict = Literal["good", "non_finite", "spike", "asked"]


class Guard:
    """Judges updates before they are made. Its verdicts follow from losses and gradient norms that all processes share.

    Args:
        sigma: A loss is a spike if it lies so many standard deviations above the mean of the last `WINDOW`; 0: never.
        skip_steps: Updates to leave out: `a:b` for a, a + 1, ..., b - 1; several, parted by commas.

    Attributes:
        skipped: How many updates were left out, by reason.
        in_a_row: How many of the last updates were not good.

    Raises:
        ValueError: Steps that are not written so.
    """

    def __init__(self, sigma: float = 6.0, skip_steps: str = ""):
        self.sigma, self.ranges = sigma, [_steps(text.strip()) for text in skip_steps.split(",") if skip_steps]
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped: Counter[str] = Counter()
        self.in_a_row = 0

    def leaves_out(self, step: int) -> bool:
        """Whether the user does not want this update; counts it."""
        out = any(step in steps for steps in self.ranges)
        if out:
            self.skipped["asked"] += 1
        return out

    def judge(self, loss: float, norm: float) -> Verdict:
        """What an update of this loss and gradient norm is, over all processes; counts it if it is not good.

        The loss of a spike counts among the last ones too, so that a level that stays is soon accepted.
        """
        verdict: Verdict = "good"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            verdict = "non_finite"
        elif self.sigma and len(self.losses) == WINDOW:
            mean = statistics.fmean(self.losses)
            if loss - mean > self.sigma * max(statistics.pstdev(self.losses, mean), STILL * abs(mean)):
                verdict = "spike"
        if verdict != "non_finite":
            self.losses.append(loss)
        self.in_a_row = 0 if verdict == "good" else self.in_a_row + 1
        if self.in_a_row:
            self.skipped[verdict] += 1
        return verdict

    def state(self) -> dict[str, Any]:
        """What must be remembered to go on, as JSON can hold it."""
        return {"losses": list(self.losses), "skipped": dict(self.skipped), "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.skipped, self.in_a_row = Counter(state["skipped"]), state["in_a_row"]


def _steps(text: str) -> range:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps:
        raise ValueError(f"skip_steps has {text!r}, expected updates such as '1200:1300' (without 1300)")
    return steps
