"""One session of a training run: optimizer steps, evaluation, checkpoints (DSpark section 4)."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from deepspec.config import TrainRun
from deepspec.data.jsonl import DataError
from deepspec.data.sampler import StepSampler
from deepspec.features import FeatureQueue, StoppedWaiting
from deepspec.targets import TargetFeatures, dtype_name
from deepspec.training.batches import (
    EVALUATION,
    TRAINING,
    MicroBatch,
    batch_maker,
    batch_split,
    evaluation_batches,
    training_steps,
)
from deepspec.training.devices import cast_inside, launcher_name
from deepspec.training.finite import FINAL, NotFiniteError, not_finite, overflow_advice
from deepspec.training.flops import StepFlops, peak_flops
from deepspec.training.frozen import hold_target_weights_as_buffers
from deepspec.training.interrupt import StopRequest
from deepspec.training.meter import Meter, StepCount
from deepspec.training.metrics import add_sums, summarize
from deepspec.training.objective import DraftTrainingModule, compares_distributions
from deepspec.training.optimizer_state import whole_shape
from deepspec.training.report import Reporter
from deepspec.training.resume import Start
from deepspec.training.schedule import learning_rate, total_steps
from deepspec.training.setup import Materials
from deepspec.training.state import TrainerState

logger = logging.getLogger(__name__)

Sums = dict[str, Tensor]


class Trainer:
    """Trains from `start` to the end of the run, or until it is told to stop."""

    def __init__(
        self, config: TrainRun, accelerator: Accelerator, materials: Materials, start: Start, stop: StopRequest
    ):
        self.config = config
        self.accelerator = accelerator
        self.materials = materials
        self.steps = total_steps(config.train, len(materials.train_set))
        self.split = batch_split(config.train, accelerator.num_processes, materials.train_set.lengths())
        self.stop = stop
        self.features = FeatureQueue(
            materials.features,
            config.features.lookahead,
            accelerator.device,
            is_stopped=lambda: stop.requested,
            on_any_rank=self._on_any_rank,
        )
        self.meter = self._build_meter()
        materials.draft.checkpoint_activations = config.train.activation_checkpointing
        if config.train.compile:
            materials.draft.compile_layers()
        hold_target_weights_as_buffers(materials.draft, materials.target_dtype)
        self.module = DraftTrainingModule(materials.draft, config.train.loss, materials.target_head).to(
            accelerator.device
        )
        cast_inside(self.module, accelerator, config.train.mixed_precision)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.model, self.optimizer = accelerator.prepare(self.module, self._build_optimizer())
        samples = len(materials.train_set)
        self.state = TrainerState(config, accelerator, materials.draft, self.optimizer, self.steps, samples)
        if start.checkpoint is not None:
            self.state.restore(start.checkpoint)
        self.done = start.step
        self.checkpoint = start.checkpoint
        self.loss: float | None = None  # of the last step; None = it had no anchor
        self._saved_step = start.step if start.checkpoint else None
        self._empty_samples = 0

    def description(self) -> str:
        """What this session is going to do, in a line."""
        trained = sum(whole_shape(parameter).numel() for parameter in self.parameters) / 1e6
        origin = f"starting from {self.config.train.start_from or 'scratch'}"
        if self.checkpoint:
            origin = f"continuing from {self.checkpoint}"
        return (
            f"{origin}: {self.steps - self.done} of {self.steps} steps, {len(self.materials.train_set)} samples, "
            f"{trained:.2f} M trained parameters, {self.accelerator.num_processes} x {self.accelerator.device.type} "
            f"({launcher_name(self.accelerator)})"
        )

    def run(self, reporter: Reporter) -> bool:
        """Train and leave a checkpoint of the last step. Returns False when stopped before the end."""
        with closing(self.features):
            try:
                self._train(reporter)
            except StoppedWaiting:
                reporter.say(f"told to stop while waiting for features: what follows step {self.done} is given up")
            if self._saved_step != self.done:
                self._save()
        return self.done == self.steps

    def _train(self, reporter: Reporter) -> None:
        """To the last step, or to the first of which any rank was told to stop."""
        steps = self._announced_steps()
        while self.done < self.steps:
            with self.meter.step() as step:
                with self.meter.part("wait"):
                    batches = next(steps)
                    divisor, stops = self._over_ranks(batches, step)
                if stops:
                    break
                row = self._step(batches, divisor)
            self.done += 1
            row |= self.meter.read() if row else {}
            try:
                if self._evaluation_is_due():
                    row |= {f"eval/{name}": value for name, value in self.evaluate().items()}
            finally:
                reporter.step(self.done, self.loss, row)
            if self.done % self.config.train.save_steps == 0:
                self._save()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics over all of data.eval_files, with the same anchors every time."""
        eval_set = self.materials.eval_set
        assert eval_set is not None
        split = batch_split(self.config.train, self.accelerator.num_processes, eval_set.lengths())
        parts: list[Sums] = []
        self.module.eval()
        maker = batch_maker(self.config, self.materials.draft, self.materials.pad_id, EVALUATION)
        for batch, counts in evaluation_batches(eval_set, maker, split, self.accelerator.process_index):
            features = self.features.out_of_turn(batch.tokens)
            sums = self._forward(self.module, batch, features, with_metrics=True)
            if counts:
                parts.append(sums)
        self.module.train()
        return self._summary(add_sums(parts))

    def _step(self, batches: Sequence[MicroBatch], divisor: float) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches; metrics when this step is logged.

        The loss is divided by the divisor of the whole global batch. DDP and DeepSpeed average gradients over ranks,
        so their number is multiplied back in.
        """
        is_logged = (self.done + 1) % self.config.logging.log_steps == 0 or self.done + 1 == self.steps
        rate = self._set_learning_rate()
        if divisor == 0:
            self._note_empty_step(batches)
            self.loss = None
            return {"lr": rate, "supervised_weight": 0.0} if is_logged else {}
        self._empty_samples = 0
        scale = self.accelerator.num_processes / divisor
        parts: list[Sums] = []
        for batch in batches:
            is_last = batch is batches[-1]
            self.accelerator.sync_gradients = is_last
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.meter.part("features"):
                    features = self.features.next()
                with self.meter.part("forward"):
                    sums = self._forward(self.model, batch, features, with_metrics=is_logged)
                    parts.append({name: value.detach() for name, value in sums.items()})
                    if is_last:  # DeepSpeed applies the step inside this backward pass
                        self.loss = self._checked_loss(parts, batches) / divisor
                with self.meter.part("backward"):
                    self.accelerator.backward(sums["loss"] * scale)
        with self.meter.part("optimizer"):
            gradient_norm = self._apply_gradients()
        if not is_logged:
            return {}
        figures = {
            "lr": rate,
            "grad_norm": gradient_norm,
            "epoch": self._epochs_done(),
            "supervised_weight": divisor,
        }
        return self._summary(add_sums(parts)) | figures

    def _forward(
        self, model: torch.nn.Module, batch: MicroBatch, features: TargetFeatures, *, with_metrics: bool
    ) -> Sums:
        return model(
            **batch.to(self.accelerator.device),
            context_features=features.context,
            final_features=features.final,
            with_metrics=with_metrics,
        )

    def _apply_gradients(self) -> float:
        limit = self.config.train.grad_clip or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise NotFiniteError(self._explain_not_finite("the gradient norm", norm, []))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _checked_loss(self, parts: Sequence[Sums], batches: Sequence[MicroBatch]) -> float:
        """Sum of the losses of all micro-batches of all ranks; the one host synchronisation before the step is applied.

        Raises:
            NotFiniteError: it is not finite; with the features or else the samples that made it so.
        """
        losses = torch.stack([part["loss"] for part in parts])
        total = float(self.accelerator.reduce(losses.sum(), "sum"))
        if math.isfinite(total):
            return total
        pairs = zip(losses.isfinite().tolist(), batches, strict=True)
        concerned = [batch for finite, batch in pairs if not finite]
        if found := gather_object([place for batch in concerned for place in self._features_not_finite(batch)]):
            raise NotFiniteError(self._explain_overflow(found))
        culprits = gather_object([document.index for batch in concerned for document in batch.tokens.documents])
        raise NotFiniteError(self._explain_not_finite("the loss", total, culprits))

    def _features_not_finite(self, batch: MicroBatch) -> list[tuple[int, str]]:
        """The features are computed again: those that the loss was made of are gone."""
        features = self.materials.features.batch_features(batch.tokens)
        return list(not_finite(features, batch.tokens.documents, self.materials.draft.target_layer_ids))

    def _explain_overflow(self, found: Sequence[tuple[int, str]]) -> str:
        samples = ", ".join(self.materials.train_set.id_of(index) for index in dict.fromkeys(i for i, _ in found))
        parts = sorted({part for _, part in found}, key=lambda part: (part == FINAL, len(part), part))
        advice = overflow_advice(dtype_name(self.materials.target_dtype), self.config.features.source)
        return (
            f"step {self.done + 1}: the target's features are not finite: {', '.join(parts)} of samples {samples} (ids "
            f"in data.train_files). {advice}; nothing was saved from this step, {self._survivor()}"
        )

    def _explain_not_finite(self, what: str, value: float, culprits: list[int]) -> str:
        ids = [self.materials.train_set.id_of(index) for index in culprits]
        samples = f" Samples of the micro-batches concerned (ids in data.train_files): {', '.join(ids)}." if ids else ""
        return (
            f"step {self.done + 1}: {what} is {value}; training stopped before anything was saved from it, "
            f"{self._survivor()}.{samples} Look at those samples, lower train.lr={self.config.train.lr} or "
            f"train.grad_clip={self.config.train.grad_clip}, or lengthen train.warmup_ratio="
            f"{self.config.train.warmup_ratio}, in a new output_dir"
        )

    def _survivor(self) -> str:
        return f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"

    def _on_any_rank(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum"))

    def _over_ranks(self, batches: Sequence[MicroBatch], count: StepCount) -> tuple[float, bool]:
        """What the loss of the global batch is divided by, and whether any rank was told to stop; fills in `count`."""
        totals = [
            sum(batch.divisor for batch in batches),
            self.stop.requested,
            sum(batch.tokens.tokens for batch in batches),
            sum(batch.num_blocks for batch in batches),
            sum(batch.num_slots for batch in batches),
        ]
        if self.accelerator.num_processes > 1:
            tensor = torch.tensor(totals, dtype=torch.float64, device=self.accelerator.device)
            totals = self.accelerator.reduce(tensor, "sum").tolist()
        divisor, stops, *counts = totals
        count.tokens, count.anchors, count.slots = map(int, counts)
        return float(divisor), bool(stops)

    def _note_empty_step(self, batches: Sequence[MicroBatch]) -> None:
        """A global batch without a single anchor changes nothing; a whole pass of them is an error."""
        for _ in batches:
            self.features.next()
        logger.warning("step %d: no sample of the batch has a place for an anchor; nothing is learned", self.done + 1)
        self._empty_samples += self.config.train.global_batch_size
        if self._empty_samples >= len(self.materials.train_set):
            raise DataError(
                f"{', '.join(self.config.data.train_files)}: a whole pass over the data found no place for an "
                "anchor, which needs two assistant tokens in a row: look at the assistant turns, data.chat_template "
                f"and data.max_length={self.config.data.max_length}"
            )

    def _announced_steps(self) -> Iterator[list[MicroBatch]]:
        """Each step's micro-batches, once the features of the step behind it have been asked for as well."""
        sampler = StepSampler(
            self.split,
            len(self.materials.train_set),
            rank=self.accelerator.process_index,
            seed=self.config.seed,
            start_step=self.done,
            steps=self.steps,
        )
        maker = batch_maker(self.config, self.materials.draft, self.materials.pad_id, TRAINING)
        steps = training_steps(self.materials.train_set, sampler, maker, self.config.data.num_workers)
        ahead: deque[list[MicroBatch]] = deque()
        for batches in steps:
            self.features.announce(batch.tokens for batch in batches)
            ahead.append(batches)
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _build_meter(self) -> Meter:
        draft = self.materials.draft
        flops = StepFlops(
            draft,
            self.materials.features.flops_per_token,
            needs_target_logits=compares_distributions(draft, self.config.train.loss),
        )
        peak = peak_flops(self.accelerator.device) if self.config.train.mixed_precision == "bf16" else None
        return Meter(self.accelerator.device, flops, peak and peak * self.accelerator.num_processes)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        train = self.config.train
        fused = self.accelerator.device.type == "cuda"
        return torch.optim.AdamW(self.parameters, lr=train.lr, weight_decay=train.weight_decay, fused=fused)

    def _set_learning_rate(self) -> float:
        train = self.config.train
        rate = learning_rate(self.done, peak=train.lr, warmup_ratio=train.warmup_ratio, steps=self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _save(self) -> None:
        self.checkpoint = self.state.save(self.done)
        self._saved_step = self.done

    def _summary(self, sums: Sums) -> dict[str, float]:
        """Metrics of the sums of all ranks; a rank without a batch has none."""
        return summarize(add_sums(gather_object([{name: value.cpu() for name, value in sums.items()}])))

    def _epochs_done(self) -> float:
        return (self.done + 1) * self.config.train.global_batch_size / len(self.materials.train_set)

    def _evaluation_is_due(self) -> bool:
        due = self.done % self.config.train.eval_steps == 0 or self.done == self.steps
        return due and self.materials.eval_set is not None
