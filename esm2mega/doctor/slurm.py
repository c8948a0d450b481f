"""Gives the processes that `srun` starts the variables that torchrun would give them."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


def variables_of_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process in the world of its job step; none for a step of one process.

    Args:
        environment: The variables of the process. Those that only a job step has decide: in a batch script,
            outside of `srun`, there is one process.
    """
    given = [environment.get(name) for name in _NAMES]
    if "RANK" in environment or None in given or given[1] == "1":
        return {}
    rank, size, local_rank, nodes, job = map(str, given)
    # node[01-03,07],gpu5 begins with node01.
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if found is None:
        return {}
    # The same number on all nodes, and another one for another job or step on them.
    port = 20000 + (int(job) * 31 + int(environment.get("SLURM_STEP_ID", "0"))) % 10000
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": found[1] + (found[2] or ""),
        "MASTER_PORT": str(port),
    }
