"""The API of llama.cpp's own server, where it is not OpenAI's."""
