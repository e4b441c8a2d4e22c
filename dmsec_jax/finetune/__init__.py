"""Floor 3, fine-tuning on a few pictures.

`adapters` and `lora` say what is trained, `examples` on what, `dreambooth` how; `driver` runs it with progress
(`progress`) and checkpoints; `recipe` holds all choices of one run.
"""
