"""Mistakes in paged_append that parity must find."""

FILE = "kernels/paged_append.py"
MUTANTS = [
    (FILE, "kept = mask & (slots >= 0)[:, None]", "kept = mask & (slots > 0)[:, None]", "slot 0 skipped"),
    (FILE, "out = v_pages_ptr + (slots * K + own)", "out = v_pages_ptr + (slots * K)", "all heads of v in one place"),
    (FILE, "cell = k_pages_ptr + (slots * K + head - H)", "cell = k_pages_ptr + (slots * K)",
     "all heads of k in one place"),
    (FILE, "angle = rows[:, None] * (D // 2) + cols", "angle = cols + 0 * rows[:, None]", "everything at position 0"),
    (FILE, "tl.load(v + D // 2, mask=kept", "tl.load(v, mask=kept", "first half of v twice"),
    (FILE, "z1, z2 = z1 * KEY_SCALE, z2 * KEY_SCALE", "z1, z2 = z1 * KEY_SCALE, z2", "a half of k unscaled in fp8"),
    (FILE, "largest = tl.maximum(v1.to(tl.int32", "largest = tl.maximum(v2.to(tl.int32", "the larger half of v alone"),
    (FILE, "(bits + CARRY) >> 23), 253)", "bits >> 23), 253)", "largest value beyond e4m3"),
    (FILE, "v_scales_ptr + slots * K + own, down", "v_scales_ptr + slots * K + own, up", "scale for its inverse"),
    (FILE, "v_scales_ptr + slots * K + own", "v_scales_ptr + slots * K", "all heads' scales in one place"),
    (FILE, "mask = (rows < N)[:, None]", "mask = (rows < N - 1)[:, None]", "mask off by one"),
    (FILE, "        if head < H:\n            out = y_ptr", "        if head <= H:\n            out = y_ptr",
     "the first key head goes to q"),
]
