"""`jaxllm launch` on a Ray cluster of two nodes on this machine: two replicas behind the gateway (make test-ray)."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
RECIPE = """
[model]
max_model_len = 256
[cache]
num_pages = 64
[scheduler]
max_num_seqs = 2
token_budget = 64
[compile]
decode_buckets = [2]
token_buckets = [64]
[mesh]
data = 2
[gateway]
port = 0
[launch]
gpus_per_process = 0
max_restarts = 1
"""


def processes(word):
    """Pids of this test whose command line has this word."""
    ours = f"JAXLLM_CACHE_DIR={os.environ['JAXLLM_CACHE_DIR']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            if word.encode() in words and ours in variables:
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    os.environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    os.environ["JAXLLM_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)  # one replica fits a node: two nodes are needed
    yield found
    found.shutdown()


class Launched:
    def __init__(self, cluster, folder):
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE)
        command = [sys.executable, "-m", "serve.cli", "launch", "-c", str(recipe), "--mode", "ray"]
        command += ["--ray-address", cluster.address]
        self.lines = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True).start()
        line = self.until(lambda: next((line for line in self.lines if line.startswith("Gateway at")), None))
        self.http = httpx.Client(base_url=line.split()[2], timeout=60, trust_env=False)

    def until(self, condition, seconds=400):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "".join(["it did not happen in time\n", *self.lines])
            assert self.process.poll() is None, "".join(["it has ended\n", *self.lines])
            time.sleep(0.2)
        return found

    def usable(self):
        try:
            answer = self.http.get("/ready")
        except httpx.HTTPError:
            return 0
        return answer.json().get("workers", 0)


def test_two_replicas_on_two_nodes_serve_behind_the_gateway_and_come_back(cluster, tmp_path):
    import ray

    launched = Launched(cluster, tmp_path)
    try:
        launched.until(lambda: launched.usable() == 2)
        ray.init(address=cluster.address, log_to_driver=False)
        groups = ray.util.placement_group_table().values()
        nodes = {node for group in groups for node in group["bundles_to_node_id"].values()}
        assert len(nodes) == 2, "a replica a node"
        ray.shutdown()
        texts = set()
        for i in range(6):
            body = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0, "cache_salt": str(i)}
            answer = launched.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            texts.add(answer.json()["choices"][0]["text"])
        assert len(texts) == 1
        metrics = launched.http.get("/metrics").text
        assert 'jaxllm_gateway_requests_total{outcome="answered"} 6.0' in metrics

        server = min(processes("serve.engine_process"))
        parent = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        launched.until(lambda: launched.usable() == 1)
        assert launched.http.post("/v1/completions", json=body).status_code == 200, "the other replica answers"
        launched.until(lambda: launched.usable() == 2)
        assert any("is started anew" in line for line in launched.lines)

        launched.process.send_signal(signal.SIGTERM)
        assert launched.process.wait(120) == 0
        assert not processes("serve.engine_process"), "nothing is left on the nodes"
    finally:
        launched.http.close()
        launched.process.kill()
        launched.process.wait()
        launched.process.stdout.close()
