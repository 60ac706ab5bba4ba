"""A card as the Hub and a reader see it: parsed by huggingface_hub and by a Markdown parser, never by our own code."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hf_prune.hub.card import PLOTS, write_card

PLOT = next(iter(PLOTS))

EXAMPLE = Path(__file__).parents[1] / "report" / "example_report.json"
RECIPE = """# SmolLM2 to half its weights
model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
method: sparsegpt
sparsity: 0.5

dataset_name: allenai/c4
dataset_config: en
num_calibration_samples: 32
seq_length: 512
eval_dataset_name: Salesforce/wikitext
sample_prompts:
  - Explain what a hash table is.
output_dir: out/smollm2
"""
UNMEASURED = re.compile(r"\b(None|nan|NaN|null|inf|Undefined)\b")


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


def card_of(folder: Path, report: dict[str, Any], recipe_text: str = RECIPE) -> ModelCard:
    write_card(folder, report, recipe_text)
    return ModelCard.load(folder / "README.md")


def tokens_of(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def tables_of(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cells, text only, as a Markdown parser reads it."""
    tables: list[list[list[str]]] = []
    for token in tokens_of(markdown):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.level == 4:
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables


def fences_of(markdown: str, language: str) -> list[str]:
    return [token.content for token in tokens_of(markdown) if token.type == "fence" and token.info == language]


