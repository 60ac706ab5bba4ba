"""A sweep over one's own model: a recipe whose keys may hold lists, every sensible combination tried, one chosen."""

from __future__ import annotations

import itertools
import logging
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_prune.arguments import SECTIONS, EvaluationArguments, ModelArguments, StructuredConfig
from hf_prune.bench.grid import Grid, make_grid
from hf_prune.bench.results import Results
from hf_prune.bench.summary import correlations, summarise
from hf_prune.checkpoint.folder import PLAN_FILE
from hf_prune.checkpoint.load import load_config, skeleton
from hf_prune.checkpoint.source import WeightFiles
from hf_prune.compose import belongs_to_a_part, known_keys, make_config
from hf_prune.errors import BadInputError, RunError
from hf_prune.evaluation.efficiency import measure_efficiency
from hf_prune.fields import field_types
from hf_prune.plan import Plan
from hf_prune.recipe import make_recipe

logger = logging.getLogger(__name__)
# These make the settings that are compared inside; the rest make the rows.
SETTING_KEYS = ("sparsity", "pattern")


def make_sweep(values: Mapping[str, Any], name: str) -> tuple[Grid, list[str]]:
    """A grid of every combination that makes sense, and a sentence for each that does not.

    Args:
        values: a flat recipe; a key whose value is no list by nature may hold a list of values to try.

    Raises:
        BadInputError: no key holds a list, or no combination makes sense.
    """
    axes, common = split_axes(values)
    settings = {_label(own) or "the recipe": own for own in _products(axes, [k for k in SETTING_KEYS if k in axes])}
    # A key of a part is for the combinations that choose the part.
    optional = {key: axes.get(key, [value]) for key, value in values.items() if belongs_to_a_part(key)}
    common = {key: value for key, value in common.items() if key not in optional}
    inside = [key for key in axes if key not in (*SETTING_KEYS, "seed", *optional)]
    # Each row's values, and the settings under which it chooses the same parts.
    fitting: dict[str, tuple[dict[str, Any], list[str]]] = {}
    refused, used = [], set()
    for own in _products(axes, inside):
        for setting, fixed in settings.items():
            chosen = {**common, **fixed, **own}
            try:
                understood = fitting_keys(chosen, optional)
            except BadInputError as error:
                refused.append(f"{_label({**own, **fixed})}: {error}")
                continue
            used.update(understood)
            for extra in _products(optional, understood):
                try:
                    make_config(make_recipe({**chosen, **extra}).prune_options)
                    fitting.setdefault(str({**own, **extra}), ({**own, **extra}, []))[1].append(setting)
                except BadInputError as error:
                    refused.append(f"{_label({**own, **_tried(extra, axes), **fixed})}: {error}")
    if not fitting:
        raise BadInputError(f"{next(iter(axes))}: no combination can be run; the first: {refused[0]}")
    refused += [f"{key}: no combination chooses what it belongs to." for key in optional if key not in used]
    labels = [_label(_tried(row, axes)) or "the recipe" for row, _ in fitting.values()]
    rows = [
        {
            "name": label + (f" ({', '.join(names)})" if labels.count(label) > 1 else ""),
            **row,
            "settings": names,
            "seeds": axes.get("seed"),
        }
        for label, (row, names) in zip(labels, fitting.values(), strict=True)
    ]
    content = {"name": name, "common": common, "settings": settings, "rows": rows, "share_learning": True}
    return make_grid(content), refused


