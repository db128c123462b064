"""The group weights α: state that moves by exponentiated gradient, like an optimizer's.

    log α_g ← log α_g + η L_g,   α = softmax(log α),   w_g = α_g / q_g

    weights   GroupWeights: state, step, checkpoints; exponentiated_step, the readable form of the step
    checks    what both demand of their arguments, and of a state that was saved

Imports ``arguments`` and ``distributed`` alone; ``loss`` imports it.  Users take ``GroupWeights`` and
``exponentiated_step`` from ``grpo_kernels``.  An uncertainty set (what α is projected onto after a step) belongs here,
in a file of its own, applied in ``GroupWeights._move``.
"""
