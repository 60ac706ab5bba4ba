"""Sentences that a prune_report.json supports: what was done, what was gained, what it cost, what to do next.

Foreign strings stand in code spans only (see markdown.code): every sentence is safe in Markdown and in a terminal.
A sentence whose figures were not measured is not said.
"""

import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hf_prune.report.figures import (
    change_percent,
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

AVAILABLE = frozenset({"2:4", "structured"})
"""What hf_prune can do to gain speed: zeros that GPUs can skip, and narrower models."""
_UNITS = (("width", "neurons an MLP"), ("groups", "key-value groups"), ("heads", "query heads"))


def pattern_of(report: dict[str, Any]) -> str:
    """The pattern of the zeros: "unstructured", "2:4", ..."""
    return str(dig(report, "method", "pattern") or "unstructured")


def method_title(report: dict[str, Any]) -> str | None:
    """The method as its paper writes it (SparseGPT), or its name, or None."""
    return dig(report, "method", "title") or dig(report, "method", "name")


def _texts(items: Any) -> list[dict[str, Any]]:
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
        layers = len(_texts(report.get("views")))
        where = f"the weights of {layers} layers" if layers > 1 else "the pruned weights"
        sentence = f"{name} with {percent(achieved)} of {where} set to zero{by_method}"
        sentence += f" ({percent(overall)} of all parameters)" if overall is not None else ""
    return sentence + _perplexity_clause(report) + "."


def _perplexity_clause(report: dict[str, Any]) -> str:
    before, after = (number(dig(report, "evaluation", side, "perplexity")) for side in ("dense", "pruned"))
    if not before or not after:
        return ""
    verb, name = "rose" if after >= before else "fell", short_name(report["evaluation"])
    return (
        f"; perplexity on {name} {verb} from {plain_figure(before)} to {plain_figure(after)} ({times(after / before)})"
    )


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
    rounds = [found for found in _texts(report.get("tickets")) if found.get("kind") == "ticket"]
    if len(rounds) < 2:
        return ""
    path = ", ".join(f"{plain_figure(own['perplexity'])} at {percent(own['sparsity'])}" for own in rounds)
    return f"{len(rounds) - 1} rounds; perplexity {path}"


def recoveries(report: dict[str, Any]) -> list[str]:
    """A sentence for each training behind the pruning."""
    sentences = []
    for own in _texts(report.get("recoveries")):
        before, after, gap = (number(own.get(key)) for key in ("perplexity_before", "perplexity_after", "gap_closed"))
        sentence = f"{one_line(own.get('title') or 'trained')}, {_training(own.get('training'))}"
        if before and after:
            sentence += f": perplexity {plain_figure(before)} before and {plain_figure(after)} after"
            sentence += f", {percent(gap, 0)} of the gap to the dense model closed" if gap is not None else ""
        seconds = number(dig(own, "training", "seconds"))
        sentences.append(sentence + (f", in {duration(seconds)}" if seconds else "") + ".")
    return sentences


def gained(report: dict[str, Any], available: Collection[str] = AVAILABLE) -> list[str]:
    """What size and speed became, measured; what stays theoretical; which setting would gain more.

    available: what hf_prune can do towards speed, of "2:4" and "structured"; nothing else is recommended.
    """
    return [*_size(report), *_speed(report), *_theory(report), *_settings(report, available)]


def _size(report: dict[str, Any]) -> list[str]:
    before, after = (number(dig(report, "efficiency", side, "file_bytes")) for side in ("dense", "pruned"))
    if not before or after is None:
        return []
    if abs(after / before - 1) < 0.005:
        return [f"Size on disk: -0 % ({size(after)} before and after); zeros are stored like any other weight."]
    return [f"Size on disk: {change_percent(before, after)} ({size(before)} before, {size(after)} now)."]


def _speed(report: dict[str, Any]) -> list[str]:
    structured = bool(report.get("structure"))
    reason = (
        "stock runtimes multiply zeros like any other number"
        if pattern_of(report) == "unstructured"
        else "plain `from_pretrained` runs dense kernels, which multiply the zeros too"
    )
    measured = []
    for word, key in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second")):
        before, after = (number(dig(report, "efficiency", side, key)) for side in ("dense", "pruned"))
        if before and after:
            measured.append(f"{word} {times(after / before)}")
    if not measured:
        return [] if structured else [f"Speed was not measured; expect 1.0x: {reason}."]
    place = dig(report, "efficiency", "device")
    where = f" on {code(place)}" if place else ""
    if structured:
        return [
            f"Speed: {', '.join(measured)}, measured{where} with stock kernels: there is less to read and multiply."
        ]
    return [f"Speed: {', '.join(measured)}, measured{where}; {reason}, so that differences from 1.00x are noise."]


def _theory(report: dict[str, Any]) -> list[str]:
    total, nonzero = (
        number(dig(report, "efficiency", "pruned", key)) for key in ("flops_per_token", "nonzero_flops_per_token")
    )
    if not total or nonzero is None or nonzero >= total:
        return []
    share = percent(1 - nonzero / total, 0)
    if 1 - nonzero / total < 0.005:
        return []
    return [f"In theory {share} of the FLOPs per token multiply a zero and could be skipped."]


def _settings(report: dict[str, Any], available: Collection[str]) -> list[str]:
    pattern = pattern_of(report)
    sentences: list[str] = []
    if report.get("structure"):
        return sentences
    if pattern == "2:4":
        sentences.append(
            "2:4 zeros gain speed only on GPUs with semi-structured sparse kernels (NVIDIA Ampere on), after "
            "the weights are converted for them, for example with `torch.sparse.to_sparse_semi_structured`."
        )
    elif pattern != "unstructured":
        sentences.append(
            f"{code(pattern)} zeros gain speed only with kernels made for this pattern; GPU kernels commonly take 2:4."
        )
    if pattern != "2:4" and "2:4" in available:
        sentences.append(
            'What would gain speed: `pattern: "2:4"` on GPUs with semi-structured sparse kernels (NVIDIA Ampere on).'
        )
    # Structured pruning refuses mixtures, and architectures that it has no description of.
    mixture = any(".experts." in str(view.get("name")) for view in report.get("views") or ())
    if "structured" in available and not mixture and not report.get("own_code"):
        sentences.append(
            "What would gain size and speed on any hardware: `method: intra_fusion`, for a narrower model."
        )
    return sentences


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
    views = [view for view in _texts(report.get("views")) if view.get("name")]
    target, achieved = (number(dig(report, "sparsity", key)) for key in ("target", "achieved_pruned"))
    if target is not None and achieved is not None and abs(target - achieved) >= 0.005:
        sentences.append(f"The target was {percent(target)} of the pruned weights; {percent(achieved)} are zero.")
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


def displacement(report: dict[str, Any]) -> str:
    """How far the weights that were kept have moved, or '' where it was not measured."""
    moved, changed = (number(dig(report, "displacement", key)) for key in ("moved", "changed"))
    if moved is None or changed is None:
        return ""
    if not changed:
        return "as in the base model, to the bit"
    return f"{percent(changed)} of them changed, by {percent(moved)} of their norm"


def fused(report: dict[str, Any]) -> str:
    """How units were fused and what that took, or '' where none were."""
    structure = report.get("structure") or {}
    seconds, share = number(structure.get("solver_seconds")), number(structure.get("fused"))
    if not structure.get("solver") or seconds is None or share is None:
        return ""
    solvers = ", ".join(code(solver) for solver in structure["solver"])
    return f"{percent(share)} of the units that stayed took others in, by {solvers} in {duration(seconds)}"


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
    if before and after and after / before > 1.25 and target and pattern_of(report) in ("unstructured", "structured"):
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
    allocating = f" ({duration(allocation)} of it to share out the zeros)" if allocation and allocation >= 1 else ""
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
