"""What is measured of a candidate, and candidates that prune a transformer once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_prune.arguments import SECTIONS, StructuredConfig
from hf_prune.bench.sweep import fitting_keys, split_axes
from hf_prune.checkpoint.load import load_config, load_model, load_tokenizer, pick_device
from hf_prune.compose import belongs_to_a_part, make_config
from hf_prune.data.builtin import resolve_model
from hf_prune.dynamics.spectrum import depth_spectrum
from hf_prune.engine.capture import BlockRunner
from hf_prune.errors import BadInputError
from hf_prune.evaluation.perplexity import window_nll
from hf_prune.fields import field_types
from hf_prune.pipeline import run
from hf_prune.pruning import load_calibration, prune
from hf_prune.recipe import Recipe, dump_yaml, make_recipe
from hf_prune.search.arguments import SearchArguments, SearchRecipe
from hf_prune.search.space import Choice, Space, make_space
from hf_prune.weights import find_blocks


@dataclass
class Measurement:
    """What was found out about a candidate at one budget.

    Attributes:
        loss: nats a token on windows that nothing was calibrated on; NaN where only the first blocks were looked at.
        spectrum: bits a step, float64 [k], the largest first; None where the objective does not ask.
        layer_error: squared error of what the last of the blocks that are looked at hands on, relative to the dense
            model's, on the windows of the loss; None where candidates are trained.
        spent: budget that the candidate has used up so far.
        spectrum_seconds: a part of the candidate's seconds.
    """

    loss: float
    spectrum: Tensor | None = None
    layer_error: float | None = None
    spent: int = 0
    spectrum_seconds: float = 0.0


@dataclass(frozen=True)
class SpectrumSetting:
    """What a spectrum is computed of: k exponents of so many sequences of so many tokens from a first window on."""

    k: int
    sequences: int
    length: int
    first: int = 0
    seed: int = 0

    @classmethod
    def of(cls, search: SearchArguments, windows: Tensor) -> SpectrumSetting:
        """What a search asks for, of some windows."""
        length = search.spectrum_length or windows.shape[1]
        return cls(search.num_exponents, search.spectrum_sequences, length, seed=search.search_seed)


Look = Callable[[int, Measurement], None]
"""Is told each budget and what was found there; what it raises ends the candidate."""


class Candidates(Protocol):
    """One kind of candidate."""

    unit: str
    space: Space
    max_budget: int

    @property
    def least_length(self) -> int:
        """Tokens that a spectrum cannot be computed of fewer of."""

    @property
    def setting(self) -> SpectrumSetting | None:
        """How the search computes spectra; None where they cannot be computed in other ways."""

    def dense(self, budgets: list[int]) -> dict[int, Measurement]:
        """The dense model at each of some budgets; empty where nothing is compared with it and it is not to be had
        without a training."""

    def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
        """Measure a candidate at each of some budgets, which grow."""

    def cost(self, budgets: list[int]) -> int:
        """What a candidate spends that is measured at all of these."""

    def spectra(
        self, choice: Choice | None, budget: int, settings: list[SpectrumSetting]
    ) -> list[tuple[Tensor, float]]:
        """A candidate's spectrum (the dense model's for None) in several ways, each with its seconds."""

    def finish(self, choice: Choice, notes: dict[str, Any]) -> dict[str, Any]:
        """Make the chosen candidate's folder; `notes` go into its report."""


