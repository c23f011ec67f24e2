"""Where a model's tensors come from: safetensors files, or a seeded generator.

Tensors are taken one by one, by name and shape, so that no more than one unfused parameter is in memory
besides the model. `finish` asserts that nothing in the checkpoint was left over.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from semipd.core.errors import ConfigError
from semipd.model.quantize import Matrix

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # older checkpoints store what the config already says


class Weights(Protocol):
    """A supply of tensors of one dtype."""

    @property
    def dtype(self) -> torch.dtype: ...

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, its own storage, in `dtype`. Raises ConfigError when it is missing or misshapen."""
        ...

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """The weights of a linear layer, in the form that the checkpoint has them in. They may be a view of
        the file: whoever keeps them copies them."""
        ...

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise ConfigError if tensors were left that are not `ignored`."""
        ...


class SafetensorsWeights:
    """The tensors of `model.safetensors`, or of the shards that its index names."""

    def __init__(self, folder: str | Path, dtype: str, stored: str, device: str = "cpu") -> None:
        """dtype: auto, bfloat16 or float32; stored: the checkpoint's dtype, empty when unknown; device:
        where the tensors go."""
        self._folder = Path(folder)
        self._device = device
        self._files: dict[str, Any] = {}
        self._where = self._locate()
        self._taken: set[str] = set()
        self.dtype = _target(dtype, stored or self._stored(), device)

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._own(self._checked(name, shape))

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        tensor = self._checked(name, shape)
        aligned = tensor.data_ptr() % 4 == 0  # who packs it moves pairs of numbers
        return tensor if aligned and tensor.dtype == self.dtype else self._own(tensor)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return name in self._where

    def left(self) -> set[str]:
        """Names of the tensors that nothing has taken."""
        return set(self._where) - self._taken

    def raw(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, which may be a view of the file; counts as taken."""
        if name not in self._where:
            raise ConfigError(f"{self._folder}: the weights lack {name}")
        try:
            tensor: torch.Tensor = self._where[name].get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{self._folder}: {name} cannot be read: {error}") from None
        self._taken.add(name)
        return tensor

    def _checked(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as it is stored, if it has this shape and a dtype that can be computed in."""
        tensor = self.raw(name)
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{self._folder}: {name} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"{self._folder}: {name} is stored as {tensor.dtype}, which is not supported")
        return tensor

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=self.dtype, device=self._device).copy_(tensor)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        left = {name for name in self.left() - set(ignored) if not _DERIVED.search(name)}
        self._where.clear()
        self._files.clear()
        if left:
            example = min(left)
            raise ConfigError(
                f"{self._folder}: {len(left)} tensors do not belong to this model, such as {example}"
            )

    def _stored(self) -> str:
        """The dtype of the largest table, for configs that do not say."""
        for name in ("model.embed_tokens.weight", *self._where):
            if name in self._where:
                kind = str(self._where[name].get_slice(name).get_dtype())
                return {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")
        return "float32"

    def _locate(self) -> dict[str, Any]:
        """Name of each tensor -> open file that holds it."""
        index = self._folder / INDEX
        if not index.exists():
            file = self._open(SINGLE)
            return dict.fromkeys(file.keys(), file)
        try:
            names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{index} cannot be read: {type(error).__name__} {error}") from None
        files = {file: self._open(str(file)) for file in sorted(set(map(str, names.values())))}
        held = {file: set(opened.keys()) for file, opened in files.items()}
        for name, file in names.items():
            if name not in held[str(file)]:
                raise ConfigError(
                    f"{self._folder / str(file)}: the index promises {name}, the file lacks it"
                )
        return {name: files[str(file)] for name, file in names.items()}

    def _open(self, name: str) -> Any:
        path = self._folder / name
        if Path(name).name != name:
            raise ConfigError(f"{self._folder / INDEX} names a file outside its folder: {name}")
        if name not in self._files:
            if not path.is_file():
                raise ConfigError(
                    f"{self._folder} has no weights: {name} is missing (only safetensors are read)"
                )
            try:
                self._files[name] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} is truncated or not a safetensors file: {error}") from None
        return self._files[name]


class DummyWeights:
    """Seeded random tensors: unit norms, matrices scaled by their inputs so that activations stay
    finite."""

    def __init__(self, dtype: str, stored: str, seed: int, device: str = "cpu") -> None:
        self.dtype = _target(dtype, stored or "bfloat16", device)
        self._seed = seed
        self._device = device

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        scale = 0.02 if len(shape) == 1 else 1.0 / math.sqrt(shape[1])
        empty = torch.empty(shape, dtype=self.dtype, device=self._device)
        return empty.normal_(0.0, scale, generator=generator)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        return self.take(name, shape)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Nothing can be left."""


def _target(dtype: str, stored: str, device: str) -> torch.dtype:
    """The dtype to compute in. On a CPU float16 is never it: its matmul there is some 500 times slower."""
    wanted = stored if dtype == "auto" else dtype
    if wanted not in DTYPES:
        raise ConfigError(f"dtype {wanted!r} is not one of auto, bfloat16, float32")
    if wanted == "float16" and device == "cpu":
        wanted = "bfloat16"
        logger.info("converting float16 to bfloat16, since CPUs have no fast float16")
    return DTYPES[wanted]
