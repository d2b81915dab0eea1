"""Peers of the bus: plain forwarders, token sources, installers."""
