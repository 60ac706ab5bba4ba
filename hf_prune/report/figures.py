"""How the numbers of a prune_report.json are written for people, and the before/after rows of card and terminal.

Every formatter takes a number and returns text; what was not measured (absent, None, NaN) has no text, and a row whose
pruned side has none does not exist.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MISSING = "-"
"""What stands in a table where only the other side was measured."""


def dig(tree: Any, *keys: str) -> Any:
    """The value under nested keys, or None where any of them is absent."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def number(value: Any) -> float | None:
    """The value as a float, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def plain_figure(value: float) -> str:
    """24.19, 0.904, 51,234: the digits that a reader can use."""
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def percent(share: float, decimals: int = 1) -> str:
    """A share in [0, 1] as 39.5 %."""
    return f"{100 * share:.{decimals}f} %"


def times(ratio: float) -> str:
    """A ratio as 1.83x."""
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _scaled(value: float, units: tuple[str, ...], step: float = 1000.0) -> str:
    index = 0
    # 999.5 would be written as 1000 of the smaller unit, hence the comparison with the rounded figure.
    while index < len(units) - 1 and abs(value) >= 0.9995 * step:
        value, index = value / step, index + 1
    return f"{value:.3g}{units[index]}" if abs(value) < 100 else f"{value:.0f}{units[index]}"


def size(num_bytes: float) -> str:
    """Bytes as 269 MB (decimal units)."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def flops(operations: float) -> str:
    """Floating point operations as 269 MFLOPs."""
    return _scaled(operations, (" FLOPs", " kFLOPs", " MFLOPs", " GFLOPs", " TFLOPs", " PFLOPs"))


def count(items: float) -> str:
    """Numbers of parameters: 260,032 up to a million, then 134.5M and 8.03B."""
    if items < 1e6:
        return f"{items:,.0f}"
    return f"{items / 1e6:.1f}M" if items < 1e9 else f"{items / 1e9:.2f}B"


