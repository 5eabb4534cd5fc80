"""The loss of a linear layer's logits in Triton, without the logits: they live in registers, a tile at a time.

Letters: N rows, V classes, C hidden. A program multiplies BLOCK_N rows of input with one tile of BLOCK_V classes after
the other (accumulated in float32) and folds each tile into the rows' running maximum, sum of exponentials, target
logit and, where asked, label smoothing's sum and the most likely class. Its share of the classes leaves a few numbers
a row; `_combine_kernel` puts the shares of a row together in a fixed order. The formula is in `reference.py`.

Floor: 2NVC FLOPs; bytes (N + V) C b and 24 a row and share, against 8NV for float32 logits written and read.
Source: the idea of Wijmans et al. 2024, arXiv:2411.09009; online softmax: arXiv:1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..extension import as_rows
from ..triton_math import tanh
from ..triton_support import cdiv, lanes, multiprocessors, on_device
from . import reference
from .panels import Options, weight_sum
from .triton_cross_entropy import anchor, combine, split

PROGRAMS = 16  # a multiprocessor, at least; one is resident, so the last round costs at most 1/16
GROUP = 16  # blocks of rows that walk the classes side by side: their input, 16 MB at C = 4096, stays in L2


@triton.jit
def _linear_fwd_kernel(
    X, M, B, T, W, PART, BEST, N, V, C, x_stride, m_stride, m_step, t_stride, ignore_index, softcap, splits, tiles,
    plane,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, PREDICT: tl.constexpr,
    EVEN_C: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program per block of rows and share of `tiles` tiles of classes; M is linear_weight, W the classes' weights."""
    blocks = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (GROUP * splits) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    index = tl.program_id(0) % (GROUP * splits)
    part = index // height
    rows = (first + index % height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end the last row and the last class are read again, which needs no mask in the inner loop.
    source = tl.minimum(rows, N - 1)
    y = tl.load(T + source * t_stride)
    keep = y != ignore_index
    target = tl.where(keep & (y >= 0) & (y < V), y, -1).to(tl.int32)
    hidden = tl.arange(0, BLOCK_C)
    x_start = X + source[:, None] * x_stride + hidden[None, :]
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    target_logit = tl.zeros([BLOCK_N], dtype=tl.float32)
    spread = tl.zeros([BLOCK_N], dtype=tl.float32)
    shares = 0.0
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_class = tl.zeros([BLOCK_N], dtype=tl.int32)
    begin = part * tiles
    end = tl.minimum(begin + tiles, tl.cdiv(V, BLOCK_V))
    if not PREDICT:  # a block of ignored rows, as prompts and padding are, is not computed
        end = tl.where(tl.max(keep.to(tl.int32), axis=0) > 0, end, begin)
    for tile in range(begin, end):
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        x_at = x_start
        m_at = M + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * m_stride + hidden[:, None] * m_step
        logits = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            if EVEN_C:
                x = tl.load(x_at)
                m = tl.load(m_at)
            else:
                x = tl.load(x_at, mask=hidden[None, :] < C - c, other=0.0)
                m = tl.load(m_at, mask=hidden[:, None] < C - c, other=0.0)
            logits = tl.dot(x, m, logits, input_precision="ieee")
            x_at += BLOCK_C
            m_at += BLOCK_C * m_step
        mask = (cols < V)[None, :]
        if BIAS:
            logits += tl.load(B + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        if PREDICT:
            tile_best, tile_class = tl.max(tl.where(mask, logits, float("-inf")), axis=1, return_indices=True)
            best_class = tl.where(tile_best > best, tile * BLOCK_V + tile_class, best_class)
            best = tl.maximum(best, tile_best)
        if CAP:
            logits = softcap * tanh(logits / softcap)
        target_logit += tl.sum(tl.where(cols[None, :] == target[:, None], logits, 0.0), axis=1)
        logits = tl.where(mask, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        shift = anchor(new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        if SMOOTH:
            w = tl.where(cols < V, 1.0, 0.0)
            if WEIGHTED:
                w = tl.load(W + cols, mask=cols < V, other=0.0).to(tl.float32)
            spread += shares * (shift - anchor(top))
            spread += tl.sum(w[None, :] * tl.where(mask, shift[:, None] - logits, 0.0), axis=1)
            shares += tl.sum(w, axis=0)
        top = new_top
    inside = rows < N
    at = PART + part.to(tl.int64) * N + rows
    tl.store(at, top, mask=inside)
    tl.store(at + plane, total, mask=inside)
    tl.store(at + 2 * plane, target_logit, mask=inside)
    if SMOOTH:
        tl.store(at + 3 * plane, spread, mask=inside)
        tl.store(at + 4 * plane, tl.zeros([BLOCK_N], dtype=tl.float32) + shares, mask=inside)
    if PREDICT:
        tl.store(at + 5 * plane, best, mask=inside)
        tl.store(BEST + part.to(tl.int64) * N + rows, best_class, mask=inside)


def config(arch: int, itemsize: int, busy: bool, lanes: int = 32) -> tuple[int, int, int, int, int]:
    """(BLOCK_N, BLOCK_V, BLOCK_C, num_warps, stages) for a GPU of compute capability `arch`, 80 or 90; 0: interpreter.

    Per byte loaded a tile of 128 x 128 computes 64 FLOPs, one of 128 x 256 85; only Hopper and later have the registers
    (wgmma) or the memory (tcgen05) for the wide one, and need it. `busy` (label smoothing, softcap or predictions)
    wants registers of its own, which the wide one doesn't leave. Rows of BLOCK_C are 128 bytes, the swizzle that wgmma
    reads without conflicts; stages fill shared memory, of which AMD has 64 KB. float32 has no tensor cores to feed.
    """
    if lanes == 64:
        return 128, 128, 64 // itemsize, 8, 2
    if arch == 0:
        return 16, 32, 16, 4, 1
    if itemsize == 4:
        return 64, 64, 32, 4, 3
    if arch < 90:
        return 128, 128, 32, 8, 4
    return 128, 128 if busy else 256, 64, 8, 4


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_predictions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, predictions) of every row; predictions are empty unless asked for."""
    V, C = linear_weight.shape
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    reference.check_targets(target, V, ignore_index)
    loss = input.new_empty(target.shape, dtype=torch.float32)
    lse = input.new_empty(target.shape, dtype=torch.float32)
    predictions = target.new_empty(target.shape if return_predictions else 0, dtype=torch.int64)
    rows = target.numel()
    if rows == 0:
        return loss, lse, predictions
    x, x_stride = as_rows(input)
    flat = target.reshape(-1)
    bias = None if linear_bias is None else linear_bias.contiguous()
    weight = None if weight is None else weight.contiguous()
    busy = return_predictions or label_smoothing != 0 or softcap != 0
    block_n, block_v, block_c, warps, stages = config(_arch(x.device), x.element_size(), busy, lanes(x.device))
    blocks = cdiv(rows, block_n)
    splits, tiles = split(blocks, cdiv(V, block_v), 1, PROGRAMS * multiprocessors(x.device))
    part = loss.new_empty((6, splits, rows))
    best = flat.new_empty((splits, rows), dtype=torch.int32) if return_predictions else flat
    with on_device(x):
        _linear_fwd_kernel[(blocks * splits,)](
            x, linear_weight, bias if bias is not None else loss, flat, weight if weight is not None else loss, part,
            best, rows, V, C, x_stride, linear_weight.stride(0), linear_weight.stride(1), flat.stride(0), ignore_index,
            softcap, splits, tiles, splits * rows,
            BIAS=bias is not None, WEIGHTED=weight is not None, SMOOTH=label_smoothing != 0, CAP=softcap != 0,
            PREDICT=return_predictions, EVEN_C=C % block_c == 0, GROUP=GROUP, BLOCK_N=block_n, BLOCK_V=block_v,
            BLOCK_C=block_c, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    wanted = predictions.view(-1) if return_predictions else None
    wsum = weight_sum(weight, options)
    combine(part, best, flat, weight, wsum, V, options, loss.view(-1), lse.view(-1), wanted)
    return loss, lse, predictions