class OneShotCandidates:
    """Ways to prune a transformer in one go: criterion, update, reconstruction, allocation and their keys.

    The budget is calibration windows. Loss and spectrum are measured on further windows of the calibration text.
    """

    unit = "calibration windows"
    least_length = 1

    def __init__(self, recipe: SearchRecipe) -> None:
        """Check every combination and load nothing yet.

        Raises:
            BadInputError: something of the recipe cannot be used, or no combination can be run.
        """
        self.search = recipe.search
        axes, self.common = split_axes(recipe.values)
        for key in axes:
            if any(key in field_types(section) for section in SECTIONS.values()):
                raise BadInputError(f"{key}: candidates differ in how they prune; give this key one value.")
        self.optional = {key: self.common.pop(key) for key in list(self.common) if belongs_to_a_part(key)}
        self.space = make_space(axes, self._check)
        self.recipe = make_recipe(self.common)
        self.recipe.require("model_name_or_path", "dataset_name")
        own, data = self.search, self.recipe.data
        self.max_budget = min(own.max_budget or data.num_calibration_samples, data.num_calibration_samples)
        if own.first_budget > self.max_budget:
            raise BadInputError(
                f"first_budget: {own.first_budget} calibration windows of {self.max_budget}; lower it or raise "
                "num_calibration_samples."
            )
        self._loaded: _Loaded | None = None

    def _check(self, choice: Choice) -> None:
        if isinstance(self._config(choice), StructuredConfig):
            raise BadInputError("method: one that removes units leaves another state to compare; choose of the others.")

    def values(self, choice: Choice) -> dict[str, Any]:
        """The flat recipe of one candidate."""
        values = {**self.common, **choice}
        return {**values, **{key: self.optional[key] for key in fitting_keys(values, self.optional)}}

    def _config(self, choice: Choice) -> Any:
        return make_config(make_recipe(self.values(choice)).prune_options)

    @property
    def loaded(self) -> _Loaded:
        """Model and windows, loaded when they are first needed."""
        if self._loaded is None:
            self._loaded = _Loaded(self.recipe, self.search.held_out_windows)
        return self._loaded

    def dense(self, budgets: list[int]) -> dict[int, Measurement]:
        """Of all budgets with the same blocks alike: nothing is calibrated."""
        self.loaded.restore()
        found = {blocks: self._look_at(blocks) for blocks in {self._blocks(budget) for budget in budgets}}
        return {budget: found[self._blocks(budget)] for budget in budgets}

    def measure(self, choice: Choice, budgets: list[int], look: Look) -> None:
        spent = 0
        for budget in budgets:
            self.prune(choice, budget)
            spent += budget
            found = self._look_at(self._blocks(budget))
            found.spent = spent
            look(budget, found)

    def cost(self, budgets: list[int]) -> int:
        """It is pruned anew at each."""
        return sum(budgets)

    def _blocks(self, budget: int) -> int | None:
        """How many blocks are looked at with a budget, the first of them; None for all."""
        return None if budget >= self.max_budget else self.search.search_blocks

    def prune(self, choice: Choice, budget: int) -> None:
        """Prune the dense model, as much of it as is looked at, with so many calibration windows."""
        own, config, blocks = self.loaded, self._config(choice), self._blocks(budget)
        own.restore()
        own.keep_dense_outputs(self._last_block(blocks), self.search.loss_windows)
        if blocks is not None:
            prefix, modules = find_blocks(own.model)
            rest = [f"{prefix}.{index}" for index in range(blocks, len(modules))]
            config = replace(config, ignore=[*(config.ignore or []), *rest])
        prune(own.model, config, input_ids=own.calibration[:budget], seed=self.recipe.data.seed)

    def _last_block(self, blocks: int | None) -> int:
        """The last of the blocks that are looked at, by its number."""
        every = len(find_blocks(self.loaded.model)[1])
        return min(blocks or every, every) - 1

    def _look_at(self, blocks: int | None) -> Measurement:
        own, last = self.loaded, self._last_block(blocks)
        own.keep_dense_outputs(last, self.search.loss_windows)
        if blocks is not None and self.search.objective == "layer_error":
            # Nothing is asked of the blocks behind these.
            loss, outputs = math.nan, own.outputs(last, self.search.loss_windows)
        else:
            nll, outputs = own.losses_and_outputs(last, self.search.loss_windows)
            loss = float(nll.mean())
        found = Measurement(loss, layer_error=relative_error(outputs, own.dense_outputs[last]))
        if self.search.needs_spectrum:
            found.spectrum, found.spectrum_seconds = self.spectrum(self.setting, blocks)
        return found

    @property
    def setting(self) -> SpectrumSetting:
        """How the search computes spectra."""
        return SpectrumSetting.of(self.search, self.loaded.held_out)

    def spectrum(self, setting: SpectrumSetting, blocks: int | None) -> tuple[Tensor, float]:
        """Of the model as it is now, and the seconds that it took."""
        start = perf_counter()
        windows = self.loaded.held_out[setting.first : setting.first + setting.sequences, : setting.length]
        spectrum = depth_spectrum(
            self.loaded.model,
            windows,
            k=setting.k,
            order=self.search.spectrum_order,
            seed=setting.seed,
            chunk=self.search.tangents_at_once,
            blocks=blocks,
        )
        return spectrum, perf_counter() - start

    def spectra(
        self, choice: Choice | None, budget: int, settings: list[SpectrumSetting]
    ) -> list[tuple[Tensor, float]]:
        if choice is None:
            self.loaded.restore()
        else:
            self.prune(choice, budget)
        return [self.spectrum(setting, self._blocks(budget)) for setting in settings]

    def finish(self, choice: Choice, notes: dict[str, Any]) -> dict[str, Any]:
        # The search's copy of the model is not needed beside the pipeline's own.
        self._loaded = None
        values = self.values(choice)
        return run(make_recipe(values, f"# Chosen by hf-prune search.\n{dump_yaml(values)}"), notes)


