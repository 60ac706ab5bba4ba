"""Sentences on what the measurements say against a model, and on what was not measured; see findings.py."""

from typing import Any

from hf_prune.report.figures import change_percent, dig, number, percent
from hf_prune.report.findings import calibration, records, short_name
from hf_prune.report.markdown import code


def limitations(report: dict[str, Any]) -> list[str]:
    """What the measurements say against the model, and what was not measured."""
    return [*_quality_limits(report), *_calibration_limits(report), *_layer_limits(report)]


def _quality_limits(report: dict[str, Any]) -> list[str]:
    evaluation = report.get("evaluation") or {}
    before, after = (number(dig(evaluation, side, "perplexity")) for side in ("dense", "pruned"))
    if after is None:
        return ["The quality of this model was not measured."]
    sentences = []
    name = short_name(evaluation)
    if before:
        verb = "grew" if after >= before else "fell"
        low, high, confidence = (number(dig(evaluation, "change", key)) for key in ("low", "high", "confidence"))
        interval = ""
        if low is not None and high is not None:
            level = f"{percent(confidence, 0)} " if confidence is not None else ""
            interval = f" ({level}interval {change_percent(1, low)} to {change_percent(1, high)})"
        grown = change_percent(before, after).lstrip("+-")
        sentences.append(f"Perplexity {verb} by {grown} on {name}{interval}.")
        if low is not None and high is not None and low <= 1 <= high:
            sentences.append(
                "The interval includes no change at all: these windows are too few to tell the two models apart."
            )
    unknown = number(evaluation.get("unknown"))
    if unknown:
        sentences.append(
            f"{percent(unknown)} of the words to predict are outside the vocabulary and count as one: the figures "
            "compare with those of the same vocabulary only, bits per byte with none."
        )
    sentences.append(
        f"Only language modelling on {name} was measured: nothing here tells how downstream tasks, instruction "
        "following, other languages or safety behaviour changed."
    )
    return sentences


def _calibration_limits(report: dict[str, Any]) -> list[str]:
    text, evaluation = report.get("calibration"), report.get("evaluation")
    if not calibration(report):
        return []
    name = short_name(report["calibration"])
    what = "This model was fitted to" if report.get("structure") else "The zeros were chosen on"
    sentences = [f"{what} {name}; text unlike it may have suffered more."]
    same = isinstance(evaluation, dict) and dig(text, "dataset") and dig(text, "dataset") == evaluation.get("dataset")
    if same and number(dig(evaluation, "pruned", "perplexity")) is not None:
        sentences.append("Calibration and evaluation text come from the same source, which flatters the figures above.")
    return sentences


def _layer_limits(report: dict[str, Any]) -> list[str]:
    sentences = []
    views = [view for view in records(report.get("views")) if view.get("name")]
    target, achieved = (number(dig(report, "sparsity", key)) for key in ("target", "achieved_pruned"))
    if target is not None and achieved is not None and abs(target - achieved) >= 0.005:
        sentences.append(f"The target was {percent(target)} of the pruned weights; {percent(achieved)} are zero.")
    empty = [view["name"] for view in views if number(view.get("density")) == 0]
    if empty:
        sentences.append(f"No weight at all is left in {_listed(empty)}.")
    tickets = [found for found in records(report.get("tickets")) if found.get("kind") == "ticket"]
    collapsed = [name.removesuffix(".weight") for name in (tickets[-1].get("collapsed") or [] if tickets else [])]
    cut = [name for name in collapsed if name not in empty]
    if cut:
        sentences.append(f"Weights are left in {_listed(cut)}, and no path leads through them from input to output.")
    held = [view["name"] for view in views if view.get("floor")]
    if held:
        sentences.append(f"`min_keep_ratio` kept more weights than the allocation asked for in {_listed(held)}.")
    scarce = [view["name"] for view in views if view.get("scarce")]
    if scarce:
        sentences.append(
            f"Too few calibration tokens reached {_listed(scarce)}: weights were compared by magnitude there."
        )
    erring = sorted((view for view in views if number(view.get("error"))), key=lambda view: -view["error"])
    if len(erring) > 1:
        listed = ", ".join(f"{code(view['name'])} ({percent(view['error'])})" for view in erring[:3])
        sentences.append(f"The outputs that changed most on the calibration text (relative squared error): {listed}.")
    return sentences


def _listed(names: list[str]) -> str:
    return ", ".join(code(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
