"""The allocator against a model of who owns what."""

import collections

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jax_flashattn import OutOfPagesError, PageAllocator, prefill_chunks

NUM_PAGES, PAGE_SIZE = 12, 8


class Machine(RuleBasedStateMachine):
    """Sequences come, grow, share and go; `owned` is what each has."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.owned = {}  # number of the sequence: its pages
        self.count = 0

    def add(self, pages):
        self.count += 1
        self.owned[self.count] = pages
        return self.count

    def fresh(self, pages):
        """They were nobody's."""
        taken = {page for row in self.owned.values() for page in row}
        assert len(set(pages)) == len(pages) and not taken & set(pages)

    @rule(target=sequences, num_tokens=st.integers(0, 40))
    def allocate(self, num_tokens):
        needed = -(-num_tokens // PAGE_SIZE)
        if needed > self.allocator.num_free:
            with pytest.raises(OutOfPagesError, match=rf"{needed} pages asked for"):
                self.allocator.allocate(num_tokens)
            return self.add([])
        pages = self.allocator.allocate(num_tokens)
        assert len(pages) == needed
        self.fresh(pages)
        return self.add(pages)

    @rule(sequence=sequences, num_tokens=st.integers(0, 60))
    def extend(self, sequence, num_tokens):
        pages = self.owned[sequence]
        needed = max(0, -(-num_tokens // PAGE_SIZE) - len(pages))
        if needed > self.allocator.num_free:
            with pytest.raises(OutOfPagesError):
                self.allocator.extend(pages, num_tokens)
            return
        longer = self.allocator.extend(pages, num_tokens)
        assert longer[: len(pages)] == pages and len(longer) == len(pages) + needed
        self.fresh(longer[len(pages) :])
        self.owned[sequence] = longer

    @rule(target=sequences, sequence=sequences, num_tokens=st.integers(0, 60))
    def share(self, sequence, num_tokens):
        pages = self.allocator.share(self.owned[sequence], num_tokens)
        assert pages == self.owned[sequence][: num_tokens // PAGE_SIZE]
        return self.add(pages)

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.allocator.free(self.owned.pop(sequence))

    @invariant()
    def counts_add_up(self):
        owners = collections.Counter(page for row in self.owned.values() for page in row)
        for page in range(NUM_PAGES):
            assert self.allocator.num_owners(page) == owners[page]
        assert self.allocator.num_free == NUM_PAGES - len(owners)

    def teardown(self):
        for pages in self.owned.values():
            self.allocator.free(pages)
        assert self.allocator.num_free == NUM_PAGES
        assert sorted(self.allocator.allocate(NUM_PAGES * PAGE_SIZE)) == list(range(NUM_PAGES))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=30)


def test_errors_change_nothing():
    allocator = PageAllocator(4, 8)
    pages = allocator.allocate(20)
    with pytest.raises(OutOfPagesError, match=r"2 pages asked for, 1 of 4 are free"):
        allocator.allocate(16)
    with pytest.raises(ValueError, match=r"page 3 has no owner"):
        allocator.free([pages[0], 3])
    with pytest.raises(ValueError, match=r"page 0 is given twice"):
        allocator.free([pages[0], pages[0]])
    with pytest.raises(ValueError, match=r"numbered from 0 to 3, got 4"):
        allocator.free([4])
    with pytest.raises(ValueError, match=r"num_tokens must be at least 0, got -1"):
        allocator.allocate(-1)
    assert allocator.num_free == 1
    allocator.free(pages)
    with pytest.raises(ValueError, match=r"page \d has no owner"):
        allocator.share(pages, 8)
    with pytest.raises(ValueError, match=r"num_pages must be at least 1, got 0"):
        PageAllocator(0, 8)


def test_prefill_chunks():
    assert list(prefill_chunks(20, 8)) == [(0, 8), (8, 16), (16, 20)]
    assert list(prefill_chunks(20, 8, start=16)) == [(16, 20)]
    assert list(prefill_chunks(0, 8)) == []
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1, got 0"):
        prefill_chunks(20, 0)
