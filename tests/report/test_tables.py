"""Tables as a terminal of 80 columns shows them, and the sentences around them."""

import copy
import io
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from hf_prune.report import figures
from hf_prune.report.findings import next_step, protocol, repo_name, spent, summary
from hf_prune.report.gains import gained
from hf_prune.report.limitations import limitations
from hf_prune.report.names import kind_of, ranges
from hf_prune.report.tables import (
    efficiency_table,
    evaluation_table,
    inspect_table,
    methods_table,
    plan_table,
    samples_table,
    verification_table,
)

KINDS = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.down_proj": (576, 1536)}


def shown(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines()), default=0) <= width
    return text


def line_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return re.sub(r"\s{2,}", " | ", line.strip())


def plan_of(blocks: int, density: float = 0.5) -> dict[str, Any]:
    views = [
        {
            "name": f"model.layers.{block}.{kind}",
            "block": block,
            "shape": list(shape),
            "density": density + (0.01 * block if kind == "mlp.down_proj" else 0),
            "pattern": "unstructured",
            "floor": block == 2 and kind == "self_attn.k_proj",
        }
        for block in range(blocks)
        for kind, shape in KINDS.items()
    ]
    return {"views": views, "skipped": [{"name": "lm_head", "reason": "not inside a decoder block"}]}


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.plain_figure, 24.1912, "24.19"),
        (figures.plain_figure, 1.03472, "1.035"),
        (figures.plain_figure, 51234.4, "51,234"),
        (figures.percent, 0.39488, "39.5 %"),
        (figures.times, 1.8261, "1.83x"),
        (figures.size, 269030016, "269 MB"),
        (figures.size, 999_700, "1 MB"),
        (figures.size, 16_060_000_000, "16.1 GB"),
        (figures.count, 260032, "260,032"),
        (figures.count, 134515008, "134.5M"),
        (figures.count, 8.03e9, "8.03B"),
        (figures.duration, 0.0132, "13.2 ms"),
        (figures.duration, 70.4, "70.4 s"),
        (figures.duration, 222, "3.7 min"),
        (figures.flops, 268961280, "269 MFLOPs"),
    ],
)
def test_numbers_are_written_for_people(write: Any, value: float, text: str) -> None:
    assert write(value) == text


@given(st.floats(1, 9e14))
def test_a_size_can_be_read_back(num_bytes: float) -> None:
    number, unit = figures.size(num_bytes).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * scale == pytest.approx(num_bytes, rel=6e-3)
    assert 1 <= float(number) < 1000


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_a_change_in_percent_leads_from_before_to_after(before: float, after: float) -> None:
    text = figures.change_percent(before, after).removesuffix(" %").replace(",", "")
    assert before * (1 + float(text) / 100) == pytest.approx(after, rel=6e-3, abs=6e-4 * before)


def test_evaluation_table(report: dict[str, Any]) -> None:
    text = shown(evaluation_table(report))
    assert line_of(text, "Perplexity") == "Perplexity | 24.19 | 42.74 | 1.77x"
    assert "(95 % interval 1.70x to 1.84x)" in text
    assert line_of(text, "Bits per byte") == "Bits per byte | 1.035 | 1.220 | +17.9 %"
    assert line_of(text, "Sparsity, pruned") == "Sparsity, pruned weights | 0.1 % | 50.0 % | +49.9 points"


def test_efficiency_table_keeps_one_line_a_figure(report: dict[str, Any]) -> None:
    text = shown(efficiency_table(report))
    assert line_of(text, "File size") == "File size | 538 MB | 538 MB | -0 %"
    assert line_of(text, "Decode  ") == "Decode | 21.5 tokens/s | 21.6 tokens/s | 1.01x"
    assert line_of(text, "Nonzero FLOPs") == "Nonzero FLOPs (theoretical) | 269 MFLOPs | 163 MFLOPs | -39.4 %"


def test_verification_table_says_pass_and_fail(report: dict[str, Any]) -> None:
    report["verification"][2] |= {"passed": False, "detail": "differs [bold]by[/bold] 0.3"}
    text = shown(verification_table(report))
    assert line_of(text, "shapes") == "shapes equal config | PASS | 272 tensors"
    assert line_of(text, "logits") == "logits bitwise equal | FAIL | differs [bold]by[/bold] 0.3"


