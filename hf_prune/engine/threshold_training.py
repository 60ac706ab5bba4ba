"""What surrounds the learning of one threshold a layer: the teacher, batches, processes, memory, and resuming."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_prune.checkpoint.files import replaced, tensor_digest, text_digest
from hf_prune.engine import distributed
from hf_prune.engine.masked import ThresholdedView, thresholded
from hf_prune.engine.offload import tensors_of
from hf_prune.engine.teacher import TeacherLogits
from hf_prune.errors import BadInputError, RunError
from hf_prune.progress import progress
from hf_prune.weights import WeightView, find_blocks

logger = logging.getLogger(__name__)


@dataclass
class ThresholdTask:
    """A dense model whose layers are about to get thresholds.

    The same windows make the same steps whatever the number of processes; each computes its share of every step, so
    that steps of fewer windows than there are processes leave some idle.

    Attributes:
        views: the weight matrices, with scales and windows.
        windows: int64 [windows, tokens] to learn on.
        held_out: int64 [windows, tokens] that are never learned on.
        steps: numbers of the windows of each step.
    """

    model: nn.Module
    views: Sequence[ThresholdedView]
    windows: Tensor
    held_out: Tensor
    temperature: float
    teacher_tokens: int
    recompute: bool
    steps: Sequence[Sequence[int]]
    folder: Path | None = None
    _teacher: dict[str, dict[int, TeacherLogits]] = field(default_factory=dict)
    _identity: str = ""

    def teach(self) -> None:
        """Cache the dense model's distributions of this process's windows, as far as any step wants them."""
        learned = sorted({number for step in self.steps for number in self._own(step)})
        judged = self._own(range(len(self.held_out)))
        with torch.no_grad():
            for name, windows, own in (("windows", self.windows, learned), ("held_out", self.held_out, judged)):
                self._teacher[name] = {
                    number: TeacherLogits.of(
                        self._logits(windows[number : number + 1]), self.temperature, self.teacher_tokens
                    )
                    for number in progress(own, f"teacher, {name.replace('_', ' ')}", total=len(own))
                }

    @staticmethod
    def _own(numbers: Sequence[int]) -> Sequence[int]:
        """This process's share of some windows: all have as many, or one more."""
        return numbers[distributed.rank() :: distributed.world_size()]

    def _logits(self, window: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=window.to(self.device), use_cache=False).logits
        return output

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def gradients(self, thresholds: Tensor, batch: Sequence[int], factor: float = 1.0) -> Tensor:
        """Gradient of `factor` times the mean KL divergence a token by each threshold, float32 [views].

        Gradients of trained weights, where any ask for them, are left in `.grad`, summed over processes.

        Raises:
            RunError: it is not finite.
        """
        leaf = thresholds.detach().to(self.device).requires_grad_(True)
        leaf.grad = torch.zeros_like(leaf)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        # The backward pass is inside as well: it may compute blocks again.
        with self._under(leaf, recompute=self.recompute):
            for number in self._own(batch):
                teacher = self._teacher["windows"][number]
                loss = self._divergence(teacher, self.windows[number : number + 1]) * factor / len(batch)
                loss.backward()
        gradient = leaf.grad.detach().cpu()
        distributed.sum_everywhere(gradient)
        if not gradient.isfinite().all():
            raise RunError(
                "allocation fcpts: the gradient of the thresholds is not finite, so the model overflows; set dtype to "
                "bfloat16 or float32."
            )
        for parameter in trained:
            assert parameter.grad is not None
            distributed.sum_everywhere(parameter.grad)
        return gradient

    def held_out_loss(self, thresholds: Tensor) -> float:
        """Mean KL divergence a token over the held-out windows."""
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad(), self._under(thresholds.to(self.device)):
            for number, teacher in self._teacher["held_out"].items():
                total += float(self._divergence(teacher, self.held_out[number : number + 1]))
        distributed.sum_everywhere(total)
        return float(total) / len(self.held_out)

    def _under(self, thresholds: Tensor, recompute: bool = False) -> AbstractContextManager[None]:
        return thresholded(find_blocks(self.model)[1], self.views, thresholds, recompute=recompute)

    def _divergence(self, teacher: TeacherLogits, window: Tensor) -> Tensor:
        return teacher.divergence(self._logits(window), self.temperature).mean()

    def remember(self) -> None:
        """Note what is learned on, before anything moves."""
        self._identity = self._fingerprint()

    def _fingerprint(self) -> str:
        """Of everything that decides how the learning goes, but the learner's own settings."""
        said = [torch.__version__, self.temperature, self.teacher_tokens, self.steps]
        said += [(own.view.name, own.window) for own in self.views]
        tensors = (self.windows, self.held_out, *(tensor for _, tensor in tensors_of(self.model)))
        return text_digest(json.dumps(said) + "".join(map(tensor_digest, tensors)))

    def save_state(self, state: dict[str, Tensor], settings: str) -> None:
        """Keep the learner's state, if there is a folder for it; the file is replaced whole."""
        if self.folder is None or distributed.rank():
            return
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        with replaced(self._state_file(settings)) as part:
            save_file(state, part)

    def _state_file(self, settings: str) -> Path:
        """Named after all that decides how the learning goes, so that different ones do not meet."""
        assert self.folder is not None
        return self.folder / f"thresholds-{text_digest(self._identity + settings)[:16]}.safetensors"

    def load_state(self, settings: str) -> dict[str, Tensor] | None:
        """The state of an unfinished or finished run of the very same learning; None where there is none."""
        # Processes that do not see the same folder all begin anew.
        if self.folder is None or not all(distributed.gather(self._state_file(settings).is_file())):
            return None
        from safetensors.torch import load_file

        return load_file(self._state_file(settings))


