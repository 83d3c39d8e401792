"""What a launch would start: schedulers' variables, settings, layouts, the lines of --dry-run; nothing is started."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.config import ConfigError
from jaxllm.gpus import gpu_slices
from serve.cli import main
from serve.launch.environment import Membership, first_node, membership
from serve.launch.settings import launch_settings, place_of, read_token

ROOT = Path(__file__).parents[3]
SLURM = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "gpu[03-07,9],x1"}


# ---- schedulers ----


def test_slurm_says_rank_count_and_the_first_node():
    assert membership(SLURM) == Membership("SLURM", 1, 2, "gpu03:22468")


def test_jobs_that_share_a_node_get_other_ports_two_each():
    found = {membership({**SLURM, "SLURM_JOB_ID": str(job)}).coordinator for job in range(100, 110)}
    ports = sorted(int(address.rpartition(":")[2]) for address in found)
    assert len(ports) == 10
    assert all(b - a >= 2 for a, b in itertools.pairwise(ports))


def test_one_slurm_task_is_one_process():
    assert membership({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_a_leader_worker_set_says_everything():
    found = {"LWS_LEADER_ADDRESS": "m-0.m.ns", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3"}
    assert membership(found) == Membership("LeaderWorkerSet", 3, 4, "m-0.m.ns:5790")


def test_an_indexed_job_says_only_its_index():
    found = membership({"JOB_COMPLETION_INDEX": "1"})
    assert found == Membership("Kubernetes Indexed Job", 1, None, None)
    with pytest.raises(ConfigError, match="does not say how many processes there are; give --num-processes"):
        place_of(launch_settings({}, {"coordinator": "a:1"}), found)
    place = place_of(launch_settings({}, {"coordinator": "job-0.job:5790", "processes": 2}), found)
    assert (place.rank, place.processes, place.coordinator) == (1, 2, "job-0.job:5790")


def test_without_a_scheduler_nothing_is_said_and_a_broken_one_is_named():
    assert membership({}) is None
    with pytest.raises(ConfigError, match="LWS_WORKER_INDEX = ''"):
        membership({"LWS_LEADER_ADDRESS": "a", "LWS_GROUP_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("a[1-3]", "a1"), ("a[07,9-12]-ib,b", "a07-ib"), ("n[001-100],m[1-2]", "n001")],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


# ---- settings ----


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"mode": "cluster"}, "one of auto, local"),
        ({"coordinatr": "a:1"}, "unknown setting 'coordinatr'"),
        ({"coordinator": "host"}, "must be host:port"),
        ({"coordinator": "host:65535"}, "65534"),
        ({"processes": -1}, "at least 0"),
        ({"processes": "2"}, "must be like 0"),
        ({"timeout_s": 0}, "more than 0"),
    ],
)
def test_wrong_launch_settings_are_named(table, said):
    with pytest.raises(ConfigError, match=said):
        launch_settings(table, {})


def test_settings_beat_the_scheduler():
    place = place_of(launch_settings({}, {"process_id": 0, "coordinator": "b:9"}), membership(SLURM))
    assert (place.rank, place.processes, place.coordinator) == (0, 2, "b:9")


def test_many_processes_need_a_coordinator_and_a_rank_among_them():
    with pytest.raises(ConfigError, match="give --coordinator"):
        place_of(launch_settings({"processes": 2}, {}), None)
    with pytest.raises(ConfigError, match=r"--process-id 2: must be in \[0, 1\]"):
        place_of(launch_settings({"processes": 2, "coordinator": "a:1", "process_id": 2}, {}), None)


def test_a_token_has_a_length(tmp_path):
    (tmp_path / "t").write_text("short")
    with pytest.raises(ConfigError, match="at least 16"):
        read_token(launch_settings({"token_file": str(tmp_path / "t")}, {}))
    (tmp_path / "t").write_text("0123456789abcdef\n")
    assert read_token(launch_settings({"token_file": str(tmp_path / "t")}, {})) == "0123456789abcdef"


def test_gpus_are_dealt_out_in_order_and_too_few_are_counted():
    assert gpu_slices(2, 2, None) == [("0", "1"), ("2", "3")]
    assert gpu_slices(2, 1, ["5", "7"]) == [("5",), ("7",)]
    with pytest.raises(ConfigError, match="2 processes x 2 GPUs = 4, and CUDA_VISIBLE_DEVICES names 3"):
        gpu_slices(2, 2, ["0", "1", "2"])


# ---- the command ----


def dry_run(capsys, *arguments):
    try:
        main(["launch", "--dry-run", *arguments])
    except SystemExit as end:
        return end.code, capsys.readouterr()
    raise AssertionError("the command did not end")


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "LWS_LEADER_ADDRESS", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_server(capsys):
    code, said = dry_run(capsys)
    assert code == 0
    assert "mesh: one device" in said.out
    assert "launch: one process" in said.out
    assert "server (here): jaxllm serve" in said.out
    assert "weights 0.04 GiB" in said.out


def test_replicas_stand_behind_a_gateway(capsys):
    code, said = dry_run(capsys, "-dp", "2", "-tp", "2", "--port", "9000")
    assert code == 0
    assert "data 2 x pipe 1 x seq 1 x expert 1 x tensor 2 = 4 devices" in said.out
    one, two, gateway = said.out.splitlines()[-3:]
    assert one.endswith("jaxllm serve --tensor-parallel-size 2 --data-parallel-size 1 --host 127.0.0.1 --port 8100"), (
        one
    )
    assert two.endswith("--port 8101")
    assert gateway.endswith("jaxllm gateway --workers http://127.0.0.1:8100,http://127.0.0.1:8101 --port 9000")


def test_one_server_drives_all_replicas_where_that_is_asked_for(capsys):
    code, said = dry_run(capsys, "-dp", "2", "-pp", "2", "--one-server", "--port", "9000")
    assert code == 0
    assert "launch: one process, 1 processes" in said.out
    command = "jaxllm serve --data-parallel-size 2 --pipeline-parallel-size 2"
    assert said.out.splitlines()[-1].endswith(f"server (here): {command}")


def test_slurm_makes_a_group(capsys, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    code, said = dry_run(capsys, "-tp", "2")
    assert code == 0
    assert "processes, 2 processes (place: SLURM)" in said.out
    assert "rank 0 (leads, serves HTTP) (another host)" in said.out
    assert "--coordinator gpu03:22468 --num-processes 2 --process-id 1" in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-tp", "4"], "num_heads = 6 cannot be split over 4 devices: 6 = 4 x 1 + 2"),
        (["-tp", "2", "--num-processes", "3"], "2 devices do not divide over 3 processes"),
        (["-dp", "2", "--num-processes", "2"], "launch each replica by itself"),
        (["-pp", "13"], "the model has only 12 layers"),
        (["--mode", "multihost"], "give --num-processes and --coordinator"),
        (["--mode", "cloud"], "must be one of auto"),
        (["-c", "/no/such.toml"], "No such file"),
        (["/no/such/model"], "no such directory"),
        (["--num-processes", "2", "--process-id", "1", "-tp", "2"], "give --coordinator HOST:PORT"),
    ],
)
def test_what_cannot_be_launched_is_one_line_and_exit_code_2(capsys, arguments, said):
    code, told = dry_run(capsys, *arguments)
    assert code in (1, 2)
    assert said in told.err
    assert len(told.err.strip().splitlines()) == 1


def test_a_dry_run_imports_no_jax():
    script = (
        "import sys\n"
        "sys.modules['jax'] = None\n"
        "from serve.cli import main\n"
        "main(['launch', '--dry-run', '-tp', '2', '--num-processes', '2'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stdout


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "serve").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_laid_out(capsys, recipe):
    code, said = dry_run(capsys, "-c", str(recipe))
    assert code == 0, said.err
    assert said.out.startswith("mesh")


# ---- roles ----


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_both_roles_in_one_process_show_their_meshes_and_bytes(capsys, tmp_path):
    recipe = write(tmp_path, "[disaggregation]\nrole = 'both'\nprefill_tensor = 2\nprefill_token_budget = 16384")
    code, said = dry_run(capsys, "-c", recipe)
    assert code == 0, said.err
    assert "mesh of role decode: one device (data 1 x pipe 1 x seq 1 x expert 1 x tensor 1 = 1 devices)" in said.out
    assert "mesh of role prefill: tp2 (data 1 x pipe 1 x seq 1 x expert 1 x tensor 2 = 2 devices)" in said.out
    assert said.out.count("bytes per device of role ") == 2
    assert "server (both roles) (here): jaxllm serve" in said.out


def test_a_decode_server_brings_its_workers_that_are_here_and_names_the_others(capsys, tmp_path, monkeypatch):
    text = "[disaggregation]\nrole = 'decode'\nworkers = ['127.0.0.1:5801', 'node2:5800']\nprefill_tensor = 2"
    code, said = dry_run(capsys, "-c", write(tmp_path, text))
    assert code == 0, said.err
    assert "launch: roles, 3 processes" in said.out
    assert "prefill worker 0 (here): jaxllm serve" in said.out
    assert "--disaggregation-mode prefill --prefill-listen 127.0.0.1:5801" in said.out
    assert "prefill worker 1 (another host): jaxllm serve" in said.out
    monkeypatch.setattr("serve.commands.launch.gpus_here", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    code, said = dry_run(capsys, "-c", write(tmp_path, text))
    assert "prefill worker 0 (here): CUDA_VISIBLE_DEVICES=4,5 " in said.out
    assert "server (decode) (here): CUDA_VISIBLE_DEVICES=6 " in said.out


@pytest.mark.parametrize(
    ("table", "flags", "said"),
    [
        ("role = 'decode'", [], "name its prefill workers in disaggregation.workers"),
        ("role = 'both'", ["-dp", "2"], "mesh.data = 2 with disaggregation.role = 'both'"),
        ("role = 'both'", ["-pp", "2"], "leave mesh.pipe at 1"),
        ("role = 'both'\nprefill_tensor = 4", [], "num_heads = 6 cannot be split over 4 devices"),
        ("role = 'both'", ["--mode", "ray"], "start each role by itself"),
        ("role = 'teacher'", [], "disaggregation.role = 'teacher': must be one of none, both, prefill, decode"),
        ("workers = ['node2']", [], "disaggregation.workers = 'node2': must be host:port"),
        ("listen = 'a:99999'", [], "disaggregation.listen = 'a:99999': must be host:port"),
        ("wait_s = 0", [], "disaggregation.wait_s = 0: must be a number of seconds"),
    ],
)
def test_roles_that_cannot_be_launched_are_one_line(capsys, tmp_path, table, flags, said):
    code, told = dry_run(capsys, "-c", write(tmp_path, f"[disaggregation]\n{table}"), *flags)
    assert code in (1, 2)
    assert said in told.err
    assert len(told.err.strip().splitlines()) == 1
