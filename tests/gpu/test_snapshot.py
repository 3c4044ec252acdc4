"""The snapshot of a save on a device: what training does right after is not in it, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_train as dt
from dist_train.capture import Capture
from dist_train.checkpoint import snapshot
from dist_train.checkpoint.plan import Plan, make_plan
from dist_train.checkpoint.side_stream import SideStreams
from dist_train.checkpoint.snapshot import Image
from tests.support.gpu import EACH_DEVICE
from tests.support.twins import read_checkpoint, same_bits

CYCLES = 4_000_000_000
"""About two seconds of a GPU: what the host does meanwhile takes milliseconds."""
WAIT_SECONDS = 120.0


def contents(image: Image, plan: Plan, dtypes: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    found = {}
    for name, layout in plan.files.items():
        data, _ = image.file(name)
        for part in layout.parts:
            piece = torch.frombuffer(data, dtype=torch.uint8)[part.start : part.start + part.num_bytes]
            found[part.name] = piece.clone().view(dtypes[part.name]).view(part.sizes)
    return found


def warm_up(tensor: torch.Tensor) -> None:
    """Has the kernels loaded that a test measures with: a first use may wait for all that the device is at."""
    torch.cuda._sleep(1)
    tensor.add_(1)
    tensor.zero_()
    torch.cuda.synchronize()


@pytest.fixture
def image_of() -> Iterator[Callable[[Plan], Image]]:
    made: list[Image] = []

    def make(plan: Plan) -> Image:
        made.append(Image(plan))
        return made[-1]

    yield make
    for image in made:
        image.close()


@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("device", EACH_DEVICE)
def test_the_image_holds_what_was_there_when_it_was_asked_for(
    device: str, pins: bool, monkeypatch: pytest.MonkeyPatch, image_of: Callable[[Plan], Image]
) -> None:
    """Right after it everything is overwritten, again and again; with page-locked memory and without."""
    if not pins:
        monkeypatch.setattr(snapshot, "_pin", lambda memory: False)
    tensors = {f"model/{index}": torch.arange(1 << 20, device=device) * (index + 1) for index in range(8)}
    plan = make_plan(Capture(tensors=tensors), 0, 1)
    image = image_of(plan)
    assert image._pinned == (pins and device == "cuda")
    for turn in range(3):
        for tensor in tensors.values():
            tensor.add_(1)
        expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        image.fill(plan, Capture(tensors=tensors), 0)
        for tensor in tensors.values():
            tensor.mul_(3).sub_(turn)
        image.wait(WAIT_SECONDS)
        found = contents(image, plan, dict.fromkeys(tensors, torch.int64))
        assert all(torch.equal(found[name], expected[name]) for name in tensors)


@pytest.mark.gpu
def test_the_host_goes_on_before_the_device_has_come_to_the_copies(image_of: Callable[[Plan], Image]) -> None:
    """By events: the device is still busy with what came before the save when `fill`, and the next update, return."""
    weight = torch.arange(1 << 24, dtype=torch.float32, device="cuda")
    warm_up(weight.clone())
    capture = Capture(tensors={"model/weight": weight})
    plan = make_plan(capture, 0, 1)
    image = image_of(plan)
    assert image._pinned
    image.fill(plan, capture, 0)  # the first one makes the stream
    image.wait(WAIT_SECONDS)
    torch.cuda.synchronize()
    before, after = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    before.record()
    weight.add_(1)
    image.fill(plan, capture, 0)
    weight.zero_()
    after.record()
    assert not before.query(), "the host has waited for the device"
    assert not after.query()
    image.wait(WAIT_SECONDS)
    assert before.query(), "copied before the update that came first was made"
    assert torch.equal(
        contents(image, plan, {"model/weight": torch.float32})["model/weight"], torch.arange(1 << 24).float() + 1
    )
    torch.cuda.synchronize()
    assert after.query()
    assert not weight.any()


@pytest.mark.gpu
def test_a_stream_that_training_does_not_use_waits_for_nothing(image_of: Callable[[Plan], Image]) -> None:
    """Copies hold up what training asks its own stream for, and no other: work elsewhere comes to its end meanwhile."""
    weight = torch.ones(1 << 20, device="cuda")
    capture = Capture(tensors={"model/weight": weight})
    plan = make_plan(capture, 0, 1)
    image = image_of(plan)
    image.fill(plan, capture, 0)
    image.wait(WAIT_SECONDS)
    elsewhere, mine = torch.cuda.Stream(), torch.cuda.current_stream()
    data = torch.zeros(1 << 20, device="cuda")
    warm_up(data)
    busy = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    busy.record(mine)
    image.fill(plan, capture, 0)
    with torch.cuda.stream(elsewhere):
        data.add_(1)
    elsewhere.synchronize()
    assert not busy.query(), "a stream of its own has waited for training's"
    image.wait(WAIT_SECONDS)
    assert torch.equal(contents(image, plan, {"model/weight": torch.float32})["model/weight"], torch.ones(1 << 20))
    assert float(data.sum()) == 1 << 20


@pytest.mark.gpu
def test_training_on_a_stream_of_its_own_is_followed() -> None:
    """The copies come after what the current stream was asked for, whichever that is."""
    copies = SideStreams()
    target = torch.empty(1 << 20, pin_memory=True)
    source = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(CYCLES // 8)
        source.add_(1)
        copies.start([(target, source)])
        source.zero_()
    copies.wait(WAIT_SECONDS)
    assert bool((target == 1).all())


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
]


class Odd(nn.Module):
    """Buffers of every dtype, and weights in memory orders of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.randn(6, 7).t())
        for dtype in DTYPES:
            values = torch.randint(0, 2, (9,)).to(dtype)
            self.register_buffer(str(dtype).replace("torch.", "of_"), values)


@pytest.mark.parametrize("device", EACH_DEVICE)
def test_a_run_saves_the_values_of_the_moment_and_gives_every_dtype_back(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Odd().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with dt.Run(str(tmp_path), model=model, optimizer=optimizer, policy=dt.CheckpointPolicy(at_end=False)) as run:
        for _ in run.epochs(1):
            (model.weight.square().sum() + model.turned.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            expected = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            moment = optimizer.state[model.weight]["exp_avg"].cpu().clone()
            run.save()
            with torch.no_grad():
                for value in model.state_dict().values():
                    value.copy_(torch.ones_like(value))
            optimizer.state[model.weight]["exp_avg"].zero_()
            run.save(wait=True)
            break
    first, _ = sorted((tmp_path / "checkpoints").glob("step-*"))
    _, tensors = read_checkpoint(tmp_path, str(first))
    for name, value in expected.items():
        assert same_bits(tensors[f"model/{name}"], value), name
    assert same_bits(tensors["optimizer/weight/exp_avg"], moment)

    again = Odd().to(device)
    fresh = torch.optim.AdamW(again.parameters(), lr=0.1)
    with dt.Run(str(tmp_path), model=again, optimizer=fresh, resume="must"):
        assert again.weight.is_contiguous(memory_format=torch.channels_last)
        for name, value in again.state_dict().items():
            assert value.device.type == device
            assert same_bits(value.detach().cpu(), torch.ones_like(expected[name])), name