def split_axes(values: Mapping[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The keys of a flat recipe that hold a list of values to try, and the others.

    Raises:
        BadInputError: no key holds a list, or one is empty.
    """
    axes = {key: value for key, value in values.items() if isinstance(value, list) and not _is_list(key)}
    if not axes:
        raise BadInputError("sparsity: no key holds a list of values to try; write sparsity: [0.5, 0.6], say.")
    for key, choices in axes.items():
        if not choices:
            raise BadInputError(f"{key}: an empty list leaves nothing to try; name some values.")
        if key in field_types(EvaluationArguments):
            raise BadInputError(f"{key}: all that is tried is scored alike; give this key one value.")
    return axes, {key: value for key, value in values.items() if key not in axes}


def fitting_keys(values: Mapping[str, Any], optional: Iterable[str]) -> list[str]:
    """Those of `optional`, keys of methods and their parts, that the parts chosen by a flat recipe understand."""
    known = known_keys(make_recipe(values).prune_options)
    return [key for key in optional if key in known]


def _tried(values: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that differ from row to row."""
    return {key: value for key, value in values.items() if key in axes}


def _is_list(key: str) -> bool:
    """Whether a recipe key takes a list anyway."""
    for section in (*SECTIONS.values(), StructuredConfig):
        kind = field_types(section).get(key)
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if any(typing.get_origin(option) is list for option in options):
            return True
    return False


def _products(axes: Mapping[str, list[Any]], keys: list[str]) -> list[dict[str, Any]]:
    return [dict(zip(keys, choice, strict=True)) for choice in itertools.product(*(axes[key] for key in keys))]


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values.values())


class Look:
    """What a sweep notes of a pruned folder: its mask, a bit a weight, and how fast it is."""

    def __init__(self, folder: Path, dense: str, options: Mapping[str, Any], speed: bool) -> None:
        self.folder = folder
        self.dense = dense
        self.options = dict(options)
        self.speed = speed

    def __call__(self, cell: Any, output: Path) -> dict[str, Any]:
        bits = kept_bits(output, trust_remote_code=bool(self.options["trust_remote_code"]))
        save_file(bits, self.folder / f"mask-{cell.key}.safetensors")
        noted: dict[str, Any] = {"mask": cell.key}
        if self.speed:
            try:
                measured = measure_efficiency({"dense": self.dense, "pruned": output}, **self.options)
            except RunError as error:
                logger.warning("Speed was not measured: %s", error)
                return noted
            speeds = [measured[name]["decode_tokens_per_second"] for name in ("pruned", "dense")]
            noted |= {"speed": speeds[0] / speeds[1], "decode_tokens_per_second": speeds[0]}
        return noted


def kept_bits(folder: Path, trust_remote_code: bool = False) -> dict[str, torch.Tensor]:
    """Which weights of a folder's planned matrices are not zero: uint8, eight a byte, by parameter name."""
    arguments = ModelArguments(trust_remote_code=trust_remote_code)
    model = skeleton(load_config(str(folder), arguments), arguments)
    files = WeightFiles(model, sorted(folder.glob("*.safetensors")))
    planned = {view.parameter for view in Plan.load(folder / PLAN_FILE).views}
    return {
        name: torch.from_numpy(numpy.packbits((tensor != 0).numpy()))
        for wanted in sorted(planned)
        for name, tensor in files.read({wanted}.__contains__).items()
    }


def overlap(left: Path, right: Path) -> float | None:
    """Weights that both masks keep as a share of those that either keeps (Jaccard); None where no shapes agree."""
    both = either = 0
    with safe_open(left, framework="np") as a, safe_open(right, framework="np") as b:
        for name in set(a.keys()) & set(b.keys()):
            one, other = a.get_tensor(name), b.get_tensor(name)
            if one.shape != other.shape:
                # Units are gone on one side.
                continue
            both += int(numpy.bitwise_count(one & other).sum())
            either += int(numpy.bitwise_count(one | other).sum())
    return both / either if either else None


def table(grid: Grid, results: Results, folder: Path) -> list[dict[str, Any]]:
    """The benchmark's lines with what a sweep looks at besides.

    `overlap` is that of the mask with the best row's under the same setting; `pareto` says that no other line is both
    smaller and better; sizes that differ by rounding are equal.
    """
    lines = summarise(grid, results)
    dense = results.quality["dense"]
    runs = {(cell.setting, cell.row): run for cell in reversed(grid.cells) for run in reversed(results.runs(cell))}
    for line in lines:
        run = runs[line["setting"], line["row"]]
        line["ppl_ratio"] = line["perplexity"] / dense["perplexity"]
        line["size"] = (1 - line["total_sparsity"]) / (1 - dense["total_sparsity"])
        line["speed"] = run.get("speed")
        line["decode_tokens_per_second"] = run.get("decode_tokens_per_second")
        best = min((own for own in lines if own["setting"] == line["setting"]), key=lambda own: own["perplexity"])
        masks = [folder / f"mask-{runs[own['setting'], own['row']].get('mask')}.safetensors" for own in (line, best)]
        # Results may have been taken along without the masks.
        line["overlap"] = overlap(*masks) if all(mask.is_file() for mask in masks) else None
    for line in lines:
        line["pareto"] = not any(_beats(other, line) for other in lines)
    return lines


def recipe_of(grid: Grid, line: Mapping[str, Any]) -> dict[str, Any]:
    """The flat recipe of a line of the table, with its first seed."""
    cell = next(cell for cell in grid.cells if (cell.setting, cell.row) == (line["setting"], line["row"]))
    return dict(cell.values)


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a line is better in size or perplexity and in neither worse; sizes count to a thousandth."""
    pairs = [(round(line["size"], 3), line["ppl_ratio"]) for line in (one, other)]
    return pairs[0] != pairs[1] and all(a <= b for a, b in zip(*pairs, strict=True))


def plot_pareto(path: Path, lines: list[dict[str, Any]]) -> None:
    """Perplexity over the dense model's against size, the frontier as a line, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(dict.fromkeys(line["row"] for line in lines)):
        own = [line for line in lines if line["row"] == row]
        axes.plot(
            [line["size"] for line in own],
            [line["ppl_ratio"] for line in own],
            "o^sDvP"[number // 10 % 6],
            color=f"C{number % 10}",
            label=row,
        )
    frontier = sorted((line for line in lines if line["pareto"]), key=lambda line: line["size"])
    axes.plot([line["size"] for line in frontier], [line["ppl_ratio"] for line in frontier], color="0.6", zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_xlabel("parameters that are not zero, as a share of the dense model's")
    axes.set_ylabel("perplexity, as a multiple of the dense model's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def markdown(grid: Grid, results: Results, lines: list[dict[str, Any]]) -> str:
    """The table, best first under each setting, the frontier in bold."""
    head = ["setting", "combination", "perplexity (95 % interval)", "of dense", "spread over seeds", "size", "speed",
            "overlap with the best mask", "allocation's rank correlation"]  # fmt: skip
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in sorted(lines, key=lambda line: (list(grid.settings).index(line["setting"]), line["perplexity"])):
        interval = f" ({line['low']:.1f} to {line['high']:.1f})" if line["low"] else ""
        name = f"**{line['row']}**" if line["pareto"] else line["row"]
        spread = f"{100 * line['excess_spread']:.1f} %" if line["seeds"] > 1 else "one seed"
        cells = [
            line["setting"],
            name,
            f"{line['perplexity']:.2f}{interval}",
            f"{line['ppl_ratio']:.3f}",
            spread,
            f"{line['size']:.3f}",
            f"{line['speed']:.2f}" if line["speed"] is not None else "not measured",
            f"{line['overlap']:.2f}" if line["overlap"] is not None else "none to compare",
            correlations(line),
        ]
        out.append("| " + " | ".join(cells) + " |")
    dense = results.quality["dense"]
    note = (
        f"Dense perplexity {dense['perplexity']:.2f} on {len(dense['nll'])} windows. Size: parameters that are not "
        "zero; speed: decoded tokens a second; both over the dense model's. Overlap: weights that both masks keep over "
        "those that either keeps. Spread: range of log-perplexity over the seeds. In bold: nothing else is as small "
        "and as good, and smaller or better."
    )
    return "\n".join([*out, "", note])
