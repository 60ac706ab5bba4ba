"""What is measured of the dense model and of a candidate, and what the objective makes of it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.dynamics.distance import Distance, make_distance, with_loss
from hf_prune.dynamics.names import DISTANCES
from hf_prune.errors import BadInputError, RunError
from hf_prune.search.arguments import SearchRecipe
from hf_prune.search.candidates import Candidates, Measurement
from hf_prune.search.space import Choice, label
from hf_prune.search.study import DENSE, STORAGE, StudyFolder, attributes_on_disk, spectra_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)


def measure_of(recipe: SearchRecipe, candidates: Candidates) -> Distance:
    """The distance that a search names, fitted to the spectra of the other search where it is to be fitted.

    Raises:
        BadInputError: the other search has no spectra, of another length, or of the very candidates that are judged.
    """
    own = recipe.search
    if not own.distance_runs:
        return make_distance(own.distance, None, own.search_seed)
    folder = Path(own.distance_runs).expanduser()
    others = spectra_of(folder)
    if candidates.setting is not None and others.shape[1] != candidates.setting.k:
        raise BadInputError(
            f"distance_runs: spectra in {folder} have {others.shape[1]} exponents and these {candidates.setting.k}; "
            "take the num_exponents of that search."
        )
    raw = replace(recipe, search=replace(own, distance=DISTANCES[0], distance_runs=None))
    if (folder / STORAGE).is_file() and attributes_on_disk(folder / STORAGE)["identity"] == raw.identity:
        raise BadInputError(
            f"distance_runs: the search in {folder} measured these very candidates; name one of another search_seed, "
            "model or text."
        )
    return make_distance(own.distance, others, own.search_seed)


class Measuring:
    """Measures for one process and writes what it found into the study's folder.

    Args:
        measure_distance: between two spectra; see `measure_of`.
    """

    def __init__(
        self, recipe: SearchRecipe, candidates: Candidates, folder: StudyFolder, measure_distance: Distance
    ) -> None:
        self.arguments = recipe.search
        self.candidates = candidates
        self.folder = folder
        self._measure_distance = measure_distance

    @property
    def budgets(self) -> list[int]:
        """Every budget that a candidate may be measured at."""
        last = self.candidates.max_budget
        return [*range(self.arguments.first_budget, last, self.arguments.budget_step), last]

    def budgets_of(self, trial: Trial | FrozenTrial) -> list[int]:
        """What a trial is measured at."""
        if self.arguments.pruner == "hyperband" and "budget" not in trial.user_attrs:
            return self.budgets
        return [int(trial.user_attrs.get("budget", self.arguments.first_budget))]

    def dense(self) -> None:
        """Measure the dense model, once in the life of a study and of the file of its spectra."""
        study = self.folder.study
        if "dense" in study.user_attrs and (self.folder.folder / DENSE).is_file():
            return
        start = perf_counter()
        seen = self.candidates.dense(self.budgets)
        self.folder.save_spectra(
            "dense",
            {budget: torch.empty(0) if own.spectrum is None else own.spectrum for budget, own in seen.items()},
        )
        measured = {id(own): own for own in seen.values()}.values()
        study.set_user_attr(
            "dense",
            {
                "loss": {str(budget): own.loss for budget, own in seen.items() if math.isfinite(own.loss)},
                "spent": max((own.spent for own in seen.values()), default=0),
                "seconds": perf_counter() - start,
                "spectrum_seconds": sum(own.spectrum_seconds for own in measured),
            },
        )

    @property
    def dense_spectra(self) -> dict[int, Tensor]:
        return self.folder.spectra("dense")

    def candidate(self, trial: Trial, choice: Choice) -> None:
        """Measure the candidate of a trial at each of its budgets, and finish the trial."""
        import optuna

        budgets, start = self.budgets_of(trial), perf_counter()
        spectra: dict[int, Tensor] = {}
        notes: dict[str, Any] = {"spectrum_seconds": 0.0, "spent": 0}
        value = math.inf

        def look(budget: int, seen: Measurement) -> None:
            nonlocal value
            value = self.value(budget, seen)
            notes["spectrum_seconds"] += seen.spectrum_seconds
            notes.update(spent=seen.spent, loss=seen.loss, layer_error=seen.layer_error, reached=budget)
            if seen.spectrum is not None:
                spectra[budget] = seen.spectrum
                notes["distance"] = self.distance(budget, seen.spectrum)
            if len(budgets) > 1:
                trial.report(value, budget)
                if trial.should_prune():
                    raise optuna.TrialPruned

        state = None
        try:
            self.candidates.measure(choice, budgets, look)
        except optuna.TrialPruned:
            state = optuna.trial.TrialState.PRUNED
        except (BadInputError, RunError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
            # What only the model shows (inputs that do not divide into groups, say) is this candidate's own.
            value = math.inf
            notes["sentence"] = " ".join(str(error).split())
            if not isinstance(error, BadInputError):
                # It failed on its way, nobody knows where.
                notes["spent"] = self.candidates.cost(budgets)
        if not math.isfinite(value):
            notes.setdefault("sentence", "loss or spectrum is not finite.")
        if spectra:
            self.folder.save_spectra(f"trial-{trial.number:05d}", spectra)
        notes["seconds"] = perf_counter() - start
        # JSON knows no NaN.
        notes = {key: None if isinstance(own, float) and not math.isfinite(own) else own for key, own in notes.items()}
        trial.set_user_attr("found", notes)
        if state is None:
            self.folder.study.tell(trial, value)
        else:
            self.folder.study.tell(trial, state=state)
        logger.info("%s: %s %.4g, %.1f s", label(choice), self.arguments.objective, value, notes["seconds"])

    def distance(self, budget: int, spectrum: Tensor) -> float:
        """From the dense model's spectrum at the same budget; NaN where the spectrum is not finite."""
        if not bool(spectrum.isfinite().all()):
            return math.nan
        return self._measure_distance(self.dense_spectra[budget], spectrum)

    def value(self, budget: int, seen: Measurement) -> float:
        """The objective, smaller is better; infinite where it is not a number."""
        objective = self.arguments.objective
        if objective == "loss":
            value = seen.loss
        elif objective == "layer_error":
            value = math.nan if seen.layer_error is None else seen.layer_error
        else:
            assert seen.spectrum is not None
            value = self.distance(budget, seen.spectrum)
            if objective == "both":
                loss = self.folder.study.user_attrs["dense"]["loss"].get(str(budget), math.nan)
                value = with_loss(value, self.dense_spectra[budget], seen.loss, loss)
        return value if math.isfinite(value) else math.inf
