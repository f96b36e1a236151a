"""A model measured on text: windows, documents, several processes, models with other vocabularies, gates."""

import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from training import losses, options, pretrain, recipe, start, write_corpus

from llmkit.cli import main
from llmkit.cli.output import give_json
from llmkit.data.shards import TokenShards
from llmkit.data.tokenizers import load_tokenizer
from llmkit.errors import CorruptError, GateError, UsageError
from llmkit.evaluate.model import core_of, load_model, measure_streams
from llmkit.evaluate.text import windows_of
from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.run import evaluate, run_all
from llmkit.run.checkpoints import exported_checkpoint
from llmkit.run.folders import report_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def run(folder):
    return pretrain(folder)


@pytest.fixture(scope="module")
def other(folder, run):
    """Another vocabulary, the same text."""
    return pretrain(folder, "letters", tokenize__algorithm="chars", tokenize__vocab_size=600)


def measured(folder, target, /, **section):
    made = {"llmkit": 1, "name": "m", "seed": 3, "eval": section}
    return evaluate(target, load_recipe(made), options(folder), make_reporter(quiet=True))


def all_text(folder):
    """Every document, as text of its own."""
    return {"files": str(write_corpus(folder / "corpus"))}


def stream_of(run):
    card = json.loads((run / "data.json").read_text())
    cache = run.parents[1] / ".cache" / "shards"
    return TokenShards.open(cache / card["sources"][0]["address"]).split("held_out")


@pytest.mark.parametrize(("context", "stride"), [(32, 8), (32, 31), (24, 1)])
def test_sliding_windows_are_those_of_the_documentation_of_transformers(folder, run, context, stride):
    """Its loop, spelt out: each window's labels but the last `stride` are masked, losses weighted by their number."""
    stream = stream_of(run)
    ids = torch.from_numpy(stream.read(0, stream.num_tokens).astype(np.int64)).unsqueeze(0)[:, :700]
    model = load_model(run / "model")
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        num = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * num, count + num, end
        if end == ids.shape[1]:
            break

    class Short:
        num_tokens, name = 700, "short"
        read, document_starts = stream.read, stream.document_starts

    section = load_recipe(run / "resolved.yaml").recipe.pretrain
    core = core_of(model, section, load_tokenizer(str(run / "model")), device="cpu")
    found = measure_streams(
        core, [Short()], section, device="cpu", context=context, stride=stride, batch_size=5
    )
    assert found.sums["num_targets"] == count == 699
    assert found.sums["total"] / count == pytest.approx(total / count, abs=1e-5)


def test_every_token_but_the_first_is_measured_once():
    class Stream:
        num_tokens = 100

    for context, stride in ((7, None), (7, 3), (100, None), (200, None), (7, 6), (99, 50)):
        seen = np.zeros(200, dtype=int)
        for window in windows_of([Stream()], context, stride):
            assert window.stop - window.start <= context + (stride is None)
            assert window.start < window.first < window.stop
            seen[window.first : window.stop] += 1
        assert seen[1:100].tolist() == [1] * 99, (context, stride)
        assert seen[0] == 0


def test_the_figures_are_those_of_the_run_and_follow_from_each_other(folder, run):
    result = evaluate("tiny", None, options(folder), make_reporter(quiet=True))
    figures, stream = result.summary["metrics"], stream_of(run)
    assert figures["loss"] == pytest.approx(report_of(run)["final"]["eval/loss"], abs=1e-6)
    nats = figures["loss"] * figures["num_targets"]
    chars = stream.num_chars * figures["num_targets"] / stream.num_tokens
    assert figures["char_perplexity"] == pytest.approx(math.exp(nats / chars), rel=1e-7)
    assert figures["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / (stream.num_bytes * figures["num_targets"] / stream.num_tokens), rel=1e-7
    )
    assert result.folder == run.parent / "eval"
    report = report_of(result.folder)
    assert report["figures"]["loss"]["low"] < figures["loss"] < report["figures"]["loss"]["high"]
    assert report["tables"]["references"].keys() == {"guessing by token frequency (unigram)"}


