"""Recurrent causal language models for transformers: stacked LSTM, recurrent highway network, AWD-LSTM-MoS.

This file needs torch and transformers and nothing else: a copy of it goes into every saved folder, from which
`from_pretrained(..., trust_remote_code=True)` takes the classes where the package is not installed.

Weights are plain linear layers, the gates of a layer stacked in two of them: what a pruning library finds in any other
model. A sequence begins with a zero state unless `past_key_values` holds another.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

LayerState = tuple[Tensor, ...]
"""Of one layer, each float [batch, size]: its output first, then its cell where it has one."""


class RecurrentConfig(PreTrainedConfig):
    """What all of them have in common; a dropout is the share that is dropped.

    Args:
        vocab_size: of the tokenizer.
        hidden_size: of a layer's output.
        embedding_size: of a word's vector; hidden_size unless given.
        num_hidden_layers: layers, one on another.
        embedding_dropout: of whole words, wherever they stand in the batch.
        input_dropout: of what enters the first layer.
        hidden_dropout: of what goes from one layer to the next; in a highway network of the state as well.
        output_dropout: of what leaves the last layer.
        variational_dropout: one mask for all steps of a sequence instead of one for each.
        initializer_range: weights are uniform between minus and plus this number, biases zero.
        tie_word_embeddings: the head's matrix is that of the embeddings.
    """

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 10000
    hidden_size: int = 1500
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    embedding_dropout: float = 0.0
    input_dropout: float = 0.65
    hidden_dropout: float = 0.65
    output_dropout: float = 0.65
    variational_dropout: bool = False
    initializer_range: float = 0.04
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)
        for key, value in vars(self).items():
            if key in ("vocab_size", "recurrence_depth", "num_softmaxes", "num_hidden_layers") or key.endswith("_size"):
                if not isinstance(value, int) or value < 1:
                    raise ValueError(f"{key}: {value} is no size; use 1 or more.")
            elif key.endswith("_dropout") and key != "variational_dropout" and not 0 <= value < 1:
                raise ValueError(f"{key}: {value} is no share to drop; use 0 or more and less than 1.")
        if self.tie_word_embeddings and self.embedding_size != self.head_size:
            raise ValueError(
                f"tie_word_embeddings: embedding_size is {self.embedding_size} and the head's inputs are "
                f"{self.head_size}; make them equal or leave the key out."
            )

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        inputs = [self.embedding_size or self.hidden_size] + [self.hidden_size] * (self.num_hidden_layers - 1)
        return [(size, self.hidden_size) for size in inputs]

    @property
    def head_size(self) -> int:
        """Inputs of the head."""
        return self.layer_sizes[-1][1]


class StackedLSTMConfig(RecurrentConfig):
    """Zaremba et al. (2014), https://arxiv.org/abs/1409.2329; sizes and dropouts are those of the large model.

    Args:
        weight_dropout: of the matrices that multiply a layer's own output, drawn once a batch.
    """

    model_type = "stacked_lstm"

    weight_dropout: float = 0.0


class RHNConfig(RecurrentConfig):
    """Zilly et al. (2017), https://arxiv.org/abs/1607.03474; the defaults are the tied model for Penn Treebank.

    Args:
        recurrence_depth: highway steps within one step of time.
        transform_bias: where the transform gates' biases begin; below zero they let the state through.
    """

    model_type = "rhn"

    hidden_size: int = 830
    num_hidden_layers: int = 1
    recurrence_depth: int = 10
    transform_bias: float = -2.0
    embedding_dropout: float = 0.25
    input_dropout: float = 0.75
    hidden_dropout: float = 0.25
    output_dropout: float = 0.75
    variational_dropout: bool = True
    tie_word_embeddings: bool = True


class AWDLSTMMoSConfig(RecurrentConfig):
    """AWD-LSTM (Merity et al. 2018, https://arxiv.org/abs/1708.02182) with a mixture of softmaxes (Yang et al. 2018).

    https://arxiv.org/abs/1711.03953; the defaults are its model for Penn Treebank. The penalties on activations that
    AWD-LSTM adds to its loss are not here.

    Args:
        last_hidden_size: of the last layer's output.
        num_softmaxes: of the mixture, each over words' vectors of embedding_size.
        weight_dropout: of the matrices that multiply a layer's own output, drawn once a batch.
        latent_dropout: of each softmax's input.
    """

    model_type = "awd_lstm_mos"

    hidden_size: int = 960
    embedding_size: int = 280
    last_hidden_size: int = 620
    num_hidden_layers: int = 3
    num_softmaxes: int = 15
    embedding_dropout: float = 0.1
    input_dropout: float = 0.4
    hidden_dropout: float = 0.225
    output_dropout: float = 0.4
    latent_dropout: float = 0.29
    weight_dropout: float = 0.5
    variational_dropout: bool = True
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        sizes = super().layer_sizes
        return [*sizes[:-1], (sizes[-1][0], self.last_hidden_size)]

    @property
    def head_size(self) -> int:
        return self.embedding_size


def dropout(values: Tensor, share: float, training: bool, variational: bool) -> Tensor:
    """Drop from [batch, time, size], with one mask for all times where `variational` (Gal and Ghahramani 2016)."""
    if not training or not share:
        return values
    shape = (values.shape[0], 1, values.shape[2]) if variational else values.shape
    return values * functional.dropout(values.new_ones(shape), share)


def scaled(slopes: list[Tensor], weight: Tensor) -> Tensor:
    """The sum over gates of diag(slope) times the gate's matrix, [batch, size, inputs]; `weight` stacks the gates."""
    return torch.einsum("gbi,gij->bij", torch.stack(slopes), weight.unflatten(0, (len(slopes), -1)))


class RecurrentLayer(nn.Module):
    """One layer: its input's share for all times at once, then step by step.

    `input` has no bias and the gates' outputs one behind another; what multiplies the layer's own output is up to the
    kind of layer.
    """

    state_parts = 1

    def __init__(self, inputs: int, size: int, gates: int) -> None:
        super().__init__()
        self.size = size
        self.input = nn.Linear(inputs, gates * size, bias=False)

    def initial_state(self, batch: int) -> LayerState:
        """Zeros."""
        zeros = self.input.weight.new_zeros(batch, self.size)
        return (zeros,) * self.state_parts

    def recurrence(self, batch: int) -> Callable[[Tensor, LayerState], LayerState]:
        """One step of a sequence, of the input's share and the state before, with what is dropped decided."""
        raise NotImplementedError

    def jacobians(self, inputs: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
        """d output / d output before, and d output / d inputs: [batch, size, size] and [batch, size, inputs]."""
        raise NotImplementedError

    def forward(
        self, inputs: Tensor, state: LayerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Outputs [batch, time, size] of [batch, time, inputs], and the last state; masked steps leave it alone."""
        shares = self.input(inputs)
        step = self.recurrence(len(inputs))
        outputs = []
        for time in range(inputs.shape[1]):
            after = step(shares[:, time], state)
            if attention_mask is not None:
                seen = attention_mask[:, time, None].bool()
                after = tuple(torch.where(seen, new, old) for new, old in zip(after, state, strict=True))
            state = after
            outputs.append(state[0])
        return torch.stack(outputs, 1), state


class LSTMLayer(RecurrentLayer):
    """Hochreiter and Schmidhuber (1997) with forget gates; gates i, f, g, o are stacked in torch's order."""

    state_parts = 2

    def __init__(self, inputs: int, size: int, weight_dropout: float) -> None:
        super().__init__(inputs, size, gates=4)
        self.weight_dropout = weight_dropout
        self.recurrent = nn.Linear(size, 4 * size)

    def forward(
        self, inputs: Tensor, state: LayerState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        if not (self.training and self._plain) or attention_mask is not None:
            return super().forward(inputs, state, attention_mask)
        bias = self.recurrent.bias
        weights = [self.input.weight, self._dropped(), bias, torch.zeros_like(bias)]
        start = tuple(part[None] for part in state)
        if inputs.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Not every CPU has an LSTM in half precision.
            inputs, start = inputs.float(), tuple(part.float() for part in start)
        with torch.autocast("cpu", enabled=False):
            outputs, *last = torch.lstm(inputs, start, weights, True, 1, 0.0, True, False, True)
        return outputs, tuple(part[0] for part in last)

    @property
    def _plain(self) -> bool:
        """Whether the linear layers are nothing but their weights; adapters in their place have to be called."""
        return type(self.input) is nn.Linear and type(self.recurrent) is nn.Linear

    def _dropped(self) -> Tensor:
        return functional.dropout(self.recurrent.weight, self.weight_dropout, self.training)

    def recurrence(self, batch: int) -> Callable[[Tensor, LayerState], LayerState]:
        # Otherwise through the linear layer itself: what hooks onto it sees every input.
        weight = self._dropped() if self.training and self._plain else None

        def step(share: Tensor, state: LayerState) -> LayerState:
            hidden, cell = state
            own = self.recurrent(hidden) if weight is None else functional.linear(hidden, weight, self.recurrent.bias)
            i, f, g, o = (share + own).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            return o.sigmoid() * cell.tanh(), cell

        return step

    def jacobians(self, inputs: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
        """By the closed form, the cell before held as it is."""
        hidden, before = state
        i, f, g, o = (self.input(inputs) + self.recurrent(hidden)).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = (f * before + i * g).tanh()
        outer = o * (1 - cell.square())
        # What a change of each gate's pre-activation adds to the output.
        slopes = [
            outer * g * i * (1 - i),
            outer * before * f * (1 - f),
            outer * i * (1 - g.square()),
            cell * o * (1 - o),
        ]
        return scaled(slopes, self.recurrent.weight), scaled(slopes, self.input.weight)


class HighwayLayer(RecurrentLayer):
    """s_l = h_l t_l + s_{l-1} (1 - t_l) for l = 1 .. depth, Zilly et al. with coupled gates.

    h_l = tanh and t_l = sigmoid of what the state gives, to which the input adds its share where l = 1; both matrices
    are stacked, first that of h. State between steps of time is s_depth.
    """

    def __init__(self, inputs: int, size: int, depth: int, state_dropout: float, variational: bool) -> None:
        super().__init__(inputs, size, gates=2)
        self.state_dropout, self.variational = state_dropout, variational
        self.recurrent: Any = nn.ModuleList(Highway(size, 2 * size) for _ in range(depth))

    def recurrence(self, batch: int) -> Callable[[Tensor, LayerState], LayerState]:
        share_dropped, ones = self.state_dropout, self.input.weight.new_ones(batch, self.size)
        mask = functional.dropout(ones, share_dropped, self.training) if self.variational else None

        def step(share: Tensor | float, state: LayerState) -> LayerState:
            (hidden,) = state
            for highway in self.recurrent:
                left = functional.dropout(hidden, share_dropped, self.training) if mask is None else hidden * mask
                new, transform = (highway(left) + share).chunk(2, 1)
                transform = transform.sigmoid()
                hidden = hidden + transform * (new.tanh() - hidden)
                share = 0.0
            return (hidden,)

        return step

    def jacobians(self, inputs: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
        """By the closed form: the product over the recurrence depth."""
        (hidden,) = state
        share: Tensor | float = self.input(inputs)
        by_hidden = by_input = None
        for highway in self.recurrent:
            new, transform = (highway(hidden) + share).chunk(2, 1)
            new, transform = new.tanh(), transform.sigmoid()
            slopes = [transform * (1 - new.square()), (new - hidden) * transform * (1 - transform)]
            own = scaled(slopes, highway.weight) + torch.diag_embed(1 - transform)
            if by_hidden is None or by_input is None:
                by_hidden, by_input = own, scaled(slopes, self.input.weight)
            else:
                by_hidden, by_input = own @ by_hidden, own @ by_input
            hidden, share = hidden + transform * (new - hidden), 0.0
        assert by_hidden is not None and by_input is not None
        return by_hidden, by_input


class Highway(nn.Linear):
    """One highway step's matrices and biases: of h, then of the transform gate."""


class RecurrentState:
    """What a model keeps of the tokens before, in place of a transformer's cache; a forward returns a new one.

    Args:
        layers: the state of each layer.
        seen: tokens so far.
    """

    def __init__(self, layers: list[LayerState], seen: int = 0) -> None:
        self.layers, self.seen = layers, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows of the batch, as a beam search asks."""
        self.layers = [tuple(part.index_select(0, beam_idx.to(part.device)) for part in layer) for layer in self.layers]


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):
    """Embeddings, layers, a head; families say which. Its state's derivatives are what a Lyapunov spectrum asks for."""

    base_model_prefix = ""
    _no_split_modules = ["LSTMLayer", "HighwayLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: RecurrentConfig, layers: Iterable[RecurrentLayer]) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.layer_sizes[0][0])
        self.layers: Any = nn.ModuleList(layers)
        self.lm_head = nn.Linear(config.head_size, config.vocab_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.uniform_(module.weight, -self.config.initializer_range, self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            start = torch.zeros_like(module.bias)
            if isinstance(module, Highway):
                start[len(start) // 2 :] = self.config.transform_bias
            init.copy_(module.bias, start)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: transformers' caches hold keys and values."""
        return False

    def initial_state(self, batch: int) -> RecurrentState:
        """Zeros, before any token."""
        return RecurrentState([layer.initial_state(batch) for layer in self.layers])

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next word, [..., vocabulary], from the last layer's output."""
        return self.lm_head(hidden)

    def _embed(self, input_ids: Tensor) -> Tensor:
        config = self.config
        embedded = self.embed_tokens(input_ids)
        if self.training and config.embedding_dropout:
            words = functional.dropout(embedded.new_ones(config.vocab_size), config.embedding_dropout)
            embedded = embedded * words[input_ids][..., None]
        return dropout(embedded, config.input_dropout, self.training, config.variational_dropout)

    def _run(
        self, input_ids: Tensor, state: RecurrentState, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        config, hidden, after = self.config, self._embed(input_ids), []
        for number, (layer, own) in enumerate(zip(self.layers, state.layers, strict=True), start=1):
            hidden, own = layer(hidden, own, attention_mask)
            after.append(own)
            share = config.hidden_dropout if number < len(self.layers) else config.output_dropout
            hidden = dropout(hidden, share, self.training, config.variational_dropout)
        return hidden, RecurrentState(after, state.seen + input_ids.shape[1])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal language model of transformers.

        Args:
            input_ids: int64 [batch, time].
            attention_mask: [batch, time], or longer where it begins with the tokens before; 0 leaves the state alone.
            past_key_values: the state to go on from, zeros unless given; it is not changed.
            labels: int64 [batch, time], shifted inside; -100 does not count.
            use_cache: return the state; unless given as the config says, and never while training.
            logits_to_keep: of the last so many tokens, 0 means all.
        """
        state = past_key_values if past_key_values is not None else self.initial_state(len(input_ids))
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
            if bool(attention_mask.all()):
                attention_mask = None
        hidden, state = self._run(input_ids, state, attention_mask)
        logits = self.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        kept: Any = state if use_cache else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept)

    def recur(self, token: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One step: the last layer's output [batch, size] and the state behind `token`, int64 [batch]."""
        hidden, state = self._run(token[:, None], state)
        return hidden[:, 0], state

    def hidden_vector(self, state: RecurrentState) -> Tensor:
        """The layers' outputs in one, [batch, their sizes' sum]."""
        return torch.cat([layer[0] for layer in state.layers], 1)

    def with_hidden(self, state: RecurrentState, vector: Tensor) -> RecurrentState:
        """The state with its outputs replaced by those of `hidden_vector`, cells as they are."""
        parts = vector.split([layer.size for layer in self.layers], 1)
        layers = [(part, *layer[1:]) for part, layer in zip(parts, state.layers, strict=True)]
        return RecurrentState(layers, state.seen)

    def state_vector(self, state: RecurrentState) -> Tensor:
        """Everything in one, each layer's output before its cell."""
        return torch.cat([part for layer in state.layers for part in layer], 1)

    def with_state(self, state: RecurrentState, vector: Tensor) -> RecurrentState:
        """The state that `state_vector` made `vector` of."""
        sizes = [layer.size * layer.state_parts for layer in self.layers]
        layers = zip(self.layers, vector.split(sizes, 1), strict=True)
        return RecurrentState([part.chunk(layer.state_parts, 1) for layer, part in layers], state.seen)

    def state_jacobian(self, token: Tensor, state: RecurrentState) -> Tensor:
        """d hidden_vector behind `token` / d hidden_vector before it, cells as they are: block lower triangular."""
        inputs = self._embed(token[:, None])
        rows: list[list[Tensor]] = []
        for number, (layer, own) in enumerate(zip(self.layers, state.layers, strict=True)):
            by_hidden, by_input = layer.jacobians(inputs[:, 0], own)
            below = [by_input @ part for part in rows[-1][:number]] if rows else []
            above = [by_hidden.new_zeros(len(token), layer.size, later.size) for later in self.layers[number + 1 :]]
            rows.append([*below, by_hidden, *above])
            inputs = layer(inputs, own)[0]
        return torch.cat([torch.cat(row, 2) for row in rows], 1)


class StackedLSTMForCausalLM(RecurrentForCausalLM):
    """LSTM layers, one on another, and a softmax over words."""

    config_class = StackedLSTMConfig

    def __init__(self, config: StackedLSTMConfig) -> None:
        super().__init__(config, [LSTMLayer(*sizes, config.weight_dropout) for sizes in config.layer_sizes])
        self.post_init()


class RHNForCausalLM(RecurrentForCausalLM):
    """A recurrent highway network, or several, and a softmax over words."""

    config_class = RHNConfig

    def __init__(self, config: RHNConfig) -> None:
        layers = (
            HighwayLayer(*own, config.recurrence_depth, config.hidden_dropout, config.variational_dropout)
            for own in config.layer_sizes
        )
        super().__init__(config, layers)
        self.post_init()


class AWDLSTMMoSForCausalLM(RecurrentForCausalLM):
    """LSTM layers and a mixture of softmaxes; its logits are the logarithms of the mixture's probabilities."""

    config_class = AWDLSTMMoSConfig

    def __init__(self, config: AWDLSTMMoSConfig) -> None:
        super().__init__(config, [LSTMLayer(*sizes, config.weight_dropout) for sizes in config.layer_sizes])
        self.prior = nn.Linear(config.last_hidden_size, config.num_softmaxes, bias=False)
        self.latent = nn.Linear(config.last_hidden_size, config.num_softmaxes * config.embedding_size)
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        config = self.config
        latent = dropout(self.latent(hidden).tanh(), config.latent_dropout, self.training, config.variational_dropout)
        latent = latent.unflatten(-1, (config.num_softmaxes, config.embedding_size))
        prior = self.prior(hidden).log_softmax(-1)
        return (self.lm_head(latent).log_softmax(-1) + prior[..., None]).logsumexp(-2)
