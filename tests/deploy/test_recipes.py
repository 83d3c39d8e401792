"""docs/deploy: every file parses, and every command line in it is one that the real command line takes."""

import configparser
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from jaxllm.config import API_KEY_VARIABLE, ENVIRONMENT, load, load_table
from serve.cli import app
from serve.launch.environment import membership
from serve.launch.settings import launch_settings, place_of

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
ROOT = DEPLOY.parents[1]


def parse(arguments):
    """The parameters of a jaxllm command line; a wrong one raises click's own complaint."""
    command = typer.main.get_command(app)
    context = command.make_context("jaxllm", list(arguments))
    name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return name, sub.make_context(name, rest, parent=context).params


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def containers(document):
    """Every container of a manifest, wherever it is."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "containers":
                yield from value
            else:
                yield from containers(value)
    elif isinstance(document, list):
        for item in document:
            yield from containers(item)


def test_a_wrong_command_line_would_be_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse(["launch", "--no-such-flag"])
    with pytest.raises(Exception, match="valid int"):
        parse(["gateway", "--port", "many"])


def test_the_systemd_unit_starts_the_launcher_and_ends_it_politely():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string((DEPLOY / "jaxllm.service").read_text())
    name, params = parse(shlex.split(unit["Service"]["ExecStart"])[1:])
    assert (name, params["port"]) == ("launch", 8000)
    assert unit["Service"]["KillSignal"] == "SIGTERM"
    assert int(unit["Service"]["TimeoutStopSec"]) > 30, "longer than the drain"
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Service"]["Environment"].partition("=")[0] in ENVIRONMENT


def test_the_container_file_runs_the_launcher_as_a_plain_user():
    text = (DEPLOY / "Containerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    given = dict(steps)
    assert given["USER"] != "root"
    assert json.loads(given["ENTRYPOINT"]) == ["jaxllm"]
    name, params = parse(json.loads(given["CMD"]))
    assert (name, str(params["config"])) == ("launch", "/etc/jaxllm/recipe.toml")
    assert given["ENV"].partition("=")[0] in ENVIRONMENT
    for instruction, rest in steps:
        if instruction == "COPY":
            assert (ROOT / rest.split()[0]).exists()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(extra in extras for extra in re.findall(r"/src\[(\w+)\]", text))


def test_the_slurm_script_is_bash_and_its_step_is_a_launch():
    path = DEPLOY / "jaxllm.sbatch"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    text = path.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("srun"))
    words = shlex.split(line)
    name, params = parse(words[words.index("jaxllm") + 1 :])
    assert name == "launch"
    assert params["timeout"] == 600
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    found = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": str(tasks), "SLURM_JOB_NODELIST": "n[1-2]"}
    place = place_of(launch_settings({}, {}), membership(found))
    assert (place.processes, place.rank) == (2, 1)


def test_the_leader_worker_set_says_all_that_the_launcher_needs(tmp_path):
    recipe, workers, gateway, service = documents("leader-worker-set.yaml")
    template = workers["spec"]["leaderWorkerTemplate"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    for container in containers(template):
        assert parse(container["args"])[0] == "launch"
    (tmp_path / "r.toml").write_text(recipe["data"]["recipe.toml"])
    config = load(tmp_path / "r.toml", environ={})
    settings = launch_settings(load_table(tmp_path / "r.toml", "launch"), {})
    gpus = int(next(containers(template))["resources"]["limits"]["nvidia.com/gpu"])
    assert config.mesh.size == gpus * template["size"]
    environ = {"LWS_LEADER_ADDRESS": "a", "LWS_GROUP_SIZE": str(template["size"]), "LWS_WORKER_INDEX": "1"}
    assert place_of(settings, membership(environ)).processes == template["size"]
    mounts = {mount["mountPath"] for mount in next(containers(template))["volumeMounts"]}
    assert str(Path(settings.token_file).parent) in mounts
    name, params = parse(next(containers(gateway))["args"])
    assert name == "gateway"
    assert len(params["workers"].split(",")) == workers["spec"]["replicas"]
    assert service["spec"]["selector"] == gateway["spec"]["selector"]["matchLabels"]


def test_the_indexed_job_gives_as_flags_what_its_index_does_not_say():
    service, job = documents("indexed-job.yaml")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    name, params = parse(next(containers(job))["args"])
    assert name == "launch"
    assert params["num_processes"] == spec["completions"] == spec["parallelism"]
    host = params["coordinator"].partition(":")[0]
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    flags = {"processes": params["num_processes"], "coordinator": params["coordinator"]}
    assert place_of(launch_settings({}, flags), membership({"JOB_COMPLETION_INDEX": "1"})).rank == 1


@pytest.mark.parametrize("name", ["leader-worker-set.yaml", "indexed-job.yaml"])
def test_every_probe_asks_a_public_route(name):
    from serve.middleware import PUBLIC

    for document in documents(name):
        for container in containers(document):
            for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
                if kind in container:
                    assert container[kind]["httpGet"]["path"] in PUBLIC
            variables = {item["name"] for item in container.get("env", ())}
            assert variables <= {*ENVIRONMENT, API_KEY_VARIABLE}


def test_the_ray_cluster_names_a_launch_that_exists():
    text = (DEPLOY / "ray-cluster.yaml").read_text()
    cluster = yaml.safe_load(text)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    line = next(line for line in text.splitlines() if "jaxllm launch" in line)
    name, params = parse(shlex.split(line.partition("jaxllm ")[2]))
    assert (name, params["mode"], params["ray_address"]) == ("launch", "ray", "auto")


def test_the_page_names_every_file_and_every_file_is_on_the_page():
    page = (DEPLOY / "README.md").read_text()
    named = set(re.findall(r"\]\(([\w.-]+)\)", page))
    assert named == {path.name for path in DEPLOY.iterdir() if path.name != "README.md"}
