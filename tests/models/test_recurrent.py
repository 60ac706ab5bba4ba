"""Recurrent language models against torch's LSTM, loops of plain numpy, brute force and automatic derivatives."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import expit, softmax
from tiny_recurrent import RECURRENT, recurrent_model
from torch import Tensor, nn

from hf_prune import WandaConfig, prune
from hf_prune.dynamics.spectrum import ORDERS, recurrent_spectrum
from hf_prune.models import AWDLSTMMoSConfig, RHNConfig, RHNForCausalLM, StackedLSTMConfig
from hf_prune.plan import select_views

WORDS = 7


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def of_layers(model: Any, input_ids: Tensor) -> np.ndarray:
    """What leaves the last layer."""
    return model._run(input_ids, model.initial_state(len(input_ids)))[0].detach().numpy()


@pytest.mark.parametrize("training", [True, False], ids=["kernel", "stepwise"])
def test_the_lstm_is_torchs(training: bool) -> None:
    model = recurrent_model("stacked_lstm", vocab_size=WORDS, embedding_size=6).train(training)
    other = nn.LSTM(6, 6, num_layers=2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            other.get_parameter(f"weight_ih_l{number}").copy_(layer.input.weight)
            other.get_parameter(f"weight_hh_l{number}").copy_(layer.recurrent.weight)
            other.get_parameter(f"bias_ih_l{number}").copy_(layer.recurrent.bias)
            other.get_parameter(f"bias_hh_l{number}").zero_()
        wanted, (hidden, cell) = other(model.embed_tokens(tokens()))
        found, state = model._run(tokens(), model.initial_state(2))
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    for number, (own_hidden, own_cell) in enumerate(state.layers):
        np.testing.assert_allclose(own_hidden, hidden[number], atol=1e-12)
        np.testing.assert_allclose(own_cell, cell[number], atol=1e-12)


def test_the_highway_network_is_its_equations() -> None:
    model = recurrent_model("rhn", vocab_size=WORDS)
    weights = {name: own.detach().numpy() for name, own in model.named_parameters()}
    for row, sequence in enumerate(tokens()):
        inputs = weights["embed_tokens.weight"][sequence]
        for layer in range(2):
            name, state, outputs = f"layers.{layer}", np.zeros(6), []
            for vector in inputs:
                for depth in range(3):
                    own = weights[f"{name}.recurrent.{depth}.weight"] @ state
                    own = own + weights[f"{name}.recurrent.{depth}.bias"]
                    if depth == 0:
                        own = own + weights[f"{name}.input.weight"] @ vector
                    new, transform = np.tanh(own[:6]), expit(own[6:])
                    state = new * transform + state * (1 - transform)
                outputs.append(state)
            inputs = np.array(outputs)
        np.testing.assert_allclose(of_layers(model, tokens())[row], inputs, atol=1e-12)


def test_the_mixture_of_softmaxes_is_one() -> None:
    model = recurrent_model("awd_lstm_mos", vocab_size=WORDS)
    hidden = of_layers(model, tokens())
    with torch.no_grad():
        found = model(tokens()).logits.exp().numpy()
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)
    weights = {name: own.detach().numpy() for name, own in model.named_parameters()}
    for row, time in np.ndindex(2, 9):
        shares = softmax(weights["prior.weight"] @ hidden[row, time])
        latent = np.tanh(weights["latent.weight"] @ hidden[row, time] + weights["latent.bias"])
        wanted = np.zeros(WORDS)
        for number, share in enumerate(shares):
            # Tied: the words' vectors are the embeddings.
            scores = weights["embed_tokens.weight"] @ latent[5 * number : 5 * number + 5] + weights["lm_head.bias"]
            wanted += share * softmax(scores)
        np.testing.assert_allclose(found[row, time], wanted, atol=1e-12)


@pytest.mark.parametrize("kind", RECURRENT)
def test_going_on_from_a_state_is_the_whole_sequence(kind: str) -> None:
    model = recurrent_model(kind)
    with torch.no_grad():
        whole = model(tokens(), use_cache=True)
        one = model(tokens()[:, :4], use_cache=True)
        # Twice, as the state that is handed over stays what it was.
        for _ in range(2):
            rest = model(tokens()[:, 4:], past_key_values=one.past_key_values)
            np.testing.assert_allclose(rest.logits, whole.logits[:, 4:], atol=1e-12)
        assert (one.past_key_values.get_seq_length(), rest.past_key_values.get_seq_length()) == (4, 9)
        state = model.initial_state(2)
        for time in range(9):
            hidden, state = model.recur(tokens()[:, time], state)
            np.testing.assert_allclose(model.logits(hidden), whole.logits[:, time], atol=1e-12)
        np.testing.assert_allclose(model(tokens(), logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-12)
        np.testing.assert_allclose(model.train()(tokens()).logits, whole.logits, atol=1e-12)
    loss = nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert model(tokens(), labels=tokens()).loss.item() == pytest.approx(loss.item())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", RECURRENT)
def test_padding_leaves_no_trace(kind: str, training: bool) -> None:
    model = recurrent_model(kind).train(training)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        found = model(tokens(), attention_mask=mask).logits
        np.testing.assert_allclose(found[0, 3:], model(tokens()[:1, 3:]).logits[0], atol=1e-12)
        np.testing.assert_allclose(found[1], model(tokens()[1:]).logits[0], atol=1e-12)


@pytest.mark.parametrize("kind", RECURRENT)
def test_generation_is_brute_force(kind: str) -> None:
    model = recurrent_model(kind, vocab_size=WORDS)
    found = model.generate(tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=6, do_sample=False)
    wanted = tokens()
    with torch.no_grad():
        for _ in range(6):
            wanted = torch.cat([wanted, model(wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, wanted)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    padded = model.generate(tokens(), attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = model.generate(
        tokens()[:1, 3:], attention_mask=torch.ones(1, 6, dtype=torch.int64), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(padded[:1, 9:], alone[:, 6:])
    # As many beams as words look at every continuation by two words.
    found = model.generate(
        tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=2, num_beams=WORDS, do_sample=False
    )
    for row, best in zip(tokens(), found[:, 9:].tolist(), strict=True):
        pairs = list(itertools.product(range(WORDS), repeat=2))
        rows = torch.cat([row.expand(len(pairs), -1), torch.tensor(pairs)], 1)
        with torch.no_grad():
            scores = model(rows).logits.log_softmax(-1)[:, -3:-1]
        sums = scores.gather(2, torch.tensor(pairs)[..., None]).sum((1, 2))
        assert best == list(pairs[int(sums.argmax())])


@pytest.mark.parametrize("kind", RECURRENT)
def test_derivatives_by_closed_form_are_those_of_torch_func(kind: str) -> None:
    model = recurrent_model(kind)
    with torch.no_grad():
        _, state = model._run(tokens(), model.initial_state(2))
        token = torch.tensor([2, 5])
        found = model.state_jacobian(token, state)

    def after(row: int) -> Any:
        def step(vector: Tensor) -> Tensor:
            whole = model.hidden_vector(state).detach().clone()
            whole = torch.cat([whole[:row], vector[None], whole[row + 1 :]])
            return model.hidden_vector(model.recur(token, model.with_hidden(state, whole))[1])[row]

        return step

    for row in range(2):
        wanted = torch.func.jacrev(after(row))(model.hidden_vector(state)[row])
        np.testing.assert_allclose(found[row], wanted.detach(), atol=1e-10)
    assert torch.equal(
        model.state_vector(model.with_state(state, model.state_vector(state))), model.state_vector(state)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", RECURRENT)
def test_both_ways_give_one_spectrum(kind: str, order: str) -> None:
    model = recurrent_model(kind)
    for k in (None, 3):
        found = [
            recurrent_spectrum(model, tokens(length=14), k=k, warm_up=4, order=order, jacobian=jacobian)
            for jacobian in ("closed_form", "automatic")
        ]
        np.testing.assert_allclose(*found, atol=1e-5)
    # In half precision the weights are other numbers, and the arithmetic is float32's.
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).double()
    found = [recurrent_spectrum(own, tokens(length=14), k=3, warm_up=4, order=order) for own in (half, exact)]
    np.testing.assert_allclose(*found, atol=1e-4)
    full = recurrent_spectrum(model, tokens(length=14), warm_up=4, order=order, state="full")
    cells = 0 if kind == "rhn" else sum(layer.size for layer in model.layers)
    assert len(full) == sum(layer.size for layer in model.layers) + cells and bool(full.isfinite().all())


def test_adapters_learn() -> None:
    """They stand in the place of linear layers, which torch's kernel would pass by."""
    model = recurrent_model("stacked_lstm", torch.float32, weight_dropout=0.5)
    adapted = get_peft_model(model, LoraConfig(target_modules=["input", "recurrent"], r=2, init_lora_weights=False))
    adapted.train()(tokens(), labels=tokens()).loss.backward()
    learning = {name: own for name, own in adapted.named_parameters() if own.requires_grad}
    assert len(learning) == 8 and all(bool(own.grad.any()) for own in learning.values())


