"""How far the order of candidates depends on how their spectra are computed, and what each way costs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from hf_prune.errors import BadInputError, RunError
from hf_prune.search.candidates import Candidates, SpectrumSetting
from hf_prune.search.space import Choice

logger = logging.getLogger(__name__)


def variations(own: SpectrumSetting) -> dict[str, SpectrumSetting]:
    """Other ways to compute a spectrum by what is different, the search's own first."""
    found = {
        "the search": own,
        "half the exponents": replace(own, k=own.k // 2),
        "half the tokens": replace(own, length=own.length // 2),
        "one sequence": replace(own, sequences=1),
        "other sequences": replace(own, first=own.sequences),
        "other tangents": replace(own, seed=own.seed + 1),
    }
    first, *others = found.items()
    # With one sequence, say, "one sequence" is the search's own way.
    return dict([first, *((name, way) for name, way in others if way != own and min(way.k, way.length) > 0)])


def check_variations(candidates: Candidates) -> None:
    """Raise BadInputError where one of the other ways has too few tokens, before anything is measured."""
    assert candidates.setting is not None
    shortest = min(own.length for own in variations(candidates.setting).values())
    if shortest < candidates.least_length:
        raise BadInputError(
            f"stability_candidates: the spectra of half the tokens have {shortest}, and {candidates.least_length} are "
            "needed; raise spectrum_length or seq_length, or leave stability_candidates out."
        )


def rank_stability_if_any(candidates: Candidates, choices: list[Choice], budget: int) -> list[dict[str, Any]] | None:
    """As `rank_stability`; None, and a warning, where it fails: a finished search is worth more than this table."""
    try:
        return rank_stability(candidates, choices, budget)
    except (BadInputError, RunError, torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
        logger.warning("stability_candidates: no table, %s", error)
        return None


def rank_stability(candidates: Candidates, choices: list[Choice], budget: int) -> list[dict[str, Any]]:
    """A row for each way: Spearman's correlation of the raw distances with the search's own, mean seconds a spectrum.

    The correlation is None where distances are all alike.
    """
    from scipy.stats import spearmanr

    assert candidates.setting is not None
    settings = variations(candidates.setting)
    dense, *others = [candidates.spectra(choice, budget, list(settings.values())) for choice in (None, *choices)]
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    for place, name in enumerate(settings):
        distances = [float(torch.linalg.vector_norm(own[place][0] - dense[place][0])) for own in others]
        first = first or distances
        alike = min(len(set(distances)), len(set(first))) < 2
        seconds = [own[place][1] for own in (dense, *others)]
        rows.append(
            {
                "spectrum": name,
                "correlation": None if alike else float(spearmanr(first, distances).statistic),
                "seconds": sum(seconds) / len(seconds),
                "candidates": len(choices),
            }
        )
    return rows
