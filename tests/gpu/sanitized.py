"""Every kernel of one backend on a few small shapes (``python sanitized.py triton``): what compute-sanitizer watches.

No test framework and few tensors, because each access is checked.  Tensors have allocations of their own
(PYTORCH_NO_CUDA_MEMORY_CACHING=1, set by ``tools/gpu_check.py``), so a stray access does not fall into a neighbour.
"""

from __future__ import annotations

import sys

import torch

from grpo_kernels.backends import choose

IGNORE_INDEX = -100


def token_logps(module, dtype: torch.dtype, vocabulary: int, start: int) -> None:
    rows = 6
    memory = torch.randn(rows * vocabulary + start).to(dtype).cuda()
    logits = memory[start:].view(2, 3, vocabulary)
    targets = torch.tensor([0, vocabulary - 1, IGNORE_INDEX, vocabulary, -1, vocabulary // 2]).cuda()
    logps, lse, grads = (torch.full((rows,), value).cuda() for value in (0.0, 0.0, 0.5))
    out = torch.full(logits.shape, 0.0).to(dtype).cuda()
    module.token_logps_fwd(logits, targets, logps, lse, ignore_index=IGNORE_INDEX)
    module.token_logps_bwd(logits, targets, lse, grads, out, ignore_index=IGNORE_INDEX)
    module.token_logps_bwd(logits, targets, lse, grads, logits, ignore_index=IGNORE_INDEX)
    first, second = out.cpu().float(), logits.cpu().float()
    if not torch.equal(first.nan_to_num(nan=7.0), second.nan_to_num(nan=7.0)):
        raise SystemExit(f"in place and out of place differ: {dtype}, V = {vocabulary}, start = {start}")


def tail(module, pairs: int, groups: int, length: int) -> None:
    rows = 2 * pairs * length
    token_logps, targets = (-torch.rand(rows)).cuda(), torch.zeros(rows, dtype=torch.int64).cuda()
    cu_seqlens = (torch.arange(2 * pairs + 1) * length).int().cuda()
    ids, reference = (torch.arange(pairs) % groups).cuda(), torch.zeros(2 * pairs, dtype=torch.float64).cuda()
    weights = torch.ones(pairs, dtype=torch.float64).cuda()
    outputs = [
        torch.zeros(2 * pairs),
        torch.zeros(2 * pairs, dtype=torch.float64),
        *(torch.zeros(n) for n in (pairs, 2 * pairs, pairs, pairs)),
    ]
    outputs += [torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.int64), torch.zeros(groups)]
    outputs = [output.cuda() for output in outputs]
    for boundaries in (cu_seqlens, None):
        module.preference_tail(
            token_logps, targets, boundaries, reference, ids, weights, *outputs, loss_type=0, beta=0.1,
            label_smoothing=0.1, length_normalize=True, ignore_index=IGNORE_INDEX,
        )  # fmt: skip
    if int(outputs[-2].cpu().sum()) != pairs:
        raise SystemExit("group counts do not add up to the pairs")
    group_weights, loss = torch.ones(groups).cuda(), torch.zeros(()).cuda()
    module.robust_loss(outputs[4], ids, group_weights, torch.zeros(pairs).cuda(), loss)
    if not abs(loss.cpu().item() - outputs[4].cpu().mean().item()) < 1e-5:
        raise SystemExit("with weights of one the robust loss is not the mean")


def tile(module, dtype: torch.dtype, wide: bool, words: int, first: int, softcap: float) -> None:
    rows, logits_dtype = 5, torch.float32 if wide else dtype
    memory = torch.randn(rows * words + first).to(logits_dtype).cuda()
    logits, exps = memory[first:].view(rows, words), torch.zeros(rows, words).to(dtype).cuda()
    targets = torch.tensor([7, 7 + words - 1, 0, 7 + words, -1]).cuda()
    bias = torch.randn(words).cuda() if softcap else None
    top, rest, picked, factor, scale = (torch.full((rows,), value).cuda() for value in (-2.0, 1.0, 0.0, 0.0, 0.5))
    options = {"start": 7, "softcap": softcap, "logit_scale": 0.5}
    module.head_tile_fwd(logits, bias, targets, top, rest, picked, factor, None, **options, shift=0)
    module.head_tile_fwd(logits, bias, targets, top, rest, picked, factor, exps, **options, shift=3)
    module.head_tile_bwd(logits, bias, targets, top, scale, scale, exps, **options)
    if not wide:
        module.head_tile_bwd(logits, bias, targets, top, scale, scale, logits, **options)
        if not torch.equal(logits.cpu(), exps.cpu()):
            raise SystemExit(f"in place and out of place differ: tile of {dtype}, {words} words, first = {first}")


def main() -> None:
    module = choose(sys.argv[1], torch.device("cuda"), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for vocabulary, start in ((1, 0), (1031, 1), (4096, 0), (9001, 3)):
            token_logps(module, dtype, vocabulary, start)
    for pairs, groups, length in ((1, 1, 5), (9, 300, 70)):
        tail(module, pairs, groups, length)
    for wide, words, first, softcap in ((False, 1031, 1, 0.0), (True, 2048, 0, 20.0), (False, 5001, 3, 20.0)):
        tile(module, torch.bfloat16, wide, words, first, softcap)
    torch.cuda.synchronize()
    print(f"{sys.argv[1]}: every kernel ran")


if __name__ == "__main__":
    main()
