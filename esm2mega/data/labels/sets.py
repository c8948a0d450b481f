"""Reads which split a protein belongs to, ``SET`` and ``VALIDATION``, as FLIP and biotrainer write it."""

from __future__ import annotations

from collections.abc import Mapping

from esm2mega.errors import UserError

_SPLITS = {"train": "train", "val": "valid", "test": "test"}

SPLIT_WORDS = {**_SPLITS, **dict.fromkeys(("valid", "validation", "dev"), "valid")}
"""Maps what files and columns call the splits to ``train``, ``valid`` and ``test``."""


def split_of(location: str, name: str, set_name: str, validation: str | None) -> str | None:
    """Return ``train``, ``valid`` or ``test``, or None for a protein that belongs to no set.

    Args:
        location: Where the two values stand, for messages.
        name: Id of the protein.
        set_name: Value of ``SET``.
        validation: Value of ``VALIDATION``, None where there is none.

    Raises:
        UserError: They are none of those of FLIP and biotrainer.
    """
    if set_name in ("", "nan"):
        return None
    if validation not in (None, "", "nan", "True", "False"):
        raise UserError(f"{location}: VALIDATION of {name!r} is {validation!r}, not True or False")
    if set_name not in _SPLITS:
        raise UserError(f"{location}: SET of {name!r} is {set_name!r}, not train, val or test; correct it")
    return "valid" if set_name == "train" and validation == "True" else _SPLITS[set_name]


class SetFilter:
    """Keeps the proteins of the split that a key of the configuration names, where headers say ``SET``."""

    def __init__(self, key: str) -> None:
        """Filter for ``data.train``, ``data.valid`` or ``data.test``; another key takes a single set only."""
        self._key = key
        self._split = key.removeprefix("data.") if key.startswith("data.") else None
        self._first: tuple[str, str | None] | None = None
        self.num_others = 0
        """This is the number of proteins that were not kept."""

    def keeps(self, marks: Mapping[str, str], location: str, name: str) -> bool:
        """Return whether a protein is kept.

        Args:
            marks: ``KEY=VALUE`` of the header; without ``SET`` the protein is kept.
            location: Where the header is, for messages.
            name: Id of the protein.

        Raises:
            UserError: The values mean nothing; or no split is named, and the file holds several.
        """
        if "SET" not in marks:
            return True
        found = split_of(location, name, marks["SET"], marks.get("VALIDATION"))
        if self._split is not None:
            self.num_others += found != self._split
            return found == self._split
        if self._first is None:
            self._first = location, found
        if self._first[1] != found:
            raise UserError(
                f"{location}: {name!r} belongs to another set than the protein at {self._first[0]}; give "
                f"{self._key} a file with the proteins of one SET"
            )
        return True

    def notes(self, path: object) -> list[str]:
        """Return what the user should know about the proteins of `path` that were not kept."""
        if not self.num_others:
            return []
        return [
            f"{self.num_others} proteins of {path} have another SET than {self._key} takes, and are left out"
        ]
