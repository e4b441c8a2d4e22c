"""Floor 3, fine-tuning on a few pictures.

`adapters`, `lora` and `oft` say what is trained, `examples` on what, `dreambooth` how; `driver` runs it with progress (`progress`) and
checkpoints; `monitor` and `response` say where it stands.
"""
