"""Looks at the gradients before each update, and at the weights before each save: is anything not finite, or a spike?

    before an update    norm of the gradients -> bad? -> the update is masked -> the norm on its way to the host
    at a boundary       the norms that have arrived -> what was bad, and in which window

Invariant: what is found is equal on all ranks: after the all-reduce of DDP the gradients are, norms of sharded ones are
reduced over their mesh, and what may differ all the same is reduced to the largest. On a GPU no step waits for the
device: a flag masks the update there and is read one update late. It decides nothing but what it masks.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dist_train.health.policy import HealthPolicy
from dist_train.health.spikes import spike_limit

logger = logging.getLogger(__name__)
Json = Any
Window = TypeVar("Window")


@dataclass(frozen=True, slots=True)
class BadUpdate(Generic[Window]):
    """An update that was bad, and the window that its gradient was of."""

    window: Window
    kind: Literal["not_finite", "spike"]
    norm: float
    limit: float
    """Above which a norm is a spike."""


@dataclass(frozen=True, slots=True)
class _Reading:
    optimizer: str
    limit: float
    values: _Values | _Known
    """The norm, and whether the GradScaler leaves the update out by itself."""
    is_bad: torch.Tensor | bool


class GradientGuard(Generic[Window]):
    """The gradients of a run's optimizers.

    Args:
        optimizers: innermost, by name.
        models: where training may go on after a bad window, their buffers are put back to what they were.
        agree: makes a norm the same on all ranks where gradients alone may not; None where they do.
        lag: updates until a norm is read; None takes 1 on a GPU and 0 elsewhere.
    """

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        policy: HealthPolicy,
        *,
        models: Iterable[nn.Module] = (),
        agree: Callable[[torch.Tensor], None] | None = None,
        lag: int | None = None,
    ) -> None:
        self._optimizers = optimizers if policy.watches else {}
        self._policy = policy
        self._buffers = _KeptBuffers(models if policy.skips else ())
        self._agree = agree
        self._lag = lag if lag is not None else int(any(_is_late(one) for one in optimizers.values()))
        self._norms = {name: deque[float](maxlen=policy.spike_window + self._lag) for name in optimizers}
        self._begun = dict.fromkeys(optimizers, 0)
        self._read = dict.fromkeys(optimizers, 0)
        self._readings: list[_Reading] = []
        self._windows: deque[tuple[Window, list[_Reading]]] = deque()
        self._told_norm: torch.Tensor | float | None = None
        self._told_of_waiting = False
        self._masked: set[int] = set()
        """Optimizers whose flag was set here, and not by the GradScaler."""
        self._hooks: list[Any] = []

    def open(self) -> None:
        """From now on each step of the optimizers is looked at."""
        for name, optimizer in self._optimizers.items():

            def look(one: torch.optim.Optimizer, args: Any, kwargs: Any, name: str = name) -> None:
                self._look(name, one, args, kwargs)

            self._hooks += [optimizer.register_step_pre_hook(look), optimizer.register_step_post_hook(self._unmask)]
        self._buffers.keep()

    def close(self) -> None:
        """The optimizers are left as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def tell_norm(self, norm: torch.Tensor | float) -> None:
        """The norm of the next update's gradients before they were clipped, which is not measured again then."""
        self._told_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    # At a boundary

    def end_window(self, window: Window) -> None:
        """The updates since the last call were of this window."""
        readings, self._readings, self._told_norm = self._readings, [], None
        self._buffers.keep_unless([reading.is_bad for reading in readings])
        self._windows.append((window, readings))

    def find_bad(self, *, all_of_them: bool = False) -> list[BadUpdate[Window]]:
        """Bad updates that became known since the last call, oldest first.

        Args:
            all_of_them: waits for the device, as before a save.
        """
        found = []
        while len(self._windows) > (0 if all_of_them else self._lag):
            window, readings = self._windows.popleft()
            bad = [one for reading in readings if (one := self._judge(window, reading)) is not None]
            found += bad[:1]
        return found

    def capture(self) -> Json:
        """What the limit depends on; after `find_bad(all_of_them=True)`."""
        if self._policy.spike is None:
            return {}
        return {name: [norm.hex() for norm in norms] for name, norms in self._norms.items()}

    def restore(self, captured: Json) -> None:
        """Forgets what it has seen and takes over what `capture` gave."""
        self._readings, self._told_norm = [], None
        self._windows.clear()
        for name, norms in self._norms.items():
            norms.clear()
            norms.extend(float.fromhex(text) for text in captured.get(name, []))
            self._begun[name] = self._read[name] = len(norms)
        self._buffers.keep()

    def _judge(self, window: Window, reading: _Reading) -> BadUpdate[Window] | None:
        norm, left_out = reading.values.read()
        self._norms[reading.optimizer].append(math.nan if left_out else min(norm, reading.limit))
        self._read[reading.optimizer] += 1
        if left_out or (math.isfinite(norm) and norm <= reading.limit):
            return None
        kind: Literal["not_finite", "spike"] = "spike" if math.isfinite(norm) else "not_finite"
        if self._policy.action(kind) == "ignore":
            return None
        return BadUpdate(window, kind, norm, reading.limit)

    # Before an update

    def _look(self, name: str, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _closure(args, kwargs) is not None or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            return  # the gradients are made inside of the step, or the step is only being recorded
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        with torch.no_grad():
            norm = self._norm_of(gradients, optimizer)
            limit = self._limit(name)
            by_scaler = _tensor_of(optimizer, "found_inf", norm.device)
            if not self._lag:
                known = _Known(float(norm), by_scaler is not None and bool(by_scaler > 0))
                self._note(name, limit, known, self._leave_out(optimizer, known, limit))
                return
            left_out = torch.zeros_like(norm) if by_scaler is None else (by_scaler > 0).to(norm.dtype)
            bad = (~norm.isfinite() | (norm > limit)) & (left_out == 0)
            reading = _Values(torch.stack([norm, left_out]))
            is_bad = self._mask(optimizer, bad, reading, limit)
        self._note(name, limit, reading, is_bad)

    def _note(self, name: str, limit: float, values: _Values | _Known, is_bad: torch.Tensor | bool) -> None:
        self._begun[name] += 1
        self._readings.append(_Reading(name, limit, values, is_bad))

    def _norm_of(self, gradients: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> torch.Tensor:
        told, self._told_norm = self._told_norm, None
        if told is None:
            norm = total_norm(gradients)
            scale = _tensor_of(optimizer, "grad_scale", norm.device)
            norm = norm if scale is None else norm / scale
        else:
            norm = torch.as_tensor(told, device=gradients[0].device).detach().reshape(())
            norm = norm.to(_exact(norm.device))
        if self._agree is not None:
            norm = torch.where(norm.isnan(), torch.inf, norm)
            self._agree(norm)
        return norm

    def _limit(self, name: str) -> float:
        """From the updates at least `lag` before this one, so that it does not depend on when they are read."""
        if self._policy.spike is None:
            return math.inf
        norms, too_new = list(self._norms[name]), self._read[name] - (self._begun[name] - self._lag)
        usable = norms[: len(norms) - max(too_new, 0)]
        return spike_limit(usable, sigma=self._policy.spike_sigma, window=self._policy.spike_window)

    def _mask(
        self, optimizer: torch.optim.Optimizer, bad: torch.Tensor, values: _Values, limit: float
    ) -> torch.Tensor | bool:
        """Where the norm is read late: the device leaves a bad update out, if anybody has to."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            if self._policy.not_finite == "ignore":
                bad = bad & values.device_norm.isfinite()
            before = _tensor_of(optimizer, "found_inf", bad.device)
            masked = bad.to(torch.float32) if before is None else torch.maximum(bad.to(before.dtype), before)
            if before is None:
                self._masked.add(id(optimizer))
            optimizer.found_inf = masked  # type: ignore[attr-defined]
            return bad
        if not self._policy.skips:
            return bad  # a bad update is made; its weights are never saved, and never trained on for long
        self._tell_of_waiting(optimizer)
        return self._leave_out(optimizer, values, limit)

    def _leave_out(self, optimizer: torch.optim.Optimizer, values: _Values | _Known, limit: float) -> bool:
        """Keeps parameters and optimizer state as they are, bit for bit, where the update is bad."""
        norm, left_out = values.read()
        is_bad = not left_out and not (math.isfinite(norm) and norm <= limit)
        kind = "spike" if math.isfinite(norm) else "not_finite"
        if not is_bad or self._policy.action(kind) == "ignore":
            return False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        return True

    def _unmask(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """The flag is the GradScaler's own attribute: it must not meet one of an update that is over."""
        if id(optimizer) in self._masked:
            self._masked.discard(id(optimizer))
            del optimizer.found_inf  # type: ignore[attr-defined]

    def _tell_of_waiting(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._told_of_waiting:
            self._told_of_waiting = True
            logger.warning(
                "%s cannot leave an update out on the device: to skip bad updates each step waits for it. Make the "
                "optimizer with fused=True, or choose another HealthPolicy than 'skip', to save that time.",
                type(optimizer).__name__,
            )


@dataclass(frozen=True, slots=True)
class _Known:
    """Numbers that are on the host already."""

    norm: float
    left_out: bool

    def read(self) -> tuple[float, bool]:
        return self.norm, self.left_out


class _Values:
    """Numbers of the device, on their way to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self.device_norm = values[0]
        self._ready: Any = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> tuple[float, bool]:
        """The norm, and whether the GradScaler leaves the update out; waits until they have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        norm, left_out = self._host.tolist()
        return norm, bool(left_out)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A buffer as it was: the tensor that the module held, and what stood in it."""

    held: torch.Tensor | None
    value: torch.Tensor
    """Empty where the module held none."""

    def can_be_mixed(self, live: torch.Tensor | None) -> bool:
        if live is None or self.held is None:
            return False
        return (live.shape, live.dtype, live.device) == (self.value.shape, self.value.dtype, self.value.device)


class _KeptBuffers:
    """What the models' buffers were before a window: a bad one has gone into running means, too.

    A forward may write into a buffer or put another tensor in its place, so that it is looked up by its name each time.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._modules = [module for model in models for module in model.modules() if module._buffers]
        self._kept: list[dict[str, _Kept]] = [{} for _ in self._modules]

    @torch.no_grad()
    def keep(self) -> None:
        for module, kept in zip(self._modules, self._kept, strict=True):
            for name, live in module._buffers.items():
                former = kept.get(name)
                if live is not None and former is not None and former.can_be_mixed(live):
                    former.value.copy_(live)
                    kept[name] = _Kept(live, former.value)
                else:
                    kept[name] = _Kept(live, torch.empty(0) if live is None else live.detach().clone())

    @torch.no_grad()
    def keep_unless(self, flags: list[torch.Tensor | bool]) -> None:
        """Keeps what the buffers are now, or puts them back where a flag is set; on a device without waiting for it."""
        tensors = [flag for flag in flags if isinstance(flag, torch.Tensor)]
        certain = any(flag is True for flag in flags)
        if certain or tensors:
            for module, kept in zip(self._modules, self._kept, strict=True):
                for name, one in kept.items():
                    self._put_back(module, name, one, None if certain else tensors)
        if not certain:
            self.keep()

    @staticmethod
    def _put_back(module: nn.Module, name: str, one: _Kept, flags: list[torch.Tensor] | None) -> None:
        """Where a flag is set; None for certain. What the forward put in the buffer's place is not written into: it may
        be anybody's.
        """
        live = module._buffers.get(name)
        if flags is not None and one.can_be_mixed(live):
            assert live is not None
            mixed = live
            for flag in flags:
                mixed = torch.where(flag.to(live.device), one.value, mixed)
            if live is one.held:
                live.copy_(mixed)
            else:
                module._buffers[name] = mixed
        elif flags is None or any(map(bool, flags)):
            if one.held is not None:
                one.held.copy_(one.value)
            if live is not one.held:
                module._buffers[name] = one.held


def total_norm(tensors: Iterable[torch.Tensor], order: float = 2.0) -> torch.Tensor:
    """Norm of all tensors together, in the widest floats of the first one's device, on which it is the same on all
    ranks that hold parts of them. Collective for sharded tensors; never waits for the device.

    Args:
        order: 2, or infinity for the largest magnitude.
    """
    groups: dict[Any, tuple[list[torch.Tensor], list[Any]]] = {}
    for tensor in tensors:
        local, meshes = _local_part(tensor)
        key = (local.device, local.dtype, tuple(id(mesh) for mesh, _ in meshes), tuple(dim for _, dim in meshes))
        groups.setdefault(key, ([], meshes))[0].append(local)
    parts = []
    for locals_, meshes in groups.values():
        exact = _exact(locals_[0].device)
        wide = locals_[0].dtype if locals_[0].dtype.itemsize > 4 else torch.float32  # squares of a half overflow
        norms = torch._foreach_norm(locals_, order, dtype=wide)
        whole = torch.linalg.vector_norm(torch.stack(norms).to(exact), order)
        parts.append(_reduce(whole, meshes, order))
    together = torch.stack([part.to(parts[0].device, non_blocking=True) for part in parts])
    norm: torch.Tensor = torch.linalg.vector_norm(together, order)
    return norm


def _reduce(norm: torch.Tensor, meshes: list[Any], order: float) -> torch.Tensor:
    if not meshes:
        return norm
    is_largest = math.isinf(order)
    # NaN has no place in a largest value: some backends lose it.
    value = torch.where(norm.isnan(), torch.inf, norm) if is_largest else norm.square()
    for mesh, dimension in meshes:
        operation = dist.ReduceOp.MAX if is_largest else dist.ReduceOp.SUM
        dist.all_reduce(value, operation, group=mesh.get_group(dimension))
    return value if is_largest else value.sqrt()


def _local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """What this rank holds, dense and real, and the mesh dimensions over which the rest is spread."""
    meshes: list[Any] = []
    if isinstance(tensor, DTensor):
        mesh, places = tensor.device_mesh, enumerate(tensor.placements)
        if mesh.get_coordinate() is not None:  # a rank that the mesh leaves out holds nothing, and has no part in it
            meshes = [(mesh, dim) for dim, place in places if isinstance(place, (Shard, _StridedShard))]
        tensor = tensor.to_local()
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if not tensor.numel():  # a rank may hold nothing of a small sharded tensor, and has no largest value of it
        return tensor.new_zeros(1), meshes
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor), meshes


def find_not_finite(models: Mapping[str, nn.Module]) -> list[str]:
    """Names of trained parameters with a NaN or an infinity. Waits for the device; collective for sharded models.

    Buffers may hold infinities for good reasons, a mask of attention for one, and are not looked at.
    """
    named = {
        f"{model}.{name}" if model else name: parameter
        for model, module in models.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.is_floating_point() or parameter.is_complex()) and parameter.numel()
    }
    # The sum of squares is several times as fast, and overflows only where the second look is worth its time.
    if not named or any(bool(total_norm(named.values(), order).isfinite()) for order in (2.0, math.inf)):
        return []
    return [name for name, parameter in named.items() if not bool(total_norm([parameter], math.inf).isfinite())]


def agree_on_largest(norm: torch.Tensor) -> None:
    """Makes a norm the largest of all ranks'. Collective; never waits for the device."""
    dist.all_reduce(norm, dist.ReduceOp.MAX)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _closure(args: Any, kwargs: Any) -> Any:
    return kwargs.get("closure") or (args[1] if len(args) > 1 else None)


def _tensor_of(optimizer: torch.optim.Optimizer, name: str, device: torch.device) -> torch.Tensor | None:
    value = getattr(optimizer, name, None)
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else None


def _is_late(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"])
