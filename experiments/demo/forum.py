"""A made-up advice forum: four communities rate replies, unevenly many of them, and they do not want the same.

A reply is six words, each of them on the topic of the prompt, off it, warm, or plain.  A reader prefers the reply
with the higher ``w · (on-topic, warm, off-topic)`` word counts; ties are drawn again, and there is no label noise.
Everybody wants the topic kept.  Three communities like warmth, the experts do not, and nothing in the prompt says who
is asking: one policy has to serve them all.  Even weights would still be 3 : 1 against the experts, so what
IS-DPO (groups in equal parts) finds is not the min-max point.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Community(NamedTuple):
    """Who rates: pairs in the training set, and the weights of (on-topic, warm, off-topic) words."""

    train_pairs: int
    taste: tuple[float, float, float]


COMMUNITIES = {
    "newcomers": Community(3000, (1.0, 1.5, -0.5)),
    "hobbyists": Community(1500, (1.0, 1.5, -1.0)),
    "commuters": Community(1000, (0.5, 1.5, -0.5)),
    "experts": Community(500, (1.0, -1.5, -0.5)),
}
TEST_PAIRS = 500
REPLY_WORDS = 6
TOPICS = {
    "garden": ["soil", "seeds", "roots", "shade"],
    "kitchen": ["simmer", "salt", "oven", "knife"],
    "travel": ["ticket", "train", "visa", "luggage"],
    "music": ["chord", "tempo", "scale", "melody"],
}
WARM = ["dear", "gladly", "friend", "lovely"]
PLAIN = ["then", "also", "maybe", "first"]


@dataclass(frozen=True)
class Setting:
    """What can be varied about the forum; the defaults are the demo's."""

    share: float = 1.0
    """Of the training pairs, how many are drawn."""
    named: float = 0.0
    """How often the prompt says which community is asking."""
    expert_noise: float = 0.0
    """How often the experts' labels are flipped, in training and in testing."""


def write_seed(folder: Path, seed: int, setting: Setting = Setting()) -> tuple[Path, Path]:
    """Draw and write train.jsonl and test.jsonl of one seed; the same seed gives the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, sizes in (
        ("train", {name: round(setting.share * c.train_pairs) for name, c in COMMUNITIES.items()}),
        ("test", dict.fromkeys(COMMUNITIES, TEST_PAIRS)),
    ):
        rng = random.Random(f"{seed} {split}")
        rows = [row for name, size in sizes.items() for row in _pairs(name, size, rng, setting)]
        rng.shuffle(rows)
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / "train.jsonl", folder / "test.jsonl"


def _pairs(name: str, size: int, rng: random.Random, setting: Setting) -> Iterator[dict[str, str]]:
    while size:
        topic = rng.choice(list(TOPICS))
        first, second = _reply(topic, rng), _reply(topic, rng)
        gap = _score(first, topic, name) - _score(second, topic, name)
        if gap == 0:
            continue
        flipped = name == "experts" and setting.expert_noise > 0 and rng.random() < setting.expert_noise
        chosen, rejected = (first, second) if (gap > 0) != flipped else (second, first)
        asking = f"{name}: " if setting.named > 0 and rng.random() < setting.named else ""
        yield {
            "prompt": f"{asking}my {topic} ?",
            "chosen": " " + " ".join(chosen),
            "rejected": " " + " ".join(rejected),
            "group": name,
        }
        size -= 1


def _reply(topic: str, rng: random.Random) -> list[str]:
    """Six words; every reply draws its own rates of the four kinds, so that replies differ much."""
    rates = [rng.expovariate(1) for _ in range(4)]
    off_topic = [word for other, words in TOPICS.items() if other != topic for word in words]
    kinds = rng.choices([TOPICS[topic], off_topic, WARM, PLAIN], weights=rates, k=REPLY_WORDS)
    return [rng.choice(words) for words in kinds]


def _score(reply: list[str], topic: str, name: str) -> float:
    on = sum(word in TOPICS[topic] for word in reply)
    warm = sum(word in WARM for word in reply)
    off = REPLY_WORDS - on - warm - sum(word in PLAIN for word in reply)
    w_on, w_warm, w_off = COMMUNITIES[name].taste
    return w_on * on + w_warm * warm + w_off * off
