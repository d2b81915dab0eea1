"""Batches: files of requests that are answered at low priority, line by line.

`lines`, `output` and `work` read, write and work through them; `answering` runs one line through
the doors of the gateway. `python -m client batch` uses these four on two files of its own; at the
gateway, `folder` keeps files and batches, `jobs` runs them, and `routes` and `uploads` are OpenAI's
API, with `forms` for files that arrive.
"""