def test_documents_and_their_groups_add_up(folder, run):
    result = measured(folder, "tiny", data=all_text(folder), reference=[])
    report = report_of(result.folder)
    rows = report["tables"]["per_length"]
    assert sum(row["num_documents"] for row in rows) == 40
    assert sum(row["num_tokens"] for row in rows) == report["final"]["eval/num_targets"]
    mean = sum(row["loss"] * row["num_tokens"] for row in rows) / report["final"]["eval/num_targets"]
    assert mean == pytest.approx(report["final"]["eval/loss"], abs=1e-6)
    learned = [text for text in report["warnings"] if "of the 40 documents are among those" in text]
    held_out = stream_of(run).num_documents
    assert learned == [f"{40 - held_out} of the 40 documents are among those that the model learned from"]
    small = [row for row in rows if row["name"] == "under 1 kB"]
    sizes = [path.stat().st_size for path in (folder / "corpus").glob("*.txt")]
    assert [row["num_documents"] for row in small] == [sum(size < 1000 for size in sizes)]


def test_models_with_other_vocabularies_are_compared_document_by_document(folder, run, other):
    result = measured(folder, ["tiny", "letters"], data=all_text(folder), reference=[])
    pairs = {pair["metric"]: pair for pair in result.summary["comparison"]}
    pair = pairs["bits_per_byte"]
    a, b = (one["metrics"]["bits_per_byte"] for one in result.summary["results"])
    assert pair["difference"] == pytest.approx(b - a)
    assert pair["low"] < pair["difference"] < pair["high"]
    assert 0 < pair["p"] <= 1
    assert pair["verdict"] in ("better", "worse", "no difference seen")
    assert pairs["loss"]["verdict"] == "not tested"
    assert "per token" in pairs["loss"]["why"]
    gate = {"max_drop": "5%", "against": "letters", "metric": "perplexity"}
    with pytest.raises(UsageError, match="per token"):
        measured(folder, "tiny", data=all_text(folder), reference=[], gate=gate)
    same = measured(folder, ["tiny", "tiny"], data=all_text(folder), reference=[]).summary["comparison"]
    assert {pair["difference"] for pair in same} == {0.0}
    assert {pair["p"] for pair in same} == {1.0}


def test_several_models_have_a_mean_and_a_deviation(folder, run, other):
    result = measured(folder, ["tiny", "letters", "tiny"], data=all_text(folder), reference=[])
    a, b, c = (one["metrics"]["bits_per_byte"] for one in result.summary["results"])
    spread = result.summary["over_models"]["bits_per_byte"]
    assert spread["mean"] == pytest.approx((a + b + c) / 3)
    assert spread["deviation"] == pytest.approx(float(np.std([a, b, c], ddof=1)))


def test_the_held_out_text_of_the_first_is_put_to_the_second(folder, run, other):
    result = measured(folder, ["tiny", "letters"])
    one, two = result.summary["results"]
    assert two["settings"]["held_out"] is False, "its own folder `eval` is for what it held out itself"
    assert one["metrics"]["num_targets"] != two["metrics"]["num_targets"]
    assert not (folder / "runs" / "letters" / "eval").exists()
    # The bytes are the same, so bits per byte are over the same text.
    bytes_of = [m["loss"] * m["num_targets"] / m["bits_per_byte"] for m in (one["metrics"], two["metrics"])]
    assert bytes_of[0] == pytest.approx(bytes_of[1], rel=0.01)


def learned(result):
    """What is said of text that a model may have learned from."""
    return [[text for text in one["warnings"] if "learn" in text] for one in result.summary["results"]]


def held_out(run):
    card = json.loads((run / "data.json").read_text())
    return card["sources"][0]["num_held_out_documents"]


