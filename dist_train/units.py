"""Durations and sizes as people write them: "11h30m", "18GB"."""

from __future__ import annotations

import math
import re

from dist_train.errors import ConfigError

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTE_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_seconds(duration: str | float) -> float:
    """Seconds of `"10min"`, `"11h30m"`, `"90s"` or a number of seconds."""
    if isinstance(duration, (int, float)) and not isinstance(duration, bool) and duration == duration:
        return float(duration)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(sec|min|[smhd])", str(duration))
    if not parts or "".join(n + u for n, u in parts) != re.sub(r"\s", "", str(duration)):
        raise ConfigError(f"{duration!r} is not a duration; write for instance '10min', '11h30m' or 90 (seconds).")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def parse_bytes(size: str | float) -> int:
    """Bytes of `"18GB"` (10**9), `"2GiB"` (2**30), `"500 MB"` or a number of bytes."""
    if isinstance(size, (int, float)) and not isinstance(size, bool) and math.isfinite(size):
        return int(size)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", str(size), re.IGNORECASE)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ConfigError(f"{size!r} is not a size; write for instance '18GB', '500MB', '2GiB' or 1000000 (bytes).")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])
