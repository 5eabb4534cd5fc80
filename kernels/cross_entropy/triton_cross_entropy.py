"""Cross-entropy of logits in Triton. The formula and its gradient are in `reference.py`.

Letters: N rows, V classes; logits are read through a row stride, dlogits is contiguous. Row offsets are 64-bit from the
row index on.

Forward: one pass. A program walks a row in tiles and keeps a running maximum `top`, with a vector of sums of
exp(x - top) that is added up once at the end (Milakov and Gimelshein 2018, arXiv:1805.02867). The loss is taken from
top - x_y, not from lse - x_y, which would cancel where logits lie far from zero. Backward: p = exp(x - lse), one pass.
With few rows a row is shared by several programs; the forward's parts then meet in a second small kernel, in a fixed
order. Ignored rows are neither read forward nor backward.

Floor (bytes for N x V logits of size b): forward NVb, backward 2NVb. A row's target, loss and lse are 16 bytes besides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..extension import as_rows
from ..triton_math import tanh
from ..triton_support import cdiv, lanes, multiprocessors, on_device, power_of_2
from . import reference
from .panels import Options, weight_sum

TILE = 4096
PROGRAMS = 8  # a multiprocessor, at least: about four are resident, so that the last round is at most half empty
COMBINE_ROWS = 64


@triton.jit
def anchor(top):
    """A finite number to subtract where every logit so far is -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def finished(
    top, total, target_logit, spread, y, W, WSUM, V, ignore_index, smoothing, z_loss,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """(loss, lse) from a row's sums: total of exp(x - top), spread of w_c (top - x_c)."""
    keep = y != ignore_index
    inside = keep & (y >= 0) & (y < V)
    log_total = tl.log(tl.where(total == 0, float("nan"), total))  # a row of nothing but -inf
    loss = (anchor(top) - target_logit) + log_total
    if WEIGHTED:
        loss *= tl.load(W + y, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        shares = tl.load(WSUM) if WEIGHTED else V
        loss = (1 - smoothing) * loss + smoothing / V * (spread + shares * log_total)
    lse = anchor(top) + log_total
    if Z:
        loss += z_loss * lse * lse
    loss = tl.where(inside, loss, float("nan"))
    return tl.where(keep, loss, 0.0), tl.where(keep, lse, 0.0)


@triton.jit
def _cross_entropy_fwd_kernel(
    X, B, T, W, WSUM, LOSS, LSE, PREDICTED, PART, BEST, N, V, x_stride, t_stride, ignore_index, smoothing, z_loss,
    softcap, splits, share, plane,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr,
    PREDICT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program row * splits + part: `share` classes of a row, a multiple of BLOCK_V."""
    row = tl.program_id(0).to(tl.int64) // splits
    part = tl.program_id(0) % splits
    y = tl.load(T + row * t_stride)
    keep = y != ignore_index
    inside = keep & (y >= 0) & (y < V)
    X += row * x_stride
    target_logit = tl.load(X + y, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        target_logit += tl.load(B + y, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        target_logit = softcap * tanh(target_logit / softcap)
    begin = part * share
    end = tl.minimum(begin + share, V)
    if not PREDICT:
        end = tl.where(keep, end, begin)
    top = float("-inf")
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    spread = 0.0
    shares = 0.0
    best = float("-inf")
    best_class = begin
    for start in tl.range(begin, end, BLOCK_V, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < V
        x = tl.load(X + cols, mask=mask, other=float("-inf")).to(tl.float32)
        if BIAS:
            x += tl.load(B + cols, mask=mask, other=0.0).to(tl.float32)
        if PREDICT:
            tile_best, tile_class = tl.max(x, axis=0, return_indices=True)
            best_class = tl.where(tile_best > best, start + tile_class, best_class)
            best = tl.maximum(best, tile_best)
        if CAP:
            x = tl.where(mask, softcap * tanh(x / softcap), float("-inf"))
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - anchor(new_top)) + tl.exp(x - anchor(new_top))
        if SMOOTH:
            w = tl.where(mask, 1.0, 0.0)
            if WEIGHTED:
                w = tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)
            spread += shares * (anchor(new_top) - anchor(top))
            spread += tl.sum(w * tl.where(mask, anchor(new_top) - x, 0.0), axis=0)
            shares += tl.sum(w, axis=0)
        top = new_top
    total = tl.sum(total, axis=0)
    if SPLIT:
        PART += row + part * N
        tl.store(PART, top)
        tl.store(PART + plane, total)
        tl.store(PART + 2 * plane, tl.where(part == 0, target_logit, 0.0))
        if SMOOTH:
            tl.store(PART + 3 * plane, spread)
            tl.store(PART + 4 * plane, shares)
        if PREDICT:
            tl.store(PART + 5 * plane, best)
            tl.store(BEST + row + part * N, best_class)
    else:
        loss, lse = finished(
            top, total, target_logit, spread, y, W, WSUM, V, ignore_index, smoothing, z_loss, WEIGHTED, SMOOTH, Z
        )
        tl.store(LOSS + row, loss)
        tl.store(LSE + row, lse)
        if PREDICT:
            tl.store(PREDICTED + row, best_class.to(tl.int64))


@triton.jit
def _combine_kernel(
    PART, BEST, T, W, WSUM, LOSS, LSE, PREDICTED, N, V, t_stride, ignore_index, smoothing, z_loss, splits, plane,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, PREDICT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The parts of BLOCK_N rows, in order.

    PART (6, splits, N), planes apart by `plane`: top, total, target logit, spread, the weights in it, best logit.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < N
    at = PART + rows
    best_at = BEST + rows
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    target_logit = tl.zeros([BLOCK_N], dtype=tl.float32)
    spread = tl.zeros([BLOCK_N], dtype=tl.float32)
    shares = tl.zeros([BLOCK_N], dtype=tl.float32)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_class = tl.zeros([BLOCK_N], dtype=tl.int32)
    for _ in range(splits):
        part_top = tl.load(at, mask=mask, other=0.0)
        new_top = tl.maximum(top, part_top)
        grown = tl.exp(part_top - anchor(new_top))
        total = total * tl.exp(top - anchor(new_top)) + tl.load(at + plane, mask=mask, other=0.0) * grown
        target_logit += tl.load(at + 2 * plane, mask=mask, other=0.0)
        if SMOOTH:
            part_shares = tl.load(at + 4 * plane, mask=mask, other=0.0)
            spread += shares * (anchor(new_top) - anchor(top)) + tl.load(at + 3 * plane, mask=mask, other=0.0)
            spread += part_shares * (anchor(new_top) - anchor(part_top))
            shares += part_shares
        if PREDICT:
            part_best = tl.load(at + 5 * plane, mask=mask, other=0.0)
            part_class = tl.load(best_at, mask=mask, other=0)
            best_class = tl.where(part_best > best, part_class, best_class)
            best = tl.maximum(best, part_best)
        top = new_top
        at += N
        best_at += N
    y = tl.load(T + rows * t_stride, mask=mask, other=0)
    loss, lse = finished(
        top, total, target_logit, spread, y, W, WSUM, V, ignore_index, smoothing, z_loss, WEIGHTED, SMOOTH, Z
    )
    tl.store(LOSS + rows, loss, mask=mask)
    tl.store(LSE + rows, lse, mask=mask)
    if PREDICT:
        tl.store(PREDICTED + rows, best_class.to(tl.int64), mask=mask)


@triton.jit
def _cross_entropy_bwd_kernel(
    DLOSS, X, B, LSE, T, W, WSUM, DX, V, first, cols, x_stride, dx_stride, t_stride, dloss_stride, ignore_index,
    smoothing, z_loss, softcap, splits, share,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program row * splits + part: `share` columns of a row, which are the classes from `first` on."""
    row = tl.program_id(0).to(tl.int64) // splits
    part = tl.program_id(0) % splits
    y = tl.load(T + row * t_stride)
    keep = y != ignore_index
    inside = keep & (y >= 0) & (y < V)
    dloss = tl.load(DLOSS + row * dloss_stride).to(tl.float32)
    dloss = tl.where(inside, dloss, float("nan"))
    lse = tl.load(LSE + row)
    at_target = dloss
    if WEIGHTED:
        at_target *= tl.load(W + y, mask=inside, other=0.0).to(tl.float32)
    scale = at_target
    everywhere = 0.0
    if SMOOTH:
        at_target *= 1 - smoothing
        everywhere = smoothing / V * dloss
        scale = at_target + everywhere * (tl.load(WSUM) if WEIGHTED else V)
    if Z:
        scale += 2 * z_loss * lse * dloss
    column = tl.where(inside & (y >= first) & (y < first + cols), y - first, -1).to(tl.int32)
    X += row * x_stride
    DX += row * dx_stride
    begin = part * share
    for start in tl.range(begin, tl.minimum(begin + share, cols), BLOCK_V, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_V)
        mask = c < cols
        x = tl.load(X + c, mask=mask & keep, other=float("-inf")).to(tl.float32)
        if BIAS:
            x += tl.load(B + first + c, mask=mask & keep, other=0.0).to(tl.float32)
        if CAP:
            bent = tanh(x / softcap)
            x = softcap * bent
        grad = scale * tl.exp(x - lse) - tl.where(c == column, at_target, 0.0)
        if SMOOTH:
            w = 1.0
            if WEIGHTED:
                w = tl.load(W + first + c, mask=mask & keep, other=0.0).to(tl.float32)
            grad -= everywhere * w
        if CAP:
            grad *= 1 - bent * bent
        tl.store(DX + c, tl.where(keep, grad, 0.0).to(DX.dtype.element_ty), mask=mask)


def config(cols: int, lanes: int = 32) -> tuple[int, int, int]:
    """(BLOCK_V, num_warps, stages of the loop over tiles) for rows of `cols`; `lanes` of a warp.

    A thread has 16 elements of a tile and their sums, which leaves registers for four programs of 256 threads to be
    resident. Longer rows are looped over with the next two tiles on their way to shared memory, 48 KB in float32: by
    Little's law 20 KB a multiprocessor in flight keep an H100's memory busy, the four have twice that in bfloat16.
    """
    block = min(TILE, power_of_2(max(cols, 16)))
    return block, max(1, min(block // 16, 256) // lanes), 3 if cols > block else 1


def split(rows: int, cols: int, block: int, programs: int) -> tuple[int, int]:
    """(splits, share): how many programs have a row, and how many columns each, so that `programs` are at work."""
    tiles = cdiv(cols, block)
    share = cdiv(tiles, max(1, min(tiles, cdiv(programs, max(rows, 1)))))
    return cdiv(tiles, share), share * block


def forward(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    wsum: Tensor | None,
    options: Options,
    loss: Tensor,
    lse: Tensor,
    predictions: Tensor | None = None,
) -> None:
    """Writes loss and lse (and predictions), (N,) and dense, of logits (..., V) with targets (N,) of any stride."""
    rows, V = target.shape[0], logits.shape[-1]
    logits, x_stride = as_rows(logits)
    ignore_index, smoothing, z_loss, softcap = options
    flags = dict(WEIGHTED=weight is not None, SMOOTH=smoothing != 0, Z=z_loss != 0, PREDICT=predictions is not None)
    block, warps, stages = config(V, lanes(logits.device))
    splits, share = split(rows, V, block, PROGRAMS * multiprocessors(logits.device))
    part = loss.new_empty((6, splits, rows)) if splits > 1 else loss
    best = target.new_empty((splits, rows), dtype=torch.int32) if splits > 1 and predictions is not None else target
    given = weight if weight is not None else loss
    summed = wsum if wsum is not None else loss
    predicted = predictions if predictions is not None else target
    with on_device(logits):
        _cross_entropy_fwd_kernel[(rows * splits,)](
            logits, bias if bias is not None else loss, target, given, summed, loss, lse, predicted, part, best, rows,
            V, x_stride, target.stride(0), ignore_index, smoothing, z_loss, softcap, splits, share,
            splits * rows, BIAS=bias is not None, CAP=softcap != 0, SPLIT=splits > 1, BLOCK_V=block, STAGES=stages,
            num_warps=warps, **flags,
        )  # fmt: skip
    if splits > 1:
        combine(part, best, target, weight, wsum, V, options, loss, lse, predictions)


def combine(
    part: Tensor,
    best: Tensor,
    target: Tensor,
    weight: Tensor | None,
    wsum: Tensor | None,
    V: int,
    options: Options,
    loss: Tensor,
    lse: Tensor,
    predictions: Tensor | None,
) -> None:
    """Writes loss and lse (and predictions) from the parts that the programs of a row left."""
    _, splits, rows = part.shape
    ignore_index, smoothing, z_loss, _ = options
    with on_device(part):
        _combine_kernel[(cdiv(rows, COMBINE_ROWS),)](
            part, best, target, weight if weight is not None else loss, wsum if wsum is not None else loss, loss, lse,
            predictions if predictions is not None else target, rows, V, target.stride(0), ignore_index, smoothing,
            z_loss, splits, splits * rows, WEIGHTED=weight is not None, SMOOTH=smoothing != 0, Z=z_loss != 0,
            PREDICT=predictions is not None, BLOCK_N=COMBINE_ROWS, num_warps=COMBINE_ROWS // lanes(part.device),
        )  # fmt: skip


def backward(
    dloss: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    target: Tensor,
    weight: Tensor | None,
    wsum: Tensor | None,
    options: Options,
    dlogits: Tensor,
    first: int = 0,
    V: int | None = None,
) -> None:
    """Writes dlogits of the classes `first` on that logits (..., cols) are of; dloss, lse and target are (N,)."""
    rows, cols = target.shape[0], logits.shape[-1]
    logits, x_stride = as_rows(logits)
    ignore_index, smoothing, z_loss, softcap = options
    block, warps, stages = config(cols, lanes(logits.device))
    splits, share = split(rows, cols, block, PROGRAMS * multiprocessors(logits.device))
    with on_device(logits):
        _cross_entropy_bwd_kernel[(rows * splits,)](
            dloss, logits, bias if bias is not None else lse, lse, target, weight if weight is not None else lse,
            wsum if wsum is not None else lse, dlogits, cols if V is None else V, first, cols, x_stride, cols,
            target.stride(0), dloss.stride(0), ignore_index, smoothing, z_loss, softcap, splits, share,
            BIAS=bias is not None, WEIGHTED=weight is not None, SMOOTH=smoothing != 0, Z=z_loss != 0, CAP=softcap != 0,
            BLOCK_V=block, STAGES=stages, num_warps=warps,
        )  # fmt: skip


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of every row, float32."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    reference.check_targets(target, logits.shape[-1], ignore_index)
    loss = logits.new_empty(target.shape, dtype=torch.float32)
    lse = logits.new_empty(target.shape, dtype=torch.float32)
    if target.numel():
        weight = None if weight is None else weight.contiguous()
        flat, wsum = target.reshape(-1), weight_sum(weight, options)
        forward(logits, None, flat, weight, wsum, options, loss.view(-1), lse.view(-1))
    return loss, lse


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """dlogits, contiguous, in the logits' dtype."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    dlogits = logits.new_empty(logits.shape)
    if target.numel():
        weight = None if weight is None else weight.contiguous()
        flat, wsum = target.reshape(-1), weight_sum(weight, options)
        backward(
            dloss.reshape(-1), logits, None, lse.contiguous().view(-1), flat, weight, wsum, options, dlogits
        )  # fmt: skip
    return dlogits
