"""fair-esm's ESM-2 `.pt` files to an esm2mega checkpoint, and back with --reverse.

    python tools/convert_fair_esm.py esm2_t6_8M_UR50D.pt my_8M
    python tools/convert_fair_esm.py --reverse my_8M esm2_my_8M.pt

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    formats = ["--from", "fair-esm", "--to", "esm2mega"]
    if "--reverse" in arguments:
        arguments.remove("--reverse")
        formats = ["--from", "esm2mega", "--to", "fair-esm"]
    sys.exit(main(["convert", *formats, *arguments]))
