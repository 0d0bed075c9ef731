"""Which rows advance in a step, and by how many tokens.

One budget of tokens per step. Running rows come first, those that decode before those that still compute their
prompt; what is left goes to prompts, in chunks, and to waiting rows, oldest first. Pages are taken as they are needed.
When none is left the newest row gives up its pages and waits again in front; it computes its tokens a second time, but
for what the prefix cache still has of them. The oldest row can take the pages of all others, so it always gets on.
A row whose tool call is out keeps its pages, is not planned, and lets the others pass.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from nanochat.engine.pages import ROOT, PagePool
from nanochat.engine.request import Row


@dataclass
class Plan:
    """What one step computes: n tokens of each row, after copying pages (source, destination)."""

    counts: dict[Row, int] = field(default_factory=dict)
    copies: dict[Row, tuple[int, int]] = field(default_factory=dict)


class Scheduler:
    """Keeps the waiting and the running rows and their pages of `pool`.

    max_batch: most rows running. max_tokens: most tokens a step computes. prefix_cache: start rows from known pages.
    """

    def __init__(self, pool: PagePool, max_batch: int, max_tokens: int, prefix_cache: bool):
        self.pool, self.max_batch, self.max_tokens, self.prefix_cache = pool, max_batch, max_tokens, prefix_cache
        self.running: list[Row] = []  # oldest first
        self.waiting: deque[Row] = deque()
        self.preemptions = 0
        self.cached_tokens = 0  # that rows started from without computing them

    def plan(self) -> Plan:
        """Choose the rows of a step and give them their pages."""
        plan, budget = Plan(), self.max_tokens
        for row in sorted(self.running, key=lambda row: row.is_prefill):  # stable: oldest first among equals
            n = 0 if row.call else min(row.pending, budget)
            # A running row has pages, unless one before it has just taken them.
            if n and row.pages and self._make_room(row, n, plan):
                plan.counts[row] = n
                budget -= n
        while budget and len(self.running) < self.max_batch:
            row = next((row for row in self.waiting if not row.call), None)
            n = self._admit(row, budget, plan) if row else 0
            if not n:
                break
            self.waiting.remove(row)
            self.running.append(row)
            plan.counts[row] = n
            budget -= n
        return plan

    def computed(self, row: Row, n: int) -> None:
        """Note that n more tokens of the row are in its pages, and publish the pages that are full now."""
        row.computed += n
        P = self.pool.page_size
        if self.prefix_cache:
            known = min(row.computed, len(row.tokens))  # a token on its way is not
            for i in range(len(row.page_keys), known // P):
                parent = row.page_keys[-1] if row.page_keys else ROOT
                row.page_keys.append(self.pool.publish(row.pages[i], parent, row.tokens[i * P:(i + 1) * P]))

    def spawn(self, row: Row, sample: Row) -> None:
        """Let another sample of the request go on from the pages of `row`, which has just computed the prompt."""
        sample.pages, sample.computed = self.pool.share(row.pages), row.computed
        sample.page_keys = list(row.page_keys)

    def release(self, row: Row) -> None:
        """Take the row's pages from it; what it computed has to be computed again."""
        self.pool.release(row.pages)
        row.pages, row.page_keys, row.computed = [], [], 0

    def drop(self, rows: set[Row]) -> None:
        """Take rows out, wherever they stand, and their pages from them."""
        self.running = [row for row in self.running if row not in rows]
        self.waiting = deque(row for row in self.waiting if row not in rows)
        for row in rows:
            if row.error:  # NaN in its logits may come from one of its pages
                self.pool.withdraw(row.pages)
            self.release(row)

    # --- pages for one row ---

    def _missing(self, row: Row, n: int) -> int:
        """Return how many pages the row must get to write n more tokens, a copy of a shared page among them."""
        return self.pool.pages_for(row.computed + n) - len(row.pages) + self._writes_shared_page(row)

    def _writes_shared_page(self, row: Row) -> bool:
        return row.computed % self.pool.page_size > 0 and self.pool.shared(row.pages[-1])

    def _admit(self, row: Row, budget: int, plan: Plan) -> int:
        """Give a waiting row pages for its first tokens and return their number, 0 when it has to wait on."""
        if self.prefix_cache and not row.pages:
            row.pages, row.page_keys = self.pool.match(row.tokens)
            row.computed = len(row.pages) * self.pool.page_size
            self.cached_tokens += row.computed
            if row.request.started is None:
                row.request.cached_tokens = row.computed
        n = min(row.pending, budget)
        # A page in reserve for each running row, lest it be preempted at its next page.
        if self.running and self._missing(row, n) + len(self.running) > self.pool.available:
            return 0
        if not self._make_room(row, n, plan):
            return 0
        row.request.started = row.request.started or time.monotonic()
        return n

    def _make_room(self, row: Row, n: int, plan: Plan) -> bool:
        """Give the row pages for n more tokens, at the cost of newer rows; False when it had to give up its own."""
        while self._missing(row, n) > self.pool.available:
            victim = next((r for r in reversed(self.waiting) if r.pages and r is not row), None)
            victim = victim or (self.running[-1] if self.running else row)
            self._preempt(victim, plan)
            if victim is row:
                return False
        if self._writes_shared_page(row):
            shared, row.pages[-1] = row.pages[-1], self.pool.fork(row.pages[-1])
            plan.copies[row] = (shared, row.pages[-1])
        row.pages += self.pool.allocate(self._missing(row, n))
        return True

    def _preempt(self, row: Row, plan: Plan) -> None:
        self.release(row)
        plan.counts.pop(row, None)
        plan.copies.pop(row, None)
        if row in self.running:
            self.running.remove(row)
            self.waiting.appendleft(row)
            self.preemptions += 1
