"""Hugging Face `EsmForMaskedLM` to an esm2mega checkpoint, and back with --reverse.

    python tools/convert_hf.py facebook/esm2_t6_8M_UR50D my_8M
    python tools/convert_hf.py --reverse my_8M my_8M_hf

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    formats = ["--from", "hf", "--to", "esm2mega"]
    if "--reverse" in arguments:
        arguments.remove("--reverse")
        formats = ["--from", "esm2mega", "--to", "hf"]
    sys.exit(main(["convert", *formats, *arguments]))
