"""The access policy: which licences and classifications may be used for which purpose, asked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

from conf.errors import PolicyBreach
from conf.schema import Access, Classification, Dataset, Purpose

PURPOSES: dict[str, Purpose] = {
    "train": "training",
    "corpus": "training",
    "test": "evaluation",
    "benchmark": "evaluation",
    "attack": "evaluation",
    "benign": "evaluation",
}
"""What each `use` of a dataset is, to the policy."""


def allows(licence: str, allowed: list[str]) -> bool:
    """Whether an SPDX identifier is in the list; `*` at the end of an entry matches the rest; case does not count, as in SPDX."""
    name = licence.casefold()
    return any(name.startswith(entry[:-1]) if entry.endswith("*") else name == entry for entry in map(str.casefold, allowed))


def breaches(name: str, licence: str, classification: Classification, purpose: Purpose, policy: Mapping[Purpose, Access]) -> list[str]:
    """What the policy says against this use, one sentence each; empty: it is allowed. A purpose without a policy allows nothing."""
    access = policy.get(purpose)
    if access is None:
        return [f"{name}: the policy names nothing that may be used for {purpose}"]
    found = []
    if classification not in access.classifications:
        found.append(f"{name}: classification {classification} may not be used for {purpose} (allowed: {', '.join(access.classifications) or 'none'})")
    if not allows(licence, access.licences):
        found.append(f"{name}: licence {licence} may not be used for {purpose} (allowed: {', '.join(access.licences) or 'none'})")
    return found


def refuse(found: list[str]) -> None:
    """Stop the run with every breach at once, if there is one.

    Raises:
        PolicyBreach: `found` is not empty.
    """
    if found:
        raise PolicyBreach(
            "the access policy does not allow this\n  " + "\n  ".join(found),
            "leave the source out, or have its owner change the policy (conf/collect/policy.yaml) in a pull request",
        )


def check(name: str, licence: str, classification: Classification, purpose: Purpose, policy: Mapping[Purpose, Access]) -> None:
    """Hold one use against the policy.

    Raises:
        PolicyBreach: the licence or the classification may not be used for this purpose.
    """
    refuse(breaches(name, licence, classification, purpose, policy))


def check_datasets(datasets: Mapping[str, Dataset], policy: Mapping[Purpose, Access]) -> None:
    """Hold every dataset against the policy, by the purpose that its `use` implies.

    Raises:
        PolicyBreach: names every breach of every dataset.
    """
    refuse(
        [
            breach
            for name, dataset in sorted(datasets.items())
            for breach in breaches(name, dataset.origin.licence, dataset.origin.classification, PURPOSES[dataset.use], policy)
        ]
    )
