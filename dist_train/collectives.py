"""What torch's collectives tell of the other ranks: whether they were waited for, and whether they are gone.

Invariant: asking is no collective, and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from dist_train.errors import DeadlineError, LauncherLostError


def count_collectives() -> int | None:
    """Those of all groups so far: whether this rank has waited for others between two moments. None where a backend
    does not count them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    groups: Iterable[Any] = dist.distributed_c10d._world.pg_map
    try:
        return int(sum(group._get_sequence_number_for_group() for group in groups))
    except RuntimeError:
        return None


_LOST_PEERS = ("closed by peer", "reset by peer", "Broken pipe", "remote process has terminated")
# Source: gloo/transport/tcp/pair.cc; torch/csrc/distributed/c10d/NCCLUtils.hpp.


def has_lost_peers(error: BaseException) -> bool:
    """Whether an error only says that other ranks are gone: theirs is the cause."""
    if isinstance(error, (DeadlineError, LauncherLostError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEERS)
