"""How long and until when, as people write it: `6h`, `1h30m`, `06:00`."""

import re
from datetime import datetime, timedelta

from hf_prune.errors import BadInputError

_LENGTH = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(key: str, text: str) -> float:
    """Seconds of `6h`, `90m`, `1h30m`, `45s` or `45`; BadInputError, which names `key`, for anything else."""
    match = _LENGTH.fullmatch(text.replace(" ", ""))
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise BadInputError(f"{key}: {text!r} is no length of time; write it as in 6h, 90m or 1h30m.")
    return total


def next_time(key: str, text: str, now: datetime) -> datetime:
    """The next time after `now` that a clock on the wall shows `HH:MM`; BadInputError where `text` is no such time."""
    try:
        wanted = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise BadInputError(f"{key}: {text!r} is no time of day; write it as in 06:00.") from None
    today = datetime.combine(now.date(), wanted)
    return today if today > now else today + timedelta(days=1)
