"""Where to look next for the largest predicted loss whose measured error is still within a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Losses are second order in errors.
ORDER = 2.0
LARGEST_STEP = 30.0
CLOSE = 1.15
SMALLEST = 1e-12


@dataclass
class Trail:
    """A bracket of predicted losses, narrowed by measured errors.

    Args:
        limit: Of the measured error.

    Attributes:
        loss: What to try next.
    """

    limit: float
    loss: float = field(init=False)
    _good: float | None = field(default=None, init=False)
    _bad: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Start where errors and losses would agree."""
        self.loss = self.limit**ORDER

    def learn(self, loss: float, error: float) -> bool:
        """Take in what was measured at `loss`; False when there is nothing left to try."""
        loss = max(loss, SMALLEST)
        # The choice may lie well below the loss asked for; everything in between is as good as it.
        if error <= self.limit:
            self._good = max(loss, self.loss)
        else:
            self._bad = loss
        if self._good is not None and self._bad is not None:
            self.loss = math.sqrt(self._good * self._bad)
            return self._bad > CLOSE * self._good
        ratio = (self.limit / max(error, SMALLEST)) ** ORDER
        step = min(max(ratio, 1 / LARGEST_STEP), LARGEST_STEP)
        self.loss = (self._good or loss) * max(step, 2.0) if self._bad is None else loss * min(step, 0.5)
        return self.loss > SMALLEST
