"""Every registered task: killed it goes on to the same bits, with dropout and whatever chance makes of its rows."""

import pytest
from sessions import Point, shared_server
from training import losses, same_bits, weights
from tuning import EACH_LOSS, folder_of, words

from llmkit.report.run_log import read_metrics


def measured(folder):
    """Every evaluation, without the seconds it took."""
    return {
        record["step"]: {name: value for name, value in record.items() if name.startswith("eval/")}
        for record in read_metrics(folder)
        if "eval/loss" in record
    }


@pytest.mark.parametrize("task", EACH_LOSS)
def test_killed_and_resumed_it_ends_with_the_same_bits(in_memory, task):
    server = shared_server()
    ended = server.run(words(in_memory, task, "whole"))
    assert ended.code == 0, ended.said
    killed = words(in_memory, task, "killed")
    for point in (Point("SIGKILL", "update", step=3), Point("SIGKILL", "batch", step=3)):
        ended = server.run(killed, point)
        assert ended.code == -9, ended.said
    ended = server.run(killed)
    assert ended.code == 0, ended.said
    assert "from step_00000002" in ended.said
    whole, resumed = folder_of(in_memory, "whole"), folder_of(in_memory, "killed")
    assert same_bits(weights(resumed), weights(whole))
    assert losses(resumed) == losses(whole)
    assert measured(resumed) == measured(whole)
