"""The command line: one verb a file. Nothing heavy is imported before a verb runs, so that --help is instant."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from hf_prune import __version__
from hf_prune.errors import RELAUNCHED, HfPruneError, Stopped
from hf_prune.progress import is_main_process

VERBS = {
    "quickstart": "prune a small real model with the embedded recipe: no Hub, no account",
    "prune": "prune, evaluate, save, verify, and push if asked: the main job",
    "train": "prune while training: lottery tickets, moving masks, or what does not cause the errors",
    "recover": "train a pruned model for a while; zeros of its matrices stay",
    "compare": "what tickets share: overlap, signs, movement",
    "plan": "dry run: what would be pruned, and what it would take",
    "evaluate": "quality and efficiency of a model, beside its dense original where it is known",
    "inspect": "sparsity and pattern by layer of any checkpoint",
    "sensitivity": "what each block, kind of layer or matrix costs when it alone is pruned",
    "sweep": "every combination of a recipe's choices on your model, and the one that fits a constraint",
    "search": "many ways to prune judged early, by Lyapunov spectra or loss; the best one finished",
    "bench": "a grid of recipes in turn, peers included: table, CSV and plot",
    "push": "upload a finished folder to the Hub",
    "methods": "the methods there are, with their papers",
}
USAGE = f"""usage: hf-prune VERB [--config RECIPE.yaml] [--key value ...] [--debug]

{chr(10).join(f"  {verb:<11} {text}" for verb, text in VERBS.items())}

`hf-prune VERB --help` lists a verb's keys. `accelerate launch -m hf_prune VERB ...` runs it on several devices.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0; 1 for a failed run, 2 for bad input, 75 for a run that was asked to stop and can go on, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"hf_prune {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"hf-prune: {verb!r} is no verb; choose one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    _configure_logging(debug)
    try:
        module = importlib.import_module(f"hf_prune.cli.{verb}")
        if "--help" in rest or "-h" in rest:
            print(module.help_text(), end="")
            return 0
        return int(module.main(rest) or 0)
    except KeyboardInterrupt:
        print("hf-prune: interrupted.", file=sys.stderr)
        return 130
    except Stopped as error:
        if is_main_process():
            print(f"hf-prune: {error}", file=sys.stderr)
        # A launcher would call anything else a failure; `relaunch` hands the code on.
        return 0 if RELAUNCHED in os.environ else error.exit_code
    except HfPruneError as error:
        if debug:
            raise
        # Every process meets the same bad input; one sentence is enough.
        if is_main_process() or error.exit_code != 2:
            print(f"hf-prune: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":
            print("hf-prune: device: out of memory; use a larger device, dtype bfloat16 or less text.", file=sys.stderr)
            return 1
        text = " ".join(str(error).split())[:300]
        print(f"hf-prune: unexpected {type(error).__name__}: {text} (--debug shows where).", file=sys.stderr)
        return 1


def _configure_logging(debug: bool) -> None:
    # Before transformers and huggingface_hub are imported: both read these once.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # datasets would log its own account, with paths, beside our one sentence.
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    level = logging.DEBUG if debug else logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_prune").setLevel(level)
    for name in ("httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR if not debug else logging.INFO)
