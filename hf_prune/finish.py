"""How every run ends: a verified folder with plan, recipe, report and card, or none."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from hf_prune.arguments import ModelArguments, OutputArguments
from hf_prune.checkpoint.folder import (
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    output_folder,
)
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.verify import verify_folder
from hf_prune.description import within_plan
from hf_prune.errors import RunError
from hf_prune.evaluation.efficiency import measure_efficiency
from hf_prune.hub.card import write_card
from hf_prune.hub.push import push_folder
from hf_prune.pruning import PruneResult

logger = logging.getLogger(__name__)


@dataclass
class Stopwatch:
    """Seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`."""
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


def finish(
    output: OutputArguments,
    model: Any,
    tokenizer: Any,
    result: PruneResult,
    report: dict[str, Any],
    recipes: Mapping[str, str],
    watch: Stopwatch,
    complete: Callable[[Path], None],
    *,
    placing: Callable[[Path], None] = lambda folder: None,
    placed: Callable[[], bool] = lambda: True,
    trust_remote_code: bool = False,
) -> None:
    """Save, verify, complete, describe; the folder takes its name only when all of it worked. Then push, if asked.

    Args:
        model: what is saved; it is left on the meta device.
        result: what the files are checked against.
        report: gets its `verification`, the `own_code` that its model brings, and is what the card says.
        recipes: texts by file name, the run's own under `RECIPE_FILE`.
        complete: adds to report and folder what needs the saved files: plots, measurements.
        placing: called with the whole folder just before it takes its name.
        placed: called once the folder has its name; says whether it may be pushed.

    Raises:
        RunError: verification failed; no folder is made. Where only the push fails, the finished folder stays.
    """
    assert output.output_dir is not None
    with output_folder(output.output_dir, output.overwrite_output_dir) as folder:
        with watch.phase("save"):
            save_model(model, tokenizer, folder)
            if own_code := sorted(file.name for file in folder.glob("*.py")):
                report["own_code"] = own_code
            result.plan.save(folder / PLAN_FILE)
            for name, text in recipes.items():
                (folder / name).write_text(text, encoding="utf-8")
        with watch.phase("verify"):
            kept = {view.name: view.kept for view in result.views}
            views = [{**asdict(view), "kept": kept[view.name]} for view in result.plan.views]
            report["verification"] = [
                within_plan(result),
                *verify_folder(
                    folder, model, views, tokenizer, trust_remote_code=trust_remote_code, release_model=True
                ),
            ]
        failed = [row for row in report["verification"] if not row["passed"]]
        if failed:
            raise RunError(
                f"output_dir: the saved model failed its verification ({failed[0]['check']}: {failed[0]['detail']}); "
                "it was not kept, please report this."
            )
        complete(folder)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write_card(folder, report, recipes[RECIPE_FILE])
        placing(folder)
    if placed():
        push(output)
    elif output.push_to_hub:
        logger.warning("asked to stop: %s is finished and not pushed; hf-prune push does that.", output.output_dir)


def push(output: OutputArguments) -> None:
    """Push the finished folder, if asked."""
    if output.push_to_hub:
        assert output.output_dir is not None and output.hub_model_id is not None
        push_folder(output.output_dir, output.hub_model_id, private=output.hub_private_repo)


def efficiency(
    models: Mapping[str, str | Path],
    arguments: ModelArguments,
    device: torch.device,
    revisions: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The report's `efficiency` entry, models interleaved in one run, each loaded from where a user would load it.

    Nothing where measuring fails: what was made and measured before is not thrown away for want of it.
    """
    try:
        measured = measure_efficiency(
            models,
            dtype=arguments.dtype,
            device=str(device),
            revisions=revisions,
            trust_remote_code=arguments.trust_remote_code,
        )
    except RunError as error:
        logger.warning("Sizes and speeds were not measured: %s", error)
        return {}
    return {"efficiency": measured}
