"""A tiny model with fewer units."""

from tiny import tiny_ids, tiny_model

from hf_prune.compose import make_config
from hf_prune.pruning import prune


def reduced(family, ids=None, **options):
    """(model, result) of a family's tiny model, a quarter of its blocks gone unless options say otherwise."""
    model = tiny_model(family)
    config = make_config({"method": "intra_fusion", "sparsity": 0.25, **options})
    return model, prune(model, config, input_ids=tiny_ids(8, 32) if ids is None else ids)
