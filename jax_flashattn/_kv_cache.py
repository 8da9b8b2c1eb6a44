"""A key/value cache in pages: a pool that sequences share, and a table that says whose a page is.

After PagedAttention (Kwon et al., 2023, arXiv:2309.06180): memory is taken page by page as
sequences grow, and sequences with a common prefix name the same pages.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_flashattn import _fp8, _prepare, _reference, _spec

Layout = Literal["NHD", "HND"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of B sequences in pages; a pytree, to be carried, donated and sharded.

    Token j of sequence b is token `j % page_size` of page `page_table[b, j // page_size]`. Which
    page belongs to whom is decided outside, by `PageAllocator` for instance, and told by
    `dataclasses.replace(cache, page_table=..., lengths=...)`: both are run-time values and compile
    nothing. A number outside [0, num_pages) means "no page".

    Layouts are FlashInfer's (Ye et al., 2025, arXiv:2501.01005). Sharded over heads, page table and
    lengths are the same everywhere; sharded over sequences (under `shard_map`), each shard has a
    pool of its own and page numbers are local to it.

    Attributes:
      k_pages: `[num_pages, page_size, K, H]` ('NHD') or `[num_pages, K, page_size, H]` ('HND').
      v_pages: the same with head dim Hv, in the dtype of `k_pages`.
      page_table: int32 `[B, M]`, the pages of each sequence in order.
      lengths: int32 `[B]`, tokens of each sequence.
      layout: 'NHD' or 'HND', static.
      k_scale: for float8 pages, what a stored key is multiplied with to give the true one: None (1)
        or positive floats, a scalar or `[K]`.
      v_scale: the same for values.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    lengths: jax.Array
    layout: Layout = dataclasses.field(default="NHD", metadata={"static": True})
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def create(
        cls,
        *,
        batch: int,
        max_pages: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        layout: Layout = "NHD",
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
    ) -> "PagedKVCache":
        """An empty cache: pages of zeros, none of which belongs to a sequence yet.

        Args:
          batch: B, sequences at a time.
          max_pages: M, pages that one sequence may have at most.
          num_pages: pages in the pool.
          page_size: tokens per page: 8, 16, 32, 64, 128 or 256.
          num_kv_heads: K, heads of keys and values.
          head_dim: H, of the keys.
          head_dim_v: Hv, of the values; H by default.
          dtype: of keys and values, that of the queries; or float8_e4m3fn or float8_e5m2, which
            take half the memory, and half the time to read, of 16-bit ones.
          layout: 'NHD' or 'HND'.
          k_scale: for float8 pages, what a stored key is multiplied with: a positive number, or
            floating array, a scalar or `[K]`; 1 by default. The largest key over the largest
            number (448 of e4m3, 57344 of e5m2) uses all of the range.
          v_scale: the same for values.

        Raises:
          TypeError: a size that is not a Python int, a dtype that is not floating.
          ValueError: another page size or layout, a size below 1 (`batch` below 0), scales of
            another shape or without float8 pages.
        """
        least = {"batch": 0}
        sizes = dict(
            batch=batch,
            max_pages=max_pages,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        )
        for name, size in sizes.items():
            _spec.static_int(name, size, least.get(name, 1))
        heads = (num_kv_heads,)
        middle = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        cache = cls(
            k_pages=jnp.zeros((num_pages, *middle, head_dim), dtype),
            v_pages=jnp.zeros((num_pages, *middle, sizes["head_dim_v"]), dtype),
            page_table=jnp.full((batch, max_pages), num_pages, jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            layout=layout,
            k_scale=None if k_scale is None else _spec.fp8_scale("k_scale", k_scale, heads),
            v_scale=None if v_scale is None else _spec.fp8_scale("v_scale", v_scale, heads),
        )
        cache.check()
        return cache

    @classmethod
    def from_block_last(
        cls,
        k_pages: jax.Array,
        v_pages: jax.Array,
        page_table: jax.Array,
        lengths: jax.Array,
        *,
        layout: Layout = "HND",
    ) -> "PagedKVCache":
        """From pages whose tokens are the last axis; a copy of the pool.

        Args:
          k_pages: `[num_pages, K, H, page_size]`.
          v_pages: `[num_pages, K, Hv, page_size]`.
          page_table: int32 `[B, M]`.
          lengths: int32 `[B]`.
          layout: of the new cache.
        """
        order = (0, 3, 1, 2) if layout == "NHD" else (0, 1, 3, 2)
        for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
            if jnp.ndim(x) != len(order):
                raise ValueError(
                    f"{name} must have shape [num_pages, K, head_dim, page_size], "
                    f"got {jnp.shape(x)}"
                )
        k_pages, v_pages = (jnp.transpose(x, order) for x in (k_pages, v_pages))
        cache = cls(k_pages, v_pages, page_table, lengths, layout)
        cache.check()
        return cache

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.k_pages.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.k_pages.shape[_spec.page_axes(self.layout)[0]]

    @property
    def capacity(self) -> int:
        """Tokens that one row of the page table has room for, M * page_size."""
        return self.page_table.shape[1] * self.page_size

    def check(self) -> None:
        """Raises TypeError or ValueError unless shapes and dtypes fit together.

        Every function that takes a cache does this first; it looks at no value.
        """
        _spec.check_cache(
            self.k_pages,
            self.v_pages,
            self.page_table,
            self.lengths,
            self.layout,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )

    def append(
        self,
        k: jax.Array,
        v: jax.Array,
        *,
        num_tokens: ArrayLike | None = None,
        cu_seqlens: ArrayLike | None = None,
    ) -> "PagedKVCache":
        """The cache with more tokens at the end of its sequences.

        Under `jax.jit` with the cache donated (or carried by `jax.lax.scan`) the pool is written in
        place. A token is dropped where its sequence has no page for it: beyond the table, or from
        the first entry on, counted from the current length, that is no page. Lengths grow by
        what was kept.

        Float8 pages get `k / k_scale` and `v / v_scale`, rounded to nearest even; what is beyond
        the type's range, infinity too, becomes its largest number.

        Args:
          k: keys `[B, t, K, H]`, or packed `[total, K, H]` with `cu_seqlens`; cast to the dtype of
            the pages.
          v: values, the same with Hv.
          num_tokens: ints `[B]` (or one value): of the t tokens the first so many count, clamped to
            [0, t]; all by default.
          cu_seqlens: ints `[B + 1]`, where each sequence's tokens begin and end, as in
            `attention_varlen`; tokens from the last boundary on are padding.

        Returns:
          a new cache with other pages and lengths.

        Raises:
          TypeError: k or v is no floating array, ints are no ints.
          ValueError: shapes that don't fit; both `num_tokens` and `cu_seqlens`.
        """
        self.check()
        packed = cu_seqlens is not None
        self._check_tokens("k", k, self.k_pages, packed)
        self._check_tokens("v", v, self.v_pages, packed)
        if v.shape[:-2] != k.shape[:-2]:
            raise ValueError(
                f"v must have the tokens of k, {tuple(k.shape[:-2])}, got {tuple(v.shape[:-2])}"
            )
        B, M = self.page_table.shape
        if packed:
            if num_tokens is not None:
                raise ValueError("num_tokens must be left out with cu_seqlens, which says the same")
            ends = _prepare.boundaries_in_cache("cu_seqlens", cu_seqlens, B, k.shape[0])
            count = jnp.diff(ends)
            tokens, _ = _reference.tokens(k.shape[0], 0, {"cu_seqlens_q": ends[None]})
            index, exists = tokens.position[0], tokens.exists[0]
            sequence = jnp.minimum(tokens.sequence[0], B - 1)
        else:
            t = k.shape[1]
            count = jnp.int32(t) if num_tokens is None else num_tokens
            count = jnp.clip(_spec.int32_per_sequence("num_tokens", count, (B,)), 0, t)
            index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (B, t))
            exists = index < count[:, None]
            sequence = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, t))

        lengths = jnp.clip(self.lengths, 0, self.capacity)
        room = self._room(lengths)
        position = lengths[sequence] + index
        column = jnp.minimum(position // self.page_size, M - 1)
        page = jnp.where(
            exists & (position < room[sequence]),
            jnp.asarray(self.page_table)[sequence, column],
            self.num_pages,
        )
        token = position % self.page_size
        return dataclasses.replace(
            self,
            k_pages=self._write(self.k_pages, page, token, k, self.k_scale),
            v_pages=self._write(self.v_pages, page, token, v, self.v_scale),
            lengths=lengths + jnp.clip(room - lengths, 0, count),
        )

    def _write(
        self,
        pool: jax.Array,
        page: jax.Array,
        token: jax.Array,
        x: jax.Array,
        scale: jax.Array | None,
    ) -> jax.Array:
        """The pool with x, in the pool's dtype, at those places; no page, no write."""
        pool, x = jnp.asarray(pool), jnp.asarray(x)
        if _fp8.is_fp8(pool):
            # As bytes: XLA would scatter 8-bit floats as float16, and convert the pool twice.
            as_bytes = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)
            x = as_bytes(_fp8.quantize(x, pool.dtype, scale))
            written = self._scatter(as_bytes(pool), page, token, x)
            return jax.lax.bitcast_convert_type(written, pool.dtype)
        return self._scatter(pool, page, token, x.astype(pool.dtype))

    def _scatter(
        self, pool: jax.Array, page: jax.Array, token: jax.Array, x: jax.Array
    ) -> jax.Array:
        """In place where the pool is donated."""
        if self.layout == "NHD":
            place = page, token
        elif any(jax.typeof(pool).sharding.spec):
            place = page, slice(None), token  # explicit sharding of an axis wants it to be a slice
        else:
            # An index for the heads too: for a slice in the middle older versions of XLA transpose
            # the pool, and write a copy.
            heads = jnp.arange(x.shape[-2], dtype=jnp.int32).reshape((1,) * page.ndim + (-1,))
            place = page[..., None], heads, token[..., None]
        return pool.at[place].set(x, mode="drop")

    def validate(self, *, allow_shared: bool = False) -> None:
        """Checks the values, which nothing else does, by `jax.experimental.checkify`.

        Lengths must be within [0, capacity], entries of the table below them must be page numbers,
        and no page may be used twice. Outside of `jax.jit` it raises at once; inside, the jitted
        function must be wrapped by `checkify.checkify`, and its error thrown.

        Args:
          allow_shared: pages may be used more than once, as those of a common prefix are.

        Raises:
          jax.experimental.checkify.JaxRuntimeError: a ValueError that names the sequence and what
            is wrong with it.
        """
        from jax.experimental import checkify  # imports Pallas, which takes a while

        self.check()
        if self.page_table.shape[0] == 0:
            return
        table, lengths = jnp.asarray(self.page_table), jnp.asarray(self.lengths)
        index = jnp.argmax((lengths < 0) | (lengths > self.capacity))
        length = lengths[index]
        checkify.check(
            (length >= 0) & (length <= self.capacity),
            f"lengths must be within [0, {self.capacity}], got {{length}} for sequence {{index}}",
            length=length,
            index=index,
        )
        B, M = table.shape
        begin = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32) * self.page_size, (B, M))
        used = begin < lengths[:, None]
        bad = used & ~self._is_page()
        index = jnp.argmax(jnp.any(bad, axis=1))
        column = jnp.argmax(bad[index])
        checkify.check(
            ~jnp.any(bad),
            f"page_table must hold page numbers within [0, {self.num_pages}) below the lengths, "
            "got {page} for sequence {index} in column {column}",
            page=table[index, column],
            index=index,
            column=column,
        )
        if allow_shared:
            return
        pages = jnp.where(used, table, self.num_pages)
        count = jnp.zeros(self.num_pages, jnp.int32).at[pages].add(1, mode="drop")
        page = jnp.argmax(count)
        checkify.check(
            count[page] <= 1,
            "no page may be used twice unless allow_shared, got page {page} {count} times",
            page=page,
            count=count[page],
        )

    def _check_tokens(self, name: str, x: Any, pages: jax.Array, packed: bool) -> None:
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
        K = pages.shape[_spec.page_axes(self.layout)[1]]
        B, dim = self.page_table.shape[0], pages.shape[-1]
        if packed:
            fits, shape = x.ndim == 3, f"[total, {K}, {dim}] with cu_seqlens"
        else:
            fits, shape = x.ndim == 4 and x.shape[0] == B, f"[{B}, t, {K}, {dim}]"
        if not fits or x.shape[-2:] != (K, dim):
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")

    def _is_page(self) -> jax.Array:
        return (self.page_table >= 0) & (self.page_table < self.num_pages)

    def _room(self, lengths: jax.Array) -> jax.Array:
        """Where the pages of each sequence end, int32 `[B]`: the first gap from its length on.

        Gaps before are no matter: the pages of tokens that a window has left may be gone.
        """
        B, M = self.page_table.shape
        column = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (B, M))
        gap = ~self._is_page() & (column >= (lengths // self.page_size)[:, None])
        first = jnp.min(jnp.where(gap, column, M), axis=1)
        return first * self.page_size
