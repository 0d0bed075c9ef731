"""Mistakes in paged_append that parity must find."""

FILE = "kernels/paged_append.py"
MUTANTS = [
    (FILE, "kept = mask & (slots >= 0)[:, None]", "kept = mask & (slots > 0)[:, None]", "slot 0 skipped"),
    (FILE, "out = v_pages_ptr + (slots * K + own)", "out = v_pages_ptr + (slots * K)", "all heads of v in one place"),
    (FILE, "out = k_pages_ptr + (slots * K + head - H)", "out = k_pages_ptr + (slots * K)",
     "all heads of k in one place"),
    (FILE, "angle = rows[:, None] * (D // 2) + cols", "angle = cols + 0 * rows[:, None]", "everything at position 0"),
    (FILE, "tl.load(v + D // 2, mask=kept", "tl.load(v, mask=kept", "first half of v twice"),
    (FILE, "mask = (rows < N)[:, None]", "mask = (rows < N - 1)[:, None]", "mask off by one"),
    (FILE, "        if head < H:\n            out = y_ptr", "        if head <= H:\n            out = y_ptr",
     "the first key head goes to q"),
]
