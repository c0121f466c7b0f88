"""Models that are split over processes, spread over devices, or refused to be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from tests.tiny import VOCABULARY, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from specpair.errors import ModelLoadError, UnavailableError
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.failures import fatal
from specpair_runtime.models.loading import _check_resident
from specpair_runtime.models.mirror import LeadingRunner
from specpair_runtime.models.options import LoadOptions
from specpair_runtime.models.parallel import check_splittable, rank_device
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.serving import ServiceStatus

WIDTH = 8
PROMPT = 64
IDS = random_ids(PROMPT + 4 * WIDTH, seed=5)
# Does not fit into the first part of a message.
LONG = random_ids(511, seed=6)

# What each of the processes runs: rank 0 writes logits of the same rows, in blocks that begin elsewhere each.
_PROCESS = f"""
import sys
import torch
from specpair.errors import ModelLoadError
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.models.serving_model import follow_serving_model, load_serving_model
from specpair_runtime.serving import ServiceStatus

model, output = sys.argv[1:]
ids, prompt, width, long = {IDS}, {PROMPT}, {WIDTH}, {LONG}
config = ModelConfig(model=model, dtype="fp32", device="cpu", slots=2, max_length=512, threads=1)
ranks = Ranks.of_torchrun()
written = {{}}

def decode(runner, offset):
    runner.prefill(0, ids[:prompt], 0)
    logits, position = [], prompt
    while position < len(ids):
        own = ids[position : position + (offset if position == prompt and offset else width)]
        rows = torch.tensor([own + [3] * (width - len(own))])
        logits.append(runner.logits(0, rows, torch.tensor([position]), runner.bucket(position))[0, : len(own)].clone())
        position += len(own)
    return torch.cat(logits)

if ranks.leads:
    runner = load_serving_model(config, [width], ServiceStatus(), ranks=ranks).runner
    written["aligned"] = [decode(runner, offset) for offset in range(width)]
    runner.prefill(1, long, 0)
    last = torch.tensor([[long[-1]] * width])
    written["long"] = runner.logits(1, last, torch.tensor([511]), runner.bucket(511))[0, 0].clone()
    written["heads"] = runner._cache.layers[0].keys.shape[1]
    ranks.send([0])
else:
    follow_serving_model(config, [width], ranks)
try:
    with ranks.all_or_none():
        if ranks.rank == 1:
            raise ValueError("this one cannot")
except (ModelLoadError, ValueError) as error:
    told = error
if ranks.leads:
    torch.save({{**written, "told": str(told)}}, output)
    ranks.close([0])
    ranks.exit(0)
