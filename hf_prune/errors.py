"""The ways hf_prune says no, or not yet. Each message is one sentence: what is wrong, where, and what to do."""

# In the environment of processes that `hf-prune` itself has started through a launcher.
RELAUNCHED = "HF_PRUNE_RELAUNCHED"


class HfPruneError(Exception):
    """Base of every error hf_prune raises on purpose; the command line prints its message without a traceback."""

    exit_code = 1


class BadInputError(HfPruneError):
    """What the user handed over cannot be used: a recipe key, a model, a text, a folder. Exit code 2."""

    exit_code = 2


class RunError(HfPruneError):
    """The input was fine and the run failed all the same: a failed verification, a full disk. Exit code 1."""


class Stopped(HfPruneError):
    """Nothing is wrong: the run was asked to stop and goes on when it is started again. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75
