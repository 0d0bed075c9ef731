"""Who holds which page of the KV cache: a free list and one reference count per page.

A page holds P consecutive tokens of a sequence. Samples of one prompt share its pages. Shared tokens are never
overwritten: the sample that computed the prompt goes on behind it in the last page, any other that wants to write
there takes a copy first (`fork`) unless it is the last holder.
"""


class PagePool:
    """Pages 0 .. n_pages - 1 of `page_size` tokens each; free + cached + live == total at all times."""

    def __init__(self, n_pages: int, page_size: int):
        self.total, self.page_size = n_pages, page_size
        self.cached = 0  # pages kept for prompts to come: none, there is no prefix cache yet
        self.peak = 0  # most pages live at once
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: the page freed last is the warmest
        self._holders = [0] * n_pages

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def live(self) -> int:
        return self.total - self.free - self.cached

    def pages_for(self, n_tokens: int) -> int:
        """Return how many pages n_tokens take."""
        return -(-n_tokens // self.page_size)

    def allocate(self, n: int) -> list[int]:
        """Take n free pages for one holder. Raises ValueError when fewer are free."""
        if n > self.free:
            raise ValueError(f"{n} pages wanted, {self.free} of {self.total} are free")
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._holders[page] = 1
        self.peak = max(self.peak, self.live)
        return taken

    def share(self, pages: list[int]) -> list[int]:
        """Add a holder to live pages and return them as its own list."""
        self._must_be_live(pages)
        for page in pages:
            self._holders[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        """Take one holder from each page; a page without one is free again."""
        self._must_be_live(pages)
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def fork(self, page: int) -> int:
        """Give up one hold on a shared page for a page of one's own; the caller copies the contents."""
        (own,) = self.allocate(1)
        self.release([page])
        return own

    def check(self) -> None:
        """Raise RuntimeError unless every page is either free or held, and free + cached + live == total."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a page is in the free list twice")
        wrong = [page for page, holders in enumerate(self._holders) if (holders == 0) != (page in free)]
        if wrong or self.free + self.cached + self.live != self.total:
            raise RuntimeError(f"pages {wrong} are neither free nor held: {self.free} free, {self.cached} cached, "
                               f"{self.live} live of {self.total}")

    def _must_be_live(self, pages: list[int]) -> None:
        dead = [page for page in pages if not self._holders[page]]
        if dead:
            raise ValueError(f"pages {dead} are held by nobody")
