"""The loop of `ipdiverse train`. Progress decides every seed, so a run may stop anywhere."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.files.checkpoint import save_adapter
from ipdiverse.errors import ArgumentError, Interrupted, ModelError
from ipdiverse.training import build, checkpoints, loss
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.frozen import FrozenEncoders, open_encoders
from ipdiverse.training.validation import Validation
from ipdiverse.writing import ensure_writable_folder, only_one

_PARTS = {"projection": "image_proj", "layers": "ip_adapter", "fusion": "fusion"}


def train(config: TrainConfig) -> Path:
    """Train an adapter, or resume the run that stopped in `config.out`; the finished file."""
    # processes of one run share its folder, which their main one holds
    main = build.open_accelerator(config.mixed_precision).is_main_process
    with only_one(config.out) if main else contextlib.nullcontext():
        return Trainer(config).run()


class Trainer:
    """State of a run; once all is cached and nothing is drawn, encoders' weights are freed."""

    def __init__(self, config: TrainConfig, encoders: FrozenEncoders | None = None) -> None:
        from accelerate.utils import set_seed
        from diffusers.training_utils import EMAModel

        self.out = ensure_writable_folder(Path(config.out))
        self.accelerator = build.open_accelerator(config.mixed_precision)
        processes = self.accelerator.num_processes
        if config.process_batch is not None:
            config = replace(config, batch=config.process_batch * processes)
        device = self.accelerator.device
        encoders = encoders or open_encoders(
            config.base, config.image_encoder, unet=not config.cache
        )
        self.encoders, self.pipe = encoders.to(device), encoders.pipe
        initial = build.initial_adapter(config)
        first = self.accelerator.main_process_first
        self.samples = build.build_samples(config, encoders, initial, first)
        self.config = config = self.samples.config  # `epochs` are `steps` there
        if config.cache:  # before the UNet is loaded: never both in memory
            encoders.set_aside(for_good=not config.num_validation_images)
        draws, seen = config.fusion == "generative", config.num_validation_images
        with_unet = not draws or seen > 0
        if with_unet:
            encoders.load_unet(device)
        # before the types that autocast computes in take the place of the UNet's own
        contents = build.contents_of(config, self.samples.data.records, encoders)
        set_seed(config.seed)  # initial weights; nothing random after that asks the global state
        self.adapter = build.build_adapter(config, encoders, initial, self.samples)
        # attach copies an adapter of another device or type, and the copy would not learn
        self.adapter.to(device, self.pipe.unet.dtype)
        attachment = None
        if with_unet:
            encoder, processor = encoders.images.encoder, encoders.images.processor
            both = {"image_encoder": encoder, "image_processor": processor}
            attachment = attach(self.pipe, self.adapter, **both)
        # after the adapter took the UNet's type: it learns in float32
        loss.hold_as_computed(self.pipe.unet, config.mixed_precision)
        if config.gradient_checkpointing:
            self.pipe.unet.enable_gradient_checkpointing()
        else:
            loss.hold_less(self.pipe.unet)
        records = self.samples.data.records
        held_out = sorted(build.held_out(config, len(records)))
        self.validation = Validation(config, records, held_out, encoders, attachment)
        learning = self._learning()
        self.names, self.parameters = list(learning), list(learning.values())
        self.ema = EMAModel(self.parameters, config.ema, foreach=True) if config.ema else None
        model = (
            loss.TokenFlow(self.adapter)
            if draws
            else loss.PromptedUnet(self.pipe, self.adapter, config.min_snr)
        )
        optimizer = build.build_optimizer(config, self.parameters)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step, self.bad, self.skipped = 0, 0, 0
        share = -(-config.batch // processes)
        self.micro = min(config.micro_batch or share, share)
        self._stop: int | None = None
        self._about = {"settings": checkpoints.without_places(config), "contents": contents}
        self._resume()

    def run(self) -> Path:
        """Train to the last step and write the finished adapter."""
        main = self.accelerator.is_main_process
        if main:
            checkpoints.tidy(self.out, self.config.checkpoints_total_limit)
        reporting = checkpoints.tracking(self.config, self.out, self.step, main)
        with self._catching_signals(), reporting as track:
            for batch in self.batches():
                figures = self.one_step(batch)
                figures |= self._validate()
                track({"step": self.step, **figures})
                last = self.step == self.config.steps or self._stop is not None
                if last or self.step % self.config.checkpointing_steps == 0:
                    self.save()
                if self._stop is not None:
                    raise Interrupted(self._stop)
        target = self.out / checkpoints.ADAPTER
        if main:
            self._save_adapter(target)
        return target

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters that are not frozen, by name."""
        self.adapter.requires_grad_(True).train()
        alone = ("projection", "layers") if self.config.fusion == "generative" else ()
        for part in (*self.config.frozen, *alone):
            if (module := getattr(self.adapter, _PARTS[part])) is not None:
                module.requires_grad_(False)
        learning = {n: p for n, p in self.adapter.named_parameters() if p.requires_grad}
        if not learning:
            frozen = ", ".join(self.config.frozen)
            raise ArgumentError("leaves nothing to learn", where="frozen", found=frozen)
        return learning

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """This process's samples of each step, from the run's present step on."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, steps = self.config.batch, range(self.step, self.config.steps)
        numbers = [[s * size + i for i in range(rank, size, processes)] for s in steps]
        # the loader gets every step's numbers, so there is no sampler's state to save
        workers = self.config.workers
        yield from torch.utils.data.DataLoader(
            self.samples, batch_sampler=numbers, num_workers=workers
        )

    def one_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One update; a batch that is not finite changes nothing and is counted."""
        rate = build.learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mean, most = self._backward(batch), self.config.max_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, most))  # type: ignore[arg-type]
        finite = math.isfinite(mean) and math.isfinite(norm)
        scaled = self.accelerator.scaler is not None
        if finite or scaled:  # a gradient scaler skips the step itself, and lowers its scale
            self.optimizer.step()
        self.skipped += not finite
        # a scaler finds its scale by infinite gradients of a finite loss: not a fault of the run
        self.bad = 0 if finite or (scaled and math.isfinite(mean)) else self.bad + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None and finite:
            # its decay warms up as (1 + step) / (10 + step) of the run, not of its own first call
            self.ema.optimization_step = self.step
            self.ema.step(self.parameters)
        if self.bad >= self.config.bad_batches:
            what = f"{self.bad} batches in a row are not finite"
            fix = "Lower the learning rate, or train in bf16 or fp32."
            raise ModelError(what, where=f"step {self.step}", fix=fix)
        return {"loss": mean, "learning_rate": rate, "norm": norm, "skipped": self.skipped}

    def _validate(self) -> dict[str, float]:
        """Draw held-out cases with the weights that would be saved, when a drawing is due."""
        due = self.step % self.config.validate_every == 0 or self.step == self.config.steps
        if not (due and self.validation.cases and self.accelerator.is_main_process):
            return {}
        self.encoders.to(self.accelerator.device)
        with self._averaged(), self.accelerator.autocast():
            figures = self.validation.run(self.step, self.out)
        if self.config.cache:
            self.encoders.set_aside(for_good=False)
        return figures

    def _backward(self, batch: dict[str, Tensor]) -> float:
        """Gradients of the whole batch's mean loss; smaller micro-batches when memory runs out."""
        while True:
            try:
                return self._accumulate(batch)
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                if self.micro == 1:
                    raise
                self.micro = -(-self.micro // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _accumulate(self, batch: dict[str, Tensor]) -> float:
        """Gradients of the mean loss, micro-batch by micro-batch, and that loss."""
        device, size = self.accelerator.device, len(batch["noise"])
        total = torch.zeros((), device=device)
        for start in range(0, size, self.micro):
            part = {n: t[start : start + self.micro].to(device) for n, t in batch.items()}
            last = start + self.micro >= size  # processes exchange gradients once a step
            together = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            # a flow's tokens are few, as many as its noise has rows
            seen = part.get("latents", part["noise"][..., 0])
            with together, loss.fast_backward(seen, self.config.mixed_precision):
                losses = self.model(part)
                # processes' gradients are averaged; a mean over the whole batch is wanted
                mean = losses.sum() * self.accelerator.num_processes / self.config.batch
                self.accelerator.backward(mean)
            total += losses.detach().float().sum()
        return float(self.accelerator.reduce(total, "sum")) / self.config.batch  # type: ignore[arg-type]

    def save(self) -> None:
        """Write a checkpoint."""
        if self.accelerator.is_main_process:
            tensors = {"optimizer": checkpoints.optimizer_tensors(self.optimizer, self.names)}
            if self.ema is not None:  # else the adapter's file has the weights
                tensors["weights"] = dict(zip(self.names, self.parameters, strict=True))
                tensors["average"] = dict(zip(self.names, self.ema.shadow_params, strict=True))
            counters: dict[str, Any]
            counters = {"skipped": self.skipped, "bad": self.bad, "micro": self.micro}
            if self.accelerator.scaler is not None:
                counters["scaler"] = self.accelerator.scaler.state_dict()
            state = checkpoints.State(self.step, tensors, counters)
            limit = self.config.checkpoints_total_limit
            checkpoints.save_checkpoint(self.out, state, self._about, self._save_adapter, limit)
        self.accelerator.wait_for_everyone()

    def _save_adapter(self, file: Path) -> None:
        """Write the adapter as users load it: averaged weights if the run averages."""
        recipe = self._about["settings"]
        made = {"recipe": recipe, "reference": recipe["reference"], "step": self.step}
        with self._averaged():
            save_adapter(self.adapter, file, made, torch.float32)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights in, if there are any, and the trained ones back."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _resume(self) -> None:
        if not (found := checkpoints.finished(self.out)):
            return
        state, saved = checkpoints.load_checkpoint(found[-1])
        if different := "; ".join(checkpoints.differences(saved, self._about)):
            fix = "Choose a new folder for out, or train with the same settings."
            raise ArgumentError("holds another run", where=self.out, found=different, fix=fix)
        own: dict[str, list[Any]] = {"weights": self.parameters}
        if self.ema is not None:
            own["average"] = self.ema.shadow_params
        with torch.no_grad():
            for group, tensors in own.items():
                for name, tensor in zip(self.names, tensors, strict=True):
                    tensor.copy_(state.tensors[group][name])
        checkpoints.restore_optimizer(self.optimizer, self.names, state.tensors["optimizer"])
        self.step, counters, scaler = state.step, state.counters, self.accelerator.scaler
        self.bad, self.skipped = counters["bad"], counters["skipped"]
        self.micro = min(self.micro, counters["micro"])  # what memory ran out for would do so again
        if scaler is not None and "scaler" in counters:  # early checkpoints lack it
            scaler.load_state_dict(counters["scaler"])

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Let the step in progress end, then save, when asked to stop."""

        def ask(number: int, _: Any) -> None:
            self._stop = number

        before = {}
        with contextlib.suppress(ValueError):  # Python sets handlers in the main thread alone
            before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
