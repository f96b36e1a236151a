"""A chain beside its first model: target by target on what is judged, timed in turn, searched for a target."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tuning
from training import options, pretrain

from llmkit.errors import ExitCode, MissingError, UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.evaluate.speed import Contender
from llmkit.recipe import load_recipe
from llmkit.recipe.compression import Step, Target
from llmkit.recipe.evaluation import Speed
from llmkit.report.console import make_reporter
from llmkit.run.compression import search as searching
from llmkit.run.compression.artefacts import begin
from llmkit.run.compression.judge import Judged
from llmkit.run.compression.judged import judged_batches, pair_all
from llmkit.run.compression.material import material_of
from llmkit.run.compression.search import ladder, least_size, search
from llmkit.run.compression.timing import precision_of, speed_of
from llmkit.run.evaluate import find_subject
from llmkit.run.measure.text import shards_of_run

QUIET = make_reporter(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def run(folder):
    return pretrain(folder)


@pytest.fixture(scope="module")
def classifier(folder):
    more = {"finetune__train__length": "4 steps", "finetune__eval__every": "never"}
    return tuning.finetune(folder, "cls", finetune__checkpoint__every="never", **more)


def material(folder, word, **section):
    recipe = load_recipe({"llmkit": 1, "name": "c", "compress": {"speed": None, **section}}).recipe
    subject = find_subject(word, options(folder), QUIET)
    return material_of(subject, recipe.compress, recipe, folder, options(folder), QUIET)


def ids_of(batches):
    return {tuple(row) for batch in batches for row in batch["input_ids"].tolist()}


def test_text_is_compared_on_what_was_held_out(folder, run):
    given = material(folder, "tiny")
    core = given.core(given.subject.place)
    few, whole = judged_batches(given, core, most=1), judged_batches(given, core, most=1000)
    assert len(few) == 1
    assert ids_of(few) <= ids_of(whole)
    held_out = [shard.split("held_out") for shard in shards_of_run(given.subject, options(folder).runs)]
    assert sum(int(batch["num_targets"]) for batch in whole) == sum(
        stream.num_tokens - 1 for stream in held_out
    )
    # A sentence may stand in two documents.
    learned = ids_of(given.batches(core, Step(method="quantize", format="int4")))
    assert len(ids_of(whole) & learned) < 0.05 * len(learned)


def test_rows_are_compared_on_what_was_held_out(folder, classifier):
    given = material(folder, str(classifier / "model"))
    core = given.core(given.subject.place)
    judged = judged_batches(given, core)
    assert sum(len(batch["targets"]) for batch in judged) >= 1
    few = judged_batches(material(folder, str(classifier / "model"), rows=1), core)
    assert sum(len(batch["targets"]) for batch in few) == 1


def test_each_model_of_a_chain_is_compared_with_the_first(folder, run):
    given = material(folder, "tiny")
    first = begin("tiny", given.subject.place)
    chain = [
        Judged(first, None),
        Judged(replace(first, word="1-same"), None),
        Judged(
            replace(first, word="2-export", place=folder / "gone", step=Step(method="export", to="onnx")),
            None,
        ),
    ]
    pair_all(chain, given, QUIET)
    assert chain[0].paired == {}
    assert chain[1].paired["num_targets"] > 100
    assert (chain[1].paired["nll_difference"], chain[1].paired["agreement"]) == (0, 1)
    assert chain[1].num_parameters == chain[0].num_parameters > 1000
    assert "no such folder" in chain[2].paired["why"]
    with pytest.raises(MissingError):  # of others that is an error
        pair_all([chain[0], Judged(replace(first, place=folder / "gone"), None)], given, QUIET)


# --- timing


class Clocked:
    """Answers for models that take so many seconds by name and precision."""

    def __init__(self, seconds):
        self._seconds, self.asked = seconds, []

    def __call__(self, contender: Contender, device):
        from contextlib import nullcontext

        self.asked.append((contender.word, contender.half))
        return nullcontext(SimpleNamespace(ask=lambda request: self._answer(contender, request)))

    def _answer(self, contender, request):
        if request["do"] == "load":
            facts = {"kind": "causal", "writes": True, "longest": 512}
            return {**facts, "num_parameters": 77, "file_bytes": 5}
        if request["do"] == "memory":
            return {"memory_bytes": 1000}
        seconds = self._seconds[contender.word]
        return {"seconds": seconds, "first_s": seconds / 2}


def chain_of_three():
    first = SimpleNamespace(word="m", place=None, step=None, facts=None)
    quantized = SimpleNamespace(word="1-q", place=None, step=Step(method="quantize"), facts={})
    exported = SimpleNamespace(
        word="2-e", place=None, step=Step(method="export", to="gguf"), facts={"type": "q8_0"}
    )
    return [Judged(one, None) for one in (first, quantized, exported)]


def test_the_first_is_timed_in_fp32_too_and_all_ratios_are_to_its_bf16():
    given = SimpleNamespace(
        task=None, asked=SimpleNamespace(device="cpu"), subject=SimpleNamespace(trust_remote_code=False)
    )
    clocked = Clocked({"m (fp32)": 1.0, "m (bf16)": 2.0, "1-q (bf16)": 4.0, "2-e (gguf q8_0)": 0.5})
    chain = chain_of_three()
    settings = Speed(batch=[1], length=[64], new_tokens=16, rounds=3)
    [said] = speed_of(chain, settings, given, QUIET, start=clocked)
    assert said.startswith("in fp32 m is 2.0 times as fast as in bf16")
    assert clocked.asked == [
        ("m (fp32)", False), ("m (bf16)", True), ("1-q (bf16)", True), ("2-e (gguf q8_0)", False),
    ]  # fmt: skip
    told = [[(row["precision"], row["times_as_fast"]) for row in one.speed] for one in chain]
    assert told == [[("fp32", 2.0), ("bf16", 1.0)], [("bf16", 0.5)], [("gguf q8_0", 4.0)]]
    assert chain[1].speed[0]["latency_ms_p50"] == 4000
    assert [one.num_parameters for one in chain] == [77] * 3


def test_an_exports_precision_is_that_of_its_file():
    assert precision_of(chain_of_three()[2]) == "gguf q8_0"
    asked = Step(method="export", to="onnx", type="int8")
    assert precision_of(Judged(SimpleNamespace(step=asked, facts={}), None)) == "onnx int8"


# --- the search


def measurement(loss):
    figures = {"loss": loss, "accuracy": 1 / loss}
    items = Items(["a", "b"], lambda numbers: figures | {"loss": loss + 0 * float(np.sum(numbers))})
    return Measurement("m", "m", "text", "d", figures, ["loss"], "loss", items)


class Shop:
    """Chains that were never made: each has a size and a loss."""

    def __init__(self, monkeypatch, models, seconds=None):
        self._models, self.made = models, []
        monkeypatch.setattr(searching, "measure", lambda subject, *_: measurement(models[subject][1]))
        monkeypatch.setattr(
            searching, "weight_bytes", lambda place: 400 if place == "first" else models[place][0]
        )
        monkeypatch.setattr(searching, "stored_type", lambda place: torch.float32)

        def timed(judged, *_):
            for one in judged[1:]:
                one.speed = [{"times_as_fast": 1 / seconds[one.artefact.place]}]

        monkeypatch.setattr(searching, "speed_of", timed)
        monkeypatch.setattr(searching, "fitting", lambda settings, place: settings)

    def chain_of(self, name, steps):
        if name not in self._models:
            raise UsageError(f"{name} fits no such model")
        self.made.append(name)
        to = "gguf" if name.startswith("file") else None
        made = SimpleNamespace(word=name, place=name, step=SimpleNamespace(to=to))
        return [SimpleNamespace(word="first", place="first", step=None), made]

    def search(self, names, max_drop=None, metric="loss", **target):
        names = names if isinstance(names, dict) and names is not MODELS else {name: [] for name in names}
        section = SimpleNamespace(target=Target(**target), max_drop=max_drop, speed=None)
        given = SimpleNamespace(section=section, of=lambda word, place: word, asked=SimpleNamespace(seed=0))
        return search(measurement(1.0), metric, given, self.chain_of, QUIET, rungs=dict(names))


MODELS = {"mild": (150, 1.0), "middle": (90, 1.05), "other": (80, 1.02), "strong": (50, 2.0)}


def test_of_those_that_will_do_the_one_that_loses_least_is_chosen(monkeypatch):
    shop = Shop(monkeypatch, MODELS)
    found = shop.search([*MODELS, "odd"], size="50%", max_drop=0.1)
    assert found.failed is None
    assert found.artefacts[-1].word == "other"
    told = {one["name"]: one for one in found.tried}
    assert [name for name, one in told.items() if one.get("chosen")] == ["other"]
    # 400 bytes of float32 are 200 in 16 bits.
    assert told["mild"]["size_ratio"] == 0.75
    assert not told["mild"]["reached"]
    assert (told["strong"]["reached"], told["strong"]["held"]) == (True, False)
    assert told["odd"]["error"] == "odd fits no such model"
    assert told["middle"]["difference"] == pytest.approx(0.05)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_what_is_lost_counts_before_what_is_saved_and_of_equals_the_smaller_one_is_taken(monkeypatch, metric):
    models = {"smallest": (50, 1.05), "better": (90, 1.01), "as good": (80, 1.01)}
    found = Shop(monkeypatch, models).search(list(models), size="50%", metric=metric)
    assert found.artefacts[-1].word == "as good"


def test_what_is_known_to_be_too_large_is_not_made_and_nothing_is_measured_twice(monkeypatch):
    assert least_size([Step(method="quantize")]) == 0.5
    assert least_size([Step(method="quantize", format="mixed")]) == pytest.approx(5 / 16)
    cut = Step(method="prune", what="layers", share=0.25)
    assert least_size([cut, Step(method="quantize", format="int4")]) == pytest.approx(0.65 / 4)
    assert least_size([Step(method="prune", share=0.5)]) == 1  # zeros take as much room
    assert least_size([Step(method="export", to="gguf", type="q4_0")]) == 0.25
    shop = Shop(monkeypatch, MODELS)
    rungs = {"mild": [Step(method="quantize")], "strong": [Step(method="quantize", format="int4")]}
    found = shop.search(rungs, size="30%")
    assert shop.made == ["strong"]
    assert found.tried[0]["error"] == "it leaves at least 50% of the size in 16 bits"
    assert {place: one.figures["loss"] for place, one in found.measured.items()} == {"strong": 2.0}
    # Where nothing can be small enough all are made, for the closest is wanted.
    shop = Shop(monkeypatch, MODELS)
    assert shop.search(rungs, size="10%").artefacts[-1].word == "strong"
    assert shop.made == ["mild", "strong"]


def test_a_time_is_reached_by_what_is_faster(monkeypatch):
    shop = Shop(monkeypatch, MODELS, {"mild": 1.0, "middle": 0.7, "other": 1.2, "strong": 0.4})
    found = shop.search(MODELS, latency="75%", max_drop=0.1)
    assert found.artefacts[-1].word == "middle"
    assert [one["latency_ratio"] for one in found.tried] == pytest.approx([1.0, 0.7, 1.2, 0.4])


def test_a_size_is_reached_by_what_the_same_libraries_read_if_anything_is(monkeypatch):
    models = {"file": (50, 1.0), "own": (60, 1.04)}
    found = Shop(monkeypatch, models).search(list(models), size="50%", max_drop=0.1)
    assert found.artefacts[-1].word == "own"
    found = Shop(monkeypatch, models).search(list(models), size="25%", max_drop=0.1)
    assert found.artefacts[-1].word == "file"  # nothing else is small enough
    found = Shop(monkeypatch, models, {"file": 0.5, "own": 0.5}).search(list(models), latency="60%")
    assert found.artefacts[-1].word == "file"  # for time, other runtimes count like the rest


def test_where_none_will_do_the_closest_is_named(monkeypatch):
    found = Shop(monkeypatch, MODELS).search(MODELS, size="35%", max_drop=0.1)
    assert (
        found.artefacts[-1].word == "other"
    )  # 5 points too large; `strong` loses ten times what may be lost
    assert found.failed is not None
    assert found.failed.exit_code == ExitCode.GATE
    assert "the closest is other: 40% of the size in 16 bits, loss from 1 to 1.02" in found.failed.message
    assert "size 35% and max_drop 10%" in found.failed.message
    assert not any(one["chosen"] for one in found.tried)


def test_where_nothing_fits_the_model_it_says_why(monkeypatch):
    with pytest.raises(UsageError, match="odd fits no such model"):
        Shop(monkeypatch, {}).search(["odd"], size="50%")
    with pytest.raises(UsageError, match=r"compress\.target"):
        Shop(monkeypatch, {}).search(["odd"])


def test_rungs_are_steps_that_a_recipe_could_have():
    for target in (Target(size=0.3), Target(latency=0.5), Target(size=0.3, latency=0.5)):
        rungs = ladder(target)
        assert len(rungs) >= 5
        assert all(isinstance(step, Step) for steps in rungs.values() for step in steps)
    # Rounding makes nothing faster in torch.
    assert not any(
        step.method == "quantize" for steps in ladder(Target(latency=0.5)).values() for step in steps
    )
