"""BioNeMo 1 archives (`.nemo`) and BioNeMo 2 directories to an esm2mega checkpoint.

    python tools/convert_nemo.py esm2nv_650M.nemo my_650M

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "esm2mega", *sys.argv[1:]]))
