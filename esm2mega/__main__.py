"""`python -m esm2mega`, the form that torchrun starts."""

import sys

from esm2mega.cli.app import main

# The guard matters: checkpoint saving starts helper processes that import this module again.
if __name__ == "__main__":
    sys.exit(main())
