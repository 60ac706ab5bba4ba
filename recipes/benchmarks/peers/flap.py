"""Prune heads and neurons by FLAP (An et al., 2024, arXiv 2312.11983), for comparison: written from its formulas.

    python flap.py --model FOLDER --token_ids ids.safetensors --sparsity 0.2 --output OUT --report OUT.json

Runs in any environment with transformers; nothing of hf_prune or of the authors' code is used. The published default
(WIFV, AL-AM), in one forward pass over the dense model:

1. The score of an input feature of o_proj or down_proj is its sample variance times the squared norm of its column.
2. Scores are standardised over the features of each layer; a head's is the mean over its features.
3. One threshold for the heads and neurons of all blocks. It is set where the parameters of what is kept come nearest to
   the budget, a head counting for as many neurons as it has parameters (512 / 3 of them in LLaMA-7B).
4. What is lost on average comes back as a bias of o_proj or down_proj: the pruned columns times their features' means.

The authors' code squares the attention's scores before it standardises them, which the paper does not say:
--attention_score code (the default, since the published figures are the code's) or paper.

Where query heads share keys and values (grouped-query attention, unknown to the paper), the unit is a whole key-value
group: its query heads, key and value, scored by the mean over all features of its heads. A group is bigger than a head,
so attention is pruned in coarser steps.

The widths that remain differ from block to block, which no stock config can hold. So the shapes stay, pruned units are
zero, and the biases are kept by Llama's own `attention_bias` and `mlp_bias` (zeros for the layers without one): the
published model in numbers, loadable by stock transformers, without its speed. The biases do not count as parameters.

Gemma's config has no `mlp_bias`. Where a layer can hold no bias, --missing_bias says what becomes of it: `fold` (the
default) adds it to the kept columns by a mix of their features that is one on average, so that the mean output is that
of the published model, with some variance on top; `leave_out` is FLAP's choice of units alone. Neither is published;
the report says where it was done. Where a block has one key-value group (Gemma-3-270m), its score is a mean of
standardised values, which is zero, so that attention stays at moderate sparsities.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass

from measure import Measurement, make_parser

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Moments:
    """Mean and variance of features over all tokens seen, in float64, batches merged by Chan's formula."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, tokens) -> None:
        """Take in [tokens, features]."""
        tokens = tokens.double()
        mean = tokens.mean(0)
        total, step = self.count + len(tokens), mean - self.mean
        self.squares = self.squares + (tokens - mean).square().sum(0) + step**2 * (self.count * len(tokens) / total)
        self.mean = self.mean + step * (len(tokens) / total)
        self.count = total

    @property
    def variance(self):
        """Of the sample: over one less than the tokens."""
        return self.squares / (self.count - 1)


