"""What preparing the human preference pairs promises, on rows written here."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from experiments.hh.prepare import group_of, main, make_pairs, random_split, split_dialogue

ONE = "\n\nHuman: Is it safe?\n\nAssistant:"
TWO = ONE + " Yes.\n\nHuman: Sure?\n\nAssistant:"


def rows(count):
    return [{"chosen": f"{ONE} Yes {i}.", "rejected": f"{ONE} No {i}."} for i in range(count)]


def test_a_dialogue_splits_after_the_last_turn_of_the_assistant():
    assert split_dialogue(TWO + " Quite sure. \n") == (TWO, " Quite sure.")
    assert split_dialogue(ONE) == (ONE, " ")
    with pytest.raises(ValueError, match="must have a turn that begins with"):
        split_dialogue("\n\nHuman: Hello?")


def test_groups_count_human_turns():
    turn = "\n\nHuman: a\n\nAssistant:"
    assert [group_of(turn * n) for n in (1, 2, 3, 4, 9)] == ["1 turn", "2 turns", "3 turns", "4+ turns", "4+ turns"]


def test_rows_become_pairs_and_what_holds_no_preference_is_left_out_and_counted():
    pairs, left_out = make_pairs(
        [
            {"chosen": TWO + " Quite.", "rejected": TWO + " Perhaps."},
            {"chosen": TWO + " Quite.", "rejected": ONE + " Perhaps."},
            {"chosen": TWO + " Quite.", "rejected": TWO + " Quite. "},
            {"chosen": TWO + " Quite.", "rejected": TWO},
            {"chosen": "\n\nAssistant: Hello.", "rejected": "\n\nAssistant: Hi."},
        ]
    )
    assert pairs == [{"prompt": TWO, "chosen": " Quite.", "rejected": " Perhaps.", "group": "2 turns"}]
    assert left_out == {
        "the dialogues differ before the last reply": 1,
        "equal replies": 1,
        "an empty reply": 1,
        "no human turn": 1,
    }


def test_a_reply_that_imitates_further_turns_is_kept_whole():
    imitates = " No.\n\nHuman: Why?\n\nAssistant: So."
    pairs, _ = make_pairs([{"chosen": ONE + " Yes.", "rejected": ONE + imitates}])
    assert pairs == [{"prompt": ONE, "chosen": " Yes.", "rejected": imitates, "group": "1 turn"}]


def test_a_bad_row_is_named():
    with pytest.raises(ValueError, match=r"row 2: field 'rejected' must be a string, its fields are \['chosen'\]"):
        make_pairs([*rows(1), {"chosen": ONE + " Yes."}])
    with pytest.raises(ValueError, match="row 1: a dialogue must"):
        make_pairs([{"chosen": "Hello", "rejected": "Hi"}])


def test_the_split_is_random_whole_and_repeatable():
    pairs, _ = make_pairs(rows(30))
    train, test = random_split(pairs, 8)
    assert (len(train), len(test)) == (22, 8)
    assert sorted(map(str, train + test)) == sorted(map(str, pairs))
    assert test != pairs[:8]
    assert random_split(pairs, 8) == (train, test)
    assert random_split(pairs, 8, seed=1) != (train, test)
    with pytest.raises(ValueError, match="test_pairs must be between 1 and the 30 pairs less one, got 30"):
        random_split(pairs, 30)


def test_the_command_writes_files_that_the_trainer_reads(tmp_path, capsys):
    from grpo_kernels.trainer.config import DataConfig
    from grpo_kernels.trainer.data import read_pairs

    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    more = [{"chosen": f"{TWO} Café {i}.", "rejected": f"{TWO} No."} for i in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(20) + more), encoding="utf-8")
    main(["--out", str(out), "--source", str(source), "--test-pairs", "5"])
    assert "train.jsonl: 25 pairs" in capsys.readouterr().out
    pairs = [pair for name in ("train", "test") for pair in read_pairs(str(out / f"{name}.jsonl"), DataConfig())]
    assert Counter(pair.group for pair in pairs) == {"1 turn": 20, "2 turns": 10}
    assert all(pair.prompt.endswith("\n\nAssistant:") and pair.chosen.startswith(" ") for pair in pairs)
    with pytest.raises(SystemExit, match=r"train\.jsonl.* exists; say --overwrite"):
        main(["--out", str(out), "--source", str(source), "--test-pairs", "5"])


def test_a_bad_source_is_an_error_and_writes_nothing(tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text('{"chosen": \n')
    with pytest.raises(SystemExit, match=r"rows\.jsonl:1: broken JSON"):
        main(["--out", str(out), "--source", str(source)])
    assert not out.exists()
