"""The load generator behind `lltm-ray bench` and the notebooks' `generate_load`.

Flow: a plan (`result.LoadPlan`) -> `run.run_load` sends prompts (`prompts`), reads answers (`answer`) -> `LoadResult`.
"""
