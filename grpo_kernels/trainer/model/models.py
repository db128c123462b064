"""The policy and its tokenizer: a folder, a hub name, or a small model made on the spot."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import LoraConfig, ModelConfig, TinyModelConfig

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_BYTES_AND_SPECIALS = 256 + 3
# A role in brackets, the text, and an end: enough for the embedded model to take chat messages.
_TINY_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n[assistant] ' }}{% endif %}"
)


def load_policy(config: ModelConfig, *, train_texts: Iterable[str] | None = None, seed: int = 0) -> tuple[Any, Any]:
    """The policy that is trained, and its tokenizer.

    Args:
        config: which model, adapters, parameter dtype.
        train_texts: what the embedded model's tokenizer is trained on; others need none.
        seed: of new parameters, the embedded model's and adapters'.  The global random state is left as it was.

    Returns:
        (model, tokenizer): on the CPU, in training mode, the tokenizer with a padding token.

    Raises:
        ValueError: a folder that is not there or holds no model; a name that can be neither; the embedded model
            without texts, or of an impossible shape; a vocabulary larger than the model's.
        ImportError: transformers (or peft, for adapters) is not installed.
    """
    _needs_transformers()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.name == "tiny":
            if train_texts is None:
                raise ValueError("train_texts must be given for model.name='tiny': its tokenizer is trained on them")
            model, tokenizer = _tiny(config.tiny, train_texts, getattr(torch, config.dtype))
        else:
            model, tokenizer = _pretrained(config)
        if config.chat_template is not None:
            tokenizer.chat_template = _read_template(config.chat_template)
        _ensure_pad_token(tokenizer, config.name)
        _check_vocabulary(model, tokenizer)
        model.config.use_cache = False  # keys and values of past tokens are for generating
        if config.gradient_checkpointing:
            _checkpoint_activations(model)
        if config.lora is not None:
            model = _with_adapters(model, config.lora)
    return model.train(), tokenizer


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars that ``transformers`` draws for every file it reads or writes, over ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def describe_model(model: Any) -> dict[str, Any]:
    """What one wants to know of a model at a glance.

    Returns:
        ``architecture``, ``parameters``, ``trainable_parameters``, ``dtype``, ``vocab_size``.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = list(model.parameters())
    return {
        "architecture": type(inner).__name__.removeprefix("FSDP") + ("" if inner is model else " with LoRA"),
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
        "vocab_size": inner.config.vocab_size,
    }


def check_positions(model: Any, max_length: int) -> None:
    """Refuse sequences longer than the model has positions for.

    Raises:
        ValueError: naming both numbers.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"data.max_length must be at most the model's {positions} positions, got {max_length}")


def _needs_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("models need transformers: pip install 'grpo-kernels[train]'") from error


def _tiny(config: TinyModelConfig, texts: Iterable[str], dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("hidden_size", "num_layers", "num_heads", "max_positions"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.tiny.{name} must be at least 1, got {getattr(config, name)}")
    if config.hidden_size % (2 * config.num_heads):
        raise ValueError(
            f"model.tiny.hidden_size must be an even multiple of model.tiny.num_heads={config.num_heads} "
            f"(rotary positions turn pairs of numbers), got {config.hidden_size}"
        )
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_positions)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model.to(dtype), tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int = 1024) -> Any:
    """A byte-level BPE tokenizer of these texts: any text there is comes back from it unchanged.

    Args:
        texts: in any order; the same texts give the same tokenizer.
        vocab_size: at most so many words, 256 bytes and three special tokens among them.
        model_max_length: as the tokenizer's configuration will carry it.

    Returns:
        A ``transformers`` tokenizer, with beginning, end and padding tokens and a plain chat template.

    Raises:
        ValueError: too small a vocabulary for the bytes alone.
    """
    if vocab_size < _BYTES_AND_SPECIALS:
        raise ValueError(
            f"model.tiny.vocab_size must be at least {_BYTES_AND_SPECIALS} (256 bytes and 3 special tokens), "
            f"got {vocab_size}"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        chat_template=_TINY_CHAT_TEMPLATE,
    )


def _pretrained(config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, local = _folder_or_hub_name(config.name, config.revision)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": local}
    if config.revision is not None and not local:
        options["revision"] = config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, config.dtype), **options)
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file brings about, a pickle that is none among it
        raise ValueError(f"model.name={config.name!r} cannot be loaded: {error or type(error).__name__}") from error
    return model, tokenizer


def _folder_or_hub_name(name: str, revision: str | None) -> tuple[str, bool]:
    """(what to load, whether it is a folder).  What looks like a folder and is none is never asked of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise ValueError(f"model.name={name!r} is a folder without a config.json, so it holds no model")
        return str(path), True
    if path.exists():
        raise ValueError(f"model.name must be a folder, a hub name or 'tiny', got the file {name!r}")
    looks_like_path = name.startswith((".", "~", "/")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)
    parent_is_here = "/" in name and path.parent.is_dir() and revision is None
    if looks_like_path or parent_is_here:
        hint = "; if it is meant as a hub name, set model.revision too" if not looks_like_path else ""
        raise ValueError(f"model.name={name!r} looks like a folder, and there is none{hint}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"model.name must be a folder, a hub name or 'tiny', got {name!r}")
    return name, False


def _read_template(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"model.chat_template must name a file with a Jinja template, there is no {name!r}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.chat_template={name!r} cannot be read: {error}") from error


def _ensure_pad_token(tokenizer: Any, name: str) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of model.name={name!r} has neither a padding nor an end-of-sequence token")
        # Padding is masked and never scored, so any token will do; no new one, the embedding would have to grow.
        tokenizer.pad_token = tokenizer.eos_token


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}: they do not belong together"
        )


def _checkpoint_activations(model: Any) -> None:
    # Non-reentrant, since it alone works where the inputs of a block need no gradient, as with adapters.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # as earlier transformers 5 calls it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _with_adapters(model: Any, config: LoraConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("model.lora needs peft: pip install 'grpo-kernels[train]'") from error
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, adapters)
    except (ValueError, re.error) as error:  # layers may be named by a regular expression
        raise ValueError(f"model.lora cannot be applied to this model: {error}") from error
