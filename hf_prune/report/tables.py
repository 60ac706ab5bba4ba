"""Rich tables for the command line. Nothing prints here: each function returns a renderable that fits 80 columns.

Foreign strings enter as rich.text.Text, so that square brackets in a model id or a prompt are never read as markup.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_prune.report.figures import Row, count, efficiency_rows, number, percent, quality_rows, sparsity_rows
from hf_prune.report.findings import next_step
from hf_prune.report.gains import gained
from hf_prune.report.markdown import one_line, printable
from hf_prune.report.names import kind_of, ranges, short_names

# Flags of a weight's row: what marks it, and what the mark says.
MARKS = {
    "floor": ("*", "held by min_keep_ratio"),
    "scarce": ("†", "too few calibration tokens: compared by magnitude"),
}

__all__ = [
    "comparison_table",
    "efficiency_table",
    "evaluation_table",
    "gained",
    "inspect_table",
    "methods_table",
    "next_step",
    "plan_table",
    "rounds_table",
    "samples_table",
    "sensitivity_table",
    "verification_table",
]


def evaluation_table(report: dict[str, Any]) -> Table:
    """Perplexity, bits per byte and sparsity: dense, pruned, change."""
    return _comparison("Quality", [*quality_rows(report), *sparsity_rows(report)])


def efficiency_table(report: dict[str, Any]) -> Table:
    """Size, speed, memory and FLOPs: dense, pruned, change."""
    return _comparison("Efficiency", efficiency_rows(report))


def verification_table(report: dict[str, Any]) -> Table:
    """One line a check of the saved folder, PASS or FAIL."""
    table = _table("Verification of the saved folder")
    table.add_column("Check", ratio=2)
    table.add_column("Result", no_wrap=True)
    table.add_column("Detail", ratio=3)
    for check in report.get("verification") or []:
        verdict = Text("PASS", style="green") if check.get("passed") else Text("FAIL", style="bold red")
        table.add_row(_text(check.get("check")), verdict, _text(check.get("detail")))
    return table


def plan_table(plan: dict[str, Any], verbose: bool = False) -> RenderableType:
    """What will be pruned, from a prune_plan.json: a line per kind of module, or with `verbose` per weight.

    What is skipped stands below, a line per reason.
    """
    if plan.get("structure"):
        return _structure_table(plan)
    views = [view for view in plan.get("views") or [] if number(view.get("density")) is not None]
    lines: list[RenderableType] = [_weights_table("Plan", views, verbose)]
    weights = [math.prod(view.get("shape") or ()) for view in views]
    if sum(weights):
        zeros = sum((1 - view["density"]) * weight for view, weight in zip(views, weights, strict=True)) / sum(weights)
        lines.append(
            Text(f"Together: {len(views)} matrices, {count(sum(weights))} weights, {percent(zeros)} to become zero")
        )
    skipped = defaultdict(list)
    for item in plan.get("skipped") or []:
        skipped[one_line(item.get("reason") or "no reason recorded")].append(one_line(item.get("name") or ""))
    lines += [Text(f"Not pruned, {reason}: {_listed(names, verbose)}") for reason, names in skipped.items()]
    return Group(*lines)


def _structure_table(plan: dict[str, Any]) -> RenderableType:
    """Sizes before and after, where whole units go."""
    table = _table("Plan")
    for name in ("", "dense", "planned", "change"):
        table.add_column(name, justify="right" if name else "left")
    for row in sparsity_rows(plan):
        table.add_row(row.label, row.dense, row.pruned, row.change)
    own = plan["structure"]
    stored = 1 - own["parameters_after"] / own["parameters_before"]
    gone = f"{percent(plan['sparsity'])} of the blocks' parameters are removed by it"
    if own.get("widths"):
        zeros = f"{percent(plan['sparsity'] - stored)} become zeros up to the widest block"
        gone = f"{percent(stored)} of the blocks' parameters are removed by it, {zeros}"
    lines = [Text(f"Together: {gone}")]
    if searched := own.get("searched"):
        shares = ", ".join(f"{percent(share, 0)} {unit}" for unit, share in searched.items() if share)
        lines.append(Text(f"Found by search: of what is removed {shares}"))
    return Group(table, *lines)


def inspect_table(rows: list[dict[str, Any]], summary: dict[str, Any], verbose: bool = False) -> RenderableType:
    """Sparsity and pattern of a checkpoint, from checkpoint.inspect: a line per kind of weight, with `verbose` each."""
    lines: list[RenderableType] = [_weights_table("Weights", rows, verbose)]
    for label, part in (("Layers of the blocks", "block"), ("All parameters", "total")):
        sparsity, parameters = number(summary.get(f"{part}_sparsity")), number(summary.get(f"{part}_parameters"))
        if sparsity is not None and parameters:
            lines.append(Text(f"{label}: {percent(sparsity)} zeros of {count(parameters)} weights"))
    if summary.get("skipped"):
        lines.append(Text(f"Not looked at (integers): {_listed(summary['skipped'], verbose)}"))
    return Group(*lines)


def sensitivity_table(report: dict[str, Any]) -> Table:
    """Each part alone, from a sensitivity.json: the dearest first."""
    table = _table(f"Sensitivity by {one_line(report['by'])} (dense perplexity {report['dense_perplexity']:.2f})")
    table.add_column("Pruned alone", overflow="fold", ratio=1)
    for name in ("Zeros", "Perplexity", "Change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in sorted(report["parts"], key=lambda part: -part["cost"]):
        interval = f"{part['low']:.3f} to {part['high']:.3f}" if part["low"] is not None else ""
        figures = (count(part["weights"]), f"{part['perplexity']:.2f}", f"{part['ratio']:.3f}x", interval)
        table.add_row(Text(one_line(part["part"])), *figures)
    table.add_section()
    ratio = report["all_pruned_perplexity"] / report["dense_perplexity"]
    table.add_row("all together", "", f"{report['all_pruned_perplexity']:.2f}", f"{ratio:.3f}x", "")
    return table


def rounds_table(rounds: list[dict[str, Any]]) -> Table:
    """Each round of iterative pruning, and its controls."""
    table = _table("Rounds")
    table.add_column("Round")
    for name in ("Zeros", "Perplexity", "Seconds", "Held", "Collapsed"):
        table.add_column(name, justify="right")
    for row in rounds:
        label = "dense" if not row["number"] else f"{row['number']}"
        label += f", {row['kind'].replace('_', ' ')}" if row["kind"] != "ticket" else ""
        figures = (percent(row["sparsity"]), f"{row['perplexity']:.2f}", f"{row['seconds']:.0f}")
        table.add_row(label, *figures, *(str(len(row[key])) if row[key] else "" for key in ("held", "collapsed")))
    return table


def comparison_table(comparison: dict[str, Any]) -> RenderableType:
    """What tickets share, by layer and together, from comparison.compare_tickets.

    `Left` and `Moved` are of each ticket, in %: weights kept, and how far those are from what they began with.
    """
    table = _table("Weights that all tickets keep")
    table.add_column("Layer", overflow="fold", ratio=1)
    moved = all("displaced" in layer for layer in comparison["layers"])
    for name in ("Left", "Shared", "By chance", "Signs differ", *(["Moved"] if moved else [])):
        table.add_column(name, justify="right", no_wrap=True)
    names = short_names([layer["layer"] for layer in comparison["layers"]])
    for name, layer in zip(names, comparison["layers"], strict=True):
        left = " / ".join(f"{100 * kept / layer['weights']:.1f}" for kept in layer["kept"])
        flips = percent(layer["flips"] / layer["pairs"]) if layer["pairs"] else ""
        figures = (layer["shared"] / layer["weights"], layer["chance"] / layer["weights"])
        far = [" / ".join("" if own is None else f"{100 * own:.1f}" for own in layer["displaced"])] if moved else []
        table.add_row(Text(one_line(name)), left, *(percent(share, 2) for share in figures), flips, *far)
    whole = comparison["together"]
    lines = [
        f"Together: all keep {percent(whole['shared_of_all'], 2)} of the weights"
        + (
            f", {percent(whole['shared_of_first'])} of what {one_line(comparison['tickets'][0])} keeps"
            if whole["shared_of_first"]
            else ""
        )
        + (f", {whole['times_chance']:.1f} times what chance would" if whole["times_chance"] else "")
        + (f"; {percent(whole['flips'])} of signs differ between two" if whole["flips"] is not None else "")
    ]
    if whole.get("moved"):
        for name, moved, flipped in zip(comparison["tickets"], whole["moved"], whole["flipped"], strict=True):
            if moved is not None:
                lines.append(
                    f"{one_line(name)}: kept weights have moved by {moved:.4g} on average since the initial ones, and "
                    f"{percent(flipped)} have changed their sign"
                )
    for name, deviation in zip(comparison["tickets"], whole.get("deviation") or [], strict=False):
        if deviation is not None:
            lines.append(f"{one_line(name)}: over the ends of its rounds they deviate by {deviation:.4g} on average")
    return Group(table, *(Text(line) for line in lines))


def samples_table(samples: Iterable[dict[str, Any]]) -> RenderableType:
    """Each prompt, and below it what the dense and the pruned model wrote, side by side."""
    parts: list[RenderableType] = []
    for sample in samples:
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        names = [name for name in sample if name != "prompt"]
        for name in names:
            table.add_column(one_line(name), ratio=1)
        table.add_row(*(Text(printable(sample[name] or "").strip()) for name in names))
        parts += [Text(f"> {printable(sample.get('prompt') or '')}", style="bold"), table]
    return Group(*parts)


def methods_table(methods: Iterable[dict[str, Any]], title: str = "Methods") -> Table:
    """What there is: name, one line, paper. Each method is a dict of name, title, summary, paper."""
    table = _table(title)
    table.add_column("Name", no_wrap=True, style="bold")
    table.add_column("What it does", ratio=1)
    for method in methods:
        what = Text(": ".join(one_line(method[key]) for key in ("title", "summary") if method.get(key)))
        if method.get("paper"):
            what.append(f"\n{one_line(method['paper'])}", style="dim")
        table.add_row(_text(method.get("name")), what)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))


def _text(value: Any) -> Text:
    return Text(one_line(value) if value is not None else "")


def _comparison(title: str, rows: list[Row]) -> Table:
    table = _table(title)
    for name in ("", "dense", "pruned", "change"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name) and name != "change")
    for row in rows:
        # The interval goes to a line of its own: beside the figure it would squeeze every other column.
        table.add_row(row.label, row.dense, row.pruned, row.change.replace(" (", "\n("))
    return table


def _weights_table(title: str, rows: list[dict[str, Any]], verbose: bool) -> Table:
    """A line per weight, or per kind of module with equal shape and pattern; blocks and sparsities as ranges."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        label = one_line(row["name"]) if verbose else kind_of(row)
        groups[label, _shape(row), one_line(row.get("pattern") or "")].append(row)
    table = _table(title)
    table.add_column("Weight" if verbose else "Kind of weight", overflow="fold", ratio=1)
    for name in ("Shape",) if verbose else ("Blocks", "Shape"):
        table.add_column(name, justify="right", no_wrap=name == "Shape")
    table.add_column("Pattern", no_wrap=True)
    table.add_column("Sparsity", justify="right", no_wrap=True)
    for (label, shape, pattern), members in groups.items():
        blocks = ranges({row["block"] for row in members if row.get("block") is not None})
        sparsity = _sparsity_range(members) + "".join(
            f" {mark}" for key, (mark, _) in MARKS.items() if any(row.get(key) for row in members)
        )
        table.add_row(Text(label), *((shape,) if verbose else (blocks, shape)), Text(pattern), sparsity)
    captions = [f"{mark} {meaning}" for key, (mark, meaning) in MARKS.items() if any(row.get(key) for row in rows)]
    if captions:
        table.caption = "\n".join(captions)
        table.caption_justify = "left"
    return table


def _shape(row: dict[str, Any]) -> str:
    return " x ".join(str(size) for size in row.get("shape") or ())


def _sparsity_range(rows: list[dict[str, Any]]) -> str:
    values = [1 - float(row["density"]) for row in rows]
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _listed(names: list[str], everything: bool) -> str:
    shown = names if everything else names[:3]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
