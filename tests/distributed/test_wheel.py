"""The wheel: one file of pure Python, whose installation never touches the torch or numpy of a machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.kaggle_tree import make_bare_python
from tests.support.launch import ROOT

pytestmark = pytest.mark.distributed
DEADLINE_SECONDS = 120
OF_ACCELERATE = {"huggingface_hub": "0.21.0", "packaging": "20.0", "PyYAML": "6.0"}


def floors() -> dict[str, str]:
    """Each dependency at the oldest version that is accepted."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pairs = [need.split(">=") for need in needs]
    assert all(len(pair) == 2 for pair in pairs), f"a bound that is no lower bound makes pip replace torch: {needs}"
    return dict(pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scripts/build_wheel.sh` makes."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [str(ROOT / "scripts/build_wheel.sh"), str(folder)]
    python = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=python, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    if done.returncode and re.search(r"hatchling|connection|network|index|No matching", done.stderr, re.IGNORECASE):
        pytest.skip(f"the wheel cannot be built without a network: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert sorted(Path(line).name for line in done.stdout.split()) == sorted(one.name for one in folder.iterdir())
    return folder


def plan(python: Path, *options: str) -> dict[str, str]:
    """What pip would install, by name; nothing is installed. Raises CalledProcessError where it finds no way."""
    command = [
        str(python),
        "-I",
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--report",
        "-",
        "--no-index",
        *options,
    ]
    # A machine's own folders of wheels are no part of the test, nor is this library by PYTHONPATH (-I).
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    alone["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True)
    found = [one["metadata"] for one in json.loads(done.stdout)["install"]]
    return {one["name"]: one["version"] for one in found}


def make_wheel(folder: Path, name: str, version: str) -> None:
    """Of a package that is newer than what is installed."""
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def with_newer(folder: Path, wheels: Path) -> list[str]:
    """Newer torch and numpy are in reach: pip would take them if anything asked it to."""
    for name in ("torch", "numpy"):
        make_wheel(folder, name, "99.0")
    return [f"--find-links={wheels}", f"--find-links={folder}", "--upgrade", "dist-train"]


def test_the_wheel_is_one_and_pure_python(folder: Path) -> None:
    (wheel,) = folder.glob("dist_train-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as inside:
        names = inside.namelist()
    assert {"dist_train/py.typed", "dist_train/cluster/kaggle.py", "dist_train/health/deadline.py"} <= set(names)
    suffixes = {Path(name).suffix for name in names if name.startswith("dist_train/")}
    assert suffixes == {".py", ".typed"}


def test_the_environment_of_these_tests_has_what_it_was_given_and_not_the_library(tmp_path: Path) -> None:
    python = make_bare_python(tmp_path / "python", floors())
    command = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True)
    there = {one["name"]: one["version"] for one in json.loads(done.stdout) if one["name"] != "pip"}
    assert there == floors()
    imported = subprocess.run(
        [str(python), "-I", "-c", "import dist_train"], capture_output=True, text=True, timeout=30, check=False
    )
    assert "No module named 'dist_train'" in imported.stderr


def test_over_a_torch_at_the_floor_nothing_but_the_library_is_installed(folder: Path, tmp_path: Path) -> None:
    assert floors().keys() == {"torch", "accelerate", "safetensors", "numpy", "xxhash", "psutil"}
    python = make_bare_python(tmp_path / "python", floors())
    assert plan(python, *with_newer(tmp_path, folder)).keys() == {"dist-train"}


def test_an_accelerate_that_is_missing_or_too_old_comes_from_the_folder(folder: Path, tmp_path: Path) -> None:
    old: Mapping[str, str] = {**floors(), **OF_ACCELERATE, "accelerate": "1.9.0"}
    missing = {name: version for name, version in old.items() if name != "accelerate"}
    options = with_newer(tmp_path, folder)
    for number, installed in enumerate([old, missing]):
        python = make_bare_python(tmp_path / str(number), installed)
        assert plan(python, *options).keys() == {"dist-train", "accelerate"}


def test_a_torch_below_the_floor_is_refused_where_it_is_held(folder: Path, tmp_path: Path) -> None:
    """Without the notebook's constraint pip would replace it: the check above can fail."""
    python = make_bare_python(tmp_path / "python", {**floors(), "torch": "2.7.1"})
    options = with_newer(tmp_path, folder)
    assert plan(python, *options)["torch"] == "99.0"
    held = tmp_path / "held.txt"
    held.write_text("torch==2.7.1\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        plan(python, *options, f"--constraint={held}")
    assert "conflicting dependencies" in caught.value.stderr
