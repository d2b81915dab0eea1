"""The System One API, `POST /v1/systemone`: typed questions answered with probabilities, in the
shapes that transformers serve, vLLM, SGLang and llama.cpp share.
"""
