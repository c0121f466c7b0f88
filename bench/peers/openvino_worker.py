"""OpenVINO GenAI in a process of its own, which speaks JSON lines: `python openvino_worker.py OPTIONS`.

Options are one JSON object: target, draft (a directory, or null), precision, threads, draft_length. Once it is ready it
answers {"versions": ...}; then every line {"prompt": [ids], "max_new_tokens": n} with {"token_ids": [...],
"seconds": s, "accepted": a, "rounds": r}. It continues greedily and ignores the end of sequence.
"""

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def main(options: dict) -> None:
    """Serves standard input."""
    properties = {
        "INFERENCE_PRECISION_HINT": options["precision"],
        "KV_CACHE_PRECISION": options["precision"],
        "INFERENCE_NUM_THREADS": options["threads"],
    }
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False  # the same prompt comes again: it is to be computed again
    properties["scheduler_config"] = scheduler
    if options["draft"]:
        own = {name: value for name, value in properties.items() if name != "scheduler_config"}
        properties["draft_model"] = genai.draft_model(options["draft"], "CPU", **own)
    pipeline = genai.LLMPipeline(options["target"], "CPU", **properties)
    config = genai.GenerationConfig()
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    if options["draft"]:
        config.num_assistant_tokens = options["draft_length"]
    answer({"versions": {"openvino": ov.__version__, "openvino_genai": genai.__version__}})
    for line in sys.stdin:
        asked = json.loads(line)
        config.max_new_tokens = asked["max_new_tokens"]
        prompt = np.array([asked["prompt"]], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
        began = time.perf_counter()
        result = pipeline.generate(inputs, config)
        seconds = time.perf_counter() - began
        tokens = [int(token) for token in result.tokens[0]]
        accepted, rounds = 0, len(tokens)
        if options["draft"]:
            metrics = result.extended_perf_metrics
            accepted = int(metrics.get_num_accepted_tokens())
            rounds = len(tokens) - accepted
        answer({"token_ids": tokens, "seconds": seconds, "accepted": accepted, "rounds": rounds})


def answer(message: dict) -> None:
    """One line."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
