"""Run by four ranks: a foreign directory read directly, and its conversion read by Megatron-Core, give each
rank the same share of the model at TP2 x PP2. So does what is there of a directory that lacks keys.

Arguments: the foreign directory, the converted checkpoint, the incomplete directory.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.tensor_filter import ALL
from esm2mega.config.schema import ParallelConfig
from esm2mega.convert.into_model import fill_model, load_initial_weights
from esm2mega.convert.start_point import read_start
from esm2mega.model.build import build_model
from esm2mega.parallel.initialize import process_groups


def main() -> None:
    foreign, converted, incomplete = map(Path, sys.argv[1:])
    config = layout.read_config(converted).model
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with process_groups(parallel, seed=1) as ranks:
        shares = []
        for seed, path in enumerate((foreign, converted)):
            # Other initial weights for each: what a loader leaves out would differ.
            model = build_model(config, parallel, ranks.device, seed)
            assert load_initial_weights(read_start(path), config, model).keys() == {
                "contact_head.regression.weight",
                "contact_head.regression.bias",
            }
            shares.append({**dict(model[0].named_parameters()), **dict(model[0].named_buffers())})
        assert shares[0].keys() == shares[1].keys()
        for name, value in shares[0].items():
            assert torch.equal(value, shares[1][name]), name
            print(f"{name} {list(value.shape)}", flush=True)

        (chunk,) = build_model(config, parallel, ranks.device, 7)
        initial = {name: value.clone() for name, value in chunk.named_parameters()}
        weights = read_start(incomplete, partial=True).weights
        for line in fill_model(weights, [chunk], replace(ALL, strict=False)):
            print(line, flush=True)
        for name, value in chunk.named_parameters():
            expected = shares[0][name].clone()
            if ranks.pp_rank == 0 and "layers.1.self_attention.linear_qkv." in name and "norm" not in name:
                # Rows of this rank's three heads: q, k and v of each.
                by_head = expected.reshape(3, 3, -1)
                by_head[:, 1] = initial[name].reshape(3, 3, -1)[:, 1]
                assert not torch.equal(expected, shares[0][name]), name
            assert torch.equal(value, expected), name


if __name__ == "__main__":
    main()
