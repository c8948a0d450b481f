"""`python -m esm2mega` runs the command line; torchrun starts it in this form."""

import sys

from esm2mega.cli.app import main

# The guard matters: workers that prepare or load data import this module again.
if __name__ == "__main__":
    sys.exit(main())
