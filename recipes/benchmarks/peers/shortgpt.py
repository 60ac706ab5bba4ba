"""Remove whole blocks by ShortGPT (Men et al., 2024), for comparison: written from the paper, plain transformers only.

    python shortgpt.py --model FOLDER --token_ids ids.safetensors --sparsity 0.2 --output OUT --report OUT.json

A block's influence is 1 - mean cosine between the hidden states it is handed and those it hands on. The blocks of least
influence go, as many as bring the removed share of the blocks' parameters nearest to --sparsity. All influences are
those of the dense model, as published.
"""

import os

from measure import Measurement, make_parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def block_influences(model, input_ids):
    """Influence of each decoder block over all calibration tokens."""
    import torch

    blocks = model.model.layers
    distances = torch.zeros(len(blocks), dtype=torch.float64)

    def make_hook(index):
        def hook(block, arguments, output):
            cosines = torch.nn.functional.cosine_similarity(arguments[0].double(), output.double(), dim=-1)
            distances[index] += (1 - cosines).sum()

        return hook

    # Hooks, since `output_hidden_states` gives the last block's states only after the final norm.
    handles = [block.register_forward_hook(make_hook(index)) for index, block in enumerate(blocks)]
    with torch.inference_mode():
        for row in input_ids:
            model.model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return distances / input_ids.numel()


def choose_blocks(influences: list[float], sizes: list[int], sparsity: float) -> list[int]:
    """The blocks to remove, least influence first."""
    order = sorted(range(len(sizes)), key=lambda index: influences[index])
    goal = sparsity * sum(sizes)
    # At least one block stays.
    count = min(range(len(sizes)), key=lambda count: abs(sum(sizes[index] for index in order[:count]) - goal))
    return order[:count]


def keep_blocks(model, kept: list[int]) -> None:
    """Leave some blocks in place, in order. Their numbers in the state dict, hence in the saved file, close up."""
    import torch

    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        # Sliding or full attention, block by block.
        model.config.layer_types = [model.config.layer_types[index] for index in kept]


def main() -> None:
    """Load, prune and save, each measured by itself."""
    arguments = make_parser(__doc__).parse_args()
    measurement = Measurement()
    with measurement.phase("import"):
        import torch
        import transformers
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    with measurement.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        input_ids = load_file(arguments.token_ids)["input_ids"]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in model.model.layers]
    with measurement.phase("prune"):
        influences = block_influences(model, input_ids).tolist()
        removed = choose_blocks(influences, sizes, arguments.sparsity)
        keep_blocks(model, [index for index in range(len(sizes)) if index not in removed])
    with measurement.phase("save"):
        model.save_pretrained(arguments.output)
    measurement.write(
        arguments.report,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        threads=torch.get_num_threads(),
        removed_share=sum(sizes[index] for index in removed) / sum(sizes),
        removed_blocks=removed,
        influences=influences,
    )


if __name__ == "__main__":
    main()
