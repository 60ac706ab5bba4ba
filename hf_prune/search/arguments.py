"""What a search decides: flat keys like a recipe's, beside the recipe whose lists it searches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_prune.arguments import ModelArguments, OutputArguments, RunArguments
from hf_prune.dynamics.names import DISTANCES, FITTED, ORDERS
from hf_prune.errors import BadInputError
from hf_prune.fields import field_types, fill

KINDS = ("one_shot", "dynamic_sparse")
SAMPLERS = ("tpe", "random")
PRUNERS = ("elimination", "hyperband", "none")
OBJECTIVES = ("auto", "loss", "ls_distance", "both", "layer_error")
# What `auto` stands for: what told best and cost least (recipes/benchmarks/LSH.md).
BEST_OBJECTIVES = {"one_shot": "layer_error", "dynamic_sparse": "loss"}
CHOICES = {
    "search": KINDS,
    "sampler": SAMPLERS,
    "pruner": PRUNERS,
    "objective": OBJECTIVES,
    "distance": DISTANCES,
    "spectrum_order": ORDERS,
}
# What may differ when a search goes on: nothing that was measured depends on it.
MAY_CHANGE = {
    "num_candidates", "total_budget", "max_minutes", "search_dir", "stability_candidates", "num_processes", "device",
    *field_types(OutputArguments), *field_types(RunArguments),
}  # fmt: skip


@dataclass
class SearchArguments:
    """How candidates are drawn, measured and dropped.

    The budget of one candidate is counted in calibration windows (`one_shot`) or epochs (`dynamic_sparse`): more of
    them cost more and say more.

    Args:
        search: what a candidate is; `one_shot`, a way to prune a transformer once; `dynamic_sparse`, a way to train a
            model that is sparse from its first step.
        search_dir: folder of the study, the spectra and the tables; it is what `--resume` goes on with.
        sampler: `tpe` (tree-structured Parzen estimator) or `random`.
        pruner: `elimination`, the published one (keep floor(n/2) + 1, measure them again with more, until 2 are left);
            `hyperband`; `none`.
        objective: `loss`, on windows that no candidate is calibrated on; `ls_distance`, how far the Lyapunov spectrum
            is from the dense model's; `both`, the sum of the relative excess of the loss and the relative distance
            (ours); `layer_error` (of `one_shot`), how far the output of the last block that is looked at is from the
            dense model's on these windows; `auto`, layer_error of `one_shot` and loss of `dynamic_sparse`.
        num_candidates: candidates drawn, those that were drawn before included.
        first_budget: calibration windows or epochs of a candidate in the first round.
        budget_step: how many more in each further round.
        max_budget: no candidate gets more; num_calibration_samples or num_train_epochs unless given.
        total_budget: of all candidates together; no end unless given.
        max_minutes: nothing is begun after so many minutes of measuring, over all processes, spectra included.
        search_blocks: of `one_shot`, candidates are judged by the first so many blocks: only these are pruned, and the
            spectrum is over them, until a candidate gets max_budget; all of them unless given.
        finalists: the last 2 get the whole budget and are compared by loss, whatever the objective was; with 1 the best
            by the objective is taken as it is.
        search_seed: seed of the sampler, the tangents and the auto-encoder.
        distance: `raw`, `cosine`, `pca` or `autoencoder`.
        distance_runs: search_dir of another search, to whose spectra `pca` or `autoencoder` is fitted.
        num_exponents: leading exponents of a spectrum.
        spectrum_order: `textbook` or `transposed`.
        spectrum_sequences: sequences a spectrum is the mean over.
        spectrum_length: tokens of each, the 10 that a recurrent model warms up with included; seq_length unless given.
        tangents_at_once: tangents carried together; fewer take less memory.
        loss_windows: windows the loss is measured on.
        stability_candidates: of so many of the best, spectra are computed in other ways as well, to see how far their
            order depends on it; 0 for none.
    """

    search: str = "one_shot"
    search_dir: str | None = None
    sampler: str = "tpe"
    pruner: str = "elimination"
    objective: str = "auto"
    num_candidates: int = 40
    first_budget: int = 4
    budget_step: int = 4
    max_budget: int | None = None
    total_budget: int | None = None
    max_minutes: float | None = None
    search_blocks: int | None = None
    finalists: int = 2
    search_seed: int = 0
    distance: str = "raw"
    distance_runs: str | None = None
    num_exponents: int = 32
    spectrum_order: str = "textbook"
    spectrum_sequences: int = 2
    spectrum_length: int | None = None
    tangents_at_once: int = 8
    loss_windows: int = 8
    stability_candidates: int = 0

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise BadInputError(f"{key}: {getattr(self, key)!r} is unknown; choose {', '.join(choices)}.")
        if self.objective == "auto":
            self.objective = BEST_OBJECTIVES[self.search]
        if self.finalists not in (1, 2):
            raise BadInputError(f"finalists: {self.finalists} is no choice; 2 are compared in the end, or 1 is taken.")
        least = {
            "num_candidates": 2, "first_budget": 1, "budget_step": 1, "max_budget": 1, "total_budget": 1,
            "stability_candidates": 0, "num_exponents": 1, "spectrum_sequences": 1, "spectrum_length": 2,
            "tangents_at_once": 1, "loss_windows": 1, "search_blocks": 1,
        }  # fmt: skip
        for key, smallest in least.items():
            value = getattr(self, key)
            if value is not None and value < smallest:
                raise BadInputError(f"{key}: {value} is too few; use {smallest} or more.")
        if self.max_budget is not None and self.max_budget < self.first_budget:
            raise BadInputError(
                f"max_budget: {self.max_budget} is less than the {self.first_budget} of the first round; raise it or "
                "lower first_budget."
            )
        if 0 < self.stability_candidates < 3:
            raise BadInputError(
                f"stability_candidates: {self.stability_candidates} have no order to speak of; use 3 or more, or 0."
            )
        if self.search_blocks is not None and self.search != "one_shot":
            raise BadInputError(f"search_blocks: {self.search} trains the whole model; leave it out.")
        if self.objective == "layer_error" and self.search != "one_shot":
            raise BadInputError(f"objective: {self.search} has no dense layers to compare with; take another.")
        if self.distance != DISTANCES[0] and not self.needs_spectrum:
            raise BadInputError(
                f"distance: objective {self.objective} looks at no spectra; set objective to ls_distance, or leave the "
                "key out."
            )
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise BadInputError(f"max_minutes: {self.max_minutes} leaves no time; leave it out for no limit.")
        if (self.distance in FITTED) != (self.distance_runs is not None):
            raise BadInputError(
                f"distance_runs: distance {self.distance} "
                + ("is fitted to the spectra of another search; name its search_dir."
                   if self.distance in FITTED else "is fitted to nothing; leave it out.")
            )  # fmt: skip

    @property
    def held_out_windows(self) -> int:
        """Windows that losses and spectra are measured on, and nothing else."""
        return max(self.loss_windows, self.spectrum_sequences * (2 if self.stability_candidates else 1))

    @property
    def needs_spectrum(self) -> bool:
        """Whether the objective looks at the dynamics."""
        return self.objective in ("ls_distance", "both")


@dataclass
class SearchRecipe:
    """A search with its recipe: `values` are the recipe's keys, lists of choices included, unchecked."""

    search: SearchArguments
    values: dict[str, Any]
    text: str = ""
    output: OutputArguments = field(default_factory=OutputArguments)
    model: ModelArguments = field(default_factory=ModelArguments)

    @property
    def folder(self) -> Path:
        """Where the search is kept."""
        return Path(str(self.search.search_dir)).expanduser()

    @property
    def identity(self) -> str:
        """The same for searches whose measurements can be put together."""
        # What stability_candidates decides of the text that is left to the candidates.
        everything = {**asdict(self.search), **self.values, "held_out_windows": self.search.held_out_windows}
        decided = {key: value for key, value in everything.items() if key not in MAY_CHANGE}
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def make_search_recipe(values: Mapping[str, Any], text: str = "") -> SearchRecipe:
    """A search from a flat mapping.

    Raises:
        BadInputError: a key of the search, the model or the output is wrong or missing.
    """
    own = field_types(SearchArguments)
    search = fill(SearchArguments, {key: value for key, value in values.items() if key in own})
    rest = {key: value for key, value in values.items() if key not in own}
    output = fill(OutputArguments, {key: value for key, value in rest.items() if key in field_types(OutputArguments)})
    model = fill(ModelArguments, {key: value for key, value in rest.items() if key in field_types(ModelArguments)})
    if not search.search_dir:
        raise BadInputError("search_dir: the recipe does not say; name the folder that keeps the search.")
    return SearchRecipe(search, rest, text, output, model)
