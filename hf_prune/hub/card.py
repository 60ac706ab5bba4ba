"""README.md and .eval_results/ of a pruned checkpoint, from its prune_report.json and its recipe.

Two rules hold everywhere: what was not measured is left out, line and all; and a string that came from a recipe or a
model reaches the card only inside a code span, a fence, or backslash-escaped.
"""

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import eval_result_entries_to_yaml
from jinja2 import Environment, StrictUndefined, Template

from hf_prune.checkpoint.folder import RECOVERY_FILE
from hf_prune.hub.card_metadata import card_data, eval_result_entries, hub_base_model
from hf_prune.report import findings
from hf_prune.report.cause_table import watched_text
from hf_prune.report.figures import dig, efficiency_rows, number, quality_rows, sparsity_rows
from hf_prune.report.gains import gained
from hf_prune.report.limitations import limitations
from hf_prune.report.markdown import code, escape, fence, one_line
from hf_prune.report.privacy import (
    hidden_keys,
    last_recipe,
    may_show_samples,
    parsed_recipe,
    public_command,
    public_recipe,
    recovery_report,
)
from hf_prune.report.search_report import COLUMNS, candidate_rows, searched
from hf_prune.report.shares import share_rows

PLOTS = {
    "plots/sparsity_by_layer.png": "Sparsity of every pruned weight matrix, by block and kind of module",
    "plots/widths.png": "Neurons that each block's MLP keeps",
    "plots/rounds.png": "Perplexity over the weights that are left, round by round",
}


def write_card(folder: str | Path, report: dict[str, Any], recipe_text: str) -> None:
    """Write README.md and, where the evaluation text is a Hub dataset, .eval_results/*.yaml into `folder`.

    report: the content of prune_report.json; any key may be absent or None.
    recipe_text: the recipe as the user wrote it (YAML); shown verbatim, unless a text was private: then its keys, its
        comments and (without `publish_samples: true`) its prompts stay out.
    """
    folder = Path(folder)
    metadata = card_data(report, parsed_recipe(recipe_text)).to_yaml()
    content = _template().render(metadata=metadata, **_body(folder, report, recipe_text))
    (folder / "README.md").write_text(content, encoding="utf-8")
    entries = eval_result_entries(report)
    if entries:
        results = folder / ".eval_results"
        results.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        (results / "hf_prune.yaml").write_text(text, encoding="utf-8")


@cache
def _template() -> Template:
    # Markdown, not HTML: what is foreign is made safe by report.markdown, which HTML escaping would garble.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    return environment.from_string((files("hf_prune.hub") / "card_template.md.jinja").read_text(encoding="utf-8"))


def _body(folder: Path, report: dict[str, Any], recipe_text: str) -> dict[str, Any]:
    """Everything the template shows, already safe to stand in Markdown."""
    recipe = parsed_recipe(recipe_text)
    recipe_shown, verbatim = public_recipe(report, recipe_text)
    versions = report.get("versions") or {}
    return {
        "title": escape(_title(report)),
        "summary": findings.summary(report),
        "rows": [*quality_rows(report), *sparsity_rows(report), *efficiency_rows(report)],
        "measured": [text for text in (findings.protocol(report), _conditions(report)) if text],
        "plots": [(plot, caption) for plot, caption in PLOTS.items() if (folder / plot).is_file()],
        "shares": share_rows(report),
        "gained": gained(report),
        "loading": fence(_loading(report.get("hub_model_id"), bool(report.get("own_code"))), "python"),
        "needs": _needs(report),
        "making": _making(report, recipe),
        "command": fence(public_command(report.get("command"), hidden_keys(report, recipe)), "bash"),
        "recipe": fence(recipe_shown, "yaml"),
        "recipe_heading": "The recipe, `hf_prune_recipe.yaml`"
        + (
            ", as it was run:"
            if verbatim
            else ", without its comments and without what describes private text or this machine's folders:"
        ),
        "later_recipes": _later_recipes(folder, report),
        "limitations": limitations(report),
        "candidates": candidate_rows(report.get("search")),
        "candidate_columns": COLUMNS,
        "checks": _checks(report),
        "samples": _samples(report)
        if may_show_samples(report, parsed_recipe(last_recipe(folder, report, recipe_text)))
        else [],
        "citation": fence(dig(report, "method", "citation"), "bibtex"),
        "versions": ", ".join(escape(f"{name} {version}") for name, version in versions.items() if version),
    }


def _later_recipes(folder: Path, report: dict[str, Any]) -> list[tuple[str, str]]:
    """File name and fenced text of the recipe of each training behind the pruning, as far as it may be shown."""
    shown = []
    for place, recovery in enumerate(report.get("recoveries") or [], start=1):
        name = RECOVERY_FILE.format("" if place == 1 else place)
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            shown.append((name, fence(public_recipe(recovery_report(report, recovery), text)[0], "yaml")))
    return shown


