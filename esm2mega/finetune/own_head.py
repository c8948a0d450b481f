"""Makes head and model of a fine-tuning; a user's own are checked, and so is what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from esm2mega.batch import Segments
from esm2mega.convert.heads.user_code import is_same, name_of
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.model.heads import TaskHead
from esm2mega.model.heads.sample_dropout import SampleDropout
from esm2mega.model.heads.task import ESM2ForTask, MakeHead, MakeModel
from esm2mega.pairs import num_pairs
from esm2mega.train import users_code


class OwnHead:
    """Makes a head; a user's own one is checked, and so is what it predicts.

    Attributes:
        name: Qualified name of the class of a user's own head, once it has been made; else None.
    """

    def __init__(
        self,
        make: MakeHead,
        check: Callable[[str, Any, Segments], None] | None,
        recorded: str | None = None,
        location: str = "",
    ) -> None:
        """Prepare to make the head.

        Args:
            make: Makes it.
            check: Takes the name of a user's own head, its output and the segments, and raises `UserError` if
                they do not fit; None for a configured head.
            recorded: Class of the head in a checkpoint; None if it is not known.
            location: The checkpoint, for messages.
        """
        self._make, self._check, self._recorded, self._location = make, check, recorded, location
        self.name: str | None = None

    def __call__(self, config: Any, device: torch.device) -> Any:
        if self._check is None:
            return self._make(config, device)
        with device, _default_dtype(config.params_dtype):
            head = users_code.call("make_head", self._make, config, device)
        if not isinstance(head, TaskHead):
            raise UserError(
                f"make_head made {shown_type(head)}; return an instance of a subclass of "
                "esm2mega.model.heads.TaskHead, with `features` and `predict`"
            )
        self.name = name_of(type(head))
        if self._recorded is not None and not is_same(self.name, self._recorded):
            raise other_code(self._location, "head", self._recorded, self.name)
        features, predict, check, name = head.features, head.predict, self._check, self.name
        dropouts = _keyed(head, name)

        def checked(features: Tensor, segments: Segments) -> Tensor:
            for dropout in dropouts:
                dropout.segments = segments
            output = users_code.call(f"{name}.predict", predict, features, segments)
            check(name, output, segments)
            return output

        head.features = partial(users_code.call, f"{name}.features", features)  # type: ignore[method-assign]
        head.predict = checked  # type: ignore[method-assign]
        return head


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let modules that are made without a dtype have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _keyed(head: Any, name: str) -> list[SampleDropout]:
    """Replace the dropouts of a head, whose generators differ between processes, and return the new ones.

    Raises:
        UserError: One drops whole channels or has another distribution, for which there is no replacement.
    """
    made: list[SampleDropout] = []
    for module in list(head.modules()):
        for child_name, child in list(module.named_children()):
            if type(child) is torch.nn.Dropout:
                made.append(SampleDropout(child.p, len(made)))
                setattr(module, child_name, made[-1])
            elif isinstance(child, _DropoutNd):
                raise UserError(
                    f"the head {name} has a torch.nn.{type(child).__name__}, which would drop other elements "
                    "in each process; use torch.nn.Dropout"
                )
    return made


def check_output(info: TargetInfo, width: int | None, name: str, output: Any, segments: Segments) -> None:
    """Refuse an output that is not ``[rows, k]``; a loss would spread it over the labels of others."""
    if info.per_pair:
        rows, what = sum(map(num_pairs, segments.residue_counts)), "pair of residues"
    elif info.per_residue:
        rows, what = len(segments.owners), "residue"
    else:
        rows, what = segments.num_proteins, "protein"
    found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(found, list) or len(found) != 2 or found[0] != rows or found[1] != (width or found[1]):
        columns = "k" if width is None else width
        raise UserError(
            f"the head {name} predicted {found} instead of [{rows}, {columns}]: a row for each {what}, a "
            "column for each output; correct its `predict`"
        )


def own_model(cls: type, make: MakeModel) -> MakeModel:
    """Return what makes a chunk of a user's own model, and reports exceptions in its code.

    Args:
        cls: Class of the model.
        make: Makes a chunk.
    """

    def made(*stage: Any, make_head: MakeHead) -> Any:
        model = users_code.call(cls.__name__, partial(make, make_head=make_head), *stage)
        if not isinstance(model, cls):
            raise UserError(f"configure_model made {shown_type(model)}; return the {cls.__name__}")
        if cls.forward is not ESM2ForTask.forward:  # type: ignore[attr-defined]
            called = partial(users_code.call, f"{cls.__name__}.forward", model.forward)
            model.forward = called  # type: ignore[method-assign]
        return model

    return made


def other_code(location: str, what: str, recorded: str, given: str) -> UserError:
    """Return the error of a class that is not the recorded one; `what` is ``head`` or ``loss``."""
    return UserError(f"{location}: was trained with the {what} {recorded}, not with {given}; give that one")


def shown_type(value: Any) -> str:
    """Return what to call a value of a wrong type in a message."""
    return f"an instance of {type(value).__name__}"
