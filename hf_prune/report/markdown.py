"""Foreign strings (model ids, prompts, recipes) made safe for Markdown and terminals."""

import re
from typing import Any


def printable(text: Any) -> str:
    """Text without control characters other than newline and tab: no terminal escapes, null bytes or bidi overrides."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", str(text))


def one_line(text: Any) -> str:
    """Text with every run of white space as one space."""
    return " ".join(printable(text).split())


def code(text: Any) -> str:
    """A code span, inside which nothing is markup; reads well in a terminal too. Not for table cells (no `|` there)."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def escape(text: Any) -> str:
    """One line of literal text, also fit for a table cell."""
    return re.sub(r"([\\`*\[\]<>|~#&$!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))


def inline(text: Any) -> str:
    """The text itself where nothing in it could be markup, else a code span."""
    return one_line(text) if re.fullmatch(r"[A-Za-z0-9 .,:;()+-]+", one_line(text)) else code(text)


def fence(text: Any, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside; '' for nothing."""
    body = printable(text or "").strip("\n")
    if not body.strip():
        return ""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", body))])
    return f"{ticks}{language}\n{body}\n{ticks}"
