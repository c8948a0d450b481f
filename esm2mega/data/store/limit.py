"""Takes the first proteins of token stores, as `data.limit` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from esm2mega.config.schema import DataConfig
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError


def limited(store: TokenStore, data: DataConfig) -> TokenStore:
    """Return the store, or a view of its first proteins.

    Raises:
        UserError: Its clusters would be sampled, whose members may be anywhere in the store.
    """
    if data.limit is None or len(store) <= data.limit:
        return store
    if store.clusters is not None and data.sampling != "sequences":
        raise UserError(
            f"data.limit={data.limit} takes the first proteins, and {store.path} has clusters whose members "
            "may be any; set data.sampling=sequences"
        )
    return store.first(data.limit)


def limit_notes(stores: Mapping[str, Sequence[TokenStore]], data: DataConfig) -> Iterator[str]:
    """Yield a line for each store, by its key, of which a part is taken."""
    for key, sets in stores.items():
        for store in sets:
            if (total := int(store.manifest["sequences"])) > len(store):
                taken = f"the first {len(store)} of {total} proteins of {key} are taken"
                yield f"{taken} (data.limit={data.limit})"
