"""From a recipe's words to the parts of a run: criterion, update, reconstruction, allocation, and their own keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from hf_prune.allocation import ALLOCATIONS, Allocation
from hf_prune.arguments import SECTIONS, PruneConfig, StructuredConfig, resolved_allocation, resolved_reconstruct
from hf_prune.errors import BadInputError
from hf_prune.fields import coerce, field_types, fill, unknown_key
from hf_prune.methods import find_method, methods
from hf_prune.methods.base import NoUpdate, Solver
from hf_prune.reconstruction import RECONSTRUCTIONS, BlockReconstruction, LinearReconstruction

DEFAULT_METHOD = "balanced"
# Parts that are chosen by a key of every config.
PART_TABLES: dict[str, Mapping[str, type]] = {"reconstruct": RECONSTRUCTIONS, "allocation": ALLOCATIONS}
Part = TypeVar("Part")


def make_config(options: Mapping[str, Any]) -> PruneConfig:
    """Turn the pruning keys of a recipe into the method's config, every key checked.

    Raises:
        BadInputError: an unknown method, an unknown key, a value of the wrong type or out of range, parts that make no
            sense together.
    """
    for key in ("method", "criterion", "update"):
        if options.get(key) == "":
            raise BadInputError(f"{key}: it is empty; name one, or leave the key out.")
    values = _with_method(options)
    main = find_method("method", values["method"]) if values.get("method") else PruneConfig
    known = known_keys(values)
    for key in values:
        if key not in known:
            raise _unused_key(key) or unknown_key(key, known)
    config = fill(main, {key: value for key, value in values.items() if key in field_types(main)})
    config.options = {
        key: coerce(key, value, known[key]) for key, value in values.items() if key not in field_types(main)
    }
    if isinstance(config, StructuredConfig):
        make_allocation(config)
        make_block_reconstruction(config)
        return config
    # The parts check their own values.
    _check_output_importance(config, make_solver(config))
    make_block_reconstruction(config)
    rule = make_allocation(config)
    if getattr(config, "train_weights", False) and not getattr(rule, "learns", False):
        raise BadInputError(
            f"train_weights: weights are learned together with thresholds, which allocation {config.allocation} does "
            "not learn; set allocation to fcpts."
        )
    return config


def _check_output_importance(config: PruneConfig, solver: Solver) -> None:
    """Raise BadInputError where weights are compared inside a row, so that nothing depends on it."""
    if config.output_importance == "none":
        return
    if config.pattern != "unstructured":
        raise BadInputError(
            f"output_importance: pattern {config.pattern} compares weights inside a row, whatever its outputs count; "
            "leave it out or set pattern to unstructured."
        )
    if solver.criterion is not None and solver.criterion.by_row:
        raise BadInputError(
            f"output_importance: criterion {solver.criterion_name} compares weights inside a row, whatever its outputs "
            "count; leave it out or choose another criterion."
        )


def _with_method(options: Mapping[str, Any]) -> dict[str, Any]:
    chosen = options.get("method") or options.get("criterion")
    return {**options} if chosen else {**options, "method": DEFAULT_METHOD}


def known_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """The pruning keys that the method and the parts named in `options` understand, with their types.

    Raises:
        BadInputError: an unknown method, criterion or update.
    """
    values = _with_method(options)
    main = find_method("method", values["method"]) if values.get("method") else PruneConfig
    known = dict(field_types(main))
    del known["options"]
    for part in _named_parts(values):
        own = field_types(part)
        known |= {key: own[key] for key in own.keys() - field_types(PruneConfig).keys() - known.keys()}
    return known


def belongs_to_a_part(key: str) -> bool:
    """Whether some method, allocation or reconstruction has a key of that name."""
    return _unused_key(key) is not None and key not in field_types(PruneConfig)


def is_recipe_key(key: str) -> bool:
    """Whether a recipe may hold the key, with some choice of parts."""
    sections = (*SECTIONS.values(), PruneConfig)
    return belongs_to_a_part(key) or any(key in field_types(section) for section in sections)


def _unused_key(key: str) -> BadInputError | None:
    """The error for a key of a part that the recipe does not choose; None where no part knows the key."""
    for word, table in {**PART_TABLES, "method": methods()}.items():
        owners = [name for name, part in table.items() if key in field_types(part)]
        if owners:
            choice = " or ".join(f"{word}: {name}" for name in owners)
            return BadInputError(
                f"{key}: this key belongs to {choice}, which the recipe does not choose; leave it out."
            )
    return None


def _named_parts(values: Mapping[str, Any]) -> list[type]:
    """Classes of the parts that a recipe names beside its method; what is unknown is found out later."""
    parts: list[type] = []
    for key in ("criterion", "update"):
        if values.get(key) and (key, values[key]) != ("update", "none"):
            parts.append(find_method(key, values[key]))
    defaults = find_method("method", values["method"]) if values.get("method") else PruneConfig
    chosen = {key: str(values.get(key) or getattr(defaults, key)) for key in ("reconstruct", "allocation", "pattern")}
    propagate = str(values.get("propagate", defaults.propagate)).lower() != "false"
    chosen["allocation"] = resolved_allocation(chosen["allocation"], chosen["pattern"])
    chosen["reconstruct"] = resolved_reconstruct(chosen["reconstruct"], chosen["pattern"], propagate)
    for key, table in PART_TABLES.items():
        part = table.get(chosen[key])
        parts += [part] if part else []
    return parts


def own_options(config: PruneConfig) -> dict[str, Any]:
    """The keys of a config's method and of the parts that it chooses, with their values."""
    everything = {**vars(config), **config.options}
    for key in field_types(PruneConfig):
        everything.pop(key, None)
    chosen = {key: getattr(config, key) for key in PART_TABLES}
    unused = {name for key, table in PART_TABLES.items() for kind in table.values() for name in field_types(kind)}
    for key, table in PART_TABLES.items():
        unused -= field_types(table[chosen[key]]).keys() if chosen[key] in table else set()
    if isinstance(config, StructuredConfig):
        return {key: value for key, value in everything.items() if key not in unused}
    # A criterion may share a key with an allocation.
    unused -= field_types(find_method("criterion", make_solver(config).criterion_name)).keys()
    return {key: value for key, value in everything.items() if key not in unused}


