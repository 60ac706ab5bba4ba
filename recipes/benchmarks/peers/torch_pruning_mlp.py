"""Narrow the MLPs with Torch-Pruning, for comparison. Runs in the peer's own environment, never in hf_prune's:

    pip install torch==2.13.0 && pip install torch-pruning==1.6.1 transformers safetensors
    python torch_pruning_mlp.py --model FOLDER --token_ids ids.safetensors --sparsity 0.2 --importance taylor \\
        --output OUT --report OUT.json

--sparsity is the share of all the blocks' parameters (attention, MLP and norms) that goes. Every block's MLP keeps the
same number of neurons, each ranked inside its own block, so that a stock config can hold the result. Attention stays as
it is: heads that share keys and values fail in this release (shape '[9, -1]' is invalid for input of size 192).

The importances are the peer's with their defaults: the mean over a neuron's three layers of the sum of squared weights
(magnitude), or of the sum of |weight x gradient| (taylor), where the gradient is that of the language modelling loss
summed over the calibration samples.
"""

import os
from importlib import metadata

from measure import Measurement, make_parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def count_parameters(modules) -> int:
    """Of some modules together."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def kept_width(model, sparsity: float) -> int:
    """The MLP width at which the removed share of the blocks' parameters is nearest to the sparsity."""
    blocks, width = model.model.layers, model.config.intermediate_size
    neuron = count_parameters(block.mlp for block in blocks) / width  # one neuron in every block
    kept = round(width - sparsity * count_parameters(blocks) / neuron)
    if not 0 < kept <= width:
        raise SystemExit(f"--sparsity {sparsity}: the MLPs alone cannot give that much of the blocks' parameters.")
    return kept


def accumulate_gradients(model, input_ids) -> None:
    """Leave the gradient of the loss, summed over the samples, on the parameters."""
    for row in input_ids:
        model(input_ids=row[None], labels=row[None]).loss.backward()


def narrow(model, input_ids, kept: int, importance: str) -> None:
    """Prune every MLP to `kept` neurons, in place, config included."""
    import torch
    import torch_pruning

    if importance == "taylor":
        accumulate_gradients(model, input_ids)
        score = torch_pruning.importance.GroupTaylorImportance()
    else:
        score = torch_pruning.importance.GroupMagnitudeImportance()
    width = model.config.intermediate_size
    makers = {layer for block in model.model.layers for layer in (block.mlp.gate_proj, block.mlp.up_proj)}
    others = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding) and m not in makers]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        input_ids[:1, :16],  # only the graph is read off it
        importance=score,
        # The peer keeps int(width * (1 - ratio)) neurons: half a neuron more, so that rounding cannot lose one.
        pruning_ratio=1 - (kept + 0.5) / width if kept < width else 0.0,
        ignored_layers=others,
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    widths = {block.mlp.down_proj.in_features for block in model.model.layers}
    if widths != {kept}:
        raise SystemExit(f"torch-pruning left MLP widths {sorted(widths)} where {kept} was asked for.")
    model.config.intermediate_size = kept  # the peer changes modules, not configs


def main() -> None:
    """Load, prune and save, each measured by itself."""
    parser = make_parser(__doc__)
    parser.add_argument("--importance", choices=("magnitude", "taylor"), default="taylor")
    arguments = parser.parse_args()
    measurement = Measurement()
    with measurement.phase("import"):
        import torch
        import torch_pruning  # noqa: F401 (its import is measured here, not with the pruning)
        import transformers
        from safetensors.torch import load_file
    with measurement.phase("load"):
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        input_ids = load_file(arguments.token_ids)["input_ids"]
    before, use_cache = count_parameters(model.model.layers), model.config.use_cache
    kept = kept_width(model, arguments.sparsity)
    model.config.use_cache = False  # a cache in the output breaks the peer's tracing
    with measurement.phase("prune"):
        narrow(model, input_ids, kept, arguments.importance)
    model.config.use_cache = use_cache
    with measurement.phase("save"):
        model.save_pretrained(arguments.output)
    measurement.write(
        arguments.report,
        versions={
            "torch_pruning": metadata.version("torch-pruning"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        threads=torch.get_num_threads(),
        removed_share=1 - count_parameters(model.model.layers) / before,
        kept_width=kept,
    )


if __name__ == "__main__":
    main()
