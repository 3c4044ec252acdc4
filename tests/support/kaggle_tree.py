"""A simulated Kaggle: read-only inputs, a working directory with a quota, a Python that has torch but not the library.

Needs root on Linux (it mounts file systems of memory); nothing is registered or installed outside the given folders.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.support.launch import ROOT, environment

NOTEBOOK = ROOT / "launch/kaggle/notebook.ipynb"
OWN_DISTRIBUTION = re.compile(r"(__editable__)?[._]*dist_train\b.*")


def build_wheel(folder: Path) -> Path:
    """The wheel, as `scripts/build_wheel.sh` makes it; skips where the build's own tool cannot be fetched."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode and re.search(r"hatchling|connection|network|index", done.stderr, re.IGNORECASE):
        pytest.skip(f"the wheel cannot be built without a network: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("dist_train-*.whl")
    return wheel


def make_python(folder: Path) -> Path:
    """A virtual environment with all that this one has, but for the library."""
    return _make_python(folder, lambda name: not OWN_DISTRIBUTION.match(name))


def make_bare_python(folder: Path, packages: Mapping[str, str]) -> Path:
    """A virtual environment in which pip finds these versions installed, and nothing else."""
    python = _make_python(folder, lambda name: name == "pip")
    for name, version in packages.items():
        metadata = folder / "borrowed" / f"{name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return python


def _make_python(folder: Path, is_wanted: Callable[[str], object]) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout=60, check=True)
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if is_wanted(entry.name) and entry.suffix != ".pth":
            (borrowed / entry.name).symlink_to(entry)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder / "bin/python"


@contextmanager
def mounted(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system of its own; skips where that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("needs root on Linux: mounts file systems of memory")
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "dist_train-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], timeout=20, check=True)


@contextmanager
def kaggle_tree(root: Path, attached: Mapping[str, Path], *, quota_megabytes: int) -> Iterator[Path]:
    """`root` with an empty `working` of that size and a read-only `input` that holds a copy of what is attached."""
    with mounted(root / "input", megabytes=64) as inputs, mounted(root / "working", megabytes=quota_megabytes):
        for name, source in attached.items():
            shutil.copytree(source, inputs / name, symlinks=True)
        subprocess.run(["mount", "-o", "remount,ro", str(inputs)], timeout=20, check=True)
        yield root


def run_notebook(
    root: Path, python: Path, settings: Mapping[str, object], *, kind: str = "Batch", deadline_seconds: int = 120
) -> Any:
    """Executes the notebook as Kaggle would, with other settings; returns it with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = (number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    changed = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(changed))
    client = NotebookClient(
        notebook,
        km=_kernel_manager(root / "kernels", python),
        timeout=deadline_seconds,
        startup_timeout=deadline_seconds,
        resources={"metadata": {"path": str(root / "working")}},
    )
    kaggle = {"KAGGLE_KERNEL_RUN_TYPE": kind, "DIST_TRAIN_KAGGLE_ROOT": str(root)}
    inherited = {name: value for name, value in environment(kaggle).items() if name != "PYTHONPATH"}
    client.execute(env=inherited)
    return notebook


def _kernel_manager(folder: Path, python: Path) -> AsyncKernelManager:
    specification = folder / "scratch"
    specification.mkdir(parents=True)
    argv = f'["{python}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (specification / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "scratch", "language": "python"}}')
    return AsyncKernelManager(
        kernel_name="scratch",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False),
    )


def text_of(notebook: Any, cell_id: str) -> str:
    """What a cell printed."""
    (cell,) = (one for one in notebook.cells if one.id == cell_id)
    return "".join(output.get("text", "") for output in cell.outputs)
