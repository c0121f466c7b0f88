"""Prompt lookup as a proposer: what it proposes depends on the tokens that it follows, not on how it came to."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from specpair.errors import InternalError
from specpair.ngram import NgramIndex
from specpair_draft.asks import Ask, Turn
from specpair_draft.proposers import NgramProposer

few = st.lists(st.integers(0, 3), max_size=12)


class AtOnce:
    """Executes what is submitted there and then."""

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


def talk(conversation):
    """Runs `conversation(proposer, propose)`, where `propose(ask)` are the proposals that answer an ask."""

    async def run():
        proposer = NgramProposer(AtOnce())

        async def propose(ask):
            answers = asyncio.Queue()
            proposer.ask(ask, answers.put_nowait)
            said = [await answers.get()]
            while len(said) < ask.proposals and not isinstance(said[0], Exception):
                said.append(await answers.get())
            return said

        await conversation(proposer, propose)

    asyncio.run(run())


@given(prompt=few.filter(bool), events=st.lists(st.tuples(st.floats(0, 1), few, st.integers(1, 8)), max_size=6))
def test_it_depends_on_the_tokens_alone(prompt, events):
    """Whatever was appended, replaced and taken back, proposals are those of a new index over the tokens."""

    async def check(proposer, propose):
        tokens = list(prompt)
        proposer.begin(Turn(prompt, len(prompt)))
        for place, ids, count in [(1.0, [], 5), *events]:
            from_position = max(round(place * len(tokens)), 0 if ids else 1)
            tokens[from_position:] = ids
            [timed] = await propose(Ask(from_position, ids, count))
            assert proposer.length == len(tokens)
            assert (timed.index, timed.base_length) == (0, len(tokens))
            assert timed.proposal.token_ids == NgramIndex(tokens).lookup(count)
            assert not timed.proposal.draft_probs
            assert not timed.proposal.confidence

    talk(check)


def test_it_begins_anew_with_every_turn():
    """A turn's tokens replace those of the one before."""

    async def check(proposer, propose):
        for tokens in ([1, 2, 3, 1, 2], [4, 5, 6, 4, 5, 6, 4]):
            proposer.begin(Turn(tokens, len(tokens)))
            [timed] = await propose(Ask(len(tokens), [], 2))
            assert timed.proposal.token_ids == NgramIndex(tokens).lookup(2) != []

    talk(check)


def test_several_proposals_go_on_in_the_same_text():
    """Each continues the one before it, and those for which nothing was found are empty."""

    async def check(proposer, propose):
        tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2]
        proposer.begin(Turn(tokens, len(tokens)))
        answers = await propose(Ask(9, [], 3, proposals=4))
        said = list(tokens)
        for index, timed in enumerate(answers):
            assert (timed.index, timed.base_length) == (index, len(said))
            assert timed.proposal.token_ids == NgramIndex(said).lookup(3)
            said += timed.proposal.token_ids
        answers = await propose(Ask(9, [8, 9], 3, proposals=2))
        assert [timed.proposal.token_ids for timed in answers] == [[], []]

    talk(check)


def test_a_failure_is_an_answer():
    """What goes wrong in the lookup is told as an error of the service, and no proposal comes."""

    async def check(proposer, propose):
        proposer.begin(Turn([1, 2], 2))
        [error] = await propose(Ask(2, [None], 3, proposals=2))
        assert isinstance(error, InternalError)
        assert error.reason == "ENGINE_FAILED"

    talk(check)
