"""A chain of compressions: artefacts, what is not made again, what it is measured on, the gate."""

import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import tuning
from training import options, pretrain, write_corpus
from transformers import AutoModelForCausalLM

from llmkit import registry
from llmkit.cli import main
from llmkit.cli.compress import step_of
from llmkit.compress.given import Made
from llmkit.compress.prune import number_left
from llmkit.errors import CorruptError, GateError, MissingError, RunError, UsageError
from llmkit.evaluate.measurement import Measurement
from llmkit.evaluate.verdict import Difference
from llmkit.objectives.base import NOT_LEARNED
from llmkit.recipe import load_recipe
from llmkit.recipe.compression import Step
from llmkit.report.console import make_reporter
from llmkit.run import compress
from llmkit.run.compression.artefacts import Artefact, begin, label_of
from llmkit.run.compression.chain import over_stages, stage_of
from llmkit.run.compression.judge import Judged, check_direction, limit_of
from llmkit.run.compression.material import material_of
from llmkit.run.evaluate import find_subject

calls = []


def zeroed(given, step):
    """Takes the smallest weights of each matrix out; what is learned from was looked at."""
    calls.append((step, list(given.batches)))
    touched = 0
    with torch.no_grad():
        for name, weight in given.model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                smallest = weight.abs().flatten().kthvalue(max(1, int(weight.numel() * step.share))).values
                weight[weight.abs() <= smallest] = 0
                touched += 1
    return Made(given.model, {"touched": touched}, warnings=["as planted"])


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    module = ModuleType("planted_method")
    module.apply = zeroed
    monkeypatch.setitem(sys.modules, "planted_method", module)
    known = replace(registry.METHODS["prune"], code="planted_method:apply")
    monkeypatch.setitem(registry.METHODS, "prune", known)  # type: ignore[index]
    calls.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def run(folder):
    return pretrain(folder)


@pytest.fixture(scope="module")
def classifier(folder):
    more = {"finetune__train__length": "4 steps", "finetune__eval__every": "never"}
    return tuning.finetune(folder, "cls", finetune__checkpoint__every="never", **more)


def prune(share, **more):
    return {"method": "prune", "share": share, "by": "magnitude", **more}


def made(folder, target, *steps, fresh=False, **section):
    recipe = load_recipe(
        {"llmkit": 1, "name": "c", "seed": 3, "compress": {"steps": list(steps), "speed": None, **section}}
    )
    return compress(str(target), recipe, options(folder, fresh=fresh), make_reporter(quiet=True))


def zeros(place):
    state = AutoModelForCausalLM.from_pretrained(place).state_dict()
    parts = [value for name, value in state.items() if value.ndim == 2 and "layers" in name]
    return sum(int((part == 0).sum()) for part in parts) / sum(part.numel() for part in parts)


def test_each_step_is_made_of_what_the_one_before_left(folder, run):
    result = made(folder, "tiny", prune("20%"), prune("50%"))
    chain = result.summary["chain"]
    assert [one["name"] for one in chain] == ["tiny", "1-prune", "2-prune"]
    assert zeros(chain[1]["folder"]) == pytest.approx(0.2, abs=0.01)
    assert zeros(chain[2]["folder"]) == pytest.approx(0.5, abs=0.01)
    assert chain[0]["figures"]["loss"] == result.summary["before"]["loss"]
    (loss,) = [pair for pair in chain[2]["differences"] if pair["metric"] == "loss"]
    assert loss["difference"] == pytest.approx(chain[2]["figures"]["loss"] - chain[0]["figures"]["loss"])
    assert loss["low"] < loss["difference"] < loss["high"]
    assert result.summary["model"] == chain[2]["folder"]
    report = json.loads((result.folder / "report.json").read_text())
    assert report["kind"] == "compress"
    assert report["warnings"] == ["1-prune: as planted", "2-prune: as planted"]
    # An artefact is a model like any other: a run's, by the files beside it.
    given = find_subject(str(result.folder), options(folder), make_reporter(quiet=True))
    assert str(given.place) == chain[2]["folder"]
    assert given.trained is not None
    assert main(["eval", str(result.folder), "--runs", str(folder / "runs"), "-q"]) == 0


