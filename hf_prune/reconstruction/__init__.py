"""What makes up for the damage once the support is chosen: a refit of each matrix, or a training of each block."""

from hf_prune.reconstruction.block import BlockReconstruction
from hf_prune.reconstruction.linear import LinearReconstruction

RECONSTRUCTIONS: dict[str, type[LinearReconstruction] | type[BlockReconstruction]] = {
    "linear": LinearReconstruction,
    "block": BlockReconstruction,
}

__all__ = ["RECONSTRUCTIONS", "BlockReconstruction", "LinearReconstruction"]
