"""The sigma rule: which gradient norm is far above the usual. Pure arithmetic.

Invariant: the limit follows from the norms it is given, to the last bit, whatever was killed in between.
Source: OLMo-core, `SkipStepOptimizer`; Levanter, `skip_step` (6 sigma over 128 steps, judged from half a window on).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_SPREAD = 0.01
"""Of the mean: norms that hardly differ must not make a spike of the first that does."""


def spike_limit(norms: Sequence[float], *, sigma: float, window: int) -> float:
    """The norm above which the next update's is a spike; infinite as long as too few are known.

    Args:
        norms: of the updates before, oldest first. Those that are not finite tell nothing. A spike is to be given as
            the limit that it broke: it hides no other spike, and where the usual has changed for good the limit
            follows it, slowly.
    """
    known = [norm for norm in norms[-window:] if math.isfinite(norm)]
    if len(known) < window // 2:
        return math.inf
    mean = math.fsum(known) / len(known)
    spread = math.sqrt(math.fsum((norm - mean) ** 2 for norm in known) / (len(known) - 1))
    return mean + sigma * max(spread, LEAST_SPREAD * mean)
