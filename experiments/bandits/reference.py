"""Reference numbers of scenario iii, swapped features, quoted from the project's ``bandits_scenario_iii.json``.

They come from an independent run of the published recipe (the authors' code, github.com/rsshyam/
Group-robust-preference-optimization-bandits, with GR-IPO as the paper writes it), 20 seeds, 2021 to 2040, and from an
exact solve of the min-max problem for the first three.  Only scalars stand here: the data of the fixture are drawn
again by ``data.draw`` and agree with the file's to rounding.
"""

from __future__ import annotations

METHODS = ("DPO", "IS-DPO", "GR-DPO", "IPO", "IS-IPO", "GR-IPO")

FINAL = {
    "DPO": {
        "max_val_group_loss": (0.6404284263022814, 0.0098535063729171),
        "max_reward_err": (0.10097528856590576, 0.0019178544546937441),
        "max_train_group_loss": (0.6251512614393762, 0.019634994496877382),
    },
    "IS-DPO": {
        "max_val_group_loss": (0.552640511431974, 0.007277579971893614),
        "max_reward_err": (0.0902138818613772, 0.002592969465881031),
        "max_train_group_loss": (0.5351799962947885, 0.015043497673339045),
    },
    "GR-DPO": {
        "max_val_group_loss": (0.4601171063520034, 0.01193662534725248),
        "max_reward_err": (0.051124926850274054, 0.003487996839962985),
        "max_train_group_loss": (0.4044303839587081, 0.011112157946678124),
    },
    "IPO": {
        "max_val_group_loss": (21.130222567393595, 0.13317786678389093),
        "max_reward_err": (0.1168485368775197, 0.0017886317019404339),
        "max_train_group_loss": (20.905251176365656, 0.4494995693435355),
    },
    "IS-IPO": {
        "max_val_group_loss": (20.444283814985276, 0.1481198493332446),
        "max_reward_err": (0.1089427819992024, 0.0029452567262150922),
        "max_train_group_loss": (19.887723393792225, 0.46253293963154446),
    },
    "GR-IPO": {
        "max_val_group_loss": (17.929143326576863, 0.2718316153364726),
        "max_reward_err": (0.06717242789083384, 0.005545055247086274),
        "max_train_group_loss": (16.310825542705125, 0.3469459665309907),
    },
}
"""method → headline → (mean, standard error) of the final iterate over 20 seeds."""

SADDLE_POINTS = {
    2021: {
        "dpo": {"alpha0": 0.7412827969023281, "minimax_train": 0.4170358559366537},
        "ipo": {"alpha0": 0.8252517083346287, "minimax_train": 17.21174422346967},
    },
    2022: {
        "dpo": {"alpha0": 0.7953470487268288, "minimax_train": 0.42489826300940087},
        "ipo": {"alpha0": 0.8570710751486608, "minimax_train": 16.857721972443404},
    },
    2023: {
        "dpo": {"alpha0": 0.8001284808488389, "minimax_train": 0.4488370036695906},
        "ipo": {"alpha0": 0.8481695875953228, "minimax_train": 17.441240163056893},
    },
}
"""seed → family → the saddle point of the training problem: weight of group 0, and both groups' loss."""

TRAJECTORY_SEED = 2021
TRAJECTORY = {
    1: {
        "theta": (4.610496089159998, 1.6635886218331686, 4.7844544954555825, 4.464270610491967),
        "alpha": (0.5347208855056514, 0.46527911449434867),
    },
    2: {
        "theta": (4.619691314839954, 1.6775843236724652, 4.793929385627324, 4.4548301975426465),
        "alpha": (0.5692706245607293, 0.4307293754392708),
    },
    3: {
        "theta": (4.62777993840085, 1.6917363504719969, 4.802482832347079, 4.4475105475696575),
        "alpha": (0.6032906336709054, 0.3967093663290946),
    },
    10: {
        "theta": (4.657425941905511, 1.7956099868881692, 4.839855303623609, 4.447546809122622),
        "alpha": (0.803532698908306, 0.19646730109169397),
    },
    100: {
        "theta": (4.355078416354563, 3.24401985494653, 4.731432213108242, 5.7423170986397984),
        "alpha": (0.9999897029757965, 1.0297024203530578e-05),
    },
    1000: {
        "theta": (6.640806218016558, 8.216876477169528, 7.434210221365553, 8.399981811275357),
        "alpha": (0.9921726555292357, 0.007827344470764167),
    },
    2000: {
        "theta": (8.78647418149942, 9.04068364733216, 9.36993663661585, 9.10568960434169),
        "alpha": (0.6205271565001163, 0.37947284349988364),
    },
}
"""GR-DPO of seed 2021 after so many iterations: beta 1, step size 0.9, group step size 0.5."""

THETA0 = (4.600165533543166, 1.6497344832366467, 4.774034692420751, 4.475895167206167)
"""Where it starts: shows that the random stream is the authors'."""
