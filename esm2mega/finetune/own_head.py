"""Makes the head of a fine-tuned model; one of a user's own code is checked, and so is what it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.convert.heads.user_code import is_same, name_of
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import UserError
from esm2mega.model.heads import TaskHead
from esm2mega.model.task import MakeHead
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

        def checked(features: Tensor, segments: Segments) -> Tensor:
            output = users_code.call(f"{name}.predict", predict, features, segments)
            check(name, output, segments)
            return output

        head.features = partial(users_code.call, f"{name}.features", features)  # type: ignore[method-assign]
        head.predict = checked  # type: ignore[method-assign]
        return head


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


def other_code(location: str, what: str, recorded: str, given: str) -> UserError:
    """Return the error of a class that is not the recorded one; `what` is ``head`` or ``loss``."""
    return UserError(f"{location}: was trained with the {what} {recorded}, not with {given}; give that one")


def shown_type(value: Any) -> str:
    """Return what to call a value of a wrong type in a message."""
    return f"an instance of {type(value).__name__}"
