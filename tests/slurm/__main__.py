"""`python -m tests.slurm [--out DIR]` runs the trial of the examples on Slurm, see `tests.slurm.trial`."""

from tests.namespaces import main
from tests.slurm.cluster import PACKAGES

if __name__ == "__main__":
    raise SystemExit(main("tests.slurm", PACKAGES))
