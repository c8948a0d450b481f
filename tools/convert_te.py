"""NVIDIA's Transformer Engine ESM-2 (`nvidia/esm2_*`) to an esm2mega checkpoint, and back with --reverse.

    python tools/convert_te.py nvidia/esm2_t6_8M_UR50D my_8M
    python tools/convert_te.py --reverse my_8M my_8M_te

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    formats = ["--from", "te", "--to", "esm2mega"]
    if "--reverse" in arguments:
        arguments.remove("--reverse")
        formats = ["--from", "esm2mega", "--to", "te"]
    sys.exit(main(["convert", *formats, *arguments]))
