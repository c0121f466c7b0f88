"""Writes a checkpoint and its tokenizer as OpenVINO models: `python to_openvino.py CHECKPOINT DIRECTORY`.

Runs in an environment of its own with optimum-intel, openvino and openvino-tokenizers.
"""

import sys
from pathlib import Path

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def main(checkpoint: str, directory: str) -> None:
    """Converts; weights keep the checkpoint's format, whatever precision they are run in later."""
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(directory)
    to_ids, to_text = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(to_ids, str(Path(directory) / "openvino_tokenizer.xml"))
    openvino.save_model(to_text, str(Path(directory) / "openvino_detokenizer.xml"))


if __name__ == "__main__":
    main(*sys.argv[1:])
