"""Training for the demo pair: the tokenizer, token streams, and the loop that fits a target within a time budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_corpus import Document

END_OF_TEXT = "<|endoftext|>"
MAX_POSITIONS = 2048

TokenIds = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one Llama model; heads are `hidden // heads` wide."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class Schedule:
    """How long to train and how; `tokens_per_step` over all rows of a step, learning rates at their peak."""

    minutes: float
    seed: int
    tokens_per_step: int
    length: int
    long_length: int
    long_share: float
    muon_lr: float
    adam_lr: float
    weight_decay: float
    warmup_share: float = 0.02
    flat_share: float = 0.35
    save_minutes: float = 5.0


@dataclass
class Progress:
    """Where a run stands; saved with its checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train_tokenizer(documents: Iterable[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, which ends a document and pads a batch."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], repeats: Callable[[Document], int], seed: int
) -> TokenIds:
    """One stream of token ids: documents in a seeded order, each followed by the end token, `repeats` times in all."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    order = [index for index, document in enumerate(documents) for _ in range(repeats(document))]
    np.random.default_rng(seed).shuffle(order)
    return np.concatenate([np.array([*encoded[index], end], dtype=np.uint16) for index in order])


def random_windows(stream: TokenIds, seed: int, step: int, rows: int, length: int) -> Tensor:
    """Token ids [rows, length + 1] from places drawn by seed and step alone, so that a resumed run goes on exactly."""
    starts = np.random.default_rng((seed, step)).integers(0, len(stream) - length - 1, size=rows)
    return torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64))


def build_model(shape: ModelShape, vocabulary: int, end: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama model with tied embeddings, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def pick_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compile_layers(model: LlamaForCausalLM) -> None:
    """Compiles each decoder layer by itself: the layers share one graph, so it takes seconds, not minutes."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Float32 logits [rows, length, vocabulary] for token ids [rows, length], computed in bf16."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return torch.as_tensor(logits).float()


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of windows [rows, length + 1]."""
    return functional.cross_entropy(logits_of(model, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def build_optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings and norms: about twice the progress per token."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=schedule.muon_lr, weight_decay=schedule.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(outer, lr=schedule.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return [muon, adam]


def rate_scale(share: float, schedule: Schedule) -> float:
    """The learning rate's factor at a share of the budget: warm up, hold, then fall to zero in a straight line."""
    if share < schedule.warmup_share:
        return max(0.02, share / schedule.warmup_share)
    return min(1.0, max(0.0, (1.0 - share) / (1.0 - schedule.flat_share)))


def save_atomically(payload: dict[str, Any], path: Path) -> None:
    """Writes beside the target and renames, so that a kill never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    torch.save(payload, beside)
    beside.replace(path)


class Run:
    """A model being fitted under a time budget, with its optimizers and its checkpoint file."""

    def __init__(self, model: LlamaForCausalLM, schedule: Schedule, checkpoint: Path) -> None:
        self.model, self.schedule, self.checkpoint = model, schedule, checkpoint
        self.optimizers = build_optimizers(model, schedule)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.progress = Progress()
        self._last_save = 0.0
        if checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])
        self._last_save = self.progress.seconds

    def save(self) -> None:
        """Writes the checkpoint now."""
        payload = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        save_atomically(payload, self.checkpoint)
        self._last_save = self.progress.seconds

    @property
    def share(self) -> float:
        """How much of the time budget is spent, from 0 to 1."""
        return self.progress.seconds / (60 * self.schedule.minutes)

    def length(self) -> int:
        """The sequence length in use: the last part of the run is spent on longer sequences."""
        late = self.share >= 1.0 - self.schedule.long_share
        return self.schedule.long_length if late else self.schedule.length

    def apply_gradients(self) -> None:
        """One optimizer step at the learning rate the clock asks for."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = rate_scale(self.share, self.schedule)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def fit(self, batch_loss: Callable[[int, int], Tensor], report: Callable[[str], None]) -> None:
        """Steps until the budget is spent; `batch_loss(step, length)` does one step's backward and gives its loss."""
        mean_loss = math.nan
        while self.share < 1.0:
            began, length = time.perf_counter(), self.length()
            loss = float(batch_loss(self.progress.step, length))
            self.apply_gradients()
            self.progress.step += 1
            self.progress.tokens += self.schedule.tokens_per_step
            self.progress.seconds += time.perf_counter() - began
            mean_loss = loss if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * loss
            if self.progress.step % 20 == 0:
                speed = self.schedule.tokens_per_step / (time.perf_counter() - began)
                report(f"step {self.progress.step} {self.share:.1%} loss {mean_loss:.3f} {speed:.0f} tokens/s")
            if self.progress.seconds - self._last_save > 60 * self.schedule.save_minutes:
                self.save()
                report(f"saved at step {self.progress.step}, {self.progress.tokens} tokens")
        self.save()


def fit_language_model(run: Run, stream: TokenIds, rows: int, report: Callable[[str], None]) -> None:
    """Fits a model to a token stream, `rows` windows at a time, as many times per step as the step's tokens need."""

    def batch_loss(step: int, length: int) -> Tensor:
        windows = random_windows(stream, run.schedule.seed, step, run.schedule.tokens_per_step // length, length)
        at_once = max(1, rows * run.schedule.length // length)
        parts = torch.split(windows.to(run.model.device), at_once)
        total = torch.zeros((), device=run.model.device)
        for part in parts:
            loss = next_token_loss(run.model, part) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    run.fit(batch_loss, report)