def test_variational_dropout_is_one_mask_a_sequence() -> None:
    same = torch.full((3, 8), 4)
    for variational in (True, False):
        model = recurrent_model("stacked_lstm", input_dropout=0.5, variational_dropout=variational, hidden_size=40)
        torch.manual_seed(0)
        embedded = model.train()._embed(same) / model.embed_tokens(same)
        assert set(embedded.detach().round(decimals=9).unique().tolist()) == {0.0, 2.0}
        assert torch.equal(embedded, embedded[:, :1].expand_as(embedded)) is variational
        assert not torch.equal(embedded[0], embedded[1])


def test_embedding_dropout_drops_words_everywhere() -> None:
    model = recurrent_model("awd_lstm_mos", vocab_size=WORDS, embedding_dropout=0.4).train()
    input_ids = tokens(6, 20)
    share = (model._embed(input_ids) / model.embed_tokens(input_ids)).detach().round(decimals=6)
    for word in range(WORDS):
        assert share[input_ids == word].unique().tolist() in ([0.0], [round(1 / 0.6, 6)])


def test_weight_dropout_is_of_the_recurrent_matrix() -> None:
    model = recurrent_model("stacked_lstm", weight_dropout=0.5, num_hidden_layers=1)
    padded = torch.ones_like(tokens())
    padded[0, 0] = 0
    for mask in (None, padded):
        torch.manual_seed(3)
        found = model.train()(tokens(), attention_mask=mask).logits
        other = recurrent_model("stacked_lstm", num_hidden_layers=1)
        torch.manual_seed(3)
        recurrent = other.layers[0].recurrent.weight
        recurrent.data = nn.functional.dropout(recurrent.data, 0.5)
        assert 0.2 < (recurrent == 0).double().mean() < 0.8
        np.testing.assert_allclose(found.detach(), other(tokens(), attention_mask=mask).logits.detach(), atol=1e-12)
    assert torch.equal(model.eval()(tokens()).logits, model(tokens()).logits)


