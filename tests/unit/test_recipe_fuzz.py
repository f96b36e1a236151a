"""Whatever is given as a recipe: it loads, or an error of ours says why not."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.errors import RecipeError
from llmkit.recipe import fields, load_recipe, render_template, resolved_yaml, show_yaml
from llmkit.recipe.positions import Text
from llmkit.recipe.reading import UnreadableError, read_yaml

TEMPLATE = "\n".join(re.sub(r"\s+#.*|^#.*", "", line) for line in render_template("gpt").splitlines())
KEYS = sorted({key.rpartition(".")[2] for key in fields.settings()})
quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["3 epochs", "5%", "8k", "auto", "gpt-tiny", "${env:X}", "${env:X:-1}", "a.txt"]),
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)


def load_or_refuse(source: Any, **options: Any) -> None:
    """Load; when that works, what is written from it must load to the same."""
    try:
        loaded = load_recipe(source, env={"X": "5"}, **options)
    except RecipeError:
        return
    path = Path(source).with_name("again.yaml") if isinstance(source, Path) else None
    if path is not None:
        path.write_text(resolved_yaml(loaded), "utf-8")
        assert load_recipe(path).recipe == loaded.recipe
    assert show_yaml(loaded)


@quick
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
)
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    load_or_refuse(path)


@quick
@given(text=st.text(alphabet="ab01:-?,[]{}#&*!|>'\"%@` \n\t\\~<=.$", max_size=60))
def test_any_yaml_punctuation(text: str) -> None:
    with suppress(UnreadableError):
        read_yaml(Text("r.yaml", text))


@quick
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(TEMPLATE)), st.integers(0, 12), st.text(max_size=6)), max_size=4
    ),
    smoke=st.booleans(),
)
def test_a_good_recipe_with_pieces_replaced(
    tmp_path: Path, cuts: list[tuple[int, int, str]], smoke: bool
) -> None:
    text = TEMPLATE
    for start, length, new in cuts:
        text = text[:start] + new + text[start + length :]
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    load_or_refuse(path, smoke=smoke)


@quick
@given(key=st.sampled_from(sorted(fields.settings())), value=_values)
def test_a_good_recipe_with_any_value_in_any_place(key: str, value: Any) -> None:
    tree: Any = {
        "llmkit": 1,
        "tokenize": {"data": {"files": "a"}},
        "pretrain": {"data": [{"files": "a"}], "train": {"length": "1 epoch"}},
    }
    place = tree
    *parents, last = key.split(".")
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[0].setdefault(part, {})
    (place if isinstance(place, dict) else place[0])[last] = value
    load_or_refuse(tree)


@quick
@given(
    word=st.text(max_size=30)
    | st.builds("{}={}".format, st.sampled_from(sorted(fields.settings())), st.text(max_size=20))
)
def test_any_word(word: str) -> None:
    load_or_refuse("zh-tiny", overrides=[word])


@pytest.mark.parametrize("word", ["a." * 5000 + "a=1", "a=" + "[" * 5000, "seed=" + "9" * 5000, "=" * 5000])
def test_huge_words(word: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("zh-tiny", overrides=[word])
