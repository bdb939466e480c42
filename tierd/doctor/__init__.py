"""What a machine offers tierd and what stands in the way, each with its remedy: `tierd doctor`.

`machine` reads files under a root, `gpu`, `memory` and `storage` judge, `finding` is what they say. Nothing is changed but
one scratch file that the io engine writes and removes.
"""
