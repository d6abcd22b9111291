"""The Python examples of a page of the documentation."""

import re

from paths import ROOT


def example(page: str, heading: str, model: object) -> dict[str, object]:
    """Run the first Python block below a heading on a model; return the names that it defines."""
    section = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}\n")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)[:1]
    assert "runs/mine" in code
    names: dict[str, object] = {}
    exec(code.replace("runs/mine", str(model)), names)
    del names["__builtins__"]
    return names
