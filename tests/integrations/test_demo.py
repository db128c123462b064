"""The demo's data is what it says, and the documents say what the files of its last run hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from experiments.demo import limits
from experiments.demo.__main__ import verdict
from experiments.demo.forum import COMMUNITIES, PLAIN, TEST_PAIRS, TOPICS, WARM, Setting, write_seed
from experiments.demo.runs import METHODS
from experiments.demo.tables import README_TABLE, markdown, put_between

ROOT = Path(__file__).parents[2]


def pairs(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(reply, topic, community):
    """The reader's score, from the words and the taste alone."""
    counts = [0, 0, 0]
    for word in reply.split():
        if word in TOPICS[topic]:
            counts[0] += 1
        elif word in WARM:
            counts[1] += 1
        elif word not in PLAIN:
            counts[2] += 1
    return sum(w * n for w, n in zip(COMMUNITIES[community].taste, counts, strict=True))


def test_sizes_are_uneven_in_training_and_even_in_testing(tmp_path):
    train, test = write_seed(tmp_path, 900)
    assert Counter(p["group"] for p in pairs(train)) == {name: c.train_pairs for name, c in COMMUNITIES.items()}
    assert set(Counter(p["group"] for p in pairs(test)).values()) == {TEST_PAIRS}


def test_every_reader_prefers_what_he_chose_and_the_prompt_does_not_tell_who_he_is(tmp_path):
    for pair in pairs(write_seed(tmp_path, 900)[1]):
        topic = pair["prompt"].split()[1]
        assert score(pair["chosen"], topic, pair["group"]) > score(pair["rejected"], topic, pair["group"])
        assert not any(name in pair["prompt"] for name in COMMUNITIES)


def test_a_seed_is_a_file_and_another_seed_another(tmp_path):
    first, again, other = (write_seed(tmp_path / name, seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_held_out_pairs_are_drawn_apart(tmp_path):
    train, test = (
        {(p["prompt"], p["chosen"], p["rejected"]) for p in pairs(path)} for path in write_seed(tmp_path, 900)
    )
    assert len(train & test) < 0.01 * len(test)


def test_what_is_varied_is_varied(tmp_path):
    train, test = write_seed(tmp_path, 900, Setting(share=0.1, named=1.0, expert_noise=0.5))
    assert len(pairs(train)) == 600
    assert all(p["prompt"].startswith(f"{p['group']}: my ") for p in pairs(test))
    wrong = Counter(
        p["group"]
        for p in pairs(test)
        if score(p["chosen"], p["prompt"].split()[2], p["group"])
        < score(p["rejected"], p["prompt"].split()[2], p["group"])
    )
    assert set(wrong) == {"experts"}
    assert 200 < wrong["experts"] < 300


def documented(document, markers):
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.split(markers[0])[1].split(markers[1])[0].strip()


def test_the_readme_shows_the_run_whose_summary_is_kept():
    summary = json.loads((ROOT / "docs/figures/demo.json").read_text())
    assert documented("README.md", README_TABLE) == markdown(summary, METHODS)


def test_the_page_of_limits_shows_the_runs_whose_results_are_kept():
    results = json.loads((ROOT / "docs/figures/limits.json").read_text())
    assert documented("docs/when-it-helps.md", limits.TABLE) == limits.markdown(results)


def test_robust_training_had_the_lowest_worst_group_loss_in_every_seed():
    summary = json.loads((ROOT / "docs/figures/demo.json").read_text())
    assert len(summary["seeds"]) == 3
    assert set(summary["methods"]) == {"dpo", "is_dpo", "gr_dpo"}
    for robust, *others in zip(*(summary["methods"][m] for m in ("gr_dpo", "dpo", "is_dpo")), strict=True):
        assert robust["worst_group_loss"] < min(other["worst_group_loss"] for other in others)
        assert robust["worst_group_loss"] == max(group["loss"] for group in robust["groups"].values())


def test_the_verdict_counts_seeds_won():
    def runs(*losses):
        return [{"worst_group_loss": loss} for loss in losses]

    summary = {"methods": {"dpo": runs(1.0, 1.0), "is_dpo": runs(0.5, 0.9), "gr_dpo": runs(0.6, 0.8)}}
    assert "in 1 of 2 seeds" in verdict(summary)


def test_a_document_without_markers_is_left_alone(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("nothing here\n")
    with pytest.raises(ValueError, match="has no markers"):
        put_between(document, README_TABLE, "a table")
    assert document.read_text() == "nothing here\n"
