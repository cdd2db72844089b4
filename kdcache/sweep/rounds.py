"""Rounds of self-training: a student's predictions on a stream's images teach the next student.

    teacher -> store -> student (round 1) -> store -> student (round 2) -> ...

An arm with `rounds = 3` becomes three arms. What a round adds to a recipe could be written into it by hand: a store
whose teacher is an arm, and an arm whose streams read that store.

Sources: Lee 2013, "Pseudo-Label"; class-balanced shares that grow by the round: Zou et al. 2018 (CBST), arXiv
1810.07911.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kdcache.errors import RecipeError
from kdcache.run_folder import WEIGHTS
from kdcache.sweep.recipe import STORE, Arm, Flags, Recipe

MOST = 99


def unrolled(recipe: Recipe) -> Recipe:
    """Return the recipe with an arm for each round, and a store for each round but the first.

    Raises: RecipeError for arms whose rounds have no store to renew, and for values that [rounds] does not have.
    """
    _check(recipe.rounds)
    if not any("rounds" in arm.flags for arm in recipe.arms):
        return recipe
    arms, stores = list[Arm](), dict(recipe.stores)
    for arm in recipe.arms:
        if "rounds" not in arm.flags:
            arms.append(arm)
            continue
        for own, renewed in _rounds_of(arm, recipe):
            arms.append(own)
            stores |= renewed
    return replace(recipe, arms=tuple(arms), stores=stores)


def round_name(arm: str, number: int) -> str:
    """The name of the arm of a round, from 1 on."""
    return f"{arm}, round {number}"


def _rounds_of(arm: Arm, recipe: Recipe) -> Iterator[tuple[Arm, dict[str, Flags]]]:
    """Yield each round's arm, and the stores that it reads and the recipe does not have."""
    flags = {key: value for key, value in arm.flags.items() if key != "rounds"}
    rounds = arm.flags["rounds"]
    tables = [dict(table) for table in flags.get("stream", ())]
    taught = [table for table in tables if str(table.get("cache", "")).startswith("@")]
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= MOST:
        raise RecipeError(
            f"rounds of an arm are a whole number from 1 to {MOST}",
            received=f"{rounds!r} of {arm.name!r}",
            remedy="write rounds = 3",
        )
    if not taught:
        raise RecipeError(
            "each round builds the stores of an arm's streams anew",
            received=f"{arm.name!r} with {rounds} rounds, and no stream with cache = '@store'",
            remedy="give the stream whose images have no labels cache = '@store', or leave rounds out",
        )
    weights = recipe.rounds.get("weights", "last-ema" if {**recipe.student, **flags}.get("ema") else "last")
    for number in range(1, rounds + 1):
        name, before = round_name(arm.name, number), f"@{round_name(arm.name, number - 1)}"
        stores: dict[str, Flags] = {}
        streams = [_with_quantile(dict(table), recipe.rounds, number) if table in taught else table for table in tables]
        of_round = {**flags, "stream": streams}
        if number > 1:
            for table in streams:
                if table.get("cache", "") in {own["cache"] for own in taught}:
                    store = str(table["cache"])[1:]
                    renewed = name if store == STORE else f"{name} {store}"
                    stores[renewed] = {**recipe.stores.get(store, {}), "teacher": f"{before}@{weights}"}
                    table["cache"] = f"@{renewed}"
            if recipe.rounds.get("init", "scratch") == "last":
                of_round["init"] = before
        # A student of targets without most classes would teach fewer still.
        of_round.setdefault("collapse", recipe.student.get("collapse", "refuse"))
        yield Arm(name, of_round), stores


def _with_quantile(table: dict[str, Any], rounds: Flags, number: int) -> dict[str, Any]:
    """A stream whose pseudo labels are the share of a round, where [rounds] names shares."""
    shares = rounds.get("quantile")
    if not shares:
        return table
    share = shares[min(number, len(shares)) - 1]
    table["term"] = [
        {**{key: value for key, value in term.items() if key != "threshold"}, "quantile": share}
        if isinstance(term, Mapping) and term.get("kind") == "pseudo"
        else term
        for term in table.get("term", ())
    ]
    return table


def _check(rounds: Flags) -> None:
    """Raises: RecipeError for values that [rounds] does not take."""
    shares = rounds.get("quantile") or [0.5]
    fits = isinstance(shares, list) and shares and all(isinstance(share, float) and 0 < share < 1 for share in shares)
    for key, good, rule, example in (
        ("init", rounds.get("init", "scratch") in ("scratch", "last"), "scratch or last", "'last'"),
        ("quantile", fits, "a list of shares between 0 and 1, one for each round", "[0.2, 0.25, 0.3]"),
        ("weights", rounds.get("weights", "last") in WEIGHTS, ", ".join(WEIGHTS), "'last'"),
    ):
        if not good:
            raise RecipeError(
                f"{key} of [rounds] is {rule}",
                entry="rounds of a recipe",
                received=f"{key} = {rounds[key]!r}",
                remedy=f"write {key} = {example}",
            )
