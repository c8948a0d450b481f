"""Writes the 33 tokens as tokenizer files, and checks that a foreign model uses the same ids."""

from __future__ import annotations

import json
from pathlib import Path

from esm2mega.errors import UserError
from esm2mega.vocabulary import CLS, EOS, MASK, PAD, UNK, VOCAB

_SPECIAL = {"cls_token": CLS, "eos_token": EOS, "mask_token": MASK, "pad_token": PAD, "unk_token": UNK}


def write_tokenizer(directory: Path) -> None:
    """Write ``vocab.txt`` and the files that make ``AutoTokenizer`` an ``EsmTokenizer`` without a network."""
    (directory / "vocab.txt").write_text("\n".join(VOCAB))
    tokens = {key: VOCAB[token] for key, token in _SPECIAL.items()}
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2) + "\n")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            str(token): {"content": VOCAB[token], **plain} for token in sorted(_SPECIAL.values())
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "tokenizer_class": "EsmTokenizer",
        **tokens,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_vocabulary(directory: Path) -> None:
    """Raise `UserError` if ``vocab.txt`` is there and numbers the tokens in another way.

    Shapes do not show it: a model with a permuted vocabulary loads without an error.
    """
    path = directory / "vocab.txt"
    if not path.is_file():
        return
    tokens = path.read_text(errors="replace").split()
    if tuple(tokens) != VOCAB:
        first = next((i for i, (a, b) in enumerate(zip(tokens, VOCAB, strict=False)) if a != b), len(tokens))
        raise UserError(f"{path}: not the vocabulary of ESM-2 (differs from id {first} on)")
