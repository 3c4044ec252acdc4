"""What wandb wrote down in its offline folders: the last step whose row really reached the disk.

wandb's process holds rows back for up to 15 seconds and drops them when the training process is killed, so that nobody
but the file knows. Invariant: reads only; a torn end, as a kill leaves it, ends the file.
Source: the transaction log of wandb-core, LevelDB's log format after a header of seven bytes (wandb 0.12 to 0.31).
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

_HEADER = b":W&B"
_HEADER_BYTES = 7
_BLOCK = 32768
_RECORD = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(folders: Sequence[str], run_id: str) -> int:
    """The highest step of a run in wandb's folders, -1 without one: steps rise from file to file and within each."""
    pattern = f"offline-run-*-{glob.escape(run_id)}"
    found = [path for folder in folders for path in glob.glob(os.path.join(glob.escape(folder), pattern, "*.wandb"))]
    return max((max(steps_of(path), default=-1) for path in found), default=-1)


def steps_of(path: str) -> list[int]:
    """The steps of the rows of a file, in its order."""
    return [int(row["_step"]) for row in rows_of(path) if "_step" in row]


def rows_of(path: str) -> Iterator[dict[str, float]]:
    """What was logged: name -> value of each row, with `_step`."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    for data in _records(path):
        record = protocol.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def _records(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        data = file.read()
    if not data.startswith(_HEADER):
        return
    position, parts = _HEADER_BYTES, b""
    while position + _RECORD.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD.size:  # a record's head never crosses a block's end
            position += left
            continue
        _, length, kind = _RECORD.unpack_from(data, position)
        position += _RECORD.size
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or position + length > len(data):
            return
        parts = (b"" if kind in (_FULL, _FIRST) else parts) + data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield parts