def test_text_that_the_second_run_did_not_hold_out_is_told(folder, run, other):
    quick = {"pretrain__train__length": "1 steps", "pretrain__eval__every": "never"}
    less = pretrain(folder, "less", pretrain__held_out=0.03, **quick)
    number, kept = held_out(run), held_out(less)
    assert 0 < kept < number
    [own, said] = learned(measured(folder, ["tiny", "less"], reference=[]))
    assert own == []
    assert [text.partition(":")[0] for text in said] == [
        f"{number - kept:,} of the {number:,} documents are among those that this model's run learns from"
    ]
    # What the one with less held out, the one with more did, too; equal shares are equal documents.
    assert learned(measured(folder, ["less", "tiny"], reference=[])) == [[], []]
    assert learned(measured(folder, ["tiny", "letters"], reference=[])) == [[], []]
    corpus = {"name": "text", "files": str(folder / "corpus"), "documents": "paragraph"}
    pretrain(folder, "paragraphs", pretrain__data=corpus, **quick)
    [own, said] = learned(measured(folder, ["tiny", "paragraphs"], reference=[]))
    assert (own, len(said)) == ([], 1)
    assert "from other texts: this one may have learned" in said[0]


def test_fewer_rows_or_another_context_do_not_change_the_card(folder, run):
    """As they are named, so is what the report says of how it was asked."""
    card = run / "model" / "README.md"
    plain = evaluate("tiny", None, options(folder), make_reporter(quiet=True))
    before = card.read_bytes()
    for section, sampled in (({"context": 16}, False), ({"rows": 2}, True)):
        report = report_of(measured(folder, "tiny", **section).folder)
        assert (report["plain"], report["sampled"]) == (False, sampled)
        assert card.read_bytes() == before
    measured(folder, "tiny", rows=2, data=all_text(folder))
    assert card.read_bytes() == before
    report = report_of(plain.folder)
    assert (report["plain"], report["sampled"]) == (True, False)


