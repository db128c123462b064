"""The loss of B pairs in G groups: from logits, or from log-probabilities that somebody has already.

    logits   ─ TokenLogps ──► p_t ┐
                                  ├─ sums, margins, losses, the α step, weights ──► (1/B) sum_i w[g_i] l(m_i)
    policy_logps ─────────────────┘
    backward: one number a row, c_t, and one pass over the vocabulary

    arguments    reads and checks what a public function was given, once, into one LossArguments
    functional   the public functions, top-down
    pairs        from p_t to losses, slopes and weights, outside of autograd
    autograd     the autograd Functions
    ops          the boundary of the backends as operators, for ``torch.compile``

Imports ``groups``, ``vocab``, ``backends`` and what is below them; ``head`` imports this, never the other way.  Users
take the public names from ``grpo_kernels``.

docs/design.md lists what to touch to add a loss or an argument.
"""