@contextmanager
def threshold_task(
    model: nn.Module,
    views: Sequence[WeightView],
    scales: Sequence[tuple[Tensor | None, Tensor | None]],
    windows: Sequence[float],
    input_ids: Tensor | None,
    *,
    held_out: float,
    train_weights: bool,
    temperature: float,
    teacher_tokens: int,
    recompute: bool,
    batch_size: int,
    steps: int,
    seed: int,
    folder: Path | None,
) -> Iterator[ThresholdTask]:
    """A task over the dense model; afterwards the model asks for gradients where it did before.

    Args:
        scales: what each view's scores are multiplied by, float32 [in] or None and float32 [out] or None.
        windows: half-width around its threshold in which each view's weights count.
        held_out: share of the calibration windows that is held out.
        batch_size: windows a step, over all processes; every window once in a seeded order, then again in another.

    Raises:
        BadInputError: no calibration text, or too little to hold some out.
    """
    if input_ids is None:
        raise BadInputError("dataset_name: this allocation needs calibration text; name a dataset or pass input_ids.")
    if len(input_ids) < 2:
        raise BadInputError(
            "num_calibration_samples: thresholds are learned on some windows and judged on others; use 2 or more."
        )
    if not distributed.rank() and batch_size < distributed.world_size():
        logger.warning(
            "fcpts_batch_size: a step of %d windows leaves %d of %d processes idle; set it to a multiple of them.",
            batch_size, distributed.world_size() - batch_size, distributed.world_size(),
        )  # fmt: skip
    if train_weights and any(view.expert is not None for view in views):
        raise BadInputError(
            "train_weights: experts of a mixture share one parameter, of which single ones are not trained; set it to "
            "false."
        )
    input_ids = input_ids.cpu()
    count = min(max(round(len(input_ids) * held_out), 1), len(input_ids) - 1)
    apart = {(2 * number + 1) * len(input_ids) // (2 * count) for number in range(count)}
    rest = [number for number in range(len(input_ids)) if number not in apart]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    device = next(model.parameters()).device
    try:
        parts = [
            ThresholdedView(view, _moved(scale, device), window, _moved(row_scale, device))
            for view, (scale, row_scale), window in zip(views, scales, windows, strict=True)
        ]
        task = ThresholdTask(
            model,
            parts,
            input_ids[rest],
            input_ids[sorted(apart)],
            temperature,
            teacher_tokens,
            recompute,
            list(_batches(len(rest), batch_size, steps, seed)),
            folder,
        )
        task.remember()
        if train_weights:
            for view in views:
                view.parameter.requires_grad_(True)
        yield task
    finally:
        for parameter, before in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(before)
        model.train(was_training)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _batches(windows: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(windows, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
