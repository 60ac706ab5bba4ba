"""Candidates that are trained sparse from their first step: settings of dynamic sparse training, at early epochs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.bench.sweep import split_axes
from hf_prune.dynamics.spectrum import WARM_UP, depth_spectrum, recurrent_spectrum
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.fields import field_types
from hf_prune.methods.dynamic_sparse import DynamicSparseConfig, initial_masks
from hf_prune.models import RecurrentConfig
from hf_prune.plan import select_views
from hf_prune.recipe import dump_yaml
from hf_prune.search.arguments import SearchRecipe
from hf_prune.search.candidates import Look, Measurement, SpectrumSetting
from hf_prune.search.space import Choice, label, make_space
from hf_prune.sparse_training import run_sparse
from hf_prune.trained import Start, trainers
from hf_prune.training.arguments import TrainRecipe, make_train_recipe
from hf_prune.training.checkpoints import StopAtNaN
from hf_prune.training.dynamic_masks import DynamicMaskCallback
from hf_prune.training.trainer import train

# A list of these would change what is compared.
FIXED = {"method", "sparsity", "train_dense", "rounds_folder", "ignore", "averaging", "non_monotone"}


class TrainedCandidates:
    """Settings of `method: dynamic_sparse`; the budget is epochs.

    Every candidate begins with the same weights and sees the same batches as the dense twin, under the schedules of the
    whole training (learning rate and death rate of all `num_train_epochs`), and is left at the epoch that it is
    measured at; a further round trains it from the beginning, as published. Loss and spectrum are of the last windows
    of the training text, which no candidate is trained on before it is chosen.
    """

    unit = "epochs"

    def __init__(self, recipe: SearchRecipe) -> None:
        """Check every combination and load nothing yet.

        Raises:
            BadInputError: something of the recipe cannot be used, or no combination can be run.
        """
        self.search = recipe.search
        axes, self.common = split_axes(recipe.values)
        self.common["method"] = DynamicSparseConfig.info.name
        for key in axes:
            if key not in field_types(DynamicSparseConfig) or key in FIXED:
                raise BadInputError(f"{key}: candidates differ in how masks move; give this key one value.")
        self.space = make_space(axes, self._check)
        self.recipe = self._recipe(
            next(own for own in self.space.combinations() if label(own) not in self.space.refused)
        )
        epochs = self.recipe.training.get("num_train_epochs")
        if not epochs or int(epochs) != epochs or self.recipe.training.get("max_steps", -1) > 0:
            raise BadInputError(
                "num_train_epochs: candidates are compared at whole epochs; say how many, not max_steps."
            )
        self.max_budget = min(self.search.max_budget or int(epochs), int(epochs))
        if self.search.first_budget > self.max_budget:
            raise BadInputError(f"first_budget: {self.search.first_budget} epochs of {self.max_budget}; lower it.")
        self._loaded: _Loaded | None = None

    def values(self, choice: Choice) -> dict[str, Any]:
        """The flat recipe of one candidate."""
        return {**self.common, **choice}

    def _check(self, choice: Choice) -> None:
        self._recipe(choice)

    def _recipe(self, choice: Choice) -> TrainRecipe:
        return make_train_recipe(self.values(choice), DynamicSparseConfig)

    @property
    def loaded(self) -> _Loaded:
        """Text and tokenizer, loaded when they are first needed."""
        if self._loaded is None:
            self._loaded = _Loaded(self.recipe, self.search.held_out_windows)
        return self._loaded

    def dense(self, budgets: list[int]) -> dict[int, Measurement]:
        """One training, looked at on its way; none where nothing is compared with it."""
        found: dict[int, Measurement] = {}
        if not self.search.needs_spectrum:
            return found
        self._train(None, budgets, lambda budget, own: found.update({budget: own}))
        return found

    def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
        self._train(self.config(choice), budgets, look)

    def cost(self, budgets: list[int]) -> int:
        """One training passes all of them."""
        return max(budgets)

    def config(self, choice: Choice) -> DynamicSparseConfig:
        """How the masks of one candidate move."""
        return self._recipe(choice).method

    def _train(self, config: DynamicSparseConfig | None, budgets: Collection[int], look: Look) -> None:
        """Train to the last of some epochs, and measure the model at each."""
        self.train_to(config, budgets, lambda epoch, model: look(epoch, self.measured(epoch, model)))

    def held_out_loss(self, model: Any) -> float:
        """Nats a token of the windows that nothing is trained on."""
        return float(window_nll(model, self.loaded.held_out[: self.search.loss_windows]).mean())

    def measured(self, epoch: int, model: Any) -> Measurement:
        """Loss and spectrum of a model after so many epochs."""
        found = Measurement(self.held_out_loss(model))
        if self.search.needs_spectrum:
            found.spectrum, found.spectrum_seconds = self.spectrum(model, self.setting)
        found.spent = epoch
        return found

    def train_to(
        self, config: DynamicSparseConfig | None, epochs: Collection[int], look: Callable[[int, Any], None]
    ) -> None:
        """Train to the last of some epochs, None the dense twin, and hand (epoch, model) to `look` at each."""
        own, seed = self.loaded, self.recipe.text.seed
        model = own.start.make_model(None)
        callbacks: list[TrainerCallback] = []
        if config is not None:
            names = [view.parameter_name for view in select_views(model, None, config.ignore, whole=True)[0]]
            shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
            generator = torch.Generator().manual_seed(seed)
            masks = initial_masks(shapes, config.sparsity, config.initialization, generator)
            callbacks.append(DynamicMaskCallback(masks, config, seed))
        with tempfile.TemporaryDirectory() as folder:
            # What looks at the model comes before masks move: weights that have just grown are zero.
            callbacks = [StopAtNaN("candidate", Path(folder)), _AtEpochs(epochs, look), *callbacks]
            train(trainers(self.recipe, own.windows)(model, Path(folder), callbacks), None)

    @property
    def least_length(self) -> int:
        """Of a recurrent model the first tokens only warm up."""
        return WARM_UP + 1 if isinstance(self.loaded.start.config, RecurrentConfig) else 1

    @property
    def setting(self) -> SpectrumSetting:
        """How the search computes spectra."""
        return SpectrumSetting.of(self.search, self.loaded.held_out)

    def spectrum(self, model: Any, setting: SpectrumSetting) -> tuple[Tensor, float]:
        """Of a recurrent model over time, of another over depth; and the seconds that it took."""
        start, training, order = perf_counter(), model.training, self.search.spectrum_order
        windows = self.loaded.held_out[setting.first : setting.first + setting.sequences, : setting.length]
        model.eval()
        try:
            if hasattr(model, "state_jacobian"):
                if windows.shape[1] < self.least_length:
                    raise BadInputError(f"spectrum_length: the first {WARM_UP} tokens only warm up; use more.")
                found = recurrent_spectrum(model, windows, k=setting.k, order=order, seed=setting.seed)
            else:
                chunk = self.search.tangents_at_once
                found = depth_spectrum(model, windows, k=setting.k, order=order, seed=setting.seed, chunk=chunk)
        finally:
            model.train(training)
        return found, perf_counter() - start

    def spectra(
        self, choice: Choice | None, budget: int, settings: list[SpectrumSetting]
    ) -> list[tuple[Tensor, float]]:
        found: list[tuple[Tensor, float]] = []
        config = None if choice is None else self.config(choice)
        self.train_to(
            config, [budget], lambda _, model: found.extend(self.spectrum(model, setting) for setting in settings)
        )
        return found

    def finish(self, choice: Choice, notes: dict[str, Any]) -> dict[str, Any]:
        self._loaded = None
        values = self.values(choice)
        text = f"# Chosen by hf-prune search.\n{dump_yaml(values)}"
        return run_sparse(make_train_recipe(values, DynamicSparseConfig, text), notes)


class _AtEpochs(TrainerCallback):
    """Looks at the model behind the last step of some epochs, and ends the training with the last of them."""

    def __init__(self, epochs: Collection[int], look: Callable[[int, Any], None]) -> None:
        self.epochs = set(epochs)
        self.look = look

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        epoch = state.epoch or 0
        if epoch in self.epochs:
            self.look(int(epoch), kwargs["model"])
        if epoch >= max(self.epochs):
            control.should_training_stop = True


class _Loaded:
    """Where every candidate begins: tokenizer, config, windows to train on, and windows held out."""

    def __init__(self, recipe: TrainRecipe, held_out: int) -> None:
        self.start = Start(recipe)
        self.windows, self.held_out = self.start.windows.without_last(held_out, "dataset_name")
