"""torchrun for a notebook's cell: the same workers, without the launcher's own traceback and log.

    python -m dist_train.cluster.launcher --nproc-per-node=2 train.py --run-dir runs/price

Invariant: what the workers write appears as it is; the exit code is that of the first rank that failed, 130 after an
interrupt. It restarts nothing: whoever starts it sees whether that makes sense.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from dist_train.console import print_text
from dist_train.errors import ExitCode


def main(arguments: list[str]) -> int:
    """Runs torchrun on this machine with its arguments; returns the exit code."""
    logging.disable(logging.ERROR)  # it tells of every signal and exit code at length; here that is one line
    try:
        torchrun(["--standalone", "--max-restarts=0", *arguments])
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:  # before the workers were started
        return ExitCode.INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print_text(
                f"Rank {rank} was ended by {failure.signal_name()}; SIGKILL mostly means that memory was exhausted."
            )
            return 128 - failure.exitcode
        return int(failure.exitcode)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
