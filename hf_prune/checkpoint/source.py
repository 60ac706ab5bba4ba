"""The tensors of safetensors files by the names that a model knows them by, read when they are asked for.

What files keep under other names or in other shapes (the experts of a mixture) goes through transformers' conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_prune.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightFiles:
    """Parameters and persistent buffers of `model`, as `from_pretrained` would find them in some files.

    A tensor that is kept as the model has it is mapped from its file: it takes no memory of its own until it is written
    to, which leaves the file alone.

    Args:
        model: on the meta device or not, as `from_pretrained` has made it: it knows which conversions its files took.
    """

    def __init__(self, model: PreTrainedModel, files: Sequence[Path]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self._model = model
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            # It was made, not loaded.
            conversions = get_model_conversion_mapping(model, add_legacy=False)
        renamings = [own for own in conversions if isinstance(own, WeightRenaming)]
        converters = [own for own in conversions if isinstance(own, WeightConverter)]
        self._converters = {pattern: own for own in converters for pattern in own.source_patterns}
        # What a tensor of the model is made of: (key in the file, file, pattern of the converter or None).
        self._parts: dict[str, list[tuple[str, Path, str | None]]] = {}
        keys = {key: file for file in files for key in _keys(file)}
        known: Any = model.state_dict()
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
            if name in known:
                self._parts.setdefault(name, []).append((key, keys[key], pattern))
        # Of these files alone: there are as many of them as blocks.
        self._dtypes = {name: known[name].dtype for name in self._parts}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Tensors on the CPU by name, in the model's dtypes; those made of the same stored ones come together.

        Raises:
            BadInputError: a file is damaged.
        """
        found: dict[str, Tensor] = {}
        opened: dict[Path, Any] = {}
        with ExitStack() as stack:

            def read(file: Path, key: str) -> Tensor:
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                    tensor: Tensor = opened[file].get_tensor(key)
                    return tensor
                except (SafetensorError, OSError) as error:
                    raise BadInputError(
                        f"model_name_or_path: {file} is not what it was when the run began ({error}); get it again."
                    ) from None

            for name in filter(wanted, self._parts):
                converter: Any = None
                for key, file, pattern in self._parts[name]:
                    tensor = read(file, key).to(self._dtypes[name])
                    if pattern is None:
                        found[name] = tensor
                        continue
                    converter = converter or deepcopy(self._converters[pattern])
                    converter.add_tensor(name, key, pattern, tensor)
                if converter is not None:
                    made = converter.convert(name, model=self._model, config=self._model.config)
                    found |= {own: value[0] if isinstance(value, list) else value for own, value in made.items()}
        return found


def stored_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as its files keep them: under the stored names, tied ones once, each contiguous."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    left_out = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    stored = revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
