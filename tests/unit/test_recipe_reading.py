"""YAML with positions: strict, bounded, and clear about what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import LlmkitError, RecipeError
from llmkit.recipe import load_recipe
from llmkit.recipe.positions import Text, find, key_spot
from llmkit.recipe.reading import MAX_NODES, UnreadableError, read_yaml, scalar

GOOD = "llmkit: 1\nname: x\n"


def problems_of(tmp_path: Path, content: str | bytes, **options: Any) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, **options)
    return [text.replace(f"{tmp_path}/", "") for text in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3.", 3.0),
        (".5", 0.5),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("", None),
        ("0x10", 16),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        (".inf", ".inf"),
        ("1e999", "1e999"),
        ("9" * 30, 1e30),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_every_key_and_value_knows_its_line_and_column() -> None:
    root, problems = read_yaml(Text("r.yaml", "a: 1\nb:\n  - {c: x, d: [5, 6]}\n"))
    assert root is not None
    assert problems == []
    assert root.plain() == {"a": 1, "b": [{"c": "x", "d": [5, 6]}]}
    key, value = key_spot(root, ("b", 0, "d")), find(root, ("b", 0, "d", 1))
    assert value is not None
    assert (key.line, key.column, key.width) == (3, 12, 1)
    assert (value.spot.line, value.spot.column, value.value) == (3, 19, 6)


def test_a_duplicate_key_is_named_with_both_lines(tmp_path: Path) -> None:
    (text,) = problems_of(tmp_path, GOOD + "seed: 1\nseed: 2\n")
    assert text.startswith("r.yaml:4:1: `seed` is here a second time; it first stands in line 3\n")


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"", "r.yaml:1:1: the recipe is empty"),
        (b"# only a comment\n", "r.yaml:1:1: the recipe is empty"),
        (b"- llmkit: 1\n", "r.yaml:1:1: a list is no recipe"),
        (b"hello", "r.yaml:1:1: a single value is no recipe"),
        (b"llmkit: 1\nname: \xff\xfe\n", "r.yaml:2:7: not UTF-8: byte 0xff at offset 16"),
        (b"llmkit: 1\nna\0me: x\n", "r.yaml:2:3: a NUL character"),
        (b"llmkit: 1\nname: \x07\n", "r.yaml:2:7: the character U+0007 cannot stand in a recipe"),
        (b"llmkit: 1\n---\nname: x\n", "r.yaml:2:1: a second document starts here"),
        (b"llmkit: 1\nname: *x\n", "r.yaml:2:7: `*x` has no anchor `&x` before it"),
        (b"llmkit: 1\nname: &x [*x]\n", "r.yaml:2:11: `*x` stands inside its own anchor"),
        (b"llmkit: 1\n[a, b]: x\n", "r.yaml:2:6: a list, mapping or alias cannot be a key"),
        (b"llmkit: 1\nname: !!python/object:os.system x\n", "r.yaml:2:7: tags (`!...`) have no meaning"),
        (b"llmkit: 1\nname: a: b\n", "r.yaml:2:8: not valid YAML: mapping values are not allowed"),
        (b"llmkit: 1\n\tname: a\n", "r.yaml:2:1: not valid YAML"),
        (b"llmkit: 1\nname: [a\nseed: 1\n", "r.yaml:2:7: not valid YAML"),
        (b"llmkit: 1\nname: 'a\n", "r.yaml:2:7: not valid YAML: found unexpected end of stream"),
        (b"llmkit: 1\nname\nseed: 1\n", "r.yaml:2:1: not valid YAML: could not find expected ':'"),
        (b"x" * 1_000_001, "r.yaml:1:1: 1,000,001 bytes are no recipe"),
    ],
)
def test_what_is_no_recipe_is_refused_at_its_place(tmp_path: Path, content: bytes, start: str) -> None:
    assert problems_of(tmp_path, content)[0].startswith(start)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(path).recipe.name == "x"


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_not_followed(opening: str) -> None:
    with pytest.raises(UnreadableError, match="more than 32 levels"):
        read_yaml(Text("r.yaml", "llmkit: " * (opening != "- ") + opening * 5000))


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(UnreadableError, match=f"more than {MAX_NODES:,} values"):
        read_yaml(Text("r.yaml", "\n".join(lines)))


def test_aliases_count_with_their_depth() -> None:
    lines = ["a0: &a0 [[[[[x]]]]]"] + [f"a{i}: &a{i} [[[[[*a{i - 1}]]]]]" for i in range(1, 9)]
    with pytest.raises(UnreadableError, match="more than 32 levels"):
        read_yaml(Text("r.yaml", "\n".join(lines)))


def test_an_anchor_may_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "llmkit: 1\ntokenize: {data: &text {files: a.txt}}\n"
        "pretrain: {data: *text, train: {length: 1 epoch}}\neval: {data: *text}\n"
    )
    recipe = load_recipe(path, overrides=["eval.data.files=b.txt"]).recipe
    files = [section.data[0].files for section in (recipe.tokenize, recipe.pretrain, recipe.eval)]
    assert files == [["a.txt"], ["a.txt"], ["b.txt"]]


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(LlmkitError) as caught:
        load_recipe("zh-tinny")
    assert caught.value.message == "there is no recipe `zh-tinny`"
    assert caught.value.hint.startswith("did you mean `zh-tiny`? shipped recipes: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "."])
def test_odd_names_are_no_recipes(name: str) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(name)
