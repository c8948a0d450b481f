"""Rates of the data side: `prepare` beside Hugging Face's tokenizer, `packing` and loading, `uniref` joins.

python benchmarks/data.py prepare my_proteins.fasta
python benchmarks/data.py packing my_proteins.fasta
python benchmarks/data.py uniref
"""

from __future__ import annotations

import sys

import data_packing
import data_prepare
import data_uniref

PARTS = {"prepare": data_prepare.main, "packing": data_packing.main, "uniref": data_uniref.main}


def main() -> None:
    """Hand the rest of the command line to the part that it names."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        raise SystemExit(f"{__doc__}\nthe first argument must be one of {', '.join(PARTS)}")
    PARTS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
