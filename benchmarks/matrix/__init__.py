"""Every attack against every defence and every fine-tuner: a plan of models, what each gives away, and what that says.

plan       which models, and what decides the result of each       materials  pictures, treated pictures, and what the base model says of them
evaluators what is asked of a model                                store      results by content hash, computed once, whoever asks
workers    processes that share a plan and survive each other      tables     one row per model, as Parquet and CSV
statistics paired comparisons                                      causes     which knobs drive leakage, by `dmsec discover`
page       one HTML page
"""
