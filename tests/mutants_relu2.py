"""Mistakes in relu2 that parity must find."""

FILE = "kernels/relu2.py"
MUTANTS = [
    (FILE, "tl.where(x < 0, 0.0, x * x)", "tl.where(x < 0, 0.0, x)", "does not square"),
    (FILE, "tl.where(x < 0, 0.0, x * x)", "x * x", "no relu"),
    (FILE, "tl.where(x <= 0, 0.0, 2 * x * dy)", "tl.where(x <= 0, 0.0, x * dy)", "the derivative's 2 is missing"),
    (FILE, "tl.where(x <= 0, 0.0, 2 * x * dy)", "tl.where(x >= 0, 0.0, 2 * x * dy)", "gradient of the other half"),
    (FILE, "kernel[(triton.cdiv(out.numel(), tile[\"BLOCK\"]),)]", "kernel[(out.numel() // tile[\"BLOCK\"],)]",
     "last block skipped"),
    (FILE, "tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)",
     "tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at <= n)", "writes one cell too many"),
]
