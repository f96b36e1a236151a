"""Two nodes, an agent and a process each: the same numbers as two processes of one machine, and saved when asked to."""

import signal
import socket
import subprocess
import time

import pytest
import tuning
from layouts import farthest, plan_of
from training import command, losses, same_bits, start, weights

from llmkit.durable import verify_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_two(folder, name, *words, nodes="2", command=command, **changes):
    """Both agents' processes."""
    place = ["--nodes", nodes, "--rendezvous", f"127.0.0.1:{free_port()}", "--processes", "2", *words]
    return [start(command(folder, name, *place, "--node-rank", str(rank), **changes)) for rank in (0, 1)]


def ends(agents, limit_s=900):
    said = [agent.communicate(timeout=limit_s)[1] for agent in agents]
    return [agent.returncode for agent in agents], "\n".join(said)


def on_one(words):
    """Two processes of one machine, uninterrupted."""
    done = subprocess.run([*words, "--processes", "2"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def run_of(folder, name):
    return folder / "runs" / name / "pretrain"


def wait_for_step(run, agents, step):
    end = time.monotonic() + 900
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
        assert all(agent.poll() is None for agent in agents), [agent.communicate() for agent in agents]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


SMALL = {"machine__micro_batch": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    on_one(command(folder, "tiny", **SMALL))
    return run_of(folder, "tiny")


def test_two_nodes_are_two_processes(tmp_path, whole):
    codes, said = ends(on_two(tmp_path, "tiny", **SMALL))
    assert codes == [0, 0], said
    run = run_of(tmp_path, "tiny")
    assert losses(run) == losses(whole)
    assert same_bits(weights(run), weights(whole))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_node_saves_and_the_same_commands_go_on_to_the_same_bits(tmp_path, whole, rank):
    agents = on_two(tmp_path, "tiny", **SMALL)
    run = run_of(tmp_path, "tiny")
    wait_for_step(run, agents, 3)
    agents[rank].send_signal(signal.SIGTERM)
    codes, said = ends(agents)
    assert codes == [75, 75], said
    newest = max((run / "checkpoints").glob("step_*"))
    verify_folder(newest)
    codes, said = ends(on_two(tmp_path, "tiny", **SMALL))
    assert codes == [0, 0], said
    assert same_bits(weights(run), weights(whole))


def test_two_nodes_finetune_as_two_processes(tmp_path):
    on_one(tuning.command(tmp_path, "sft", "whole"))

    def tuned(folder, name, *words):
        return tuning.command(folder, "sft", name, *words)

    codes, said = ends(on_two(tmp_path, "nodes", command=tuned))
    assert codes == [0, 0], said
    run, whole = (tuning.folder_of(tmp_path, name) for name in ("nodes", "whole"))
    assert plan_of(run)["world_size"] == 2
    assert losses(run) == losses(whole)
    assert losses(run, "eval/loss") == losses(whole, "eval/loss")
    assert same_bits(weights(run), weights(whole))


LONG = {**SMALL, "pretrain__train__length": "200 steps", "pretrain__checkpoint__keep": 100}


def test_what_is_left_after_a_lost_node_learns_on_by_itself(tmp_path):
    """With `--nodes 1:2`: one process, by a new plan for the same batch, from the newest checkpoint."""
    on_one(command(tmp_path, "whole", **LONG))
    agents = on_two(tmp_path, "cut", "--restarts", "1", nodes="1:2", **LONG)
    run = run_of(tmp_path, "cut")
    wait_for_step(run, agents, 7)
    assert plan_of(run)["world_size"] == 2
    agents[1].kill()  # its worker dies with it
    codes, said = ends(agents)
    assert codes == [0, -signal.SIGKILL], said
    assert "node 1 was lost" in said
    assert "starting 1 process on 1 of 2 nodes" in said
    plan, before = plan_of(run), plan_of(run_of(tmp_path, "whole"))
    assert plan["world_size"] == 1
    assert plan["gradient_accumulation_steps"] == 2 * before["gradient_accumulation_steps"]
    assert plan["rows_per_step"] == before["rows_per_step"]
    found, expected = losses(run), losses(run_of(tmp_path, "whole"))
    print(f"from one process to the other way: {farthest(found, expected):.1e}")  # noqa: T201 - for -rP
    assert farthest(found, expected) < 1e-2


def test_a_node_with_another_recipe_ends_both(tmp_path):
    place = ["--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", "--processes", "2"]
    agents = [
        start(command(tmp_path, f"tiny{rank}", *place, "--node-rank", str(rank), seed=rank + 1))
        for rank in (0, 1)
    ]
    codes, said = ends(agents)
    assert codes == [1, 1], said
    assert "another recipe" in said
    assert "seed 2 there, 1 on node 0" in said
