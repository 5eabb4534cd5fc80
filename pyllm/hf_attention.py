"""pyllm's attention under transformers' interface: any of its models runs on it as `attn_implementation="pyllm"`.

transformers looks up two functions by that name, one that makes a forward pass's mask and one that every layer calls.
Here the first makes no mask where causality, a window and padding say it all, because the kernels know these; what no
kernel knows (masks of any other form, dropout, a bias on the scores, a static cache's single steps) goes, with the mask
that it needs, to torch's scaled_dot_product_attention, as it would under transformers' own "sdpa".

Names in shapes: B batch, T queries, S keys, H query heads, Hkv key-value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kernels import attention, attention_decode
from .kernels.dispatch import needs_grad
from .masked import row_mask

NAME = "pyllm"


def register() -> None:
    """Teach transformers the name "pyllm". To do it twice changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**call: Any) -> Tensor | None:
    """The mask of a forward pass, called by transformers once for all layers of a kind, with keywords.

    Returns:
        None: each of the T queries sees the keys up to its own, the last query on the last key, in its window if the
            layer has one. (B, T) bool: the same among the first T keys but for padding, where it is False; keys behind
            have not been written yet (the prompt of a static cache). (1, T) bool, all True: the same, without padding.
            (B, 1, T, S) bool: anything else, True to attend.
    """
    from transformers.masking_utils import sdpa_mask

    layout = _layout(call)
    if layout is None:
        return sdpa_mask(**call)
    T, start, S, offset = layout
    padding = call.get("attention_mask")
    if padding is None:
        real = None
    elif padding.shape[1] < start + T:
        return sdpa_mask(**call)  # which takes what the mask doesn't reach for padding
    elif torch.compiler.is_compiling() or torch.jit.is_tracing() or type(padding) is not Tensor:
        return sdpa_mask(**call)  # whether there is padding can't be asked
    else:
        real = padding[:, offset : offset + S].bool()
        real = None if bool(real[:, : start - offset + T].all()) else real
    if start + T == offset + S and real is None:
        return None
    if start == offset == 0:
        if real is None:
            return torch.ones(1, T, dtype=torch.bool, device=call.get("device", "cpu"))
        packs = call.get("local_size") is None or _in_one_piece(real)
        if packs and (S == T or (S > T and len(real) > 1)):  # (1, n) with n < S says that there is no padding
            return real[:, :T]
    return sdpa_mask(**call)


def _layout(call: dict[str, Any]) -> tuple[int, int, int, int] | None:
    """(T, position of the first query, S, position of the first key), or None where the pattern isn't simply causal."""
    config, window = call.get("config"), call.get("local_size")
    if not call.get("allow_is_causal_skip", True):
        return None  # packed by position_ids, overlaid by a function of the user's, bidirectional
    if window is not None and window != getattr(config, "sliding_window", None):
        return None  # chunks
    if "cache_position" in call:  # transformers before 5.3
        T, start = call["cache_position"].shape[0], call["cache_position"][0]
    else:
        T, start = call["q_length"], call.get("q_offset", 0)
    if isinstance(start, Tensor):  # of a static cache
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        start = int(start)
    return T, start, call["kv_length"], int(call.get("kv_offset", 0))


