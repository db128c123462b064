"""The synthetic study of Ramesh et al. 2024 (arXiv 2405.20304): log-linear bandits, two groups, one shared policy.

``python -m experiments.bandits`` runs it and writes docs/paper.md and docs/figures/.  Read in this order:

    data.py         states, actions, features, rewards; the draws of each seed
    objective.py    group losses and their gradients, for many seeds and methods in one call of ``preference_loss``
    methods.py      DPO, IS-DPO, GR-DPO, IPO, IS-IPO, GR-IPO
    metrics.py      what the paper reports about a parameter vector
    optimum.py      exact minima and saddle points, by Newton's method
    rate.py         Algorithm 1 on single samples, and its duality gap
    corrections.py  the same with the wrong signs
    study.py        all of it, in parallel;  figures.py and tables.py show it
"""
