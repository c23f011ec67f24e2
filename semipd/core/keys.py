"""Keys of KV blocks: a SHA-256 chain, so a key names a block's tokens and everything before them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

ROOT = b"semipd"


def root(salt: str | None = None) -> bytes:
    """The start of a chain. Requests with different salts never share a block.

    The salt is hashed by itself first: as plain text it could be made to look like a block of tokens, and
    the root of its chain would be the key of somebody else's block."""
    if salt is None:
        return ROOT
    return hashlib.sha256(ROOT + b"\0" + hashlib.sha256(salt.encode()).digest()).digest()


def next_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block holding `tokens` (one full block of ids) after the block keyed `previous`."""
    return hashlib.sha256(previous + array("q", tokens).tobytes()).digest()


def block_keys(tokens: Sequence[int], block_size: int, start: bytes = ROOT) -> list[bytes]:
    """Keys of all full blocks of `tokens`, chained from `start`."""
    keys: list[bytes] = []
    key = start
    for end in range(block_size, len(tokens) + 1, block_size):
        key = next_key(key, tokens[end - block_size : end])
        keys.append(key)
    return keys