def duration(seconds: float) -> str:
    """Seconds as 13.2 ms, 1.24 s or 3.5 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def rate(per_second: float) -> str:
    """Tokens per second as 412 tokens/s."""
    return f"{per_second:.3g} tokens/s" if per_second < 999.5 else f"{per_second:,.0f} tokens/s"


def change_percent(before: float, after: float) -> str:
    """How much more or less, as +77 % or -39.5 %; -0 % where nothing changed, for what one hoped would shrink."""
    if before == 0:
        return ""
    change = 100 * (after / before - 1)
    if after == before:
        return "-0 %"
    return f"{change:+.1f} %" if abs(change) < 100 else f"{change:+,.0f} %"


def change_times(before: float, after: float) -> str:
    """The ratio after / before as 1.02x."""
    return times(after / before) if before else ""


@dataclass(frozen=True)
class Row:
    """One line of the before/after table, ready to print."""

    label: str
    dense: str
    pruned: str
    change: str


Formatter = Callable[[float], str]
Change = Callable[[float, float], str]

_EFFICIENCY: tuple[tuple[str, str, Formatter, Change], ...] = (
    ("Parameters", "parameters", count, change_percent),
    ("Nonzero parameters", "nonzero_parameters", count, change_percent),
    ("File size", "file_bytes", size, change_percent),
    ("Prefill", "prefill_tokens_per_second", rate, change_times),
    ("Decode", "decode_tokens_per_second", rate, change_times),
    ("Time to first token", "time_to_first_token_seconds", duration, change_times),
    ("Decode latency, p50", "decode_latency_p50_seconds", duration, change_times),
    ("Decode latency, p95", "decode_latency_p95_seconds", duration, change_times),
    ("Load time", "load_seconds", duration, change_times),
    ("Peak memory", "peak_memory_bytes", size, change_percent),
    ("FLOPs per token", "flops_per_token", flops, change_percent),
    ("Nonzero FLOPs (theoretical)", "nonzero_flops_per_token", flops, change_percent),
)


def _row(label: str, dense: Any, pruned: Any, form: Formatter, change: Change) -> list[Row]:
    before, after = number(dense), number(pruned)
    if after is None:
        return []
    if before is None:
        return [Row(label, MISSING, form(after), "")]
    return [Row(label, form(before), form(after), change(before, after))]


def perplexity_change(report: dict[str, Any]) -> str:
    """1.77x (95 % interval 1.70x to 1.85x), from the bootstrap where there is one, else from the two figures; or ''."""
    ratio = number(dig(report, "evaluation", "change", "ratio"))
    if ratio is None:
        before, after = (number(dig(report, "evaluation", side, "perplexity")) for side in ("dense", "pruned"))
        return change_times(before, after) if before and after else ""
    return times(ratio) + (f" ({perplexity_interval(report)})" if perplexity_interval(report) else "")


def perplexity_interval(report: dict[str, Any]) -> str:
    """95 % interval 1.70x to 1.85x, or '' where none was computed."""
    low, high, confidence = (number(dig(report, "evaluation", "change", key)) for key in ("low", "high", "confidence"))
    if low is None or high is None:
        return ""
    return f"{percent(confidence, 0) + ' ' if confidence is not None else ''}interval {times(low)} to {times(high)}"


def quality_rows(report: dict[str, Any]) -> list[Row]:
    """Perplexity with the interval of its change, bits per byte."""
    dense, pruned = (dig(report, "evaluation", side) for side in ("dense", "pruned"))
    return [
        *_row(
            "Perplexity",
            dig(dense, "perplexity"),
            dig(pruned, "perplexity"),
            plain_figure,
            lambda *_: perplexity_change(report),
        ),
        *_row("Bits per byte", dig(dense, "bits_per_byte"), dig(pruned, "bits_per_byte"), plain_figure, change_percent),
    ]


def sparsity_rows(report: dict[str, Any]) -> list[Row]:
    """Share of exact zeros in the pruned weights and in all parameters."""

    def points(before: float, after: float) -> str:
        return f"{100 * (after - before):+.1f} points"

    if report.get("structure"):
        return _size_rows(report["structure"])
    sparsity = dig(report, "sparsity")
    total, nonzero = (number(dig(report, "efficiency", "dense", key)) for key in ("parameters", "nonzero_parameters"))
    zeros_before = 1 - nonzero / total if total and nonzero is not None else None
    return [
        *_row(
            "Sparsity, pruned weights",
            dig(sparsity, "zeros_before_pruned"),
            dig(sparsity, "achieved_pruned"),
            percent,
            points,
        ),
        *_row("Sparsity, all parameters", zeros_before, dig(sparsity, "achieved_all"), percent, points),
    ]


def _size_rows(structure: dict[str, Any]) -> list[Row]:
    """Parameters of the blocks and the units that became fewer."""
    before, after = structure.get("before") or {}, structure.get("after") or {}
    blocks, gone = structure.get("blocks"), structure.get("blocks_removed")
    sizes = [
        ("Parameters of the blocks", structure.get("parameters_before"), structure.get("parameters_after")),
        ("Neurons an MLP", before.get("width"), after.get("width")),
        ("Query heads", before.get("heads"), after.get("heads")),
        ("Key-value groups", before.get("groups"), after.get("groups")),
        ("Blocks", blocks, blocks - gone if blocks is not None and gone is not None else None),
    ]
    rows = [row for label, old, new in sizes if old != new for row in _row(label, old, new, count, change_percent)]
    widths = structure.get("widths")
    if not widths:
        return rows
    # The widest block says how much is stored, the others how much of it is zeros.
    own = Row(
        "Neurons an MLP, unpadded",
        count(before["width"]),
        f"{count(min(widths))} to {count(max(widths))}",
        change_percent(before["width"] * len(widths), sum(widths)),
    )
    return [*(row for row in rows if row.label != "Neurons an MLP"), own]


def efficiency_rows(report: dict[str, Any]) -> list[Row]:
    """Size, speed, memory and FLOPs, dense and pruned."""
    dense, pruned = (dig(report, "efficiency", side) for side in ("dense", "pruned"))
    return [
        row
        for label, key, form, change in _EFFICIENCY
        for row in _row(label, dig(dense, key), dig(pruned, key), form, change)
    ]
