import torch
from harness.machines import DEVICE
from harness.mutants import Bug

from pyllm.kernels import OPS, cross_entropy
from pyllm.kernels.cross_entropy import reference


def inputs(N, V, **options):
    made = reference.cross_entropy_inputs((N, V), dtype=torch.float32, device=DEVICE, ignored=0.2, **options)
    return {**made, "logits": made["logits"].requires_grad_()}


def same(given, backend):
    mine, theirs = cross_entropy(**given, backend=backend), cross_entropy(**given, backend="eager")
    upstream = torch.rand(mine.shape, device=DEVICE)
    for a, b in zip((mine, *torch.autograd.grad(mine, given["logits"], upstream)),
                    (theirs, *torch.autograd.grad(theirs, given["logits"], upstream)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def paths(backend):
    """Several tiles a program, and several programs a row; every option; rows far apart; targets that are no class."""
    for N, V in ((26, 4099), (3, 9001)):
        for options in (
            dict(reduction="none", weighted=True, label_smoothing=0.2, z_loss=0.01),
            dict(reduction="sum", label_smoothing=0.2, softcap=2.0, shift=3.0),
        ):
            given = inputs(N, V, **options)
            given["logits"].data[0] = torch.linspace(-30, 30, V)  # the maximum grows with every tile
            given["target"][0] = V - 1
            same(given, backend)
    logits = (torch.randn(4, 50, device=DEVICE) * 64).round() / 64
    given = dict(target=torch.arange(4, device=DEVICE), reduction="none", backend=backend)
    torch.testing.assert_close(cross_entropy(logits + 1e4, **given), cross_entropy(logits, **given))
    given = dict(target=given["target"], reduction="none", softcap=1000.0)
    exact = cross_entropy(logits.double(), **given, backend="eager").float()
    torch.testing.assert_close(cross_entropy(logits, **given, backend=backend), exact, rtol=5e-7, atol=0)
    apart = 2**30 + 64  # a 32-bit stride, whose double is not
    logits = torch.empty(2 * apart + 50, dtype=torch.float16, device=DEVICE).as_strided((3, 50), (apart, 1))
    logits.copy_(torch.randn(3, 50))
    target = torch.tensor([3, 4, 5], device=DEVICE)
    same(dict(logits=logits.requires_grad_(), target=target, reduction="none"), backend)
    given = inputs(9, 50, reduction="none")
    given["target"][:] = torch.tensor([-100, *range(8)])
    given["logits"].data[0] = float("nan")
    loss = cross_entropy(**given, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), given["logits"])
    assert loss[0] == 0
    assert not grad[0].any()
    impl = OPS["cross_entropy"].op.impls[backend]
    wrong = given["target"].masked_fill(given["target"] == 5, 50)
    before, reference.check_targets = reference.check_targets, lambda *_: None
    try:
        loss, lse = impl.fwd(given["logits"].detach(), wrong, None, -100, 0.0, 0.0, 0.0)
        grad = impl.bwd(torch.ones_like(loss), given["logits"].detach(), lse, wrong, None, -100, 0.0, 0.0, 0.0)
    finally:
        reference.check_targets = before
    assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == (wrong == 50).tolist()


ALSO = {"cross_entropy": paths}
MODULE = "pyllm.kernels.cross_entropy.triton_cross_entropy"
TABLE = {"cross_entropy": ("cross_entropy_fwd", "cross_entropy_bwd")}
BUGS = [
    Bug("maximum starts at 0", 'top = float("-inf")\n    total', "top = 0.0\n    total", quick=True),
    Bug("sum not scaled when the maximum grows", "total = total * tl.exp(top - anchor(new_top)) + tl.exp(x -", "total = total + tl.exp(x -"),
    Bug("parts not scaled to one maximum", "other=0.0) * grown", "other=0.0)"),
    Bug("the last part forgotten", "for _ in range(splits):", "for _ in range(splits - 1):"),
    Bug("target logit of every part", "tl.where(part == 0, target_logit, 0.0)", "target_logit"),
    Bug("a share too short", "tl.minimum(begin + share, V)", "tl.minimum(begin + share - BLOCK_V, V)"),
    Bug("tail not masked forward", 'tl.load(X + cols, mask=mask, other=float("-inf"))', 'tl.load(X + cols, mask=mask, other=0.0)'),
    Bug("tail not masked under softcap", 'tl.where(mask, softcap * tanh(x / softcap), float("-inf"))', "softcap * tanh(x / softcap)"),
    Bug("columns written past the row", "DX.dtype.element_ty), mask=mask)", "DX.dtype.element_ty), mask=c < cols + 1)"),
    Bug("32-bit rows", "row = tl.program_id(0).to(tl.int64) // splits", "row = tl.program_id(0) // splits"),
    Bug("loss from lse, not from the maximum", "loss = (anchor(top) - target_logit) + log_total", "loss = (anchor(top) + log_total) - target_logit"),
    Bug("target logit not capped", "target_logit = softcap * tanh(target_logit / softcap)", "target_logit += 0"),
    Bug("weight of the target forgotten forward", "loss *= tl.load(W + y", "_ = tl.load(W + y"),
    Bug("weight of the target forgotten backward", "at_target *= tl.load(W + y", "_ = tl.load(W + y"),
    Bug("smoothing by the number of classes, not their weights", "shares = tl.load(WSUM) if WEIGHTED else V", "shares = V"),
    Bug("smoothing's sum not moved with the maximum", "spread += shares * (anchor(new_top) - anchor(top))\n            spread", "spread"),
    Bug("smoothing's parts not moved to one maximum", "spread += part_shares * (anchor(new_top) - anchor(part_top))", "spread += 0.0"),
    Bug("smoothing's uniform share forgotten backward", "grad -= everywhere * w", "grad -= 0.0"),
    Bug("target's share not lessened by smoothing", "at_target *= 1 - smoothing", "at_target *= 1"),
    Bug("z-loss backward by half", "scale += 2 * z_loss", "scale += z_loss"),
    Bug("z-loss of log total", "loss += z_loss * lse * lse", "loss += z_loss * log_total * log_total"),
    Bug("softcap's slope forgotten", "grad *= 1 - bent * bent", "grad *= 1"),
    Bug("no one-hot", "- tl.where(c == column, at_target, 0.0)", "", quick=True),
    Bug("ignored rows not zeroed", "tl.where(keep, grad, 0.0)", "grad"),
    Bug("ignored rows have a loss", "return tl.where(keep, loss, 0.0)", "return loss"),
    Bug("a target of V is class V - 1", "dloss = tl.where(inside, dloss", "dloss = tl.where(keep, dloss"),
    Bug("class -1 is a class", 'loss = tl.where(inside, loss, float("nan"))', "loss = loss + 0.0"),
    Bug("dloss of the first row for all", "tl.load(DLOSS + row * dloss_stride)", "tl.load(DLOSS)"),
]  # fmt: skip
