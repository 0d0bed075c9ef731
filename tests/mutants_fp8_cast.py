"""Mistakes in fp8_cast that parity must find."""

FILE = "kernels/fp8_cast.py"
MUTANTS = [
    (FILE, "& 0x7FFFFFFF", "& 0x7FFF0000", "maximum of truncated bits"),
    (FILE, "n, tl.num_programs(0) * BLOCK):", "n // 2, tl.num_programs(0) * BLOCK):", "maximum of half the tensor"),
    (FILE, "tl.load(partial_ptr + part, mask=part < n_parts, other=0)", "tl.load(partial_ptr + part, mask=part < 1, "
     "other=0)", "maximum of the first part only"),
    (FILE, "((bits + CARRY) >> 23), 253)", "(bits >> 23), 253)", "range overflows for mantissas above 1.75"),
    (FILE, "up, down = exponent << 23, (254 - exponent) << 23\n    nan", "up, down = exponent << 23, exponent << 23\n"
     "    nan", "scale not inverted"),
    (FILE, "(x.to(tl.float8e5) if GRADIENT else x.to(tl.float8e4nv))", "x.to(tl.float8e4nv)", "gradients in e4m3"),
    (FILE, "tl.trans(tl.where(inside, codes, 0))", "tl.trans(codes) | 1", "padding is not zero"),
    (FILE, "mask=(k < K)[:, None] & (m < PADDED_M)[None, :]", "mask=(k < K)[:, None] & (m < M)[None, :]",
     "padding not written"),
    (FILE, "at_t = k.to(tl.int64)[:, None] * PADDED_M", "at_t = k.to(tl.int64)[:, None] * M", "stride without padding"),
]
