"""What `tierd-engine bench` runs: what tierd is worth to an engine, workload by workload.

`workloads` says what is asked, `measure` asks it of an engine and counts, `pairs` compares a mode with none, `run` puts modes,
block sizes and rounds together, and `report` shows the medians.
"""
