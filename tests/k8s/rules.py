"""Everything that rendered manifests must hold beyond their schemas."""

from tests.k8s import operator_rules, security_rules
from tests.k8s.objects import Document


def violations(documents: list[Document]) -> list[str]:
    """Return one message for every fault of a set of documents."""
    rules = (*operator_rules.RULES, *security_rules.RULES)
    return [message for rule in rules for message in rule(documents)]
