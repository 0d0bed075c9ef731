"""Mistakes in paged_attention that parity must find."""

FILE = "kernels/paged_attention.py"
MUTANTS = [
    (FILE, "seen = (distance >= 0) & (key < last)[None, :]", "seen = (distance > 0) & (key < last)[None, :]",
     "a query does not see itself"),
    (FILE, "seen &= distance <= WINDOW", "seen &= distance < WINDOW", "window off by one"),
    (FILE, "acc = acc * rescale[:, None] + _weighted", "acc = acc + _weighted", "accumulator not rescaled"),
    (FILE, "total = total * rescale + tl.sum(p, axis=1)", "total = total + tl.sum(p, axis=1)", "sum not rescaled"),
    (FILE, "head_cell = (page * P + key % P) * K", "head_cell = (page * P + key) * K",
     "position in the sequence for position in the page"),
    (FILE, "head = first + m // GROUP, kv_head * GROUP + m % GROUP", "head = first + m // GROUP, m % GROUP",
     "heads of the first group for all"),
    (FILE, "position = context - n_queries + query", "position = query", "queries at the start of the context"),
    (FILE, "lowest += split * share", "lowest += split * BLOCK_N", "splits overlap"),
    (FILE, "weight = tl.exp2(lse - tl.where", "weight = tl.exp2(0 * lse - tl.where", "equal weights in the merge"),
    (FILE, "mask=split < n_splits, other=float(\"-inf\")", "mask=split < 1, other=float(\"-inf\")",
     "all but the first split forgotten"),
    (FILE, "(key_scale(D) if fp8 else 1)", "1", "fp8 keys keep their scale"),
    (FILE, "v_scales_ptr + head_cell", "v_scales_ptr + page * P * K", "one scale for all values of a page"),
    (FILE, "D ** -0.5 * LOG2_E", "D ** -0.5", "natural scores in powers of two"),
    (FILE, "first = (block - start // BLOCK_Q - slack) * BLOCK_Q", "first = (block - start // BLOCK_Q) * BLOCK_Q",
     "slack blocks forgotten"),
    (FILE, "n_splits = tl.where(owned,", "n_splits = tl.where(True,", "rows of no sequence get one"),
]