def _fill_part(kind: type[Part], config: PruneConfig) -> Part:
    """A part with the keys that the config holds for it, its defaults otherwise."""
    everything = {**vars(config), **config.options}
    own = field_types(kind).keys() - field_types(PruneConfig).keys()
    return kind(**{key: value for key, value in everything.items() if key in own})


def make_solver(config: PruneConfig) -> Solver:
    """The criterion, the update and the refit that a config names.

    Raises:
        BadInputError: an unknown criterion or update, a method without that part, or parts that exclude one another.
    """
    main = find_method("method", config.method) if config.method else None
    criterion = config.criterion or (main.criterion_name if main else None)
    update = config.update or (main.update_name if main else "none")
    if criterion is None:
        raise BadInputError(f"criterion: the config does not say; choose one of {', '.join(methods())}.")

    def part_config(key: str, name: str) -> PruneConfig:
        kind = find_method(key, name)
        return config if isinstance(config, kind) else _fill_part(kind, config)

    chosen = None
    if criterion != update:
        chosen = part_config("criterion", criterion).make_criterion()
        if chosen is None:
            raise BadInputError(
                f"criterion: {criterion} selects weights only while it updates them; set update: {criterion} as well, "
                "or choose another criterion."
            )
    changed = NoUpdate() if update == "none" else part_config("update", update).make_update()
    if changed is None:
        able = [name for name, kind in methods().items() if kind.update_name == name]
        raise BadInputError(f"update: {update} does not change weights; choose none or {', '.join(able)}.")
    refit = None
    if config.reconstruct == "linear":
        if update == "admm":
            raise BadInputError(
                "reconstruct: linear is what the update admm ends with already; leave reconstruct out or take block."
            )
        refit = _fill_part(LinearReconstruction, config)
    return Solver(criterion, chosen, update, changed, refit)


def make_block_reconstruction(config: PruneConfig) -> BlockReconstruction | None:
    """The training of each block after its solves; None unless `reconstruct: block`."""
    if config.reconstruct != "block":
        return None
    if not config.propagate:
        raise BadInputError(
            "propagate: false leaves no pruned inputs that reconstruct: block could train on; set propagate to true."
        )
    return _fill_part(BlockReconstruction, config)


def make_allocation(config: PruneConfig) -> Allocation | None:
    """The rule that shares the budget out; None where a saved plan does.

    Raises:
        BadInputError: the rule is unknown, or the pattern leaves it nothing to decide.
    """
    if config.allocation.endswith(".json"):
        return None
    if config.allocation not in ALLOCATIONS:
        raise BadInputError(
            f"allocation: {config.allocation!r} is unknown; choose {', '.join(ALLOCATIONS)} or the path of a "
            "prune_plan.json."
        )
    if config.allocation != "uniform" and config.pattern != "unstructured":
        raise BadInputError(
            f"allocation: pattern {config.pattern} keeps the same share of every layer, which leaves "
            f"{config.allocation} nothing to decide; set allocation to uniform or pattern to unstructured."
        )
    rule = _fill_part(ALLOCATIONS[config.allocation], config)
    if getattr(rule, "train_weights", False):
        _check_training(config)
    return rule


def _check_training(config: PruneConfig) -> None:
    """Weights that are learned with their thresholds leave nothing for other parts to do."""
    if config.method != "fcpts":
        raise BadInputError(
            f"train_weights: method {config.method or config.criterion} starts from the dense weights; leave it out or "
            "set method to fcpts."
        )
    wanted: dict[str, tuple[str | None, ...]] = {
        "criterion": (None, "fcpts"),
        "update": (None, "none"),
        "reconstruct": ("none",),
        "fcpts_score": (None, "magnitude"),
    }
    for key, allowed in wanted.items():
        value = getattr(config, key, None)
        if value not in allowed:
            raise BadInputError(
                f"{key}: {value} would start from weights that have been trained already; leave it out or set "
                "train_weights to false."
            )


def needs_text(config: PruneConfig) -> bool:
    """Whether anything of the run looks at calibration text."""
    if isinstance(config, StructuredConfig):
        reducer = config.make_reducer()
        rule = make_allocation(config)
        shared = bool(rule and rule.needs_text) or "depth" in (config.units or []) or config.searches_budget
        return bool(reducer.statistics or reducer.needs_gradients or shared or config.reconstruct != "none")
    allocation = make_allocation(config)
    return bool(
        make_solver(config).statistics
        or (allocation and allocation.needs_text)
        or needs_fisher(config)
        or config.reconstruct != "none"
    )


def needs_fisher(config: PruneConfig) -> bool:
    """Whether the run takes output gradients of the dense model."""
    rule = make_allocation(config)
    return config.output_importance != "none" or bool(rule and rule.needs_fisher)
