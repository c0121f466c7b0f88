"""The demo pair as processes of their own, a transformers model to compare with, and fake drafts."""

from __future__ import annotations

import json
import random

import pytest

from .drafts import FakeDraft, liar
from .processes import DEMO, Service

_tokenizer = json.loads((DEMO / "target" / "tokenizer.json").read_text())
VOCABULARY = 1 + max(*_tokenizer["model"]["vocab"].values(), *(added["id"] for added in _tokenizer["added_tokens"]))

# Positions of the two targets' slots. The first is short, so that prompts reach its end; the draft's are in between.
FP32_LENGTH = 320
BF16_LENGTH = 512
# The first attended length: a block across it is judged up to it, however right the rest is.
BORDER = 256

_services = pytest.StashKey()


@pytest.fixture(scope="session")
def launch(request, tmp_path_factory):
    """Starts services: `launch("target", *flags)`. All of them end with the session."""
    services = request.config.stash[_services] = []
    logs = tmp_path_factory.mktemp("services")

    def start(role, *flags, **options):
        service = Service(role, logs / f"{len(services)}-{role}.log", *flags, **options)
        services.append(service)
        return service

    yield start
    failures = []
    for service in services:
        service.ask_to_stop()
    for service in services:
        try:
            service.stop()
        except BaseException as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows the ends of the services' logs with a failure."""
    report = yield
    if report.failed:
        for service in item.config.stash.get(_services, ()):
            noteworthy = [line for line in service.text.splitlines() if '"level": "info"' not in line]
            report.sections.append((f"log of {service.role} [{service.process.pid}]", "\n".join(noteworthy[-25:])))
    return report


class Pair:
    """A target with 4 or 8 slots, a draft with more than both, and how to ask the client for each proposer."""

    def __init__(self, target, draft, liar):
        self.target, self.draft = target, draft
        self._liar = liar

    def __call__(self, kind):
        """Addresses of target and draft for "model", "ngram", "none" and "liar"."""
        return self.target.address, {"model": self.draft.address, "liar": self._liar.address}.get(kind, kind)

    def check(self):
        """What must hold between tests: no slot in use, nothing compiled since the start."""
        for service in (self.target, self.draft):
            service.wait_until_free()
            assert service.info().recompilations == 0


@pytest.fixture(scope="session")
def draft(launch):
    """The demo draft."""
    return launch("draft", f"--model={DEMO / 'draft'}", "--slots=16", f"--max-length={FP32_LENGTH}")


@pytest.fixture(scope="session")
def liar_draft():
    """A draft service that lies at random and breaks in the end."""
    fake = FakeDraft(liar(VOCABULARY))
    yield fake
    fake.stop()


@pytest.fixture(scope="session")
def fp32_target(launch):
    """The demo target in fp32, with 4 slots."""
    return launch("target", f"--model={DEMO / 'target'}", "--dtype=fp32", "--slots=4", f"--max-length={FP32_LENGTH}")


@pytest.fixture(scope="session")
def bf16_target(launch):
    """The demo target as it is shipped, with 8 slots."""
    return launch("target", f"--model={DEMO / 'target'}", "--slots=8", f"--max-length={BF16_LENGTH}")


@pytest.fixture
def fp32(fp32_target, draft, liar_draft):
    """The fp32 pair; it is idle again after the test."""
    pair = Pair(fp32_target, draft, liar_draft)
    yield pair
    pair.check()


@pytest.fixture
def bf16(bf16_target, draft, liar_draft):
    """The bf16 pair; it is idle again after the test."""
    pair = Pair(bf16_target, draft, liar_draft)
    yield pair
    pair.check()


@pytest.fixture(scope="session")
def heldout():
    """Texts that the pair was not trained on."""
    return [json.loads(line)["text"] for line in (DEMO / "heldout.jsonl").read_text().splitlines()]


class Reference:
    """transformers on the target's weights in fp32, in this process."""

    def __init__(self):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
        self._model = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32).eval()
        self._torch = torch

    def ids(self, text):
        """Token ids of a text."""
        return tuple(self.tokenizer(text)["input_ids"])

    def text(self, prompt, ids):
        """The text that ids add to a prompt."""
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return self.tokenizer.decode([*prompt, *ids], skip_special_tokens=True)[len(before) :]

    def greedy(self, prompt, max_new_tokens):
        """Ids that `generate` adds to a prompt."""
        ids = self._torch.tensor([prompt])
        mask = self._torch.ones_like(ids)
        threads = self._torch.get_num_threads()
        self._torch.set_num_threads(1)  # the services compute beside this process
        try:
            output = self._model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
        finally:
            self._torch.set_num_threads(threads)
        return tuple(output[0, len(prompt) :].tolist())


@pytest.fixture(scope="session")
def reference(fp32_target):  # starts while this one loads
    return Reference()


@pytest.fixture(scope="session")
def prompts(reference, heldout):
    """Token ids of held-out prompts, from one token to all but a few positions of an fp32 slot."""
    texts = [reference.ids(text) for text in heldout]
    long = [token for ids in texts for token in ids]
    cuts = [long[7 * n : 8 * n] for n in (1, 2, 3, 5, 8, 9, 13, 31, 64, 129)]
    edges = [long[-n:] for n in (255, 256, 257, 296)]
    lengths = {len(ids) for ids in (*cuts, *edges)}
    whole = {len(ids): ids for ids in texts if len(ids) < FP32_LENGTH - 32 and len(ids) not in lengths}
    some = random.Random(1).sample(list(whole.values()), 10)
    return [tuple(ids) for ids in (*cuts, *edges, *some)]
