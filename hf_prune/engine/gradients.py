"""Gradients on the calibration text: of the language modelling loss by weights, of the likelihood by outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from hf_prune.engine import distributed
from hf_prune.engine.capture import least_tokens, patched
from hf_prune.engine.experts import computed_by, members_of, run_experts
from hf_prune.engine.masked import recomputed
from hf_prune.engine.offload import device_of
from hf_prune.engine.stream import HiddenStates
from hf_prune.errors import BadInputError, RunError
from hf_prune.progress import progress
from hf_prune.weights import WeightView, find_blocks, find_views


def loss_gradients(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Parameter name -> gradient of the summed window losses, float32 in the parameter's layout, on the CPU.

    The loss of a window is the mean cross-entropy of its next tokens. Blocks' weights only; the model is left as it is.

    Args:
        input_ids: int64 [samples, tokens], the same on every process; each takes its share.

    Raises:
        RunError: a gradient is not finite.
    """
    last = len(find_blocks(model)[1])
    wanted = {view.parameter_name: view.parameter for view in find_views(model) if view.block < last}
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # A window's gradient in the model's dtype; the sum over windows would lose what is small in it.
    totals = {name: torch.zeros(parameter.shape, dtype=torch.float32) for name, parameter in wanted.items()}
    device = next(model.parameters()).device
    own = input_ids[distributed.rank() :: distributed.world_size()]
    training = model.training
    model.eval()
    try:
        model.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        for window in progress(own, "gradients", total=len(own)):
            ids = window[None].to(device)
            with torch.enable_grad():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for name, parameter in wanted.items():
                if parameter.grad is not None:
                    totals[name] += parameter.grad.float().cpu()
                    parameter.grad = None
    finally:
        model.train(training)
        for parameter, was in asked:
            parameter.grad = None
            parameter.requires_grad_(was)
    for name, total in totals.items():
        distributed.sum_everywhere(total)
        if not bool(torch.isfinite(total).all()):
            raise RunError(f"{name}: its gradients hold NaN or Inf; use dtype bfloat16 or float32.")
    return totals


# A few thousand tokens. Other numbers of windows were not tried.
FISHER_WINDOWS = 8
# How far mean squares of gradients are drawn towards their mean over rows: they are heavy-tailed, and a second order
# says nothing of a row that is gone altogether. Without it one calibration seed of three lost what the others gained.
_SHRINKAGE = 0.5


@dataclass(frozen=True)
class FisherFactors:
    """What a weight matrix's errors cost, by the diagonal of the Kronecker-factored Fisher information.

    Attributes:
        inputs: float32 [in], mean square of each input over tokens.
        outputs: float32 [out], mean square over tokens of the log-likelihood's gradient by each output.
        columns: float32 [in], mean square over tokens of each input times the gradient by it, where it was asked for:
            where no other layer takes these inputs, twice what dropping the whole column costs, in nats a token.
    """

    inputs: Tensor
    outputs: Tensor
    columns: Tensor | None = None

    @property
    def row_scale(self) -> Tensor:
        """float32 [out], around 1: errors of outputs times this are errors of equal cost."""
        roots = self.output_scale
        mean = roots.mean()
        return roots / mean if float(mean) > 0 else torch.ones_like(roots)

    @property
    def output_scale(self) -> Tensor:
        """float32 [out], the same in the unit of all layers: what an error of each output costs, by its root."""
        return (self.outputs + _SHRINKAGE * self.outputs.mean()).sqrt()


