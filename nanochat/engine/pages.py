"""Who holds which page of the KV cache, and which pages still know a prefix that a prompt to come may start with.

A page holds P consecutive tokens of a sequence. Samples of one prompt share its pages. Shared tokens are never
overwritten: who wants to write behind them in a shared page takes a copy first (`fork`). A full page can be published
under the tokens it ends: its key is the digest of all tokens from the sequence's start. When its last holder lets go
it stays cached, the longest unused ones being taken for new tokens when no page is free. Equal digests alone are not
trusted: the page's own tokens and its predecessor's key are compared too.
"""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass

ROOT = b""  # key of the empty prefix


@dataclass(frozen=True)
class Prefix:
    """What a published page holds: its tokens, and the key of all that comes before them."""

    parent: bytes
    tokens: tuple[int, ...]

    @property
    def key(self) -> bytes:
        return hashlib.blake2b(self.parent + array("q", self.tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 0 .. n_pages - 1 of `page_size` tokens each; free + cached + live == total at all times."""

    def __init__(self, n_pages: int, page_size: int):
        self.total, self.page_size = n_pages, page_size
        self.peak = 0  # most pages live at once
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: the page freed last is the warmest
        self._holders = [0] * n_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # published pages without holder, longest unused first
        self._prefix: dict[int, Prefix] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Return how many pages `allocate` can give."""
        return self.free + self.cached

    @property
    def live(self) -> int:
        return self.total - self.free - self.cached

    def pages_for(self, n_tokens: int) -> int:
        """Return how many pages n_tokens take."""
        return -(-n_tokens // self.page_size)

    # --- holding ---

    def allocate(self, n: int) -> list[int]:
        """Take n pages for one holder, free ones first. Raises ValueError when fewer are available."""
        if n > self.available:
            raise ValueError(f"{n} pages wanted, {self.available} of {self.total} are available")
        taken = []
        for _ in range(n):
            if not self._free:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            taken.append(self._free.pop())
            self._holders[taken[-1]] = 1
        self.peak = max(self.peak, self.live)
        return taken

    def share(self, pages: list[int]) -> list[int]:
        """Add a holder to live pages and return them as its own list."""
        self._must_be_live(pages)
        for page in pages:
            self._holders[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        """Take one holder from each page of a sequence; one without holder is cached if published, else free."""
        self._must_be_live(pages)
        for page in reversed(pages):  # the tail counts as used before the head, and is taken first
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._prefix:
                self._cached[page] = None
            else:
                self._free.append(page)

    def shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def fork(self, page: int) -> int:
        """Give up one hold on a shared page for a page of one's own; the caller copies the contents."""
        (own,) = self.allocate(1)
        self.release([page])
        return own

    # --- prefixes ---

    def publish(self, page: int, parent: bytes, tokens: list[int]) -> bytes:
        """Make a live, full page findable; return its key. A prefix that another page has already is left to it."""
        self._must_be_live([page])
        prefix = Prefix(parent, tuple(tokens))
        key = prefix.key
        if page not in self._prefix and key not in self._page_of:
            self._prefix[page], self._page_of[key] = prefix, page
        return key

    def match(self, tokens: list[int]) -> tuple[list[int], list[bytes]]:
        """Take a hold on the pages of the longest known prefix of `tokens`, the last token never among them.

        Returns the pages and their keys.
        """
        pages, keys, parent, P = [], [], ROOT, self.page_size
        for start in range(0, (len(tokens) - 1) // P * P, P):
            wanted = Prefix(parent, tuple(tokens[start:start + P]))
            parent = wanted.key
            page = self._page_of.get(parent)
            if page is None or self._prefix[page] != wanted:
                break
            pages.append(page)
            keys.append(parent)
        for page in pages:
            self._cached.pop(page, None)
            self._holders[page] += 1
        self.peak = max(self.peak, self.live)
        return pages, keys

    def withdraw(self, pages: list[int]) -> None:
        """Make live pages findable no more: what is in them cannot be trusted."""
        for page in pages:
            if page in self._prefix:
                self._forget(page)

    def drop_prefixes(self) -> None:
        """Forget every prefix: the weights that computed them are gone."""
        self._free += self._cached
        self._cached.clear()
        self._prefix.clear()
        self._page_of.clear()

    def check(self) -> None:
        """Raise RuntimeError unless every page is free, cached or held, once, and every prefix has its page."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a page is in the free list twice")
        wrong = [page for page, holders in enumerate(self._holders)
                 if (holders > 0) + (page in free) + (page in self._cached) != 1]
        if wrong or self.free + self.cached + self.live != self.total:
            raise RuntimeError(f"pages {wrong} are neither free nor held: {self.free} free, {self.cached} cached, "
                               f"{self.live} live of {self.total}")
        if {page: prefix.key for page, prefix in self._prefix.items()} != {p: k for k, p in self._page_of.items()}:
            raise RuntimeError("a published page and its key do not belong together")
        if free & self._prefix.keys() or self._cached.keys() - self._prefix.keys():
            raise RuntimeError("a free page is published, or a cached one is not")

    def _forget(self, page: int) -> None:
        del self._page_of[self._prefix.pop(page).key]

    def _must_be_live(self, pages: list[int]) -> None:
        dead = [page for page in pages if not self._holders[page]]
        if dead:
            raise ValueError(f"pages {dead} are held by nobody")
