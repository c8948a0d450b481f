"""TAPE's `ProteinBertForMaskedLM` to an esm2mega checkpoint, and back with --reverse.

    python tools/convert_tape.py bert-base my_tape
    python tools/convert_tape.py --reverse runs/mine my_tape_back

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    formats = ["--from", "tape", "--to", "esm2mega"]
    if "--reverse" in arguments:
        arguments.remove("--reverse")
        formats = ["--from", "esm2mega", "--to", "tape"]
    sys.exit(main(["convert", *formats, *arguments]))