def _title(report: dict[str, Any]) -> str:
    base = str(report.get("base_model") or "Causal language model").rstrip("/").split("/")[-1]
    target = number(dig(report, "sparsity", "target"))
    pattern, method = findings.pattern_of(report), findings.method_title(report)
    removed = number(dig(report, "structure", "removed"))
    if number(dig(report, "structure", "padded")):
        return f"{base} with MLPs of their own widths, padded with zeros" + (f", by {method}" if method else "")
    if removed is not None:
        return f"{base} with blocks {100 * removed:.0f} % smaller" + (f" by {method}" if method else "")
    amount = f" to {100 * target:.3g} % zeros" if target else ""
    shape = f" ({pattern})" if pattern != "unstructured" else ""
    return f"{base} pruned{amount}{shape}" + (f" with {method}" if method else "")


def _conditions(report: dict[str, Any]) -> str:
    """On what, at which lengths and how often size and speed were measured."""
    efficiency = report.get("efficiency") or {}
    new, prompt, repeats = (number(efficiency.get(key)) for key in ("new_tokens", "prompt_length", "repeats"))
    parts = [
        f"on {code(efficiency['device'])}" if efficiency.get("device") else "",
        f"in {code(efficiency['dtype'])}" if efficiency.get("dtype") else "",
        f"with a prompt of {prompt:,.0f} tokens" if prompt else "",
        f"{new:,.0f} new tokens" if new else "",
        f"{repeats:.0f} repeats" if repeats else "",
    ]
    if not efficiency_rows(report) or not any(parts):
        return ""
    turns = ", dense and pruned in turn" if "dense" in efficiency else ""
    return f"Speed and memory were measured {', '.join(part for part in parts if part)}{turns}."


def _making(report: dict[str, Any], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of what a reader needs to know about the run."""
    method, base = report.get("method") or {}, report.get("base_model")
    paper = str(method.get("paper") or "")
    title = escape(method.get("paper_title") or "paper")
    link = f"[{title}]({paper})" if re.fullmatch(r"https://[\w./%:~-]+", paper) else ""
    name = escape(findings.method_title(report) or "")
    summary = escape(method.get("summary") or "").rstrip(".")
    parts = ("criterion", "update", "reconstruct", "allocation", "output_importance", "channel_permutation", "pattern")
    steps = {key: method.get(key) for key in parts}
    steps |= method.get("options") or {}
    settings = [code(f"{key}: {_yaml_scalar(value)}") for key, value in steps.items() if _is_said(value)]
    revision = f", revision {code(report['base_revision'])}" if report.get("base_revision") else ""
    link_to_base = f"[{escape(base)}](https://huggingface.co/{base})" if hub_base_model(report, recipe) else ""
    base_text = link_to_base or (code(base) if base else "")
    seed = number(report.get("seed"))
    making = [
        ("Base model", base_text + (revision if base_text else "")),
        ("Method", ", ".join(part for part in (name, link, summary) if part)),
        ("Settings", ", ".join(settings)),
        ("Calibration", findings.calibration(report)),
        ("Trained on", findings.training(report)),
        ("Tickets", findings.tickets(report)),
        ("Compared with other choices", watched_text(report) if report.get("legcnet") else ""),
        ("Weights that were kept", findings.displacement(report)),
        ("Fused", findings.fused(report)),
        ("Earned back", findings.earned_back(report)),
        ("Searched", searched(report.get("search"))),
        *(("Recovered", sentence) for sentence in findings.recoveries(report)),
        ("Seed", f"{seed:.0f}" if seed is not None else ""),
        ("Weights saved in", code(report["dtype"]) if report.get("dtype") else ""),
        ("Cost", findings.spent(report)),
    ]
    return [(label, value) for label, value in making if value]


def _checks(report: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": escape(check["check"]),
            "result": "PASS" if check.get("passed") else "**FAIL**",
            "detail": escape(check.get("detail") or ""),
        }
        for check in report.get("verification") or []
        if check.get("check")
    ]


def _samples(report: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """For each prompt the labelled, fenced texts that exist."""
    labels = {"prompt": "**Prompt**", "dense": "Dense", "pruned": "Pruned"}
    samples = [
        [(labels[key], fence(sample[key], "text")) for key in labels if sample.get(key)]
        for sample in report.get("samples") or []
    ]
    return [sample for sample in samples if len(sample) > 1]


def _needs(report: dict[str, Any]) -> str:
    own_code = report.get("own_code")
    if not own_code:
        return "The files are plain safetensors of the base model's architecture: nothing but `transformers` is needed."
    return (
        f"The architecture is none of transformers': its code is in {', '.join(map(code, own_code))} beside the "
        "weights and runs with `trust_remote_code=True`; read it first."
    )


def _loading(repo_id: Any, own_code: bool) -> str:
    name = json.dumps(one_line(repo_id or "PATH_OR_ID_OF_THIS_MODEL"))
    trust = ", trust_remote_code=True" if own_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        f"model = AutoModelForCausalLM.from_pretrained({name}{trust})"
    )


def _is_said(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and number(value) is None)


def _yaml_scalar(value: Any) -> str:
    return json.dumps(value, default=str) if not isinstance(value, str) or ":" in value else value
