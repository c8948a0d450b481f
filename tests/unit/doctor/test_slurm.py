"""The variables of a job step become those of torchrun."""

import pytest

from esm2mega.doctor.slurm import variables_of_torchrun

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
}


def test_a_process_of_a_step_is_a_rank():
    assert variables_of_torchrun(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node01",
        "MASTER_PORT": str(20000 + (1234567 * 31 + 2) % 10000),
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu7,gpu9", "gpu7"), ("gpu[7,9]", "gpu7"), ("a-b[003-010,12],c", "a-b003")],
)
def test_the_first_node_is_where_rank_0_is(nodes, first):
    assert variables_of_torchrun({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**STEP, "RANK": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")},
    ],
    ids=["no Slurm", "torchrun inside", "one process", "a batch script"],
)
def test_other_processes_get_nothing(environment):
    assert variables_of_torchrun(environment) == {}
