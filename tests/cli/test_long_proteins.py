"""The benchmark of long proteins measures the run with the long one and the run without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.infer_models import random_proteins, write_fasta

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_memory_is_what_was_said_before(tmp_path):
    """5,000 residues, from where on contacts are computed in tiles; the estimate is no less than the peak."""
    lengths = np.random.default_rng(1).integers(20, 200, size=60).tolist()
    fasta = write_fasta(
        tmp_path / "x.fasta", [(f"p{n}", text) for n, text in enumerate(random_proteins(lengths))]
    )
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", ROOT / "benchmarks" / "long_proteins.py", fasta),
            *("--length", "5000", "--json", out),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["without"]["said_gb"] is None
    said, peak = result["with"]["said_gb"], result["with"]["peak_gb"]
    # One digit is said.
    assert peak - 0.05 <= said <= 1.5 * peak
    # The map of 5,000 residues in fp32 is 0.1 GB, and the file holds it.
    assert result["with"]["output_gb"] - result["without"]["output_gb"] > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "x.fasta"]
