"""Sentences on what size and speed became, and which setting would gain more; see findings.py."""

from collections.abc import Collection
from typing import Any

from hf_prune.report.figures import change_percent, dig, number, percent, size, times
from hf_prune.report.findings import is_smaller, pattern_of
from hf_prune.report.markdown import code

AVAILABLE = frozenset({"2:4", "structured"})
"""What hf_prune can do to gain speed: zeros that GPUs can skip, and narrower models."""


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
    structured = is_smaller(report)
    reason = (
        "stock runtimes multiply zeros like any other number"
        if pattern_of(report) in ("unstructured", "structured")
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
