"""A teacher's cache in numbers: by row or by training position, its size, and what is refused."""

import pytest
from objectives import section

from llmkit.errors import UsageError
from llmkit.plan import PlanError
from llmkit.plan.taught import cache_note, lines_of_text, plan_cache
from llmkit.recipe.objectives import Cache, Distil
from llmkit.run.teacher_cache import check_cache


def planned(objective="clm", top_k=32, outputs=50_000, num_steps=10, num_rows=100):
    wanted = section(objective, distil=Distil(teacher="t", cache=Cache(top_k=top_k)))
    return plan_cache(
        wanted,
        outputs=outputs,
        num_rows=num_rows,
        lines_per_row=lines_of_text(wanted),
        rows_per_step=20,
        num_steps=num_steps,
    )


def test_rows_that_are_always_read_alike_are_kept_once_where_the_run_comes_round_to_all():
    assert (planned(num_steps=5)["by"], planned(num_steps=5)["num_keys"]) == ("row", 100)
    assert (planned(num_steps=500)["by"], planned(num_steps=500)["num_keys"]) == ("row", 100)
    assert (planned(num_steps=4)["by"], planned(num_steps=4)["num_keys"]) == ("position", 80)
    assert planned(num_steps=None)["by"] == "row"
    assert (planned("mlm", num_steps=500)["by"], planned("mlm", num_steps=500)["num_keys"]) == (
        "position",
        10_000,
    )


def test_its_size_is_that_of_numbers_and_logarithms():
    """Of 32 tokens a row: 32 kept outputs of 2 + 4 bytes (4 + 4 beyond 65,536), 4 for the rest, 8 a row."""
    assert planned()["bytes"] == 100 * (8 + 32 * (32 * 6 + 4))
    assert planned(outputs=100_000)["bytes"] == 100 * (8 + 32 * (32 * 8 + 4))
    assert planned("mlm", num_steps=1)["bytes"] == 20 * (8 + round(0.15 * 30) * (32 * 6 + 4))
    assert planned(outputs=5)["top_k"] == 5


def test_what_chance_decides_needs_a_length_that_can_be_counted():
    with pytest.raises(PlanError, match="what `mlm` reads of a row is another each time"):
        planned("mlm", num_steps=None)


def test_nothing_is_kept_unless_it_is_asked_for():
    wanted = section("clm", distil=Distil(teacher="t"))
    given = {"outputs": 9, "num_rows": 9, "lines_per_row": 9, "rows_per_step": 9, "num_steps": 9}
    assert plan_cache(wanted, **given) == {}
    assert "not in these figures" in cache_note({})
    assert "asked once" in cache_note(planned())


def test_a_teacher_on_the_hub_is_refused_for_its_weights_are_not_known(tmp_path):
    with pytest.raises(UsageError, match="'owner/name' is a name on the Hub"):
        check_cache(Distil(teacher="owner/name", cache=Cache()), "finetune")
    check_cache(Distil(teacher="owner/name"), "finetune")
    check_cache(Distil(teacher=str(tmp_path), cache=Cache()), "finetune")
