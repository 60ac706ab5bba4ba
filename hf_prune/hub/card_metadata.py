"""The metadata of a card through huggingface_hub's own classes: what the Hub can filter, link and plot.

`model-index` (EvalResult) is the model page's form, `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results)
the benchmark pages'.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_prune.report import findings
from hf_prune.report.figures import dig, number
from hf_prune.report.markdown import one_line
from hf_prune.report.privacy import LOCAL_TEXT, is_private

METRICS = {"perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}


def card_data(report: dict[str, Any], recipe: dict[str, Any]) -> ModelCardData:
    """The metadata block: what the Hub can filter, link and plot."""
    pattern, method = findings.pattern_of(report), dig(report, "method", "name")
    results = _evaluation_results(report)
    kind = () if report.get("structure") else ("sparse",)
    return ModelCardData(
        base_model=hub_base_model(report, recipe),
        license=report.get("base_license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in ("hf_prune", "pruning", *kind, method, pattern) if tag],
        datasets=_hub_datasets(report) or None,
        metrics=[result.metric_type for result in results] or None,
        model_name=findings.repo_name(report) if results else None,
        eval_results=results or None,
    )


def _hub_datasets(report: dict[str, Any]) -> list[str]:
    """What the model was calibrated or trained on, as far as it lies on the Hub."""
    used = [report.get("calibration"), report.get("training")]
    used += [recovery.get("training") for recovery in report.get("recoveries") or []]
    return list(dict.fromkeys(name for text in used if (name := _hub_dataset(text))))


def eval_result_entries(report: dict[str, Any]) -> list[EvalResultEntry]:
    """What .eval_results/ says; empty unless the evaluation text is a dataset on the Hub, which the format asks for."""
    dataset = _hub_dataset(report.get("evaluation"))
    if dataset is None:
        return []
    return [
        EvalResultEntry(
            dataset_id=dataset,
            # The dataset is no registered benchmark with task ids of its own, so the metric names the task.
            task_id=metric,
            value=value,
            dataset_revision=dig(report, "evaluation", "revision"),
            notes=", ".join(f"{key}={value}" for key, value in {"metric": metric, **_protocol(report)}.items()),
        )
        for metric, value in _figures(report).items()
    ]


def _evaluation_results(report: dict[str, Any]) -> list[EvalResult]:
    """The model-index: the figures of the pruned model with the text they were measured on."""
    evaluation = report.get("evaluation") or {}
    private = is_private(evaluation)
    name = LOCAL_TEXT if private else one_line(evaluation.get("dataset") or "unknown")
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=name.removeprefix("builtin:").replace(" ", "-"),
            dataset_name=name,
            dataset_config=None if private else evaluation.get("config"),
            dataset_split=None if private else evaluation.get("split"),
            dataset_revision=None if private else evaluation.get("revision"),
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=value,
            metric_args=_protocol(report) or None,
        )
        for metric, value in _figures(report).items()
    ]


def _figures(report: dict[str, Any]) -> dict[str, float]:
    pruned = dig(report, "evaluation", "pruned")
    return {metric: value for metric in METRICS if (value := number(dig(pruned, metric))) is not None}


def _protocol(report: dict[str, Any]) -> dict[str, Any]:
    keys = ("seq_length", "windows", "add_bos", "dtype")
    return {key: value for key in keys if (value := dig(report, "evaluation", key)) is not None}


def hub_base_model(report: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """The base model's id on the Hub; None for one from a local folder, whose bare name would link to a stranger."""
    base, source = report.get("base_model"), recipe.get("model_name_or_path")
    from_folder = isinstance(source, str) and "/" not in str(base) and Path(source).exists()
    return base if _is_hub_id(base) and not from_folder else None


def _is_hub_id(name: Any) -> bool:
    """Whether a name can stand in metadata that links to the Hub: a well-formed id that is no folder here."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _hub_dataset(text: Any) -> str | None:
    """The Hub id of a text; None for private and packaged ones."""
    name = dig(text, "dataset")
    return name if name and not is_private(text) and _is_hub_id(name) else None
