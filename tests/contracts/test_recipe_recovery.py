"""Settings of training that repairs a smaller model: the published JSON Schema and the loader agree on them."""

import pytest
from test_recipe_schema import VALIDATOR, loads

from llmkit.errors import RecipeError
from llmkit.recipe import load_recipe

ASKED = [
    ("cls", {"distil": {"teacher": "t"}}, ""),
    ("clm", {"distil": {"teacher": "t"}}, ""),
    ("regression", {"distil": {"teacher": "t", "weight": 0.3}}, ""),
    ("regression", {"distil": {"teacher": "t", "temperature": 2}}, "is about probabilities"),
    ("dpo", {"distil": {"teacher": "t"}}, "cannot be compared"),
    ("embed", {"distil": {"teacher": "t"}}, "cannot be compared"),
    ("electra", {"distil": {"teacher": "t"}}, "neither can have a teacher"),
    ("cls", {"distil": {"teacher": "t"}, "loss": {"r_drop": 1}}, ""),
    ("cls", {"distil": {"teacher": "t", "hidden": 1}, "loss": {"r_drop": 1}}, "`loss.r_drop` makes two"),
    ("sft", {"distil": {"teacher": "t", "cache": {}}}, ""),
    ("mlm", {"distil": {"teacher": "t", "cache": {"top_k": 8}}}, ""),
    ("cls", {"distil": {"teacher": "t", "cache": None, "direction": "reverse"}}, ""),
    ("cls", {"distil": {"teacher": "t", "cache": {"top_k": 0}}}, "top_k"),
    ("sft", {"distil": {"teacher": "t", "cache": {}, "direction": "reverse"}}, "the teacher's likeliest"),
    ("clm", {"distil": {"teacher": "t", "cache": {}, "hidden": 1}}, "`hidden` compares layers"),
    ("cls", {"distil": {"teacher": "t", "cache": {}, "attention": 0.5}}, "`attention` compares layers"),
    ("qa", {"distil": {"teacher": "t", "cache": {}}}, "`qa` says places of each text"),
    ("regression", {"distil": {"teacher": "t", "cache": {}}}, "`regression` says one number"),
    ("cls", {"distil": {"teacher": "t", "cache": {}}, "loss": {"r_drop": 1}}, "a line for each target"),
    ("cls", {"train": {"keep_zeros": True}}, ""),
    ("cls", {"train": {"keep_zeros": True}, "adapter": {}}, "an adapter that is merged fills the zeros"),
    ("cls", {"train": {"quantized": {"bits": 4}}, "adapter": {}}, "weights that stay as they are"),
    ("cls", {"train": {"quantized": {"bits": 4, "group": 32, "keep": "head*"}}}, ""),
    ("cls", {"train": {"quantized": {"bits": 3}}}, "bits"),
    ("cls", {"train": {"quantized": {"float8": True, "activations": True}}}, ""),
    ("cls", {"train": {"quantized": {"float8": True, "bits": 4}}}, "`float8` has 8 bits"),
    ("cls", {"train": {"quantized": {"float8": True, "symmetric": False}}}, "`float8` has no offset"),
    ("cls", {"train": {"quantized": {"activations": True, "bits": 4}}}, "`activations` go with 8 bits"),
]


@pytest.mark.parametrize(("task", "changes", "said"), ASKED)
def test_loader_and_schema_agree(task, changes, said):
    made = {
        "llmkit": 1,
        "finetune": {"task": task, "model": {"name": "m"}, "data": {"files": "a.csv"}, **changes},
    }
    assert loads(made) == (not said) == VALIDATOR.is_valid(made)
    if said:
        with pytest.raises(RecipeError) as caught:
            load_recipe(made)
        assert said in str(caught.value) + "\n".join(map(str, caught.value.problems))
