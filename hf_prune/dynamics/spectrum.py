"""Lyapunov spectra by repeated QR of tangents: of any map, of a recurrent model over time, of a transformer over depth.

Benettin et al. (1980), https://doi.org/10.1007/BF02128236; for recurrent language models as a measure of pruning the
authors of Lyapunov-spectrum hyperpruning, whose transposed order and base-2 logarithm are kept. Depth as time, leading
exponents by forward-mode differentiation and the floor are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.dynamics.names import ORDERS
from hf_prune.engine.capture import BlockRunner
from hf_prune.errors import BadInputError

# Exponents are bits a step; multiply by this for nats.
NATS_PER_BIT = math.log(2)
# A diagonal of exactly zero would be an exponent of minus infinity, and every distance to it infinite: about -40 bits.
FLOOR = 1e-12
# The authors' steps before anything is recorded.
WARM_UP = 10

Push = Callable[[Tensor], Tensor]
"""One step's linear map of tangents: float [batch, size, k] in and out."""


def lyapunov_spectrum(
    pushes: Iterable[Push], tangents: Tensor, *, warm_up: int = 0, floor: float = FLOOR
) -> tuple[Tensor, Tensor]:
    """The mean over steps of log2 R_ii, where Z = push(Q) = Q' R with a positive diagonal.

    Q is made orthonormal in every step, also in the warm-up: in exact arithmetic that leads to the Q that one QR at its
    end leads to, and in floating point no direction is lost on the way.

    Args:
        pushes: one map a step, used once and in turn: the next is asked for when its predecessor has been called.
        tangents: float [batch, size, k], orthonormal columns.
        warm_up: steps at the beginning that are not recorded.
        floor: what a smaller diagonal counts as.

    Returns:
        exponents in bits a step, float64 [batch, k] in the order of the columns, and the last Q.

    Raises:
        BadInputError: no step is left after the warm-up.
    """
    sums = torch.zeros(tangents.shape[0], tangents.shape[2], dtype=torch.float64)
    steps = 0
    for number, push in enumerate(pushes):
        tangents, diagonal = positive_qr(push(tangents))
        if number >= warm_up:
            sums += diagonal.double().clamp(min=floor).log2().cpu()
            steps += 1
    if not steps:
        raise BadInputError(f"spectrum_length: no step is left after a warm-up of {warm_up}; give longer windows.")
    return sums / steps, tangents


def mean_spectrum(exponents: Tensor) -> Tensor:
    """Exponents of one model, float64 [k]: mean over the batch, the largest first."""
    return exponents.mean(0).sort(descending=True).values


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q of the reduced QR whose R has a diagonal >= 0, and that diagonal: [..., size, k] and [..., k]."""
    # There is no QR in half precision.
    orthonormal, triangular = torch.linalg.qr(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    diagonal = triangular.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal.dtype)
    return orthonormal * signs[..., None, :], diagonal.abs()


def first_tangents(batch: int, size: int, k: int | None, seed: int, like: Tensor) -> Tensor:
    """Orthonormal [batch, size, k], alike for every sequence.

    All of them are the identity, as with the authors. Fewer are random: the Jacobian of stacked layers is block
    triangular, and axes of the first layer might never reach the others.

    Raises:
        BadInputError: there are fewer than k directions.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if k is None or k == size:
        columns = torch.eye(size, dtype=dtype)
    elif not 1 <= k < size:
        raise BadInputError(f"num_exponents: {k} of a state of {size} numbers; use 1 to {size}.")
    else:
        generator = torch.Generator().manual_seed(seed)
        columns = positive_qr(torch.randn(size, k, generator=generator, dtype=torch.float64))[0].to(dtype)
    return columns.to(like.device).expand(batch, -1, -1)


def jacobian_pushes(jacobians: Iterable[Tensor], order: str = "textbook") -> Iterator[Push]:
    """Maps from given Jacobians [batch, size, size]: J Q, the textbook's, or the authors' J^T Q."""
    check_order(order)
    for jacobian in jacobians:
        yield partial(torch.matmul, jacobian if order == "textbook" else jacobian.mT)


def step_pushes(
    steps: Iterable[Callable[[Tensor], Tensor]], state: Tensor, order: str = "textbook", chunk: int = 64
) -> Iterator[Push]:
    """Maps of steps of which only the function is known, by `torch.func.jvp` (textbook) or `vjp` (transposed).

    Args:
        steps: each takes [batch, size] to [batch, size], row by row.
        state: float [batch, size], where the first step begins.
        chunk: tangents that are carried at once, which bounds the memory.
    """
    check_order(order)
    for step in steps:
        yield partial(_push, step, state, order, chunk)
        with torch.no_grad():
            state = step(state)


def _push(step: Callable[[Tensor], Tensor], state: Tensor, order: str, chunk: int, tangents: Tensor) -> Tensor:
    if order == "textbook":

        def one(tangent: Tensor) -> Tensor:
            return torch.func.jvp(step, (state,), (tangent,))[1]
    else:
        pull = torch.func.vjp(step, state)[1]

        def one(tangent: Tensor) -> Tensor:
            return pull(tangent)[0]

    return torch.func.vmap(one, in_dims=2, out_dims=2, chunk_size=chunk)(tangents)


def check_order(order: str) -> None:
    """Raise BadInputError for an order that there is not."""
    if order not in ORDERS:
        raise BadInputError(f"spectrum_order: {order!r} is unknown; choose {' or '.join(ORDERS)}.")


