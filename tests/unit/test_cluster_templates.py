"""The templates for Kubernetes and SkyPilot: their fields fit together, and llmkit understands their commands.

No cluster runs them here.
"""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.cli.app import app
from llmkit.errors import ExitCode
from llmkit.launch.node import find_node, parse_nodes
from llmkit.recipe import packaged_names

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "cluster"


def documents(name: str) -> dict[str, dict[str, Any]]:
    found = list(yaml.safe_load_all((FOLDER / name).read_text()))
    return {one.get("kind", "task"): one for one in found}


def understood(words: list[str]) -> dict[str, Any]:
    """The options of `llmkit WORDS` as our command line reads them."""
    import typer.main

    assert words[0] == "llmkit"
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    with command.make_context(words[1], list(words[2:])) as context:
        return dict(context.params)


def job_of(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The spec of the Job, the objects beside it, and the address of pod 0 by the rules of Kubernetes or JobSet."""
    found = documents(name)
    if "JobSet" in found:
        whole = found["JobSet"]
        (replicated,) = whole["spec"]["replicatedJobs"]
        assert whole["spec"]["network"]["enableDNSHostnames"]
        title = whole["metadata"]["name"]
        return replicated["template"]["spec"], found, f"{title}-{replicated['name']}-0-0.{title}"
    job, service = found["Job"], found["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    return job["spec"], found, f"{job['metadata']['name']}-0.{service['metadata']['name']}"


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "kubernetes-jobset.yaml"])
def test_pods_of_kubernetes_are_nodes_that_find_pod_0(name):
    spec, found, address = job_of(name)
    versions = {"Job": "batch/v1", "Service": "v1", "JobSet": "jobset.x-k8s.io/v1alpha2"}
    assert {kind: one["apiVersion"] for kind, one in found.items()} == {
        kind: versions[kind] for kind in found
    }
    assert (spec["completionMode"], spec["template"]["spec"]["restartPolicy"]) == ("Indexed", "Never")
    assert spec["completions"] == spec["parallelism"]
    (container,) = spec["template"]["spec"]["containers"]
    given = understood(container["command"])
    env = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in env.values())
    nodes = parse_nodes(given["nodes"])
    for index in range(spec["completions"]):
        node = find_node(nodes, rank=None, meeting=None, env={**env, "JOB_COMPLETION_INDEX": str(index)})
        assert node is not None
        assert (node.rank, node.most, str(node.meeting)) == (index, spec["completions"], f"{address}:29400")
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert {one["name"] for one in spec["template"]["spec"]["volumes"]} == set(mounts.values())
    assert str(given["runs"]).startswith("/data/")
    assert "/data" in mounts


def test_a_job_of_kubernetes_knows_our_exit_codes():
    rules = job_of("kubernetes-job.yaml")[0]["podFailurePolicy"]["rules"]
    by_code = {code: one["action"] for one in rules for code in one.get("onExitCodes", {}).get("values", ())}
    assert by_code == {
        ExitCode.USAGE: "FailJob",
        ExitCode.MISSING: "FailJob",
        ExitCode.GATE: "FailJob",
        ExitCode.INTERRUPTED: "Ignore",
    }


def test_machines_of_skypilot_are_nodes_that_find_the_first():
    task = documents("skypilot.yaml")["task"]
    env = {"SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6"}
    for rank in range(task["num_nodes"]):
        played = "llmkit() { printf '%q ' llmkit \"$@\"; }\n" + task["run"]
        said = subprocess.run(
            ["bash", "-euc", played],
            env={**env, "SKYPILOT_NODE_RANK": str(rank), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        given = understood(shlex.split(said.stdout))
        node = find_node(
            parse_nodes(given["nodes"]), rank=given["node_rank"], meeting=given["rendezvous"], env={}
        )
        assert node is not None
        assert (node.rank, node.most, str(node.meeting)) == (rank, 2, "10.0.0.5:29400")
    assert all(str(given["runs"]).startswith(f"{place}/") for place in task["volumes"])


def test_templates_are_no_recipes():
    assert not {path.stem for path in FOLDER.iterdir()} & set(packaged_names())
