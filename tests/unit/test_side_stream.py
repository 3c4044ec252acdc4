"""Copies on a side stream, on a stand-in for the device that does its work as late, or as early, as it may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.capture import Capture
from dist_train.checkpoint import snapshot
from dist_train.checkpoint.plan import make_plan
from dist_train.checkpoint.side_stream import SideStreams
from dist_train.checkpoint.snapshot import Image
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.writer import SaveJob, write_shards
from dist_train.errors import DeadlineError
from tests.support.device import Device, stand_in


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(snapshot, "_pin", lambda memory: True)
    monkeypatch.setattr(Image, "_is_behind", lambda image, source: True)
    monkeypatch.setattr(Image, "_unpin", lambda image: None)
    return stand_in(monkeypatch)


def state() -> tuple[Capture, dict[str, torch.Tensor]]:
    tensors = {"model/weight": torch.arange(6.0), "optimizer/weight/step": torch.tensor(3.0)}
    return Capture(tensors=tensors), {name: tensor.clone() for name, tensor in tensors.items()}


def contents(image: Image, capture: Capture) -> dict[str, torch.Tensor]:
    plan = make_plan(capture, 0, 1)
    found = {}
    for name, layout in plan.files.items():
        data, _ = image.file(name)
        for part in layout.parts:
            bytes_of_it = torch.frombuffer(data, dtype=torch.uint8)[part.start : part.start + part.num_bytes]
            found[part.name] = bytes_of_it.clone().view(torch.float32).view(part.sizes)
    return found


def assert_holds(image: Image, capture: Capture, expected: dict[str, torch.Tensor]) -> None:
    found = contents(image, capture)
    assert {name: found[name].tolist() for name in expected} == {name: t.tolist() for name, t in expected.items()}


@pytest.mark.parametrize("side_first", [False, True])
def test_what_is_changed_right_after_is_saved_as_it_was(device: Device, side_first: bool) -> None:
    """Whichever stream is fast: the update before the save is in it, the one after is not."""
    capture, _ = state()
    weight = capture.tensors["model/weight"]
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    device.launch(lambda: weight.add_(1))
    image.fill(plan, capture, 0)
    device.launch(lambda: weight.zero_())
    assert image.file(next(iter(plan.files)))[1] > 0
    assert weight.tolist() == list(range(6)), "the host has waited for the device"
    if side_first:
        device.streams.reverse()
    device.run()
    image.wait(5)
    assert_holds(image, capture, {"model/weight": torch.arange(6.0) + 1})
    assert weight.tolist() == [0.0] * 6


def test_the_calls_come_in_the_one_order_that_is_safe(device: Device) -> None:
    copies = SideStreams()
    sources = [torch.ones(2), torch.ones(3)]
    copies.start([(torch.empty(2), sources[0]), (torch.empty(3), sources[1])])
    before = ["training: record", "side: wait"]
    assert device.log == [*before, "side: copy", "side: copy", "side: record", "training: wait"]
    assert [one is other for one, other in zip(device.recorded, sources, strict=True)] == [True, True]


def test_nothing_to_copy_asks_the_device_for_nothing(device: Device) -> None:
    copies = SideStreams()
    copies.start([])
    copies.wait(0)
    assert (device.log, len(device.streams)) == ([], 1)


def test_one_stream_serves_every_save(device: Device) -> None:
    capture, expected = state()
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    for _ in range(3):
        image.fill(plan, capture, 0)
        image.wait(5)
    assert len(device.streams) == 2
    assert_holds(image, capture, expected)


def test_the_writer_reads_nothing_before_the_copies_are_done(device: Device, tmp_path: Path) -> None:
    capture, expected = state()
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    image.fill(plan, capture, 0)
    (tmp_path / "staging").mkdir()
    job = SaveJob(serial=1, staging="staging", target="step-00000001", plan=plan, image=image, rank_state={})
    receipt = write_shards(Store(tmp_path), job)
    assert "error" not in receipt
    assert device.looks > 0
    assert_holds(image, capture, expected)


def test_an_error_of_the_device_is_a_failed_save(device: Device, tmp_path: Path) -> None:
    capture, expected = state()
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    image.fill(plan, capture, 0)
    device.fault = "CUDA error: uncorrectable ECC error encountered"
    job = SaveJob(serial=1, staging="staging", target="step-00000001", plan=plan, image=image, rank_state={})
    assert write_shards(Store(tmp_path), job) == {"error": device.fault, "out_of_space": False}
    assert not (tmp_path / "staging").exists(), "bytes that nobody vouches for were written"
    device.fault = ""
    image.fill(plan, capture, 0)  # told once: the next save is made
    image.wait(5)
    assert_holds(image, capture, expected)


def test_a_copy_that_cannot_be_asked_for_fails_the_save_and_not_training(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor with gaps needs memory of the device on its way."""
    copies, target = SideStreams(), torch.zeros(2)

    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    copies.start([(target, torch.ones(2))])
    monkeypatch.setattr(torch.Tensor, "copy_", refuse)
    copies.start([(torch.zeros(2), torch.ones(2))])
    assert device.log[-2:] == ["side: record", "training: wait"], "what was begun has no end that anybody waits for"
    with pytest.raises(RuntimeError, match="out of memory"):
        copies.wait(5)
    assert target.tolist() == [1.0, 1.0]
    copies.wait(5)


def test_the_next_fill_waits_for_copies_of_a_save_that_failed_early(device: Device) -> None:
    capture, _ = state()
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    image.fill(plan, capture, 0)
    device.launch(lambda: capture.tensors["model/weight"].add_(1))
    image.fill(plan, capture, 0)
    assert device.log.count("side: record") == 2
    assert not device.streams[1].asked or device.looks, "copies into the same bytes were under way twice"
    image.wait(5)
    assert_holds(image, capture, {"model/weight": torch.arange(6.0) + 1})


def test_an_image_is_closed_only_when_its_copies_are_done(device: Device) -> None:
    capture, _ = state()
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    image.fill(plan, capture, 0)
    image.close()
    assert [stream.asked for stream in device.streams] == [[], []]


def test_a_device_that_hangs_has_a_deadline(device: Device) -> None:
    device.runs_when_looked_at = False
    copies, target = SideStreams(), torch.zeros(1)
    copies.start([(target, torch.ones(1))])
    with pytest.raises(DeadlineError, match="has not copied the state"):
        copies.wait(0.01)
    device.runs_when_looked_at = True
    copies.wait(5)  # it is still known, and the next save waits for it
    assert target.tolist() == [1.0]


def test_tensors_of_the_cpu_are_copied_at_once() -> None:
    capture, expected = state()
    plan = make_plan(capture, 0, 1)
    image = Image(plan)
    image.fill(plan, capture, 0)
    capture.tensors["model/weight"].zero_()
    assert_holds(image, capture, expected)
    image.close()
