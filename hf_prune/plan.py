"""The plan: what will be pruned, how much and in which pattern. Printed, saved and loaded before anything changes.

Walk, inspection, verification and reports read the plan and nothing else; masks are results and are not part of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_prune.arguments import PruneConfig, matches
from hf_prune.errors import BadInputError
from hf_prune.layers import routers, unseen_experts
from hf_prune.masks import MaskRule
from hf_prune.patterns import Pattern
from hf_prune.weights import Outputs, WeightView, find_blocks, find_views, own_part

FORMAT = "hf_prune_plan"
VERSION = 1


@dataclass
class ViewPlan:
    """One weight matrix of the plan.

    `floor` says that min_keep_ratio raised its density; `expert`, which slice of a 3-D parameter it is; `outputs`, what
    part of a fused layer it is.
    """

    name: str
    parameter: str
    block: int
    shape: tuple[int, int]
    transposed: bool
    density: float
    pattern: str = "unstructured"
    floor: bool = False
    expert: int | None = None
    outputs: Outputs | None = None

    def own_part(self, tensor: Tensor) -> Tensor:
        """What of a tensor in the parameter's layout belongs to this matrix, as `WeightView.own_part`."""
        return own_part(tensor, self.expert, self.outputs, int(self.transposed))

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass
class Plan:
    """Every weight matrix that will be pruned, in the order of the walk, and what was left out and why.

    With a `structure` (sizes of the blocks before and after, see `structure.budget.Structure`) whole units go:
    `sparsity` is then the share of the blocks' parameters that is removed, and the views are those of the smaller
    model.
    """

    base_model: str
    architecture: str
    sparsity: float
    pattern: str
    allocation: str
    min_keep_ratio: float
    views: list[ViewPlan]
    skipped: list[dict[str, str]] = field(default_factory=list)
    structure: dict[str, Any] | None = None
    # What was found out about the dense model on the way to a plan; not saved, and found again where it is missing.
    fisher_factors: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def rule(self, view: ViewPlan) -> MaskRule:
        """The selection rule of one weight matrix."""
        return MaskRule(view.density, Pattern.parse(view.pattern), self.min_keep_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The versioned JSON form."""
        values = dataclasses.asdict(dataclasses.replace(self, fisher_factors=None))
        del values["fisher_factors"]
        return {"format": FORMAT, "version": VERSION, **values}

    def save(self, path: str | Path) -> None:
        """Write the JSON form."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "plan") -> Plan:
        """Read the JSON form; BadInputError where it is none or of a later version."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise BadInputError(f"{origin}: this is not an hf_prune plan; `hf-prune plan` writes one.")
        if values.get("version") != VERSION:
            raise BadInputError(f"{origin}: plan version {values.get('version')} is unknown; this release reads 1.")
        try:
            rest = {key: value for key, value in values.items() if key not in ("format", "version", "views")}
            views = [
                ViewPlan(
                    **{
                        **view,
                        "shape": tuple(view["shape"]),
                        "density": float(view["density"]),
                        "outputs": Outputs(**view["outputs"]) if view.get("outputs") else None,
                    }
                )
                for view in values["views"]
            ]
            return cls(views=views, **rest)
        except (TypeError, KeyError, ValueError) as error:
            raise BadInputError(f"{origin}: the plan is incomplete or has unknown entries ({error}).") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan; BadInputError where the file is missing or broken."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError) as error:
            raise BadInputError(f"{path}: the plan cannot be read ({error}).") from None


def select_views(
    model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str] | None, *, whole: bool = False
) -> tuple[list[WeightView], list[dict[str, str]]]:
    """The weights that `targets` and `ignore` leave, and what was left out with the reason.

    The model may live on the meta device. Patterns name a fused layer or one part of it.

    Args:
        whole: fused layers are one matrix each.

    Raises:
        BadInputError: a pattern matches nothing, embeddings or a tied LM head are targeted, or nothing is left; or all
            is meant, experts in an unknown layout too.
    """
    prefix, blocks = find_blocks(model)
    unseen = [f"{prefix}.{index}.{name}" for index, block in enumerate(blocks) for name in unseen_experts(block)]
    if unseen and not targets:
        raise BadInputError(
            f"model_name_or_path: {type(model).__name__} keeps experts in a layout that hf_prune does not know "
            f"({len(unseen)} weights, first {unseen[0]}), which would stay dense; "
            + ("" if whole else "prune other layers alone by naming them in targets, or ")
            + "choose another model."
        )
    everything = find_views(model, whole=whole)
    names = [name for view in everything for name in _names(view)]
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    for key, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns or []:
            if any(matches(pattern, name) for name in names):
                continue
            if any(matches(pattern, name) for name in embeddings):
                raise BadInputError(f"{key}: {pattern!r} names an embedding, which is never pruned; remove it.")
            kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise BadInputError(f"{key}: {pattern!r} matches no linear layer of the model; it has {', '.join(kinds)}.")
    chosen, skipped = [], [{"name": name, "reason": "an embedding"} for name in embeddings]
    for view in everything:
        is_head = view.block == len(blocks)
        if targets and not _any_matches(targets, view):
            skipped.append({"name": view.name, "reason": "not a target"})
        elif _any_matches(ignore or [], view):
            skipped.append({"name": view.name, "reason": "ignored"})
        elif is_head and not targets:
            skipped.append({"name": view.name, "reason": "the LM head, pruned only when it is a target"})
        elif is_head and _is_tied(model, view):
            raise BadInputError(
                f"targets: {view.name} is tied to the embeddings, so pruning it zeroes them; remove it from targets."
            )
        else:
            chosen.append(view)
    if not chosen:
        raise BadInputError("ignore: nothing is left to prune; take an entry out of ignore.")
    covered = {view.parameter_name for view in everything}
    for name in sorted(f"{prefix}.{router}" for router in routers(blocks)):
        skipped.append({"name": name, "reason": "a router, which is never pruned"})
        covered.add(f"{name}.weight")
    for name, parameter in model.named_parameters():
        if name.startswith(prefix + ".") and parameter.ndim > 1 and name not in covered:
            skipped.append({"name": name, "reason": f"a {parameter.ndim}-D weight that is no linear layer"})
    return chosen, skipped


def _names(view: WeightView) -> tuple[str, ...]:
    """What a pattern may call a view: a part of a fused layer goes by the layer's name as well."""
    return (view.name,) if view.outputs is None else (view.name, view.layer)


def _any_matches(patterns: Sequence[str], view: WeightView) -> bool:
    return any(matches(pattern, name) for pattern in patterns for name in _names(view))


def _is_tied(model: nn.Module, head: WeightView) -> bool:
    """Whether the head shares its weight with the embeddings; on the meta device only the config can tell."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return embeddings.weight is head.parameter or bool(getattr(config, "tie_word_embeddings", False))


def make_plan(
    model: nn.Module,
    config: PruneConfig,
    views: Sequence[WeightView],
    densities: dict[str, float],
    *,
    patterns: dict[str, str] | None = None,
    held: frozenset[str] = frozenset(),
    skipped: list[dict[str, str]] | None = None,
    base_model: str = "",
) -> Plan:
    """Put an allocation's densities under the floor and the pattern.

    Args:
        densities: share kept of each view, by name; ignored where the pattern is n:m.
        patterns: pattern of each view where they differ (a saved plan's table); `config.pattern` otherwise.
        held: views whose density the floor has already raised.

    Raises:
        BadInputError: a layer's inputs do not divide into groups of m, or the floor is above an n:m density.
    """
    planned = []
    for view in views:
        text = (patterns or {}).get(view.name, config.pattern)
        pattern = Pattern.parse(text)
        if pattern.m is not None and view.shape[1] % pattern.m:
            raise BadInputError(
                f"pattern: {view.name} has {view.shape[1]} inputs, which do not divide into groups of {pattern.m}; "
                "choose another pattern or put the layer on ignore."
            )
        wanted = pattern.density if pattern.density is not None else densities[view.name]
        if pattern.density is not None and pattern.density < config.min_keep_ratio:
            raise BadInputError(f"min_keep_ratio: {config.min_keep_ratio} is more than pattern {text} keeps; lower it.")
        density = max(wanted, config.min_keep_ratio)
        floor = density > wanted or view.name in held
        planned.append(
            ViewPlan(
                view.name,
                view.parameter_name,
                view.block,
                view.shape,
                view.transposed,
                density,
                text,
                floor,
                view.expert,
                view.outputs,
            )
        )
    total = sum(view.numel for view in planned)
    return Plan(
        base_model=base_model,
        architecture=type(model).__name__,
        sparsity=1 - sum(view.density * view.numel for view in planned) / total,
        pattern=planned[0].pattern if len({view.pattern for view in planned}) == 1 else "mixed",
        allocation=Path(config.allocation).name,
        min_keep_ratio=config.min_keep_ratio,
        views=planned,
        skipped=skipped or [],
    )
