"""Byte-pair encoding written to be read: what rustbpe must equal, merge by merge and id by id."""

from collections import Counter

import regex

PATTERN = regex.compile(
    r"'(?i:[sdmt]|ll|ve|re)"  # a contraction's tail
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"  # a word, with one mark or space before it
    r"|\p{N}{1,2}"  # digits in twos
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # marks, with the newlines behind them
    r"|\s*[\r\n]"  # whitespace up to its last newline
    r"|\s+(?!\S)"  # whitespace, the last one left to what follows
    r"|\s+"
)


def split(text, pattern=PATTERN):
    """Return the matches, and what lies between them."""
    out, at = [], 0
    for match in pattern.finditer(text):
        out += [text[at:match.start()], match.group()]
        at = match.end()
    return [piece for piece in [*out, text[at:]] if piece]


def merge(ids, pair, new):
    """Replace `pair` by `new`, left to right."""
    out, at = [], 0
    while at < len(ids):
        if tuple(ids[at:at + 2]) == pair:
            out.append(new)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out


def train(texts, n_merges, pattern=PATTERN):
    """Return the merges; everything is counted again for each. Ties: left id ascending, then right id."""
    pieces = Counter(piece for text in texts for piece in split(text, pattern))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [(merge(ids, best, 256 + len(merges)), count) for ids, count in words]
        merges.append(best)
    return merges


def encode(text, merges, pattern=PATTERN):
    """Return ids: within each piece the merges are applied in the order learned."""
    ranks = {pair: 256 + index for index, pair in enumerate(merges)}
    out = []
    for piece in split(text, pattern):
        ids = list(piece.encode())
        while known := [ranks[pair] for pair in zip(ids, ids[1:], strict=False) if pair in ranks]:
            ids = merge(ids, merges[min(known) - 256], min(known))
        out += ids
    return out
