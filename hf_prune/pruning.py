"""Prune a live model: plan, then walk. The pipeline and the Python API both come through here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_prune.allocation import allocate
from hf_prune.engine.walk import ViewResult, walk
from hf_prune.errors import BadInputError
from hf_prune.methods import make_solver
from hf_prune.plan import Plan, make_plan, select_views
from hf_prune.recipe import DataArguments, PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.data.text import TextData


@dataclass
class PruneResult:
    """What was planned and what came of it.

    Attributes:
        plan: every pruned weight matrix with its target.
        views: what became of each, in the plan's order.
        forward_passes: forwards over the calibration set that it took.
    """

    plan: Plan
    views: list[ViewResult]
    forward_passes: float

    @property
    def sparsity(self) -> float:
        """Share of the pruned matrices' weights that are zero."""
        return 1 - sum(view.kept for view in self.views) / sum(view.numel for view in self.plan.views)


def plan_pruning(model: nn.Module, config: PruneConfig, base_model: str = "") -> Plan:
    """What `prune` would do to `model`, which may live on the meta device.

    Raises:
        BadInputError: targets match nothing, a pattern does not divide a layer's inputs, an allocation does not fit.
    """
    views, skipped = select_views(model, config.targets, config.ignore)
    densities, patterns = allocate(config, views)
    return make_plan(model, config, views, densities, patterns=patterns, skipped=skipped, base_model=base_model)


def prune(
    model: PreTrainedModel,
    config: PruneConfig,
    *,
    input_ids: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: Plan | None = None,
    **data: Any,
) -> PruneResult:
    """Prune a causal language model in place; it is usable at once and `save_pretrained` works as always.

    Args:
        model: a `PreTrainedModel` on one device.
        config: a method's config (`SparseGPTConfig(sparsity=0.5)`), or a `PruneConfig` with criterion and update.
        input_ids: int64 [samples, tokens], calibration windows without padding; or leave it out and give
        tokenizer: the model's tokenizer, together with the calibration keys of a recipe as keywords
            (`dataset_name="allenai/c4", dataset_config="en", num_calibration_samples=128, seq_length=2048`).
        plan: a plan made before; made here otherwise.

    Raises:
        BadInputError: config, plan, text and model do not fit together.
        RunError: the arithmetic failed (an indefinite Hessian, an overflow).
    """
    solver = make_solver(config)
    plan = plan or plan_pruning(model, config, getattr(model.config, "_name_or_path", ""))
    if input_ids is None and solver.statistics:
        arguments = DataArguments(**data)
        if tokenizer is None or arguments.dataset_name is None:
            raise BadInputError(
                f"dataset_name: {config.method or config.criterion} needs calibration text; pass input_ids, or "
                "tokenizer and dataset_name."
            )
        _, input_ids = load_calibration(arguments, tokenizer, model.config)
    result = walk(model, plan, solver, input_ids)
    return PruneResult(plan, result.views, result.forward_passes)


def load_calibration(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> tuple[TextData, Tensor]:
    """The calibration text a recipe names, and its windows, int64 [samples, tokens]."""
    from hf_prune.data.text import load_text
    from hf_prune.data.windows import calibration_windows, default_seq_length

    assert arguments.dataset_name is not None
    text = load_text(
        arguments.dataset_name,
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        text_column=arguments.text_column,
        revision=arguments.dataset_revision,
        tokenizer=tokenizer,
    )
    seq_length = arguments.seq_length or default_seq_length(model_config)
    return text, calibration_windows(text, tokenizer, arguments.num_calibration_samples, seq_length, arguments.seed)
