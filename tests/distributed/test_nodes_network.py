"""Two nodes with a network of their own each, and a virtual cable between: it is pulled for a while; one node dies."""

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from training import command, losses, same_bits, start, weights

from llmkit.durable import verify_folder

FIRST, SECOND = "10.213.7.1", "10.213.7.2"
CHANGES = {
    "machine__micro_batch": 2,
    "pretrain__train__length": "300 steps",
    "pretrain__checkpoint__every": "5 steps",
}


def why_not():
    """Why such networks cannot be had here; empty where they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    name = f"llmkit-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks():
    """Names of two namespaces, and of the cable's end in each."""
    if reason := why_not():
        pytest.skip(reason)
    names = [f"llmkit{os.getpid()}-{rank}" for rank in (0, 1)]
    ends = [f"lk{os.getpid()}n{rank}" for rank in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            ends[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            names[1],
        )
        for name, end, address in zip(names, ends, (FIRST, SECOND), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        yield names, ends
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_two(folder, names):
    place = ["--nodes", "2", "--rendezvous", f"{FIRST}:29400", "--processes", "2"]
    return [
        start(
            [
                "ip",
                "netns",
                "exec",
                name,
                *command(folder, "tiny", *place, "--node-rank", str(rank), **CHANGES),
            ],
            LLMKIT_NODES_SILENCE="10",
        )
        for rank, name in enumerate(names)
    ]


def run_of(folder):
    return folder / "runs" / "tiny" / "pretrain"


def wait_for_step(folder, agents, step):
    end = time.monotonic() + 900
    log = run_of(folder) / "metrics.jsonl"
    while not log.exists() or max(losses(log.parent), default=0) < step:
        assert all(agent.poll() is None for agent in agents), [agent.communicate() for agent in agents]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def ends(agents):
    said = [agent.communicate(timeout=900)[1] for agent in agents]
    return [agent.returncode for agent in agents], said


def test_a_cable_that_is_pulled_for_a_while_costs_nothing(tmp_path, networks):
    names, cable = networks
    agents = on_two(tmp_path, names)
    wait_for_step(tmp_path, agents, 10)
    ip("-n", names[1], "link", "set", cable[1], "down")
    time.sleep(3)
    ip("-n", names[1], "link", "set", cable[1], "up")
    codes, said = ends(agents)
    assert codes == [0, 0], said
    assert max(losses(run_of(tmp_path))) == 300


def test_a_cable_that_stays_pulled_ends_both_and_names_the_lost_node(tmp_path, networks):
    names, cable = networks
    agents = on_two(tmp_path, names)
    wait_for_step(tmp_path, agents, 10)
    ip("-n", names[1], "link", "set", cable[1], "down")
    codes, said = ends(agents)
    assert codes == [1, 1], said
    assert "node 1 was lost" in said[0]
    assert "node 0 was lost" in said[1]


def test_a_killed_node_is_named_and_nothing_is_lost(tmp_path, networks):
    names, _ = networks
    agents = on_two(tmp_path, names)
    wait_for_step(tmp_path, agents, 10)
    for process in (*psutil.Process(agents[1].pid).children(recursive=True), agents[1]):
        os.kill(process.pid, signal.SIGKILL)
    codes, said = ends(agents)
    assert codes[0] == 1, said
    assert "node 1 was lost" in said[0]
    newest = max((run_of(tmp_path) / "checkpoints").glob("step_*"))
    verify_folder(newest)
    again = on_two(tmp_path, names)
    codes, said = ends(again)
    assert codes == [0, 0], said
    assert same_bits(weights(run_of(tmp_path)), weights(uninterrupted(tmp_path / "whole")))


def uninterrupted(folder):
    folder.mkdir()
    done = subprocess.run(
        command(folder, "tiny", "--processes", "2", **CHANGES), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return run_of(folder)
