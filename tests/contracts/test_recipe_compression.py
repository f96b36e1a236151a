"""The `compress` section: the published JSON Schema and the loader agree on it, and the loader says why."""

import copy
from typing import Any

import pytest
from test_recipe_schema import VALIDATOR, loads

from llmkit.errors import RecipeError
from llmkit.recipe import load_recipe
from llmkit.recipe.compression import Step
from llmkit.registry import METHODS

# The steps, and what the loader's message holds; nothing: it is good.
CASES: list[tuple[Any, str]] = [
    ([], ""),
    ({"method": "quantize"}, ""),
    ([{"method": "quantize", "bits": 4}], ""),
    ([{"method": "quantize", "bits": 5.5}], ""),
    ([{"method": "quantize", "format": "int4", "bits": 8}], "`bits: 8` does not go with `format: int4`"),
    ([{"method": "quantise"}], "did you mean `quantize`?"),
    ([{"method": "quantize", "formt": "int8"}], "did you mean `format`?"),
    ([{"method": "quantize", "share": "50%"}], "it goes with `prune` or `factorize`"),
    ([{"method": "quantize", "format": "fp8", "solver": "gptq"}], "does not go with `format: fp8`"),
    ([{"method": "quantize", "group": 64, "solver": "awq", "format": "int4"}], ""),
    ([{"method": "quantize", "group": "rows"}], "group"),
    ([{"method": "prune"}], "`prune` needs `share`"),
    ([{"method": "prune", "share": "50%"}], ""),
    ([{"method": "prune", "share": "100%"}], "share"),
    (
        [{"method": "prune", "share": "50%", "what": "layers", "by": "wanda"}],
        "does not go with `what: layers`",
    ),
    ([{"method": "prune", "share": "50%", "by": "influence"}], "does not go with `what: weights`"),
    ([{"method": "prune", "share": "50%", "what": "heads", "pattern": "2:4"}], "`pattern: 2:4`"),
    ([{"method": "prune", "share": "50%", "by": "magnitude", "scope": "global"}], ""),
    ([{"method": "prune", "share": "50%", "scope": "global"}], "`scope: global` does not go with `by: auto`"),
    (
        [{"method": "prune", "share": "50%", "by": "magnitude", "scope": "global", "pattern": "2:4"}],
        "`scope: global` does not go with `pattern: 2:4`",
    ),
    (
        [{"method": "prune", "share": "50%", "by": "magnitude", "scope": "global", "what": "channels"}],
        "`scope: global` does not go with `what: channels`",
    ),
    ([{"method": "prune", "share": "30%", "pattern": "2:4"}], "`share: 30%` does not go with `pattern: 2:4`"),
    ([{"method": "prune", "share": 0.4, "pattern": "4:8"}], "`share: 0.4` does not go with `pattern: 4:8`"),
    ([{"method": "prune", "share": "50.0 %", "pattern": "2:4"}], ""),
    ([{"method": "prune", "share": 0.5, "pattern": "4:8"}], ""),
    ([{"method": "prune", "share": "50%", "by": "wanda", "damping": 0.1}], "leave `damping` out"),
    ([{"method": "prune", "share": "50%", "what": "layers", "damping": 0.1}], "leave `damping` out"),
    ([{"method": "prune", "share": "50%", "damping": 0.1}], ""),
    ([{"method": "prune", "share": "50%", "what": "channels", "damping": 0.1}], ""),
    ([{"method": "quantize", "damping": 0.1}], "`damping: 0.1` does not go with `solver: auto`"),
    ([{"method": "quantize", "bits": 4, "damping": 0.1}], ""),
    ([{"method": "quantize", "bits": 5.5, "damping": 0.1}], ""),
    ([{"method": "quantize", "solver": "gptq", "damping": 0.1}], ""),
    ([{"method": "quantize", "bits": 4, "solver": "awq", "damping": 0.1}], "`solver: awq`"),
    ([{"method": "quantize", "smooth": 0.3}], "`smooth: 0.3` does not go with `format: int8`"),
    ([{"method": "quantize", "format": "w8a8", "smooth": 0.3}], ""),
    ([{"method": "quantize", "bits": 5.5, "solver": "awq"}], "does not go with `format: mixed`"),
    ([{"method": "quantize", "bits": 4, "symmetric": False}], "`symmetric: false` does not go with"),
    ([{"method": "quantize", "format": "fp8", "symmetric": False}], "leave `symmetric` out"),
    ([{"method": "quantize", "symmetric": False}], ""),
    ([{"method": "prune", "share": "50%", "stages": 3}], "several stages take the same as one"),
    ([{"method": "prune", "share": "50%", "stages": 3, "recover": {}}], ""),
    ([{"method": "distil", "layers": 6, "recover": {"train": {"length": "1M tokens"}}}], ""),
    ([{"method": "factorize", "share": "30%", "by": "weights"}], ""),
    ([{"method": "factorize", "share": "30%", "by": "wanda"}], "does not go with `factorize`"),
    ([{"method": "export"}], "`export` needs `to`"),
    ([{"method": "export", "to": "gguf", "type": "q4_0"}], ""),
    ([{"method": "export", "to": "onnx", "type": "q4_0"}], "does not go with `to: onnx`"),
]


@pytest.mark.parametrize(("steps", "said"), CASES)
def test_the_loader_and_the_schema_agree_and_the_loader_says_why(steps: Any, said: str) -> None:
    agree({"steps": copy.deepcopy(steps)}, said)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"target": {"size": "50%"}, "max_drop": "1%"}, ""),
        ({"target": {}}, "says nothing that must be reached"),
        ({"target": {"size": "50%"}, "steps": [{"method": "quantize"}]}, "both say what to do"),
        ({"metric": "acuracy"}, "did you mean `accuracy`?"),
        ({"speed": None}, ""),
        ({"learn": {"files": "a.txt"}, "data": {"files": "b.txt"}}, ""),
        ({"learn": {"file": "a.txt"}}, "did you mean `files`?"),
    ],
)
def test_the_section(section: dict[str, Any], said: str) -> None:
    agree(section, said)


def agree(section: dict[str, Any], said: str) -> None:
    recipe = {"llmkit": 1, "compress": section}
    assert loads(recipe) == VALIDATOR.is_valid(recipe) == (not said)
    if said:
        with pytest.raises(RecipeError, match=r".") as error:
            load_recipe(recipe)
        assert said in "\n".join(map(str, error.value.problems))


def test_every_setting_of_a_step_is_read_by_a_method() -> None:
    read = {name for one in METHODS.values() for name in one.settings}
    assert read == set(Step.model_fields) - {"method"}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_said_is_as_the_method_has_it(method: str) -> None:
    needed = {"share": "50%", "to": "onnx"}
    step = Step.model_validate({"method": method, **{name: needed[name] for name in METHODS[method].needs}})
    for name, default in METHODS[method].settings.items():
        if name not in METHODS[method].needs and name != "recover":
            assert getattr(step, name) == default
    others = set(Step.model_fields) - set(METHODS[method].settings) - {"method"}
    assert all(getattr(step, name) is None for name in others)
