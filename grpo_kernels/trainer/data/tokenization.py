"""From text to tokens: where the prompt ends and the reply begins, and what is cut when both are too long.

Prompt and reply are tokenized apart and joined, never tokenized as one text.  Tokenized as one, a token may straddle
the border, chosen and rejected would then disagree about the prompt, and the reply's first token would carry a piece
of it.  Apart, both replies follow the very tokens that the model is given when it generates, which is what their
log-probabilities should be conditioned on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .reading import Pair, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_and_reply_texts(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as plain text, chat messages through the tokenizer's chat template.

    Args:
        pair: strings, which come back as they are, or chat messages.
        tokenizer: with a chat template, where there are chat messages.

    Returns:
        Three strings; prompt + reply is the whole dialogue.

    Raises:
        ValueError: no chat template, or one that does not write the prompt alone as the beginning of the dialogue.
    """
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(prompt, str):
        return prompt, str(chosen), str(rejected)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{pair.where}: holds chat messages, and the tokenizer has no chat template; name a file with one in "
            "model.chat_template, or use plain strings"
        )
    start = _templated(tokenizer, prompt, True, pair.where)
    replies = []
    for field, reply in (("chosen", chosen), ("rejected", rejected)):
        whole = _templated(tokenizer, [*prompt, *reply], False, pair.where)
        if not whole.startswith(start):
            at = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(whole))
            raise ValueError(
                f"{pair.where}: the chat template does not write the prompt alone as the beginning of prompt and "
                f"{field}: they part at {start[at : at + 30]!r} against {whole[at : at + 30]!r}; name a file with a "
                "template that does in model.chat_template"
            )
        replies.append(whole[len(start) :])
    return start, replies[0], replies[1]


def _templated(tokenizer: Any, messages: Text, add_generation_prompt: bool, where: str) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # whatever a template raises, as for roles that do not alternate
        raise ValueError(f"{where}: the chat template refuses these messages: {error}") from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # from a field that only the template knows
        raise ValueError(f"{where}: the chat template writes half a surrogate pair") from error
    return text


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text alone, without special tokens around it."""
    # verbose=False: what is longer than the model's window is cut below, there is nothing to warn of.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def fit_prompt(ids: list[int], bos: int | None, fallback: int | None, max_prompt_length: int) -> tuple[list[int], bool]:
    """A prompt within its limit: it begins with ``bos`` where there is one, and keeps its end.

    Args:
        ids: tokens of the prompt, possibly with ``bos`` in front already, as chat templates write it.
        bos: beginning of sequence, or None.
        fallback: what stands in for a prompt without tokens, so that the first token of the reply is predicted too.
        max_prompt_length: at least 1.

    Returns:
        The tokens, and whether any were cut.
    """
    if bos is not None and ids[:1] == [bos]:
        ids = ids[1:]
    head = [bos] if bos is not None else []
    if not ids and not head and fallback is not None:
        head = [fallback]
    room = max_prompt_length - len(head)
    cut = len(ids) > room
    return head + (ids[len(ids) - room :] if cut else ids), cut


def fit_reply(ids: list[int], eos: int | None, room: int) -> tuple[list[int], bool]:
    """A reply within ``room`` tokens: it keeps its beginning, and ends with ``eos``, where given, only if whole."""
    if not ids:
        return [], False
    if eos is not None and ids[-1] != eos:
        ids = [*ids, eos]
    return ids[: max(room, 0)], len(ids) > room
