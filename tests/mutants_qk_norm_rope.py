"""Mistakes in qk_norm_rope that parity must find."""

FILE = "kernels/qk_norm_rope.py"
MUTANTS = [
    (FILE, "return x1 * cos + x2 * sin, x2 * cos - x1 * sin", "return x1 * cos - x2 * sin, x2 * cos + x1 * sin",
     "rotated the other way"),
    (FILE, "x2 * x2, axis=1) / D + EPS)", "x2 * x2, axis=1) / D)", "eps missing"),
    (FILE, "tl.sum(x1 * x1 + x2 * x2, axis=1)", "tl.sum(x1 * x1, axis=1)", "mean over the first half only"),
    (FILE, "(dz2 - z2 * mean), cos, -sin)", "(dz2 - z2 * mean), cos, sin)", "gradient rotated the other way"),
    (FILE, "mean = (tl.sum(dz1 * z1 + dz2 * z2, axis=1) / D)[:, None]",
     "mean = (tl.sum(dz1 * z1 + dz2 * z2, axis=1))[:, None]",
     "gradient's mean is a sum"),
    (FILE, "x2 = tl.load(x + D // 2,", "x2 = tl.load(x + HALF,", "second half at the padded width"),
    (FILE, "mask = (rows < N)[:, None] & (cols < D // 2)[None, :]",
     "mask = (rows < N)[:, None] & (cols <= D // 2)[None, :]",
     "a column too many"),
    (FILE, "mask = (rows < N)[:, None]", "mask = (rows < N - 1)[:, None]", "last row skipped"),
    (FILE, "angle = (rows % T)[:, None]", "angle = (rows % T // 2 * 2)[:, None]", "odd positions take the even angle"),
    (FILE, "first = tl.program_id(1) * HEADS  # of the H + K heads\n    last = tl.minimum(first + HEADS, H + K)",
     "first = tl.program_id(1) * HEADS\n    last = tl.minimum(first + HEADS, H)", "keys not done"),
    (FILE, "dz1 = tl.load(dz, mask", "dz1 = tl.load(dz + D // 2, mask", "second half of dz twice"),
    (FILE, "own = (rows * heads + h)[:, None] * D + cols\n        z1",
     "own = (rows * heads)[:, None] * D + cols\n        z1",
     "gradient of every head from head 0"),
]