def test_what_is_made_is_not_made_again_and_a_changed_step_makes_what_follows(folder, run):
    made(folder, "tiny", prune("10%"), prune("30%"))
    first = [step.share for step, _ in calls]
    made(folder, "tiny", prune("10%"), prune("30%"))
    assert [step.share for step, _ in calls] == first == [0.1, 0.3]
    # A name says all of a chain, so that another second step has another folder.
    assert label_of([Step(**prune(0.1)), Step(**prune(0.3))]) == "prune-10-magnitude-prune-30-magnitude"
    result = made(folder, "tiny", prune("10%"), prune("30%"), fresh=True)
    assert [step.share for step, _ in calls] == [0.1, 0.3, 0.1, 0.3]
    # What a kill leaves half made is made anew, and what follows it stays.
    (result.folder / "1-prune" / "step.json").unlink()
    made(folder, "tiny", prune("10%"), prune("30%"))
    assert [step.share for step, _ in calls[4:]] == [0.1]
    # So is what was damaged.
    weights = result.folder / "2-prune" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    made(folder, "tiny", prune("10%"), prune("30%"))
    assert [step.share for step, _ in calls[5:]] == [0.3]


@pytest.mark.slow
def test_what_is_said_of_a_model_makes_no_other_one(folder, run):
    made(folder, "tiny", prune("40%"))
    before = (run / "model" / "manifest.json").read_bytes()
    words = ["eval", "tiny", "--data", str(write_corpus(folder / "corpus")), "--runs", str(folder / "runs")]
    assert main([*words, "-q"]) == 0
    assert (run / "model" / "manifest.json").read_bytes() != before  # the card has more figures now
    made(folder, "tiny", prune("40%"))
    assert len(calls) == 1
    # A run that was moved is the same, too; with other weights or another tokenizer it is not.
    first = begin("tiny", run / "model").address
    for name, same in (("README.md", True), ("model.safetensors", False), ("tokenizer_config.json", False)):
        place = folder / f"copied-{name}" / "model"
        shutil.copytree(run / "model", place)
        assert begin("tiny", place).address == first
        (place / name).write_bytes((place / name).read_bytes() + b" ")
        if name.endswith(".safetensors"):
            with pytest.raises(CorruptError, match=r"model\.safetensors"):
                begin("tiny", place)
        else:
            assert (begin("tiny", place).address == first) is same


