"""The loss of B pairs in G groups: from logits, or from log-probabilities that somebody has already.

    logits   ─ TokenLogps ──► p_t ┐
                                  ├─ sums, margins, losses, the α step, weights ──► (1/B) sum_i w[g_i] l(m_i)
    policy_logps ─────────────────┘
    backward: one number a row, c_t, and one pass over the vocabulary

    arguments    reads what a public function was given into one LossArguments, and is the only place that checks it
    functional   the public functions, top-down
    pairs        from p_t to losses, slopes and weights, outside of autograd
    autograd     the autograd Functions
    ops          the boundary of the backends as operators, for ``torch.compile``

Imports ``groups``, ``vocab``, ``backends`` and what is below them; ``head`` imports this, never the other way.  Users
take the public names from ``grpo_kernels``.

To add a loss: its name in ``types.LOSS_TYPES``, its (value, slope) once a backend (``backends/torch_ops.py``,
``csrc/margin_loss.h``, ``backends/triton/preference_tail.py``), and its equation in ``reference.py``, which the tests
hold the others to.
"""
