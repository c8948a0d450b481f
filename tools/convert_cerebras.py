"""Cerebras Model Zoo's ESM-2 `.mdl` files to an esm2mega checkpoint, and back with --reverse.

    python tools/convert_cerebras.py esm2.mdl my_8M
    python tools/convert_cerebras.py --reverse my_8M my_8M.mdl

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    formats = ["--from", "cerebras", "--to", "esm2mega"]
    if "--reverse" in arguments:
        arguments.remove("--reverse")
        formats = ["--from", "esm2mega", "--to", "cerebras"]
    sys.exit(main(["convert", *formats, *arguments]))
