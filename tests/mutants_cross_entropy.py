"""Mistakes in cross_entropy that parity must find."""

FILE = "kernels/cross_entropy.py"
MUTANTS = [
    (FILE, "total += tl.where(cols < n, tl.exp(-SOFTCAP * q), 0.0)", "total += tl.exp(-SOFTCAP * q)",
     "padding counts in the sum"),
    (FILE, "total += tl.where", "total = tl.where", "only the last block is summed"),
    (FILE, "log_sum + SOFTCAP * q_y", "log_sum - SOFTCAP * q_y", "wrong sign of the target's logit"),
    (FILE, "n = tl.where(target == -1, 0, V)", "n = V + 0 * target", "ignored rows have a gradient"),
    (FILE, "tl.where(cols == target, 1.0, 0.0)) * slope", "tl.where(cols == target, 1.0, 0.0))",
     "gradient forgets the softcap"),
    (FILE, "tl.where(cols == target, 1.0, 0.0)", "tl.where(cols == target + 1, 1.0, 0.0)", "target off by one"),
    (FILE, "for start in range(0, V, BLOCK_V)", "for start in range(0, V - BLOCK_V, BLOCK_V)",
     "gradient skips the last block"),
    (FILE, "dz = upstream *", "dz =", "a row's upstream gradient is lost"),
    (FILE, "u = z * (2 / SOFTCAP)", "u = z / SOFTCAP", "softcap half as steep"),
    (FILE, "beta = 0 if first else 1", "beta = 0", "dW of the last chunk only"),
    (FILE, "targets[chunk], targets if", "targets, targets if", "every chunk has the first chunk's targets"),
]
