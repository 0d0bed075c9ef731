"""Mistakes in linear_relu2 that parity must find."""

FILE = "kernels/linear_relu2.py"
MUTANTS = [
    (FILE, "tl.where(acc < 0, 0.0, acc * acc)", "tl.where(acc < 0, 0.0, acc)", "does not square"),
    (FILE, "tl.where(acc < 0, 0.0, acc * acc)", "acc * acc", "no relu"),
    (FILE, "acc * 2 * tl.sqrt(kept.to(tl.float32))", "acc * tl.sqrt(kept.to(tl.float32))",
     "the derivative's 2 is missing"),
    (FILE, "acc * 2 * tl.sqrt(kept.to(tl.float32))", "acc * 2 * kept.to(tl.float32)", "no square root of post"),
    (FILE, "for k in range(0, K, BLOCK_K)", "for k in range(0, K - BLOCK_K + 1, BLOCK_K)", "last block of K skipped"),
    (FILE, "rows = tl.minimum(tiles_m - first, GROUP_M)", "rows = GROUP_M", "last group of tiles taken as a full one"),
    (FILE, "tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)", "tl.program_id(0), tl.num_programs(0), "
     "tl.num_programs(0)", "one tile per program only"),
    (FILE, "_finish(acc_1, post, out, m, n + BLOCK_N // 2,", "_finish(acc_1, post, out, m, n,", "second half over the "
     "first"),
    (FILE, "acc = tl.dot(left, right, acc,", "acc = tl.dot(left, right, tl.zeros_like(acc),", "does not accumulate"),
    (FILE, "torch.mm(dy.t(), post).to(proj.dtype)", "torch.mm(dy.t(), dpre).to(proj.dtype)",
     "gradient of proj from dpre"),
]
