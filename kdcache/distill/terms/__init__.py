"""Loss terms beside CE and KL, one module per family.

| kind | compares | on |
| --- | --- | --- |
| `pseudo` | student's classes with the teacher's best, where it is sure | the label's pixels |
| `at` | maps of attention | the teacher's cells |
| `sp` | which images of the batch are alike | each one's own cells |
| `hint`, `cosine` | features, the student's projected | the teacher's cells |
| `cwd` | where each class (or channel of a tap) is strong | the teacher's cells |
| `dist` | how predictions vary over classes and over cells | the target's cells |
| `dkd` | target class and other classes apart | the target's cells |
| `dice`, `lovasz` | how predictions and labels overlap, without a teacher | the label's pixels |
| `entropy` | how undecided predictions are, without a teacher or labels | the label's pixels |
| `consistency` | predictions with those on the weak view that are confident | the label's pixels |
| `adversarial` | predictions on a stream with those on another, by a discriminator | the label's pixels |
| `depth-l1`, `depth-berhu`, `depth-silog` | depth in metres with labels, or a teacher's | the label's pixels |
| `depth-ssi`, `depth-gradient` | the shape of depth, likewise | the label's pixels |

    check_terms(specs, cache.manifest)
    term = make_term(TermSpec("cosine"), targets=cache, student_taps={"head": 32})
    loss = loss + term.weight * term(TermBatch(logits, features, labels, target, stored, pixel_weight, size))
"""

from kdcache.distill.terms.base import HeadBatch, Term, TermBatch, TermTargets
from kdcache.distill.terms.make import discriminator_parameters, make_term, with_companions
from kdcache.distill.terms.required_arrays import arrays_of, check_student, check_terms, resolve_taps
from kdcache.distill.terms.spec import KINDS, Method, TermSpec, parse_method
from kdcache.distill.terms.unlabelled.pseudo import labellers, pseudo_labels

__all__ = [
    "KINDS",
    "HeadBatch",
    "Method",
    "Term",
    "TermBatch",
    "TermSpec",
    "TermTargets",
    "arrays_of",
    "check_student",
    "check_terms",
    "discriminator_parameters",
    "labellers",
    "make_term",
    "parse_method",
    "pseudo_labels",
    "resolve_taps",
    "with_companions",
]
