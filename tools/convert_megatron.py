"""Checkpoints of ProteinLM's Megatron-LM (`iter_0000010/mp_rank_00/model_optim_rng.pt`, any TP and PP size,
checkpoint versions 0 to 3) to an esm2mega checkpoint, or to ProteinLM's TAPE model with --to proteinlm.

    python tools/convert_megatron.py checkpoints/proteinlm my_proteinlm

Takes the options of `esm2mega convert`, such as --verify and --dtype, which it calls.
"""

import sys

from esm2mega.cli.app import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    target = [] if "--to" in arguments else ["--to", "esm2mega"]
    sys.exit(main(["convert", "--from", "megatron", *target, *arguments]))
