"""Which pages of a paged cache belong to whom: plain Python, on the host."""

from collections.abc import Iterable, Iterator, Sequence


class OutOfPagesError(RuntimeError):
    """A `PageAllocator` has fewer free pages than asked for; nothing was taken."""


class PageAllocator:
    """Hands out page numbers and counts their owners.

    A sequence owns a list of pages, in order: its row of the page table. Pages that hold a common
    prefix may have several owners (PagedAttention, Kwon et al., 2023, arXiv:2309.06180), and are
    free again when the last one frees them.

    Args:
      num_pages: pages in the pool, numbered from 0.
      page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int):
        for name, x in (("num_pages", num_pages), ("page_size", page_size)):
            if x < 1:
                raise ValueError(f"{name} must be at least 1, got {x}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._owners = [0] * num_pages
        self._free = list(reversed(range(num_pages)))  # a stack: what was used last is warm

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def num_owners(self, page: int) -> int:
        """How many sequences own a page."""
        return self._owners[self._number(page)]

    def pages_for(self, num_tokens: int) -> int:
        """How many pages so many tokens take."""
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
        return -(-num_tokens // self.page_size)

    def allocate(self, num_tokens: int) -> list[int]:
        """New pages for so many tokens.

        Raises:
          OutOfPagesError: there are too few.
        """
        return self._take(self.pages_for(num_tokens))

    def extend(self, pages: Sequence[int], num_tokens: int) -> list[int]:
        """The sequence's pages and as many more as `num_tokens`, its tokens in all, need.

        Args:
          pages: what the sequence owns; the result takes its place.
          num_tokens: how many tokens there will be; fewer than there are change nothing.

        Raises:
          OutOfPagesError: there are too few.
        """
        return [*pages, *self._take(max(0, self.pages_for(num_tokens) - len(pages)))]

    def share(self, pages: Sequence[int], num_tokens: int) -> list[int]:
        """One more owner for the pages that the first `num_tokens` tokens fill.

        Whole pages only: into a page that is filled in part both owners would write. What remains
        of the prefix, `num_tokens % page_size` tokens, the new sequence computes for itself.

        Args:
          pages: pages of the sequence that has the prefix.
          num_tokens: length of the prefix.

        Returns:
          the shared pages, to be extended for the new sequence.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
        shared = list(pages[: num_tokens // self.page_size])
        self._check_owned(shared)
        for page in shared:
            self._owners[page] += 1
        return shared

    def free(self, pages: Iterable[int]) -> None:
        """One owner fewer for each of the pages."""
        pages = list(pages)
        self._check_owned(pages)
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPagesError(
                f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def _number(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise ValueError(f"pages are numbered from 0 to {self.num_pages - 1}, got {page}")
        return page

    def _check_owned(self, pages: Sequence[int]) -> None:
        """Before anything changes, so that an error leaves all as it was."""
        seen: set[int] = set()
        for page in pages:
            if self._owners[self._number(page)] == 0:
                raise ValueError(f"page {page} has no owner")
            if page in seen:
                raise ValueError(f"page {page} is given twice")
            seen.add(page)


def prefill_chunks(length: int, chunk_size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Splits a prompt: `(start, stop)` of each chunk in order, the last one shorter.

    Args:
      length: tokens of the prompt.
      chunk_size: tokens of a chunk, at least 1.
      start: tokens that are in the cache already, such as a shared prefix.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return ((i, min(i + chunk_size, length)) for i in range(start, length, chunk_size))
