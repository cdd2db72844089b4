"""The terms of a loss next to CE and KL, one module per family. `kdcache.settings.terms` lists them.

check_terms(specs, cache.manifest)
term = make_term(loss_term("cosine"), targets=cache, student_taps={"head": 32})
loss = loss + term.weight * term(TermBatch(StudentOutputs(logits), batch))
"""

from kdcache.distill.terms.base import Term, TermBatch, TermSetup, TermTargets
from kdcache.distill.terms.registry import make_term, term_modules, with_companions
from kdcache.distill.terms.unlabelled.predictions import discriminator_parameters
from kdcache.distill.terms.unlabelled.pseudo import labellers, pseudo_labels
from kdcache.settings.methods import loss_term, parse_method, parse_term
from kdcache.settings.term import LossTerm, check_terms
from kdcache.settings.terms import KINDS

__all__ = [
    "KINDS",
    "LossTerm",
    "Term",
    "TermBatch",
    "TermSetup",
    "TermTargets",
    "check_terms",
    "discriminator_parameters",
    "labellers",
    "loss_term",
    "make_term",
    "parse_method",
    "parse_term",
    "pseudo_labels",
    "term_modules",
    "with_companions",
]
