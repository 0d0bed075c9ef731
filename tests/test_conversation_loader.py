"""ConversationLoader: packed rows for mid-training, one masked conversation per row for SFT, shuffled epochs."""

import json
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.dataloader import ConversationLoader

BOS = 0


class ListTokenizer:
    """A conversation is its own list of (id, mask)."""

    bos_id = BOS

    def render_conversation(self, conversation, max_tokens=None):
        ids, mask = zip(*conversation, strict=True)
        return list(ids), list(mask)


def conversation(i, length):
    """BOS, then `length` tokens i; the second half is the assistant's. BOS is no target, whatever its mask."""
    return [(BOS, 1)] + [(i, int(k >= length // 2)) for k in range(length)]


@pytest.fixture
def load():
    loaders = []

    def build(task, **kwargs):
        kwargs = {"pack": True, "shuffle_seed": 1} | kwargs
        loaders.append(ConversationLoader(task, ListTokenizer(), kwargs.pop("B", 1), kwargs.pop("T", 16), **kwargs))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def take(loader, n):
    return [(x.tolist(), y.tolist()) for x, y in islice(loader, n)]


def first_tokens(loader, n_documents):
    """Return the id of each conversation in the order handed out (one row at a time)."""
    seen = []
    while len(seen) < n_documents:
        row = next(loader)[0][0].tolist()
        seen += [token for before, token in zip(row, row[1:], strict=False) if before == BOS != token]
    return seen


def test_packed_rows_hold_whole_conversations_all_trained_and_padded(load):
    x, y = next(load([conversation(5, 5), conversation(5, 5)], B=1, T=16))
    assert x.tolist() == [[BOS] + [5] * 5 + [BOS] + [5] * 4 + [BOS] * 5]  # the last 5 is a target only
    assert y.tolist() == [[5] * 5 + [BOS] + [5] * 5 + [-1] * 5]


def test_padded_rows_hold_one_conversation_trained_where_masked(load):
    task = [conversation(7, 6)]
    loader = load(task, pack=False, pad_multiple=4)
    x, y = next(loader)
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == [[BOS] + [7] * 5 + [BOS] * 2]
    assert y.tolist() == [[-1, -1, -1, 7, 7, 7, -1, -1]]
    assert loader.stats == {"rows": 1, "documents": 1, "tokens": 3, "cropped_documents": 0, "cropped_tokens": 0,
                            "epoch": 1}


@pytest.mark.parametrize("lengths, multiple, width", [
    ([3, 9], 4, 12), ([3, 8], 4, 8), ([3, 1], 64, 16), ([3, 40], 4, 16), ([1, 1], 1, 1), ([2, 3], 5, 5),
])
def test_padded_width_is_the_longest_row_rounded_up_and_at_most_T(load, lengths, multiple, width):
    x, y = next(load([conversation(i + 1, n) for i, n in enumerate(lengths)], pack=False, B=2, pad_multiple=multiple))
    assert x.shape == y.shape == (2, width)


@pytest.mark.parametrize("pack", [True, False])
def test_long_conversations_are_cropped_and_counted(load, pack):
    loader = load([conversation(3, 20)], pack=pack)
    x, y = next(loader)
    assert x.tolist() == [[BOS] + [3] * 15]
    assert y.tolist() == [[3] * 16 if pack else [-1] * 10 + [3] * 6]
    assert loader.stats["cropped_documents"] == 1 and loader.stats["cropped_tokens"] == 4


@pytest.mark.parametrize("pack", [True, False])
def test_each_epoch_is_another_permutation_of_all_conversations(load, pack):
    task = [conversation(i + 1, 3) for i in range(40)]
    seen = first_tokens(load(task, pack=pack), 120)
    epochs = [seen[:40], seen[40:80], seen[80:120]]
    assert all(sorted(epoch) == list(range(1, 41)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])
    assert first_tokens(load(task, pack=pack), 120) == seen
    assert first_tokens(load(task, pack=pack, shuffle_seed=2), 120) != seen


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.booleans(), st.integers(1, 5), st.integers(1, 3),
       st.integers(0, 6))
def test_any_world_size_reads_the_same_rows_and_resumes_anywhere(lengths, pack, W, B, cut):
    task = [conversation(i + 1, length) for i, length in enumerate(lengths)]

    def load(**kwargs):
        return ConversationLoader(task, ListTokenizer(), B, 16, pack=pack, shuffle_seed=3, pad_multiple=4, **kwargs)

    alone = load()
    ranks = [load(rank=rank, world_size=W) for rank in range(W)]
    for _ in range(cut):
        assert [take(loader, 1) for loader in ranks] == [take(alone, 1) for _ in range(W)]
    state = json.loads(json.dumps(ranks[-1].state_dict()))
    assert state == alone.state_dict()
    resumed = load(state=state)
    assert (resumed.epoch, resumed.epoch_fraction, resumed.stats) == (alone.epoch, alone.epoch_fraction, alone.stats)
    assert take(resumed, 4) == take(alone, 4)
    assert resumed.state_dict() == alone.state_dict()
    for loader in [alone, resumed, *ranks]:
        loader.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_packed_conversations_are_never_cut_below_a_row(lengths):
    task = [conversation(i + 1, length) for i, length in enumerate(lengths)]
    loader = ConversationLoader(task, ListTokenizer(), 1, 16, pack=True, shuffle_seed=0)
    used = {}
    while loader.stats["documents"] < len(lengths):
        x, y = next(loader)
        for token in y[0][y[0] > 0].tolist():
            used[token] = used.get(token, 0) + 1
    loader.close()
    if loader.stats["documents"] == len(lengths):  # else the last row holds a conversation of the next epoch too
        assert used == {i + 1: min(length, 16) for i, length in enumerate(lengths)}


def test_epoch_and_fraction_follow_the_conversations_handed_out(load):
    loader = load([conversation(i + 1, 3) for i in range(8)], pack=False, B=3)
    assert (loader.epoch, loader.epoch_fraction) == (0, 0.0)
    progress = []
    for _ in islice(loader, 3):
        progress.append((loader.epoch, loader.epoch_fraction))
    assert progress == [(0, 3 / 8), (0, 6 / 8), (1, 1 / 8)]


def test_a_task_without_conversations_is_refused(load):
    with pytest.raises(UserError, match="^a task must have at least one conversation to load, it has none$"):
        load([])


@pytest.mark.parametrize("change, sentence", [
    ({"shuffle_seed": 9}, "the same shuffle_seed as the checkpoint, 9 is not 1"),
    ({"pack": False}, "the same pack as the checkpoint, False is not True"),
    ({"T": 8}, "the same seq_len as the checkpoint, 8 is not 16"),
    ({"task": [conversation(1, 3)]}, "the same conversations as the checkpoint, 1 is not 2"),
])
def test_resuming_with_other_rows_is_refused(load, change, sentence):
    task = [conversation(1, 3), conversation(2, 3)]
    state = load(task).state_dict()
    with pytest.raises(UserError) as error:
        load(**({"task": task, "state": state} | change))
    assert str(error.value) == f"to resume, the loader must have {sentence}"


def test_a_task_that_fails_surfaces_in_next(load):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise UserError(f"conversation {index} is broken")

    with pytest.raises(UserError, match="^conversation . is broken$"):
        next(load(Broken()))


def test_rows_that_lose_their_answer_are_all_ignored(load):
    _, y = next(load([conversation(3, 60)], pack=False))
    assert (y == -1).all()
    assert y.shape == (1, 16)
