"""Run by the judge `cohere` with Cohere's package alone: `cohere_python.py URL`."""

import json
import sys

import cohere

QUERY = "red roses"
DOCUMENTS = ["the sky is blue", "red roses are red", "roses"]

client = cohere.ClientV2(api_key="none", base_url=sys.argv[1])
told = client.rerank(model="echo", query=QUERY, documents=DOCUMENTS, top_n=2)
assert [(one.index, one.relevance_score) for one in told.results] == [(1, 1.0), (2, 0.5)]
assert told.id and told.meta.billed_units.search_units == 1
older = cohere.Client(api_key="none", base_url=sys.argv[1])
told = older.rerank(model="echo", query=QUERY, documents=DOCUMENTS, return_documents=True)
assert [one.document.text for one in told.results] == [DOCUMENTS[i] for i in (1, 2, 0)]
try:
    client.rerank(model="nope", query=QUERY, documents=DOCUMENTS)
except cohere.NotFoundError as error:
    assert error.status_code == 404
else:
    raise AssertionError("an unknown model answered")
print(json.dumps({"content": True}))
