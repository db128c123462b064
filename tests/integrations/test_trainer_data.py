"""What the trainer's data promises: every bad line named, every token where it belongs."""

from __future__ import annotations

import gzip
import json
import socket

import pytest
import torch

from grpo_kernels.trainer.config import DataConfig
from grpo_kernels.trainer.data import (
    Pair,
    PreferenceCollator,
    TokenizedPair,
    pair_texts,
    read_pairs,
    tokenize_pairs,
)
from grpo_kernels.trainer.model.models import train_tokenizer

pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")

ROW = {"prompt": "Q: tea?", "chosen": " yes", "rejected": " no", "group": "a"}
CHAT = {
    "prompt": [{"role": "user", "content": "tea?"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
    "group": "a",
}


def row(**changes):
    return {**ROW, **changes}


def write(path, *lines):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return str(path)


def read(path, *lines, **config):
    return read_pairs(write(path, *lines), DataConfig(**config))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pairs.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Q: tea? coffee? yes no maybe of course, not at all"] * 3, 300)


# Reading


def test_pairs_are_read_in_order_with_their_lines(path):
    pairs = read(path, ROW, row(group=7), CHAT)
    assert [(pair.group, pair.where) for pair in pairs] == [("a", f"{path}:1"), ("7", f"{path}:2"), ("a", f"{path}:3")]
    assert pairs[0].prompt == "Q: tea?"
    assert pairs[2].chosen == CHAT["chosen"]


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_fine_and_blank_lines_are_counted(path):
    text = json.dumps(ROW).encode()
    path.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n  \n" + text)
    assert [pair.where for pair in read_pairs(str(path), DataConfig())] == [f"{path}:1", f"{path}:4"]


def test_unicode_line_separators_within_a_string_do_not_end_the_line(path):
    chosen = " one\u2028two\x85three 😀"
    path.write_text(json.dumps(row(chosen=chosen), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(str(path), DataConfig())[0].chosen == chosen


def test_compressed_json_lines_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert len(read_pairs(str(path), DataConfig())) == 1


def test_field_names_are_the_users(path):
    other = {"question": "q", "good": " g", "bad": " b", "country": 3}
    names = {"prompt_field": "question", "chosen_field": "good", "rejected_field": "bad", "group_field": "country"}
    assert read(path, other, **names)[0] == Pair("q", " g", " b", "3", f"{path}:1")


@pytest.mark.parametrize(
    ("bad", "field", "says"),
    [
        ({"prompt": "q", "chosen": " a", "rejected": " b"}, "'group'", "missing"),
        ({"prompt": "q", "rejected": " b", "group": "a"}, "'chosen'", "missing"),
        (row(chosen=None), "'chosen'", "got null"),
        (row(rejected=3), "'rejected'", "got int '3'"),
        (row(chosen=""), "'chosen'", "empty reply"),
        (row(rejected=" \n\t"), "'rejected'", "empty reply"),
        (row(rejected=" yes"), "'rejected'", "equal"),
        (row(group=None), "'group'", "got null"),
        (row(group=1.5), "'group'", "got float '1.5'"),
        (row(group=True), "'group'", "got bool 'True'"),
        (row(group=["a"]), "'group'", "got list"),
        (row(group=" "), "'group'", "name a group"),
        (row(prompt=["hello"]), "'prompt[0]'", "chat message"),
        (row(prompt=[]), "'prompt'", "empty list"),
        ({**CHAT, "chosen": "yes"}, "'chosen'", "all be strings or all be lists"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, "'chosen[0].content'", "got null"),
        ({**CHAT, "prompt": [{"content": "x"}]}, "'prompt[0].role'", "got null"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": " "}]}, "'chosen'", "empty reply"),
        ({**CHAT, "rejected": CHAT["chosen"]}, "'rejected'", "equal"),
        ({**CHAT, "prompt": CHAT["prompt"] + CHAT["chosen"]}, "'prompt'", "must not end with"),
        ({**CHAT, "chosen": CHAT["prompt"] + CHAT["chosen"]}, "'chosen'", "begin with a message of the assistant"),
        (b'{"prompt": "q", "group": "\\ud800", "chosen": " a", "rejected": " b"}', "'group'", "surrogate"),
        (b'{"prompt": "q", "prompt": "r"}', "'prompt'", "twice"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_file_and_line(path, bad, field, says):
    with pytest.raises(ValueError) as error:
        read(path, ROW, b"", bad)
    assert f"{path}:3: " in str(error.value)
    assert field in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "q", "chos', "broken JSON: Unterminated string"),
        (b'{"prompt": "q"} {}', "broken JSON: Extra data (column 17)"),
        (b"[1]", "one JSON object, got list"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
        (b'{"group": ' + b"1" * 5000 + b"}", "broken JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(path, line, says):
    with pytest.raises(ValueError) as error:
        read(path, ROW, line, ROW)
    assert str(error.value).startswith(f"{path}:2: ")
    assert says in str(error.value)


def test_data_without_a_prompt_is_told_how_to_get_one(path):
    with pytest.raises(ValueError, match="move what they share at the start into a prompt"):
        read(path, {"chosen": "Q: tea? yes", "rejected": "Q: tea? no", "group": "a"})


def test_an_empty_file_and_a_missing_one_are_errors(tmp_path, path):
    with pytest.raises(ValueError, match="holds no pairs"):
        read(path, b"")
    with pytest.raises(ValueError, match=r"no such file.*gone\.jsonl"):
        read_pairs(str(tmp_path / "gone.jsonl"), DataConfig())
    with pytest.raises(ValueError, match=r"read from \.jsonl"):
        read_pairs(str(tmp_path), DataConfig())
    with pytest.raises(ValueError, match="only needs renaming"):
        read_pairs("pairs.json", DataConfig())
    with pytest.raises(ValueError, match="neither a file"):
        read_pairs("some/where/else", DataConfig())


def test_parquet_gives_the_pairs_that_json_lines_give(tmp_path, path):
    from pyarrow import parquet

    chat = {**CHAT, "prompt": [{"role": "system", "content": "s", "name": "x"}, {"role": "user", "content": "tea?"}]}
    for rows in ([ROW, row(group="b")], [chat, {**CHAT, "group": "b"}]):
        file = str(tmp_path / "pairs.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{**r, "extra": 1} for r in rows]), file)
        expected = read(path, *rows)
        found = read_pairs(file, DataConfig())
        assert [pair.where for pair in found] == [f"{file} row 1", f"{file} row 2"]
        assert [(p.prompt, p.chosen, p.rejected, p.group) for p in found] == [
            (p.prompt, p.chosen, p.rejected, p.group) for p in expected
        ]


def test_parquet_names_the_row_of_a_bad_field(tmp_path):
    from pyarrow import parquet

    file = str(tmp_path / "pairs.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "group": 1}, {**ROW, "group": None}]), file)
    with pytest.raises(ValueError, match=r"pairs.parquet row 2: field 'group' must be .* got null"):
        read_pairs(file, DataConfig())
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"no\.parquet: not a parquet file"):
        read_pairs(str(tmp_path / "no.parquet"), DataConfig())


def test_files_never_reach_for_the_network(tmp_path, path, monkeypatch):
    from pyarrow import parquet

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "pairs.parquet")
    assert read(path, ROW)
    assert read_pairs(str(tmp_path / "pairs.parquet"), DataConfig())


def test_hub_rows_are_read_through_datasets_and_named_by_row(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load(source, **options):
        asked.update(options, source=source)
        return datasets.Dataset.from_list([ROW, row(chosen="")])

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"owner/pairs \(validation\) row 2: field 'chosen' is an empty reply"):
        read_pairs("owner/pairs", DataConfig(subset="small", revision="v1"), split="validation")
    assert asked == {"source": "owner/pairs", "name": "small", "split": "validation", "revision": "v1"}


# Tokens


def tokenized(tokenizer, path, *rows, groups=None, **config):
    config = DataConfig(**config)
    return tokenize_pairs(read_pairs(write(path, *rows), config), tokenizer, config, groups)


def test_prompt_and_reply_join_to_the_text_with_start_and_end(tokenizer, path):
    dataset = tokenized(tokenizer, path, ROW, row(prompt="Q: ünï😀 \r\n", chosen=" \u2028 yes", rejected="\tno "))
    assert tokenizer.decode(dataset[0].prompt_ids) == "<|bos|>Q: tea?"
    assert tokenizer.decode(dataset[0].chosen_ids) == " yes<|eos|>"
    assert tokenizer.decode(dataset[1].prompt_ids + dataset[1].chosen_ids) == "<|bos|>Q: ünï😀 \r\n \u2028 yes<|eos|>"
    assert tokenizer.decode(dataset[1].rejected_ids) == "\tno <|eos|>"


def test_the_end_is_not_appended_when_told_so_nor_twice(tokenizer, path):
    bare = tokenized(tokenizer, path, ROW, append_eos=False)
    assert tokenizer.decode(bare[0].chosen_ids) == " yes"
    ended = tokenized(tokenizer, path, row(prompt="<|bos|>Q", chosen=" yes<|eos|>"))
    assert tokenizer.decode(ended[0].prompt_ids + ended[0].chosen_ids) == "<|bos|>Q yes<|eos|>"


def test_a_long_prompt_keeps_its_end_and_a_long_reply_its_beginning(tokenizer, path):
    long = row(prompt="x" * 50 + "tea?", chosen=" yes" + "z" * 50, rejected=" no")
    dataset = tokenized(tokenizer, path, long, max_length=16, max_prompt_length=8)
    pair = dataset[0]
    assert len(pair.prompt_ids) == 8
    assert pair.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(pair.prompt_ids).endswith("tea?")
    assert len(pair.chosen_ids) == 8
    assert tokenizer.decode(pair.chosen_ids).startswith(" yes")
    assert tokenizer.eos_token_id not in pair.chosen_ids  # a reply that was cut does not end here
    assert pair.rejected_ids[-1] == tokenizer.eos_token_id
    assert dataset.truncated == {"prompts": 1, "replies": 1}


def test_pairs_without_a_preference_after_cutting_are_counted_and_left_out(tokenizer, path):
    same_start = row(chosen=" " + "z" * 40 + "a", rejected=" " + "z" * 40 + "b", group="b")
    dataset = tokenized(tokenizer, path, same_start, ROW, row(group="b"), max_length=20, max_prompt_length=10)
    assert dataset.dropped == {"reply gone": 0, "replies equal": 1}
    assert dataset.group_sizes == {"a": 1, "b": 1}
    assert dataset.where == [f"{path}:2", f"{path}:3"]
    assert [pair.pair_index for pair in dataset] == [0, 1]


def test_a_reply_without_tokens_is_counted_and_left_out(path):
    tokenizer = train_tokenizer(["a"], 300)
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    dataset = tokenized(tokenizer, path, ROW, row(rejected="?"))
    assert dataset.dropped == {"reply gone": 1, "replies equal": 0}
    assert len(dataset) == 1


def test_a_group_that_loses_all_its_pairs_is_named(tokenizer, path):
    same_start = row(chosen=" " + "z" * 40 + "a", rejected=" " + "z" * 40 + "b", group="rare")
    with pytest.raises(ValueError, match=r"group 'rare' has no usable pair left of 1 .*replies equal 1"):
        tokenized(tokenizer, path, ROW, same_start, max_length=20, max_prompt_length=10)


def test_an_empty_prompt_still_predicts_the_first_token(tokenizer, path):
    assert tokenized(tokenizer, path, row(prompt=""))[0].prompt_ids == [tokenizer.bos_token_id]
    bare = train_tokenizer(["a"], 300)
    bare.bos_token = None
    assert tokenized(bare, path, row(prompt=""))[0].prompt_ids == [bare.eos_token_id]
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: the prompt is empty"):
        tokenized(bare, path, row(prompt=""))


def test_groups_are_sorted_with_numbers_as_numbers(tokenizer, path):
    rows = [row(group=group) for group in (10, 9, "b", "a 10", "a 9", 9)]
    dataset = tokenized(tokenizer, path, *rows)
    assert dataset.groups == ("9", "10", "a 9", "a 10", "b")
    assert dataset.group_sizes == {"9": 2, "10": 1, "a 9": 1, "a 10": 1, "b": 1}
    assert dataset.group_ids == [1, 0, 4, 3, 2, 0]


def test_an_unknown_group_at_evaluation_is_an_error_and_an_absent_one_is_not(tokenizer, path):
    dataset = tokenized(tokenizer, path, ROW, groups=("z", "a"))
    assert dataset.group_sizes == {"z": 0, "a": 1}
    assert dataset[0].group_id == 1
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: unknown group 'new', the groups are \['z', 'a'\]"):
        tokenized(tokenizer, path, ROW, row(group="new"), groups=("z", "a"))


def test_the_fingerprint_tells_tokens_order_and_groups_apart(tokenizer, path):
    rows = [ROW, row(prompt="Q: coffee?", group="b")]
    prints = [
        tokenized(tokenizer, path, *rows).fingerprint(),
        tokenized(tokenizer, path, *reversed(rows)).fingerprint(),
        tokenized(tokenizer, path, *rows, append_eos=False).fingerprint(),
        tokenized(tokenizer, path, *rows, groups=("b", "a")).fingerprint(),
        tokenized(tokenizer, path, ROW, row(prompt="Q: coffee?")).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert tokenized(tokenizer, path, *rows).fingerprint() == prints[0]


def test_chat_messages_go_through_the_template_and_it_alone_ends_the_reply(tokenizer, path):
    pair = tokenized(tokenizer, path, CHAT)[0]
    assert tokenizer.decode(pair.prompt_ids) == "<|bos|>[user] tea?\n[assistant] "
    assert tokenizer.decode(pair.chosen_ids) == "yes<|eos|>"


def test_chat_without_a_fitting_template_says_what_to_do(path):
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: .*no chat template; name a file"):
        tokenized(tokenizer, path, CHAT)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: the chat template does not write the prompt alone .*'1tea"):
        tokenized(tokenizer, path, CHAT)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: the chat template refuses .*roles must alternate"):
        tokenized(tokenizer, path, CHAT)


def test_pair_texts_are_strings_and_contents(path):
    assert list(pair_texts(read(path, ROW, CHAT))) == ["Q: tea?", " yes", " no", "tea?", "yes", "no"]


# Batches


def test_the_collator_puts_chosen_first_pads_right_and_labels_replies_alone():
    pairs = [TokenizedPair([5, 6], [7], [8, 9, 10], 1, 40), TokenizedPair([5], [6, 7], [8], 0, 41)]
    batch = PreferenceCollator(0, pad_to_multiple_of=4)(pairs)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 0, 0, 0, 0, 0],
        [5, 6, 7, 0, 0, 0, 0, 0],
        [5, 6, 8, 9, 10, 0, 0, 0],
        [5, 8, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, 7, -100, -100, -100, -100, -100],
        [-100, 6, 7, -100, -100, -100, -100, -100],
        [-100, -100, 8, 9, 10, -100, -100, -100],
        [-100, 8, -100, -100, -100, -100, -100, -100],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 3, 5, 2]
    assert batch["group_ids"].tolist() == [1, 0]
    assert batch["pair_index"].tolist() == [40, 41]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_collator_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="pad_token_id must be an int, got None"):
        PreferenceCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        PreferenceCollator(0, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="at least one pair"):
        PreferenceCollator(0)([])


def test_a_data_loader_yields_batches_that_the_loss_takes(tokenizer, path):
    from grpo_kernels import GroupWeights, fused_grpo_loss
    from grpo_kernels.trainer.data.sampling import make_sampler

    dataset = tokenized(tokenizer, path, ROW, row(group="b", prompt="x"), row(group="b", prompt="y"))
    sampler = make_sampler("balanced", dataset.group_ids, 4, seed=0, steps=3)
    weights = GroupWeights.robust(dataset.group_sizes, 0.1, sampling_probs=sampler.sampling_probs)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    batches = list(torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate))
    assert len(batches) == 3
    for batch in batches:
        logits = torch.randn(*batch["labels"].shape, len(tokenizer), requires_grad=True)
        fused_grpo_loss(logits, batch["labels"], None, batch["group_ids"], weights).loss.backward()
        assert logits.grad.isfinite().all()
