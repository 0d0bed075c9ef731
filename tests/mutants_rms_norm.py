"""Mistakes in rms_norm that parity must find."""

FILE = "kernels/rms_norm.py"
MUTANTS = [
    (FILE, "r = 1 / tl.sqrt(tl.sum(x * x, axis=1) / C + EPS)", "r = 1 / tl.sqrt(tl.sum(x * x, axis=1) / BLOCK_C + EPS)",
     "mean over the padded width"),
    (FILE, "/ C + EPS)", "/ C)", "no eps"),
    (FILE, "tl.store(y_ptr + at, (x * r[:, None])", "tl.store(y_ptr + at, (x + r[:, None])", "adds instead of scales"),
    (FILE, "y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * r", "y = tl.load(x_ptr + at, mask=mask, "
     "other=0.0).to(tl.float32)", "backward forgets the scale"),
    (FILE, "dx = r * (dy - y *", "dx = r * (dy + y *", "wrong sign of the projection"),
    (FILE, "kernel[(triton.cdiv(N, tile[\"ROWS\"]),)]", "kernel[(N // tile[\"ROWS\"],)]", "last block of rows skipped"),
    (FILE, "(cols < C)[None, :]\n    at = rows[:, None] * C + cols[None, :]\n    x = tl.load", "(cols <= C)[None, :]\n"
     "    at = rows[:, None] * C + cols[None, :]\n    x = tl.load", "mask off by one"),
]
