"""Token counts, tokens and prompts without an answer: `/tokenize`, `/detokenize`, `/apply-template`
and `/v1/responses/input_tokens`, in the shapes of vLLM, llama.cpp and OpenAI.
"""