def test_a_dry_run_says_what_is_done_already_and_writes_nothing(folder, run, capsys):
    made(folder, "tiny", prune("16%"))
    words = ["compress", "tiny", "--method", "prune,share=16%,by=magnitude"]
    rest = ["seed=3", "compress.speed=null", "--runs", str(folder / "runs"), "-n"]
    before = sorted(folder.rglob("*"))
    for more, wanted in (
        ([], [True]),
        (["--method", "prune,share=50%"], [False, False]),  # in another folder
        (["--fresh"], [False]),
        (["seed=4"], [False]),
    ):
        assert main([*words, *more, *rest[bool("seed=4" in more) :], "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [one["made"] for one in told["chains"][""]] == wanted
    assert main(["compress", "tiny", "compress.target.size=30%", *rest]) == 0
    said = capsys.readouterr().out
    assert "tried/channels-25-int4/1-prune" in said
    assert sorted(folder.rglob("*")) == before
    assert len(calls) == 1


def test_what_learn_names_counts_by_its_bytes(folder, run, tmp_path):
    text = "\n".join(path.read_text() for path in sorted(write_corpus(folder / "corpus").iterdir())[:4])
    for name, more, times in (("a.txt", "", 1), ("b.txt", "", 1), ("b.txt", "and more", 2)):
        (tmp_path / name).write_text(text + more)
        learn = {"files": str(tmp_path / name)}
        made(folder, "tiny", {"method": "prune", "share": "15%"}, learn=learn)
        assert len(calls) == times


def test_rows_to_learn_from_come_from_one_source(folder, classifier):
    learn = [{"files": "a.csv"}, {"files": "b.csv"}]
    with pytest.raises(UsageError, match=r"compress\.learn names 2 sources"):
        made(folder, classifier.parent, {"method": "prune", "share": "30%"}, learn=learn)


def test_what_cannot_be_judged_is_told_before_anything_is_made(folder, run):
    with pytest.raises(UsageError, match=r"compress\.metric: .*`macro_f1`"):
        made(folder, "tiny", prune("21%"), metric="macro_f1")
    assert calls == []
    odd = Measurement("a", "a", "text", "d", {"oddness": 2.0}, ["oddness"], "oddness")
    with pytest.raises(UsageError, match="rises or falls"):
        check_direction("oddness", odd)


def test_facts_of_several_stages_count_from_the_first():
    first = {
        "num_parameters_before": 100,
        "num_parameters": 80,
        "channels": [64, 48],
        "kept": [[0, 1, 3]],
        "gone": [[2]],
        "influence": [[0.5, 0.4, 0.1, 0.6]],
    }
    second = {
        "num_parameters_before": 80,
        "num_parameters": 60,
        "share_of_parameters": 0.25,
        "channels": [48, 32],
        "kept": [[0, 2]],
        "gone": [[1]],
        "influence": [[0.5, 0.2, 0.6]],
    }
    found = over_stages([first, second])
    assert found["share_of_parameters"] == pytest.approx(0.4)
    assert (found["num_parameters_before"], found["channels"]) == (100, [64, 32])
    assert (found["kept"], found["gone"]) == ([[0, 3]], [[1, 2]])
    assert over_stages([first]) == first


def test_a_planted_bad_compression_ends_with_4_and_is_kept_and_marked(folder, run, capsys):
    words = ["compress", "tiny", "--method", "prune,share=95%,by=magnitude", "compress.speed=null"]
    words += ["--max-drop", "1%", "--runs", str(folder / "runs"), "--json"]
    assert main(words) == 4
    given = json.loads(capsys.readouterr().out)
    [gate] = given["gates"]
    assert (gate["metric"], gate["held"]) == ("perplexity", False)
    assert gate["limit"] == pytest.approx(1.01 * gate["before"])
    assert zeros(given["model"]) > 0.94
    report = json.loads(
        (folder / "runs" / "tiny" / "compress-prune-95-magnitude" / "report.json").read_text()
    )
    assert report["status"] == "failed"
    assert report["gates"] == given["gates"]
    assert main(["runs", "--runs", str(folder / "runs")]) == 0
    assert "compress-prune-95-magnitude (does not hold)" in capsys.readouterr().out
    # The same with room enough holds.
    assert main([*words[:-5], "--max-drop", "100%", *words[-3:]]) == 0


def test_a_classifier_is_measured_by_its_rows_and_looks_at_rows_it_learned_from(folder, classifier):
    result = made(folder, classifier.parent, {"method": "prune", "share": "30%"})
    [(_, batches)] = calls
    assert {"accuracy", "macro_f1", "loss"} <= set(result.summary["metrics"])
    final = json.loads((classifier / "report.json").read_text())["final"]
    assert result.summary["before"]["accuracy"] == final["eval/accuracy"]
    assert result.summary["before"]["loss"] == final["eval/loss"]
    facts = json.loads((classifier / "data.json").read_text())
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert 0 < rows <= facts["num_train"] if "num_train" in facts else rows > 0


def test_text_that_is_looked_at_is_of_the_training_part(folder, run):
    made(folder, "tiny", {"method": "prune", "share": "30%"}, calibration={"rows": 5, "tokens": 16})
    [(_, batches)] = calls
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (5, 16)
    targets = torch.cat([batch["targets"] for batch in batches])
    assert (targets != NOT_LEARNED).all()
    # Twice the same, and none for a step that looks at nothing.
    made(folder, "tiny", {"method": "prune", "share": "31%"}, calibration={"rows": 5, "tokens": 16})
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(*(b for _, b in calls), strict=True)
    )
    made(folder, "tiny", prune("32%"))
    assert calls[-1][1] == []


def test_a_model_without_a_run_needs_text_to_measure_and_to_look_at(folder, run, tmp_path):
    place = tmp_path / "alone"
    place.mkdir()
    for path in (run / "model").iterdir():
        if path.name != "manifest.json":
            (place / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="nothing says what to measure it on"):
        made(folder, place, prune("20%"))
    text = {"files": str(write_corpus(folder / "corpus"))}
    with pytest.raises(UsageError, match="nothing says what it learned from") as error:
        made(folder, place, {"method": "prune", "share": "20%"}, data=text)
    assert "--learn" in error.value.hint
    found = made(folder, place, {"method": "prune", "share": "20%"}, data=text, learn=text)
    assert found.summary["metrics"]["loss"] > 0


def test_what_cannot_be_is_said(folder, run, tmp_path, capsys):
    runs = ["--runs", str(folder / "runs")]
    assert main(["compress", "tiny", *runs]) == 2
    assert "--method int8" in capsys.readouterr().err
    assert main(["compress", "tiny", "--method", "int9", *runs]) == 2
    assert "did you mean `int8`?" in capsys.readouterr().err
    assert main(["compress", "tiny", "--method", "int4,grup=64", *runs]) == 2
    assert "did you mean `group`?" in capsys.readouterr().err
    with pytest.raises(UsageError, match="nothing can follow that"):
        made(folder, "tiny", {"method": "export", "to": "bf16"}, prune("10%"))
    with pytest.raises(UsageError, match="step 1 stores weights in few bits, and nothing can follow that"):
        made(folder, "tiny", {"method": "quantize"}, prune("10%"))
    place = tmp_path / "quantised"
    place.mkdir()
    config = json.loads((run / "model" / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UsageError, match=r"quantised already \(awq\)"):
        made(folder, place, prune("10%"))


def test_a_chain_that_fails_leaves_no_report_of_the_one_before(folder, run, monkeypatch):
    first = made(folder, "tiny", prune("21%"), max_drop="100%")
    assert json.loads((first.folder / "report.json").read_text())["status"] == "done"

    def broken(given, step):
        raise RunError("the planted method is broken")

    monkeypatch.setattr(sys.modules["planted_method"], "apply", broken)
    with pytest.raises(RunError, match="is broken"):
        made(folder, "tiny", prune("21%"), max_drop="100%", fresh=True)
    report = json.loads((first.folder / "report.json").read_text())
    assert (report["status"], report["error"]) == ("failed", "the planted method is broken")
    assert "the planted method is broken" in (first.folder / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_compares_with_its_beginning_is_compressed_while_that_is_there(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tuning.model("llama"), base)
    run = tuning.finetune(tmp_path, "dpo", finetune__model={"name": str(base), "context": 64})
    found = made(tmp_path, run, {"method": "quantize", "format": "int8", "solver": "rtn"})
    before, after = found.summary["before"], found.summary["metrics"]
    assert after["loss"] == pytest.approx(before["loss"], rel=0.02)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(MissingError, match="the model that training began with is gone") as error:
        made(tmp_path, run, {"method": "quantize", "format": "int8", "solver": "gptq"})
    assert str(base) in error.value.message


def test_words_are_steps():
    assert step_of("int4,solver=awq,group=64") == {
        "method": "quantize",
        "format": "int4",
        "solver": "awq",
        "group": 64,
    }
    assert step_of("prune,share=50%,by=wanda") == {"method": "prune", "share": "50%", "by": "wanda"}
    assert step_of("gguf,type=q4_0") == {"method": "export", "to": "gguf", "type": "q4_0"}
    assert step_of("quantize,format=int8,symmetric=false")["symmetric"] is False


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"method": "quantize"}], "int8"),
        ([{"method": "quantize", "format": "int4", "solver": "awq"}], "int4-awq"),
        (
            [{"method": "prune", "share": "12.5%", "what": "layers"}, {"method": "quantize"}],
            "prune-layers-12_5-int8",
        ),
        ([{"method": "export", "to": "gguf"}], "gguf"),
    ],
)
def test_a_chain_is_named_by_its_steps(steps, name):
    assert label_of([Step.model_validate(step) for step in steps]) == name


