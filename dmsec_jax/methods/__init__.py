"""Floor 4, one file per paper. Methods see functions (`pair_fn`, `eps_fn`), never models, and never import each other.

finextract   which training pictures does a fine-tuned model give away
cgi_dm       was this picture used to fine-tune that model
membership   the same, by losses and by earlier tests
advdm        pictures that are hard to learn from: AdvDM and its family
purify       what undoes that
detection    which pictures were so protected
bayes_dm     fine-tuning on a few pictures with a posterior over the weights
spot         which variables cause which, when some causes are hidden
"""
