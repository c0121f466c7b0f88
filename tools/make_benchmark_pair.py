"""Makes a model pair whose acceptance can be chosen: `python tools/make_benchmark_pair.py DIR --acceptance 0.8`.

The target is a Llama with random weights; the draft is its first layers, with the same embedding, norm and head. What
the target's further layers add is multiplied by a factor: the smaller it is, the more often both choose the same token,
always with 0, hardly ever with 1. `--acceptance` finds the factor by trying, for greedy decoding and 5 proposals a
round; `--factor` gives it. Each layer costs what a trained one costs, whatever the factor. Everything that runs
a Llama checkpoint can load both. The tokenizer and the prompts are those of the demo pair.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    logging,
)

from pair_acceptance import acceptance, agreements, find_factor

__all__ = ["PairOptions", "make_pair", "parse"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How acceptance is measured: proposals a round, prompts of the source, tokens behind each.
_DRAFT_LENGTH = 5
_PROMPTS = 8
_NEW_TOKENS = 96


@dataclass(frozen=True)
class PairOptions:
    """What pair is made, and where. The defaults make a target of 30 million parameters."""

    output: Path
    hidden_size: int = 512
    intermediate_size: int | None = None
    """None: 11/4 of the hidden size."""
    layers: int = 8
    draft_layers: int = 1
    heads: int | None = None
    """None: heads of 64."""
    kv_heads: int | None = None
    """None: as many as heads."""
    factor: float = 0.02
    acceptance: float | None = None
    """Chance that a proposal is accepted when those before it were; in place of a factor."""
    spread: float = 0.02
    """Standard deviation of the weights: the wider, the clearer the best token stands out."""
    seed: int = 0
    dtype: str = "bf16"
    source: Path = Path("models/demo")
    """Where tokenizer and prompts come from."""


def make_pair(options: PairOptions) -> tuple[int, int]:
    """Writes `output`/target, `output`/draft and `output`/pair.json; returns their numbers of parameters.

    Raises ValueError for a draft that has not fewer layers than the target.
    """
    if not 0 < options.draft_layers < options.layers:
        raise ValueError(f"draft_layers must be from 1 to {options.layers - 1}, got {options.draft_layers}")
    tokenizer = AutoTokenizer.from_pretrained(options.source / "target")
    torch.manual_seed(options.seed)
    target = LlamaForCausalLM(_config(options, options.layers, tokenizer))
    draft = LlamaForCausalLM(_config(options, options.draft_layers, tokenizer))
    known = target.state_dict()
    draft.load_state_dict({name: known[name] for name in draft.state_dict()})
    # Damped only afterwards: the draws, and so the draft, are the same for every factor.
    factor, reached = options.factor, None
    if options.acceptance is not None:
        factor, reached = _search(options, target, draft, tokenizer)
    _damp(target, options.draft_layers, factor)
    for name, model in (("target", target), ("draft", draft)):
        _save(model, tokenizer, options.output / name, _DTYPES[options.dtype])
    shutil.copyfile(options.source / "prompts.json", options.output / "prompts.json")
    made = {"factor": factor, "acceptance_per_token": reached, "draft_length": _DRAFT_LENGTH, "seed": options.seed}
    (options.output / "pair.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return target.num_parameters(), draft.num_parameters()


def parse(arguments: Sequence[str] | None = None) -> PairOptions:
    """Options from a command line; None takes the process's own."""
    defaults = PairOptions(Path())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output", type=Path, metavar="DIR", help="gets target/, draft/ and prompts.json")
    add("--hidden-size", type=int, default=defaults.hidden_size, metavar="N")
    add("--intermediate-size", type=int, metavar="N", help="default: 11/4 of the hidden size")
    add("--layers", type=int, default=defaults.layers, metavar="N")
    add("--draft-layers", type=int, default=defaults.draft_layers, metavar="N")
    add("--heads", type=int, metavar="N", help="default: as many as make heads of 64")
    add("--kv-heads", type=int, metavar="N", help="default: as many as heads")
    add("--factor", type=float, default=defaults.factor, help="what the further layers are damped by")
    add("--acceptance", type=float, metavar="RATE", help="per token, such as 0.8: finds the factor; takes a minute")
    add("--spread", type=float, default=defaults.spread, help="standard deviation of the weights")
    add("--seed", type=int, default=defaults.seed)
    add("--dtype", choices=tuple(_DTYPES), default=defaults.dtype, help="of the files")
    add("--source", type=Path, default=defaults.source, metavar="DIR", help="a pair with a tokenizer and prompts.json")
    return PairOptions(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Makes the pair and says what it is."""
    options = parse()
    logging.disable_progress_bar()
    try:
        target, draft = make_pair(options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{options.output}: target of {target / 1e6:.1f} M parameters, draft of {draft / 1e6:.1f} M")


def _config(options: PairOptions, layers: int, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    heads = options.heads or max(1, options.hidden_size // 64)
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size or options.hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=options.kv_heads or heads,
        max_position_embeddings=8192,
        initializer_range=options.spread,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _damp(target: LlamaForCausalLM, draft_layers: int, factor: float) -> None:
    """Multiplies what the layers beyond the draft's add to the residual stream."""
    with torch.no_grad():
        for layer in target.model.layers[draft_layers:]:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)


def _search(
    options: PairOptions, target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[float, float]:
    """The factor for the wanted acceptance, and the acceptance measured with it, in the format of the files."""
    dtype = _DTYPES[options.dtype]
    texts = json.loads((options.source / "prompts.json").read_text(encoding="utf-8"))[:_PROMPTS]
    prompts = [tokenizer(text["text"])["input_ids"] for text in texts]
    proposing = copy.deepcopy(draft).to(dtype).eval()

    def measure(factor: float) -> float:
        damped = copy.deepcopy(target)
        _damp(damped, options.draft_layers, factor)
        agreed = agreements(damped.to(dtype).eval(), proposing, prompts, _NEW_TOKENS)
        return acceptance(agreed, _DRAFT_LENGTH)

    return find_factor(measure, options.acceptance or 0.0)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, place: Path, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


if __name__ == "__main__":
    main()
