"""`gdpo-megatron validate`: a job looked at as closely as it can be without starting it.

What is wrong is found by gdpo_megatron.validate, as for the jobs themselves; the modules here tell
what was resolved, and try what a job would otherwise try first on its ranks. Nothing is written.
"""
