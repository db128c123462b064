"""The reference's log-probabilities, computed once and kept on disk under a fingerprint of all they depend on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import DataConfig, LossConfig
from ..model.distributed import ALONE, Ranks
from ..model.scoring import pair_logps
from .directory import write_atomically

# The architecture's name is filled in when a model is first saved; its parameters' names say as much.
_NOT_THE_MODEL = {"_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"}
_LENGTHS = ("max_length", "max_prompt_length", "append_eos")


def fingerprint_model(model: torch.nn.Module, ranks: Ranks = ALONE) -> str:
    """SHA-256 over the architecture's settings and every parameter and buffer, bit for bit; sharded or not."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = ranks.whole(tensor.detach()).cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True),
        str(getattr(tokenizer, "chat_template", None)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def fingerprint(
    model: torch.nn.Module, tokenizer: Any, dataset: Any, data: DataConfig, *, bf16: bool, ranks: Ranks = ALONE
) -> str:
    """The name under which the log-probabilities of one data set by one model are kept.

    Args:
        model: the reference.
        tokenizer: with its chat template.
        dataset: a :class:`~.data.PairDataset`.
        data: lengths and truncation.
        bf16: whether the forward pass is autocast.
        ranks: that hold the model; all must ask.

    Returns:
        32 hexadecimal digits; another model, tokenizer, template, length, token or order gives others.
    """
    parts = {
        "model": fingerprint_model(model, ranks),
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "data": dataset.fingerprint(),
        "lengths": {key: value for key, value in asdict(data).items() if key in _LENGTHS},
        "bf16": bf16,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def reference_logps(
    folder: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    dataset: Any,
    data: DataConfig,
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    *,
    loss: LossConfig,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Log-probabilities of every reply by the reference, from the cache where they are there.

    Neither computing nor reading draws a random number, so a run goes the same way with a full cache and an empty one.

    Args:
        folder: of the cache.
        model: the reference, which is the policy as it stands before training.
        tokenizer, dataset, data: what is scored, and how it came to be.
        collate: pairs → batch.
        loss, batch_size, device, bf16, ranks: as in :func:`~.scoring.pair_logps`; the first rank reads and writes the
            cache.

    Returns:
        (N, 2) float32 on the CPU, chosen and rejected, in nats.

    Raises:
        ValueError: the reference gives a log-probability that is not finite; names the first such pair.
    """
    path = folder / f"{fingerprint(model, tokenizer, dataset, data, bf16=bf16, ranks=ranks)}.safetensors"
    with ranks.together():
        cached = _read(path, len(dataset.pairs)) if ranks.first else None
    cached = ranks.broadcast(cached)
    if cached is not None:
        return cached
    logps = pair_logps(model, dataset, collate, loss=loss, batch_size=batch_size, device=device, bf16=bf16, ranks=ranks)
    bad = (~logps.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ranks.alike(
            ValueError(
                f"the reference model gives {logps[bad[0]].tolist()} as log-probabilities of pair {bad[0]} "
                f"({dataset.where[bad[0]]}), {len(bad)} of {len(logps)} pairs in all; they must be finite"
            )
        )
    with ranks.together():
        if ranks.first:
            _write(path, logps)
    return logps


def _read(path: Path, num_pairs: int) -> torch.Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        return None
    try:
        tensors = load(path.read_bytes())
        logps, written = tensors["logps"], tensors["sha256"]
        whole = logps.shape == (num_pairs, 2) and logps.dtype == torch.float32 and torch.equal(written, _sum(logps))
    except (SafetensorError, OSError, KeyError) as error:
        warnings.warn(f"the cached reference {path} is damaged ({error}); computing it again", stacklevel=3)
        return None
    if not whole:
        warnings.warn(
            f"the cached reference {path} is damaged (not what was written); computing it again", stacklevel=3
        )
        return None
    return logps


def _write(path: Path, logps: torch.Tensor) -> None:
    from safetensors.torch import save

    write_atomically(path, save({"logps": logps, "sha256": _sum(logps)}))


def _sum(logps: torch.Tensor) -> torch.Tensor:
    """SHA-256 of the numbers, as 32 bytes."""
    return torch.tensor(list(hashlib.sha256(logps.contiguous().numpy().tobytes()).digest()), dtype=torch.uint8)
