"""The older HTTP API of FastChat and LLaVA: controller, worker and API server paths.

Must never open a socket: it translates.
"""
