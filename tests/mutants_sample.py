"""Mistakes in sample that parity must find."""

FILE = "kernels/sample.py"
MUTANTS = [
    (FILE, "best = tl.min(tl.where(x == highest, ids, V), axis=0)",
     "best = tl.max(tl.where(x == highest, ids, 0), axis=0)", "last of equals"),
    (FILE, "if highest > top:", "if highest >= top:", "a later block's equal wins"),
    (FILE, "tl.where(count >= goal,", "tl.where(count > goal,", "top k + 1"),
    (FILE, "floor, p * kept, True", "floor, p, True", "top-p of an unnormalized mass"),
    (FILE, "_sort_key(top + tl.log(smallest))", "_sort_key(tl.log(smallest))", "min-p not relative to the largest"),
    (FILE, "goal = u * total", "goal = u", "sum forgotten"),
    (FILE, "before += tl.sum(weight, axis=0)", "before = tl.sum(weight, axis=0)", "only the block before counts"),
    (FILE, "log_probs_ptr + r, x - top -", "log_probs_ptr + r, x -", "log-probability not normalized"),
    (FILE, "tl.where(bits < 0, -1 - bits,", "tl.where(bits < 0, bits,", "negative floats in the wrong order"),
    (FILE, "+ tl.load(position_ptr + r))", ")", "position ignored"),
]