def relative_error(outputs: list[Tensor], dense: list[Tensor]) -> float:
    """Squared error as a share of the dense outputs' squares, over all of them."""
    error = square = 0.0
    for one, other in zip(outputs, dense, strict=True):
        error += float((one.double() - other.double()).square().sum())
        square += float(other.double().square().sum())
    return error / square


class _Loaded:
    """A dense model with its tokenizer and a copy of its weights, calibration windows, and windows held out."""

    def __init__(self, recipe: Recipe, held_out: int) -> None:
        arguments = recipe.model
        assert arguments.model_name_or_path is not None
        source = resolve_model(arguments.model_name_or_path, arguments.revision)
        revision = source.revision or arguments.revision
        config = load_config(source.path, arguments, revision)
        self.tokenizer = load_tokenizer(source.path, arguments, revision)
        samples = recipe.data.num_calibration_samples
        wanted = {**vars(recipe.data), "num_calibration_samples": samples + held_out}
        _, windows = load_calibration(type(recipe.data)(**wanted), self.tokenizer, config)
        if len(windows) < samples + held_out:
            raise BadInputError(
                f"num_calibration_samples: {samples} and {held_out} held out are more than the {len(windows)} windows "
                "of the file; lower it."
            )
        self.calibration, self.held_out = windows[:samples], windows[samples : samples + held_out]
        self.model = load_model(source.path, arguments, pick_device(arguments.device, 0), revision)
        self._weights = {name: own.detach().clone() for name, own in self.model.named_parameters()}
        # By block, [1, tokens, hidden] a window on the CPU.
        self.dense_outputs: dict[int, list[Tensor]] = {}

    def keep_dense_outputs(self, block: int, windows: int) -> None:
        """Remember what a block hands on; the first time, when the model is dense."""
        if block not in self.dense_outputs:
            self.dense_outputs[block] = self.outputs(block, windows)

    def outputs(self, block: int, windows: int) -> list[Tensor]:
        """Of the first held-out windows: what a block hands on, without those behind it."""
        outputs: list[Tensor] = []
        with BlockRunner(self.model) as runner:
            for window in self.held_out[:windows]:
                hidden = None
                for index in range(block + 1):
                    hidden = runner.run(index, window[None], hidden)
                assert hidden is not None
                outputs.append(hidden.cpu())
        return outputs

    def losses_and_outputs(self, block: int, windows: int) -> tuple[Tensor, list[Tensor]]:
        """Of the first held-out windows: nats a token, and what a block hands on."""
        outputs: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).cpu())

        handle = find_blocks(self.model)[1][block].register_forward_hook(keep)
        try:
            return window_nll(self.model, self.held_out[:windows]), outputs
        finally:
            handle.remove()

    def restore(self) -> None:
        """Make the model dense again."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self._weights[name])