@dataclass
class Coupling:
    """The layers of one block that share units: rows of `makers` and columns of `consumer`, in equal shares.

    `power` is what the scores are raised to before they are standardised.
    """

    makers: list
    consumer: object
    units: int
    power: int
    moments: Moments

    @property
    def parameters_of_a_unit(self) -> int:
        """Weights that go with one unit."""
        return sum(layer.weight.numel() for layer in (*self.makers, self.consumer)) // self.units

    def scores(self):
        """Standardised score of each unit."""
        scores = (self.moments.variance * self.consumer.weight.double().square().sum(0)) ** self.power
        scores = (scores - scores.mean()) / scores.std()
        return scores.view(self.units, -1).mean(1)

    def zero(self, gone, fold: bool) -> None:
        """Zero the units where `gone` is true; their mean contribution becomes the consumer's bias.

        Args:
            fold: where the consumer has no bias, add it to the kept columns instead.
        """
        columns = gone.repeat_interleave(self.consumer.in_features // self.units)
        lost = self.consumer.weight[:, columns].double() @ self.moments.mean[columns]
        self.consumer.weight[:, columns] = 0
        if self.consumer.bias is not None:
            self.consumer.bias += lost.to(self.consumer.bias)
        elif fold:
            self.consumer.weight += (lost[:, None] * self.constant(~columns)).to(self.consumer.weight)
        for layer in self.makers:
            rows = gone.repeat_interleave(layer.out_features // self.units)
            layer.weight[rows] = 0
            if layer.bias is not None:
                layer.bias[rows] = 0

    def constant(self, kept):
        """[features]: the mix of kept features that is one on average and, were they independent, varies least."""
        mean, variance = self.moments.mean, self.moments.variance
        mix = kept * mean / variance.clamp(min=1e-12 * variance.max())
        total = mix @ mean
        return mix / total if total > 0 else mix * 0


def find_couplings(model, attention_power: int) -> list[Coupling]:
    """Attention and MLP of each block, in order."""
    config = model.config
    couplings = []
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        makers = [attention.q_proj, attention.k_proj, attention.v_proj]
        couplings.append(Coupling(makers, attention.o_proj, config.num_key_value_heads, attention_power, Moments()))
        couplings.append(Coupling([mlp.gate_proj, mlp.up_proj], mlp.down_proj, config.intermediate_size, 1, Moments()))
    return couplings


def observe(model, couplings: list[Coupling], input_ids) -> None:
    """Moments of what the consumers are handed, over all calibration tokens of the dense model."""
    import torch

    def make_hook(moments):
        return lambda layer, arguments: moments.add(arguments[0].flatten(0, -2))

    handles = [coupling.consumer.register_forward_pre_hook(make_hook(coupling.moments)) for coupling in couplings]
    with torch.inference_mode():
        for row in input_ids:
            model.model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()


def choose(couplings: list[Coupling], goal: float):
    """For each coupling, which units go: those of the lowest scores, until their parameters come nearest to `goal`."""
    import torch

    scores = [coupling.scores() for coupling in couplings]
    sizes = [
        torch.full((coupling.units,), coupling.parameters_of_a_unit, dtype=torch.float64) for coupling in couplings
    ]
    order = torch.cat(scores).argsort(stable=True)
    removed = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cat(sizes)[order].cumsum(0)])
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[: int((removed - goal).abs().argmin())]] = True
    return gone.split([coupling.units for coupling in couplings])


def give_biases(model) -> list[str]:
    """A bias of zeros for every layer of the blocks that the config lets have one; the parts that stay without."""
    import torch

    without = []
    for name, key in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
        if not hasattr(model.config, key):
            without.append(name)
            continue
        for block in model.model.layers:
            for layer in getattr(block, name).modules():
                if isinstance(layer, torch.nn.Linear) and layer.bias is None:
                    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
        setattr(model.config, key, True)
    return without


def said(without: Collection[str], fold: bool) -> str:
    """What became of the bias compensation, for the report."""
    if not without:
        return "kept as biases"
    return f"{'folded into the kept columns' if fold else 'left out'} in {', '.join(without)}"


def main() -> None:
    """Load, prune and save, each measured by itself."""
    parser = make_parser(__doc__)
    parser.add_argument("--attention_score", choices=("code", "paper"), default="code", help="squared, or as it is")
    parser.add_argument("--missing_bias", choices=("fold", "leave_out"), default="fold", help="where none can be held")
    arguments = parser.parse_args()
    measurement = Measurement()
    with measurement.phase("import"):
        import torch
        import transformers
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    with measurement.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        input_ids = load_file(arguments.token_ids)["input_ids"]
    parameters = sum(parameter.numel() for parameter in model.model.layers.parameters())
    with measurement.phase("prune"), torch.no_grad():
        couplings = find_couplings(model, attention_power=2 if arguments.attention_score == "code" else 1)
        observe(model, couplings, input_ids)
        gone = choose(couplings, arguments.sparsity * parameters)
        without, fold = give_biases(model), arguments.missing_bias == "fold"
        for coupling, units in zip(couplings, gone, strict=True):
            coupling.zero(units, fold)
    with measurement.phase("save"):
        model.save_pretrained(arguments.output)
    kept = [int((~units).sum()) for units in gone]
    removed = sum(int(u.sum()) * coupling.parameters_of_a_unit for u, coupling in zip(gone, couplings, strict=True))
    print(f"bias compensation: {said(without, fold)}")
    measurement.write(
        arguments.report,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        threads=torch.get_num_threads(),
        removed_share=removed / parameters,
        compensation=said(without, fold),
        kept_groups=kept[::2],
        kept_neurons=kept[1::2],
    )


if __name__ == "__main__":
    main()