def test_plan_of_many_blocks_fits_a_screen(report: dict[str, Any]) -> None:
    plan = plan_of(30)
    text = shown(plan_table(plan))
    assert len(text.splitlines()) < 24
    assert line_of(text, "self_attn.q_proj") == "self_attn.q_proj | 0-29 | 576 x 576 | unstructured | 50.0 %"
    assert line_of(text, "self_attn.k_proj").endswith("50.0 % *")
    assert line_of(text, "mlp.down_proj").endswith("21.0 to 50.0 %")
    sizes = [view["shape"][0] * view["shape"][1] for view in plan["views"]]
    zeros = sum((1 - view["density"]) * size for view, size in zip(plan["views"], sizes, strict=True))
    assert f"{len(sizes)} matrices, {sum(sizes) / 1e6:.1f}M weights, {100 * zeros / sum(sizes):.1f} %" in text
    assert "not inside a decoder block: lm_head" in text


def test_verbose_plan_lists_every_weight() -> None:
    plan = plan_of(4)
    text = shown(plan_table(plan, verbose=True))
    for view in plan["views"]:
        assert f"{100 - 100 * view['density']:.1f} %" in line_of(text, view["name"])


def test_inspect_table_names_embeddings_and_totals() -> None:
    rows = plan_of(6)["views"]
    rows.append(
        {"name": "model.embed_tokens", "block": None, "shape": [49152, 576], "density": 1.0, "pattern": "dense"}
    )
    summary = {"block_sparsity": 0.5, "block_parameters": 8e6, "total_sparsity": 0.25, "total_parameters": 36e6}
    text = shown(inspect_table(rows, {**summary, "skipped": ["h.0.attn.bias"]}))
    assert line_of(text, "model.embed_tokens") == "model.embed_tokens | 49152 x 576 | dense | 0.0 %"
    assert "50.0 % zeros of 8.0M" in text
    assert "25.0 % zeros of 36.0M" in text
    assert "h.0.attn.bias" in text


def test_samples_stand_side_by_side(report: dict[str, Any]) -> None:
    report["samples"][0]["pruned"] = "[red]\x1b[31mtable[/red]"
    text = shown(samples_table(report["samples"]))
    assert "> Explain what a hash table is." in text
    assert line_of(text, "dense") == "dense | pruned"
    assert line_of(text, "A hash table is a data").endswith("[red][31mtable[/red]")
    assert "\x1b" not in text


