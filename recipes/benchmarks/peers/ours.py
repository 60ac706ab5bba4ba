"""Prune with hf_prune, with the command line and the measuring rule of its peers.

python ours.py --model FOLDER --token_ids ids.safetensors --method sparsegpt --output OUT --report OUT.json
"""

from measure import Measurement, parse_arguments


def main() -> None:
    """Load, prune and save, each measured by itself."""
    arguments = parse_arguments(__doc__)
    measurement = Measurement()
    with measurement.phase("import"):
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        from hf_prune import __version__, prune
        from hf_prune.compose import make_config

        options = {"method": arguments.method, "sparsity": arguments.sparsity, "pattern": arguments.pattern}
        config = make_config(options)
    with measurement.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        input_ids = load_file(arguments.token_ids)["input_ids"]
    with measurement.phase("prune"):
        prune(model, config, input_ids=input_ids)
    with measurement.phase("save"):
        model.save_pretrained(arguments.output)
    versions = {"hf_prune": __version__, "torch": torch.__version__}
    measurement.write(arguments.report, versions=versions, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
