"""What loading a policy promises: no network for a folder, text that round-trips, errors with the setting."""

from __future__ import annotations

import socket

import pytest
import torch

from grpo_kernels.trainer.config import LoraConfig, ModelConfig, TinyModelConfig
from grpo_kernels.trainer.model.models import check_positions, describe_model, load_policy, train_tokenizer

pytest.importorskip("transformers")

TEXTS = ["Where is the train to the coast?", " It leaves from platform nine.", " I would not know."] * 4
SMALL = TinyModelConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def tiny(seed=0, **changes):
    return load_policy(ModelConfig(tiny=SMALL, **changes), train_texts=TEXTS, seed=seed)


def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokenizer.encode(TEXTS[0])])).logits


@pytest.mark.parametrize(
    "text", ["", " a  b\n\n", "\r\n\t", "naïve café 😀 漢字", "\u2028\x00\x85", "<|eos|> [user] <s>"]
)
def test_any_text_comes_back_unchanged(text):
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_tokenizer_is_the_texts_alone():
    words = [train_tokenizer(texts, 300).get_vocab() for texts in (TEXTS, TEXTS, TEXTS[::-1])]
    assert words[0] == words[1] == words[2]
    assert len(words[0]) == 300


def test_the_tiny_model_is_the_seed_alone_and_leaves_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = (tiny(seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_tiny_model_reloads_from_its_folder(tmp_path):
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_policy(ModelConfig(name=str(tmp_path)))
    assert words.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert words.decode(words.encode(" a  , b .")) == " a  , b ."
    assert words.pad_token_id == tokenizer.pad_token_id
    assert words.chat_template == tokenizer.chat_template
    assert torch.equal(logits(again, words), logits(model, tokenizer))


def test_the_tiny_model_is_what_it_says():
    model, tokenizer = tiny()
    about = describe_model(model)
    assert about["architecture"] == "LlamaForCausalLM"
    assert about["parameters"] == about["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert about["dtype"] == "float32"
    assert about["vocab_size"] == len(tokenizer) == 300
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert model.training
    assert describe_model(tiny(dtype="bfloat16")[0])["dtype"] == "bfloat16"


def test_adapters_start_as_the_model_and_train_alone():
    pytest.importorskip("peft")
    base, tokenizer = tiny()
    model, _ = tiny(lora=LoraConfig(rank=2))
    assert torch.equal(logits(model, tokenizer), logits(base, tokenizer))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)
    about = describe_model(model)
    assert about["architecture"] == "LlamaForCausalLM with LoRA"
    assert 0 < about["trainable_parameters"] < about["parameters"]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_checkpointing_gives_the_same_gradients(lora):
    def gradients(model, tokenizer):
        ids = torch.tensor([tokenizer.encode(TEXTS[0])])
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    if lora is not None:
        pytest.importorskip("peft")
    plain, checkpointed = (
        gradients(*tiny(gradient_checkpointing=checkpointing, lora=lora)) for checkpointing in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    model, tokenizer = tiny()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, words = load_policy(ModelConfig(name=str(tmp_path)))
    assert words.pad_token_id == words.eos_token_id
    words.pad_token = words.eos_token = None
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a padding nor an end-of-sequence token"):
        load_policy(ModelConfig(name=str(tmp_path)))


def test_a_chat_template_can_be_named(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert tiny(chat_template=str(template))[1].chat_template == "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"model.chat_template must name a file .*gone\.jinja"):
        tiny(chat_template="gone.jinja")


def test_names_that_cannot_be_models_are_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("./gone", "/gone/model", "~/gone", "a/b/c", "runs/gone"):
        with pytest.raises(ValueError, match="looks like a folder, and there is none"):
            load_policy(ModelConfig(name=name))
    with pytest.raises(ValueError, match=r"folder without a config\.json"):
        load_policy(ModelConfig(name="runs"))
    with pytest.raises(ValueError, match="got the file 'file'"):
        load_policy(ModelConfig(name="file"))
    with pytest.raises(ValueError, match="a folder, a hub name or 'tiny', got 'two words'"):
        load_policy(ModelConfig(name="two words"))


def test_a_folder_that_does_not_load_says_which(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.name='.*' cannot be loaded"):
        load_policy(ModelConfig(name=str(tmp_path)))


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    tiny()[0].save_pretrained(tmp_path)
    train_tokenizer(TEXTS, 310).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 310 tokens, the model embeds 300"):
        load_policy(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 258}, r"model.tiny.vocab_size must be at least 259 .*got 258"),
        ({"hidden_size": 18, "num_heads": 4}, "model.tiny.hidden_size must be an even multiple .* got 18"),
        ({"num_layers": 0}, "model.tiny.num_layers must be at least 1, got 0"),
    ],
)
def test_an_impossible_tiny_model_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        load_policy(ModelConfig(tiny=TinyModelConfig(**changes)), train_texts=TEXTS)


def test_the_tiny_model_needs_texts():
    with pytest.raises(ValueError, match=r"train_texts must be given for model\.name='tiny'"):
        load_policy(ModelConfig())


def test_sequences_longer_than_the_models_positions_are_refused():
    model, _ = tiny()
    check_positions(model, 64)
    with pytest.raises(ValueError, match=r"data.max_length must be at most the model's 64 positions, got 65"):
        check_positions(model, 65)
