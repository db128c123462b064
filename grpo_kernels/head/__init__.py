"""The LM head from hidden states: log-probabilities and the loss without the (rows, V) logits.

    z = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap),   p_t = z[t, y_t] - logsumexp_v z[t, v]

    hidden (rows, H) ─┐             for each tile of the vocabulary
                      ├─ GEMM ──► (rows, tile) logits ─ exponentials, sums ──► GEMM into the gradient of hidden
    W (V, H), bias ───┘             backward: kept tiles, or tiles made again ──► GEMM into the gradient of W

    arguments     reads and checks what a public function was given, once, into one HeadArguments
    functional    the public functions, top-down
    attach        the head inside a model's own forward, by hooks
    autograd      the autograd Function
    ops           forward and backward, and both as operators for ``torch.compile``
    linear_head   the walk over tiles, forward and backward
    target        the target's odds where ranks share the vocabulary
    plan          how wide a tile is, and which tiles are kept from forward to backward

Imports ``loss`` and what is below it; nothing of the core imports ``head``.  Users take the public names from
``grpo_kernels``.
"""
