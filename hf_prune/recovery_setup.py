"""From a pruned folder and a recipe to a training: what is read, checked and refused before weights are loaded."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_prune.checkpoint.folder import PLAN_FILE, RECIPE_FILE, RECOVERY_FILE, REPORT_FILE, beside
from hf_prune.checkpoint.load import load_config, load_tokenizer, pick_device
from hf_prune.data.builtin import ModelSource, resolve_model
from hf_prune.data.text import TextData
from hf_prune.data.windows import sequence_length
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.plan import Plan
from hf_prune.preparation import check_output
from hf_prune.recipe import parse_yaml
from hf_prune.training.arguments import TrainRecipe, check_smoothing, make_training_arguments
from hf_prune.training.lora import require_peft
from hf_prune.training.recovery import RecoveryConfig
from hf_prune.training.text import Windows, open_text, training_windows

logger = logging.getLogger(__name__)


class PrunedFolder:
    """A folder that hf_prune has written: its plan, report and recipes.

    Raises:
        BadInputError: it is none.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        for name in (REPORT_FILE, PLAN_FILE, RECIPE_FILE):
            if not (self.path / name).is_file():
                raise BadInputError(
                    f"{path}: there is no pruned model that hf_prune has written, {name} is missing; give the "
                    "output_dir of `hf-prune prune`."
                )
        self.plan = Plan.load(self.path / PLAN_FILE)
        names = [RECIPE_FILE, *(RECOVERY_FILE.format(number) for number in ("", *range(2, 100)))]
        texts = {}
        for name in [REPORT_FILE, *(name for name in names if (self.path / name).is_file())]:
            try:
                texts[name] = (self.path / name).read_text(encoding="utf-8")
                self.report: dict[str, Any] = json.loads(texts[REPORT_FILE])
            except (OSError, ValueError):
                raise BadInputError(f"{self.path / name} is damaged; prune again, or get the folder again.") from None
        self.recipes = {name: text for name, text in texts.items() if name != REPORT_FILE}

    def dense_model(self, method: RecoveryConfig) -> ModelSource | None:
        """The dense model to compare with and to distil from: the one named, else what the pruning began with.

        Raises:
            BadInputError: it is needed and is not there.
        """
        if method.base_model:
            return resolve_model(method.base_model, method.base_revision)
        named = parse_yaml(self.recipes[RECIPE_FILE], RECIPE_FILE).get("model_name_or_path")
        # A ticket began with weights that had not seen its text: there is no gap to close to them.
        if not named or self.report.get("training"):
            return None
        try:
            return resolve_model(str(named), method.base_revision or self.report.get("base_revision"))
        except BadInputError as error:
            if method.needs_dense:
                raise
            logger.warning("The dense model is not measured: %s", error)
            return None


@dataclass
class Ready:
    """Everything that a recovery decides and reads before weights are loaded."""

    folder: PrunedFolder
    recipe: TrainRecipe
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    text: TextData
    windows: Windows
    evaluation: QualityEvaluation
    dense: ModelSource | None
    device: torch.device

    @property
    def work(self) -> Path:
        """Where the Trainer's checkpoints are."""
        assert self.arguments.output_dir is not None
        return Path(self.arguments.output_dir)


def prepare_recovery(path: str, recipe: TrainRecipe) -> Ready:
    """Check a recipe against the folder that it trains, without loading weights.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    recipe.require("output_dir", "eval_dataset_name")
    recipe.refuse("it follows from the folder that is trained", "model_name_or_path", "revision", *vars(recipe.fresh))
    if recipe.method.loss == "distillation" and recipe.training.get("label_smoothing_factor"):
        raise BadInputError("label_smoothing_factor: a distillation has no labels; leave the key out.")
    folder = PrunedFolder(path)
    if recipe.method.recovery == "lora" and any(view.expert is not None for view in folder.plan.views):
        raise BadInputError("recovery: lora has no adapters for the experts of a mixture; set recovery to full.")
    if recipe.method.recovery == "lora":
        require_peft()
    check_output(recipe.output)
    assert recipe.output.output_dir is not None
    work = beside(recipe.output.output_dir, ".training")
    # Before any process group: the arguments bring up the one that training wants.
    arguments = make_training_arguments(recipe.training, work, recipe.text.seed, recipe.model.device)
    distributed.initialise(recipe.model.device)
    source = str(folder.path)
    model_config = load_config(source, recipe.model)
    check_smoothing(recipe.training, next(iter(model_config.architectures or ()), "this model"))
    tokenizer = load_tokenizer(source, recipe.model)
    text = open_text(recipe.text, tokenizer)
    length = sequence_length(model_config, recipe.text.seq_length)
    dense = folder.dense_model(recipe.method)
    if recipe.method.loss == "distillation" and not dense:
        why = (
            "and what this folder's training began with had not seen its text"
            if folder.report.get("training")
            else "which the folder's recipe does not name"
        )
        raise BadInputError(f"base_model: distillation needs the dense model, {why}; give it.")
    return Ready(
        folder,
        recipe,
        arguments,
        tokenizer,
        text,
        training_windows(text, tokenizer, length, recipe.text.max_train_windows),
        QualityEvaluation(recipe.evaluation, tokenizer, model_config),
        dense,
        pick_device(recipe.model.device, distributed.local_rank()),
    )