def recurrent_spectrum(
    model: Any,
    input_ids: Tensor,
    *,
    k: int | None = None,
    warm_up: int = WARM_UP,
    order: str = "transposed",
    state: str = "hidden",
    jacobian: str = "closed_form",
    seed: int = 0,
    chunk: int = 64,
) -> Tensor:
    """The spectrum of a recurrent language model of `hf_prune.models` over time, from a zero state in eval mode.

    Args:
        model: has `initial_state`, `recur`, `hidden_vector`, `with_hidden`, `state_vector`, `with_state` and
            `state_jacobian`; of one in half precision a copy in float32 is looked at.
        input_ids: int64 [sequences, warm_up + recorded steps].
        k: leading exponents, all unless given.
        state: `hidden`, the layers' h with the LSTM's cells held as they are (the authors'); `full`, (h, c).
        jacobian: `closed_form` (of `hidden`, [sequences, size, size] in memory), or `automatic`.

    Returns:
        bits a token, float64 [k], the largest first.

    Raises:
        BadInputError: a choice that there is not, too short windows or too many exponents.
    """
    check_order(order)
    if state not in ("hidden", "full") or jacobian not in ("closed_form", "automatic"):
        raise BadInputError(f"state: {state} by {jacobian}; choose hidden or full, closed_form or automatic.")
    closed = jacobian == "closed_form" and state == "hidden"
    if getattr(model, "dtype", None) in (torch.bfloat16, torch.float16):
        # Products of Jacobians are not for 8 bits, nor is a QR; the weights are the same numbers.
        model = copy.deepcopy(model).float()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            pushes = _time_pushes(model, input_ids, order, state, closed, chunk)
            vector = model.hidden_vector if state == "hidden" else model.state_vector
            start = vector(model.initial_state(len(input_ids)))
            tangents = first_tangents(start.shape[0], start.shape[1], k, seed, start)
            return mean_spectrum(lyapunov_spectrum(pushes, tangents, warm_up=warm_up)[0])
    finally:
        model.train(was_training)


def _time_pushes(model: Any, input_ids: Tensor, order: str, state: str, closed: bool, chunk: int) -> Iterator[Push]:
    read, write = (
        (model.hidden_vector, model.with_hidden) if state == "hidden" else (model.state_vector, model.with_state)
    )
    current = model.initial_state(len(input_ids))
    for token in input_ids.to(model.device).T:
        if closed:
            yield from jacobian_pushes([model.state_jacobian(token, current)], order)
        else:

            def step(vector: Tensor, token: Tensor = token, current: Any = current) -> Tensor:
                return read(model.recur(token, write(current, vector))[1])

            # Not step_pushes: what the vector leaves out, the cells, moves on as well.
            yield partial(_push, step, read(current), order, chunk)
        current = model.recur(token, current)[1]


def depth_spectrum(
    model: nn.Module,
    input_ids: Tensor,
    *,
    k: int = 32,
    order: str = "textbook",
    seed: int = 0,
    chunk: int = 8,
    blocks: int | None = None,
) -> Tensor:
    """The spectrum of a transformer with depth as time: x_{l+1} = Block_l(x_l), the residual stream of a sequence.

    Our extension: the paper knows recurrent models only.

    Args:
        model: a causal language model; nothing of it is changed.
        input_ids: int64 [sequences, tokens].
        k: leading exponents of the state's tokens times width.
        order: `textbook` by forward-mode differentiation, `transposed` by the backward pass of each block.
        chunk: tangents that a block carries at once; memory is that of a forward over so many times the sequences.
        blocks: the first so many, all unless given.

    Returns:
        bits a block, float64 [k], the largest first.

    Raises:
        BadInputError: an unknown order, or more exponents than numbers in the state.
    """
    check_order(order)
    with BlockRunner(model) as runner, _differentiable_attention():
        hidden = runner.embed(input_ids)
        sequences, tokens, width = hidden.shape
        tangents = first_tangents(sequences, tokens * width, k, seed, hidden)
        pushes = _depth_pushes(runner, input_ids, hidden, order, chunk, blocks)
        return mean_spectrum(lyapunov_spectrum(pushes, tangents)[0])


def _depth_pushes(
    runner: BlockRunner, input_ids: Tensor, hidden: Tensor, order: str, chunk: int, blocks: int | None
) -> Iterator[Push]:
    for index in range(len(runner.blocks))[:blocks]:

        def push(tangents: Tensor, index: int = index, hidden: Tensor = hidden) -> Tensor:
            parts = tangents.split(chunk, dim=2)
            return torch.cat([_through_block(runner, index, input_ids, hidden, part, order) for part in parts], dim=2)

        yield push
        hidden = runner.run(index, input_ids, hidden)


def _through_block(
    runner: BlockRunner, index: int, input_ids: Tensor, hidden: Tensor, tangents: Tensor, order: str
) -> Tensor:
    """Tangents [sequences, tokens * width, k] through one block, all k as one batch of k times the sequences."""
    from torch.autograd import forward_ad

    k = tangents.shape[2]
    ids = input_ids.repeat(k, 1)
    repeated = hidden.repeat(k, 1, 1)
    along = tangents.permute(2, 0, 1).reshape(repeated.shape).to(hidden.dtype)
    if order == "textbook":
        with forward_ad.dual_level():
            output = runner.run(index, ids, forward_ad.make_dual(repeated, along))
            moved = forward_ad.unpack_dual(output).tangent
        assert moved is not None
    else:
        repeated.requires_grad_()
        output = runner.run(index, ids, repeated, gradients=True)
        (moved,) = torch.autograd.grad(output, repeated, along)
    return moved.reshape(k, hidden.shape[0], -1).permute(1, 2, 0).to(tangents.dtype)


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention of plain operations: the fused kernels know no forward-mode differentiation."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield
