"""`python -m tests.multinode [--out DIR]` runs the trial of two hosts, see `tests.multinode.trial`."""

from tests.namespaces import main

if __name__ == "__main__":
    raise SystemExit(main("tests.multinode", {"hostname": "hostname"}))
