"""Share results: cards that say how to cite and rebuild them, and caches on the Hub.

rebuild.py      the command line that builds a cache again, from its manifest
card.py         cards of caches and runs, in Markdown
hub.py          caches from and onto the Hub
"""

from kdcache.sharing.card import run_card, store_card
from kdcache.sharing.hub import HubAddress, PushResult, hub_address, opened, push_store
from kdcache.sharing.rebuild import build_command

__all__ = ["HubAddress", "PushResult", "build_command", "hub_address", "opened", "push_store", "run_card", "store_card"]
