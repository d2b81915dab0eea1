"""What each golden message shows, in one line, and the text around those lines in GOLDEN.md."""

from typing import Final

SHOWS: Final = {
    "hello_client": "the shortest HELLO: role and name",
    "hello_worker": "a worker with a model, which holds a running and an ended request",
    "welcome": "every field that is required",
    "refuse": "an error with every field, and `fatal`; header id zero: no session",
    "heartbeat_empty": "the empty map, of a client or a broker",
    "heartbeat_worker": "a ready worker with work; `granted` as in CREDIT",
    "heartbeat_engine_ready": "the first one after loading: what HELLO could not know yet",
    "heartbeat_broker": "of a broker to a worker that has several: who waits, what is given back",
    "hello_worker_by_its_instance": "a worker that can be told from another of its name",
    "hello_worker_of_two_brokers": "a worker whose slots two brokers share (appendix A)",
    "goodbye": "a worker leaves in order",
    "drain": "a reason and a deadline",
    "request_chat": "messages with an image part, the image as attachment frame, parameters",
    "request_token_ids": "a completion of token ids",
    "accepted": "queued: three are ahead",
    "assign": "three frames and more: Assign, the client's body, its attachment",
    "assign_attach": "RESUME of a request that the worker holds: attach, with its epoch",
    "cancel": "the empty map",
    "window": "tokens below 8192 may be sent",
    "credit": "32 ASSIGNs in all",
    "credit_recalled": "two of them are asked back (appendix A)",
    "output_worker_ledger": "PROMPT, TOKENS, END by a stop string, FAIL; then the ledger, flagged",
    "output_client": "the same events without flag and ledger, as the broker forwards them",
    "reject": "the worker did not start it, and grants the slot again",
    "resume": "two tokens and seven characters received, one worker lost",
    "resume_with_holder": "the worker that ran it last may still have it",
    "accepted_at_a_worker": "at a worker: name, route, and a lost worker that came back",
    "accepted_continues_by_text": "a resumed request at a worker that goes on from its text",
    "accepted_while_loading": "it waits for its model, which is 40 % loaded",
    "heartbeat_load": "a broker asks a worker to load a model on demand",
    "heartbeat_unload": "a broker asks a worker to have no model loaded",
    "heartbeat_on_demand": "a worker's models: one is loaded, one would take 4 s",
    "heartbeat_load_in_place": "a model is to be loaded, and two give way to it",
    "heartbeat_memory": "one model under two names is loaded, and 2 GiB more must go for another",
    "heartbeat_failed": "a model could not be loaded, and is offered again in 30 s",
    "hello_failed": "a model could not be loaded, and is not offered again by itself",
    "hello_continues_by_ids": "a model whose answers go on after the same tokens, and no more",
    "resume_of_a_suspect": "the epoch after a random step; two workers lost, one of them alone",
    "interrupted_alone": "the worker died and ran nothing else",
    "interrupted": "the worker is gone; RESUME",
    "query": "a verb with arguments; the id is the query's own",
    "answer": "a result",
    "answer_error": "an error in its place",
    "request_model_defaults": "parameters that the caller left to the model",
    "hello_serial": "a model whose requests run one at a time, and why",
    "hello_relay": "a range of versions; a model with its own capacity (appendix B)",
    "welcome_operator": "the session may use the operator's verbs",
    "heartbeat_loading": "half of the weights are there",
    "goodbye_message": "a reason with words for people",
    "request_tools_video": "tools, a call and its result, video frames, parameters, trace context",
    "request_compact": "JSON of a schema without white space",
    "request_keep_special": "special tokens that stay in the text",
    "request_tokenize": "the tokens of the text alone, by id and by name",
    "request_rerank": "pairs of a query and a document, cut where they are too long",
    "request_classify": "a text and token ids to classify",
    "output_scores": "END with the scores 0.75 and 0.25 of a single label",
    "request_embed": "texts and token ids to embed",
    "request_decide": "typed questions about a state with an image",
    "hello_decide": "a kind that came later stands in `further_kinds`",
    "accepted_worker": "ACCEPTED of an older broker: no route",
    "accepted_returned": "a lost worker came back with the request",
    "cancel_reason": "a reason for the log",
    "output_embed": "END with vectors, float32 little-endian",
    "output_decide": "END with the probabilities of each answer",
    "output_prompt": "PROMPT with log probabilities: the first token has none",
    "output_place": "a log probability with the place of its token in the text",
    "output_prompt_tail": "PROMPT for `keep_special`: which are special, and how the prompt ends",
    "request_pieces": "thoughts apart from the content, and a bound for them",
    "request_cut_max_tokens": "as many tokens as there is room for; PROMPT with its usage",
    "request_calls": "calls of tools apart from the content, one at most",
    "output_calls": "a call begins: name, first arguments",
    "output_pieces": "thought and content in one event, then content that ends the answer",
    "hello_worker_with_an_end": "a worker that knows when it will be gone, and why",
    "hello_client_that_hears_of_waits": "a client that wants ACCEPTED again while it waits",
    "accepted_while_it_waits": "queued: two are ahead, when it should start, what it waits for",
    "drain_now": "a drain whose deadline has come, which is not the same as none",
    "heartbeat_with_an_end": "the same, later: its end is near",
}

PAGE_TEXT: Final = """# Golden bytes of the protocol

Written by `python -m tests.protocol.make_golden`; `broker/protocol/SPEC.md` is the protocol.
The two files stand alone: a test in any language can read them.

## Right messages: golden.json

`{{ name: [frame, ...] }}`, frames in hexadecimal, without the routing id: header, body or bodies,
attachments. In all of them the session is 1011...1f, the request 2021...2f, the route 3031...3f.
Decode the frames and compare values; encode the values, decode and compare again: a language
without a separate float type writes 2.0 as an int.

| name | type | shows |
| --- | --- | --- |
{golden}

## Wrong messages: wrong.json

`{{ name: {{ shows, to, after, frames, does, code?, rule }} }}`: a message comes right after those
in `after`, golden messages of the same sender; its sequence number counts on from theirs. Where it
names a session, request or route, put the present one in its place; 5051...5f is nobody's. `rule`
is a number of SPEC.md. `python -m tests.conformance` sends them all and judges what follows.
`does` is one of

| does | meaning |
| --- | --- |
{meaning}

| name | to | shows | does | rule |
| --- | --- | --- | --- | --- |
{wrong}
"""
