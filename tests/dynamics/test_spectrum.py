"""Spectra against maps whose exponents are known, and a transformer's against its explicit Jacobians."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_ids, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_prune.dynamics import spectrum
from hf_prune.dynamics.spectrum import (
    FLOOR,
    NATS_PER_BIT,
    depth_spectrum,
    first_tangents,
    jacobian_pushes,
    lyapunov_spectrum,
    mean_spectrum,
    positive_qr,
    recurrent_spectrum,
    step_pushes,
)
from hf_prune.engine.capture import BlockRunner
from hf_prune.errors import BadInputError


def identity(batch: int, size: int, k: int | None = None) -> Tensor:
    return first_tangents(batch, size, k, 0, torch.zeros(1, dtype=torch.float64))


@settings(max_examples=40)
@given(size=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 1000))
def test_qr_gives_back_the_matrix_with_a_positive_diagonal(size: int, k: int, seed: int) -> None:
    k = min(k, size)
    matrix = torch.randn(3, size, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthonormal, diagonal = positive_qr(matrix)
    triangular = orthonormal.mT @ matrix
    np.testing.assert_allclose(orthonormal.mT @ orthonormal, torch.eye(k).expand(3, -1, -1), atol=1e-12)
    np.testing.assert_allclose(triangular.diagonal(dim1=1, dim2=2), diagonal, atol=1e-12)
    np.testing.assert_allclose(orthonormal @ triangular.triu(), matrix, atol=1e-12)
    assert (diagonal >= 0).all()


@pytest.mark.parametrize("order", spectrum.ORDERS)
@pytest.mark.parametrize("k", [None, 2])
def test_a_normal_map_has_the_logarithms_of_its_eigenvalues(order: str, k: int | None) -> None:
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    values = torch.tensor([1.7, -1.2, 0.8, 0.5, -0.1], dtype=torch.float64)
    matrix = basis @ values.diag() @ basis.T
    pushes = jacobian_pushes(matrix.expand(2, -1, -1) for _ in range(400))
    found = mean_spectrum(lyapunov_spectrum(pushes, identity(2, 5, k), warm_up=200)[0])
    np.testing.assert_allclose(found, values.abs().log2()[:k], atol=1e-9)


@pytest.mark.parametrize("order", spectrum.ORDERS)
def test_a_map_that_is_not_normal_has_them_in_the_long_run(order: str) -> None:
    matrix = torch.tensor([[0.9, 3.0, -1.0], [0.0, 0.5, 2.0], [0.0, 0.0, 0.2]], dtype=torch.float64)
    pushes = jacobian_pushes((matrix[None] for _ in range(600)), order)
    found = mean_spectrum(lyapunov_spectrum(pushes, identity(1, 3), warm_up=200)[0])
    np.testing.assert_allclose(found, np.log2([0.9, 0.5, 0.2]), atol=1e-9)


def test_each_order_multiplies_its_own_product() -> None:
    """The first exponent from e_1 alone is the growth of that vector under the product, one order or the other."""
    matrices = list(torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    start = identity(1, 4)[:, :, :1]
    for order in spectrum.ORDERS:
        vector = np.eye(4)[:, 0]
        for matrix in matrices:
            vector = (matrix[0].numpy() if order == "textbook" else matrix[0].numpy().T) @ vector
        found = lyapunov_spectrum(jacobian_pushes(matrices, order), start)[0]
        assert found.item() * 6 == pytest.approx(math.log2(np.linalg.norm(vector)))


def test_all_exponents_sum_to_the_logarithm_of_the_determinant() -> None:
    matrices = list(torch.randn(30, 2, 6, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
    found, _ = lyapunov_spectrum(jacobian_pushes(matrices), identity(2, 6), warm_up=10)
    volumes = torch.stack(matrices[10:]).det().abs().log2().mean(0)
    np.testing.assert_allclose(found.sum(1), volumes, rtol=1e-10)


def henon(state: Tensor) -> Tensor:
    x, y = state.unbind(1)
    return torch.stack([1 - 1.4 * x * x + y, 0.3 * x], 1)


def lorenz(state: Tensor, seconds: float = 0.02) -> Tensor:
    def velocity(at: Tensor) -> Tensor:
        x, y, z = at.unbind(1)
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)

    a = velocity(state)
    b = velocity(state + seconds / 2 * a)
    c = velocity(state + seconds / 2 * b)
    d = velocity(state + seconds * c)
    return state + seconds / 6 * (a + 2 * b + 2 * c + d)


def logistic(state: Tensor) -> Tensor:
    return 4 * state * (1 - state)


# The mean over many short orbits is that over a long one; the last number is how far the mean may be off.
KNOWN = {
    "henon": (henon, [0.4192, -1.6232], 1.0, 2, 0.006),
    "lorenz": (lorenz, [0.906, 0.0, -14.572], 0.02, 3, 0.03),
    "logistic": (logistic, [NATS_PER_BIT], 1.0, 1, 0.003),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_systems(name: str) -> None:
    step, wanted, seconds, size, tolerance = KNOWN[name]
    generator = torch.Generator().manual_seed(0)
    state = 0.2 + 0.1 * torch.rand(400, size, generator=generator, dtype=torch.float64)
    # Steps to reach the attractor, for tangents to turn, and on record.
    transient, warm_up, recorded = 100, 100, 200
    if name == "lorenz":
        # All over the attractor's surroundings: orbits that begin together stay together for long.
        state = torch.tensor([0.0, 0.0, 25.0]) + 10 * torch.randn(800, 3, generator=generator, dtype=torch.float64)
        transient, warm_up, recorded = 400, 250, 250
    for _ in range(transient):
        state = step(state)
    pushes = step_pushes((step for _ in range(warm_up + recorded)), state)
    tangents = identity(len(state), size)
    found = mean_spectrum(lyapunov_spectrum(pushes, tangents, warm_up=warm_up)[0]) * NATS_PER_BIT / seconds
    np.testing.assert_allclose(found, wanted, atol=tolerance)


@pytest.mark.parametrize("order", spectrum.ORDERS)
def test_tangents_of_a_function_are_those_of_its_jacobian(order: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    state, jacobians = start, []
    for _ in range(8):
        state = (state @ weight.T).tanh()
        jacobians.append((1 - state.square())[:, :, None] * weight)
    by_function = step_pushes((lambda x: (x @ weight.T).tanh() for _ in range(8)), start, order, chunk=2)
    tangents = identity(3, 5, 3)
    found, expected = (lyapunov_spectrum(own, tangents)[0] for own in (by_function, jacobian_pushes(jacobians, order)))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_direction_that_dies_has_the_floors_exponent() -> None:
    matrix = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))[None]
    found = mean_spectrum(lyapunov_spectrum(jacobian_pushes([matrix] * 5), identity(1, 2))[0])
    assert found.tolist() == [1.0, pytest.approx(math.log2(FLOOR))]


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(BadInputError, match="spectrum_length: no step"):
        lyapunov_spectrum(jacobian_pushes([torch.eye(2)[None]]), torch.eye(2)[None], warm_up=1)
    with pytest.raises(BadInputError, match="num_exponents: 6 of a state of 5"):
        identity(1, 5, 6)
    with pytest.raises(BadInputError, match="spectrum_order: 'reversed' is unknown"):
        list(jacobian_pushes([], "reversed"))


def block_jacobians(model: torch.nn.Module, input_ids: Tensor) -> list[Tensor]:
    """d Block(x) / d x of each block at one sequence, [tokens * width, tokens * width]."""
    matrices = []
    with BlockRunner(model) as runner:
        hidden = runner.embed(input_ids)
        for index in range(len(runner.blocks)):

            def block(flat: Tensor, index: int = index) -> Tensor:
                return runner.run(index, input_ids, flat.view(1, input_ids.shape[1], -1), gradients=True).flatten()

            matrices.append(torch.autograd.functional.jacobian(block, hidden.flatten()))
            hidden = runner.run(index, input_ids, hidden)
    return matrices


@pytest.mark.parametrize("order", spectrum.ORDERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_depth_exponents_are_those_of_the_explicit_jacobians(family: str, order: str) -> None:
    model, input_ids = tiny_model(family, torch.float64), tiny_ids(2, 4)
    k = 6
    found = depth_spectrum(model, input_ids, k=k, order=order, chunk=4)
    totals = []
    for sequence in input_ids:
        jacobians = block_jacobians(model, sequence[None])
        tangents = first_tangents(1, jacobians[0].shape[0], k, 0, jacobians[0])[0].numpy()
        total = np.zeros(k)
        for jacobian in jacobians:
            matrix = jacobian.numpy() if order == "textbook" else jacobian.numpy().T
            tangents, triangular = np.linalg.qr(matrix @ tangents)
            total += np.log2(np.abs(np.diag(triangular)))
        totals.append(total / len(jacobians))
    np.testing.assert_allclose(found, np.sort(np.mean(totals, 0))[::-1], atol=1e-9)


def test_depth_exponents_add_up_to_the_volume_that_the_blocks_product_spans() -> None:
    """An SVD check: the whole product's log |det| is the sum of the logarithms of its singular values."""
    model, input_ids = tiny_model("llama", torch.float64), tiny_ids(1, 3)
    size = 3 * 32
    found = depth_spectrum(model, input_ids, k=size)
    product = torch.linalg.multi_dot(block_jacobians(model, input_ids)[::-1])
    # Llama's norms compute in float32 whatever the model does.
    assert found.sum().item() * 3 == pytest.approx(torch.linalg.svdvals(product).log2().sum().item(), rel=1e-6)