def test_highway_state_dropout_drops_from_the_state() -> None:
    """All but dropped, the state goes its own way: what is left of each step are gates that see no state."""
    for variational in (True, False):
        model = recurrent_model("rhn", hidden_dropout=1 - 1e-9, variational_dropout=variational, num_hidden_layers=1)
        found = model.train()._run(tokens(), model.initial_state(2))[0]
        other = recurrent_model("rhn", num_hidden_layers=1)
        for highway in other.layers[0].recurrent:
            highway.weight.data.zero_()
        np.testing.assert_allclose(found.detach(), of_layers(other, tokens()), atol=1e-12)


def test_weights_begin_as_the_config_says() -> None:
    torch.manual_seed(0)
    model = RHNForCausalLM(RHNConfig(vocab_size=500, hidden_size=64, recurrence_depth=2, initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert 0.19 < parameter.abs().max() <= 0.2 and parameter.mean().abs() < 0.01, name
    bias = model.layers[0].recurrent[1].bias
    assert bias.tolist() == [0.0] * 64 + [-2.0] * 64 and not bool(model.lm_head.bias.any())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("stacked_lstm", ["0.input", "0.recurrent", "1.input", "1.recurrent"]),
        ("rhn", [f"{layer}.{name}" for layer in (0, 1) for name in ("input", *(f"recurrent.{d}" for d in range(3)))]),
        ("awd_lstm_mos", [f"{layer}.{name}" for layer in range(3) for name in ("input", "recurrent")]),
    ],
)
def test_what_is_pruned_are_the_gates_matrices(kind: str, names: list[str]) -> None:
    views, _ = select_views(recurrent_model(kind), None, None)
    assert [view.name for view in views] == [f"layers.{name}" for name in names]


def test_one_shot_methods_see_the_state_of_every_step() -> None:
    """Wanda: each output keeps the inputs with the largest |weight| times norm of what came in, over all steps."""
    model = recurrent_model("stacked_lstm", torch.float32, vocab_size=WORDS)
    before = model.layers[0].recurrent.weight.detach().double()
    squares, state = torch.zeros(6, dtype=torch.float64), model.initial_state(8)
    for token in tokens(8, 20).T:
        squares += state.layers[0][0].detach().double().square().sum(0)
        state = model.recur(token, state)[1]
    prune(model, WandaConfig(sparsity=0.5), input_ids=tokens(8, 20))
    dropped = (before.abs() * squares.sqrt()).argsort(1)[:, :3]
    wanted = before.scatter(1, dropped, 0.0)
    np.testing.assert_array_equal(model.layers[0].recurrent.weight.detach(), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StackedLSTMConfig(hidden_size=0), "hidden_size: 0 is no size"),
        (lambda: RHNConfig(recurrence_depth=0), "recurrence_depth: 0 is no size"),
        (lambda: AWDLSTMMoSConfig(num_softmaxes=2.5), "num_softmaxes: 2.5 is no size"),
        (lambda: StackedLSTMConfig(num_hidden_layers=0), "num_hidden_layers: 0 is no size"),
        (lambda: StackedLSTMConfig(weight_dropout=1.0), "weight_dropout: 1.0 is no share to drop"),
        (lambda: RHNConfig(hidden_dropout=-0.1), "hidden_dropout: -0.1 is no share to drop"),
        (
            lambda: RHNConfig(embedding_size=10),
            "tie_word_embeddings: embedding_size is 10 and the head's inputs are 830",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
