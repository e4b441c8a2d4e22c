"""Pieces of `benchmarks.spot`: known networks, other programs, and the judging of what each finds."""
