"""Make the preference pairs of ``configs/hh_harmless.yaml`` from the public ``Anthropic/hh-rlhf`` data set.

    python -m experiments.hh.prepare --out data/hh_harmless

The rows of its ``harmless-base`` test split hold two whole dialogues each, ``chosen`` and ``rejected``.  A pair is
made of the dialogue up to and including the last "\\n\\nAssistant:" of ``chosen``, and of what follows it in each; rows
whose ``rejected`` does not begin in the same way are left out.  (A handful of replies go on to imitate further turns,
so the last turn is looked for in one of the two.)  The group is the number of human turns in the prompt: "1 turn",
"2 turns", "3 turns", "4+ turns".

The data set is under the MIT licence, Copyright (c) 2022 Anthropic.  Its dialogues are adversarial and can be
offensive.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

SOURCE = "Anthropic/hh-rlhf"
TEST_PAIRS = 400
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """(the dialogue up to and including the last "\\n\\nAssistant:", the reply after it with its leading space).

    Raises:
        ValueError: the assistant never speaks.
    """
    start, marker, reply = dialogue.rpartition(ASSISTANT)
    if not marker:
        raise ValueError(f"a dialogue must have a turn that begins with {ASSISTANT!r}, got {dialogue[:60]!r}")
    return start + marker, _reply(reply)


def _reply(text: str) -> str:
    return " " + text.strip()


def group_of(prompt: str) -> str:
    """The group of a prompt: how many turns the human has had."""
    turns = prompt.count(HUMAN)
    return "4+ turns" if turns >= 4 else "1 turn" if turns == 1 else f"{turns} turns"


def make_pairs(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, str]], Counter[str]]:
    """Turn rows of two dialogues into pairs.

    Args:
        rows: with ``chosen`` and ``rejected``, whole dialogues.

    Returns:
        Pairs of ``prompt``, ``chosen``, ``rejected``, ``group`` in the order of the rows, and how many rows were left
        out by reason.

    Raises:
        ValueError: a row without one of the two, or a chosen dialogue in which the assistant never speaks: the row
            number.
    """
    pairs: list[dict[str, str]] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        for name in ("chosen", "rejected"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"row {number}: field {name!r} must be a string, its fields are {sorted(row)}")
        try:
            prompt, chosen = split_dialogue(row["chosen"])
            same_start, rejected = row["rejected"].startswith(prompt), _reply(row["rejected"][len(prompt) :])
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if not same_start:
            left_out["the dialogues differ before the last reply"] += 1
        elif HUMAN not in prompt:
            left_out["no human turn"] += 1
        elif not chosen.strip() or not rejected.strip():
            left_out["an empty reply"] += 1
        elif chosen == rejected:
            left_out["equal replies"] += 1
        else:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "group": group_of(prompt)})
    return pairs, left_out


def random_split(
    pairs: Sequence[dict[str, str]], test_pairs: int, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, test): disjoint, ``test_pairs`` in the second; the same pairs and seed give the same two.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not 0 < test_pairs < len(pairs):
        raise ValueError(f"test_pairs must be between 1 and the {len(pairs)} pairs less one, got {test_pairs}")
    order = list(pairs)
    random.Random(seed).shuffle(order)
    return order[test_pairs:], order[:test_pairs]


def read_rows(source: str) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl or .jsonl.gz file, or of the harmless-base test split of a hub data set."""
    if source.endswith((".jsonl", ".jsonl.gz")):
        opener = gzip.open if source.endswith(".gz") else open
        with opener(source, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{source}:{number}: broken JSON: {error.msg}") from error
        return
    import datasets

    yield from datasets.load_dataset(source, data_dir="harmless-base", split="test")


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.jsonl and test.jsonl, and say what is in them."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.hh.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--source", default=SOURCE, help="hub data set, or a .jsonl(.gz) file (default: %(default)s)")
    parser.add_argument("--test-pairs", type=int, default=TEST_PAIRS, help="held-out pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random split (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(argv)
    files = {name: options.out / f"{name}.jsonl" for name in ("train", "test")}
    there = [str(path) for path in files.values() if path.exists()]
    if there and not options.overwrite:
        sys.exit(f"{', '.join(there)} exists; say --overwrite to replace it")
    try:
        pairs, left_out = make_pairs(read_rows(options.source))
        train, test = random_split(pairs, options.test_pairs, options.seed)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        with open(files[name], "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        groups = Counter(row["group"] for row in rows)
        print(f"{files[name]}: {len(rows)} pairs: {', '.join(f'{g} {groups[g]}' for g in sorted(groups))}")
    for reason, count in left_out.items():
        print(f"left out, {reason}: {count}")


if __name__ == "__main__":
    main()
