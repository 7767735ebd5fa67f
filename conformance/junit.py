"""Results as JUnit XML, which CI systems read: a test suite for each column, a test for each case."""

from __future__ import annotations

from xml.etree import ElementTree

from .report import Results, failure, left_out


def junit(found: Results) -> str:
    root = ElementTree.Element("testsuites", name="unilabel conformance")
    for run in found["runs"]:
        failed = sum(case["status"] == "fail" for case in run["cases"])
        skipped = sum(case["status"] in ("not applicable", "not run") for case in run["cases"])
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=run["title"],
            tests=str(len(run["cases"]) + bool(run["problem"])),
            failures=str(failed),
            errors=str(int(bool(run["problem"]))),
            skipped=str(skipped),
        )
        if reasons := left_out(run):
            properties = ElementTree.SubElement(suite, "properties")
            for reason, count in reasons:
                name = f"not applicable: {reason}"
                ElementTree.SubElement(properties, "property", name=name, value=str(count))
        for case in run["cases"]:
            test = ElementTree.SubElement(
                suite, "testcase", classname=f"{run['title']}.{case['family']}", name=case["id"]
            )
            if case["status"] == "fail":
                ElementTree.SubElement(test, "failure", message=failure(case)).text = case["call"]
            elif case["status"] != "pass":
                reason = case["reason"] or run["problem"] or case["status"]
                ElementTree.SubElement(test, "skipped", message=f"{case['status']}: {reason}")
        if run["problem"]:
            test = ElementTree.SubElement(suite, "testcase", classname=run["title"], name="runs to its end")
            ElementTree.SubElement(test, "error", message=run["problem"])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
