"""The table of one-shot candidates, on figures whose order is known."""

import lsh_one_shot
import pytest
from lsh_replay import judged

pytest.importorskip("scipy")


def look(loss: float, distance: float) -> dict[str, float | None]:
    return {
        "loss": loss, "layer_error": None if loss > 3 else loss, "distance": distance, "both": loss + distance,
        "seconds": 2.0, "spectrum_seconds": 3.0,
    }  # fmt: skip


def test_a_score_that_ranks_all_has_no_regret_and_its_reverse_has_the_most() -> None:
    rows = {
        f"candidate={place}": {
            "1": look(place, -place), "3": look(place, place % 2), "perplexity": 20.0 + place**2, "seconds": 50.0,
        }
        for place in range(6)
    }  # fmt: skip
    dense = {"perplexity": 15.0, "seconds": 0.0, "1": {"seconds": 30.0}, "3": {"seconds": 30.0}}
    table = lsh_one_shot.to_markdown({"dense": dense, **rows}, seeds=4)
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()[2:10]]
    cells = {(words[0], words[1]): words[2:] for words in lines}
    assert cells["loss", "1"] == ["+1.00 ± 0.00", "0.00 ± 0.00", "4%"]
    correlation, regret, cost = cells["LS distance", "1"]
    samples = [[int(name[-1]) for name in judged({own: own for own in rows}, seed)[0]] for seed in range(4)]
    worst = [max(own) ** 2 - min(own) ** 2 for own in samples]
    assert correlation == "-1.00 ± 0.00" and float(regret.split(" ")[0]) == pytest.approx(sum(worst) / 4, abs=0.005)
    assert cost == "20%"
    # What has no layer error comes last, and costs no spectrum.
    assert cells["layer error", "1"][1:] == ["0.00 ± 0.00", "4%"]
    assert "4 of 6 candidates a seed" in table and "dense 15.00" in table and "20.00 (candidate=0) to 45.00" in table
