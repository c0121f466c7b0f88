from .drafts import *
from .processes import run
from .sessions import *
from specpair import *
def test_dbg(fp32, prompts, reference):
    prompt = next(p for p in prompts if len(p)==255)
    truth = reference.greedy(prompt, 20)
    print(prompt[-5:], truth)
    asks=[]
    def beh(session, ask):
        told = (session.prompt + truth)[len(session.log) :]
        asks.append((ask.round, ask.from_position, list(ask.token_ids), ask.max_tokens, told[:ask.max_tokens], len(session.log), tuple(session.log[255:])==truth[:len(session.log)-255]))
        yield proposal(session, ask, told[: ask.max_tokens])
    async def go(addr):
        async with SpeculativeClient(fp32.target.address, addr, draft_length=4) as c:
            async with c.stream(prompt, SamplingParams(max_new_tokens=20)) as s:
                async for ch in s:
                    print([ (t.id,t.source.value) for t in ch.tokens])
            print(s.result.token_ids==truth, s.stats)
    with serving(beh) as fake:
        run(go(fake.address))
    for a in asks: print(a)
    assert 0
