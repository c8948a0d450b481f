"""ProteinLM's modified TAPE model (`pytorch_model.bin` of its converter) to an esm2mega checkpoint, and back
with --reverse.

    python tools/convert_proteinlm.py proteinlm-200m my_proteinlm
    python tools/convert_proteinlm.py --reverse runs/mine my_proteinlm_back

What ProteinLM's Megatron-LM wrote itself is for convert_megatron.py. Takes the options of `esm2mega convert`,
such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    formats = ["--from", "proteinlm", "--to", "esm2mega"]
    if "--reverse" in arguments:
        arguments.remove("--reverse")
        formats = ["--from", "esm2mega", "--to", "proteinlm"]
    sys.exit(main(["convert", *formats, *arguments]))
