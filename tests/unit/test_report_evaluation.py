"""The page of an evaluation, runs side by side, and figures in the model's card."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from llmkit.cli import main
from llmkit.durable import RunLock, calls, replace_in_folder, verify_folder, write_folder
from llmkit.errors import UsageError
from llmkit.report.card import write_model_card
from llmkit.report.confusion import confusion
from llmkit.report.evaluation import verdict
from llmkit.report.evaluation_tables import change, shown
from llmkit.report.page import words as in_words
from llmkit.report.report import write_report
from llmkit.report.results import result_of, update_card
from llmkit.report.side_by_side import figures, write_side_by_side

EVIL = "<script>alert(1)</script>"


def facts(**more: Any) -> dict[str, Any]:
    """What an evaluation of a classifier leaves."""
    values = {"accuracy": (0.91, 0.89, 0.93), "loss": (0.35, 0.31, 0.39), "macro_f1": (0.5, 0.4, 0.6)}
    return {
        "name": EVIL,
        "kind": "eval",
        "status": "done",
        "task": "cls",
        "best": "accuracy",
        "model": {"folder": EVIL},
        "data_address": "abc123",
        "plain": True,
        "final": {f"eval/{name}": value for name, (value, _, _) in values.items()},
        "figures": {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in values.items()}
        | {"num_rows": {"value": 7}},
        "warnings": [f"all of one class {EVIL}"],
        "settings": {"held_out": True, "decoding": {"beams": 4}, "signature": EVIL},
        "comparison": [
            compared("accuracy", 0.013, "better", p=0.003, mcnemar=0.0041),
            compared("loss", 0.02, "worse", p=0.0003),
        ],
        "gates": [
            {"metric": "accuracy", "value": 0.91, "limit": 0.9, "held": True, "said": "at least 0.9"},
            {"metric": "loss", "value": 0.35, "limit": 0.3, "held": False, "said": "at most 0.3"},
        ],
        "tables": {
            "classes": [{"label": EVIL, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 8}],
            "confusion": {"labels": ["a", EVIL, "c"], "counts": [[5, 1, 0], [0, 8, 2], [0, 0, 4]]},
            "errors": [
                {"place": f"{EVIL}:{n}", "text": EVIL, "target": "a", "prediction": [EVIL], "score": 0.99}
                for n in range(12)
            ],
            "calibration": [
                {"low": 0.0, "high": 0.5, "num": 0, "confidence": None, "accuracy": None},
                {"low": 0.5, "high": 1.0, "num": 20, "confidence": 0.8, "accuracy": 0.75},
            ],
            "noise": [
                {"typos": 0.05, "seed": n, "metrics": {"accuracy": value, "loss": 1.0}}
                for n, value in enumerate((0.8, 0.7, 0.9))
            ],
            "references": {f"guessing {EVIL}": 2.0},
            "per_length": [{"name": "1 to 64", "num_tokens": 1000, "loss": 3.25, "bits_per_byte": 1.5}],
            "tasks": [{"task": "arc_easy", "metric": "acc", "value": 0.4, "stderr": 0.07, "num": 40}],
            "speed": [{"model": "m", "batch": 1, "length": 128, "latency_ms_p50": 12.5}],
            "retrieved": [{"query": EVIL, "passages": ["one", EVIL]}],
            "written": {"mean_tokens": 12.5},
            "anything": [{"new": EVIL}],
        },
        **more,
    }  # fmt: skip


def compared(
    metric: str, difference: float, said: str, *, p: float, mcnemar: float | None = None
) -> dict[str, Any]:
    """A line of a comparison as `llmkit eval` writes it."""
    return {
        "subject": "runs/b",
        "baseline": "runs/a",
        "metric": metric,
        "value": 0.5 + difference,
        "other": 0.5,
        "difference": difference,
        "low": difference - 0.01,
        "high": difference + 0.01,
        "p": p,
        "mcnemar": mcnemar,
        "verdict": said,
    }


def page_of(folder: Path, **more: Any) -> str:
    write_report(folder, facts(**more))
    return (folder / "report.html").read_text()


def test_the_json_keeps_every_number_with_its_interval(tmp_path: Path) -> None:
    report = write_report(tmp_path, facts())
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["figures"]["accuracy"] == {"value": 0.91, "low": 0.89, "high": 0.93}
    assert report["final"]["eval/macro_f1"] == 0.5


def test_the_page_says_what_a_reader_looks_for(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    text = html.unescape(re.sub(r"<[^>]+>", "|", page))
    for words in (
        "95%: 0.89 to 0.93",  # the headline
        "1 of 2 did not hold.",
        "not held",
        "better, p = 0.003, McNemar's p = 0.0041",
        "worse, p < 0.001",
        "as cls on what its run held out",
        "decoding.beams",
        "5 (83%)",  # of the first label's six rows
        "guessing",
        "0.8 (0.7 to 0.9)",  # the mean over the copies with typing errors
        "1 to 64",
        "arc_easy",
        "latency ms p50",
        "mean tokens",
        "Anything",
        "2 more",
    ):
        assert words in text, words
    # The figure that tells a better model comes first.
    assert re.findall(r'class="what">([^<]+)<', page)[:2] == ["accuracy", "loss"]
    assert "rows" not in re.findall(r'class="what">([^<]+)<', page)


def test_only_copies_are_in_the_mean_over_the_copies(tmp_path: Path) -> None:
    """As `llmkit eval` leaves the table: the plain rows first, mean and deviation last."""
    values = {None: 0.95, 0: 0.8, 1: 0.7, 2: 0.9, "mean": 0.8, "deviation": 0.1}
    rows = [
        {"typos": 0.0 if seed is None else 0.05, "seed": seed, "metrics": {"accuracy": value}}
        for seed, value in values.items()
    ]
    page = page_of(tmp_path, tables={"noise": rows})
    told = page[page.index("With typing errors") :]
    lines = [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", told)]
    assert lines[1:3] == [["as they are", "0.91"], ["5%", "0.8 (0.7 to 0.9)"]]
    assert "All 3 copies" in told
    assert page_of(tmp_path, tables={"noise": rows[:1]}).count("With typing errors") == 0


def test_the_texts_of_the_user_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 20
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page


def test_a_training_runs_page_has_no_such_sections(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.5}\n'
    )
    write_report(tmp_path, {"name": "x", "kind": "pretrain", "status": "done"})
    page = (tmp_path / "report.html").read_text()
    assert "How it learned" in page
    for title in ("Gates", "Compared", "All figures", "How it was measured"):
        assert f"<h2>{title}</h2>" not in page


def test_the_heat_map_draws_the_share_of_each_row() -> None:
    drawn = confusion({"labels": ["a", "b"], "counts": [[3, 1], [0, 0]]})
    cells = re.findall(r'<title>([^<]+)</title><rect class="(\w+)"[^>]*fill-opacity="([\d.]+)"', drawn)
    assert cells == [
        ("a taken for a: 3 (75%)", "right", f"{0.06 + 0.94 * 0.75:.3f}"),
        ("a taken for b: 1 (25%)", "wrong", f"{0.06 + 0.94 * 0.25:.3f}"),
    ]


def test_of_many_classes_the_worst_pairs_are_told_and_nothing_is_drawn() -> None:
    labels = [f"l{n}" for n in range(40)]
    counts = [[10 if row == column else 0 for column in range(40)] for row in range(40)]
    counts[3][7], counts[7][3], counts[5][6] = 4, 2, 9
    told = confusion({"labels": labels, "counts": counts})
    assert "<svg" not in told
    rows = re.findall(r"<tr><td>(\w+)</td><td>(\w+)</td><td[^>]*>(\d+)</td><td[^>]*>([\d.]+%)</td>", told)
    assert rows == [("l5", "l6", "9", "47%"), ("l3", "l7", "4", "29%"), ("l7", "l3", "2", "17%")]


@pytest.mark.parametrize(
    "found", [{}, {"labels": ["a"]}, {"labels": ["a", "b"], "counts": [[1, 2]]}, {"labels": 3}]
)
def test_what_is_no_matrix_is_left_out(found: dict[str, Any]) -> None:
    assert confusion(found) == ""


def test_a_difference_in_words_follows_from_its_numbers() -> None:
    plain = {"metric": "loss", "difference": -0.1, "p": 0.01}
    assert verdict(plain) == "better, p = 0.01"
    assert verdict({**plain, "difference": 0.1}) == "worse, p = 0.01"
    assert verdict({**plain, "metric": "accuracy"}) == "worse, p = 0.01"
    assert verdict({**plain, "p": 0.2}) == "no difference seen, p = 0.2"
    assert verdict({"metric": "loss", "difference": 1.0, "p": None}) == "not paired"


def test_figures_of_size_are_named_and_told_in_their_units() -> None:
    names = ("rows_per_s", "tokens_per_s", "memory_bytes", "file_bytes", "num_documents")
    assert list(map(in_words, names)) == [
        "rows per s",
        "tokens per s",
        "peak memory",
        "file size",
        "documents",
    ]
    assert (change("memory_bytes", -12_300_000), change("file_bytes", 2e6)) == ("-12.3 MB", "+2 MB")
    assert change("loss", -0.0123456) == "-0.01235"


def test_figures_come_in_the_order_of_the_task() -> None:
    assert shown(facts())[:3] == ["accuracy", "loss", "macro_f1"]
    assert "num_rows" not in shown(facts())


# --- side by side


def run(
    name: str, accuracy: float, *, references: dict[str, float] | None = None, **more: Any
) -> dict[str, Any]:
    """A run as the page takes it."""
    report = facts(references=references or {}, **more)
    records = [{"step": n, "eval/loss": 2.0 - n / 10} for n in range(3)]
    return {
        "name": name,
        "status": "done",
        "num_parameters": 1000,
        "model_bytes": None,
        "seconds": 61.0,
        "stages": [
            {"name": "finetune", "figures": {}, "intervals": {}, "report": {**report, "metrics": records}},
            {
                "name": "eval",
                "figures": {
                    "accuracy": accuracy,
                    "loss": 0.5 - accuracy / 10,
                    "num_rows": 3.0,
                    "unheard_of": 1.0,
                },
                "intervals": {"accuracy": [accuracy - 0.1, accuracy + 0.1]},
                "report": report,
            },
        ],
    }


def test_the_best_of_each_figure_is_marked_where_it_means_the_same() -> None:
    found = {one["name"]: one for one in figures([run("a", 0.5), run("b", 0.7), run("c", 0.7)])}
    assert found["accuracy"]["values"] == [0.5, 0.7, 0.7]
    assert found["accuracy"]["best"] == [1, 2]
    assert found["loss"]["best"] == [1, 2], "a lower loss is better"
    assert found["unheard_of"]["best"] == [], "nobody knows which way is better"
    assert "num_rows" not in found
    assert found["accuracy"]["intervals"][0] == [0.4, 0.6]


@pytest.mark.parametrize(
    ("more", "accuracy", "loss"),
    [
        ({"references": {"unigram": 5.0}}, [1], []),
        ({"data_address": "other"}, [], []),
        ({"task": "tag"}, [], []),
    ],
)
def test_nothing_is_the_best_of_what_does_not_compare(
    more: dict[str, Any], accuracy: list[int], loss: list[int]
) -> None:
    found = {one["name"]: one["best"] for one in figures([run("a", 0.5), run("b", 0.7, **more)])}
    assert (found["accuracy"], found["loss"]) == (accuracy, loss)


def test_the_page_of_runs_side_by_side(tmp_path: Path) -> None:
    settings = [{"key": "lr", "values": [EVIL, None]}]
    made = write_side_by_side(
        tmp_path / "x.html",
        [run("a", 0.5), run(EVIL, 0.7)],
        settings,
        command="llmkit report --token=hf_abcdefghijkl",
    )
    assert json.loads((tmp_path / "x.json").read_text()) == made
    assert made["curves"]["eval/loss"]["a"] == [[0.0, 2.0], [1.0, 1.9], [2.0, 1.8]]
    assert "hf_abc" not in made["command"]
    page = (tmp_path / "x.html").read_text()
    assert "<script" not in page
    assert '<b class="best">0.7</b>' in page
    assert "0.6 to 0.8" in page
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http-equiv", "")
    for words in ("Settings that differ", "F1, class by class", "The same errors", "How they learned"):
        assert words in page


def test_the_command_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for name, value in (("one", 0.5), ("two", 0.6)):
        write_report(runs / name / "eval", facts(name=name, final={"eval/accuracy": value}))
    assert main(["report", "one", "two", "--runs", str(runs)]) == 0
    told = capsys.readouterr()
    assert "eval accuracy  0.5  0.6*" in told.out
    assert (runs / "one-two.html").is_file()
    assert main(["runs", "--runs", str(runs)]) == 0, "the page is no run"
    capsys.readouterr()
    assert main(["report", "one", "two", "--runs", str(runs), "--json", "-o", str(tmp_path / "p.html")]) == 0
    assert json.loads(capsys.readouterr().out)["figures"][0]["values"] == [0.5, 0.6]
    assert main(["report", "one", "--runs", str(runs)]) == 2
    assert main(["report", "one", "two", "--runs", str(runs), "-o", "x.pdf"]) == 2
    assert main(["report", "one", "tow", "--runs", str(runs)]) == 3
    assert "'two'" in capsys.readouterr().err


def test_a_page_takes_the_place_of_no_other_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        write_report(runs / name / "eval", facts(name=name, final={"eval/accuracy": 0.5}))
    place = runs / "one" / "eval"
    before = [(place / name).read_bytes() for name in ("report.json", "report.html")]
    words = ["report", "one", "two", "--runs", str(runs), "-o"]
    assert main([*words, str(place / "report.html")]) == 2
    said = capsys.readouterr().err
    assert "report.json" in said
    assert "report-side-by-side.html" in said
    assert [(place / name).read_bytes() for name in ("report.json", "report.html")] == before
    with pytest.raises(UsageError):
        write_side_by_side(place / "report.html", [run("a", 0.5), run("b", 0.7)], [])
    (tmp_path / "p.json").write_text("{")
    assert main([*words, str(tmp_path / "p.html")]) == 2, "no report at all"
    assert not (tmp_path / "p.html").exists()
    for _ in range(2):  # its own is written anew
        assert main([*words, str(tmp_path / "q.html")]) == 0


# --- the card


def exported(folder: Path) -> Path:
    """A model folder as training exports it, with its card."""
    place = folder / "finetune" / "model"
    place.parent.mkdir(parents=True)
    with write_folder(place, facts={"kind": "model", "identity": {"a": 1}}) as temporary:
        (temporary / "model.safetensors").write_bytes(b"weights")
        report = {"name": "reviews", "task": "cls", "model_kind": "sequence", "final": {"eval/accuracy": 0.5}}
        write_model_card(temporary, report)
    return place


def results_of(place: Path) -> list[Any]:
    return list(ModelCard.load(place / "README.md").data.eval_results or [])


def test_the_card_has_the_runs_own_figures_as_the_hub_reads_them(tmp_path: Path) -> None:
    [own] = results_of(exported(tmp_path))
    assert (own.task_type, own.metric_type, own.metric_value) == ("text-classification", "accuracy", 0.5)
    assert (own.dataset_name, own.dataset_split, own.verified) == (
        "held-out rows of the training data",
        "held-out",
        False,
    )


def test_what_is_measured_later_is_entered_and_the_folder_stays_whole(tmp_path: Path) -> None:
    place = exported(tmp_path)
    text = (place / "README.md").read_text()
    before = verify_folder(place)
    other = facts(settings={}, dataset={"name": "new | reviews", "type": "reviews.csv"})
    assert update_card(place, other) == ""
    after = verify_folder(place)
    assert after["identity"] == before["identity"]
    assert after["files"].keys() == before["files"].keys()
    found = {(one.dataset_name, one.metric_type): one for one in results_of(place)}
    assert found["held-out rows of the training data", "accuracy"].metric_value == 0.5
    accuracy = found["new | reviews", "accuracy"]
    assert (accuracy.metric_value, accuracy.dataset_type, accuracy.dataset_revision) == (
        0.91,
        "reviews.csv",
        "abc123",
    )
    assert accuracy.metric_args == {"interval_95": [0.89, 0.93]}
    card = (place / "README.md").read_text()
    assert "| cls | new \\| reviews | accuracy | 0.91 (95%: 0.89 to 0.93) |" in card
    assert card.index("## Measured with llmkit eval") < card.index("## Limits")
    # What stood there is still there.
    for line in text.splitlines():
        assert line.startswith("model-index") or line in card
    # Measured again the same way: replaced; and the same figures change nothing.
    assert update_card(place, other) == ""
    assert (place / "README.md").read_text() == card
    better = facts(settings={}, dataset=other["dataset"], figures={"accuracy": {"value": 0.99}})
    assert update_card(place, better) == ""
    values = [one.metric_value for one in results_of(place) if one.dataset_name == "new | reviews"]
    assert values == [0.99]
    assert (place / "README.md").read_text().count("## Measured with llmkit eval") == 1
    verify_folder(place)


def test_held_out_rows_measured_again_take_the_place_of_what_training_measured(tmp_path: Path) -> None:
    place = exported(tmp_path)
    assert update_card(place, facts()) == ""
    assert [one.metric_value for one in results_of(place) if one.metric_type == "accuracy"] == [0.91]


def test_held_out_rows_asked_otherwise_leave_what_training_measured(tmp_path: Path) -> None:
    place = exported(tmp_path)
    text = (place / "README.md").read_text()
    assert update_card(place, facts(plain=False)) == ""
    other = facts(settings={}, dataset={"name": "new", "type": "new.csv"}, plain=False)
    assert update_card(place, {**other, "sampled": True}) == ""
    assert (place / "README.md").read_text() == text


def test_other_data_measured_in_two_ways_are_two_entries(tmp_path: Path) -> None:
    place = exported(tmp_path)
    for context, value in ((32, 0.5), (16, 0.25), (16, 0.3)):
        more = {"dataset": {"name": "new", "type": "new.csv"}, "figures": {"accuracy": {"value": value}}}
        assert update_card(place, facts(settings={"context": context}, plain=False, **more)) == ""
    found = [one for one in results_of(place) if one.dataset_name == "new"]
    assert [one.metric_value for one in found] == [0.5, 0.3]
    configs = [one.dataset_config for one in found]
    assert len(set(configs)) == 2
    card = (place / "README.md").read_text()
    assert [f"| new ({config}) |" in card for config in configs] == [True, True]
    # The Hub's own code does not make one of them.
    index = eval_results_to_model_index("x", results_of(place))
    assert [one["dataset"].get("config") for one in index[0]["results"]] == [None, *configs]


def test_cards_of_others_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# theirs\n")
    assert update_card(tmp_path, facts()) == ""
    assert (tmp_path / "README.md").read_text() == "# theirs\n"
    place = exported(tmp_path / "mine")
    replace_in_folder(place, "README.md", "---\nmodel-index:\n- name: by hand\n---\n# x\n")
    assert "stays as it is" in update_card(place, facts())
    assert "by hand" in (place / "README.md").read_text()
    assert update_card(place, facts(task="speed", figures={"latency_ms_p50": {"value": 3.0}})) == ""


def test_the_card_waits_for_no_training(tmp_path: Path) -> None:
    place = exported(tmp_path)
    text = (place / "README.md").read_text()
    with RunLock(place.parent):
        assert "another run writes here" in update_card(place, facts())
    assert (place / "README.md").read_text() == text


def test_a_kill_at_any_moment_leaves_a_folder_that_agrees_with_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = exported(tmp_path)

    class Killed(BaseException):
        pass

    seen = 0
    for moment in range(200):
        left = [moment]

        def kill(call: calls.Call, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        monkeypatch.setattr(calls, "fail_point", kill)
        try:
            replace_in_folder(place, "README.md", f"version {moment}")
        except Killed:
            seen += 1
        else:
            break
        finally:
            monkeypatch.setattr(calls, "fail_point", None)
        verify_folder(place)
    assert seen > 20
    assert (place / "README.md").read_text() == f"version {seen}"
    assert "README.md" in verify_folder(place)["files"]


@pytest.mark.parametrize(
    ("report", "kind"),
    [
        ({"task": "tag", "final": {"eval/f1": 0.5}}, "token-classification"),
        ({"task": "text", "final": {"eval/loss": 2.0}}, "text-generation"),
        ({"pipeline": "fill-mask", "final": {"eval/loss": 2.0}}, "fill-mask"),
        ({"task": "harness", "figures": {"arc_easy/acc": {"value": 0.5}}}, "text-generation"),
    ],
)
def test_the_task_by_the_hubs_name(report: dict[str, Any], kind: str) -> None:
    result = result_of(report)
    assert result is not None
    assert result["task"]["type"] == kind
    assert len(result["metrics"]) == 1


def test_nothing_measured_is_no_result() -> None:
    assert result_of({"task": "cls", "final": {}}) is None
    assert result_of({"task": "cls", "final": {"eval/accuracy": None, "eval/num_targets": 3.0}}) is None
