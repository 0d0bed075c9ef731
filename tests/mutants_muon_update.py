"""Mistakes in muon_update that parity must find."""

FILE = "kernels/muon_update.py"
MUTANTS = [
    (FILE, "buffer += (1 - momentum) * (grad - buffer)", "buffer += momentum * (grad - buffer)", "momentum inverted"),
    (FILE, "(grad + momentum * (buffer - grad))", "buffer", "no Nesterov"),
    (FILE, "wide = update.to(tl.float32)", "wide = buffer", "norm of the buffer instead of the update"),
    (FILE, "tl.store(square_ptr + (first + matrix) * tl.num_programs(0)", "tl.store(square_ptr + matrix "
     "* tl.num_programs(0)", "norms of the second bank over those of the first"),
    (FILE, "base = (first + matrix) * rows * cols\n    if TALL:\n        tl.store", "base = matrix * rows * cols\n"
     "    if TALL:\n        tl.store", "second bank written over the first"),
    (FILE, "batch_ptr + base + c[:, None] * rows + r[None, :], tl.trans(update)",
     "batch_ptr + base + c[:, None] * cols + r[None, :], tl.trans(update)", "wrong stride of a transposed matrix"),
    (FILE, "- lr * scale * o.to", "- lr * o.to", "orientation's scale lost"),
    (FILE, "param * (1 - lr * tl.load(decay_ptr))", "param * (1 - tl.load(decay_ptr))", "decay without learning rate"),
    (FILE, "(c < cols)[None, :]\n    base", "(c <= cols)[None, :]\n    base", "column mask off by one"),
    (FILE, "return r, tl.program_id(0) % tiles_c", "return r, tl.program_id(0) // tiles_c", "wrong tile's columns"),
]