def test_an_unusual_setting_has_another_name():
    plain, other = ({"method": "quantize", "format": "int4", "damping": d} for d in (0.01, 0.1))
    assert label_of([Step.model_validate(plain)]) == "int4"
    named = label_of([Step.model_validate(other)])
    assert named.startswith("int4-")
    assert named != label_of([Step.model_validate({**other, "damping": 0.2})])


@pytest.mark.parametrize(
    ("after", "low", "high", "held"),
    [
        (2.05, 0.03, 0.07, True),
        (2.05, 0.045, 0.055, False),
        (2.05, -0.2, 0.3, True),
        (2.03, 0.02, 0.04, True),
    ],
)
def test_only_what_is_lost_beyond_chance_counts(after, low, high, held):
    """2% of a loss of 2.0 is 0.04; the near end of the difference's interval decides."""
    before = Measurement("a", "a", "text", "d", {"loss": 2.0}, ["loss"], "loss")
    now = replace(before, subject="b", figures={"loss": after})
    pair = Difference("b", "a", "loss", after, 2.0, after - 2.0, low=low, high=high)
    found = limit_of(0.02, "loss", Judged(Artefact("b", None, ""), now, [pair]), before)
    assert found.held is held
    assert found.limit == pytest.approx(2.04)


@pytest.mark.parametrize(("low", "high", "held"), [(-0.09, -0.01, True), (-0.06, -0.04, False)])
def test_of_what_is_better_the_higher_the_near_end_is_the_upper_one(low, high, held):
    before = Measurement("a", "a", "cls", "d", {"accuracy": 0.9}, ["accuracy"], "accuracy")
    now = replace(before, figures={"accuracy": 0.85})
    pair = Difference("b", "a", "accuracy", 0.85, 0.9, -0.05, low=low, high=high)
    assert limit_of(0.02, "accuracy", Judged(Artefact("b", None, ""), now, [pair]), before).held is held


