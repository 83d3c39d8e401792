"""Whether replicas are processes of their own. Apart from what starts them, so that one replica needs no sockets.

In: an EngineConfig. Out: yes or no. Knows nothing of links.
"""

from __future__ import annotations

from jaxllm.config import EngineConfig
from jaxllm.gpus import runs_on_gpus


def in_processes(config: EngineConfig) -> bool:
    if config.mesh.data == 1 or config.disaggregation.role != "none":
        return False
    wanted = config.mesh.data_processes
    return runs_on_gpus() if wanted == "auto" else bool(wanted)
