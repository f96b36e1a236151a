import json
import math

import numpy as np
import pytest

from llmkit.report.report import write_report
from llmkit.report.run_log import RunLog
from llmkit.report.spikes import DEVIATIONS, FEWEST, WINDOW, Spike, SpikeWatch, find_spikes


def curve(length=400, noise=0.05, seed=0, heavy=False):
    """A loss that falls as losses do, from 9 to about 3, with noise."""
    generator = np.random.default_rng(seed)
    draws = generator.standard_t(10, length) if heavy else generator.normal(size=length)
    return 3 + 6 * np.exp(-np.arange(length) / 60) + noise * draws


def records(losses, start=1):
    return [{"step": start + i, "train/loss": float(loss)} for i, loss in enumerate(losses)]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("heavy", [False, True])
def test_no_alarm_on_ordinary_noise(noise, heavy):
    for seed in range(25):
        assert find_spikes(records(curve(noise=noise, seed=seed, heavy=heavy))) == []


def test_a_jump_is_found_with_its_steps_its_peak_and_its_end():
    losses = curve()
    losses[250:254] = [4.5, 6.0, 5.0, 4.0]
    [spike] = find_spikes(records(losses))
    assert (spike.step, spike.last_step, spike.peak, spike.recovered) == (251, 254, 6.0, True)
    assert spike.usual == pytest.approx(np.median(losses[200:250]))
    assert spike.sentence() == "step 251: the loss jumped from about 3.14 to 6, back after step 254"


def test_two_spikes_and_one_that_goes_on_to_the_end():
    losses = curve()
    losses[100] = 12
    losses[398:] = 9.0
    first, second = find_spikes(records(losses))
    assert (first.step, first.last_step, first.recovered) == (101, 101, True)
    assert (second.step, second.last_step, second.recovered) == (399, 400, False)
    assert second.sentence().endswith("to 9, not back since")


def test_the_threshold_is_where_it_is_said_to_be():
    usual = [2.0, 2.1] * (WINDOW // 2)  # median 2.05, each 0.05 away from it
    limit = 2.05 + DEVIATIONS * 1.4826 * 0.05
    assert find_spikes(records([*usual, limit - 1e-6])) == []
    assert [spike.step for spike in find_spikes(records([*usual, limit + 1e-6]))] == [WINDOW + 1]
    flat = [2.0] * WINDOW
    assert find_spikes(records([*flat, 2.099])) == []
    assert len(find_spikes(records([*flat, 2.101]))) == 1


def test_the_first_records_raise_no_alarm():
    assert find_spikes(records([3.0] * (FEWEST - 1) + [30.0])) == []
    assert len(find_spikes(records([3.0] * FEWEST + [30.0]))) == 1


def test_a_loss_that_stays_high_is_one_spike_and_then_the_usual_level():
    losses = [*([3.0] * 60), *([5.0] * 60), 9.0, 5.0]
    first, second = find_spikes(records(losses))
    assert (first.step, first.last_step, first.recovered) == (61, 60 + FEWEST, False)
    assert (second.step, second.usual, second.recovered) == (121, 5.0, True)


def test_a_spike_does_not_become_usual_by_its_own_losses():
    losses = [*([3.0] * 60), *([9.0] * (FEWEST - 1)), 3.0, 9.0]
    assert [spike.usual for spike in find_spikes(records(losses))] == [3.0, 3.0]


def test_other_records_and_losses_that_are_no_numbers_say_nothing():
    plain = records(curve(100))
    mixed = []
    for record in plain:
        mixed += [record, {"step": record["step"], "eval/loss": 99.0}]
    mixed += [{"step": 101, "train/loss": value} for value in (None, math.nan, math.inf)]
    assert find_spikes(mixed) == find_spikes(plain) == find_spikes([]) == []


def test_the_watch_warns_once_when_a_spike_begins_whether_resumed_or_not():
    losses = curve()
    losses[250:253] = 7.0
    whole = records(losses)
    said, said_resumed = [], []
    watch = SpikeWatch(said.append)
    resumed = SpikeWatch(said_resumed.append, before=whole[:240])
    for record in whole:
        watch.on_record(record, num_steps=400)
    for record in whole[240:]:
        resumed.on_record(record, num_steps=400)
    assert said == said_resumed
    [line] = said
    assert line.startswith("step 251: the loss jumped to 7, 3.14 is usual;")
    assert [spike.step for spike in find_spikes(whole)] == [251]


def test_the_report_says_where(tmp_path):
    losses = curve()
    losses[250] = 7.0
    with RunLog(tmp_path) as log:
        for record in records(losses):
            log.metrics(record)
    report = write_report(tmp_path, {"name": "x", "kind": "pretrain"})
    [spike] = report["spikes"]
    assert json.loads((tmp_path / "report.json").read_text())["spikes"] == [spike]
    assert Spike(**spike).step == 251
    assert "step 251: the loss jumped from about 3.14 to 7, back after step 251" in page(tmp_path)


def test_the_report_says_that_there_was_none(tmp_path):
    with RunLog(tmp_path) as log:
        for record in records(curve()):
            log.metrics(record)
    assert write_report(tmp_path, {"name": "x", "kind": "pretrain", "status": "done"})["spikes"] == []
    assert "No spikes" in page(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    write_report(tmp_path, {"name": "x", "kind": "tokenize"})
    assert "No spikes" not in page(tmp_path)


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")