def fisher_factors(
    model: nn.Module, views: Sequence[WeightView], input_ids: Tensor | None, seed: int = 0, columns: bool = False
) -> dict[str, FisherFactors]:
    """FisherFactors of each view by name on the dense model, which is left as it is.

    One forward and one backward pass over the first `FISHER_WINDOWS` windows, without labels: the next token of
    every position is drawn from the model's own distribution, with a seed of the window's own, so that any number of
    processes finds the same. Blocks are computed again in the backward pass; only their inputs are kept, on a CPU in
    files where the weights are in some.

    An expert's factors are means over all tokens, those that went elsewhere count as zeros; one that saw too few tokens
    gets the mean of the others of its block (ours), so that its weights alone decide.

    Args:
        input_ids: int64 [samples, tokens], the same on every process; each takes its share.
        columns: whether whole columns are of interest, of layers that are no mixture's; keeps a window's inputs of all
            views at once.

    Raises:
        BadInputError: there is no calibration text.
        RunError: an input or a gradient is not finite.
    """
    if input_ids is None:
        raise BadInputError("dataset_name: output gradients need calibration text; name a dataset or pass input_ids.")
    device = device_of(model)
    windows = input_ids[:FISHER_WINDOWS]
    inputs = {view.name: torch.zeros(view.shape[1], dtype=torch.float64) for view in views}
    outputs = {view.name: torch.zeros(view.shape[0], dtype=torch.float64) for view in views}
    together = {view.name: torch.zeros(view.shape[1], dtype=torch.float64) for view in views if columns}
    tokens = {view.name: torch.zeros(1, dtype=torch.float64) for view in views}
    counting = False

    def observe(view: WeightView, own: Tensor, output: Tensor) -> None:
        name = view.name

        def seen(gradient: Tensor) -> None:
            outputs[name] += _squares(view.own_outputs(gradient))

        if not counting:
            # The backward pass computes this block again.
            return
        inputs[name] += _squares(own)
        tokens[name] += own.numel() // own.shape[-1]
        output.register_hook(seen)
        if columns:
            values = own.detach()

            def seen_by_input(gradient: Tensor) -> None:
                together[name] += _squares(values.float() * gradient.float())

            own.register_hook(seen_by_input)

    def observer(view: WeightView) -> Callable[..., None]:
        return lambda module, args, output: observe(view, args[0], output)

    def experts_observer(module: nn.Module, members: Mapping[tuple[int, str], WeightView]) -> Callable[..., Tensor]:
        def observed(expert: int, tensor: str, own: Tensor, weight: Tensor) -> Tensor:
            output = linear(own, weight)
            if (expert, tensor) in members:
                observe(members[expert, tensor], own, output)
            return output

        return lambda _, *args: run_experts(module, observed, *args)

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        with ExitStack() as stack:
            for block in find_blocks(model)[1]:
                stack.enter_context(patched(block, _spilling(recomputed(block.forward), HiddenStates(model))))
            # Something has to ask for gradients, and no weight does.
            handles = [embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))]
            handles += [view.module.register_forward_hook(observer(view)) for view in views if view.expert is None]
            experts = members_of(views)
            stack.enter_context(computed_by({own: experts_observer(own, members) for own, members in experts.items()}))
            for handle in handles:
                stack.callback(handle.remove)
            own = range(distributed.rank(), len(windows), distributed.world_size())
            for number in progress(own, "output gradients", total=len(own)):
                with torch.enable_grad():
                    counting = True
                    logits = model(input_ids=windows[number][None].to(device), use_cache=False).logits[0].float()
                    counting = False
                    cross_entropy(logits, _drawn(logits.detach(), seed + number), reduction="sum").backward()
    finally:
        model.train(training)
        for parameter, was in wanted.items():
            parameter.requires_grad_(was)
    found = {}
    for view in views:
        distributed.sum_everywhere(tokens[view.name])
        sums = {"calibration inputs": inputs[view.name], "output gradients": outputs[view.name]}
        if columns:
            sums["input gradients"] = together[view.name]
        for kind, total in sums.items():
            distributed.sum_everywhere(total)
            if not bool(torch.isfinite(total).all()):
                raise RunError(f"{view.name}: its {kind} hold NaN or Inf; use dtype bfloat16 or float32.")
        found[view.name] = FisherFactors(*((total / windows.numel()).float().to(device) for total in sums.values()))
    scarce = {view.name for view in views if float(tokens[view.name]) < least_tokens(view)}
    for view in views:
        if view.name in scarce:
            others = [
                found[other.name]
                for other in views
                if other.module is view.module and other.tensor == view.tensor and other.name not in scarce
            ]
            found[view.name] = _mean(others or [found[view.name]])
    return found


def _spilling(forward: Callable[..., Any], states: HiddenStates) -> Callable[..., Any]:
    """A block's forward behind which its input, which the backward pass wants once more, lies where `states` says."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if states.folder is not None and hidden.device.type == "cpu":
            # The same tensor in the graph: only its memory is another.
            hidden.data = states.keep(hidden.data)
        return output

    return run


def _mean(factors: Sequence[FisherFactors]) -> FisherFactors:
    """The same for all inputs and for all outputs, of the size that some factors have on average."""
    inputs, outputs = (torch.stack([getattr(own, side) for own in factors]) for side in ("inputs", "outputs"))
    return FisherFactors(inputs.mean().expand(inputs.shape[1]), outputs.mean().expand(outputs.shape[1]))


def _squares(values: Tensor) -> Tensor:
    """float64 [features], sum of squares over all else, on the CPU."""
    rows = values.detach().reshape(-1, values.shape[-1]).float()
    return rows.square().sum(dim=0).double().cpu()


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """int64 [tokens], a token of each position's distribution; the same on every device up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    ahead = logits.softmax(dim=-1).cumsum(dim=-1)
    place = torch.rand((len(logits), 1), generator=generator).to(ahead)
    return torch.searchsorted(ahead, place * ahead[:, -1:]).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
