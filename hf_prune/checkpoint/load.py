"""Opening a model: config, meta skeleton, tokenizer, weights; each failure is one sentence that names the key."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_prune.arguments import ModelArguments
from hf_prune.checkpoint.inspect import check_safetensors
from hf_prune.engine.offload import tensors_of
from hf_prune.errors import BadInputError, HfPruneError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device a recipe asks for; `auto` is this process's GPU where there is one.

    Raises:
        BadInputError: the device is not there.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type != "cpu":
        backend = getattr(torch, device.type, None)
        if backend is None or not backend.is_available():
            raise BadInputError(f"device: {name} is not available here; use device cpu or auto.")
        if device.index is not None and device.index >= backend.device_count():
            raise BadInputError(
                f"device: {name} is not there, this machine has {backend.device_count()}; use auto or fewer "
                "num_processes."
            )
    return device


def free_memory() -> None:
    """Give GPU memory that nothing uses back to the machine: other processes want it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_config(path: str, arguments: ModelArguments, revision: str | None = None) -> PreTrainedConfig:
    """The config of a causal language model; weights of a local folder are checked for whole files at once.

    Raises:
        BadInputError: the model is not found or not causal, or a safetensors file is damaged.
    """
    from hf_prune.models import AutoConfig

    if Path(path).is_dir():
        check_safetensors(path)
    with explained(path):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=arguments.trust_remote_code)
    _check_causal(path, config)
    if getattr(config, "quantization_config", None):
        raise BadInputError(f"model_name_or_path: {path} is quantized; prune the unquantized model it was made from.")
    return config


def _check_causal(path: str, config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = config.architectures or []
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_causal = (
        not config.is_encoder_decoder
        and (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING)
        and (not names or any("CausalLM" in name or "LMHead" in name for name in names))
    )
    if not is_causal:
        raise BadInputError(
            f"model_name_or_path: {Path(path).name} is a {names[0] if names else config.model_type}, which is no "
            "causal language model; choose a model of the text-generation kind."
        )


def skeleton(config: PreTrainedConfig, arguments: ModelArguments) -> PreTrainedModel:
    """The model on the meta device: shapes and modules, no weights."""
    from hf_prune.models import AutoModelForCausalLM

    with torch.device("meta"), explained("the model"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)


def load_tokenizer(path: str, arguments: ModelArguments, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        BadInputError: there is none.
    """
    from transformers import AutoTokenizer

    with explained(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=arguments.trust_remote_code)


def load_model(path: str, arguments: ModelArguments, device: torch.device, revision: str | None = None) -> Any:
    """The model in eval mode on one device, every weight finite.

    Raises:
        BadInputError: not found, damaged, NaN or Inf weights; it is to be offloaded, which only `open_model` does.
        RunError: out of memory.
    """
    from hf_prune.models import AutoModelForCausalLM

    if arguments.offload != "none":
        raise BadInputError("offload: only prune, plan and evaluate read a model in parts; set it to none.")
    # A wrapper's annotations know of no second result.
    loaded: Any
    with explained(path):
        loaded = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, found = loaded
        if found["missing_keys"]:
            # transformers would go on with random ones.
            raise BadInputError(
                f"model_name_or_path: {path} holds no weight {min(found['missing_keys'])}; get the model again."
            )
        model.to(device)
        model.eval()
    check_finite(model)
    return model


def check_finite(model: nn.Module) -> None:
    """Raise BadInputError for the first parameter that holds NaN or Inf."""
    for name, tensor in tensors_of(model):
        if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor.detach()).all()):
            raise BadInputError(
                f"model_name_or_path: {name} holds NaN or Inf; the checkpoint is damaged, get it again."
            )


@contextmanager
def explained(path: str, what: str = "model") -> Iterator[None]:
    """Turn what transformers and its readers raise into one sentence."""
    try:
        yield
    except HfPruneError:
        raise
    except torch.OutOfMemoryError:
        raise RunError(f"device: {path} does not fit into the memory of the device; use a larger one.") from None
    except Exception as error:
        logger.debug("loading %s failed", path, exc_info=True)
        raise BadInputError(_explanation(path, what, error)) from error


def _explanation(path: str, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    local = Path(path).is_dir()
    if "trust_remote_code" in text:
        return f"trust_remote_code: {path} brings code of its own; read it and set trust_remote_code: true to run it."
    if not local and ("gated" in text.lower() or "401" in text or "403" in text):
        return f"model_name_or_path: {path} is private or gated; ask for access and run `hf auth login`."
    if not local and _is_unreachable(error):
        return (
            f"model_name_or_path: {path} is not in the cache and the Hub cannot be reached; connect, or give a local "
            "folder."
        )
    if not local and any(words in text for words in ("404", "not a valid model identifier", "not a local folder")):
        return f"model_name_or_path: there is no {what} {path} on the Hub; check the id and the revision."
    return f"model_name_or_path: the {what} of {path} cannot be loaded ({text[:200].rstrip('.')}); check its files."


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether a lost connection or offline mode stands anywhere behind an error."""
    while error is not None:
        name = type(error).__name__
        if isinstance(error, ConnectionError) or name in (
            "ConnectError",
            "ConnectTimeout",
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
        ):
            return True
        if "couldn't connect" in str(error) or "offline mode" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
