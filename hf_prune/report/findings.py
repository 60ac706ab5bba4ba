"""Sentences that a prune_report.json supports: what was done, what it cost, what to do next.

Foreign strings stand in code spans only (see markdown.code): every sentence is safe in Markdown and in a terminal.
A sentence whose figures were not measured is not said.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from hf_prune.report.figures import (
    dig,
    duration,
    number,
    percent,
    perplexity_change,
    perplexity_interval,
    plain_figure,
    size,
    times,
)
from hf_prune.report.markdown import code, inline, one_line
from hf_prune.report.privacy import text_name

_UNITS = (("width", "neurons an MLP"), ("groups", "key-value groups"), ("heads", "query heads"))


def pattern_of(report: dict[str, Any]) -> str:
    """The pattern of the zeros: "unstructured", "2:4", ..."""
    return str(dig(report, "method", "pattern") or "unstructured")


def method_title(report: dict[str, Any]) -> str | None:
    """The method as its paper writes it (SparseGPT), or its name, or None."""
    return dig(report, "method", "title") or dig(report, "method", "name")


def records(items: Any) -> list[dict[str, Any]]:
    """Those of a report's list that are mappings, as they should all be."""
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def summary(report: dict[str, Any]) -> str:
    """One sentence: which model, how many zeros by which method, what it did to perplexity."""
    name = code(report["base_model"]) if report.get("base_model") else "A causal language model"
    if report.get("structure"):
        return _summary_of_sizes(report, name) + _perplexity_clause(report) + "."
    achieved, overall = (number(dig(report, "sparsity", key)) for key in ("achieved_pruned", "achieved_all"))
    by_method = f" by {inline(method_title(report))}" if method_title(report) else ""
    if achieved is None:
        sentence = f"{name}, pruned{by_method}"
    else:
        layers = len(records(report.get("views")))
        where = f"the weights of {layers} layers" if layers > 1 else "the pruned weights"
        sentence = f"{name} with {percent(achieved)} of {where} set to zero{by_method}"
        sentence += f" ({percent(overall)} of all parameters)" if overall is not None else ""
    return sentence + _perplexity_clause(report) + "."


def _perplexity_clause(report: dict[str, Any]) -> str:
    before, after = (number(dig(report, "evaluation", side, "perplexity")) for side in ("dense", "pruned"))
    if not before or not after:
        return ""
    verb, name = "rose" if after >= before else "fell", short_name(report["evaluation"])
    # A method that trains is measured against the same training without pruning, not against the base model.
    trained = report.get("training") and not report.get("recoveries")
    whose = " of the dense model, trained alike," if trained else ""
    change = f"from {plain_figure(before)}{whose} to {plain_figure(after)} ({times(after / before)})"
    return f"; perplexity on {name} {verb} {change}"


def _summary_of_sizes(report: dict[str, Any], name: str) -> str:
    by_method = f" by {inline(method_title(report))}" if method_title(report) else ""
    removed, overall = (number(dig(report, "structure", key)) for key in ("removed", "removed_all"))
    padded = number(dig(report, "structure", "padded"))
    share = f"{percent(removed)} of its blocks' parameters" if removed is not None else "units"
    sentence = f"{name} with {share} removed" + (f" and {percent(padded)} made zero" if padded else "") + by_method
    sentence += f" ({percent(overall)} of all parameters)" if overall is not None else ""
    return f"{sentence}: {sizes(report)}"


def sizes(report: dict[str, Any]) -> str:
    """1,126 of 1,536 neurons an MLP, 27 of 30 blocks: what is left of each kind of unit that became fewer."""
    structure = report.get("structure") or {}
    before, after = structure.get("before") or {}, structure.get("after") or {}
    parts = [f"{after[key]:,} of {before[key]:,} {words}" for key, words in _UNITS if after.get(key) != before.get(key)]
    widths = structure.get("widths")
    if widths:
        parts = [f"{min(widths):,} to {max(widths):,} of {before['width']:,} neurons an MLP, padded with zeros"]
    if structure.get("blocks_removed"):
        parts.append(f"{structure['blocks'] - structure['blocks_removed']} of {structure['blocks']} blocks")
    return ", ".join(parts) or "no unit was removed"


def short_name(text: dict[str, Any]) -> str:
    """The public name of a text without its split and revision, for a sentence."""
    return text_name({"dataset": text.get("dataset"), "private": text.get("private")}) or "the evaluation text"


