"""The page pool: nothing is held twice, lost or freed twice, whatever the order of operations."""

import random
import re
from collections import Counter

import pytest

from nanochat.engine.pages import ROOT, PagePool


def test_allocated_pages_are_distinct_and_counted():
    pool = PagePool(5, 16)
    a, b = pool.allocate(2), pool.allocate(3)
    assert sorted(a + b) == [0, 1, 2, 3, 4]
    assert (pool.free, pool.cached, pool.live, pool.total, pool.peak) == (0, 0, 5, 5, 5)
    pool.release(a)
    assert (pool.free, pool.live, pool.peak) == (2, 3, 5)
    pool.check()


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_pages_for_rounds_up(tokens, pages):
    assert PagePool(1, 16).pages_for(tokens) == pages


def test_allocating_more_than_free_takes_nothing():
    pool = PagePool(3, 16)
    pool.allocate(2)
    with pytest.raises(ValueError, match=re.escape("2 pages wanted, 1 of 3 are available")):
        pool.allocate(2)
    assert pool.free == 1
    pool.check()


def test_a_shared_page_is_free_after_its_last_holder():
    pool = PagePool(3, 16)
    pages = pool.allocate(2)
    copy = pool.share(pages)
    assert copy == pages and copy is not pages and pool.live == 2
    pool.release(pages)
    assert pool.live == 2 and not pool.shared(pages[0])
    pool.release(copy)
    assert pool.free == 3
    pool.check()


def test_fork_trades_a_hold_on_a_shared_page_for_a_page_of_ones_own():
    pool = PagePool(2, 16)
    (page,) = pool.allocate(1)
    pool.share([page])
    own = pool.fork(page)
    assert own != page and not pool.shared(page) and not pool.shared(own)
    assert pool.live == 2
    pool.check()


def test_a_failed_fork_keeps_the_hold():
    pool = PagePool(1, 16)
    (page,) = pool.allocate(1)
    pool.share([page])
    with pytest.raises(ValueError):
        pool.fork(page)
    assert pool.shared(page)


@pytest.mark.parametrize("operation", ["release", "share"])
def test_a_page_of_nobody_is_refused_before_anything_changes(operation):
    pool = PagePool(3, 16)
    kept, gone = pool.allocate(2)
    pool.release([gone])
    with pytest.raises(ValueError, match=rf"pages \[{gone}\] are held by nobody"):
        getattr(pool, operation)([kept, gone])
    assert not pool.shared(kept) and pool.live == 1
    pool.check()


def test_check_finds_a_lost_page_and_one_that_is_free_twice():
    lost, twice = PagePool(3, 16), PagePool(3, 16)
    lost._free.remove(1)
    with pytest.raises(RuntimeError, match=re.escape("pages [1] are neither free nor held: 2 free, 0 cached, 1 live")):
        lost.check()
    twice._free.append(2)
    with pytest.raises(RuntimeError, match="twice"):
        twice.check()


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_agree_with_a_count_of_holders(seed):
    rng, pool = random.Random(seed), PagePool(12, 16)
    held: list[list[int]] = []
    for _ in range(400):
        operation = rng.choice(("allocate", "share", "release", "fork"))
        if operation == "allocate" and pool.free:
            held.append(pool.allocate(rng.randint(1, pool.free)))
        elif operation == "share" and held:
            held.append(pool.share(rng.choice(held)))
        elif operation == "release" and held:
            pool.release(held.pop(rng.randrange(len(held))))
        elif operation == "fork" and held and pool.free:
            pages = rng.choice(held)
            if pool.shared(pages[-1]):
                pages[-1] = pool.fork(pages[-1])
        holders = Counter(page for pages in held for page in pages)
        assert pool.live == len(holders)
        assert all(pool.shared(page) == (n > 1) for page, n in holders.items())
        pool.check()


# --- prefixes -------------------------------------------------------------------------------------


def published(pool, tokens):
    """Hold pages for `tokens`, publish the full ones and return the pages."""
    pages, parent, P = pool.allocate(pool.pages_for(len(tokens))), ROOT, pool.page_size
    for i in range(len(tokens) // P):
        parent = pool.publish(pages[i], parent, tokens[i * P:(i + 1) * P])
    return pages


def test_a_prefix_is_found_while_held_and_after():
    pool = PagePool(6, 4)
    pages = published(pool, list(range(10)))
    found, keys = pool.match(list(range(8)) + [99])
    assert found == pages[:2] and len(set(keys)) == 2 and pool.shared(pages[0])
    pool.release(found)
    pool.release(pages)
    assert (pool.free, pool.cached, pool.live) == (4, 2, 0)
    again, _ = pool.match(list(range(9)))
    assert again == pages[:2] and (pool.cached, pool.live) == (0, 2)
    pool.check()


@pytest.mark.parametrize("tokens, n", [(range(8), 1), (range(9), 2), ([0, 1, 2, 3, 9, 5, 6, 7, 8], 1),
                                       ([5, 1, 2, 3, 4], 0), (range(4), 0), (range(5), 1), ([4, 5, 6, 7, 0], 0)])
def test_a_match_is_of_whole_pages_from_the_start_and_leaves_the_last_token(tokens, n):
    pool = PagePool(4, 4)
    pages = published(pool, list(range(10)))
    assert pool.match(list(tokens))[0] == pages[:n]


def test_the_longest_unused_prefix_goes_first_and_its_tail_before_its_head():
    pool = PagePool(4, 2)
    old, new = published(pool, [1, 2, 3, 4]), published(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    (taken,) = pool.allocate(1)
    assert taken == old[1] and pool.match([1, 2, 3, 4, 0])[0] == old[:1]
    pool.check()


def test_equal_digests_do_not_make_equal_prefixes(monkeypatch):
    monkeypatch.setattr("nanochat.engine.pages.Prefix.key", property(lambda self: b"same"))
    pool = PagePool(2, 2)
    published(pool, [1, 2, 9])
    assert pool.match([3, 4, 9]) == ([], [])


def test_a_matched_prefix_is_not_taken_for_new_tokens():
    pool = PagePool(4, 2)
    pool.release(published(pool, [1, 2, 3, 4]))
    found, _ = pool.match([1, 2, 3, 4, 9])
    assert pool.available == 2 and not set(found) & set(pool.allocate(2))
    with pytest.raises(ValueError, match="1 pages wanted, 0 of 4 are available"):
        pool.allocate(1)
    pool.check()


def test_withdrawn_pages_are_found_no_more_and_free_after_their_last_holder():
    pool = PagePool(4, 2)
    pages = published(pool, [1, 2, 3, 4])
    found, _ = pool.match([1, 2, 3, 4, 9])
    pool.withdraw(pages)
    pool.check()
    assert pool.match([1, 2, 3, 4, 9]) == ([], []) and pool.live == 2
    pool.release(pages)
    pool.release(found)
    assert (pool.free, pool.cached) == (4, 0)
    pool.check()


def test_dropped_prefixes_are_free_again():
    pool = PagePool(4, 2)
    held, gone = published(pool, [1, 2]), published(pool, [3, 4])
    pool.release(gone)
    pool.drop_prefixes()
    assert (pool.free, pool.cached, pool.live) == (3, 0, 1) and pool.match([1, 2, 9]) == ([], [])
    pool.release(held)
    assert pool.free == 4
    pool.check()


def test_check_finds_a_prefix_without_its_page():
    pool = PagePool(2, 2)
    published(pool, [1, 2])
    pool._page_of.clear()
    with pytest.raises(RuntimeError, match="do not belong together"):
        pool.check()