def _in_one_piece(real: Tensor) -> bool:
    """Whether no row has padding between its tokens: a window counts it, packed rows would not."""
    starts = real[:, 1:] & ~real[:, :-1]
    return bool((starts.sum(1) + real[:, 0] <= 1).all())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, called by transformers' modules.

    Args:
        module: the layer's attention; read are `is_causal` and, by "sdpa", `num_key_value_groups`.
        query: (B, H, T, D).  key, value: (B, Hkv, S, D), cached ones included; any strides, never repeated in memory.
        attention_mask: what `attention_mask` above returns, or a user's (B or 1, 1 or H, T, S), bool or additive.
        scaling: of the scores, 1 / sqrt(D) unless given.
        dropout: of the weights; the kernels have none.
        sliding_window: keys that a query sees, its own included. With a (B, 1, T, S) mask it is in the mask.
        softcap: c replaces every score s by c tanh(s / c).
        is_causal: instead of the module's.
        s_aux: (H,) sinks: a logit per head that joins the softmax's sum.
        backend: what runs the kernels; None to choose.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, where documents packed into B * T tokens begin and end, instead of
            any mask; `output_attentions` computes the weights as well, in eager PyTorch; others are not read.
    Returns:
        (B, T, H, D), 0 at padding; and the weights (B, H, T, S) if they were asked for.
    Raises:
        ValueError: softcap or sinks together with what only torch's attention has.
    """
    T, S = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] < S:
        S = attention_mask.shape[1]
        key, value = key[:, :, :S], value[:, :, :S]
        attention_mask = None if len(attention_mask) == 1 else attention_mask
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if kwargs.get("output_attentions"):
        mask = _dense(attention_mask, T, S, sliding_window, is_causal, query)
        mask = _within_documents(mask, query, key, cu_q, cu_k)
        return _with_weights(query, key, value, mask, scaling, softcap, s_aux, dropout)
    how: dict[str, Any]
    reasons = []
    if attention_mask is not None and attention_mask.dim() != 2 and cu_q is None:
        reasons.append("this attention_mask")
    if dropout:
        reasons.append("dropout")
    if kwargs.get("position_bias") is not None:
        reasons.append("position_bias")
    if kwargs.get("cache") is not None:
        reasons.append("a paged cache")
    if value.shape[-1] != query.shape[-1]:
        reasons.append("values of another width than keys")
    if reasons:
        if softcap or s_aux is not None:
            what = "softcap" if softcap else "s_aux (sinks)"
            raise ValueError(
                f'attn_implementation="{NAME}": {what} is not supported together with {" and ".join(reasons)}; '
                'use attn_implementation="eager"'
            )
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if kwargs.get("cache") is None:
            attention_mask = _dense(attention_mask, T, S, sliding_window, is_causal, query)
            attention_mask = _within_documents(attention_mask, query, key, cu_q, cu_k)
        # With a mask transformers 5 sets is_causal aside, 4 adds it to the mask.
        causal = is_causal and attention_mask is None
        how = {"dropout": dropout, "scaling": scaling, "is_causal": causal, **kwargs}
        dtype = query.dtype
        if query.device.type == "cpu" and kwargs.get("cache") is None:
            # On CPUs it rounds the weights to half precision; the kernels don't.
            wide = torch.promote_types(dtype, torch.float32)
            query, key, value = query.to(wide), key.to(wide), value.to(wide)
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.to(wide)
        out: Any
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **how)
        return out.to(dtype), None

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, T, H, D), (B, S, Hkv, D)
    # A window without causality is always in a mask.
    how = {"softmax_scale": scaling, "softcap": softcap or 0.0, "backend": backend}
    how["window"] = sliding_window if is_causal else None
    if cu_q is not None:
        return _packed(q, k, v, cu_q, cu_q if cu_k is None else cu_k, causal=is_causal, sinks=s_aux, **how), None
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, causal=is_causal, sinks=s_aux, **how), None
    if is_causal and T < S and s_aux is None and not needs_grad(q, k, v):
        lengths = torch.full((q.shape[0],), S, dtype=torch.int32, device=q.device)
        return attention_decode(q, k, v, lengths, **how), None
    out = attention(q, k, v, causal=is_causal, sinks=s_aux, **how)
    return out, None


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **how: Any) -> Tensor:
    """Attention within documents that lie end to end in the B * T tokens."""
    cu: dict[str, Any] = {"cu_seqlens_q": cu_q.to(torch.int32), "cu_seqlens_k": cu_k.to(torch.int32)}
    out: Any = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **cu, **how)
    return out.view(q.shape)


def _padded(q: Tensor, k: Tensor, v: Tensor, real: Tensor, **how: Any) -> Tensor:
    """Attention among the tokens where real (B, T) is True: packed end to end, so that padding costs nothing."""
    where = real.flatten().nonzero().squeeze(1)  # (total,)
    cu = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    packed = [x.flatten(0, 1).index_select(0, where) for x in (q, k, v)]  # (total, heads, D)
    out: Any = attention(*packed, cu_seqlens_q=cu, cu_seqlens_k=cu, **how)
    return q.new_zeros(q.shape).flatten(0, 1).index_copy(0, where, out).view(q.shape)


def _dense(mask: Tensor | None, T: int, S: int, window: int | None, causal: bool, query: Tensor) -> Tensor | None:
    """The mask as (B or 1, 1 or H, T, S), bool or additive; None where every query sees every key."""
    if mask is not None and mask.dim() == 4:
        return mask
    full = None
    if causal:
        start = torch.full((1,), S - T, device=query.device)
        full = row_mask(start, T, S, window)  # (1, 1, T, S)
    if mask is None:
        return full
    padding = mask[:, None, None, :]
    return padding.expand(-1, -1, T, -1) if full is None else full & padding


def _within_documents(
    mask: Tensor | None, query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> Tensor | None:
    """The dense mask, and nothing between documents."""
    if cu_q is None:
        return mask
    (B, _, T, _), S = query.shape, key.shape[2]
    # Which document each token is of: searchsorted counts the ends at or before it.
    of_q, of_k = (
        torch.searchsorted(cu[1:].contiguous(), torch.arange(B * n, device=cu.device, dtype=cu.dtype), right=True)
        for cu, n in ((cu_q, T), (cu_q if cu_k is None else cu_k, S))
    )
    same = (of_q.view(B, T, 1) == of_k.view(B, 1, S))[:, None]
    if mask is None:
        return same
    return same & mask if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention in eager PyTorch, for the weights' sake."""
    B, H, T, D = query.shape
    groups = H // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * (D**-0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, T, 1)), dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = torch.dropout(weights if sinks is None else weights[..., :-1], dropout, train=dropout > 0)
    out = weights @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), weights
