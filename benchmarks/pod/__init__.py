"""Steps at full size, compiled for TPU topologies that are not here: what fits, what is computed, moved and exchanged, and what that projects to."""
