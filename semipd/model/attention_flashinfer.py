"""`ops.Ops` with FlashInfer's attention, for who has it installed: `--attention-backend flashinfer`.

FlashInfer schedules a step on the host (`plan`) before its layers run (`run`); everything but attention
stays with the Triton kernels. Our pool is its layout HND: keys and values of a layer are [pages, kv_heads,
page size, dim] each. Its grids follow the device's SMs, not the lane's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from semipd.core.errors import ConfigError
from semipd.model.ops import DeviceStep, Heads, Ops, Outline

SUPPORTED = "0.7"  # the series whose interface this was written for (read at 0.7.2)
WORKSPACE_BYTES = 384 * 2**20  # of a lane: partial results of contexts that are cut
_DIMS = (64, 128, 256)


def load_flashinfer(dtype: torch.dtype, dim: int) -> Any:
    """The module `flashinfer`. Raises ConfigError where it is missing, of another version, or has no
    kernels for this dtype and width of a head."""
    try:
        library = importlib.import_module("flashinfer")
    except ImportError as error:
        raise ConfigError(
            f"--attention-backend flashinfer: it cannot be imported ({error}); install "
            f"flashinfer-python {SUPPORTED}, or leave the flag out"
        ) from None
    version = str(getattr(library, "__version__", "unknown"))
    if not version.startswith(f"{SUPPORTED}."):
        raise ConfigError(
            f"--attention-backend flashinfer: version {SUPPORTED} is supported, not {version}"
        )
    if dtype not in (torch.float16, torch.bfloat16) or dim not in _DIMS:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"--attention-backend flashinfer: it has no kernels for {name} and heads of {dim}; "
            "leave the flag out"
        )
    return library


class FlashInferOps:
    """One lane's operations: FlashInfer's attention, `rest` for all else.

    Holds workspaces, so two streams must not share it. A plan passes through one pinned buffer of its
    wrapper, so the next plan waits until the device has taken the last one. That is the first thing that a
    step does on the device: mostly the step is running already, or waits for the other lane's hand-over."""

    plans = True

    def __init__(
        self,
        rest: Ops,
        library: Any,
        heads: Heads,
        windows: Iterable[int | None],
        dtype: torch.dtype,
        device: torch.device,
        upload: Callable[[np.ndarray], torch.Tensor],
        mark: Callable[[], Callable[[], None]],
    ) -> None:
        """windows: of all layers. upload: an array to the device, on the current stream. mark: take note
        of this point of the current stream; calling the result waits until the device has passed it."""
        self._rest, self._library, self._heads = rest, library, heads
        self._windows = tuple(dict.fromkeys(windows))
        self._dtype, self._device = dtype, device
        self._upload, self._mark = upload, mark
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[tuple[str, int, int | None], Any] = {}
        self._planned: dict[int | None, Any] = {}
        self._await_taken: Callable[[], None] | None = None
        self.embed, self.norm, self.add_norm = rest.embed, rest.norm, rest.add_norm
        self.rotate_and_store, self.gated = rest.rotate_and_store, rest.gated

    def plan(self, outline: Outline) -> None:
        if self._await_taken is not None:
            self._await_taken()
        decode = bool((outline.counts == 1).all())
        pages = _Pages(outline)
        indices = outline.tables.view(-1).index_select(0, self._upload(pages.places))
        shape = (self._heads.query, self._heads.kv, self._heads.dim, outline.block_size)
        for window in self._windows:
            # FlashInfer counts the positions to the left, we those that are seen.
            more = {
                "window_left": -1 if window is None else window - 1,
                "q_data_type": self._dtype,
                "kv_data_type": self._dtype,
            }
            wrapper = self._wrapper(outline, decode, window)
            paged = (pages.indptr, indices, pages.last)
            if decode:
                wrapper.plan(*paged, *shape, **more)
            else:
                wrapper.plan(_indptr(outline.counts), *paged, *shape, causal=True, **more)
            self._planned[window] = wrapper
        self._await_taken = self._mark()

    def attend(
        self,
        qkv: torch.Tensor,
        layer: torch.Tensor,
        step: DeviceStep,
        heads: Heads,
        window: int | None,
        units: int,
        out: torch.Tensor,
    ) -> None:
        query = qkv.view(step.rows, -1, heads.dim)[:, : heads.query]
        mixed = out.view(step.rows, heads.query, heads.dim)
        self._planned[window].run(query, (layer[0], layer[1]), out=mixed)

    def _wrapper(self, outline: Outline, decode: bool, window: int | None) -> Any:
        """The one for this kind of step: a captured step's inputs stay where they are, so each number of
        rows has its own."""
        rows = len(outline.slots) if outline.graph else 0
        key = ("decode" if decode else "prefill", rows, window)
        if key not in self._wrappers:
            self._wrappers[key] = self._make(outline, decode)
        return self._wrappers[key]

    def _make(self, outline: Outline, decode: bool) -> Any:
        library, workspace = self._library, self._workspace
        if not decode:
            return library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        make = library.BatchDecodeWithPagedKVCacheWrapper
        if not outline.graph:
            return make(workspace, "HND", use_tensor_cores=True)
        rows = len(outline.slots)

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._device)

        return make(
            workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=buffer(rows + 1),
            paged_kv_indices_buffer=buffer(rows * outline.tables.shape[1]),
            paged_kv_last_page_len_buffer=buffer(rows),
        )


class _Pages:
    """Which pages a step reads. indptr: int32 [n + 1], first page of each slice and their number; last:
    int32 [n], positions in each slice's last page; places: int64 [pages], where they stand in the flat
    tables."""

    def __init__(self, outline: Outline) -> None:
        lengths, size = outline.starts + outline.counts, outline.block_size
        counts = -(-lengths // size)
        self.indptr = _indptr(counts)
        self.last = torch.from_numpy(((lengths - 1) % size + 1).astype(np.int32))
        first = np.cumsum(counts) - counts
        begin = outline.slots * outline.tables.shape[1] - first
        self.places = np.arange(int(counts.sum())) + np.repeat(begin, counts)


def _indptr(counts: np.ndarray) -> torch.Tensor:
    """int32 [n + 1]: where each of n runs begins, and the end of the last."""
    ends = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=ends[1:])
    return torch.from_numpy(ends)