ranks.receive()
ranks.leave()
"""


@pytest.fixture(scope="module")
def three_heads(tmp_path_factory):
    """A Llama with biases whose heads three processes can share."""
    torch.manual_seed(29)
    path = tmp_path_factory.mktemp("three-heads")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return str(path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def written(three_heads, tmp_path_factory):
    """What rank 0 of three processes computed."""
    output = tmp_path_factory.mktemp("ranks") / "logits.pt"
    common = {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, three_heads, str(output)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        assert [process.wait(180) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return torch.load(output, weights_only=True)


def test_the_place_in_the_block_does_not_matter(written):
    """Sums over three processes have the same bits wherever a row stands in its block."""
    first, *others = written["aligned"]
    assert all(torch.equal(first, other) for other in others)


def test_three_processes_compute_what_one_computes(three_heads, written):
    """Logits are those of the model in one process up to rounding, also behind prompts of more than one message."""
    model = AutoModelForCausalLM.from_pretrained(three_heads, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS]), use_cache=False).logits[0, PROMPT:]
        long = model(torch.tensor([[*LONG, LONG[-1]]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(written["aligned"][0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(written["long"], long, rtol=1e-4, atol=1e-4)


def test_each_process_keeps_its_own_heads(written):
    """A slot has the KV of one of the three heads."""
    assert written["heads"] == 1


def test_what_fails_in_one_fails_in_all(written):
    """Rank 0 is told that rank 1 could not."""
    assert written["told"] == "model: rank 1 cannot load it; the log there says why"


REFUSED = {
    "heads": ("gemma", {}, 2, "model", "num_key_value_heads, 1,"),
    "no plan": ("gpt2", {}, 2, "model", "gpt2 has no plan"),
    "other heads": ("llama", {}, 3, "model", "num_attention_heads, 4,"),
    "MLP": ("llama", {}, 32, "model", "intermediate_size, 48,"),
    "quantized": ("llama", {"quantization": "nf4"}, 2, "quantization", "--device-map auto"),
    "spread": ("llama", {"device_map": "auto"}, 2, "device_map", "torchrun"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_by_its_config(tiny, case):
    """Before processes come together each of them knows by itself, and says which option or field it is."""
    model, options, size, field, words = REFUSED[case]
    config = AutoConfig.from_pretrained(tiny.path(model))
    with pytest.raises(ModelLoadError, match=words) as caught:
        check_splittable(config, LoadOptions(tiny.path(model), **options), size)
    assert caught.value.field == field


@pytest.mark.parametrize("device", ["cuda:1", "meta"])
def test_a_process_among_several_takes_its_own_device(device):
    """Naming one device for all processes is refused."""
    with pytest.raises(ModelLoadError) as caught:
        rank_device(LoadOptions("m", device=device), Ranks(0, 2, 0))
    assert caught.value.field == "device"


def test_a_shared_model_is_not_compiled(tiny):
    """--compile on is refused before processes come together."""
    with pytest.raises(ModelLoadError) as caught:
        load_serving_model(
            ModelConfig(model=tiny.path("llama"), compile="on"), [4], ServiceStatus(), ranks=Ranks(0, 2, 0)
        )
    assert caught.value.field == "compile"


def test_nothing_is_computed_out_of_step(tiny):
    """After a call that failed in rank 0 no other one is made: it would meet what the others still wait for."""
    ranks = Ranks(0, 2, 0)
    said = []
    ranks.send = said.append
    runner = LeadingRunner(
        ranks, tiny.reference("llama").model, slots=1, max_length=64, scratch=4, vocabulary=VOCABULARY
    )
    runner.prefill(0, [1, 2, 3], 0)
    assert said == [[4, 0, 0, 1, 2, 3]]
    with pytest.raises(UnavailableError) as caught:
        runner.prefill(0, [VOCABULARY], 0)
    assert fatal(caught.value)
    with pytest.raises(UnavailableError):
        runner.prefill(0, [1, 2, 3], 0)
    assert len(said) == 2


def test_a_device_map_is_made_by_accelerate(tiny):
    """Where one device has room for all, auto puts everything there: the model is whole, and computes the same."""
    if torch.cuda.is_available():
        pytest.skip("auto takes the GPUs")
    options = {"model": tiny.path("llama"), "dtype": "fp32", "slots": 1, "max_length": 64, "threads": 1}
    one, auto = (
        load_serving_model(ModelConfig(**options, device_map=name), [4], ServiceStatus()) for name in ("one", "auto")
    )
    assert auto.loaded.whole
    logits = [
        model.runner.logits(0, torch.tensor([[5, 6, 7, 8]]), torch.tensor([0]), model.runner.bucket(0))
        for model in (one, auto)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("places", [{"a": 0, "b": "cpu"}, {"a": 0, "b": "disk"}, {"": "disk"}])
def test_a_model_that_does_not_fit_is_refused(tiny, places):
    """Parts that would be fetched for every step are refused; layers on several GPUs are not."""
    model = AutoModelForCausalLM.from_pretrained(tiny.path("llama"))
    model.hf_device_map = {"a": 0, "b": 1}
    _check_resident(model)
    model.hf_device_map = places
    with pytest.raises(ModelLoadError) as caught:
        _check_resident(model)
    assert caught.value.field == "device_map"


def test_weights_that_are_split_are_in_the_digest():
    """Two models whose processes hold other numbers have another one, and equal ones the same."""
    code = """
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from specpair_runtime.models.weights_digest import weights_digest

distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
mesh = init_device_mesh("cpu", (1,))

def digest(number):
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(torch.full((4, 4), number), mesh, [Shard(0)]))
    return weights_digest(layer)

print(digest(1.0) == digest(1.0), digest(1.0) == digest(2.0))
distributed.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"]
