"""Evaluation: sets of held-out prompts, their completions, and what is reported of them.

sets.py       the config's sets, resolved, with all that is wrong with them
store.py      completions on disk, chunk by chunk, so that an evaluation can go on
quantities.py pass@k, shares, means; standard errors and bootstrap intervals
report.py     results as JSON, as a table, as metrics
evaluator.py  generates and scores what is not on disk yet
job.py        the `eval` command
overlap.py    prompts that are in the training data too
"""