def test_methods_table() -> None:
    methods = [
        {"name": "wanda", "title": "Wanda", "paper": "https://arxiv.org/abs/2306.11695", "summary": "|w| times |x|"}
    ]
    text = shown(methods_table(methods))
    assert line_of(text, "wanda") == "wanda | Wanda: |w| times |x|"
    assert "https://arxiv.org/abs/2306.11695" in text


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.mlp.up_proj", 12, "mlp.up_proj"),
        ("transformer.h.3.attn.c_attn", 3, "attn.c_attn"),
        ("h.3.attn.c_attn", 3, "attn.c_attn"),
        ("model.layers.1.mlp.experts.11.w1", 1, "mlp.experts.*.w1"),
        ("model.layers.1.mlp.fc1", 1, "mlp.fc1"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_kind_of_weight(name: str, block: int | None, kind: str) -> None:
    assert kind_of({"name": name, "block": block}) == kind


@given(st.sets(st.integers(0, 99), min_size=1))
def test_ranges_can_be_read_back(numbers: set[int]) -> None:
    text, _, stride = ranges(numbers).partition(" by ")
    ends = [[int(end) for end in part.split("-")] for part in text.split(", ")]
    assert {n for first, *last in ends for n in range(first, (last or [first])[0] + 1, int(stride or 1))} == numbers


def test_gained_of_zeros_alone_is_nothing_measurable(report: dict[str, Any]) -> None:
    text = "\n".join(gained(report))
    assert "Size on disk: -0 % (538 MB before and after)" in text
    assert "prefill 0.99x, decode 1.01x, measured on `cpu, 2 threads`" in text
    assert "In theory 39 % of the FLOPs" in text
    assert '`pattern: "2:4"`' in text
    assert "`method: intra_fusion`, for a narrower model" in text
    assert "intra_fusion" not in "\n".join(gained(report, available={"2:4"}))
    mixture = {
        **report,
        "views": [{**view, "name": "model.layers.0.mlp.experts.3.down_proj"} for view in report["views"]],
    }
    assert "intra_fusion" not in "\n".join(gained(mixture))


def test_gained_of_2_4_names_the_kernels_and_not_itself(report: dict[str, Any]) -> None:
    report["method"]["pattern"] = "2:4"
    text = "\n".join(gained(report))
    assert "What would gain speed" not in text
    assert "semi-structured sparse kernels" in text
    assert "plain `from_pretrained` runs dense kernels" in text
    report["method"]["pattern"] = "4:8"
    assert "`4:8` zeros gain speed only with kernels made for this pattern" in "\n".join(gained(report))


def test_gained_claims_no_speed_that_was_not_measured(report: dict[str, Any]) -> None:
    del report["efficiency"]
    text = "\n".join(gained(report))
    assert "Speed was not measured; expect 1.0x" in text
    assert "Size" not in text
    assert "theory" not in text


def test_a_smaller_file_is_called_smaller(report: dict[str, Any]) -> None:
    report["efficiency"]["pruned"]["file_bytes"] = 269045204
    assert "Size on disk: -50.0 % (538 MB before, 269 MB now)." in gained(report)


def test_limitations_come_from_what_was_measured(report: dict[str, Any]) -> None:
    text = "\n".join(limitations(report))
    assert "Perplexity grew by 76.7 % on `Salesforce/wikitext` (95 % interval +70.1 % to +83.9 %)" in text
    assert (
        "`min_keep_ratio` kept more weights than the allocation asked for in `model.layers.0.self_attn.k_proj`." in text
    )
    worst = re.findall(r"`([\w.]+)` \(([\d.]+) %\)", text)
    assert worst == [
        ("model.layers.1.mlp.down_proj", "15.5"),
        ("model.layers.0.mlp.down_proj", "4.1"),
        ("model.layers.1.self_attn.q_proj", "3.2"),
    ]
    assert "same source" not in text
    report["calibration"]["dataset"] = "Salesforce/wikitext"
    report["evaluation"]["change"] |= {"low": 0.99}
    report["sparsity"]["achieved_pruned"] = 0.47
    text = "\n".join(limitations(report))
    assert "same source" in text
    assert "The interval includes no change" in text
    assert "The target was 50.0 % of the pruned weights; 47.0 % are zero." in text


def test_layers_that_a_ticket_has_cut_off_are_named(report: dict[str, Any]) -> None:
    """Those of the last ticket that have weights left: its controls and earlier rounds are other models."""
    views = [view["name"] for view in report["views"]]
    report["views"][0]["density"] = 0.0
    rounds = [("ticket", views[3:4]), ("ticket", views[:2]), ("random_mask", views[2:3])]
    report["tickets"] = [{"kind": kind, "collapsed": [f"{name}.weight" for name in own]} for kind, own in rounds]
    text = "\n".join(limitations(report))
    assert f"No weight at all is left in `{views[0]}`." in text
    assert f"Weights are left in `{views[1]}`, and no path leads through them from input to output." in text


def test_summary_and_protocol(report: dict[str, Any]) -> None:
    assert summary(report) == (
        "`HuggingFaceTB/SmolLM2-135M-Instruct` with 50.0 % of the weights of 6 layers set to zero by SparseGPT "
        "(39.5 % of all parameters); perplexity on `Salesforce/wikitext` rose from 24.19 to 42.74 (1.77x)."
    )
    report["evaluation"]["add_bos"] = True
    assert "each window begins with the BOS token, weights in `float32`" in protocol(report)


def test_next_step_quotes_the_folder(report: dict[str, Any]) -> None:
    steps = "\n".join(next_step(report, "out/my model"))
    assert "hf-prune inspect 'out/my model'" in steps
    assert "hf-prune push 'out/my model' --repo_id YOUR_NAME/SmolLM2-135M-Instruct-sparsegpt-50" in steps
    assert "`--sparsity 0.3`" in steps
    report["evaluation"]["pruned"]["perplexity"] = 25.0
    assert "--sparsity" not in "\n".join(next_step(report, "out"))


@given(st.text(), st.text(), st.sampled_from(["unstructured", "2:4"]))
def test_the_suggested_repository_name_is_valid(base: str, method: str, pattern: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id("me/" + repo_name({"base_model": base, "method": {"name": method, "pattern": pattern}}))


def test_spent(report: dict[str, Any]) -> None:
    assert spent(report) == (
        "pruning took 70.4 s, the whole run 3.7 min, 2 forward passes over the calibration text, peak memory 1.25 GB, "
        "on `cpu`"
    )


PARTS = ("method", "calibration", "sparsity", "views", "verification", "evaluation", "efficiency", "seconds", "samples")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.sampled_from(PARTS)), st.sets(st.sampled_from(["dense", "pruned", "change"])), st.booleans())
def test_nothing_measured_means_nothing_said(
    report: dict[str, Any], parts: set[str], sides: set[str], as_none: bool
) -> None:
    report = copy.deepcopy(report)
    for part in ("evaluation", "efficiency"):
        for side in sides & report[part].keys():
            report[part][side] = None
    for part in parts:
        if as_none:
            report[part] = None
        else:
            del report[part]
    tables = (evaluation_table(report), efficiency_table(report), verification_table(report))
    sentences = [*gained(report), *limitations(report), *next_step(report, "out"), summary(report), protocol(report)]
    text = "\n".join(
        [*map(shown, tables), shown(samples_table(report.get("samples") or [])), *sentences, spent(report)]
    )
    assert not re.search(r"\b(None|nan)\b", text)
