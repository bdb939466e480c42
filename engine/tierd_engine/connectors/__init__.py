"""Connectors: tierd as the KV store of engines that are not ours."""
