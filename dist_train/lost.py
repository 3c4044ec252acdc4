"""Whom a worker has lost: the other ranks, as an error tells, or the launcher that would restart it.

Invariant: asking changes nothing and waits for nobody.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from dist_train import launched
from dist_train.errors import DeadlineError, LauncherLostError

_LOST_PEERS = ("closed by peer", "reset by peer", "Broken pipe", "remote process has terminated")
# Source: gloo/transport/tcp/pair.cc; torch/csrc/distributed/c10d/NCCLUtils.hpp.


def has_lost_peers(error: BaseException) -> bool:
    """Whether an error only says that other ranks are gone: theirs is the cause."""
    if isinstance(error, (DeadlineError, LauncherLostError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEERS)


_IMPORTER = os.getpid()
_FIRST_PARENT = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def launcher_is_gone() -> bool:
    """Whether the launcher (torchrun's agent, or ours) has died and left this worker behind: nobody would restart or
    end it any more. A process that a worker has started has lost nothing while that one lives, and is not asked.
    """
    told = os.environ.get(launched.LAUNCHER_PID)  # a forked worker has imported this before it was one
    if told:
        return launched.is_worker() and os.getppid() != int(told)
    launcher = _FIRST_PARENT if os.getpid() == _IMPORTER else None
    return launcher is not None and os.getppid() != launcher
