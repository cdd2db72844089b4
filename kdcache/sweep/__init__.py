"""Sweeps: a recipe of many runs that share teachers and caches, and all their results.

    recipe.py     reading recipe files
    recipes/      the recipes that are shipped
    data.py       whether the data of streams match
    plan.py       from a recipe to jobs: commands, their results, their dependencies
    inputs.py     the inputs of each job, to notice changed data and results
    run.py        running the jobs, one by one or in parallel
    summary.py    each run's best iteration and scores, fold by fold
    curve.py      scores over a number that differs between arms

A job is a command of `kdcache`, so a sweep does nothing that its user could not do by hand. The caller decides how a
command is run.
"""

from kdcache.sweep.data import check_data
from kdcache.sweep.plan import Job, Sweep, plan_sweep
from kdcache.sweep.recipe import Recipe, list_recipes, read_recipe
from kdcache.sweep.run import Watcher, run_jobs

__all__ = ["Job", "Recipe", "Sweep", "Watcher", "check_data", "list_recipes", "plan_sweep", "read_recipe", "run_jobs"]
