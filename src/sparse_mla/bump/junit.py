"""A comparison as JUnit XML, for the test view of a CI system."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from .compare import NOT_COMPARABLE, WORSE, Comparison

# What XML 1.0 cannot hold: a provider's message may have any character.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def junit(comparison: Comparison) -> str:
    """One test case per case: worse is a failure, not comparable is skipped."""
    suites = ElementTree.Element("testsuites", name="sparse-mla compare")
    for op in comparison.ops:
        cases = [case for case in comparison.cases if case.op == op.op]
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=op.op,
            tests=str(len(cases)),
            failures=str(sum(case.verdict == WORSE for case in cases)),
            skipped=str(sum(case.verdict == NOT_COMPARABLE for case in cases)),
            errors="0",
            time=f"{sum(case.candidate['seconds'] for case in cases):.3f}",
        )
        for case in cases:
            one = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"sparse_mla.{op.op}",
                name=case.case,
                time=f"{case.candidate['seconds']:.3f}",
            )
            told = _ILLEGAL.sub("?", f"{case.verdict}: {case.reason}")
            if case.verdict == WORSE:
                ElementTree.SubElement(one, "failure", message=told, type=case.kind or "error")
            elif case.verdict == NOT_COMPARABLE:
                ElementTree.SubElement(one, "skipped", message=told)
            else:
                ElementTree.SubElement(one, "system-out").text = told
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
