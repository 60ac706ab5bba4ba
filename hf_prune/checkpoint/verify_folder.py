"""Verify a saved model folder from outside: a script of its own which never imports hf_prune.

    python -P verify_folder.py FOLDER EXPECTED.json REPORT.json

EXPECTED.json (written by verify.py, which also puts probe_logits.safetensors beside it) holds

    views                    [{"name", "parameter", "shape" [out, in], "transposed", "kept", "nonzeros", "pattern",
                             "expert" (number, or null) where the parameter is 3-D,
                             "outputs" ({"offset", "size", "repeats"}, or null) where it is a fused layer's: in each of
                             `repeats` equal parts of its outputs `size` from `offset` on}]
    dtype, attn_implementation, num_threads, matmul_precision, device, trust_remote_code
    probe_input_ids          [[token id, ...], ...]
    ties                     [[name, name], ...]
    tokenizer                {"text", "ids", "chat_template"} or null

REPORT.json receives [{"check", "passed", "detail"}]. -P keeps this folder's inspect.py from hiding the standard
library's.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LOADS = "loads, no missing, unexpected or mismatched keys"
DENSITY = "achieved density of each module"
PATTERN = "n:m pattern of each module"
SHAPES = "shapes equal the config's"
TIES = "tied weights stay tied"
DTYPE = "dtype kept"
FINITE_PARAMETERS = "finite parameters"
FINITE_LOGITS = "finite logits"
LOGITS = "logits bitwise equal to the model in memory"
TOKENIZER = "tokenizer equal to the one in memory"
STOCK = "loaded without hf_prune"


def verify(folder: Path, expected: dict[str, Any], logits: torch.Tensor) -> list[dict[str, Any]]:
    """All checks of `folder`, one row each; a folder that does not load gives the first row alone."""
    torch.set_num_threads(expected["num_threads"])
    torch.set_float32_matmul_precision(expected["matmul_precision"])
    dtype = getattr(torch, expected["dtype"])
    trust = expected["trust_remote_code"]
    try:
        # Its own reading: the loader overwrites the dtype in the model's config.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        # From a variable of type Any: the loader's annotation leaves out the pair that it returns.
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=expected["attn_implementation"],
            trust_remote_code=trust,
            # Reported in its row instead of raised.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        return [_row(LOADS, [_one_line(error)])]
    model.eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {view["name"]: matrix(parameters, view) for view in expected["views"]}
    wrong_keys = [f"{kind}: {_names(names)}" for kind, names in info.items() if names]
    rows = [
        _row(LOADS, wrong_keys, f"{len(parameters)} tensors"),
        _check_density(weights, expected["views"]),
        *_check_pattern(weights, expected["views"]),
        _check_shapes(folder, config, expected["views"], trust),
        _check_ties(model, expected["ties"]),
        _row(
            DTYPE,
            [] if config.dtype == dtype else [f"config.json says {config.dtype}, the model in memory is {dtype}"],
            expected["dtype"],
        ),
        _row(
            FINITE_PARAMETERS,
            [name for name, tensor in parameters.items() if not _all_finite(tensor)],
            f"{sum(tensor.numel() for tensor in model.parameters()):,} parameters",
        ),
    ]
    del weights, parameters
    rows += _check_logits(model.to(expected["device"]), expected["probe_input_ids"], logits)
    if expected["tokenizer"] is not None:
        rows.append(_check_tokenizer(folder, expected["tokenizer"], trust))
    return rows


def tied_pairs(model: torch.nn.Module) -> list[list[str]]:
    """[first name, other name] of each parameter that goes by more than one name."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted([first, other] for first, *others in names.values() for other in others)


def probe_logits(model: torch.nn.Module, input_ids: list[list[int]]) -> torch.Tensor:
    """Logits [batch, length, vocabulary] on the CPU, in the model's dtype."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(input_ids=torch.tensor(input_ids, device=device), use_cache=False).logits.cpu()


def _all_finite(tensor: torch.Tensor) -> bool:
    """Smallest and largest are finite, as NaN would be both; 15 times faster than isfinite on a CPU."""
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def matrix(parameters: dict[str, torch.nn.Parameter], view: dict[str, Any]) -> torch.Tensor | None:
    """The view's weight as [out, in]; None where the model has no such parameter."""
    weight = parameters.get(view["parameter"])
    if weight is None:
        return None
    own = weight.detach() if view.get("expert") is None else weight.detach()[view["expert"]]
    own, part = own.T if view["transposed"] else own, view.get("outputs")
    if part is None:
        return own
    # Never beyond what is there: the files may disagree with the config.
    stride = own.shape[0] // part["repeats"]
    parts = own[: stride * part["repeats"]].unflatten(0, (part["repeats"], stride))
    return parts[:, part["offset"] : part["offset"] + part["size"]].flatten(0, 1)


