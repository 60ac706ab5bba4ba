"""From a recipe to a recorded fine-tuning: what is read, checked and refused before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_prune.checkpoint.load import load_config, load_tokenizer, pick_device, skeleton
from hf_prune.data.builtin import ModelSource, resolve_model
from hf_prune.data.windows import sequence_length
from hf_prune.engine import distributed
from hf_prune.errors import BadInputError
from hf_prune.evaluation.quality import QualityEvaluation
from hf_prune.methods.intra_fusion import IntraFusionConfig
from hf_prune.methods.legcnet import LEGCNetConfig
from hf_prune.plan import Plan
from hf_prune.preparation import check_output, check_unpruned
from hf_prune.pruning import plan_pruning
from hf_prune.structure.budget import budget_of_units
from hf_prune.training.arguments import TrainRecipe, make_training_arguments, planned_steps
from hf_prune.training.causes import target_steps
from hf_prune.training.rounds import rounds_place
from hf_prune.training.text import Windows, open_text, training_windows

SPARSITY = 0.1


@dataclass
class Ready:
    """Everything a recipe decides before weights are loaded."""

    recipe: TrainRecipe
    source: ModelSource
    tokenizer: Any
    windows: Windows
    target: Tensor
    evaluation: QualityEvaluation
    config: IntraFusionConfig
    plan: Plan
    text: Any
    arguments: Any
    device: torch.device
    steps: int

    @property
    def folder(self) -> Path:
        """Where training and recording are kept."""
        return rounds_place(str(self.recipe.output.output_dir), self.recipe.method.rounds_folder)

    @property
    def recorded(self) -> int:
        """Steps that are recorded."""
        return int(self.recipe.method.recorded(self.steps))


def prepare_units(recipe: TrainRecipe) -> Ready:
    """Check a recipe against its model without loading weights.

    Raises:
        BadInputError: something handed over cannot be used; nothing has been written.
    """
    recipe.refuse("units are those of a model that has been trained", "model_type", "tokenizer_name", "vocab_size")
    recipe.require("output_dir", "model_name_or_path", "dataset_name", "eval_dataset_name")
    if recipe.model.dtype not in ("auto", "float32"):
        raise BadInputError("dtype: weights train in float32; leave the key out, or write bf16: true.")
    method: LEGCNetConfig = recipe.method
    check_output(recipe.output)
    rounds_place(str(recipe.output.output_dir), method.rounds_folder)
    arguments = make_training_arguments(recipe.training, Path("unused"), recipe.text.seed, recipe.model.device)
    distributed.initialise(recipe.model.device)
    model = recipe.model
    source = resolve_model(str(model.model_name_or_path), model.revision)
    revision = source.revision or model.revision
    check_unpruned(source.path, revision)
    model_config = load_config(source.path, model, revision)
    tokenizer = load_tokenizer(source.path, model, revision)
    text = open_text(recipe.text, tokenizer)
    length = sequence_length(model_config, recipe.text.seq_length)
    every = training_windows(text, tokenizer, length, recipe.text.max_train_windows).input_ids
    held_out = recipe.fresh.target_windows
    if len(every) - held_out < 2:
        raise BadInputError(
            f"target_windows: {held_out} of {len(every)} windows leave nothing to train on; lower it or seq_length."
        )
    bare = skeleton(model_config, model)
    config = IntraFusionConfig(fusion="none", units=list(method.units))
    sparsity, budget = budget_of_units(bare, method.units, method.sparsity or SPARSITY)
    config = replace(config, sparsity=sparsity, budget=budget)
    plan = plan_pruning(bare, config, source.base_model)
    ready = Ready(
        recipe,
        source,
        tokenizer,
        Windows(every[:-held_out]),
        every[-held_out:],
        QualityEvaluation(recipe.evaluation, tokenizer, model_config),
        config,
        plan,
        text,
        arguments,
        pick_device(model.device, distributed.local_rank()),
        planned_steps(arguments, len(every) - held_out),
    )
    target_steps(method, ready.recorded)
    return ready
