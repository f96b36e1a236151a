"""The blocks that say how much of a model learns: their defaults, and what does not go together."""

import pytest
from pydantic import ValidationError

from llmkit.recipe.parts import Adapter, Freeze, Unfreeze, check_parts


def test_what_is_left_out_follows_from_the_rest():
    assert Adapter(rank=8).alpha_or_default == 16
    assert Adapter(rank=8).scale == 2
    assert Adapter(rank=16, alpha=8.0, method="rslora").scale == 2
    assert (Adapter().base_bits, Adapter(method="qlora").base_bits) == (None, 4)
    assert Adapter(method="qlora", bits=8).base_bits == 8
    assert str(Unfreeze().every) == "10%"


@pytest.mark.parametrize(
    ("block", "values", "words"),
    [
        (Adapter, {"bits": 4}, "`bits` belongs to `method: qlora`"),
        (Adapter, {"targets": " "}, "pattern"),
        (Adapter, {"name": "../x"}, "pattern"),
        (Freeze, {}, "`freeze` says nothing"),
        (Freeze, {"layers": 2, "all_but": "head"}, "`all_but` freezes the rest already, so `layers`"),
        (Freeze, {"layers": -1}, "greater than or equal to 0"),
        (Unfreeze, {"every": 100}, "say what it counts: `100 steps`"),
        (Unfreeze, {"every": "1h"}, "is not an interval in steps"),
        (Unfreeze, {"every": "never"}, "is not an interval in steps"),
    ],
)
def test_values_that_make_no_sense(block, values, words):
    with pytest.raises(ValidationError) as raised:
        block.model_validate(values)
    assert words in str(raised.value)


def test_an_adapter_leaves_nothing_to_freeze_or_thaw():
    assert list(check_parts(None, Freeze(layers=1), Unfreeze())) == []
    assert list(check_parts(Adapter(), None, None)) == []
    keys = [key for key, *_ in check_parts(Adapter(), Freeze(layers=1), Unfreeze())]
    assert keys == ["freeze", "unfreeze"]