def test_depth_exponents_depend_on_no_chunk_and_leave_the_model_alone() -> None:
    model, input_ids = tiny_model("qwen3"), tiny_ids(2, 8)
    before = model(input_ids=input_ids).logits
    found = [depth_spectrum(model, input_ids, k=5, chunk=chunk) for chunk in (1, 5)]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert torch.equal(model(input_ids=input_ids).logits, before)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held that any operation has made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(own.numel() for own in tree_leaves(made) if isinstance(own, torch.Tensor))])
        return made


@pytest.mark.parametrize("order", ["textbook", "transposed"])
def test_a_block_carries_no_more_tangents_than_it_may(order: str) -> None:
    """Two at once leave the tangents themselves the largest thing there is; all at once, what a block makes of them."""
    model, tokens, k = tiny_model("llama"), 24, 24
    largest = {}
    for chunk in (2, k):
        with Largest() as seen:
            depth_spectrum(model, tiny_ids(1, tokens), k=k, chunk=chunk, order=order)
        largest[chunk] = seen.numbers
    assert largest[2] == k * tokens * model.config.hidden_size
    assert largest[k] >= k * tokens * model.config.intermediate_size


class StackedLSTM(torch.nn.Module):
    """Two layers as equations, with what `recurrent_spectrum` asks of a model; the state is (h1, c1, h2, c2)."""

    def __init__(self, size: int = 3, vocabulary: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)

        def random(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.size, self.device = size, torch.device("cpu")
        self.embedding = random(vocabulary, size)
        # Gates in the order i, f, g, o.
        self.w, self.u = (torch.nn.ParameterList(random(4, size, size) for _ in range(2)) for _ in range(2))

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch, self.size, dtype=torch.float64) for _ in range(4))

    def gates(self, layer: int, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        both = torch.einsum("gij,bj->gbi", self.w[layer], inputs) + torch.einsum("gij,bj->gbi", self.u[layer], hidden)
        return tuple(both)

    def recur(self, token: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs, after = self.embedding[token], []
        for layer in range(2):
            hidden, cell = state[2 * layer : 2 * layer + 2]
            i, f, g, o = self.gates(layer, inputs, hidden)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            inputs = o.sigmoid() * cell.tanh()
            after += [inputs, cell]
        return inputs, tuple(after)

    def hidden_vector(self, state: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(state[::2], 1)

    def with_hidden(self, state: tuple[Tensor, ...], vector: Tensor) -> tuple[Tensor, ...]:
        one, two = vector.split(self.size, 1)
        return one, state[1], two, state[3]

    def state_vector(self, state: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(state, 1)

    def with_state(self, state: tuple[Tensor, ...], vector: Tensor) -> tuple[Tensor, ...]:
        return tuple(vector.split(self.size, 1))

    def state_jacobian(self, token: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """The authors' closed form, cells held constant: block lower triangular over the layers."""
        inputs, rows = self.embedding[token], []
        for layer in range(2):
            hidden, cell = state[2 * layer : 2 * layer + 2]
            i, f, g, o = self.gates(layer, inputs, hidden)
            after = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            slope = [own.sigmoid() * (1 - own.sigmoid()) for own in (i, f, o)]
            outer = o.sigmoid() * (1 - after.tanh().square())
            factors = [outer * slope[0] * g.tanh(), outer * slope[1] * cell,
                       outer * i.sigmoid() * (1 - g.tanh().square()), slope[2] * after.tanh()]  # fmt: skip
            by_hidden, by_input = (
                sum(factor[:, :, None] * matrix for factor, matrix in zip(factors, own[layer], strict=True))
                for own in (self.u, self.w)
            )
            before = [by_input @ rows[0][0], by_hidden] if layer else [by_hidden, torch.zeros_like(by_hidden)]
            rows.append(before)
            inputs = o.sigmoid() * after.tanh()
        return torch.cat([torch.cat(row, 2) for row in rows], 1)


@pytest.mark.parametrize("order", spectrum.ORDERS)
def test_a_recurrent_models_exponents_by_closed_form_by_function_and_by_explicit_products(order: str) -> None:
    model, warm_up = StackedLSTM(), 3
    input_ids = torch.randint(0, 7, (2, 10), generator=torch.Generator().manual_seed(8))
    for state, k in (("hidden", None), ("hidden", 4), ("full", None)):
        kinds = ("closed_form", "automatic") if state == "hidden" else ("automatic",)
        found = [
            recurrent_spectrum(model, input_ids, k=k, warm_up=warm_up, order=order, state=state, jacobian=kind)
            for kind in kinds
        ]
        wanted = np.sort(np.mean([by_products(model, own, k, warm_up, order, state) for own in input_ids], 0))[::-1]
        for own in found:
            np.testing.assert_allclose(own, wanted, atol=1e-5)


def by_products(
    model: StackedLSTM, sequence: Tensor, k: int | None, warm_up: int, order: str, state: str
) -> np.ndarray:
    """Exponents of one sequence by numpy from Jacobians that autograd gives."""
    full = state == "full"
    read, write = (model.state_vector, model.with_state) if full else (model.hidden_vector, model.with_hidden)
    current = model.initial_state(1)
    tangents = first_tangents(1, read(current).shape[1], k, 0, model.embedding)[0].numpy()
    total = np.zeros(tangents.shape[1])
    for step, token in enumerate(sequence[:, None]):

        def move(vector: Tensor, token: Tensor = token, now: tuple[Tensor, ...] = current) -> Tensor:
            return read(model.recur(token, write(now, vector))[1])[0]

        jacobian = torch.autograd.functional.jacobian(move, read(current))[:, 0].numpy()
        tangents, triangular = np.linalg.qr((jacobian if order == "textbook" else jacobian.T) @ tangents)
        if step >= warm_up:
            total += np.log2(np.maximum(np.abs(np.diag(triangular)), FLOOR))
        current = tuple(part.detach() for part in model.recur(token, current)[1])
    return total / (len(sequence) - warm_up)