def _check_density(weights: dict[str, torch.Tensor | None], views: list[dict[str, Any]]) -> dict[str, Any]:
    failures, nonzeros, total = [], 0, 0
    for view in views:
        weight = weights[view["name"]]
        if weight is None:
            failures.append(f"{view['name']}: no parameter {view['parameter']}")
            continue
        count = int(torch.count_nonzero(weight))
        nonzeros, total = nonzeros + count, total + weight.numel()
        if count > view["kept"]:
            failures.append(f"{view['name']}: {count} nonzero weights, at most {view['kept']} allowed")
        elif count != view["nonzeros"]:
            failures.append(f"{view['name']}: {count} nonzero weights, {view['nonzeros']} in memory")
    return _row(DENSITY, failures, f"{len(views)} modules, {nonzeros:,} of {total:,} weights kept")


def _check_pattern(weights: dict[str, torch.Tensor | None], views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """No row where no module has an n:m pattern."""
    failures, checked = [], 0
    for view in views:
        weight = weights[view["name"]]
        if view["pattern"] == "unstructured" or weight is None:
            continue
        checked += 1
        n, m = (int(number) for number in view["pattern"].split(":"))
        if weight.shape[1] % m:
            failures.append(f"{view['name']}: {weight.shape[1]} inputs are no multiple of {m}")
            continue
        kept = (weight != 0).reshape(weight.shape[0], -1, m).sum(-1)
        broken = int((kept > n).sum())
        if broken:
            output, group = (kept > n).nonzero()[0].tolist()
            failures.append(
                f"{view['name']}: {broken} of {kept.numel()} groups keep more than {n} of {m} inputs, "
                f"the first at output {output}, input {group * m}"
            )
    return [_row(PATTERN, failures, f"{checked} modules")] if checked else []


def _check_shapes(folder: Path, config: Any, views: list[dict[str, Any]], trust_remote_code: bool) -> dict[str, Any]:
    """The plan's and the files' shapes against the empty model that the saved config builds."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    built = {name: list(tensor.shape) for name, tensor in parameters.items()}
    failures = []
    for view in views:
        own = matrix(parameters, view)
        found = None if own is None else list(own.shape)
        if found != view["shape"]:
            failures.append(f"{view['name']}: {found} by the config, {view['shape']} in memory")
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.offset_keys():
                shape = tensors.get_slice(name).get_shape()
                # Names that the loader converts (experts, for one) are covered by the first row.
                if built.get(name, shape) != shape:
                    failures.append(f"{name}: {built[name]} by the config, {shape} in {shard.name}")
    return _row(SHAPES, failures, f"{len(built)} tensors")


def _check_ties(model: torch.nn.Module, expected: list[list[str]]) -> dict[str, Any]:
    found = tied_pairs(model)
    failures = [f"{first} and {other} are no longer tied" for first, other in expected if [first, other] not in found]
    failures += [f"{first} and {other} became tied" for first, other in found if [first, other] not in expected]
    return _row(TIES, failures, ", ".join(" = ".join(pair) for pair in expected) or "none are tied")


def _check_logits(model: torch.nn.Module, input_ids: list[list[int]], expected: torch.Tensor) -> list[dict[str, Any]]:
    try:
        logits = probe_logits(model, input_ids)
    except Exception as error:
        return [_row(FINITE_LOGITS, [_one_line(error)])]
    finite = torch.isfinite(logits)
    rows = [_row(FINITE_LOGITS, [f"{int((~finite).sum())} of {finite.numel()}"] if not finite.all() else [])]
    failures = []
    if logits.shape != expected.shape or logits.dtype != expected.dtype:
        failures.append(f"{list(logits.shape)} {logits.dtype} instead of {list(expected.shape)} {expected.dtype}")
    elif not torch.equal(logits, expected):
        difference = (logits.double() - expected.double()).abs()
        failures.append(f"{int((difference != 0).sum())} of {logits.numel()} differ, by up to {difference.max():.3g}")
    rows.append(_row(LOGITS, failures, f"{len(input_ids)} x {len(input_ids[0])} random tokens"))
    return rows


def _check_tokenizer(folder: Path, expected: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = tokenizer(expected["text"])["input_ids"]
    except Exception as error:
        return _row(TOKENIZER, [_one_line(error)])
    failures = [] if ids == expected["ids"] else ["the same text gives other token ids"]
    if tokenizer.chat_template != expected["chat_template"]:
        failures.append("another chat template")
    return _row(TOKENIZER, failures, f"{len(ids)} token ids")


def _row(check: str, failures: list[str], detail: str = "") -> dict[str, Any]:
    return {"check": check, "passed": not failures, "detail": _names(failures) if failures else detail}


def _names(names: Iterable[object], shown: int = 3) -> str:
    """The first few, and how many more."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return "; ".join(ordered[:shown]) + more


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(folder: str, expected_file: str, report_file: str) -> None:
    expected = json.loads(Path(expected_file).read_text())
    logits = load_file(Path(expected_file).with_name("probe_logits.safetensors"))["logits"]
    rows = verify(Path(folder), expected, logits)
    imported = [name for name in sys.modules if name.partition(".")[0] == "hf_prune"]
    rows.append(_row(STOCK, imported, "a fresh process with plain transformers"))
    Path(report_file).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
