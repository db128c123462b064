"""Training, start to end, in one loop: :func:`train`.

A step is: draw a batch, forward, loss (in which alpha moves), backward, clip, step, project, average.  Around it: the
reference scored once before, evaluation by group, checkpoints from which a run goes on bit for bit.  Under ``torchrun``
every rank runs this loop on its slice of the same batches, and the first one writes.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import GroupLossOutput
from .config import TrainConfig
from .data import PairDataset, PreferenceCollator
from .evaluation import evaluate
from .inputs import Inputs, read_inputs
from .model.distributed import Ranks, local_part, open_ranks
from .model.optim import (
    BallProjection,
    IterateAverage,
    NonFiniteError,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    trained_parameters,
)
from .model.policy import Policy
from .model.scoring import group_loss
from .run.checkpoint import (
    clear_unfinished,
    forget_older,
    load_latest,
    save_checkpoint,
    seed_random,
    sorted_checkpoints,
)
from .run.directory import (
    CHECKPOINTS,
    FINAL,
    FINAL_AVERAGE,
    METRICS,
    REFERENCE,
    START,
    TENSORBOARD,
    RunDirectory,
)
from .run.group_report import GroupReport
from .run.metrics import Metrics
from .run.progress import Progress
from .run.reference_cache import reference_logps
from .run.results import save_config, save_model, write_summary
from .run.state import TrainState, check_resumable, run_identity, share_checkpoint
from .run.terminal import printable
from .supervised import warm_up


@dataclass
class RunResult:
    """What a run came to.

    Args:
        run_dir: where everything is.
        steps: optimizer steps done.
        report: held-out evaluation of the last iterate; None without test pairs.
        average_report: of the averaged iterate; None unless ``optim.average_iterates``.
        group_weights: alpha in force at the end, by group.
        summary: what summary.json holds.
    """

    run_dir: Path
    steps: int
    report: GroupReport | None
    average_report: GroupReport | None
    group_weights: dict[str, float]
    summary: dict[str, Any]


def train(config: TrainConfig) -> RunResult:
    """Train a policy on preference pairs in groups; seeds the global random streams with ``config.seed``.

    Args:
        config: see :class:`TrainConfig`.  With ``resume``, goes on from the last checkpoint in ``run_dir`` so that
            parameters, optimizer, alpha and metrics end with the same bits as if nothing had happened; where there is
            no checkpoint yet, starts at the beginning.  Under ``torchrun`` every process calls this; a checkpoint of
            one number of ranks can be resumed on another.

    Returns:
        RunResult.

    Raises:
        ValueError, TypeError: configuration or data, with the setting or the file, line and field; before anything is
            written.  On resuming, also a setting that differs from the checkpoint's.
        NonFiniteError: a loss, a gradient or a parameter is not finite; the last checkpoint stays as it was.
        CheckpointError: a checkpoint cannot be saved, or none can be read.
        PeerError: any of these went wrong on another rank; the ranks after the first raise it for all of them.
    """
    config.check()
    config = replace(config, run_dir=str(Path(config.run_dir).expanduser()))
    began = time.monotonic()
    with open_ranks(config.distributed, config.device) as ranks, ExitStack() as stack:
        if not ranks.first:
            config = replace(config, quiet=True)
        with ranks.together():
            inputs = read_inputs(config, ranks)
        with ranks.together():
            if ranks.size > 1:
                ranks.require_equal(run_identity(config, inputs.model, inputs.train_set, inputs.test_set))
            if ranks.first:
                stack.enter_context(RunDirectory(config.run_dir, overwrite=config.overwrite, resume=config.resume))
        return _Job(config, ranks, inputs).run(began)


class _Job:
    """One run once its parts are there."""

    def __init__(self, config: TrainConfig, ranks: Ranks, inputs: Inputs) -> None:
        self.config, self.ranks, self.directory = config, ranks, Path(config.run_dir)
        self.tokenizer, self.sampler = inputs.tokenizer, inputs.sampler
        self.train_set, self.test_set = inputs.train_set, inputs.test_set
        self.policy = Policy(inputs.model, config.distributed, ranks)
        self.model = self.policy.model
        # Beside the model and not in it: ranks agree on alpha by themselves.
        self.group_weights = inputs.group_weights.to(ranks.device)
        self.collate = PreferenceCollator(self.tokenizer.pad_token_id)
        self.parameters = trained_parameters(self.model)
        self.optimizer = make_optimizer(self.parameters, config.optim)
        self.project: BallProjection | None = None
        self.micro_batch_size = config.micro_batch_size or config.batch_size // ranks.size
        # By the configuration and not by this rank's share: whether alpha lags must not depend on the number of ranks.
        self.accumulates = config.micro_batch_size not in (None, config.batch_size)

    def run(self, began: float) -> RunResult:
        config, ranks, folder = self.config, self.ranks, self.directory / CHECKPOINTS
        checkpoint = None
        with ranks.together():
            if ranks.first:
                clear_unfinished(folder)
                checkpoint = load_latest(folder) if config.resume else None
                if checkpoint is not None:
                    check_resumable(config, checkpoint, self.train_set, self.test_set)
                    forget_older(folder, checkpoint.step, keep=config.keep_checkpoints)
                elif config.resume:
                    _say(config, f"no checkpoint in {self.directory}: starting at the beginning")
                save_config(config, self.directory)
        checkpoint = share_checkpoint(checkpoint, ranks)
        seed_random(config.seed, ranks.rank)

        average = IterateAverage(self.parameters) if config.optim.average_iterates else None
        state = TrainState(self.model, self.parameters, self.optimizer, self.group_weights, average, ranks)
        if checkpoint is not None:
            state.restore(checkpoint)
            _say(config, f"resuming after step {state.step}")
        metrics = Metrics(
            self.directory / METRICS if ranks.first else None,
            keep_bytes=state.metrics_bytes,
            tensorboard=self.directory / TENSORBOARD if config.tensorboard else None,
            step=state.step,
        )
        try:
            if checkpoint is None:
                self._before_training(state, metrics)
            self.project = self._projection(state)
            report, average_report = self._loop(state, metrics, began)
        except KeyboardInterrupt:
            saved = sorted_checkpoints(folder)
            last = f"the last checkpoint is {saved[-1]}; resume goes on from it" if saved else "there is no checkpoint"
            if ranks.first:
                print(f"\ninterrupted after step {state.step}: {last}", file=sys.stderr)
            raise
        finally:
            metrics.close()
        return self._finish(state, report, average_report, began)

    def _before_training(self, state: TrainState, metrics: Metrics) -> None:
        """The warm-up, then the reference: the policy as it stands now, scored once on every pair."""
        config = self.config
        if config.supervised.steps:
            warm_up(self.policy, self.parameters, self.train_set, self.collate, config, metrics)
        if config.supervised.steps or config.model.name == "tiny":
            # What cannot be loaded again by name is kept, so that other pairs can be evaluated against it.
            self._save_model(START)
        if config.optim.projection == "start":
            state.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        cache = Path(config.reference_cache) if config.reference_cache else self.directory / REFERENCE
        for split, dataset in (("train", self.train_set), ("test", self.test_set)):
            if dataset is not None:
                _say(config, f"reference log-probabilities of {len(dataset)} {split} pairs")
                state.reference[split] = reference_logps(
                    cache, self.model, self.tokenizer, dataset, config.data, self.collate,
                    loss=config.loss, batch_size=self.micro_batch_size, device=self.ranks.device, bf16=config.bf16,
                    ranks=self.ranks,
                )  # fmt: skip

    def _loop(self, state: TrainState, metrics: Metrics, began: float) -> tuple[GroupReport | None, GroupReport | None]:
        config, steps = self.config, self.config.steps
        progress = Progress(steps, state.step, config.groups.method, config.quiet)
        report = average_report = None
        earlier = state.seconds
        self.model.train()
        for step in range(state.step, steps):
            rate = learning_rate(step, steps, config.optim)
            set_learning_rate(self.optimizer, rate)
            indices = self.sampler.whole_batch(step)
            losses, margins, loss = self._gradients(self.sampler.batch(step), state.reference["train"])
            norm = clip_gradients(self.parameters.values(), config.optim.max_grad_norm, self.ranks)
            self._refuse_non_finite(step + 1, indices, losses, norm)
            if self.accumulates:
                self.group_weights.step()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.project is not None:
                self.project()
            if state.average is not None:
                state.average.update()
            state.step = done = step + 1
            last = done == steps
            group_ids = torch.tensor([self.train_set[i].group_id for i in indices])
            state.window.add(losses, margins, group_ids, loss)

            note = None
            if done % config.log_every == 0 or last:
                record = state.window.record(self.train_set.groups)
                alpha = self.alpha()
                metrics.write(
                    {"kind": "train", "step": done, "lr": rate, "grad_norm": float(norm), **record, "alpha": alpha}
                )
                worst = record["worst_group"]
                note = f"loss {record['loss']:.3f}  worst {printable(worst, 24)} {record['groups'][worst]['loss']:.3f}"
                note += f"  alpha {alpha[worst]:.3f}"
                state.window.clear()
            if self.test_set is not None and (last or (config.eval_every and done % config.eval_every == 0)):
                report, average_report = self._evaluate(state, self.test_set, metrics)
            if last or (config.save_every and done % config.save_every == 0):
                self._refuse_non_finite_parameters(done)
                state.metrics_bytes = metrics.sync()
                state.seconds = earlier + time.monotonic() - began
                saved = state.checkpoint(config, self.train_set, self.test_set)
                with self.ranks.together():
                    if saved is not None:
                        save_checkpoint(self.directory / CHECKPOINTS, saved, keep=config.keep_checkpoints)
            progress.advance(note)
        progress.close()
        if report is None and self.test_set is not None:  # resumed where there was nothing left to do
            report, average_report = self._evaluate(state, self.test_set, None)
        return report, average_report

    def _gradients(self, indices: list[int], reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Forward and backward of one step on this rank's share of it.

        Returns:
            (B,) losses and margins of all ranks, on the CPU, and the robust loss.

        Micro-batches are weighted with the alpha of the step before: the first has to be, since the losses of the last
        are not known yet, and then all should be.
        """
        device = self.ranks.device
        outputs = []
        total = torch.zeros((), device=device)
        for first in range(0, len(indices), self.micro_batch_size):
            chunk = indices[first : first + self.micro_batch_size]
            batch = {name: tensor.to(device) for name, tensor in self._batch(chunk).items()}
            ref_logps = reference[chunk].t().reshape(-1).to(device)
            with self.policy.accumulating(last=first + self.micro_batch_size >= len(indices)):
                with self.group_weights.accumulate() if self.accumulates else nullcontext():
                    out = self._loss(batch, ref_logps)
                # The loss divides by the pairs of the chunk; the step is over the whole batch, and ranks, which hold
                # equally many pairs, average.
                loss = out.loss * (len(chunk) / len(indices))
                loss.backward()
            total += loss.detach()
            outputs.append(torch.stack([out.losses.detach(), out.margins.detach()]))
        seen = torch.cat(outputs, dim=1)
        losses, margins, totals = self.ranks.gather(torch.cat([seen, total.expand(1, len(indices))]), dim=1).cpu()
        return losses, margins, float(totals[:: len(indices)].mean())

    def _loss(self, batch: dict[str, torch.Tensor], ref_logps: torch.Tensor) -> GroupLossOutput:
        config = self.config
        return group_loss(self.policy.trained, batch, ref_logps, self.group_weights, config.loss, bf16=config.bf16)

    def _refuse_non_finite(self, step: int, indices: list[int], losses: torch.Tensor, norm: torch.Tensor) -> None:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad and bool(norm.isfinite()):
            return
        self.group_weights.discard()
        groups = self.train_set.groups
        at_fault = [indices[i] for i in bad] or indices
        named = "; ".join(
            f"{self.train_set.where[i]} (group {groups[self.train_set[i].group_id]!r})" for i in at_fault[:8]
        )
        more = f"; and {len(at_fault) - 8} more" if len(at_fault) > 8 else ""
        if bad:
            values = ", ".join(f"{float(losses[i]):g}" for i in bad[:8])
            what = f"the loss of {len(bad)} of {len(indices)} pairs is not finite ({values}): {named}{more}"
        else:
            grads = {name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None}
            counts = self.ranks.sum(torch.stack([(~grad.isfinite()).sum() for grad in grads.values()]))
            parameter = next((name for name, count in zip(grads, counts.tolist(), strict=True) if count), "none")
            what = (
                f"every loss is finite, but the gradient is not (norm {float(norm):g}, parameter {parameter} first); "
                f"the batch was {named}{more}"
            )
        raise self.ranks.alike(NonFiniteError(f"step {step}: {what}. Nothing of this step was kept."))

    def _refuse_non_finite_parameters(self, step: int) -> None:
        """A finite gradient can still lead out of float32; what it led to must not take a good checkpoint's place."""
        counts = self.ranks.sum(torch.stack([(~local_part(p).isfinite()).sum() for p in self.parameters.values()]))
        bad = [name for name, count in zip(self.parameters, counts.tolist(), strict=True) if count]
        if bad:
            raise self.ranks.alike(
                NonFiniteError(
                    f"step {step}: {len(bad)} of {len(self.parameters)} parameters are not finite, {bad[0]} first; "
                    f"nothing was saved. Lower optim.lr={self.config.optim.lr:g}, and resume or start again."
                )
            )

    def _evaluate(
        self, state: TrainState, test_set: PairDataset, metrics: Metrics | None
    ) -> tuple[GroupReport, GroupReport | None]:
        config = self.config

        def one() -> GroupReport:
            return evaluate(
                self.model, test_set, state.reference["test"], config.loss, self.collate,
                batch_size=self.micro_batch_size, device=self.ranks.device, bf16=config.bf16, ranks=self.ranks,
            )  # fmt: skip

        report, average_report = one(), None
        record: dict[str, Any] = {"kind": "eval", "step": state.step, **report.to_dict(), "alpha": self.alpha()}
        if state.average is not None:
            with state.average:
                average_report = one()
            record["average"] = average_report.to_dict()
        if metrics is not None:
            metrics.write(record)
        return report, average_report

    def _finish(
        self, state: TrainState, report: GroupReport | None, average_report: GroupReport | None, began: float
    ) -> RunResult:
        config = self.config
        self._save_model(FINAL)
        if state.average is not None:
            with state.average:
                self._save_model(FINAL_AVERAGE)
        alpha = self.alpha()
        summary: dict[str, Any] = {}
        with self.ranks.together():
            if self.ranks.first:
                summary = write_summary(
                    self.directory, config, self.model, self.train_set, self.test_set, self.sampler.sampling_probs,
                    alpha, report, average_report, seconds=state.seconds or time.monotonic() - began,
                )  # fmt: skip
        summary = self.ranks.broadcast(summary)
        if not config.quiet and report is not None:
            print(f"\nheld out, after {state.step} steps of {config.groups.method}\n{report.table(alpha)}")
            if average_report is not None:
                print(f"\nthe averaged iterate\n{average_report.table(alpha)}")
        return RunResult(self.directory, state.step, report, average_report, alpha, summary)

    def _save_model(self, name: str) -> None:
        model = self.policy.portable()
        with self.ranks.together():
            if model is not None:
                # The embedded model has no name to load its base by: adapters become part of it.
                save_model(model, self.tokenizer, self.directory / name, merge=self.config.model.name == "tiny")

    def alpha(self) -> dict[str, float]:
        """Alpha in use, by group."""
        return dict(zip(self.train_set.groups, self.group_weights.weights.tolist(), strict=True))

    def _projection(self, state: TrainState) -> BallProjection | None:
        optim = self.config.optim
        if optim.projection == "none":
            return None
        return BallProjection(self.parameters, optim.projection_radius, state.start or None, self.ranks)

    def _batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.train_set[i] for i in indices])


def _say(config: TrainConfig, text: str) -> None:
    if not config.quiet:
        print(text, file=sys.stderr)