@pytest.mark.parametrize("processes", ["2", pytest.param("3", marks=pytest.mark.slow)])
def test_several_processes_find_exactly_what_one_does(folder, run, capsys, processes):
    """Eleven windows in batches of eight: the last batch does not divide."""
    words = ["eval", "tiny", "--runs", str(folder / "runs"), "--json", "eval.rows=11"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    process = start([sys.executable, "-m", "llmkit", *words, "--processes", processes])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    both = json.loads(out)
    for one in (alone, both):
        del one["next"]  # it begins with the program's name
    assert both == alone
    assert alone["metrics"]["num_targets"] > 0


def test_a_gate_that_does_not_hold_ends_the_command_with_4_after_its_result(folder, run, capsys):
    words = ["eval", "tiny", "--runs", str(folder / "runs"), "--fail-under", "perplexity=2", "--json"]
    assert main(words) == 4
    given = json.loads(capsys.readouterr().out)
    [gate] = given["gates"]
    assert (gate["metric"], gate["limit"], gate["held"]) == ("perplexity", 2.0, False)
    assert main([*words[:-2], "perplexity=2000"]) == 0
    assert (
        main(["eval", "tiny", "--runs", str(folder / "runs"), "--max-drop", "1%", "--against", "tiny"]) == 0
    )


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(folder, run, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    words = ["eval", "tiny", "--runs", str(folder / "runs"), "eval.rows=3", "--fail-under", "loss=9", "-n"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == [{"model": str(run / "model"), "asked": "text"}]
    assert (told["rows"], told["fail_under"], told["processes"]) == (3, {"loss": 9.0}, 1)
    assert "perplexity" in told["figures"]
    assert main(words) == 0
    assert "what the run of tiny held out" in capsys.readouterr().out
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    assert main(["eval", str(checkpoint), "--runs", str(folder / "runs"), "-n", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == [{"model": str(checkpoint), "asked": "text"}]
    assert main([*words, "eval.metrics=[accuracy]"]) == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_cannot_be_is_said(folder, run, other, capsys):
    with pytest.raises(UsageError, match="overlap"):
        measured(folder, "tiny", stride=32)
    with pytest.raises(UsageError, match="`accuracy` does not fit text") as error:
        measured(folder, "tiny", metrics=["accuracy"])
    assert "perplexity" in error.value.hint
    with pytest.raises(UsageError, match="no figure"):
        measured(folder, "tiny", gate={"fail_under": {"perplexiti": 3}})
    assert main(["eval", "tiny", "letters", "--runs", str(folder / "runs")]) == 2
    assert "--compare" in capsys.readouterr().err
    assert main(["eval", "tiny", "--fail-under", "loss", "--runs", str(folder / "runs")]) == 2


def test_a_gate_is_about_the_worse_side(folder, run):
    """2% of a loss is upwards."""
    loss = measured(folder, "tiny").summary["metrics"]["loss"]
    held = measured(folder, "tiny", gate={"fail_under": {"loss": loss * 1.001, "bits_per_byte": 0.1}})
    assert isinstance(held.failed, GateError)
    assert [gate["held"] for gate in held.summary["gates"]] == [True, False]


def test_a_checkpoint_is_measured_as_the_model_that_it_would_have_been(folder, run):
    """Its held-out loss is what training measured at that step."""
    recorded = losses(run, "eval/loss")[10]
    path = run / "checkpoints" / "step_00000010"
    result = measured(folder, str(path))
    assert result.summary["metrics"]["loss"] == pytest.approx(recorded, abs=1e-6)
    assert result.folder == run.parent / "eval-step_00000010"
    again = measured(folder, [str(path), "tiny"]).summary["comparison"]
    assert {pair["verdict"] for pair in again} <= {"better", "worse", "no difference seen"}
    last = measured(folder, str(run / "checkpoints" / "step_00000020")).summary["metrics"]
    assert last == measured(folder, "tiny").summary["metrics"]


def test_however_many_processes_ask_for_a_checkpoint_one_makes_its_model(folder, run):
    """Eight rows a step, eight at a time: two processes could not have trained it."""
    checkpoint, made = run / "checkpoints" / "step_00000005", []
    for processes in (2, None):
        asked = replace(options(folder), processes=processes)
        place = exported_checkpoint(checkpoint, asked, make_reporter(quiet=True))
        made.append((place / "model.safetensors").read_bytes())
        shutil.rmtree(place.parent)  # what is not made anew would tell nothing
    assert made[0] == made[1]


def test_a_damaged_checkpoint_is_not_measured(folder, run, tmp_path):
    place = tmp_path / "runs" / "tiny" / "pretrain"
    shutil.copytree(run, place)
    weights = place / "checkpoints" / "step_00000010" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        evaluate(str(weights.parent), None, options(tmp_path), make_reporter(quiet=True))


def test_fewer_rows_and_other_windows_leave_the_whole_evaluation_alone(folder, run):
    whole = evaluate("tiny", None, options(folder), make_reporter(quiet=True))
    before = (whole.folder / "report.json").read_bytes()
    others = [
        measured(folder, "tiny", **section).folder
        for section in ({"rows": 2}, {"stride": 8}, {"context": 16})
    ]
    assert len({whole.folder, *others}) == 4
    assert (whole.folder / "report.json").read_bytes() == before


def test_models_of_one_name_that_no_run_trained_have_folders_of_their_own(folder, run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(run / "model", tmp_path / name / "model")
    words = [str(tmp_path / name / "model") for name in ("one", "two")]
    made = load_recipe({"llmkit": 1, "name": "m", "eval": {"data": all_text(folder), "reference": []}})
    found = evaluate(words, made, options(tmp_path), make_reporter(quiet=True)).summary["results"]
    assert len({one["report"] for one in found}) == 2


def test_a_setting_that_nothing_reads_is_refused(folder, run, capsys):
    with pytest.raises(UsageError, match=r"eval\.noise: text goes by no such setting") as error:
        measured(folder, "tiny", noise={"typos": "5%"})
    assert "labelled" in error.value.hint
    with pytest.raises(UsageError, match=r"eval\.rows: speed"):
        measured(folder, "tiny", speed={}, rows=3)
    runs = ["--runs", str(folder / "runs")]
    assert main(["eval", "tiny", "--compare", *runs]) == 2
    assert main(["eval", "tiny", "--fail-under", "loss=1", "--fail-under", "loss=9", *runs]) == 2
    assert "twice" in capsys.readouterr().err


def test_a_gate_ends_a_whole_run_too(folder, run):
    made = recipe(folder, "tiny", eval__gate={"fail_under": {"loss": 0.01}})
    result = run_all(load_recipe(made), options(folder), make_reporter(quiet=True))
    assert isinstance(result.failed, GateError)


def test_what_is_no_number_is_null_in_json(capsys):
    give_json({"perplexity": math.inf, "ends": [math.nan, np.float32(0.5)]})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "ends": [None, 0.5]}
