"""Learning rates as functions of the step: by hand, against transformers' own schedules, and golden curves."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from llmkit.optim import lr_at
from llmkit.recipe.schema import Optim

GOLDEN = Path(__file__).parents[1] / "golden" / "lr_curves.tsv"
CURVES = {
    "constant": {},
    "linear": {"min_lr_ratio": 0.0},
    "cosine": {},
    "exponential": {"min_lr_ratio": 0.01},
    "polynomial": {"power": 3.0},
    "inverse_sqrt": {"min_lr_ratio": 0.0},
    "wsd": {"decay": 0.25, "min_lr_ratio": 0.0},
}
"""What the golden curves were made with, at a peak of 1, over 40 steps with 6 of warm-up."""


def rates(num_steps=10, warmup_steps=2, **settings):
    spec = Optim(lr=1.0, **settings)
    return [lr_at(s, spec, num_steps=num_steps, warmup_steps=warmup_steps) for s in range(num_steps)]


def curves():
    return {name: rates(40, 6, schedule=name, **settings) for name, settings in CURVES.items()}


def test_the_golden_curves():
    """When a schedule is meant to change, say why in its commit and write the file anew: `__main__` below."""
    header, *lines = GOLDEN.read_text().splitlines()
    found = curves()
    assert header.split("\t") == ["step", *found]
    for step, line in enumerate(lines):
        number, *values = line.split("\t")
        assert int(number) == step
        expected = [curve[step] for curve in found.values()]
        assert [float(value) for value in values] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert len(lines) == 40


def theirs(scheduler, num_steps, warmup_steps, **settings):
    """transformers' factors; its first update is one where the warm-up is still at 0, ours is one further."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = getattr(transformers, f"get_{scheduler}")(optimizer, num_warmup_steps=warmup_steps, **settings)
    [factor] = made.lr_lambdas
    return [factor(step + 1) for step in range(num_steps)]


@pytest.mark.parametrize("warmup_steps", [1, 6, 39])
@pytest.mark.parametrize(
    ("schedule", "theirs_name", "settings"),
    [
        ("constant", "constant_schedule_with_warmup", None),
        ("linear", "linear_schedule_with_warmup", {}),
        ("cosine", "cosine_schedule_with_warmup", {}),
        ("polynomial", "polynomial_decay_schedule_with_warmup", {"power": 2.0, "lr_end": 0.0}),
        ("inverse_sqrt", "inverse_sqrt_schedule", None),
        (
            "wsd",
            "wsd_schedule",
            {"num_stable_steps": 0, "num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.0},
        ),
    ],
)
def test_equals_transformers_own(schedule, theirs_name, settings, warmup_steps):
    num_steps = 40
    ours = rates(
        num_steps,
        warmup_steps,
        schedule=schedule,
        min_lr_ratio=0.0,
        **({"decay": 0.25} if schedule == "wsd" else {}),
    )
    more = {} if settings is None else {"num_training_steps": num_steps, **settings}
    if schedule == "wsd":
        falling = min(10, num_steps - warmup_steps)
        more = {
            **settings,
            "num_decay_steps": falling,
            "num_stable_steps": num_steps - warmup_steps - falling,
        }
    expected = theirs(theirs_name, num_steps, warmup_steps, **more)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_inverse_sqrt_is_noams_with_the_peak_at_the_end_of_the_warm_up():
    """Vaswani 2017, eq. 3: d^-0.5 * min(step^-0.5, step * warmup^-1.5), with step from 1."""
    noam = [min(step**-0.5, step * 6**-1.5) for step in range(1, 41)]
    assert rates(40, 6, schedule="inverse_sqrt", min_lr_ratio=0.0) == pytest.approx(
        [value / noam[5] for value in noam], rel=1e-12
    )


def test_inverse_sqrt_does_not_fall_below_the_least():
    got = rates(1000, 10, schedule="inverse_sqrt", min_lr_ratio=0.2)
    assert got[248] > 0.2
    assert got[250:] == [0.2] * 750


def test_warmup_reaches_the_peak_with_its_last_update():
    assert rates(schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_linear_by_hand():
    assert rates(schedule="linear", min_lr_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    )


def test_cosine_by_hand():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]
    assert rates(schedule="cosine", min_lr_ratio=0.1)[2:] == pytest.approx(expected)
    assert rates(schedule="cosine", min_lr_ratio=0.1)[-1] == pytest.approx(0.1)


def test_polynomial_by_hand():
    got = rates(num_steps=4, warmup_steps=0, schedule="polynomial", power=3.0, min_lr_ratio=0.2)
    assert got == pytest.approx([0.2 + 0.8 * (1 - k / 4) ** 3 for k in range(1, 5)])


def test_wsd_is_flat_and_then_falls_over_its_last_share():
    got = rates(num_steps=20, warmup_steps=0, schedule="wsd", decay=0.25, min_lr_ratio=0.0)
    assert got[:15] == [1.0] * 15
    assert got[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_exponential_falls_by_one_factor_a_step():
    got = rates(num_steps=8, warmup_steps=0, schedule="exponential", min_lr_ratio=0.01)
    factors = [b / a for a, b in pairwise(got)]
    assert factors == pytest.approx([0.01 ** (1 / 8)] * 7)
    assert got[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", CURVES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_every_schedule_stays_between_zero_and_the_peak(schedule, warmup_steps, num_steps):
    got = rates(num_steps, min(warmup_steps, num_steps), schedule=schedule, min_lr_ratio=0.0)
    assert all(0 <= lr <= 1 for lr in got)
    assert len(got) == num_steps


@pytest.mark.parametrize("schedule", [name for name in CURVES if name not in ("constant", "inverse_sqrt")])
def test_the_last_update_has_the_least_rate_exactly(schedule):
    assert rates(37, 5, schedule=schedule, min_lr_ratio=0.07)[-1] == pytest.approx(0.07, rel=1e-14)


if __name__ == "__main__":
    found = curves()
    rows = (
        "\t".join([str(step), *(repr(curve[step]) for curve in found.values())]) + "\n" for step in range(40)
    )
    GOLDEN.write_text("\t".join(["step", *found]) + "\n" + "".join(rows))
