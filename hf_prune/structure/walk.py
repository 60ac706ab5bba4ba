"""The structured walk: block by block, observe what a layer consumes, decide, make the block smaller, refit, go on."""

from __future__ import annotations

from contextlib import nullcontext
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from hf_prune.engine.block_training import train_block
from hf_prune.engine.capture import BlockRunner
from hf_prune.engine.gradients import loss_gradients
from hf_prune.engine.stream import Stream
from hf_prune.engine.walk import BlockUpdater
from hf_prune.engine.walk_checkpoint import WalkCheckpoint
from hf_prune.errors import BadInputError
from hf_prune.progress import progress
from hf_prune.structure.block import BlockReduction, steps
from hf_prune.structure.budget import Structure
from hf_prune.structure.depth import drop_blocks, remove_blocks
from hf_prune.structure.groups import find_groups
from hf_prune.structure.importance import check_scores, is_file, read_scores
from hf_prune.structure.reduction import Reducer
from hf_prune.structure.results import ReduceResult
from hf_prune.structure.stock import set_remembered, set_sizes
from hf_prune.weights import find_blocks


def reduce_model(
    model: nn.Module,
    structure: Structure,
    reducer: Reducer,
    input_ids: Tensor | None,
    reconstruction: BlockUpdater | None = None,
    checkpoint: WalkCheckpoint | None = None,
) -> ReduceResult:
    """Make `model` smaller in place, config included; it is usable at once and saves as a stock model.

    Attention goes before the MLP, so that the MLP is decided on what the smaller attention hands over, and each block
    on what the smaller blocks before it do.

    Args:
        input_ids: int64 [samples, tokens], the same on every process; None for a reducer that looks at no text.
        reconstruction: trains each block once it is smaller.
        checkpoint: where the walk is kept between blocks, and gone on with.

    Raises:
        BadInputError: text is needed and missing.
        RunError: a layer saw no tokens, or its inputs overflowed.
        Stopped: the checkpoint was asked to stop.
    """
    result, began = ReduceResult(), perf_counter()
    streams = bool(reducer.statistics) or reconstruction is not None
    needs_text = streams or reducer.needs_gradients or structure.blocks_removed > 0
    if needs_text and input_ids is None:
        raise BadInputError("dataset_name: this method needs calibration text; name a dataset or pass input_ids.")
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    earlier = checkpoint.outcome if checkpoint is not None else None
    if earlier is not None:
        gone = set(earlier["removed_blocks"])
        if gone:
            drop_blocks(model, [index for index in range(structure.blocks) if index not in gone])
    elif structure.blocks_removed:
        assert input_ids is not None
        result.removed_blocks, passes = remove_blocks(model, structure.blocks_removed, input_ids)
        result.forward_passes += passes
    scores = read_scores(reducer.importance) if is_file(reducer.importance) else None
    gradients = None
    # Those of the model that no unit has gone from yet, taken once more where a cut run goes on.
    if reducer.needs_gradients and input_ids is not None:
        gradients = loss_gradients(model, input_ids)
        result.forward_passes += 1
    blocks = find_blocks(model)[1]
    if scores is not None:
        # Before any block has become another.
        needed = [(index, kind) for index in range(len(blocks)) for kind, _ in steps(structure, index)]
        groups = (group for own in needed for group in find_groups(model, *own, structure.before))
        check_scores(reducer.importance, groups, scores)
    with BlockRunner(model) as runner, checkpoint or nullcontext():
        stream = Stream(runner, input_ids) if streams and input_ids is not None else None
        dense = None
        if reconstruction is not None and reconstruction.reconstruct_target == "model" and input_ids is not None:
            dense = Stream(runner, input_ids)

        def turn(index: int) -> BlockReduction:
            return BlockReduction(runner, stream, index, reducer, gradients, result, reconstruction is not None, scores)

        first = 0
        if checkpoint is not None:
            under_way = [own for own in (stream, dense) if own is not None]
            first = checkpoint.restore(
                runner, under_way, result, range(len(blocks)), lambda index: turn(index).resize(structure), began
            )
        for index in progress(range(first, len(blocks)), "reducing blocks", total=len(blocks) - first):
            worker = turn(index)
            targets: list[Tensor | None] = []
            if dense is not None:
                dense.advance(index)
                targets = dense.hidden
            elif reconstruction is not None and stream is not None:
                targets = [runner.run(index, *own) for own in zip(stream.chunks, stream.hidden, strict=True)]
                stream.forward_passes += 1 / len(blocks)
            result.shares += worker.reduce(structure)
            if reconstruction is not None and stream is not None:
                result.reconstruction[index] = train_block(stream, index, worker.trained(), targets, reconstruction)
            if stream is not None and index + 1 < len(blocks):
                stream.advance(index)
            if checkpoint is not None:
                checkpoint.save(index)
        if stream is not None:
            result.forward_passes += stream.forward_passes + (dense.forward_passes if dense else 0.0)
    result.fused = sum(result.shares) / len(result.shares) if result.shares else 0.0
    set_sizes(config, structure.after)
    for block in blocks:
        set_remembered(block, structure.after, config)
    return result
