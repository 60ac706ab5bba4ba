"""Prune with llm-compressor, for comparison. Runs in the peer's own environment, never in hf_prune's:

    pip install torch==2.13.0 && pip install llmcompressor==0.14.0.1
    python llm_compressor.py --model FOLDER --token_ids ids.safetensors --method wanda --output OUT --report OUT.json

Its defaults hold wherever the comparison does not fix them: batch size 1, the "independent" pipeline (which infers the
sequential one: two forward passes over the calibration set), block size 128 and damping 0.01 for SparseGPT.
"""

import os

from measure import Measurement, parse_arguments

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def build_modifier(method: str, sparsity: float, pattern: str) -> object:
    """The peer's modifier for the Linears inside the decoder blocks."""
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    modifiers = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    if method not in modifiers:
        # MagnitudePruningModifier only masks during training: after oneshot every weight is as it was (0.14.0.1).
        raise SystemExit(f"llm-compressor's oneshot has no {method} pruning; choose one of {', '.join(modifiers)}.")
    if pattern == "unstructured":
        structure = "0:0"
    else:
        kept, group = map(int, pattern.split(":"))
        structure = f"{group - kept}:{group}"  # the peer's n counts the zeros
    return modifiers[method](sparsity=sparsity, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])


def main() -> None:
    """Load, prune and save, each measured by itself."""
    arguments = parse_arguments(__doc__)
    measurement = Measurement()
    with measurement.phase("import"):
        import torch
        from llmcompressor import __version__, oneshot
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        modifier = build_modifier(arguments.method, arguments.sparsity, arguments.pattern)
    with measurement.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        # Handed over so that oneshot need not load it: it tokenises nothing here.
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        input_ids = load_file(arguments.token_ids)["input_ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in input_ids]
    # A loader of our own is taken as it is: no shuffling, truncation or tokenisation.
    calibration = torch.utils.data.DataLoader(samples, batch_size=1)
    with measurement.phase("prune"):
        oneshot(model=model, processor=tokenizer, dataset=calibration, recipe=[modifier])
    with measurement.phase("save"):
        model.save_pretrained(arguments.output, save_compressed=False)  # dense tensors with zeros, loadable anywhere
    versions = {"llmcompressor": __version__, "torch": torch.__version__}
    measurement.write(arguments.report, versions=versions, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
