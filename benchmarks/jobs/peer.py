"""vLLM as a run on the GPU machine takes it along: cut to sm_90, with the Python packages that the machine lacks.

In: a folder with fatprune.py, setup.sh and the peers' scripts (shared/peers, whose README says what is measured how);
Python 3.12 with pip, and xz. Out: `.peer/` (47 MiB, ignored by git); some 2 minutes, 290 MiB down. Nothing of it is
ever committed.

    python -m benchmarks.jobs.peer ../shared/peers
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.26.0"  # the last for the machine's torch
OUT = Path(".peer")
UNUSED = (  # by a dense or MoE model in bf16 on an H200
    "vllm/vllm-rs",
    "vllm/_rust_tool_parser*",
    "vllm/_qutlass_C*",
    "vllm/third_party/fmha_sm100",
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
    "vllm/third_party/deep_gemm/_C.cpython-31[0134]*",
)
CONFIGS = "vllm/model_executor/layers/fused_moe/configs/*.json"
PRUNED = {"_C_stable_libtorch": (), "_flashmla_C": (), "_moe_C_stable_libtorch": ("nojit",)}  # and fatprune's options
WHEELS = {
    "annotated-types": "0.8.0",
    "apache-tvm-ffi": "0.1.15.post2",
    "cachetools": "8.0.0",
    "cbor2": "6.2.1",
    "distro": "1.9.0",
    "fastapi": "0.136.1",
    "ijson": "3.6.0",
    "jiter": "0.19.0",
    "jmespath": "1.1.0",
    "llguidance": "1.7.6",
    "model-hosting-container-standards": "0.1.16",
    "msgspec": "0.22.0",
    "openai": "2.30.0",
    "openai-harmony": "0.0.8",
    "opentelemetry-api": "1.45.2",
    "partial-json-parser": "0.2.1.1.post7",
    "prometheus-fastapi-instrumentator": "8.1.0",
    "pybase64": "1.5.1",
    "pydantic": "2.14.3",
    "pydantic_core": "2.50.4",
    "python-json-logger": "4.2.0",
    "pyzmq": "27.3.0",
    "setproctitle": "1.3.8",
    "sniffio": "1.3.1",
    "starlette": "1.10.0",
    "typing-inspection": "0.4.5",
    "uvicorn": "0.54.0",
    "watchfiles": "1.3.0",
    "xgrammar": "0.2.8",
}
TARGET = ("--python-version", "3.12", "--implementation", "cp", "--abi", "abi3", "--platform", "manylinux_2_28_x86_64")


def main() -> None:
    """All of it, anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", type=Path, help="shared/peers")
    peers: Path = parser.parse_args().peers.resolve()
    OUT.mkdir(exist_ok=True)
    for each in (*peers.glob("*.py"), peers / "setup.sh"):
        shutil.copyfile(each, OUT / each.name)
    with tempfile.TemporaryDirectory() as folder:
        pack(cut(Path(folder), peers / "fatprune.py"))
    download(OUT / "whl", *(f"{name}=={version}" for name, version in WHEELS.items()))
    total = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}: {total / 2**20:.1f} MiB")


def download(to: Path, *wanted: str) -> None:
    line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(to)]
    subprocess.run([*line, *wanted], check=True)


def cut(folder: Path, prune: Path) -> Path:
    """The unpacked wheel without what is not used."""
    download(folder / "dl", *TARGET, f"vllm=={VERSION}")
    (wheel,) = (folder / "dl").glob("vllm-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    wheel.unlink()
    unused = [path for pattern in UNUSED for path in site.glob(pattern)]
    unused += [path for path in site.glob(CONFIGS) if "H200" not in path.name]
    for path in unused:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, options in PRUNED.items():
        (library,) = site.rglob(f"{name}*.so")
        kept = library.with_suffix(".kept")
        subprocess.run([sys.executable, str(prune), str(library), str(kept), *options], check=True)
        kept.replace(library)
    return site


def pack(site: Path) -> None:
    """What setup.sh unpacks."""
    names = [path.name for path in sorted(site.iterdir()) if path.name.startswith("vllm")]
    with (OUT / f"vllm-{VERSION}-sm90.tar.xz").open("wb") as to:
        tar = subprocess.Popen(["tar", "-C", str(site), "-cf", "-", *names], stdout=subprocess.PIPE)
        subprocess.run(["xz", "-9e", "-T2"], stdin=tar.stdout, stdout=to, check=True)
        if tar.wait():
            raise SystemExit("tar failed")


if __name__ == "__main__":
    main()
