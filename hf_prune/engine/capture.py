"""Running one block of a model at a time, through the model's own forward.

Blocks that are done become skips that return the cached hidden states, and the forward is left once the wanted block
has run. Masks, rotary embeddings and keyword arguments thus come from the model itself, per block and without code per
architecture: a block sees exactly what it sees in `model(input_ids)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_prune.engine.experts import computed_by, members_of, run_experts
from hf_prune.engine.offload import device_of
from hf_prune.engine.statistics import LEAST_TOKENS, Statistics
from hf_prune.weights import WeightView, find_blocks


class _Stop(Exception):
    """Leaves the model's forward; never seen outside this file."""


class BlockRunner:
    """Runs single blocks of a causal language model on cached hidden states.

    Use as a context manager: the model is in eval mode inside, and as it was before afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = find_blocks(model)[1]
        self.device = device_of(model)
        self._returns_tuple: dict[int, tuple[Any, ...]] = {}
        self._was_training = model.training

    def __enter__(self) -> BlockRunner:
        self._was_training = self.model.training
        self.model.eval()
        return self

    def __exit__(self, *exception: object) -> None:
        self.model.train(self._was_training)

    def run(self, index: int, input_ids: Tensor, hidden: Tensor | None, *, gradients: bool = False) -> Tensor:
        """The output of block `index`.

        Args:
            input_ids: int64 [sequences, tokens], the tokens that `hidden` came from.
            hidden: [sequences, tokens, width], output of the block before it; None for the first block, which then sees
                the embeddings.
            gradients: record what a backward pass needs.

        Returns:
            [sequences, tokens, width] in the model's dtype.
        """
        block = self.blocks[index]
        hidden = self._here(hidden)
        original = block.forward
        output: list[Tensor] = []

        def run_and_stop(*args: Any, **kwargs: Any) -> None:
            if index == 0 and hidden is not None:
                args = (hidden, *args[1:])
            result = original(*args, **kwargs)
            if isinstance(result, tuple):
                self._returns_tuple[index] = result[1:]
                result = result[0]
            output.append(result)
            raise _Stop

        with self._skipping(index, hidden), patched(block, run_and_stop), torch.set_grad_enabled(gradients):
            self._forward(input_ids)
        return output[0] if output else torch.empty(0)

    def embed(self, input_ids: Tensor) -> Tensor:
        """What enters the first block, [sequences, tokens, width] in the model's dtype."""
        seen: list[Tensor] = []

        def see_and_stop(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append(hidden)
            raise _Stop

        with patched(self.blocks[0], see_and_stop), torch.no_grad():
            self._forward(input_ids)
        return seen[0]

    def observe(self, index: int, input_ids: Tensor, hidden: Tensor | None) -> None:
        """Run the model up to block `index` and through it for the sake of hooks; a hook may call `stop()`.

        `index` equal to the number of blocks skips all of them and runs what follows: the LM head.
        """
        if index == len(self.blocks):
            with self.behind(hidden), torch.no_grad():
                self._forward(input_ids)
        else:
            self.run(index, input_ids, hidden)

    def behind(self, hidden: Tensor | None) -> AbstractContextManager[None]:
        """Inside, the model's own forward begins behind the blocks, whose last one has put out `hidden`."""
        return self._skipping(len(self.blocks), self._here(hidden))

    def learn_outputs(self, input_ids: Tensor, count: int) -> None:
        """Find out in which form the first `count` blocks return their outputs, where others have run them."""
        hidden = None
        for index in range(min(count, len(self.blocks))):
            hidden = self.run(index, input_ids, hidden)

    @staticmethod
    def stop() -> None:
        """Leave the forward from inside a hook: nothing later in it is needed."""
        raise _Stop

    def _here(self, hidden: Tensor | None) -> Tensor | None:
        return None if hidden is None else hidden.to(self.device)

    def _forward(self, input_ids: Tensor) -> None:
        with suppress(_Stop):
            self.model(input_ids=input_ids.to(self.device), use_cache=False)

    @contextmanager
    def _skipping(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Blocks before `index` return `hidden` whatever they are given."""
        patches = []
        for earlier in range(index):
            rest = self._returns_tuple.get(earlier)
            answer = hidden if rest is None else (hidden, *rest)
            patches.append(patched(self.blocks[earlier], lambda *args, _answer=answer, **kwargs: _answer))
        for patch in patches:
            patch.__enter__()
        try:
            yield
        finally:
            for patch in patches:
                patch.__exit__(None, None, None)


@contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while, leaving one set by somebody else (accelerate's hooks) as it was."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def least_tokens(view: WeightView) -> int:
    """Tokens below which a view's statistics say nothing: only experts may see few."""
    return 0 if view.expert is None else LEAST_TOKENS


class InputObserver:
    """Gathers statistics of the inputs of some layers, once per distinct input.

    Layers that are handed the very same tensor in a forward (q, k and v; gate and up) share one set of sums. Each
    expert of a mixture has its own, over the tokens that are routed to it, which may be none.
    `groups` lists, in order of first use, the statistics with the views that share them. Unless `leave_early` is False
    a forward ends once the last layer's input has been seen, and the block then has no output.
    """

    def __init__(self, views: list[WeightView], kinds: frozenset[str], *, leave_early: bool = True) -> None:
        self.views = views
        self.kinds = kinds
        self.leave_early = leave_early
        self.groups: list[tuple[Statistics, list[WeightView]]] = []
        self._group_of: dict[str, int] = {}
        self._seen: list[tuple[Tensor, int]] = []
        self._calls: list[str] = []
        self._last: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks are in place inside; each forward must be wrapped in `forward()`."""
        plain = [view for view in self.views if view.expert is None]
        handles = [view.module.register_forward_pre_hook(self._hook(view)) for view in plain]
        try:
            with computed_by(
                {module: self._experts(module, members) for module, members in members_of(self.views).items()}
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward: tensors are compared by identity only inside it."""
        self._seen, self._calls = [], []
        try:
            yield
        finally:
            # After a whole forward in which every layer ran once, the last one's input is all that is waited for.
            if (
                self.leave_early
                and self._last is None
                and sorted(self._calls) == sorted(view.name for view in self.views)
            ):
                self._last = self._calls[-1]
            self._seen = []

    @property
    def _all_called(self) -> bool:
        """Whether nothing is waited for; experts in a list may be called in another order, or not at all."""
        return len(self._calls) >= len(self.views)

    def _hook(self, view: WeightView) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            self._calls.append(view.name)
            if view.name not in self._group_of:
                self._join(view, inputs)
            statistics, members = self.groups[self._group_of[view.name]]
            if members[0] is view:
                self._seen.append((inputs, self._group_of[view.name]))
                statistics.add(inputs)
            if view.name == self._last and self._all_called:
                BlockRunner.stop()

        return observe

    def _experts(self, module: nn.Module, members: dict[tuple[int, str], WeightView]) -> Callable[..., Tensor]:
        def observe(own: Callable[..., Tensor], *args: Tensor) -> Tensor:
            for view in members.values():
                self._calls.append(view.name)
                # All at once, whatever tokens there are: every process must hold the same groups.
                if view.name not in self._group_of:
                    self._join(view, args[0], alone=True)

            def linear(expert: int, tensor: str, inputs: Tensor, weight: Tensor) -> Tensor:
                view = members.get((expert, tensor))
                if view is not None:
                    self.groups[self._group_of[view.name]][0].add(inputs)
                return functional.linear(inputs, weight)

            run_experts(module, linear, *args)
            if any(view.name == self._last for view in members.values()) and self._all_called:
                BlockRunner.stop()
            # The model's own kernel, for outputs that are the model's own to the bit.
            return own(*args)

        return observe

    def _join(self, view: WeightView, inputs: Tensor, *, alone: bool = False) -> None:
        group = None if alone else next((group for tensor, group in self._seen if tensor is inputs), None)
        if group is None:
            group = len(self.groups)
            self.groups.append((Statistics(self.kinds, view.shape[1], inputs.device, least_tokens(view)), []))
        self.groups[group][1].append(view)
        self._group_of[view.name] = group
