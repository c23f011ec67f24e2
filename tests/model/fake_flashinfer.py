"""What `attention_flashinfer` uses of FlashInfer 0.7, in plain PyTorch: it checks what the real one checks
(shapes, dtypes, layouts, plan before run, fixed buffers under graphs) and computes the attention that was
planned, out of the buffers as they are when it runs."""

from __future__ import annotations

from typing import Any

import torch

__version__ = "0.7.2.post1"


class _Wrapper:
    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8 and workspace.numel() >= 128 * 2**20
        assert kv_layout == "HND"
        self.plans = 0

    def _keep(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last: torch.Tensor,
        shape: tuple[int, int, int, int],
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        for tensor in (indptr, indices, last):
            assert tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous()
        assert len(indptr) == len(last) + 1 and indptr[0] == 0 and indptr[-1] == len(indices)
        assert last.min() >= 1 and last.max() <= shape[3] and shape[0] % shape[1] == 0
        assert q_data_type == kv_data_type
        self.indptr, self.indices, self.last = indptr, indices, last
        self.shape, self.window_left, self.dtype = shape, window_left, q_data_type
        self.plans += 1

    def _run(
        self,
        query: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        qo_indptr: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        heads, kv_heads, dim, size = self.shape
        assert self.plans, "run before plan"
        assert query.shape == (int(qo_indptr[-1]), heads, dim) and query.stride(-1) == 1
        assert out.shape == query.shape and out.is_contiguous() and out.dtype == query.dtype == self.dtype
        for side in cache:
            assert side.shape[1:] == (kv_heads, size, dim) and side.dtype == self.dtype
            assert side.stride() == cache[0].stride()
        for index in range(len(self.last)):
            pages = self.indices[int(self.indptr[index]) : int(self.indptr[index + 1])].long()
            length = (len(pages) - 1) * size + int(self.last[index])
            rows = slice(int(qo_indptr[index]), int(qo_indptr[index + 1]))
            keys, values = (
                side[pages].transpose(1, 2).reshape(-1, kv_heads, dim)[:length] for side in cache
            )
            at = torch.arange(length - (rows.stop - rows.start), length)[:, None]
            seen = torch.arange(length)
            hidden = seen > at
            if self.window_left >= 0:
                hidden |= seen < at - self.window_left
            group = heads // kv_heads
            keys, values = (side.float().repeat_interleave(group, dim=1) for side in (keys, values))
            scores = torch.einsum("nhd,thd->hnt", query[rows].float(), keys) / dim**0.5
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[rows] = torch.einsum("hnt,thd->nhd", weights, values).to(out.dtype)
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        assert causal and qo_indptr.dtype == torch.int32
        self.qo_indptr = qo_indptr
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        paged = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._keep(*paged, shape, window_left, q_data_type, kv_data_type)

    def run(self, q: torch.Tensor, paged_kv_cache: Any, out: torch.Tensor) -> torch.Tensor:
        return self._run(q, paged_kv_cache, self.qo_indptr, out)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_tensor_cores, "without, only some sizes of groups have kernels"
        self.graph = use_cuda_graph
        self.fixed = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert all(buffer is not None for buffer in self.fixed) is use_cuda_graph

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        if self.graph:
            assert len(last_page_len) == len(self.fixed[2]), "a graph's batch size is fixed"  # type: ignore[arg-type]
            given = (indptr, indices, last_page_len)
            for buffer, values in zip(self.fixed, given, strict=True):
                buffer[: len(values)].copy_(values)  # type: ignore[index]
            indptr, last_page_len = self.fixed[0], self.fixed[2]  # type: ignore[assignment]
            indices = self.fixed[1][: len(indices)]  # type: ignore[index]
        self._keep(indptr, indices, last_page_len, shape, window_left, q_data_type, kv_data_type)

    def run(self, q: torch.Tensor, paged_kv_cache: Any, out: torch.Tensor) -> torch.Tensor:
        return self._run(q, paged_kv_cache, torch.arange(len(self.last) + 1), out)
