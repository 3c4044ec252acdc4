"""In which order samples are used and which rank takes which: pure arithmetic.

Invariant: the order follows from (seed, epoch) alone; a window is the same samples at any world size; seeking needs no
memory and no time. It holds no data and no position: see `data`.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dist_train.errors import ConfigError

Positions = npt.NDArray[np.int64]

_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF
# Even: the halves end where they began. With 8, the orders of 5 or 6 samples were not equally likely.
_ROUNDS: Final = 12
ORDER_SEED: Final = 0  # what a seed is for: `data` has the others


def _mix(value: Any) -> Any:
    """splitmix64's finaliser, a bijection of 64-bit integers; int or array. Source: Steele, Lea, Flood, OOPSLA 2014."""
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(*words: int) -> int:
    """64 bits in which every bit of every word counts, and so does their order."""
    state = 0
    for word in words:
        state = _mix(((state + 0x9E37_79B9_7F4A_7C15) & _MASK) ^ (word & _MASK))
    return state


def split(count: int, rank: int, world_size: int) -> range:
    """A rank's contiguous part of range(count); the first ranks take one more where it does not divide."""
    base, extra = divmod(count, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


def require_at_least_one(**sizes: object) -> None:
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral) or int(value) < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, found {value!r}")


class Permutation:
    """Bijection of range(size) in O(1) memory with O(1) access to any position.

    A balanced Feistel network over Z_a x Z_b, a and b about sqrt(size), with addition modulo a and b in turn: at most
    sqrt(size) values lie outside of the range, so cycle walking is rare. Round function: splitmix64 of (half xor key).

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3.
    """

    def __init__(self, size: int, key: int) -> None:
        """`size` from 1 to 2**62; `key` any integer, of which 64 bits count. Raises ConfigError for another size."""
        require_at_least_one(size=size)
        if size > 2**62:
            raise ConfigError(f"size must be at most 2**62, found {size}")
        self.size = int(size)
        root = math.isqrt(self.size - 1) + 1
        self._moduli = np.uint64(root), np.uint64(-(-self.size // root))
        self._keys = [np.uint64(derive_seed(key, turn)) for turn in range(_ROUNDS)]

    def __call__(self, positions: Positions) -> Positions:
        """The values at `positions`: int64 in range(size), any shape, kept. Raises IndexError outside of the range."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.size:
            raise IndexError(f"positions {positions.min()} to {positions.max()} reach outside range({self.size})")
        values = self._encrypt(positions.reshape(-1).astype(np.uint64))
        while (outside := np.flatnonzero(values >= np.uint64(self.size))).size:
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64).reshape(positions.shape)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        moduli = self._moduli
        halves = list(np.divmod(values, moduli[1]))
        for turn, key in enumerate(self._keys):
            side = turn % 2
            halves[side] = (halves[side] + _mix(halves[1 - side] ^ key) % moduli[side]) % moduli[side]
        encrypted: npt.NDArray[np.uint64] = halves[0] * moduli[1] + halves[1]
        return encrypted


def sample_order(size: int, *, seed: int, epoch: int, shuffle: bool) -> Callable[[Positions], Positions]:
    """The order of an epoch: a function from positions to dataset indices, the identity without `shuffle`."""
    return Permutation(size, derive_seed(seed, epoch, ORDER_SEED)) if shuffle else lambda positions: positions


OrderFunction = Callable[[int], Sequence[int] | npt.NDArray[Any]]
"""The user's order of an epoch: dataset indices, of any length, repeats allowed; a pure function of the epoch."""


class GivenOrder:
    """Orders that a function of the user's gives: asked once an epoch, checked, and kept for that epoch."""

    def __init__(self, function: OrderFunction, num_samples: int) -> None:
        """`num_samples`: of the dataset, which the indices point into."""
        self._function = function
        self._num_samples = num_samples
        self._epoch = -1
        self._indices: Positions = np.zeros(0, dtype=np.int64)
        self._uses: Positions = self._indices
        self._digest = ""

    def at(self, epoch: int) -> tuple[Positions, Positions]:
        """The epoch's indices, and for each how many times its sample was used before in that epoch.

        Raises:
            ConfigError: what the function returned is no order of this dataset.
        """
        if epoch != self._epoch:
            self._indices = self._checked(epoch, self._function(epoch))
            self._uses = _earlier_uses(self._indices)
            self._digest = hashlib.blake2b(self._indices.astype("<i8").tobytes(), digest_size=16).hexdigest()
            self._epoch = epoch
        return self._indices, self._uses

    def digest(self, epoch: int) -> str:
        """32 hexadecimal digits; another order has others."""
        self.at(epoch)
        return self._digest

    def _checked(self, epoch: int, given: object) -> Positions:
        found = np.asarray(given)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
            raise ConfigError(
                f"order({epoch}) gave {found.dtype} of shape {list(found.shape)}; it must return at least one dataset "
                f"index, as a flat sequence of whole numbers."
            )
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= self._num_samples:
            raise ConfigError(
                f"order({epoch}) gave indices from {low} to {high}; the dataset has {self._num_samples} samples, "
                f"indices 0 to {self._num_samples - 1}."
            )
        return found.astype(np.int64)


def _earlier_uses(indices: Positions) -> Positions:
    """For each place, at how many earlier places the same index stands."""
    by_index = np.argsort(indices, kind="stable")
    ordered = indices[by_index]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    uses = np.empty_like(indices)
    uses[by_index] = np.arange(len(indices)) - np.repeat(starts, np.diff(np.r_[starts, len(indices)]))
    return uses


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one rank takes at one micro-step: positions of the epoch's order, never none: no rank may skip a pass."""

    start: int
    stop: int
    weight: float  # times the mean loss: makes the averaged gradient that of the window's mean loss
    num_samples: int  # stop - start, or 0 for a filler: a sample looked at with weight 0
    window_samples: int  # of the whole window, over all ranks and micro-steps
    ends_window: bool  # an optimizer update follows
    ends_epoch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochLayout:
    """Which positions of an epoch's order go to which rank at which micro-step. Pure arithmetic.

    A window is the samples of one optimizer update: the next `global_batch_size` positions, whatever the world size.
    It takes as few micro-steps as `micro_batch_size` allows; they share it evenly, and so do the ranks of each, in rank
    order: no share is larger than another by more than one sample, so that none is needlessly small for a BatchNorm.
    """

    num_samples: int  # of the whole epoch
    global_batch_size: int  # samples of a full window
    micro_batch_size: int  # most samples of one rank's forward pass
    world_size: int
    drop_last: bool = False  # leave out the last window if it is short
    start: int = 0  # samples of the epoch already consumed; windows are counted from here

    def __post_init__(self) -> None:
        sizes = ("num_samples", "global_batch_size", "micro_batch_size", "world_size")
        require_at_least_one(**{name: getattr(self, name) for name in sizes})
        if not 0 <= self.start <= self.num_samples:
            raise ConfigError(f"{self.start} samples into an epoch of {self.num_samples}: outside the epoch")

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps of a full window, by which Accelerate's `backward` divides the loss, short windows included."""
        return -(-self.global_batch_size // self._step_samples)

    @property
    def num_windows(self) -> int:
        """Optimizer updates that are left of the epoch."""
        return -(-self._left // self.global_batch_size)

    @property
    def num_micro_steps(self) -> int:
        """Forward passes that are left of the epoch, the same on every rank."""
        full, rest = divmod(self._left, self.global_batch_size)
        return full * self.accumulation_steps - (-rest // self._step_samples)

    def micro_batch(self, micro_step: int, rank: int) -> MicroBatch:
        """The share of `rank` in `micro_step`, counted from `start`. O(1). Raises IndexError outside the epoch."""
        if not (0 <= micro_step < self.num_micro_steps and 0 <= rank < self.world_size):
            raise IndexError(
                f"micro-step {micro_step} on rank {rank}: there are {self.num_micro_steps} on {self.world_size} ranks"
            )
        window, step = divmod(micro_step, self.accumulation_steps)
        window_samples = min(self.global_batch_size, self._left - window * self.global_batch_size)
        passes = -(-window_samples // self._step_samples)
        part = split(window_samples, step, passes)
        share = split(len(part), rank, self.world_size)
        start = self.start + window * self.global_batch_size + part.start + (share.start if share else 0)
        return MicroBatch(
            start=start,
            stop=start + max(len(share), 1),
            weight=len(share) * self.world_size * self.accumulation_steps / window_samples,
            num_samples=len(share),
            window_samples=window_samples,
            ends_window=step == passes - 1,
            ends_epoch=micro_step == self.num_micro_steps - 1,
        )

    def window_of(self, micro_step: int) -> tuple[int, int]:
        """The places in the epoch of the window that a micro-step belongs to: the first, and the one after the last."""
        first = self.start + micro_step // self.accumulation_steps * self.global_batch_size
        return first, min(first + self.global_batch_size, self.start + self._left)

    def describe_uneven(self) -> str:
        """How a full window is shared out where not all shares are equal; empty where they are."""
        passes, ranks = self.accumulation_steps, f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        least, some_have_more = divmod(self.global_batch_size, passes * self.world_size)
        if not some_have_more:
            return ""
        made_of = f"{passes} passes" if passes > 1 else "one pass"
        idle = "" if least else " (a rank without one looks at a sample that counts nothing)"
        return (
            f"The global batch of {self.global_batch_size} samples does not divide evenly on {ranks}: an update is "
            f"{made_of} of {least + 1} and {least} samples a rank{idle}, weighted, so that it is that of the whole "
            f"global batch and each sample counts once."
        )

    @property
    def _step_samples(self) -> int:
        return self.world_size * self.micro_batch_size

    @property
    def _left(self) -> int:
        left = self.num_samples - self.start
        return left - left % self.global_batch_size if self.drop_last else left
