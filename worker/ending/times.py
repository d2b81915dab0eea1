"""Times and durations as people and schedulers write them. Times without a zone are local."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

_UNITS_S: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNIX: Final = re.compile(r"\d{9,11}(\.\d+)?")
_CLOCK: Final = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
# Bounded, so that all of them are finite numbers.
_LENGTH: Final = re.compile(r"(\d{1,12}(?:\.\d+)?)\s*([smhd]?)")
_SLURM: Final = re.compile(r"(?:(\d{1,9})-)?(\d{1,9}):(\d{2})(?::(\d{2}))?")


def point(text: str, now: datetime) -> float:
    """Unix time of "21:00" (the next one), "2026-11-30T21:00" or "1796072400". `now`: local time.
    Raises ValueError."""
    text = text.strip()
    if _UNIX.fullmatch(text):
        return float(text)
    if clock := _CLOCK.fullmatch(text):
        hour, minute, second = (int(part or 0) for part in clock.groups())
        at = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
        return (at if at > now else at + timedelta(days=1)).timestamp()
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is not a time: write 21:00, 2026-11-30T21:00 or seconds since 1970"
        ) from None


def either(text: str, now: datetime) -> float:
    """Unix time of a point in time, or of the seconds left ("30", "30s"). Raises ValueError."""
    text = text.strip()
    if _LENGTH.fullmatch(text) and not _UNIX.fullmatch(text):
        return now.timestamp() + length(text)
    return point(text, now)


def length(text: str) -> float:
    """Seconds of "90", "90s", "15m", "2h", "1d", "1:30:00" or Slurm's "2-12:00:00". Raises
    ValueError."""
    text = text.strip()
    if simple := _LENGTH.fullmatch(text):
        return float(simple[1]) * _UNITS_S[simple[2]]
    if slurm := _SLURM.fullmatch(text):
        days, first, second, third = (int(part or 0) for part in slurm.groups())
        if slurm[4] is None and slurm[1] is None:
            return first * 60.0 + second  # minutes and seconds
        return days * 86400.0 + first * 3600.0 + second * 60.0 + third
    raise ValueError(f"{text!r} is not a duration: write 90s, 15m, 2h, 1d or 1:30:00")
