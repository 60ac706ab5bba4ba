"""How far apart two Lyapunov spectra are: raw, or after an embedding that was fitted to the spectra of other runs.

Raw L2 is what the authors' search uses. Two principal components, or an auto-encoder with the widths of the related
AeLLE work, are the alternatives; how the auto-encoder is trained is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_prune.dynamics.names import DISTANCES
from hf_prune.errors import BadInputError

Distance = Callable[[Tensor, Tensor], float]
"""Two spectra, float64 [k] each, to a number >= 0."""

# Spectra that an embedding has to be fitted to.
LEAST_FITTED = 3
COMPONENTS = 2
WIDTHS = (1024, 128, 64, 32)
TRAINING_STEPS, LEARNING_RATE = 200, 1e-3


def make_distance(name: str, others: Tensor | None = None, seed: int = 0) -> Distance:
    """A distance by name.

    Args:
        others: float [runs, k], spectra of other runs than those that are going to be judged: an embedding that has
            seen what it judges knows its noise as well. Only `pca` and `autoencoder` want it.
        seed: of the auto-encoder's first weights.

    Raises:
        BadInputError: an unknown name, or an embedding with fewer than 3 spectra, or not finite ones, to be fitted to.
    """
    if name not in DISTANCES:
        raise BadInputError(f"distance: {name!r} is unknown; choose {', '.join(DISTANCES)}.")
    if name == "raw":
        return _euclidean
    if name == "cosine":
        return _cosine
    if others is None or others.ndim != 2 or len(others) < LEAST_FITTED or not bool(others.isfinite().all()):
        raise BadInputError(
            f"distance: {name} is fitted to at least {LEAST_FITTED} finite spectra of other runs; give some, or take "
            "raw."
        )
    embed = fit_components(others) if name == "pca" else fit_autoencoder(others, seed)
    return lambda one, other: _euclidean(embed(one), embed(other))


def _euclidean(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one.double() - other.double()))


def _cosine(one: Tensor, other: Tensor) -> float:
    """1 - cosine; 1 where one of the two has no length."""
    return 1 - float(nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def with_loss(distance: float, dense_spectrum: Tensor, loss: float, dense_loss: float) -> float:
    """The distance as a share of the dense spectrum's length, plus the loss's excess as a share of the dense loss.

    Ours: the objective `both` of a search.
    """
    return distance / float(torch.linalg.vector_norm(dense_spectrum)) + (loss - dense_loss) / dense_loss


def fit_components(spectra: Tensor) -> Callable[[Tensor], Tensor]:
    """Projection of [k] on the first two principal components of `spectra`, [runs, k], unscaled."""
    spectra = spectra.double()
    mean = spectra.mean(0)
    directions = torch.linalg.svd(spectra - mean, full_matrices=False).Vh[:COMPONENTS]
    return lambda spectrum: directions @ (spectrum.double() - mean)


def fit_autoencoder(spectra: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Embedding of [k] in 32 numbers by an auto-encoder of mirrored widths that was trained on `spectra`, [runs, k].

    Exponents are centred one by one and divided by one scale for all; all runs are one batch of each Adam step.
    """
    mean, scale = spectra.mean(0).float(), spectra.std(0).square().mean().sqrt().clamp(min=1e-12).float()
    # The caller's random numbers stay where they are.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        encoder = _perceptron((spectra.shape[1], *WIDTHS))
        decoder = _perceptron((*WIDTHS[::-1], spectra.shape[1]))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LEARNING_RATE)
        inputs = (spectra.float() - mean) / scale
        for _ in range(TRAINING_STEPS):
            optimizer.zero_grad()
            nn.functional.mse_loss(decoder(encoder(inputs)), inputs).backward()
            optimizer.step()
    encoder.requires_grad_(False)
    return lambda spectrum: encoder((spectrum.float() - mean) / scale)


def _perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
