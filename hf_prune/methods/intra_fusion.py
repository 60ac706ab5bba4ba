"""Intra-Fusion: structured pruning that fuses the units it removes into those that stay, by optimal transport."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_prune.arguments import StructuredConfig
from hf_prune.errors import BadInputError
from hf_prune.methods.base import MethodInfo, register
from hf_prune.structure.fusion import NORMALIZATIONS
from hf_prune.structure.importance import IMPORTANCES, is_file
from hf_prune.structure.reduction import FUSIONS, Reducer
from hf_prune.structure.transport import COSTS, MASSES, SOLVERS, TARGETS

# importance -> what it is, and whose.
_RANKINGS: dict[str, tuple[str, str | None, str | None]] = {
    "l1": ("the sum of their weights' magnitudes", None, None),
    "product": ("the product of their layers' norms", None, None),
    "random": ("chance", None, None),
    "taylor": (
        "first-order Taylor scores",
        "https://arxiv.org/abs/2305.11627",
        "LLM-Pruner: On the Structural Pruning of Large Language Models",
    ),
    "activation": ("the norm of their activations", None, None),
    "wanda": (
        "Wanda scores of their columns",
        "https://arxiv.org/abs/2306.11695",
        "A Simple and Effective Pruning Approach for Large Language Models",
    ),
    "variance": (
        "fluctuation scores",
        "https://arxiv.org/abs/2312.11983",
        "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    ),
    "output": (
        "the output error that the others cannot make up for",
        "https://arxiv.org/abs/2302.04089",
        "ZipLM: Inference-Aware Structured Pruning of Language Models",
    ),
}
CHOICES = {
    "fusion": FUSIONS,
    "importance": tuple(IMPORTANCES),
    "fusion_target": TARGETS,
    "fusion_cost": COSTS,
    "source_mass": MASSES,
    "target_mass": MASSES,
    "normalization": NORMALIZATIONS,
    "fusion_solver": SOLVERS,
}


@register
@dataclass
class IntraFusionConfig(StructuredConfig):
    """Towards Meta-Pruning via Optimal Transport (Theus et al., ICLR 2024, https://arxiv.org/abs/2402.07839).

    The published method is `fusion: ot` with the other defaults and `normalization: code`: data-free, no text is looked
    at. The transfer to language models, `preserve`, the activation cost and the refit are ours.

    Args:
        fusion: `none` drops units; `ot` fuses them by optimal transport (the paper); `ot+refit` then fits the consumer
            to the dense outputs on calibration text; `refit` drops, then fits.
        importance: which units stay: `l1` (the paper's default), `product` of norms, `random`, `taylor`, `activation`,
            `wanda`, `variance`, or `output`, which removes the unit whose loss the others can make up for best; or a
            .safetensors file with float [units] under `mlp.0`, `attention.0`, `heads.0`, ..., for every block.
        fusion_target: what units are fused towards: the `top` units (the paper's default) or `kmeans` centres.
        fusion_cost: distances between units by their `weights` (L1 between normalised features, the paper) or by their
            `activations` on calibration text.
        source_mass, target_mass: `uniform` (the paper's default) or by `importance`.
        normalization: `preserve` averages what makes a unit and sums what consumes it; `code` sums both (algorithm 2
            and the released code), `target` averages both (the paper's prose).
        fusion_solver: `emd` (exact), `sinkhorn`, `nearest`; `auto` is exact up to 4,096 units, nearest beyond.
        damping: pulls the refit towards the weights as they were: added to the Gram matrix's diagonal, as a share of
            its mean (chosen on SmolLM2-135M and 16 x 512 tokens).
    """

    method: str | None = "intra_fusion"
    fusion: str = "ot"
    importance: str = "l1"
    fusion_target: str = "top"
    fusion_cost: str = "weights"
    source_mass: str = "uniform"
    target_mass: str = "uniform"
    normalization: str = "preserve"
    fusion_solver: str = "auto"
    damping: float = 0.3

    info = MethodInfo(
        name="intra_fusion",
        title="Intra-Fusion",
        summary="structured: fuses units into fewer by optimal transport, for a smaller and faster stock model",
        paper="https://arxiv.org/abs/2402.07839",
        paper_title="Towards Meta-Pruning via Optimal Transport",
        citation="""@inproceedings{theus2024intrafusion,
  title={Towards Meta-Pruning via Optimal Transport},
  author={Alexander Theus and Olin Geimer and Friedrich Wicke and Thomas Hofmann and Sotiris Anagnostidis and
          Sidak Pal Singh},
  booktitle={International Conference on Learning Representations},
  year={2024}
}""",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in CHOICES.items():
            named = key == "importance" and is_file(self.importance)
            if getattr(self, key) not in allowed and not named:
                raise BadInputError(f"{key}: {getattr(self, key)!r} is unknown; choose {', '.join(allowed)}.")
        if self.damping <= 0:
            raise BadInputError(f"damping: {self.damping} leaves a singular matrix; use a small positive share.")
        if self.importance == "output" and "importance" in (self.source_mass, self.target_mass):
            raise BadInputError("importance: output ranks units and gives no masses; set both masses to uniform.")
        if is_file(self.importance) and "depth" in (self.units or []):
            raise BadInputError("importance: a file scores no whole blocks; leave depth out of units.")
        if self.fusion_target == "kmeans" and self.fusion_cost == "activations":
            raise BadInputError("fusion_target: kmeans finds centres of weights; set fusion_cost to weights.")

    def describe_run(self) -> MethodInfo:
        """What this choice of options is: the paper's method only where units are fused."""
        units = self.units or []
        if set(units) == {"depth"}:
            return MethodInfo(
                name="structured-depth",
                title="structured pruning (whole blocks)",
                summary="removes the blocks that change their input least",
                paper="https://arxiv.org/abs/2403.03853",
                paper_title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
            )
        depth = "; blocks of least influence go whole (ShortGPT)" if "depth" in units else ""
        refit = ", then fits what consumes them to the dense outputs" if self.fusion.endswith("refit") else ""
        if self.make_reducer().fuses(units):
            summary = f"fuses the units that go into those that stay by optimal transport{refit}{depth}"
            return replace(self.info, summary=summary)
        scored = is_file(self.importance)
        title, paper, paper_title = ("scores of a file", None, None) if scored else _RANKINGS[self.importance]
        return MethodInfo(
            name=f"structured-{'scores' if scored else self.importance}" + ("-refit" if refit else ""),
            title=f"structured pruning ({title}{', least-squares refit' if refit else ''})",
            summary=f"removes the units that matter least by {title}{refit}{depth}",
            paper=paper,
            paper_title=paper_title,
        )

    def make_reducer(self, seed: int = 0) -> Reducer:
        """The method's arithmetic for one group."""
        return Reducer(**{key: getattr(self, key) for key in CHOICES}, damping=self.damping, seed=seed)
