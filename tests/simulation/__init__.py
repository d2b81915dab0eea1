"""Broker cores, worker sessions and client sessions, joined in memory under a virtual clock."""
