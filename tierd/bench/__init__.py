"""`tierd bench`: what this machine can do, and how close tierd comes to it.

Rule of this package: every figure stands beside its ceiling, the plain thing that tierd cannot beat (a bare socket
round trip, a memcpy, raw O_DIRECT), measured in the same run, interleaved with it, with the same sizes and threads.
Absolute figures drift with the machine and its neighbours; ratios of medians are what is judged.
"""
