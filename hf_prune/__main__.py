"""`python -m hf_prune` is the command line; `accelerate launch -m hf_prune` needs it."""

from hf_prune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
