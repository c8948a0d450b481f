"""Convert a checkpoint of another system to esm2mega, or back with --reverse; README.md lists the systems.

    python tools/convert.py hf facebook/esm2_t6_8M_UR50D my_8M
    python tools/convert.py hf my_8M my_8M_hf --reverse

What follows is handed to `esm2mega convert`, such as --verify and --dtype.
"""

import argparse
import sys

from esm2mega.cli.app import main
from esm2mega.convert.formats.registry import READABLE

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint to esm2mega, or back with --reverse.",
        epilog="All options of `esm2mega convert` are taken too, such as --verify and --dtype.",
        allow_abbrev=False,
    )
    formats = [name for name in READABLE if name != "esm2mega"]
    parser.add_argument("format", metavar="FORMAT", choices=formats, help=", ".join(formats))
    parser.add_argument("--reverse", action="store_true", help="convert from esm2mega to FORMAT")
    parser.usage = "convert.py FORMAT SRC DST [--reverse] [OPTIONS]"
    known, others = parser.parse_known_args()
    source, target = ("esm2mega", known.format) if known.reverse else (known.format, "esm2mega")
    sys.exit(main(["convert", "--from", source, "--to", target, *others]))
