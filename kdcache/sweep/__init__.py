"""Sweeps: a recipe of many runs that share teachers and stores, and everything that comes of them.

    recipe.py     reading recipe files
    recipes/      the recipes that are shipped
    data.py       whether the data of streams go together
    plan.py       from a recipe to jobs: commands, what each makes, what it needs
    inputs.py     what each job depends on, so that changed data and results are noticed
    run.py        doing the jobs: one by one, or side by side
    summary.py    each run's best iteration and scores, fold by fold
    curve.py      scores over a number in which arms differ

A job is a command of `kdcache`, so that a sweep does nothing that its user could not do by hand. How a command is run
is the caller's choice.
"""

from kdcache.sweep.data import check_data
from kdcache.sweep.plan import Job, Sweep, plan_sweep
from kdcache.sweep.recipe import Recipe, list_recipes, read_recipe
from kdcache.sweep.run import Watcher, run_jobs

__all__ = ["Job", "Recipe", "Sweep", "Watcher", "check_data", "list_recipes", "plan_sweep", "read_recipe", "run_jobs"]