def protocol(report: dict[str, Any]) -> str:
    """How perplexity and bits per byte were measured, enough to measure them again; '' without an evaluation."""
    evaluation = report.get("evaluation")
    if not isinstance(evaluation, dict) or number(dig(evaluation, "pruned", "perplexity")) is None:
        return ""
    windows, length = (number(evaluation.get(key)) for key in ("windows", "seq_length"))
    over = f"{windows:,.0f} non-overlapping windows" if windows else "non-overlapping windows"
    over += f" of {length:,.0f} tokens" if length else ""
    bos_policy: dict[Any, str] = {True: "each window begins with the BOS token", False: "no BOS token added"}
    add_bos = bos_policy.get(evaluation.get("add_bos"))
    dtype = f"weights in {code(evaluation['dtype'])}" if evaluation.get("dtype") else None
    conditions = "".join(f", {part}" for part in (add_bos, dtype) if part)
    sentence = (
        f"Perplexity is the exponential of the mean negative log-likelihood per predicted token over {over} of "
        f"{text_name(evaluation) or 'the evaluation text'}, documents joined by blank lines{conditions}."
    )
    if number(dig(evaluation, "pruned", "bits_per_byte")) is not None:
        sentence += " Bits per byte is the same likelihood in bits, divided by the UTF-8 bytes of the predicted text."
    if perplexity_interval(report):
        sentence += " The interval of the change comes from a bootstrap over windows, paired between the two models."
    return sentence


def calibration(report: dict[str, Any]) -> str:
    """Which text the method looked at, or '' where it looked at none."""
    text = report.get("calibration")
    if not isinstance(text, dict) or not text_name(text):
        return ""
    samples, length = (number(text.get(key)) for key in ("num_samples", "seq_length"))
    windows = f"{samples:,.0f} windows{f' of {length:,.0f} tokens' if length else ''} of " if samples else ""
    return f"{windows}{text_name(text)}"


def training(report: dict[str, Any]) -> str:
    """What a model was trained on while it was pruned, or ''."""
    return _training(report.get("training"))


def _training(text: Any) -> str:
    if not isinstance(text, dict) or not text_name(text):
        return ""
    windows, length, steps, batch = (number(text.get(key)) for key in ("windows", "seq_length", "steps", "batch_size"))
    parts = [
        f"{steps:,.0f} steps" if steps else "",
        f"of {batch:.0f} windows" if steps and batch else "",
        f"from {windows:,.0f} windows of {length:,.0f} tokens" if windows and length else "",
        f"of {text_name(text)}",
    ]
    return " ".join(part for part in parts if part)


def tickets(report: dict[str, Any]) -> str:
    """What iterative pruning went through, or '' where it was none."""
    every = records(report.get("tickets"))
    rounds = [found for found in every if found.get("kind") == "ticket"]
    if len(rounds) < 2:
        return ""
    path = ", ".join(f"{plain_figure(own['perplexity'])} at {percent(own['sparsity'])}" for own in rounds)
    controls = [own for own in every if own["number"] == rounds[-1]["number"] and own["kind"] != "ticket"]
    beside = "".join(
        f"; its control of a {own['kind'].replace('_', ' ')} {plain_figure(own['perplexity'])}" for own in controls
    )
    return f"{len(rounds) - 1} rounds; perplexity {path}{beside}"


def recoveries(report: dict[str, Any]) -> list[str]:
    """A sentence for each training behind the pruning."""
    sentences = []
    for own in records(report.get("recoveries")):
        before, after, gap = (number(own.get(key)) for key in ("perplexity_before", "perplexity_after", "gap_closed"))
        sentence = f"{one_line(own.get('title') or 'trained')}, {_training(own.get('training'))}"
        if before and after:
            sentence += f": perplexity {plain_figure(before)} before and {plain_figure(after)} after"
            sentence += f", {percent(gap, 0)} of the gap to the dense model closed" if gap is not None else ""
        seconds = number(dig(own, "training", "seconds"))
        sentences.append(sentence + (f", in {duration(seconds)}" if seconds else "") + ".")
    return sentences


def displacement(report: dict[str, Any]) -> str:
    """How far the weights that were kept have moved, or '' where it was not measured."""
    moved, changed = (number(dig(report, "displacement", key)) for key in ("moved", "changed"))
    if moved is None or changed is None:
        return ""
    if not changed:
        return "as in the base model, to the bit"
    return f"{percent(changed)} of them changed, by {percent(moved)} of their norm"


def fused(report: dict[str, Any]) -> str:
    """How units were fused, or '' where none were."""
    structure = report.get("structure") or {}
    share = number(structure.get("fused"))
    if not structure.get("solver") or share is None:
        return ""
    solvers = ", ".join(code(solver) for solver in structure["solver"])
    sentence = f"{percent(share)} of the units that stayed took others in, by {solvers}"
    if any(cost.endswith("L2") for cost in structure.get("cost") or []):
        sentence += "; distances between weights are L2, as there were too many units for the published L1"
    error = number(structure.get("marginal_error"))
    if error is not None and structure.get("converged") is False:
        sentence += f"; the solver had not converged: {percent(error, 2)} of the mass is in the wrong place"
    return sentence


