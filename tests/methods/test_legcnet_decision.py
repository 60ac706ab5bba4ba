"""What LEGCNet keeps, on p-values and exponents written down by hand."""

import numpy as np
import pytest

from hf_prune.dynamics.granger import GrangerTest
from hf_prune.errors import BadInputError
from hf_prune.methods.legcnet import LEGCNetConfig, causal_log_p, decide

NAN = np.nan
P = np.array([[0.03, 0.5], [0.2, 0.01], [0.6, 0.7], [NAN, NAN], [0.04, 0.3], [0.051, 0.9]])
BIC = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [NAN, NAN], [2.0, 1.0], [1.0, 2.0]])
TESTED = np.array([True, True, True, False, True, True])
EXPONENTS = np.array([[1.0, 2.0], [-0.02, -0.02], [3.0, 5.0], [0.0, 0.0], [-0.2, 0.1], [0.1, 0.1]])


def kept(**options: object) -> list[bool]:
    return decide(GrangerTest(np.log(P), BIC, TESTED), EXPONENTS, LEGCNetConfig(**options)).tolist()  # type: ignore[arg-type]


def test_published_decision_keeps_what_causes_errors_and_what_cannot_be_tested() -> None:
    assert kept() == [True, True, False, True, True, False]
    assert kept(alpha=0.055) == [True, True, False, True, True, True]


def test_p_is_the_smallest_or_that_of_the_chosen_lag() -> None:
    test = GrangerTest(np.log(P), BIC, TESTED)
    assert np.exp(causal_log_p(test, LEGCNetConfig())) == pytest.approx([0.03, 0.01, 0.6, 0, 0.04, 0.051])
    assert np.exp(causal_log_p(test, LEGCNetConfig(lag="bic"))) == pytest.approx([0.03, 0.2, 0.7, 0, 0.3, 0.051])


def test_correction_is_benjamini_and_hochbergs() -> None:
    """Sorted: 0.01, 0.03, 0.04, 0.051, 0.6 of five tests, times 5 over the rank, the least of what follows."""
    found = causal_log_p(GrangerTest(np.log(P), BIC, TESTED), LEGCNetConfig(correction="benjamini_hochberg"))
    assert np.exp(found) == pytest.approx([0.06375, 0.05, 0.6, 0, 0.06375, 0.06375])


def test_exponents_decide_where_they_are_asked_to() -> None:
    assert kept(decision="sensitive") == [True, False, True, True, False, True]
    assert kept(decision="both") == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("decision", "gone"), [("causal", [2, 5]), ("sensitive", [1, 4]), ("both", [5, 4])], ids=lambda own: str(own)
)
def test_a_target_takes_the_least_first(decision: str, gone: list[int]) -> None:
    found = kept(decision=decision, sparsity=1 / 3)
    assert [place for place, stays in enumerate(found) if not stays] == sorted(gone)


def test_a_target_leaves_what_cannot_be_tested() -> None:
    assert kept(sparsity=0.99) == [False, False, False, True, False, False]


def test_causes_too_strong_for_a_float_still_have_an_order() -> None:
    log_p = np.array([[-900.0], [-5000.0], [-800.0], [-1000.0]])
    test = GrangerTest(log_p, log_p, np.ones(4, dtype=bool))
    assert decide(test, np.zeros((4, 2)), LEGCNetConfig(sparsity=0.5)).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "xt"}, "variant: 'xt' is unknown; choose ft, pt"),
        ({"decision": "maybe"}, "decision: "),
        ({"window": 3}, "window: 3 is too few"),
        ({"max_lag": 0}, "max_lag: 0 is too few"),
        ({"sparsity": 1.0}, r"sparsity: 1.0 is outside \(0, 1\)"),
        ({"recorded_share": 0.0}, "recorded_share: "),
        ({"stride": 0}, "stride: 0 is too few"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        LEGCNetConfig(**options)
