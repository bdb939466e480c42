"""GPU kernels for paged KV. Empty until a kernel exists: the engine runs on torch's own attention."""
