"""Floor 4, one file per paper. Methods see functions (`pair_fn`, `eps_fn`), never models, and never import each other.

finextract   which training pictures does a fine-tuned model give away
spot         which variables cause which, when some causes are hidden
"""
