"""The part of tierd that decides: plain functions over arrays. No await, no clock, no bytes of blocks."""