def drop(report: dict[str, Any], path: tuple[Any, ...]) -> None:
    """Delete the value under a path of keys and list places."""
    for key in path[:-1]:
        report = report[key]
    del report[path[-1]]


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key anywhere in a report."""
    if isinstance(tree, dict):
        return [found for key, value in tree.items() for found in ((*prefix, key), *paths(value, (*prefix, key)))]
    if isinstance(tree, list):
        return [found for place, value in enumerate(tree) for found in paths(value, (*prefix, place))]
    return []


ALL_PATHS = paths(json.loads(EXAMPLE.read_text(encoding="utf-8")))


def test_metadata_is_what_the_hub_reads(tmp_path: Path, report: dict[str, Any]) -> None:
    data = card_of(tmp_path, report).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert set(data.tags) == {"hf_prune", "pruning", "sparse", "sparsegpt", "unstructured"}
    assert data.datasets == ["allenai/c4"]
    assert data.model_name == "SmolLM2-135M-Instruct-sparsegpt-50"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["perplexity"].metric_value == report["evaluation"]["pruned"]["perplexity"]
    assert results["bits_per_byte"].metric_value == report["evaluation"]["pruned"]["bits_per_byte"]
    for result in results.values():
        assert result.task_type == "text-generation"
        assert (result.dataset_type, result.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        assert (result.dataset_split, result.dataset_revision) == ("test", report["evaluation"]["revision"])
        assert result.metric_args == {"seq_length": 1024, "windows": 32, "add_bos": False, "dtype": "float32"}


def test_eval_results_folder_parses(tmp_path: Path, report: dict[str, Any]) -> None:
    write_card(tmp_path, report, RECIPE)
    files = list((tmp_path / ".eval_results").iterdir())
    assert [file.suffix for file in files] == [".yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files[0].read_text(encoding="utf-8")))
    assert {entry.task_id: entry.value for entry in entries} == {"perplexity": 42.7391, "bits_per_byte": 1.2195}
    for entry in entries:
        assert entry.dataset_id == "Salesforce/wikitext"
        assert entry.dataset_revision == report["evaluation"]["revision"]
        assert "seq_length=1024, windows=32" in entry.notes


def test_the_zeros_of_each_kind_are_listed_where_they_differ(tmp_path: Path, report: dict[str, Any]) -> None:
    assert not [table for table in tables_of(card_of(tmp_path, report).text) if table[0][0] == "weight matrix"]
    # q_proj of 576 x 576 twice, k_proj of 192 x 576 twice, down_proj of 576 x 1,536 once.
    for place, density in enumerate((0.4, 0.9, 0.25, 0.2, 0.7)):
        report["views"][place]["density"] = density
    del report["views"][5]
    found = [table for table in tables_of(card_of(tmp_path, report).text) if table[0][0] == "weight matrix"]
    assert found[0][1:] == [
        ["self_attn.q_proj", "70.0 %", "60.0 % (block 0)", "80.0 % (block 1)"],
        ["self_attn.k_proj", "20.0 %", "10.0 % (block 0)", "30.0 % (block 1)"],
        ["mlp.down_proj", "75.0 %", "75.0 % (block 0)", "75.0 % (block 0)"],
    ]


@pytest.mark.parametrize(
    ("dataset", "private"), [("builtin:python-docs", False), ("notes.jsonl", True), ("allenai/c4", None)]
)
def test_only_public_hub_datasets_become_links(
    tmp_path: Path, report: dict, dataset: str, private: bool | None
) -> None:
    for part in ("calibration", "evaluation"):
        report[part] |= {"dataset": dataset, "private": private}
    card = card_of(tmp_path, report)
    assert card.data.datasets is None
    assert not (tmp_path / ".eval_results").exists()
    assert len(card.data.eval_results) == 2


UNITS = {"%": 1, "x": 1, "points": 1, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "ms": 1e-3, "s": 1, "MFLOPs": 1e6}


def value_of(cell: str) -> float:
    match = re.match(r"([+-]?[\d.,]+) ?(\w+|%)?", cell)
    assert match, cell
    return float(match[1].replace(",", "")) * UNITS.get(match[2] or "", 1)


def test_table_says_the_numbers_of_the_report(tmp_path: Path, report: dict[str, Any]) -> None:
    table = tables_of(card_of(tmp_path, report).text)[0]
    assert table[0][1:] == ["dense", "pruned", "change"]
    read = {row[0]: row[1:] for row in table[1:]}
    quality, cost, sparsity = report["evaluation"], report["efficiency"], report["sparsity"]
    expected = {
        "Perplexity": [quality[side]["perplexity"] for side in ("dense", "pruned")],
        "Bits per byte": [quality[side]["bits_per_byte"] for side in ("dense", "pruned")],
        "Sparsity, pruned weights": [100 * sparsity["zeros_before_pruned"], 100 * sparsity["achieved_pruned"]],
        "Sparsity, all parameters": [100 * (1 - 134387606 / 134515008), 100 * sparsity["achieved_all"]],
    } | {
        label: [cost[side][key] for side in ("dense", "pruned")]
        for label, key in {
            "Parameters": "parameters",
            "Nonzero parameters": "nonzero_parameters",
            "File size": "file_bytes",
            "Prefill": "prefill_tokens_per_second",
            "Decode": "decode_tokens_per_second",
            "Time to first token": "time_to_first_token_seconds",
            "Decode latency, p50": "decode_latency_p50_seconds",
            "Decode latency, p95": "decode_latency_p95_seconds",
            "Load time": "load_seconds",
            "Peak memory": "peak_memory_bytes",
            "FLOPs per token": "flops_per_token",
            "Nonzero FLOPs (theoretical)": "nonzero_flops_per_token",
        }.items()
    }
    assert set(read) == set(expected)
    for label, (dense, pruned) in expected.items():
        assert value_of(read[label][0]) == pytest.approx(dense, rel=6e-3, abs=0.051), label
        assert value_of(read[label][1]) == pytest.approx(pruned, rel=6e-3, abs=0.051), label
    assert read["Perplexity"][2] == "1.77x (95 % interval 1.70x to 1.84x)"
    assert value_of(read["Nonzero parameters"][2]) == pytest.approx(100 * (81401204 / 134387606 - 1), abs=0.05)
    assert value_of(read["Sparsity, all parameters"][2]) == pytest.approx(39.49 - 0.0947, abs=0.051)
    assert value_of(read["Decode"][2]) == pytest.approx(21.63 / 21.47, abs=0.005)


def test_body_holds_what_a_reader_needs_to_redo_it(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / PLOT).write_bytes(b"")
    text = card_of(tmp_path, report).text
    assert fences_of(text, "yaml") == [RECIPE]
    assert fences_of(text, "bash") == [report["command"] + "\n"]
    assert fences_of(text, "bibtex") == [report["method"]["citation"] + "\n"]
    loading = fences_of(text, "python")[0]
    assert len(loading.splitlines()) == 3
    compile(loading, "card", "exec")
    assert f"]({PLOT})" in text
    checks = tables_of(text)[1][1:]
    assert checks == [[row["check"], "PASS", row["detail"]] for row in report["verification"]]
    assert "32 non-overlapping windows of 1,024 tokens" in text
    assert "no BOS token added" in text
    assert "torch 2.13.0" in text


def test_a_local_base_model_links_to_nobody(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "tiny").mkdir()
    report["base_model"] = "tiny"
    card = card_of(tmp_path, report, f"model_name_or_path: {tmp_path}/tiny\n")
    assert card.data.base_model is None
    assert "huggingface.co" not in card.text
    assert card_of(tmp_path, report | {"base_model": "gpt2"}, "model_name_or_path: gpt2\n").data.base_model == "gpt2"


def test_plot_is_mentioned_only_where_it_lies(tmp_path: Path, report: dict[str, Any]) -> None:
    assert ".png" not in card_of(tmp_path, report).text


def test_a_failed_check_is_shown_as_failed(tmp_path: Path, report: dict[str, Any]) -> None:
    report["verification"][1]["passed"] = False
    results = [row[1] for row in tables_of(card_of(tmp_path, report).text)[1][1:]]
    assert results == ["PASS", "FAIL", "PASS"]


def test_the_repository_that_was_pushed_to_is_what_gets_loaded(tmp_path: Path, report: dict[str, Any]) -> None:
    # The last run's own: a recovery that is not pushed is not what the pruning's recipe pushed.
    text = card_of(tmp_path, report | {"hub_model_id": "me/small"}, RECIPE + "hub_model_id: me/other\n").text
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in fences_of(text, "python")[0]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dropped=st.lists(st.sampled_from(ALL_PATHS), max_size=6, unique=True),
    replacement=st.sampled_from(["absent", None, float("nan")]),
)
def test_whatever_is_missing_leaves_its_line_out(
    tmp_path: Path, report: dict[str, Any], dropped: list[tuple[Any, ...]], replacement: Any
) -> None:
    report = copy.deepcopy(report)
    for path in dropped:
        try:
            place: Any = report
            for key in path[:-1]:
                place = place[key]
            if replacement == "absent":
                del place[path[-1]]
            elif replacement is None or isinstance(place[path[-1]], float):
                place[path[-1]] = replacement
        except (KeyError, TypeError):
            continue  # a parent is gone already
    card = card_of(tmp_path, report)
    assert not UNMEASURED.search(card.text), UNMEASURED.search(card.text)
    assert not UNMEASURED.search(card.data.to_yaml())
    assert "\n\n\n" not in card.text
    for table in tables_of(card.text):
        assert len({len(row) for row in table}) == 1


def test_each_single_key_may_be_absent(tmp_path: Path, report: dict[str, Any]) -> None:
    for path in ALL_PATHS:
        if any(isinstance(key, int) and key > 0 for key in path):
            continue  # one item of a list speaks for all
        shortened = copy.deepcopy(report)
        drop(shortened, path)
        assert not UNMEASURED.search(card_of(tmp_path, shortened).content), path


def test_an_empty_report_makes_a_card(tmp_path: Path) -> None:
    card = card_of(tmp_path, {}, "")
    assert not UNMEASURED.search(card.content)
    assert "quality of this model was not measured" in card.text
    assert card.data.tags


MARKER = "zebraquartz"


def test_private_text_leaves_no_trace(tmp_path: Path, report: dict[str, Any]) -> None:
    for part in ("calibration", "evaluation"):
        report[part] |= {"dataset": f"{MARKER}.jsonl", "private": True, "config": MARKER, "split": MARKER}
    report["samples"] = [{"prompt": MARKER, "dense": MARKER, "pruned": MARKER}]
    report["command"] = (
        f"hf-prune prune --dataset_name /home/me/{MARKER}.jsonl --eval_dataset_name=/x/{MARKER} --seed 1"
    )
    recipe = (
        f"# calibrated on {MARKER}\ndataset_name: /home/me/{MARKER}.jsonl\ntext_column: {MARKER}\npattern: 2:4\n"
        f"eval_dataset_name: /x/{MARKER}\nsample_prompts:\n- {MARKER}\nsparsity: 0.5\n"
    )
    card = card_of(tmp_path, report, recipe)
    written = [file.read_text(encoding="utf-8") for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 1
    assert MARKER not in written[0].lower()
    assert "local text" in card.text
    assert card.data.eval_results[0].dataset_name == "local text"
    shown = yaml.safe_load(fences_of(card.text, "yaml")[0])
    assert (shown["sparsity"], shown["pattern"]) == (0.5, "2:4")
    assert fences_of(card.text, "bash") == [
        "hf-prune prune --dataset_name 'not shown' --eval_dataset_name 'not shown' --seed 1\n"
    ]


def test_private_calibration_does_not_hide_a_public_evaluation(tmp_path: Path, report: dict[str, Any]) -> None:
    report["calibration"] |= {"dataset": f"{MARKER}.txt", "private": True}
    card = card_of(tmp_path, report, RECIPE.replace("allenai/c4", f"/home/me/{MARKER}.txt"))
    assert MARKER not in card.content
    assert "Salesforce/wikitext" in card.text
    assert "hash function" not in card.text


def test_text_the_report_does_not_vouch_for_is_hidden_in_the_recipe(tmp_path: Path, report: dict[str, Any]) -> None:
    report["calibration"] = None
    assert MARKER not in card_of(tmp_path, report, f"dataset_name: /home/{MARKER}\n").content
    packaged = "method: magnitude\ndataset_name: builtin:python-docs\ndataset_split: train\n"
    assert fences_of(card_of(tmp_path, report, packaged).text, "yaml") == [packaged]


def test_publish_samples_shows_samples_of_private_text(tmp_path: Path, report: dict[str, Any]) -> None:
    report["evaluation"]["private"] = True
    assert "hash function" not in card_of(tmp_path, report).text
    assert "hash function" in card_of(tmp_path, report, RECIPE + "publish_samples: true\n").text


NASTY = "a|b`c``` ---\n---\n# Title\n<script>x</script> [link](http://x) **bold** {{ 7*7 }} {% raw %} \x1b[31m \x00"


def test_foreign_strings_break_neither_metadata_nor_markdown(tmp_path: Path, report: dict[str, Any]) -> None:
    plain = tokens_of(card_of(tmp_path, report).text)
    report |= {"base_model": NASTY, "base_revision": NASTY, "base_license": NASTY, "command": NASTY, "dtype": NASTY}
    report["method"] |= dict.fromkeys(("title", "summary", "paper_title", "citation", "paper"), NASTY)
    for part in ("calibration", "evaluation"):
        report[part] |= {"dataset": NASTY, "config": NASTY, "split": NASTY, "revision": NASTY}
    report["efficiency"]["device"] = NASTY
    report["views"][0]["name"] = report["views"][5]["name"] = NASTY
    report["verification"][0] |= {"check": NASTY, "detail": NASTY}
    report["samples"][0] = dict.fromkeys(("prompt", "dense", "pruned"), "````\n" + NASTY)
    report["versions"] = {NASTY: NASTY}
    card = card_of(tmp_path, report, f"# {NASTY!r}\nsparsity: 0.5\n")
    assert card.data.license == NASTY
    assert card.data.base_model is None
    tokens = tokens_of(card.text)
    headings = [t.content for t, before in zip(tokens[1:], tokens, strict=False) if before.type == "heading_open"]
    expected = [t.content for t, before in zip(plain[1:], plain, strict=False) if before.type == "heading_open"]
    assert headings[1:] == expected[1:]
    assert [len(table) for table in tables_of(card.text)] == [17, 4]
    literal = " ".join(NASTY.replace("\x1b", "").replace("\x00", "").split())
    assert tables_of(card.text)[1][1] == [literal, "PASS", literal]
    inline = [child for token in tokens for child in token.children or []]
    assert not any(token.type.startswith("html") for token in [*tokens, *inline])
    assert not any(child.type == "link_open" and child.attrs["href"] == "http://x" for child in inline)
    assert "49" not in headings[0]
    assert "\x1b" not in card.content.split("---\n", 2)[2]
