"""What exact resume depends on: described, compared, warned of."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from dist_train import environment
from dist_train.differences import warn_of_environment
from dist_train.environment import compare_environments, describe_environment, inexact_reasons

CPU = torch.device("cpu")


def test_the_description_names_everything_that_law_4_depends_on() -> None:
    described = describe_environment(3, CPU)
    assert described["world_size"] == 3
    assert described["device"] == "cpu"
    assert described["threads"] == torch.get_num_threads()
    assert described["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert described["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"accelerate", "numpy", "safetensors", "python", "machine", "deterministic"} <= described.keys()


def test_the_description_survives_json() -> None:
    described = describe_environment(1, CPU)
    assert json.loads(json.dumps(described)) == described


def test_an_equal_environment_has_no_differences() -> None:
    assert compare_environments(describe_environment(2, CPU), describe_environment(2, CPU)) == []


def test_each_difference_is_one_line_with_both_values() -> None:
    then, now = describe_environment(1, CPU), describe_environment(4, CPU)
    assert compare_environments(then, {**now, "threads": -1}) == [
        "world_size was 1 and is 4",
        f"threads was {torch.get_num_threads()} and is -1",
    ]


def test_another_number_of_ranks_is_told_by_the_main_rank_alone(caplog: pytest.LogCaptureFixture) -> None:
    then, now = {"world_size": 1, "threads": 1}, {"world_size": 4, "threads": 2}
    assert warn_of_environment(then, now, is_main=False) == warn_of_environment(then, now)
    others, mains = (record.getMessage() for record in caplog.records)
    assert others.endswith("exact: threads was 1 and is 2.")
    assert mains.endswith("exact: world_size was 1 and is 4; threads was 1 and is 2.")


def test_what_an_older_version_did_not_record_is_no_difference() -> None:
    assert compare_environments({"threads": 1}, {"threads": 1, "moon": "full"}) == []


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package-anywhere"))
    described = describe_environment(1, CPU)
    assert "torch" in described
    assert "no-such-package-anywhere" not in described


def test_a_gpu_is_exact_only_with_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    (reason,) = inexact_reasons(torch.device("cuda"))
    assert "torch.use_deterministic_algorithms(True)" in reason
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert inexact_reasons(torch.device("cuda")) == []


def test_a_cpu_is_exact() -> None:
    assert inexact_reasons(CPU) == []


@pytest.fixture
def precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, allowed = matmul.fp32_precision, matmul.allow_tf32
    yield
    matmul.fp32_precision = before
    matmul.allow_tf32 = allowed


@pytest.mark.usefixtures("precision")
def test_a_gpus_tf32_is_told_however_the_script_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda")
    assert describe_environment(1, gpu)["tf32"] is False
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the way that torch recommends
    described = describe_environment(1, gpu)
    assert (described["device"], described["tf32"]) == ("NVIDIA H200", True)
    torch.set_float32_matmul_precision("highest")
    assert describe_environment(1, gpu)["tf32"] is False
