"""A small paged inference engine whose KV prefixes live in tierd. Start reading at `llm.LLM`."""
