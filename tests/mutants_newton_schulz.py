"""Mistakes in newton_schulz that parity must find."""

FILE = "kernels/newton_schulz.py"
MUTANTS = [
    (FILE, "for start in range(0, k, BLOCK_K)", "for start in range(0, k - BLOCK_K + 1, BLOCK_K)",
     "X X^T skips an unfinished last block"),
    (FILE, "tl.store(out_ptr + there, mirrored.to", "tl.store(out_ptr + there, acc.to", "mirror image not transposed"),
    (FILE, "alpha = alpha * scale * scale", "alpha = alpha * scale", "norm divides X X^T once instead of twice"),
    (FILE, "acc += beta * tl.load(add_ptr", "acc -= beta * tl.load(add_ptr", "wrong sign of b A"),
    (FILE, "steps = steps[:-size]", "steps = steps[:-2]", "a single step drops the one before it"),
    (FILE, "i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)\n    return i, t - i * (i + 1) // 2",
     "return i, t - i * (i - 1) // 2", "wrong column of a triangle's tile"),
    (FILE, "tl.where(rows[:, None] == cols[None, :], diagonal, 0.0)", "diagonal", "a I added everywhere"),
    (FILE, "gram = symmetric(first, symmetric(gram, first))", "gram = symmetric(gram, first)",
     "Gram form applies the polynomial on one side only"),
    (FILE, "acc += a * tl.load(x_ptr", "acc += tl.load(x_ptr", "a X without a"),
    (FILE, "rows = tl.program_id(0) % tiles_m * BLOCK_M", "rows = tl.program_id(0) // tiles_m * BLOCK_M",
     "rows of the product by the column of the tile"),
    (FILE, "x = tl.load(x_at + start * n,", "x = tl.load(x_at + start,", "wrong stride along the rows of X"),
    (FILE, "x, norm = _advance(x, group, norm), None", "x = _advance(x, group, norm)",
     "every step divides by the norm"),
    (FILE, "acc = acc / (tl.load(norm_ptr + batch) + EPS)", "acc = acc / (tl.load(norm_ptr) + EPS)",
     "every matrix divided by the first one's norm"),
]