def test_stages_come_to_the_share():
    layers, weights = (
        Step.model_validate({"method": "prune", "what": what, "share": "60%", "stages": 3, "recover": {}})
        for what in ("layers", "weights")
    )
    left = 1.0
    for number, wanted in ((1, 0.8), (2, 0.6), (3, 0.4)):
        left *= 1 - stage_of(layers, number, 3).share  # of what the stage before left
        assert left == pytest.approx(wanted)
        assert stage_of(weights, number, 3).share == pytest.approx(1 - wanted)  # zeros are zeros already
        assert stage_of(weights, number, 3).recover is None
    # Two of six layers in three parts: counted anew from what is left each time, three would go.
    third = layers.model_copy(update={"share": 1 / 3})
    now, went = 6, []
    for number in (1, 2, 3):
        before = {"kept": [[*range(now)]], "gone": [[*range(6 - now)]]} if number > 1 else None
        part = stage_of(third, number, 3, before)
        now = number_left(now, part.share, "layers") if part is not None else now
        went.append(now)
    assert went == [5, 5, 4]


def test_more_is_better_counts_downwards():
    before = Measurement("a", "a", "cls", "d", {"accuracy": 0.9}, ["accuracy"], "accuracy")
    for after, held in ((0.89, True), (0.88, False), (0.95, True)):
        now = replace(before, figures={"accuracy": after})
        assert limit_of(0.02, "accuracy", Judged(Artefact("b", None, ""), now), before).held is held


def test_a_lost_gate_names_the_figures(folder, run):
    found = made(folder, "tiny", prune("90%"), max_drop="1%")
    assert isinstance(found.failed, GateError)
    assert "perplexity went from" in str(found.failed)


def test_material_knows_the_task(folder, classifier, run):
    quiet = make_reporter(quiet=True)
    for word, task in ((classifier.parent, "cls"), ("tiny", None)):
        subject = find_subject(str(word), options(folder), quiet)
        recipe = load_recipe({"llmkit": 1, "compress": {"steps": [{"method": "quantize"}]}}).recipe
        found = material_of(subject, recipe.compress, recipe, folder, options(folder), quiet)
        assert (found.task.section.task if found.task else None) == task