def is_smaller(report: dict[str, Any]) -> bool:
    """Whether units went and less is stored: a model padded to a block that has lost next to nothing is as large."""
    padded, removed = (number(dig(report, "structure", key)) or 0 for key in ("padded", "removed"))
    return bool(report.get("structure")) and not (padded and removed < 0.005)


def earned_back(report: dict[str, Any]) -> str:
    """What choosing, fusing and refitting units took, and after how many decoded tokens that is earned back, or ''."""
    seconds = number(dig(report, "structure", "solver_seconds"))
    if seconds is None:
        return ""
    sentence = f"choosing, fusing and refitting units took {duration(seconds)}"
    key = "decode_tokens_per_second"
    dense, pruned = (number(dig(report, "efficiency", side, key)) for side in ("dense", "pruned"))
    if is_smaller(report) and dense and pruned and pruned > dense:
        sentence += f", which {seconds / (1 / dense - 1 / pruned):,.0f} decoded tokens earn back"
    return sentence


def next_step(report: dict[str, Any], folder: str | Path) -> list[str]:
    """What to do with the folder: load it, look into it, push it; what to try where the cost was high."""
    place = one_line(folder)
    trust = ", trust_remote_code=True" if report.get("own_code") else ""
    steps = [
        f"Load it: `AutoModelForCausalLM.from_pretrained({place!r}{trust})`",
        f"Look into it: `hf-prune inspect {shlex.quote(place)}`",
        f"Publish it: `hf-prune push {shlex.quote(place)} --repo_id YOUR_NAME/{repo_name(report)}`",
    ]
    before, after = (number(dig(report, "evaluation", side, "perplexity")) for side in ("dense", "pruned"))
    target = _target(report)
    again = pattern_of(report) in ("unstructured", "structured") and not report.get("training")
    if before and after and after / before > 1.25 and target and again and not report.get("recoveries"):
        lower = f"{target / 2:.2f}" if report.get("structure") else f"{max(target - 0.2, 0.1):.1f}"
        steps.append(f"Perplexity is {perplexity_change(report)}: try `--sparsity {lower}` to lose less")
    return steps


def _target(report: dict[str, Any]) -> float | None:
    """The share that was to go: zeros of the pruned weights, or parameters of the blocks."""
    places = (("sparsity", "target"), ("sparsity", "achieved_pruned"), ("structure", "removed"))
    value = next((value for place in places if (value := number(dig(report, *place))) is not None), None)
    padded = number(dig(report, "structure", "padded"))
    return value + padded if value is not None and padded else value


def repo_name(report: dict[str, Any]) -> str:
    """A name for the pruned model, fit for a Hub repository: SmolLM2-135M-Instruct-sparsegpt-50."""
    target = _target(report)
    pattern = pattern_of(report)
    amount = pattern.replace(":", "of") if ":" in pattern else f"{100 * target:.0f}" if target else None
    base = str(report.get("base_model") or "model").rstrip("/\\").replace("\\", "/").split("/")[-1]
    name = "-".join(str(part) for part in (base, dig(report, "method", "name") or "pruned", amount) if part)
    # What a repository may be called: letters, digits, - _ . and neither -- nor .. anywhere, 96 characters at most.
    allowed = re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^A-Za-z0-9_.-]+", "-", name))
    return allowed.strip("-.")[:80].strip("-.") or "model"


def spent(report: dict[str, Any]) -> str:
    """What the pruning took: time, memory, passes over the calibration text; '' where nothing was recorded."""
    seconds = {key: number(value) for key, value in (report.get("seconds") or {}).items()}
    prune, total = seconds.get("prune"), sum(value or 0 for value in seconds.values())
    passes, memory = number(report.get("forward_passes")), number(report.get("peak_memory_bytes"))
    processes = number(report.get("num_processes")) or 1
    allocation = number(report.get("allocation_seconds"))
    what = "say how many units go where" if report.get("structure") else "share out the zeros"
    allocating = f" ({duration(allocation)} of it to {what})" if allocation and allocation >= 1 else ""
    parts = [
        f"pruning took {duration(prune)}" + allocating if prune else "",
        f"the whole run {duration(total)}" if total and total != prune else "",
        f"{passes:g} forward passes over the calibration text" if passes and calibration(report) else "",
        f"peak memory {size(memory)}" if memory else "",
    ]
    text = ", ".join(part for part in parts if part)
    if not text:
        return ""
    text += f", on {code(report['device'])}" if report.get("device") else ""
    return text + (f", {processes:.0f} processes" if processes > 1 else "")
