"""Writes models as programs, which hold weights and operations in one file, and runs these files."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from esm2mega.errors import UserError
from esm2mega.files import first_of

_MOST_IN_ONE_FILE = 1_800_000_000
"""Bytes of weights that an ONNX file holds itself: protobuf ends at 2 GiB, and larger ones lie beside it."""

Run = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Runs a program: token ids and mask, int64 ``[b, s]``, give outputs by name."""


@dataclass(frozen=True)
class ProgramFormat:
    """Describes a kind of program.

    Attributes:
        suffix: Ending of its files.
        packages: Packages that write and run it besides PyTorch.
        write: Writes a program, whose outputs have these names, to a path.
        load: Loads a file to be run.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Sequence[str], Path], object]
    load: Callable[[Path], Run]

    def check(self, out: Path) -> None:
        """Raise `UserError` unless the name has the suffix of the format and its packages are installed."""
        if out.suffix != self.suffix:
            raise UserError(
                f"--out {out}: its name must end in {self.suffix}; name it {out.name}{self.suffix}"
            )
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"--to onnx needs {first_of(missing)}, which is not installed; pip install 'esm2mega[onnx]'"
            )


def traced(model: nn.Module) -> ExportedProgram:
    """Trace a model on padded batches of any number of proteins and any length from 3 tokens on."""
    ids = torch.full((2, 8), 4)
    shape = {0: Dim("batch", min=1), 1: Dim("length", min=3)}
    with torch.no_grad():
        return torch.export.export(
            model.eval(),
            (ids, torch.ones_like(ids)),
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            strict=False,
        )


def beside(out: Path) -> Path:
    """Return where the weights of a large ONNX model lie."""
    return out.with_name(f"{out.name}.data")


def _write_torch(program: ExportedProgram, names: Sequence[str], path: Path) -> None:
    torch.export.save(program, path)


def _load_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_onnx(program: ExportedProgram, names: Sequence[str], path: Path) -> None:
    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    with _quiet():
        torch.onnx.export(
            program,
            f=path,
            input_names=["input_ids", "attention_mask"],
            output_names=list(names),
            dynamo=True,
            external_data=size > _MOST_IN_ONE_FILE,
            verbose=False,
        )


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return dict(zip(names, map(torch.from_numpy, session.run(names, inputs)), strict=True))

    return run


FORMATS = {
    "torch": ProgramFormat(".pt2", (), _write_torch, _load_torch),
    "onnx": ProgramFormat(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of the exporter about itself from the user, who could change nothing about them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
