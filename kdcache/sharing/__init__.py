"""Sharing what was made: cards that say how to cite and rebuild it, and stores on the Hub.

rebuild.py      the command line that builds a store again, of its manifest
card.py         cards of stores and runs, in Markdown
address.py      hf://datasets/USER/NAME
client.py       the Hub's client, and errors of what it refuses: the extra `hub`, as in all that follow
fetch.py        a repository's files into a folder
push.py         a store's files into a repository
copy.py         stores from and onto the Hub
"""

from kdcache.sharing.address import HubAddress, hub_address
from kdcache.sharing.card import run_card, store_card
from kdcache.sharing.copy import opened, push_store

__all__ = ["HubAddress", "hub_address", "opened", "push_store", "run_card", "store_card"]
