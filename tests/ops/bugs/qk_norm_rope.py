from harness.mutants import Bug

MODULE = "pyllm.kernels.rope.triton_qk_norm_rope"
TABLE = {"qk_norm_rope": ("qk_norm_rope_fwd", "qk_norm_rope_bwd")}
BUGS = [
    Bug("eps forgotten", "squares / D + eps", "squares / D", quick=True),
    Bug("mean over the rotated elements", "squares / D", "squares / R"),
    Bug("rest not in the sum of squares", "squares += tl.sum(x3 * x3", "squares += 0 * tl.sum(x3 * x3"),
    Bug("offset forgotten", "return w1 + offset, w2 + offset, w3 + offset", "return w1, w2, w3"),
    Bug("offset forgotten in the rest", "w3 + offset", "w3"),
    Bug("rest not scaled by its weight", "y3 = x3 * rstd * w3", "y3 = x3 * rstd"),
    Bug("weights of a pair swapped", "turn(x1 * rstd * w1, x2 * rstd * w2", "turn(x1 * rstd * w2, x2 * rstd * w1"),
    Bug("k normalised with q's weight", "K, K_OUT, RSTD_K, KW,", "K, K_OUT, RSTD_K, QW,"),
    Bug("k's backward with q's weight", "DK, K, DK_OUT, RSTD_K, KW,", "DK, K, DK_OUT, RSTD_K, QW,"),
    Bug("upstream not turned back", "turn(g1, g2, cos, sin, True)", "turn(g1, g2, cos, sin, False)", quick=True),
    Bug("dx without the projection", "mean = dots / D", "mean = dots * 0"),
    Bug("projection of the rotated elements only", "dots += tl.sum(g3 * x3", "dots += 0 * tl.sum(g3 * x3"),
    Bug("dweight of the last heads only", "dw1 += g1 * x1", "dw1 = g1 * x1"),
    Bug("dweight of the scaled gradient", "dw2 += g2 * x2\n        g1 *= w1\n        g2 *= w2\n", "g1 *= w1\n        g2 *= w2\n        dw2 += g2 * x2\n"),
    Bug("dweight of the rest dropped", "dw3 += g3 * x3", "dw3 += 0 * g3 * x3"),
    Bug("last part not summed", "sum_partials(partial, dq_weight", "sum_partials(partial[:-1], dq_weight"),
    Bug("partial sums on top of each other", "program.to(tl.int64) * 2 * D", "program.to(tl.int64) * D"),
    Bug("q's and k's gradients of the weights swapped", "dq_weight, dk_weight)\n", "dk_weight, dq_weight)\n"),
    Bug("programs overlap", "first = program * blocks_per_program", "first = tl.maximum(program * blocks_per_program - 1, 0)"),
    Bug("a program's last tokens dropped", "first + blocks_per_program, all_blocks)", "first + blocks_per_program, all_blocks - 1)"),
    Bug("upstream read with the input's strides", "*dq.stride()[:3], *dk.stride()[:3],", "*q.stride()[:3], *k.stride()[:3],"),
    Bug("heads past the last not masked", "live & (h < HEADS)", "live & (h < 1000000)"),
    Bug("rstd of another batch row", "row = (b * T + t) * HEADS + h\n        x1, x2 = load_pairs(X, source, mask, R // 2, BLOCK_HALF, INTERLEAVED)\n        g1", "row = t * HEADS + h\n        x1, x2 = load_pairs(X, source, mask, R // 2, BLOCK_HALF, INTERLEAVED)\n        g1"),
]  # fmt: skip
