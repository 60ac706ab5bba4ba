"""What a run will take, from shapes alone: FLOPs, seconds, memory, disk. Refuses early what cannot fit."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_prune.allocation import Allocation
from hf_prune.allocation.base import Work
from hf_prune.arguments import StructuredConfig
from hf_prune.compose import make_block_reconstruction
from hf_prune.engine.gradients import FISHER_WINDOWS
from hf_prune.engine.stream import TOKENS_PER_FORWARD
from hf_prune.errors import BadInputError
from hf_prune.methods.base import Solver
from hf_prune.plan import Plan
from hf_prune.reconstruction import BlockReconstruction
from hf_prune.structure.budget import budget_candidates
from hf_prune.structure.transport import MOST_EXACT, MOST_ROUNDS
from hf_prune.weights import find_blocks

logger = logging.getLogger(__name__)
# A process with torch and transformers imported, before any model.
_PYTHON_BYTES = 400_000_000
# Of L1 distances on a core, seconds of an exact transport between MOST_EXACT units, and the power of their number that
# it grows with: 1,536 units take a second.
_DIFFERENCES_PER_SECOND, _LARGEST_TRANSPORT, _TRANSPORT_POWER = 1.5e9, 60.0, 4
# Terms of logarithmic sums on a core, as `sinkhorn` takes them.
_SUMS_PER_SECOND = 7e7
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Estimate:
    """Predictions for pruning alone; evaluation comes on top.

    Attributes:
        flops_per_token: of one dense forward pass, LM head included.
        nonzero_flops_per_token: the same without multiplications by zero; theoretical.
        walk_flops: of the whole walk over the calibration set.
        seconds: the walk, at the matrix product speed measured just now.
        memory_bytes: peak on the device that holds the model.
        disk_bytes: of the saved folder.
    """

    flops_per_token: float
    nonzero_flops_per_token: float
    walk_flops: float
    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(
    model: PreTrainedModel,
    plan: Plan,
    solver: Solver,
    reconstruction: BlockReconstruction | None,
    allocation: Allocation | None,
    fisher: bool,
    samples: int,
    seq_length: int,
    dtype: str,
    device: torch.device,
    offload: str = "none",
) -> Estimate:
    """Predict from a model on the meta device.

    Args:
        solver: its statistics need forward passes, its update operations.
        reconstruction: of each block, if there is one.
        allocation: None where a saved plan has decided already.
        fisher: whether output gradients are taken.
        samples, seq_length: calibration windows and their length in tokens.
        dtype, offload: as in a recipe; dtype `auto` is the config's.
    """
    weights = {id(parameter): parameter.numel() for parameter in model.parameters()}
    saved = dtype if dtype != "auto" else str(model.config.dtype or "float32").removeprefix("torch.")
    size = _BYTES.get(saved, 4)
    per_token = _flops_per_token(model, min(seq_length, TOKENS_PER_FORWARD))
    zeroed = sum(2 * (1 - view.density) * view.numel for view in plan.views)
    linear = sum(2 * view.numel for view in plan.views)
    tokens = samples * seq_length
    widest = max(view.shape[1] for view in plan.views)
    walk_flops = 0.0
    statistics = solver.statistics
    if statistics or reconstruction:
        # Observe and hand on: two forwards of the blocks (without the head), the Gram matrices, the factorisations.
        walk_flops = 2.0 * tokens * linear
        if reconstruction:
            # A forward and a backward, which is two of them.
            walk_flops += 3.0 * reconstruction.reconstruct_passes * tokens * linear
        if "gram" in statistics:
            distinct = {(view.block, view.shape[1], view.name.rpartition(".")[0]) for view in plan.views}
            walk_flops += sum(1.2 * tokens * width**2 + 2 * width**3 for _, width, _ in distinct)
    walk_flops += _allocation_flops(allocation, fisher, samples, seq_length) * per_token
    walk_flops += sum(solver.update.flops(*view.shape) for view in plan.views)
    hidden = model.config.get_text_config().hidden_size
    # The distinct Gram matrices of a block at once, and what a factorisation holds beside its own, all in float64.
    gram = 0
    if "gram" in statistics:
        first = {
            (view.name.rpartition(".")[0], view.shape[1]) for view in plan.views if view.block == plan.views[0].block
        }
        gram = 8 * (5 * widest**2 + 2 * sum(width**2 for _, width in first))
    activations = TOKENS_PER_FORWARD * (6 * widest + 4 * hidden) * size if statistics or reconstruction else 0
    held = _held(model, offload) * size
    # In files where the weights are.
    states = 0 if offload == "disk" else tokens * hidden * size
    memory = held + gram + activations + states + 5 * 4 * _largest(plan)
    if reconstruction:
        # The targets; weights, gradients, two moments and the best state of a block in float32; its activations.
        block = max(
            sum(view.numel for view in plan.views if view.block == own) for own in {v.block for v in plan.views}
        )
        memory += states + 5 * 4 * block + 3 * activations
    memory = max(memory, held + _allocation_memory(model, plan, allocation, fisher, samples, seq_length, size))
    disk = sum(weights.values()) * size
    if offload == "disk":
        # Those in front of a block and behind it, and both once more while they are kept for a cut.
        disk += (6 if reconstruction else 4) * tokens * hidden * size
    if device.type == "cpu":
        memory += _PYTHON_BYTES
    return Estimate(
        flops_per_token=per_token,
        nonzero_flops_per_token=per_token - zeroed,
        walk_flops=walk_flops,
        seconds=walk_flops / _flops_per_second(device),
        memory_bytes=int(memory),
        disk_bytes=int(disk * 1.02) + 10_000_000,
    )


def _allocation_flops(allocation: Allocation | None, fisher: bool, samples: int, seq_length: int) -> float:
    """Forward passes of a token that sharing the budget out takes."""
    passes = allocation.window_passes(samples) if allocation is not None else 0.0
    # Forward, the same again, and a backward by activations alone.
    return (passes + (3.0 * min(samples, FISHER_WINDOWS) if fisher else 0.0)) * seq_length


def _allocation_memory(
    model: PreTrainedModel,
    plan: Plan,
    allocation: Allocation | None,
    fisher: bool,
    samples: int,
    seq_length: int,
    size: int,
) -> int:
    """Bytes that it holds at its peak beside the model."""
    text = model.config.get_text_config()
    memory = 0
    if allocation is not None:
        own = {view.block: [v.shape for v in plan.views if v.block == view.block] for view in plan.views}
        work = Work(list(own.values()), samples, seq_length, text.hidden_size, text.vocab_size, size)
        memory = allocation.memory_bytes(work)
    if fisher:
        # One block's activations, every block's inputs, logits with their gradient and the drawing's sums in float32.
        widths = [view.shape for view in plan.views if view.block == plan.views[0].block]
        blocks = len({view.block for view in plan.views})
        kept = (3 * sum(rows + columns for rows, columns in widths) + blocks * text.hidden_size) * size
        kept += 5 * 4 * text.vocab_size
        memory = max(memory, seq_length * kept)
    return memory


def estimate_reduction(
    model: PreTrainedModel,
    plan: Plan,
    config: StructuredConfig,
    allocation: Allocation | None,
    fisher: bool,
    samples: int,
    seq_length: int,
    dtype: str,
    device: torch.device,
) -> Estimate:
    """The same for a structured method, whose plan has a `structure`; `model` is the dense one on the meta device."""
    assert plan.structure is not None and config.units is not None
    reducer, structure = config.make_reducer(), plan.structure
    weights = sum(parameter.numel() for parameter in model.parameters())
    removed = structure["parameters_before"] - structure["parameters_after"]
    if config.layout == "pad" and not structure["widths"]:
        # Zeros up to the widest block, which may be as wide as before.
        removed = 0
    size = _BYTES.get(dtype if dtype != "auto" else str(model.config.dtype or "float32").removeprefix("torch."), 4)
    per_token = _flops_per_token(model, min(seq_length, TOKENS_PER_FORWARD))
    width, kept, tokens = structure["before"]["width"], structure["after"]["width"], samples * seq_length
    blocks, hidden = structure["blocks"], model.config.get_text_config().hidden_size
    flops = 0.0
    if samples:
        # A forward to observe each kind of unit, two to refit those that others went into, and one to hand on.
        refitted = sum(2.0 for unit in config.units if reducer.refits and reducer.fuses([unit]))
        flops = (1 + len(config.units) + refitted) * tokens * per_token
        if "gram" in reducer.statistics:
            flops += blocks * (1.2 * tokens * width**2 + 2 * width**3)
        if reducer.needs_gradients:
            flops += 3 * tokens * per_token
        reconstruction = make_block_reconstruction(config)
        if reconstruction is not None:
            flops += (1 + 3 * reconstruction.reconstruct_passes) * tokens * per_token
    solving = 0.0
    if reducer.fuses(config.units):
        # Distances between all and the kept units, over three layers' weights.
        differences = 3.0 * width * kept * hidden
        if reducer.cost(width, device).endswith("L1") and device.type == "cpu":
            solving += blocks * differences / (_DIFFERENCES_PER_SECOND * torch.get_num_threads())
        else:
            flops += blocks * 3 * differences
        solver = reducer.solver(width)
        if solver == "emd":
            solving += blocks * _LARGEST_TRANSPORT * (width / MOST_EXACT) ** _TRANSPORT_POWER
        if solver == "sinkhorn":
            # Each round takes the mass of rows and of columns once.
            solving += blocks * MOST_ROUNDS * 2.0 * width * kept / (_SUMS_PER_SECOND * torch.get_num_threads())
    memory = weights * size * (2 if reducer.needs_gradients else 1) + 2 * tokens * hidden * size
    if config.layout == "pad":
        flops += _allocation_flops(allocation, fisher, samples, seq_length) * per_token
        own = _allocation_memory(model, plan, allocation, fisher, samples, seq_length, size)
        # The neurons of every block as they were, for the mean squares of whole columns.
        own += seq_length * blocks * width * size if fisher else 0
        memory = max(memory, weights * size + own)
    memory += 4 * 8 * width**2 if "gram" in reducer.statistics else 0
    memory += 3 * 8 * width * kept if reducer.transports else 0
    memory += 5 * 4 * (structure["parameters_before"] // blocks) + (4 * weights if reducer.needs_gradients else 0)
    if config.searches_budget:
        solving *= 1 + len(budget_candidates(config))
        # Each candidate on a copy of the model, with the held-out windows to score it.
        flops += (flops + samples / 8 * seq_length * per_token) * len(budget_candidates(config))
        memory += weights * size
    return Estimate(
        flops_per_token=per_token,
        nonzero_flops_per_token=per_token - 2 * removed,
        walk_flops=flops,
        seconds=flops / _flops_per_second(device) + solving,
        memory_bytes=int(memory + (_PYTHON_BYTES if device.type == "cpu" else 0)),
        disk_bytes=int((weights - removed) * size * 1.02) + 10_000_000,
    )


def check_fits(predicted: Estimate, device: torch.device, output_dir: str | None) -> None:
    """Raise BadInputError where memory or disk are certain to run out."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if predicted.memory_bytes > free:
        raise BadInputError(
            f"model_name_or_path: pruning needs about {predicted.memory_bytes / 1e9:.1f} GB on {device} and "
            f"{free / 1e9:.1f} GB are free; use a smaller model, dtype bfloat16, fewer num_calibration_samples, "
            "offload disk, or, where thresholds are learned on the whole model, gradient_checkpointing."
        )
    if output_dir is not None:
        parent = next(place for place in Path(output_dir).expanduser().absolute().parents if place.exists())
        free = shutil.disk_usage(parent).free
        if predicted.disk_bytes > free:
            raise BadInputError(
                f"output_dir: the result takes about {predicted.disk_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
                f"free in {parent}; free some space or choose another folder."
            )


def _held(model: PreTrainedModel, offload: str) -> int:
    """Parameters that are on the device at once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if offload == "none":
        return total
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(model)[1]]
    # The block at work, and the next one as it is read and as it is kept in the file.
    return total - sum(blocks) + 3 * max(blocks)


def _largest(plan: Plan) -> int:
    return max(view.numel for view in plan.views)


def _flops_per_token(model: PreTrainedModel, length: int) -> float:
    """torch's counter over one forward on the meta device; twice the weights where a model cannot run there."""
    input_ids = torch.zeros((1, length), dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=input_ids, use_cache=False)
        return counter.get_total_flops() / length
    except Exception:
        logger.debug("no forward on the meta device", exc_info=True)
        return 2.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)


def _flops_per_second(device: torch.device) -> float:
    """Speed of float32 matrix products of a layer's size, measured in a tenth of a second."""
    left = torch.randn(1024, 1024, device=device)
    best = float("inf")
    for _ in range(4):
        start = perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * 1024**3 / best
