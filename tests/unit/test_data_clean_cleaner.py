"""The chain of steps: order, counts, reasons, identity."""

import json
import random
import sys
import types
from pathlib import Path

import pytest

from llmkit.data.clean.cleaner import Cleaned, Cleaner, StepCount, cleaning_identity
from llmkit.recipe.preparation import Filter, Normalise, PersonalData, Prepare

ALL = Prepare(
    normalise=Normalise(),
    filter=Filter(min_chars=5, languages=["en", "zh"]),
    personal_data=PersonalData(),
)
DOCUMENTS = [
    " \ufeff\n ",
    "hi",
    "Please write to the address ann@example.com, thank you very much for that.  ",
    "Der Hund läuft über die Straße und bellt den Briefträger an.",
    "今天天气很好，请打电话13800138000给我们。",
    "The answers of the test: paris is the capital of France.",
]


def contaminated(text: str) -> str | None:
    return "geography.jsonl" if "capital of France" in text else None


def test_each_step_counts_what_it_did() -> None:
    cleaner = Cleaner(ALL, contaminated)
    results = [cleaner.clean(text) for text in DOCUMENTS]
    assert results == [
        Cleaned(" \ufeff\n ", "normalise", "blank"),
        Cleaned("hi", "filter", "too short"),
        Cleaned("Please write to the address [MAIL], thank you very much for that."),
        Cleaned(DOCUMENTS[3], "filter", "language"),
        Cleaned("今天天气很好，请打电话[PHONE]给我们。"),
        Cleaned(DOCUMENTS[5], "decontaminate", "geography.jsonl"),
    ]
    size = [len(text.encode()) for text in DOCUMENTS]
    assert [step.as_json() for step in cleaner.steps] == [
        {"name": "normalise", "documents_in": 6, "documents_out": 5, "bytes_in": sum(size),
         "bytes_out": sum(size[1:]) - 2, "changed": 1, "dropped": {"blank": 1}, "replaced": {}},
        {"name": "filter", "documents_in": 5, "documents_out": 3, "bytes_in": sum(size[1:]) - 2,
         "bytes_out": size[2] - 2 + size[4] + size[5], "changed": 0, "dropped": {"language": 1, "too short": 1},
         "replaced": {}},
        {"name": "personal_data", "documents_in": 3, "documents_out": 3, "bytes_in": size[2] - 2 + size[4] + size[5],
         "bytes_out": size[2] - 2 - 9 + size[4] - 4 + size[5], "changed": 2, "dropped": {},
         "replaced": {"mail": 1, "phone": 1}},
        {"name": "decontaminate", "documents_in": 3, "documents_out": 2,
         "bytes_in": size[2] - 11 + size[4] - 4 + size[5], "bytes_out": size[2] - 11 + size[4] - 4, "changed": 0,
         "dropped": {"geography.jsonl": 1}, "replaced": {}},
    ]  # fmt: skip


def test_what_stays_does_not_depend_on_the_order() -> None:
    there, back = Cleaner(ALL, contaminated), Cleaner(ALL, contaminated)
    forward = [there.clean(text) for text in DOCUMENTS * 3]
    backward = [back.clean(text) for text in reversed(DOCUMENTS * 3)]
    assert forward == backward[::-1]
    assert [s.as_json() for s in there.steps] == [s.as_json() for s in back.steps]


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    whole, parts = Cleaner(ALL), [Cleaner(ALL), Cleaner(ALL)]
    rng = random.Random(3)
    for text in DOCUMENTS * 5:
        whole.clean(text)
        rng.choice(parts).clean(text)
    for step, one, other in zip(whole.steps, parts[0].steps, parts[1].steps, strict=True):
        read = StepCount.from_json(json.loads(json.dumps(one.as_json())))
        assert read.as_json() == one.as_json()
        read.add(other)
        assert read.as_json() == step.as_json()


def test_only_the_steps_asked_for() -> None:
    assert Cleaner(Prepare()).steps == []
    assert Cleaner(Prepare()).clean("  as it is ") == Cleaned("  as it is ")
    assert [step.name for step in Cleaner(Prepare(personal_data=PersonalData())).steps] == ["personal_data"]


def test_identity_holds_what_decides_the_result() -> None:
    assert cleaning_identity(Prepare()) == {}
    assert set(cleaning_identity(Prepare(normalise=Normalise(fix=False)))) == {"rules", "unicode"}
    full = cleaning_identity(Prepare(normalise=Normalise(html=True), filter=Filter(languages=["en"])))
    assert set(full) == {"rules", "unicode", "ftfy", "resiliparse", "language_model"}
    assert full["language_model"] == "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
    assert json.loads(json.dumps(full)) == full


def test_a_changed_detector_is_another_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(name: str, body: str) -> str:
        (tmp_path / f"{name}.py").write_text(f"def find(text):\n    return {body}\n")
        spec = Prepare(personal_data=PersonalData(detector=f"{name}:find"))
        return str(cleaning_identity(spec)["detector"])

    monkeypatch.syspath_prepend(str(tmp_path))
    assert identity("detector_one", "[]") == identity("detector_two", "[]")
    assert identity("detector_one_b", "[]") != identity("detector_three", "[(0, 1, 'x')]")


def test_a_detector_without_a_file_has_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_at_run_time")
    module.find = lambda text: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_at_run_time", module)
    spec = Prepare(personal_data=PersonalData(detector="made_at_run_time:find"))
    assert cleaning_identity(spec)["detector"]
