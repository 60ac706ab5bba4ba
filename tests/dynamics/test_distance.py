"""Distances of spectra against numpy, scikit-learn and a family of spectra whose order is known."""

import numpy as np
import pytest
import torch
from scipy.spatial import distance as scipy_distance
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from hf_prune.dynamics.distance import DISTANCES, make_distance
from hf_prune.errors import BadInputError

RUNS = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1, True).values


def test_raw_and_cosine_are_those_of_scipy() -> None:
    one, other = RUNS[0], RUNS[1]
    assert make_distance("raw")(one, other) == pytest.approx(scipy_distance.euclidean(one, other))
    assert make_distance("cosine")(one, other) == pytest.approx(scipy_distance.cosine(one, other))


def test_principal_components_are_those_of_scikit_learn() -> None:
    fitted, judged = RUNS[:8], RUNS[8:]
    places = PCA(2, svd_solver="full").fit(fitted.numpy()).transform(judged.numpy())
    found = make_distance("pca", fitted)
    for one in range(4):
        for other in range(4):
            wanted = np.linalg.norm(places[one] - places[other])
            assert found(judged[one], judged[other]) == pytest.approx(wanted, abs=1e-10)


def test_the_autoencoder_orders_a_family_of_one_parameter() -> None:
    """Spectra that bend more and more, with noise; the embedding saw others of the family."""
    generator = torch.Generator().manual_seed(2)
    bends = torch.linspace(0, 1, 24, dtype=torch.float64)
    ramp = torch.linspace(1, -3, 40, dtype=torch.float64)
    family = ramp + bends[:, None] * ramp.square() + 0.02 * torch.randn(24, 40, generator=generator)
    found = make_distance("autoencoder", family[1::2], seed=3)
    # The caller's random numbers go on as if nothing had been trained.
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    again = make_distance("autoencoder", family[1::2], seed=3)
    assert torch.equal(torch.rand(1), wanted)
    judged = family[::2]
    measured = [found(judged[0], own) for own in judged]
    assert measured[0] == 0 and spearmanr(measured, bends[::2]).statistic > 0.97
    assert measured == [again(judged[0], own) for own in judged]


@pytest.mark.parametrize("name", ["pca", "autoencoder"])
def test_embeddings_want_other_runs(name: str) -> None:
    for others in (None, RUNS[:2], RUNS * torch.nan):
        with pytest.raises(BadInputError, match=f"distance: {name} is fitted to at least 3"):
            make_distance(name, others)
    with pytest.raises(BadInputError, match="'manhattan' is unknown"):
        make_distance("manhattan", RUNS)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_to_itself_is_nothing_and_both_ways_the_same(name: str) -> None:
    found = make_distance(name, RUNS[:8])
    assert found(RUNS[9], RUNS[9]) == pytest.approx(0, abs=1e-9)
    assert found(RUNS[9], RUNS[10]) == found(RUNS[10], RUNS[9]) > 0
